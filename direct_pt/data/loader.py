"""From the annotation table to batches: the order of images, and reading and transforming them in worker processes.

The order is a function of (seed, epoch), an image's augmentation of (seed, epoch, image): a resumed run, or one with
another number of processes, sees the same samples.
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
from direct_pt.images import UnreadableImage
from direct_pt.transforms import Preset, TestPreset, render

Key = tuple[int, ...]  # (epoch, image), and if it came before in this epoch, how often
MAX_READ_TRIES = 10  # images that are tried in place of an unreadable one


@dataclass(frozen=True)
class SampleOrder:
    """The endless sequence of training images: one permutation after another, each epoch with all images.

    Attributes:
        images: number of images.
        seed: of the permutations.
        micro_batch_size: images that pass through the detector together.
        groups: [images] int group of each image (by aspect ratio); a micro-batch is of one group, except for a few at
            the ends of an epoch. None for no grouping.
        repeats: [images] float64 from 1, how often each image comes in an epoch, on average; None for once.
    """

    images: int
    seed: int
    micro_batch_size: int
    groups: np.ndarray | None = None
    repeats: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Samples per epoch."""
        return self.images if self.repeats is None else math.ceil(self.repeats.sum())

    def epoch(self, epoch: int) -> np.ndarray:
        """[count] the images of one epoch, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count)
        if self.repeats is not None:
            order = self._repeated(rng)[order]
        # The first images complete the micro-batch that the previous epoch began.
        return arrange(order, self.groups, self.micro_batch_size, -epoch * self.count % self.micro_batch_size, rng)

    def micro_batches(self, start: int, stop: int, rank: int, world: int) -> Iterator[list[Key]]:
        """The keys of this process's micro-batches.

        Args:
            start: the first micro-batch, counted over all processes from the start of training.
            stop: one past the last.
            rank: of this process.
            world: number of processes; they take turns.
        """
        known_epoch, order, before = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)
        for micro_batch in range(start + rank, stop, world):
            keys: list[Key] = []
            for position in range(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size):
                epoch, offset = divmod(position, self.count)
                if known_epoch != epoch:
                    known_epoch, order = epoch, self.epoch(epoch)
                    before = _times_before(order) if self.repeats is not None else np.zeros_like(order)
                repeat = (int(before[offset]),) if before[offset] else ()
                keys.append((epoch, int(order[offset]), *repeat))
            yield keys

    def _repeated(self, rng: np.random.Generator) -> np.ndarray:
        """[count] images, each as often as `repeats` says, randomly rounded up or down."""
        assert self.repeats is not None
        ends = np.cumsum(self.repeats * (self.count / self.repeats.sum()))
        copies = np.diff(np.floor(ends + rng.random()), prepend=0).astype(np.int64)
        copies[-1] += self.count - copies.sum()  # a rounding error of the sum
        return np.repeat(np.arange(self.images), copies)


def arrange(
    order: np.ndarray, groups: np.ndarray | None, size: int, missing: int, rng: np.random.Generator
) -> np.ndarray:
    """[n] the images in another order, so that micro-batches are of one group, as far as possible.

    Args:
        order: [n] rows of images.
        groups: the group of each image; None for no grouping.
        size: of a micro-batch.
        missing: images that complete the micro-batch begun before.
        rng: shuffles the micro-batches.
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
    while len(leftovers) < min(missing, len(order)):
        leftovers = np.concatenate([leftovers, chunks.pop()])
    arranged = [chunks[row] for row in rng.permutation(len(chunks))]
    return np.concatenate([leftovers[:missing], *arranged, leftovers[missing:]])


def _times_before(order: np.ndarray) -> np.ndarray:
    """[n] how often each value of `order` [n] occurs before."""
    by_image = np.argsort(order, kind="stable")
    sorted_images = order[by_image]
    times = np.empty_like(order)
    times[by_image] = np.arange(len(order)) - np.searchsorted(sorted_images, sorted_images)
    return times


def repeat_factors(table: AnnotationTable, threshold: float) -> np.ndarray:
    """[N] float64, how often to show each image in an epoch, because few images have some of its classes.

    It is the repeat factor of the image's rarest class: max(1, sqrt(threshold / share of the images that have the
    class)). Source: Gupta, Dollar, Girshick, "LVIS", appendix B.
    """
    image_of = table.image_of_object()
    targets = table.usable() & ~table.crowd
    pairs = np.unique(np.stack([image_of, table.labels])[:, targets], axis=1)
    shares = np.bincount(pairs[1], minlength=len(table.class_names)) / len(table)
    factors = np.ones(len(table))
    np.maximum.at(factors, pairs[0], np.sqrt(threshold / shares[pairs[1]]))
    return factors


class TrainingImages(Dataset[Sample]):
    """Samples by key. An unreadable image is replaced by another one, and listed in the sample."""

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
        for _ in range(MAX_READ_TRIES):
            objects = self.table.objects(image, self.with_masks)
            geometry = self.preset.geometry(self.table.image_size(image), objects, rng)
            try:
                pixels = None if self.cache is None else self.cache.read(image, geometry.resized)
                if pixels is None:
                    pixels = self.table.read_image(image, geometry.resized)
            except UnreadableImage:
                unreadable = (*unreadable, image)
                image = int(rng.integers(len(self.table)))
                continue
            sample = render(pixels, objects, geometry, self.preset.padded_size(geometry.size))
            return replace(sample, index=image, seed=int(rng.integers(2**62)), unreadable=unreadable)
        # Almost no image is readable: an empty sample carries the rows to the training loop, which stops.
        blank = np.zeros((64, 64, 3), np.uint8)
        return replace(self.preset(blank, Objects.none(self.with_masks), rng), index=image, unreadable=unreadable)


class EvaluationImages(Dataset[Sample]):
    """Samples by key, without objects. An unreadable image becomes a black one, and is listed in the sample."""

    def __init__(self, table: AnnotationTable, preset: TestPreset) -> None:
        self.table = table
        self.preset = preset

    def __getitem__(self, key: Key) -> Sample:
        image, size = key[1], self.table.image_size(key[1])
        try:
            sample = self.preset.sample(size, lambda least: self.table.read_image(image, least))
            return replace(sample, index=image)
        except UnreadableImage:
            return replace(self.preset.black_sample(size), index=image, unreadable=(image,))


@dataclass(frozen=True)
class Share:
    """One process's part of the endless sequence of micro-batches; the processes take turns.

    Attributes:
        micro_batch_size: images per micro-batch.
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
    """No more images can be read for now, as when the network is down. The message names the source."""


class Feed(Protocol):
    """The source of training batches."""

    @property
    def source(self) -> str:
        """Its name in messages."""

    def __len__(self) -> int:
        """Images per epoch."""

    def describe(self) -> str:
        """Its size and settings, for the start banner."""

    def objects_per_class(self) -> list[int] | None:
        """Objects of each class; None if they were not counted."""

    def batches(self, share: Share, state: dict[str, Any] | None = None) -> Generator[Batch, None, None]:
        """The micro-batches of one process, resumed from `state`. Closing it ends the worker processes."""

    def state(self, taken: int) -> dict[str, Any] | None:
        """What resuming after `taken` micro-batches needs besides their number, for JSON; None if nothing."""

    def image_name(self, image: int) -> str:
        """The name of one of this process's images."""

    def unreadable_reason(self, image: int) -> str:
        """The image's file, and why it cannot be read."""


@dataclass
class TableFeed:
    """The images of a table, in random order.

    Attributes:
        table: the images and their annotations.
        preset: the transforms.
        seed: of order and augmentation.
        with_masks: whether the detector learns masks.
        num_workers: processes that read.
        grouped: whether a micro-batch has images of similar aspect ratio.
        cache: low-resolution copies of the images; None to read the image files.
        repeat_threshold: see repeat_factors; None for every image once per epoch.
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
        """The table's source."""
        return self.table.source

    def __len__(self) -> int:
        return len(self.table)

    def describe(self) -> str:
        """The table's counts, the repeats of rare classes, and the cache."""
        repeated = ""
        if self.repeat_threshold:
            factors = repeat_factors(self.table, self.repeat_threshold)
            repeated = f"; {int((factors > 1).sum())} with rare classes come up to {factors.max():.1f} times an epoch"
        copies = ""
        if self.cache is not None:
            kind, where = self.cache.made_from["kind"], self.cache.folder
            copies = f"; out of {self.cache.gigabytes:.2g} GB of {kind} copies in {where}"
        return self.table.describe() + repeated + copies

    def objects_per_class(self) -> list[int]:
        """Objects of each class, without crowd regions."""
        labels = self.table.labels[~self.table.crowd]
        return np.bincount(labels, minlength=len(self.table.class_names)).tolist()

    def batches(self, share: Share, state: dict[str, Any] | None = None) -> Generator[Batch, None, None]:
        """The micro-batches of one process; seed and share fix them, `state` is not needed."""
        groups = aspect_groups(self.table) if self.grouped else None
        repeats = repeat_factors(self.table, self.repeat_threshold) if self.repeat_threshold else None
        order = SampleOrder(len(self.table), self.seed, share.micro_batch_size, groups, repeats)
        images = TrainingImages(self.table, self.preset, self.seed, self.with_masks, self.cache)
        keys = partial(order.micro_batches, share.start, share.stop, share.rank, share.world)
        return read_batches(make_loader(images, keys, self.num_workers))

    def state(self, taken: int) -> None:
        """Stateless: seed and position fix the order."""

    def image_name(self, image: int) -> str:
        """The table's name of the image."""
        return self.table.image_name(image)

    def unreadable_reason(self, image: int) -> str:
        """The image's file, and why it cannot be read; it is tried again."""
        return unreadable_reason(self.table, image)


def evaluation_loader(
    table: AnnotationTable, preset: TestPreset, micro_batch_size: int, rank: int, world: int, num_workers: int
) -> DataLoader[Batch]:
    """Batches with every image once over all processes.

    Images of similar aspect ratio share a batch. The batches do not depend on the number of processes, so that neither
    do the detections, which padding influences.
    """
    aspect = table.sizes[:, 0] / table.sizes[:, 1]
    order = np.argsort(aspect, kind="stable")
    batches = [
        [(0, int(image)) for image in order[start : start + micro_batch_size]]
        for start in range(0, len(order), micro_batch_size)
    ]
    return make_loader(EvaluationImages(table, preset), partial(iter, batches[rank::world]), num_workers)


def aspect_groups(table: AnnotationTable) -> np.ndarray:
    """[N] int64, 0 for images that are at least as wide as high, 1 for the others."""
    return (table.sizes[:, 1] < table.sizes[:, 0]).astype(np.int64)


def unreadable_reason(table: AnnotationTable, image: int) -> str:
    """The image's file, and why it cannot be read."""
    try:
        table.read_image(image)
    except UnreadableImage as error:
        return str(error)
    return f"{table.image_name(image)}: could not be read before, and can now"


class _MicroBatches:
    """A batch sampler: the data loader calls `__iter__` for each of its own iterators."""

    def __init__(self, start: Callable[[], Iterator[list[Any]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[Any]]:
        return self.start()


def make_loader(
    images: Dataset[Sample], micro_batches: Callable[[], Iterator[list[Any]]], num_workers: int
) -> DataLoader[Batch]:
    """A data loader that collates the samples whose keys `micro_batches` yields."""
    return DataLoader(
        images,  # type: ignore[arg-type]  # collate makes Batches of its Samples
        batch_sampler=_MicroBatches(micro_batches),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: iterators would draw from the global one, which a resumed run restores
        worker_init_fn=_leave_signals_to_parent,
    )


def read_batches(loader: DataLoader[Batch]) -> Generator[Batch, None, None]:
    """A loader's batches. Closing the generator ends the loader's worker processes.

    Workers ignore stop signals, and would wait forever if an exception that ends the program kept the iterator alive.
    """
    yield from loader


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore stop signals, which may reach all processes, so that the current step can be finished.

    Workers end when their parent process asks them to, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
