"""Training images from a stream, for sets larger than the disk: read in one direction, window by window.

A window is a thousand rows or so, read into an annotation table; its images are shuffled. The shards are shuffled in
each epoch. Every process reads its own shards, or its own rows if there are too few shards, at its own pace. Three
numbers state its position, so that a resumed run continues with the next image.
"""

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from pyarrow import parquet
from torch.utils.data import Dataset

from direct_pt.batch import Batch, Sample
from direct_pt.data.annotations import AnnotationTable, decode_name
from direct_pt.data.formats.hub_rows import Layout, find_layouts
from direct_pt.data.formats.hugging_face import damaged_file, image_bytes, image_root, load_splits
from direct_pt.data.loader import FeedFailed, Share, TrainingImages, make_loader
from direct_pt.data.order import arrange, aspect_groups
from direct_pt.data.problems import ERROR, DataError, Problems
from direct_pt.data.records import Chunk, read_table
from direct_pt.errors import InputError
from direct_pt.images.decoding import Decoding
from direct_pt.transforms import Preset

ROWS_PER_READ = 100
MAX_WINDOWS_REMEMBERED = 64  # their positions and names: more than are between the reading thread and training
MAX_WRONG_SHARE = 0.01  # of the first window's images that training tolerates; one is always tolerated


@dataclass(frozen=True)
class Place:
    """Where a window of one process's stream begins.

    Attributes:
        epoch: from 0.
        shard: how many of the process's shards have been read.
        row: how many rows of the next shard have been read.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0


@dataclass(frozen=True)
class RowImages:
    """The images of some rows, in memory: see EncodedImages. Pickling one image copies no others."""

    cells: pa.ChunkedArray
    root: Path | None

    fingerprint = ""

    def content(self, row: int) -> bytes:
        """The encoded image. Raises OSError."""
        return image_bytes(self.cells[int(row)].as_py(), self.root)

    def select(self, rows: np.ndarray) -> "RowImages":
        """The images of some rows, copied."""
        return RowImages(self.cells.take(pa.array(rows)), self.root)


@dataclass(frozen=True)
class Stream:
    """One split of a data set that is read in one direction.

    Attributes:
        rows: the rows, with undecoded images.
        layout: of their columns.
        source: name in messages.
        images: how many there are; 0 if unknown.
        root: the folder that image files must lie in.
        decoding: how images become pixels.
        window: rows that are shuffled together.
    """

    rows: datasets.IterableDataset
    layout: Layout
    source: str
    images: int
    root: Path | None
    decoding: Decoding
    window: int

    def __len__(self) -> int:
        return self.images

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the category ids."""
        return tuple(self.layout.classes.values())

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The source's own id of each class."""
        return tuple(self.layout.classes)

    def windows(self, place: Place, seed: int, rank: int, world: int) -> Iterator[tuple[Place, "Window"]]:
        """One process's endless windows from `place` on, each with the place where it begins.

        Raises:
            InputError: there are no rows to read.
        """
        shards = int(self.rows.num_shards)
        strided = shards % world != 0
        for epoch in range(place.epoch, 2**62):
            order = np.random.default_rng((seed, epoch)).permutation(shards)
            own_shards = order if strided else order[rank::world]
            start = place if epoch == place.epoch else Place(epoch)
            pieces: list[pa.Table] = []
            begin, found = start, False
            for piece, end in self._pieces(own_shards.tolist(), start, (rank, world) if strided else (0, 1)):
                pieces.append(piece)
                if sum(map(len, pieces)) >= self.window:
                    yield begin, Window(self, pa.concat_tables(pieces))
                    pieces, begin, found = [], end, True
            if sum(map(len, pieces)):
                yield begin, Window(self, pa.concat_tables(pieces))
            elif not found and start == Place(epoch):
                raise InputError(f"{self.source}: process {rank + 1} of {world} finds no rows to read")

    def _pieces(self, shards: list[int], start: Place, stride: tuple[int, int]) -> Iterator[tuple[pa.Table, Place]]:
        """A few rows at a time, and the place after them. Of `stride` (rank, world), every world-th row."""
        for number in range(start.shard, len(shards)):
            row = start.row if number == start.shard else 0
            shard = self.rows.shard(num_shards=self.rows.num_shards, index=shards[number])
            for piece in shard.skip(row).with_format("arrow").iter(ROWS_PER_READ):
                own = np.flatnonzero((np.arange(row, row + len(piece)) + shards[number]) % stride[1] == stride[0])
                row += len(piece)
                yield piece.take(pa.array(own)), Place(start.epoch, number, row)


def open_stream(data: Path, bbox_format: str, decoding: Decoding, window: int, subset: str | None = None) -> Stream:
    """The training split of a data set on the hub, or of a folder of parquet or image files.

    Raises:
        InputError: it cannot be streamed.
    """
    splits, _, declared = load_splits(data, True, subset)
    if not splits:
        raise InputError(f"--streaming: --data {data} is no data set on the hub, and no folder of parquet files")
    if "train" not in splits:
        raise InputError(f"--streaming: --data {data} has no training split, only {', '.join(splits)}")
    rows = splits["train"]
    if not isinstance(rows, datasets.IterableDataset):
        raise InputError(f"--streaming: --data {data} was written by save_to_disk: read it without --streaming")
    layout = find_layouts(splits, str(data), bbox_format, declared)["train"]
    stated = (rows.info.splits or {}).get(str(rows.split))
    images = stated.num_examples if stated is not None else _rows_of_files(data, str(rows.split), subset)
    undecoded = rows.cast_column(layout.image, datasets.Image(decode=False))
    return Stream(undecoded, layout, f"{data} (train)", images, image_root(data), decoding, window)


def _rows_of_files(data: Path, split: str, subset: str | None) -> int:
    """Rows of a local split's parquet files; 0 if it has other files."""
    place = data.absolute() if data.exists() else data
    files = (datasets.load_dataset_builder(str(place), subset).config.data_files or {}).get(split, [])
    paths = [Path(str(file)) for file in files]
    if not all(path.suffix == ".parquet" and path.is_file() for path in paths):
        return 0
    try:
        return sum(parquet.read_metadata(path).num_rows for path in paths)
    except (pa.ArrowException, OSError) as error:
        text = f"cannot be read as parquet ({error}); mend it, or save the set anew"
        raise InputError(f"{damaged_file(data) or data}: {text}") from error


@dataclass(frozen=True)
class Window:
    """Some rows of a stream: see Source."""

    stream: Stream
    rows: pa.Table
    folder: Path = Path()

    annotation_file = None
    owns_folder = False
    paths_read = ()

    @property
    def source(self) -> str:
        """The stream's name."""
        return self.stream.source

    @property
    def encoded(self) -> RowImages:
        """The images."""
        return RowImages(self.rows[self.stream.layout.image], self.stream.root)

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """The rows as COCO-like records."""
        images, annotations = self.stream.layout.records(self.rows, 0, 1)
        yield "categories", 0, self.stream.layout.category_records()
        yield "images", 0, images
        yield "annotations", 0, annotations

    def table(self, with_masks: bool) -> tuple[AnnotationTable | None, dict[str, str]]:
        """The images without errors, and the reason against each other one by its name."""
        problems = Problems(collects=True)
        try:
            table = read_table(self, problems, self.stream.decoding)
        except DataError as error:
            return None, {f"{self.source}: a window of {len(self.rows)} rows": str(error)}
        errors = [problem for problem in problems.listed if problem.grade == ERROR]
        wrong = {error.image: f"{self.source}: image {error.image}: {error.message}" for error in errors}
        for row in np.unique(table.image_of_object()[table.without_mask()]).tolist() if with_masks else ():
            wrong[table.image_ids[row]] = f"{table.image_name(row)}: has objects without 'segmentation'"
        names = [decode_name(name) for name in table.file_names.tolist()]
        sound = [image not in wrong and name not in wrong for image, name in zip(table.image_ids, names, strict=True)]
        return table.select(np.flatnonzero(sound)), {str(image): reason for image, reason in wrong.items()}


@dataclass(frozen=True)
class StreamKey:
    """One image for a worker process: its own table, its epoch and number, and the samples it replaces."""

    table: AnnotationTable
    epoch: int
    number: int
    replaces: tuple[int, ...]


@dataclass(frozen=True)
class StreamedImages(Dataset[Sample]):
    """Samples by key. An unreadable image becomes a black one, and is listed in the sample."""

    preset: Preset
    seed: int
    with_masks: bool

    def __getitem__(self, key: StreamKey) -> Sample:
        images = TrainingImages(key.table, self.preset, self.seed, self.with_masks)
        sample = images[key.epoch, 0, key.number]
        unreadable = (key.number,) if sample.unreadable else ()
        return replace(sample, index=key.number, unreadable=unreadable + key.replaces)


@dataclass
class StreamFeed:
    """The images of a stream: see Feed.

    Attributes:
        stream: the images and their annotations.
        preset: the transforms.
        seed: of order and augmentation.
        with_masks: whether the detector learns masks.
        num_workers: processes that decode.
        grouped: whether a micro-batch has images of similar aspect ratio.
        drop_empty: whether images without training targets are left out.
    """

    stream: Stream
    preset: Preset
    seed: int
    with_masks: bool
    num_workers: int
    grouped: bool = False
    drop_empty: bool = False
    _marks: deque[tuple[int, Place, list[str]]] = field(default_factory=lambda: deque(maxlen=MAX_WINDOWS_REMEMBERED))
    _share: Share | None = None
    _first: int = 0  # samples that were used before this run began
    _reasons: dict[int, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The stream's name."""
        return self.stream.source

    def __len__(self) -> int:
        return self.stream.images

    def describe(self) -> str:
        """What is known about the stream without reading it."""
        rows = self.stream.rows
        return (
            f"about {len(self)} images in {rows.num_shards} shard(s), streamed from {self.stream.source}, "
            f"{self.stream.window} shuffled at a time"
        )

    def objects_per_class(self) -> None:
        """Not counted: that would take reading the whole stream."""

    def check(self) -> None:
        """Read the first window before training starts. Raises InputError if many of its images are wrong."""
        _, window = next(self.stream.windows(Place(), self.seed, 0, 1))
        table, wrong = window.table(self.with_masks)
        if wrong and (table is None or len(wrong) > max(1, MAX_WRONG_SHARE * len(window.rows))):
            first = next(iter(wrong.values()))
            raise InputError(f"{len(wrong)} of the first {len(window.rows)} images are wrong, first: {first}")

    def batches(self, share: Share, state: dict[str, Any] | None = None) -> Generator[Batch, None, None]:
        """The micro-batches from `state` on; if that is of another number of processes, from the next epoch on."""
        self._share = share
        self._first = share.start // share.world * share.micro_batch_size
        place, skipped = Place(), 0
        if state is not None:
            place, skipped = Place(**state["place"]), state["skipped"]
            if [state["rank"], state["world"]] != [share.rank, share.world]:
                place, skipped = Place(place.epoch + 1), 0
        images = StreamedImages(self.preset, self.seed, self.with_masks)
        return iter(make_loader(images, partial(self._micro_batches, share, place, skipped), self.num_workers))

    def state(self, taken: int) -> dict[str, Any] | None:
        """The place of the next sample's window, and how many of its samples have been used."""
        assert self._share is not None
        done = self._first + taken * self._share.micro_batch_size
        started = [(count, place) for count, place, _ in self._marks if count <= done]
        if not started:
            return None
        count, place = started[-1]
        return {"place": asdict(place), "skipped": done - count, "rank": self._share.rank, "world": self._share.world}

    def image_name(self, image: int) -> str:
        """The name of an image of one of the last windows."""
        assert self._share is not None
        number = image // self._share.world
        for count, _, names in reversed(self._marks):
            if count <= number < count + len(names):
                return f"{self.stream.source}: {names[number - count]}"
        return f"{self.stream.source}: image {image} of this run"

    def unreadable_reason(self, image: int) -> str:
        """The image's file and why it cannot be read, as found while reading."""
        return self._reasons.get(image, f"{self.image_name(image)}: cannot be read as an image")

    def _micro_batches(self, share: Share, place: Place, skipped: int) -> Iterator[list[StreamKey]]:
        """The keys of this process's micro-batches; the first window's first `skipped` samples are left out."""
        done, size = self._first, share.micro_batch_size
        wrong: list[str] = []
        keys: list[StreamKey] = []
        last_epoch = place.epoch  # the last one that had an image
        left = len(range(share.start + share.rank, share.stop, share.world))
        for begin, window in _read_ahead(self.stream.windows(place, self.seed, share.rank, share.world)):
            if begin.epoch > last_epoch + 1:
                raise FeedFailed("no image of a whole epoch can be trained on")
            table, reasons = window.table(self.with_masks)
            wrong += reasons.values()
            if table is None:
                continue
            chosen = np.arange(len(table))
            if self.drop_empty:
                chosen = np.flatnonzero(table.targets_per_image() > 0)
            rng = np.random.default_rng((self.seed, *asdict(begin).values()))
            groups = aspect_groups(table) if self.grouped else None
            order = arrange(rng.permutation(chosen), groups, size, -(done - skipped) % size, rng)
            names = [decode_name(table.file_names[row]) for row in order.tolist()]
            self._marks.append((done - skipped, begin, names))
            for row in order[skipped:].tolist():
                last_epoch = begin.epoch
                number = done * share.world + share.rank
                if wrong:
                    self._reasons[number] = wrong[0]
                replaces = (number,) if wrong else ()
                wrong = wrong[1:]
                alone = replace(table.select(np.array([row])), class_names=(), category_ids=(), repairs={})
                keys.append(StreamKey(alone, begin.epoch, number, replaces))
                done += 1
                if len(keys) == size:
                    yield keys
                    keys, left = [], left - 1
                    if not left:
                        return
            skipped = 0


def _read_ahead(windows: Iterator[tuple[Place, Window]]) -> Iterator[tuple[Place, Window]]:
    """The same windows; a thread reads the next one while the last one is used."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    ended = threading.Event()

    def put(item: Any) -> None:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.5)
                return
            except queue.Full:
                pass

    def read() -> None:
        try:
            for window in windows:
                put(window)
                if ended.is_set():
                    return
        except InputError as error:
            put(error)
        except Exception as error:  # the library's errors have no common base class
            put(FeedFailed(f"{type(error).__name__}: {' '.join(str(error).split()):.300}"))

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        ended.set()
