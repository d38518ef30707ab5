"""What was found in an image, as the writers of results take it."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from direct_pt.coco_eval import Predictions
from direct_pt.images.decoding import Decoding, Size
from direct_pt.images.visualize import MAX_JPEG_SIDE
from direct_pt.images.windows import Window, read_window
from direct_pt.onnx_detector import Found

MAX_DRAWN_PIXELS = 40_000_000  # of a picture; larger images are drawn smaller


@dataclass(frozen=True)
class Classes:
    """A detector's classes: their names, and the data set's own ids."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """An image and what was found in it.

    Attributes:
        number: from 1.
        path: of the file.
        name: of its results: a relative path without an ending, no two the same.
        size: of the image.
        found: the detections.
        decoding: how the file becomes pixels.
    """

    number: int
    path: Path
    name: Path
    size: Size
    found: Found
    decoding: Decoding

    def named(self, ending: str) -> Path:
        """The relative path of a result; `ending` has at most LONGEST_ENDING bytes."""
        return self.name.with_name(self.name.name + ending)

    @property
    def drawn_smaller(self) -> str:
        """Whether its picture is smaller than the image, in words; empty if not."""
        if drawn_share(self.size) == 1:
            return ""
        limit = f"a JPEG has at most {MAX_JPEG_SIDE} pixels a side"
        if max(self.size) <= MAX_JPEG_SIDE:
            limit = f"a picture here has at most {MAX_DRAWN_PIXELS:,} pixels"
        return f"drawn smaller, as {limit}: {self.path}"

    def pixels(self, window: Window, least: Size | None = None) -> np.ndarray:
        """A part of the image: see `read_window`. Raises UnreadableImage."""
        return read_window(self.path, str(self.path), self.size, window, least, self.decoding)

    def coco(self, classes: Classes) -> list[dict[str, Any]]:
        """The detections as COCO results, "image_id" the number."""
        ids = np.array([self.number])
        return Predictions.of_image(0, self.found, self.size).coco(ids, classes.ids)


Add = Callable[[Seen], None]  # writes the results of an image
Output = AbstractContextManager[Add]


def drawn_share(size: Size) -> float:
    """How large an image is drawn, as a share of its sides."""
    return min(1.0, (MAX_DRAWN_PIXELS / (size[0] * size[1])) ** 0.5, MAX_JPEG_SIDE / max(size))


def relative(path: Path, base: Path) -> str:
    """The path as seen from `base`, with forward slashes."""
    return Path(os.path.relpath(path, base)).as_posix()


def common_folder(paths: Sequence[Path]) -> Path:
    """The folder that all paths lie in."""
    return Path(os.path.commonpath([os.path.normpath(path.absolute().parent) for path in paths]))
