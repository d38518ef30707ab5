"""From the annotation table to batches: which image comes when, read and transformed in worker processes.

The order is a function of (seed, epoch), an image's augmentation of (seed, epoch, image): a run that is resumed, or
spread over another number of processes, sees the same samples.
"""

import math
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from direct_pt.batch import Batch, Objects, Sample, collate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.image_cache import ImageCache
from direct_pt.data.images import UnreadableImage
from direct_pt.transforms import Geometry, Preset, render

Key = tuple[int, ...]  # (epoch, image), and how often it came in this epoch before, where it did
READ_TRIES = 10  # images tried in place of an unreadable one


@dataclass(frozen=True)
class SampleOrder:
    """The endless stream of training images: one permutation after another, no image left out in an epoch.

    Attributes:
        images: how many there are.
        seed: of the permutations.
        micro_batch_size: images that go through the detector together.
        groups: [images] int, images of different groups (aspect ratios) do not share a micro-batch, but for a few at an
            epoch's ends; None for no grouping.
        repeats: [images] float64 from 1, how often each comes in an epoch, on average; None for once.
    """

    images: int
    seed: int
    micro_batch_size: int
    groups: np.ndarray | None = None
    repeats: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Samples an epoch."""
        return self.images if self.repeats is None else math.ceil(self.repeats.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """The images [count] of one epoch, in their order."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count)
        if self.repeats is not None:
            order = self._repeated(rng)[order]
        # The first images complete the micro-batch that the epoch before began.
        return arrange(order, self.groups, self.micro_batch_size, -epoch * self.count % self.micro_batch_size, rng)

    def micro_batches(self, start: int, stop: int, rank: int, world: int) -> Iterator[list[Key]]:
        """The keys of this process's micro-batches.

        Args:
            start: the first micro-batch of the stream, counted over all processes.
            stop: one past the last.
            rank: of this process.
            world: number of processes; they take turns.
        """
        known, order, before = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)
        for micro_batch in range(start + rank, stop, world):
            keys: list[Key] = []
            for position in range(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size):
                epoch, offset = divmod(position, self.count)
                if known != epoch:
                    known, order = epoch, self.epoch(epoch)
                    before = _times_before(order) if self.repeats is not None else np.zeros_like(order)
                again = (int(before[offset]),) if before[offset] else ()
                keys.append((epoch, int(order[offset]), *again))
            yield keys

    def _repeated(self, rng: np.random.Generator) -> np.ndarray:
        """[count] rows of the images, each as often as its share says, rounded up or down by chance."""
        assert self.repeats is not None
        ends = np.cumsum(self.repeats * (self.count / self.repeats.sum()))
        copies = np.diff(np.floor(ends + rng.random()), prepend=0).astype(np.int64)
        copies[-1] += self.count - copies.sum()  # lost to rounding
        return np.repeat(np.arange(self.images), copies)


def arrange(
    order: np.ndarray, groups: np.ndarray | None, size: int, begun: int, rng: np.random.Generator
) -> np.ndarray:
    """`order` [n] of images so that whole micro-batches are of one group, as far as they can be.

    Args:
        order: rows of images.
        groups: of all images; None for no grouping.
        size: of a micro-batch.
        begun: images that the micro-batch under way still takes.
        rng: what shuffles the micro-batches.
    """
    if groups is None:
        return order
    chunks, rest = [], []
    for group in np.unique(groups):
        members = order[groups[order] == group]
        whole = len(members) // size * size
        chunks.extend(members[:whole].reshape(-1, size))
        rest.append(members[whole:])
    leftovers = np.concatenate(rest)
    while len(leftovers) < min(begun, len(order)):
        leftovers = np.concatenate([leftovers, chunks.pop()])
    arranged = [chunks[row] for row in rng.permutation(len(chunks))]
    return np.concatenate([leftovers[:begun], *arranged, leftovers[begun:]])


def _times_before(order: np.ndarray) -> np.ndarray:
    """[n] how often each value of `order` [n] came before."""
    by_image = np.argsort(order, kind="stable")
    sorted_images = order[by_image]
    times = np.empty_like(order)
    times[by_image] = np.arange(len(order)) - np.searchsorted(sorted_images, sorted_images)
    return times


def repeat_factors(table: AnnotationTable, threshold: float) -> np.ndarray:
    """[N] float64, how often each image is to be shown in an epoch, for classes that few images have.

    An image counts as its rarest class does: max(1, sqrt(threshold / share of the images that have the class)). Source:
    Gupta, Dollar, Girshick, "LVIS", appendix B.
    """
    image_of = table.image_of_object()
    learnt = table.usable() & ~table.crowd
    pairs = np.unique(np.stack([image_of, table.labels])[:, learnt], axis=1)
    shares = np.bincount(pairs[1], minlength=len(table.class_names)) / len(table)
    factors = np.ones(len(table))
    np.maximum.at(factors, pairs[0], np.sqrt(threshold / shares[pairs[1]]))
    return factors


class TrainingImages(Dataset[Sample]):
    """Samples by key. An unreadable image is replaced by another one and named in the sample."""

    def __init__(
        self, table: AnnotationTable, preset: Preset, seed: int, with_masks: bool, cache: ImageCache | None = None
    ) -> None:
        self.table = table
        self.preset = preset
        self.seed = seed
        self.with_masks = with_masks
        self.cache = cache

    def __getitem__(self, key: Key) -> Sample:
        image, rng = key[1], np.random.default_rng((self.seed, *key))
        unreadable: tuple[int, ...] = ()
        for _ in range(READ_TRIES):
            objects = self.table.objects(image, self.with_masks)
            geometry = self.preset.geometry(self.table.image_size(image), objects, rng)
            try:
                pixels = self._read(image, geometry)
            except UnreadableImage:
                unreadable = (*unreadable, image)
                image = int(rng.integers(len(self.table)))
                continue
            sample = render(pixels, objects, geometry, self.preset.padded_size(geometry.size))
            return replace(sample, index=image, seed=int(rng.integers(2**62)), unreadable=unreadable)
        # Nearly nothing can be read: an empty sample carries the names to the training loop, which stops.
        blank = np.zeros((64, 64, 3), np.uint8)
        return replace(self.preset(blank, Objects.none(self.with_masks), rng), index=image, unreadable=unreadable)

    def _read(self, image: int, geometry: Geometry) -> np.ndarray:
        cached = None if self.cache is None else self.cache.read(image, geometry.resized)
        return self.table.read_image(image, geometry.resized) if cached is None else cached


class EvaluationImages(Dataset[Sample]):
    """Samples by image, without objects. An unreadable image comes back black and named in the sample."""

    def __init__(self, table: AnnotationTable, preset: Preset) -> None:
        self.table = table
        self.preset = preset

    def __getitem__(self, key: Key) -> Sample:
        image, size, objects = key[1], self.table.image_size(key[1]), Objects.none()
        geometry = self.preset.geometry(size, objects, np.random.default_rng(0))  # test presets draw nothing
        unreadable: tuple[int, ...] = ()
        try:
            pixels = self.table.read_image(image, geometry.resized)
        except UnreadableImage:
            pixels, unreadable = np.zeros((*size, 3), np.uint8), (image,)
        sample = render(pixels, objects, geometry, self.preset.padded_size(geometry.size))
        return replace(sample, index=image, unreadable=unreadable)


@dataclass(frozen=True)
class Share:
    """One process's part of the endless stream of micro-batches; the processes take turns.

    Attributes:
        micro_batch_size: images.
        start: the first micro-batch, counted over all processes.
        stop: one past the last.
        rank: of this process.
        world: number of processes.
    """

    micro_batch_size: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1


class FeedFailed(RuntimeError):
    """No more images can be read for now, as when a network is down. The message names the source."""


class Feed(Protocol):
    """What training batches come from."""

    @property
    def source(self) -> str:
        """For messages."""

    def __len__(self) -> int:
        """Images an epoch."""

    def describe(self) -> str:
        """What there is, for the start banner."""

    def objects_a_class(self) -> list[int] | None:
        """Objects to learn of each class; None where nobody counted."""

    def batches(self, share: Share, state: dict[str, Any] | None = None) -> Generator[Batch, None, None]:
        """The micro-batches of one process, from a `state` on. To close it ends the processes that read."""

    def state(self, taken: int) -> dict[str, Any] | None:
        """What going on after `taken` of the micro-batches takes besides their number; in JSON's types."""

    def image_name(self, image: int) -> str:
        """Of one of this process's images."""

    def unreadable_reason(self, image: int) -> str:
        """Which file it is and what is wrong with it, in words."""


@dataclass
class TableFeed:
    """The images of a table, in random order.

    Attributes:
        table: of the images.
        preset: their transforms.
        seed: of order and augmentation.
        with_masks: whether the detector learns masks.
        num_workers: processes that read.
        grouped: whether micro-batches are of like aspect ratio.
        cache: of small copies.
        repeat_threshold: see repeat_factors; None for every image once an epoch.
    """

    table: AnnotationTable
    preset: Preset
    seed: int
    with_masks: bool
    num_workers: int
    grouped: bool = False
    cache: ImageCache | None = None
    repeat_threshold: float | None = None

    @property
    def source(self) -> str:
        """The table's."""
        return self.table.source

    def __len__(self) -> int:
        return len(self.table)

    def describe(self) -> str:
        """The table's counts."""
        repeated = ""
        if self.repeat_threshold:
            factors = repeat_factors(self.table, self.repeat_threshold)
            repeated = f"; {int((factors > 1).sum())} with rare classes come up to {factors.max():.1f} times an epoch"
        copies = ""
        if self.cache is not None:
            kind, where = self.cache.made_from["kind"], self.cache.folder
            copies = f"; out of {self.cache.gigabytes:.2g} GB of {kind} copies in {where}"
        return self.table.describe() + repeated + copies

    def objects_a_class(self) -> list[int]:
        """Crowd regions are none."""
        learnt = self.table.labels[~self.table.crowd]
        return np.bincount(learnt, minlength=len(self.table.class_names)).tolist()

    def batches(self, share: Share, state: dict[str, Any] | None = None) -> Generator[Batch, None, None]:
        """A function of seed and share: there is no state."""
        groups = aspect_groups(self.table) if self.grouped else None
        repeats = repeat_factors(self.table, self.repeat_threshold) if self.repeat_threshold else None
        order = SampleOrder(len(self.table), self.seed, share.micro_batch_size, groups, repeats)
        images = TrainingImages(self.table, self.preset, self.seed, self.with_masks, self.cache)
        part = share.start, share.stop, share.rank, share.world
        return read_batches(make_loader(images, partial(order.micro_batches, *part), self.num_workers))

    def state(self, taken: int) -> None:
        """Nothing."""

    def image_name(self, image: int) -> str:
        """The table's."""
        return self.table.image_name(image)

    def unreadable_reason(self, image: int) -> str:
        """The file is tried again."""
        return unreadable_reason(self.table, image)


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
    return make_loader(EvaluationImages(table, preset), partial(iter, batches[rank::world]), num_workers)


def aspect_groups(table: AnnotationTable) -> np.ndarray:
    """[N] 0 for images that are at least as wide as high, 1 for the others."""
    return (table.sizes[:, 1] < table.sizes[:, 0]).astype(np.int64)


def unreadable_reason(table: AnnotationTable, image: int) -> str:
    """Which file it is and what is wrong with it, in words."""
    try:
        table.read_image(image)
    except UnreadableImage as error:
        return str(error)
    return f"{table.image_name(image)}: could not be read before, and can now"


class _MicroBatches:
    """A batch sampler; the data loader asks it anew for each of its iterators."""

    def __init__(self, start: Callable[[], Iterator[list[Any]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[Any]]:
        return self.start()


def make_loader(
    images: Dataset[Sample], micro_batches: Callable[[], Iterator[list[Any]]], num_workers: int
) -> DataLoader[Batch]:
    """Batches of the samples whose keys `micro_batches` gives."""
    return DataLoader(
        images,  # type: ignore[arg-type]  # collate makes Batches of its Samples
        batch_sampler=_MicroBatches(micro_batches),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: an iterator would draw from the global one, which resuming restores
        worker_init_fn=_leave_signals_to_parent,
    )


def read_batches(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    """A loader's batches. To close it ends the loader's processes, whoever still holds it.

    They would wait for ever otherwise where an exception that ends the program holds it: they ignore stop signals.
    """
    yield from loader


def _leave_signals_to_parent(worker: int) -> None:
    """A stop signal may reach all processes; workers go on so that the step under way can be finished.

    They end when their parent tells them, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
