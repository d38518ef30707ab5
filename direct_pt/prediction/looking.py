"""The detections in image files, whole or in tiles: worker processes read, the detector computes batches."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from torch.utils.data import Dataset

from direct_pt.batch import Sample
from direct_pt.data.loader import make_loader
from direct_pt.data.reader_processes import runs
from direct_pt.images.decoding import Decoding, Size, UnreadableImage, image_size, read_image
from direct_pt.images.geometry import fit
from direct_pt.images.tiles import TileMerger, Tiling
from direct_pt.images.windows import Window, read_window
from direct_pt.models.api import DetectorAPI
from direct_pt.onnx_detector import Found
from direct_pt.transforms import TestPreset

AHEAD = 16  # batches, among whose files those of one shape are put together
BLACK = (32, 32)  # the size of what stands in for a file that cannot be read
Part = tuple[int, Window, Size]  # file, part of its image, and size of that


class Looked(NamedTuple):
    """What was found in a file.

    Attributes:
        file: its place in the list.
        size: of the image.
        found: the detections to show; None where it cannot be read.
    """

    file: int
    size: Size
    found: Found | None


class ImageFiles(Dataset[Sample]):
    """Test samples of files, by place in the list, or of parts of them; an unreadable one is black, and named."""

    def __init__(self, paths: list[Path], preset: TestPreset, decoding: Decoding) -> None:
        self.paths = paths
        self.preset = preset
        self.decoding = decoding
        self.sizes: dict[int, Size] = {}  # of those that are looked at in parts

    def __getitem__(self, key: int | Part) -> Sample:
        index, window, full = (key, None, None) if isinstance(key, int) else key
        path = self.paths[index]

        def read(least: Size) -> np.ndarray:
            if window is None or full is None:
                return read_image(path, size, least, self.decoding)
            return read_window(path, str(path), full, window, least, self.decoding)

        try:
            size = image_size(path, self.decoding) if window is None else window.size
            return replace(self.preset.image_sample(size, read), index=index)
        except UnreadableImage:
            size = self._size(index) if window is None else window.size  # images and parts of one shape share a batch
            return replace(self.preset.black_sample(size), index=index, unreadable=(index,))

    def batches(self, at_once: int) -> Iterator[list[int]]:
        """Places in the list, `at_once` together: near files of one shape, once resized and padded, and no others, as
        padding changes what is found."""
        for ahead in runs(0, len(self.paths), AHEAD * at_once if at_once > 1 else 1):
            shapes: dict[Size, list[int]] = {}
            for index in ahead:
                shapes.setdefault(self._shape(index) if at_once > 1 else BLACK, []).append(index)
            for alike in shapes.values():
                yield from (alike[first : first + at_once] for first in range(0, len(alike), at_once))

    def _shape(self, index: int) -> Size:
        """(height, width) that the detector computes for a file."""
        return self.preset.padded_size(fit(self._size(index), self.preset.short_side, self.preset.long_side))

    def _size(self, index: int) -> Size:
        """(height, width) of a file's image, as its header says."""
        try:
            return image_size(self.paths[index], self.decoding)
        except UnreadableImage:
            return BLACK

    def parts(self, tiling: Tiling, at_once: int) -> Iterator[list[Part]]:
        """Keys of the tiles of each image, and of the whole, with those of one size together."""
        for index in range(len(self.paths)):
            self.sizes[index] = size = self._size(index)
            windows = tiling.windows(size)
            for shape in dict.fromkeys(window.size for window in windows):
                alike = [(index, window, size) for window in windows if window.size == shape]
                yield from (alike[first : first + at_once] for first in range(0, len(alike), at_once))


def look_at(
    detector: DetectorAPI,
    images: ImageFiles,
    thresholds: np.ndarray,
    accelerator: Accelerator,
    at_once: int,
    num_workers: int,
) -> Generator[Looked, None, None]:
    """The detections in all files, in their order, above `thresholds` [C]; in tiles if the images' preset says so.

    Args:
        detector: in eval mode.
        images: the files.
        thresholds: see above.
        accelerator: for the precision.
        at_once: images or tiles in a batch.
        num_workers: processes that read.
    """
    tiling = images.preset.tiling
    merger = None if tiling is None else TileMerger(tiling)

    def keys() -> Iterator[list[int]] | Iterator[list[Part]]:
        return images.batches(at_once) if tiling is None else images.parts(tiling, at_once)

    early: dict[int, Looked] = {}  # those of files whose turn has not come
    turn = 0
    with closing(iter(make_loader(images, keys, num_workers))) as batches:
        for batch in batches:
            with accelerator.autocast():
                everything = detector.detect(batch.to(detector.device)).to("cpu").of_images(batch)
            sizes = batch.original_sizes.tolist()
            for index, (height, width), part in zip(batch.indices.tolist(), sizes, everything, strict=True):
                found = None if part is None else part.above(thresholds)
                if merger is None:
                    early[index] = Looked(index, (height, width), found)
                    while turn in early:
                        yield early.pop(turn)
                        turn += 1
                    continue
                size = images.sizes[index]
                for whole in merger.add(index, size, found):
                    yield Looked(index, size, whole)
