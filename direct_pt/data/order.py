"""Which image comes when: an endless order of the training images, a function of (seed, epoch) alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from direct_pt.data.annotations import AnnotationTable

Key = tuple[int, ...]  # (epoch, image), and if it came before in this epoch, how often


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


def aspect_groups(table: AnnotationTable) -> np.ndarray:
    """[N] int64, 0 for images that are at least as wide as high, 1 for the others."""
    return (table.sizes[:, 1] < table.sizes[:, 0]).astype(np.int64)
