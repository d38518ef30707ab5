"""From the annotation table to batches: worker processes read the images and transform them.

An image's augmentation is a function of (seed, epoch, image), as the order is of (seed, epoch): a resumed run, or one
with another number of processes, sees the same samples.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from direct_pt.batch import Batch, Objects, Sample, collate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.image_cache import ImageCache
from direct_pt.data.mixing import Mix, mixed_sample
from direct_pt.data.order import Key, SampleOrder, aspect_groups, repeat_factors
from direct_pt.data.reader_processes import Readers
from direct_pt.images.decoding import UnreadableImage
from direct_pt.transforms import Preset

MAX_READ_TRIES = 10  # images that are tried in place of an unreadable one


class TrainingImages(Dataset[Sample]):
    """Samples by key. An unreadable image is replaced by another one, and listed in the sample."""

    def __init__(
        self,
        table: AnnotationTable,
        preset: Preset,
        seed: int,
        with_masks: bool,
        cache: ImageCache | None = None,
        mix: Mix | None = None,
    ) -> None:
        self.table = table
        self.preset = preset
        self.seed = seed
        self.with_masks = with_masks
        self.cache = cache
        self.mix = mix

    def __getitem__(self, key: Key) -> Sample:
        rng = np.random.default_rng((self.seed, *key))
        if self.mix is not None and rng.random() < self.mix.share:
            sample = mixed_sample(self.mix.kind, key[1], len(self.table), self.preset, self.read, rng, self.with_masks)
        else:
            sample = self.read(key[1], self.preset, rng, self.with_masks)
        return replace(sample, seed=int(rng.integers(2**62)))

    def read(self, image: int, preset: Preset, rng: np.random.Generator, with_masks: bool) -> Sample:
        """The sample of an image, or of another one in place of an unreadable one."""
        unreadable: tuple[int, ...] = ()
        for _ in range(MAX_READ_TRIES):
            objects = self.table.objects(image, with_masks)
            geometry = preset.geometry(self.table.image_size(image), objects, rng)
            try:
                pixels = None if self.cache is None else self.cache.read(image, geometry.resized)
                if pixels is None:
                    pixels = self.table.read_image(image, geometry.resized)
            except UnreadableImage:
                unreadable = (*unreadable, image)
                image = int(rng.integers(len(self.table)))
                continue
            return replace(preset.sample(pixels, objects, geometry, rng), index=image, unreadable=unreadable)
        # Almost no image is readable: an empty sample carries the rows to the training loop, which stops.
        blank = np.zeros((64, 64, 3), np.uint8)
        return replace(preset(blank, Objects.none(with_masks), rng), index=image, unreadable=unreadable)


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
        mix: which samples are made of several images; None for none.
    """

    table: AnnotationTable
    preset: Preset
    seed: int
    with_masks: bool
    num_workers: int
    grouped: bool = False
    cache: ImageCache | None = None
    repeat_threshold: float | None = None
    mix: Mix | None = None

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
        images = TrainingImages(self.table, self.preset, self.seed, self.with_masks, self.cache, self.mix)
        keys = partial(order.micro_batches, share.start, share.stop, share.rank, share.world)
        return iter(make_loader(images, keys, self.num_workers))

    def state(self, taken: int) -> None:
        """Stateless: seed and position fix the order."""

    def image_name(self, image: int) -> str:
        """The table's name of the image."""
        return self.table.image_name(image)

    def unreadable_reason(self, image: int) -> str:
        """The image's file, and why it cannot be read; it is tried again."""
        return unreadable_reason(self.table, image)


def unreadable_reason(table: AnnotationTable, image: int) -> str:
    """The image's file, and why it cannot be read."""
    try:
        table.read_image(image)
    except UnreadableImage as error:
        return str(error)
    return f"{table.image_name(image)}: could not be read before, and can now"


def make_loader(
    images: Dataset[Sample], micro_batches: Callable[[], Iterator[list[Any]]], num_workers: int
) -> Readers[Batch]:
    """Batches of the samples whose keys `micro_batches` yields; iterating gives a generator, to be closed."""
    return Readers(images, micro_batches, num_workers, collate, pin_memory=torch.cuda.is_available())
