"""Batches for evaluation: every image of a split once."""

from dataclasses import replace
from functools import partial

import numpy as np
from torch.utils.data import Dataset

from direct_pt.batch import Batch, Objects, Sample
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import make_loader
from direct_pt.data.order import Key
from direct_pt.data.reader_processes import Readers
from direct_pt.images.decoding import UnreadableImage
from direct_pt.transforms import TestPreset


class EvaluationImages(Dataset[Sample]):
    """Samples by key. An unreadable image becomes a black one without objects, and is listed in the sample.

    `targets` says what they have of their objects: nothing, "boxes", or "masks" too.
    """

    def __init__(self, table: AnnotationTable, preset: TestPreset, targets: str = "") -> None:
        self.table = table
        self.preset = preset
        self.targets = targets

    def __getitem__(self, key: Key) -> Sample:
        image, size, with_masks = key[1], self.table.image_size(key[1]), self.targets == "masks"
        objects = self.table.objects(image, with_masks) if self.targets else Objects.none()
        try:
            sample = self.preset.labelled_sample(size, objects, lambda least: self.table.read_image(image, least))
            return replace(sample, index=image, seed=image)
        except UnreadableImage:
            return replace(self.preset.black_sample(size), index=image, unreadable=(image,))


def evaluation_loader(
    table: AnnotationTable,
    preset: TestPreset,
    micro_batch_size: int,
    rank: int,
    world: int,
    num_workers: int,
    targets: str = "",
    origins: np.ndarray | None = None,
) -> Readers[Batch]:
    """Batches with every image once over all processes.

    Images of similar aspect ratio share a batch; tiles do with those of the same shape and image, all of which one
    process gets. The batches do not depend on the number of processes, so that neither do the detections, which padding
    influences.

    Args:
        table: the images.
        preset: the transform.
        micro_batch_size: images in a batch.
        rank: of this process.
        world: number of processes.
        num_workers: processes that read images.
        targets: see `EvaluationImages`.
        origins: [N] of a tiled table, the images that its images are parts of.
    """
    if origins is None:
        order = np.argsort(table.sizes[:, 0] / table.sizes[:, 1], kind="stable")
        keys = runs_of(order, micro_batch_size)[rank::world]
    else:
        own = np.flatnonzero(origins % world == rank)
        changes = (np.diff(origins[own]) != 0) | (np.diff(table.sizes[own], axis=0) != 0).any(axis=1)
        parts = np.split(own, np.flatnonzero(changes) + 1)
        keys = [run for part in parts for run in runs_of(part, micro_batch_size)]
    return make_loader(EvaluationImages(table, preset, targets), partial(iter, keys), num_workers)


def runs_of(images: np.ndarray, length: int) -> list[list[Key]]:
    """The keys of images [n], `length` at a time."""
    rows = images.tolist()
    return [[(0, row) for row in rows[start : start + length]] for start in range(0, len(rows), length)]
