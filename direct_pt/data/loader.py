"""From the annotation table to batches: which image comes when, read and transformed in worker processes.

The order is a function of (seed, epoch), an image's augmentation of (seed, epoch, image): a run that is resumed, or
spread over another number of processes, sees the same samples.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from direct_pt.batch import Batch, Objects, Sample, collate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.image_cache import ImageCache
from direct_pt.data.images import Size, UnreadableImage, read_image
from direct_pt.data.transforms import Geometry, Preset, render

Key = tuple[int, int]  # (epoch, image)
READ_TRIES = 10  # images tried in place of an unreadable one


@dataclass(frozen=True)
class SampleOrder:
    """The endless stream of training images: one permutation after another, no image left out or repeated in an epoch.

    Attributes:
        count: images.
        seed: of the permutations.
        micro_batch_size: images that go through the detector together.
        groups: [count] int, images of different groups (aspect ratios) do not share a micro-batch, but for a few at an
            epoch's ends; None for no grouping.
    """

    count: int
    seed: int
    micro_batch_size: int
    groups: np.ndarray | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """The permutation [count] of one epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count)
        if self.groups is None:
            return order
        size = self.micro_batch_size
        # The first images complete the micro-batch that the epoch before began; whole ones of one group follow.
        begun = -epoch * self.count % size
        chunks, rest = [], []
        for group in np.unique(self.groups):
            members = order[self.groups[order] == group]
            whole = len(members) // size * size
            chunks.extend(members[:whole].reshape(-1, size))
            rest.append(members[whole:])
        leftovers = np.concatenate(rest)
        while len(leftovers) < min(begun, self.count):
            leftovers = np.concatenate([leftovers, chunks.pop()])
        arranged = [chunks[row] for row in rng.permutation(len(chunks))]
        return np.concatenate([leftovers[:begun], *arranged, leftovers[begun:]])

    def micro_batches(self, start: int, stop: int, rank: int, world: int) -> Iterator[list[Key]]:
        """The (epoch, image) keys of this process's micro-batches.

        Args:
            start: the first micro-batch of the stream, counted over all processes.
            stop: one past the last.
            rank: of this process.
            world: number of processes; they take turns.
        """
        known: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))
        for micro_batch in range(start + rank, stop, world):
            keys = []
            for position in range(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size):
                epoch, offset = divmod(position, self.count)
                if known[0] != epoch:
                    known = (epoch, self.epoch(epoch))
                keys.append((epoch, int(known[1][offset])))
            yield keys


class _MicroBatches:
    """A batch sampler; the data loader asks it anew for each of its iterators."""

    def __init__(self, start: Callable[[], Iterator[list[Key]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[Key]]:
        return self.start()


class TrainingImages(Dataset[Sample]):
    """Samples by (epoch, image). An unreadable image is replaced by another one and named in the sample."""

    def __init__(
        self, table: AnnotationTable, preset: Preset, seed: int, with_masks: bool, cache: ImageCache | None = None
    ) -> None:
        self.table = table
        self.preset = preset
        self.seed = seed
        self.with_masks = with_masks
        self.cache = cache

    def __getitem__(self, key: Key) -> Sample:
        epoch, image = key
        rng = np.random.default_rng((self.seed, epoch, image))
        unreadable: tuple[int, ...] = ()
        for _ in range(READ_TRIES):
            size, objects = _size(self.table, image), self.table.objects(image, self.with_masks)
            geometry = self.preset.geometry(size, objects, rng)
            try:
                pixels = self._read(image, size, geometry)
            except UnreadableImage:
                unreadable = (*unreadable, image)
                image = int(rng.integers(len(self.table)))
                continue
            sample = render(pixels, objects, geometry, self.preset.padded_size(geometry.size))
            return replace(sample, index=image, seed=int(rng.integers(2**62)), unreadable=unreadable)
        # Nearly nothing can be read: an empty sample carries the names to the training loop, which stops.
        blank = np.zeros((64, 64, 3), np.uint8)
        return replace(self.preset(blank, Objects.none(self.with_masks), rng), index=image, unreadable=unreadable)

    def _read(self, image: int, size: Size, geometry: Geometry) -> np.ndarray:
        cached = None if self.cache is None else self.cache.read(image, geometry.resized)
        return read_image(self.table.path(image), size, geometry.resized) if cached is None else cached


class EvaluationImages(Dataset[Sample]):
    """Samples by image, without objects. An unreadable image comes back black and named in the sample."""

    def __init__(self, table: AnnotationTable, preset: Preset) -> None:
        self.table = table
        self.preset = preset

    def __getitem__(self, key: Key) -> Sample:
        image, size, objects = key[1], _size(self.table, key[1]), Objects.none()
        geometry = self.preset.geometry(size, objects, np.random.default_rng(0))  # test presets draw nothing
        unreadable: tuple[int, ...] = ()
        try:
            pixels = read_image(self.table.path(image), size, geometry.resized)
        except UnreadableImage:
            pixels, unreadable = np.zeros((*size, 3), np.uint8), (image,)
        sample = render(pixels, objects, geometry, self.preset.padded_size(geometry.size))
        return replace(sample, index=image, unreadable=unreadable)


def training_loader(
    table: AnnotationTable,
    preset: Preset,
    order: SampleOrder,
    part: tuple[int, int, int, int],
    with_masks: bool,
    num_workers: int,
    cache: ImageCache | None = None,
) -> DataLoader[Batch]:
    """Batches of this process's `part` (start, stop, rank, world: see SampleOrder.micro_batches) of the stream."""
    images = TrainingImages(table, preset, order.seed, with_masks, cache)
    return _loader(images, _MicroBatches(partial(order.micro_batches, *part)), num_workers)


def evaluation_loader(
    table: AnnotationTable, preset: Preset, micro_batch_size: int, rank: int, world: int, num_workers: int
) -> DataLoader[Batch]:
    """Every image once over all processes.

    Images of like aspect ratio share a batch; the batches are the same for every number of processes, so that the
    detections, which padding touches, are too.
    """
    aspect = table.sizes[:, 0] / table.sizes[:, 1]
    order = np.argsort(aspect, kind="stable")
    batches = [
        [(0, int(image)) for image in order[start : start + micro_batch_size]]
        for start in range(0, len(order), micro_batch_size)
    ]
    return _loader(EvaluationImages(table, preset), _MicroBatches(partial(iter, batches[rank::world])), num_workers)


def aspect_groups(table: AnnotationTable) -> np.ndarray:
    """[N] 0 for images that are at least as wide as high, 1 for the others."""
    return (table.sizes[:, 1] < table.sizes[:, 0]).astype(np.int64)


def unreadable_reason(table: AnnotationTable, image: int) -> str:
    """Which file it is and what is wrong with it, in words."""
    try:
        read_image(table.path(image), _size(table, image))
    except UnreadableImage as error:
        return str(error)
    return f"{table.path(image)}: could not be read before, and can now"


def _loader(images: Dataset[Sample], batches: _MicroBatches, num_workers: int) -> DataLoader[Batch]:
    return DataLoader(
        images,  # type: ignore[arg-type]  # collate makes Batches of its Samples
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: an iterator would draw from the global one, which resuming restores
        worker_init_fn=_leave_signals_to_parent,
    )


def _leave_signals_to_parent(worker: int) -> None:
    """A stop signal may reach all processes; workers go on so that the step under way can be finished.

    They end when their parent tells them, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _size(table: AnnotationTable, image: int) -> Size:
    height, width = table.sizes[image].tolist()
    return height, width
