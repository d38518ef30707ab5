"""From an image and its objects to a sample: presets for stage 1, stage 2 and testing.

To try another augmentation, edit the preset of its stage. Source: the paper's released configuration.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from direct_pt.batch import Objects, Sample
from direct_pt.images.colors import jitter_colors
from direct_pt.images.decoding import Size
from direct_pt.images.geometry import Geometry, fit, fit_into, has_extent
from direct_pt.images.rasterize import rasterize
from direct_pt.images.tiles import Tiling

SIZE_DIVISOR = 32  # the coarsest stride of the backbone's feature maps
MAX_CROP_TRIES = 50
# What --flips means: which of (mirror left to right, mirror top to bottom, exchange rows and columns) half of the
# samples get, each drawn for itself.
FLIPS = {
    "none": (False, False, False),
    "horizontal": (True, False, False),
    "vertical": (False, True, False),
    "both": (True, True, False),
    "dihedral": (True, True, True),
}


def draw_flips(flips: str, rng: np.random.Generator) -> dict[str, Any]:
    """Fields of a Geometry, drawn as `flips`, one of FLIPS, says."""
    names = ("flip", "flip_vertically", "transpose")
    return {name: bool(rng.random() < 0.5) for name, drawn in zip(names, FLIPS[flips], strict=True) if drawn}


class Preset(ABC):
    """The transforms of an image and its objects, drawn before the pixels are read, so that fewer pixels suffice.

    Attributes:
        flips: one of FLIPS.
        color_jitter: see `jitter_colors`; 0 for none.
    """

    flips: str = "none"
    color_jitter: float = 0.0

    @abstractmethod
    def geometry(self, size: Size, objects: Objects, rng: np.random.Generator) -> Geometry:
        """The geometry for an image of `size` (height, width) with these objects, which are in its own frame."""

    @abstractmethod
    def padded_size(self, size: Size) -> Size:
        """The size that a sample of `size` is padded to."""

    def sample(self, image: np.ndarray, objects: Objects, geometry: Geometry, rng: np.random.Generator) -> Sample:
        """The sample of an image, or of a smaller copy [h, w, 3] uint8 RGB, and its objects, by its `geometry`."""
        sample = render(image, objects, geometry, self.padded_size(geometry.frame))
        if self.color_jitter:
            sample = replace(sample, image=jitter_colors(sample.image, self.color_jitter, rng))
        return sample

    def __call__(self, image: np.ndarray, objects: Objects, rng: np.random.Generator) -> Sample:
        """The sample of an image [h, w, 3] uint8 RGB and its objects, both in the original frame."""
        return self.sample(image, objects, self.geometry((image.shape[0], image.shape[1]), objects, rng), rng)


@dataclass(frozen=True)
class PretrainPreset(Preset):
    """Stage 1: fit into frame * U(scale range), crop to the frame, flip half of the images, pad to the frame.

    If a crop contains none of the image's objects, another one is drawn.

    Attributes:
        image_size: side of the square frame, in pixels.
        scale_range: (low, high).
        canvas: (height, width) of a frame that is no square.
    """

    image_size: int = 448
    scale_range: tuple[float, float] = (0.8, 1.2)
    flips: str = "horizontal"
    color_jitter: float = 0.0
    canvas: Size | None = None

    @property
    def frame(self) -> Size:
        """(height, width) of all samples, with their padding."""
        return self.canvas or (self.image_size, self.image_size)

    @property
    def largest_side(self) -> int:
        """The size of the crops that images are read for: of a square frame, with the scale range of the recipe."""
        return math.ceil(max(self.frame) * self.scale_range[1] / PretrainPreset.scale_range[1])

    def geometry(self, size: Size, objects: Objects, rng: np.random.Generator) -> Geometry:
        """Random scale, crop and flip."""
        scale = rng.uniform(*self.scale_range)
        turns = draw_flips(self.flips, rng)
        frame = self.frame[::-1] if turns.get("transpose") else self.frame
        resized = fit_into(size, (int(frame[0] * scale), int(frame[1] * scale)))
        crop = (min(frame[0], resized[0]), min(frame[1], resized[1]))
        targets = objects.boxes[~objects.crowd]
        for _ in range(MAX_CROP_TRIES):
            corner = (int(rng.integers(resized[0] - crop[0] + 1)), int(rng.integers(resized[1] - crop[1] + 1)))
            geometry = Geometry(size, resized, corner, crop, **turns)
            if not len(targets) or has_extent(geometry.boxes(targets)).any():
                return geometry
        # All objects are hard to hit, as in a corner: centre the crop on one of them.
        x, y = targets[rng.integers(len(targets))].reshape(2, 2).mean(axis=0)
        top = int(np.clip(y * resized[0] / size[0] - crop[0] / 2, 0, resized[0] - crop[0]))
        left = int(np.clip(x * resized[1] / size[1] - crop[1] / 2, 0, resized[1] - crop[1]))
        return Geometry(size, resized, (top, left), crop, **turns)

    def padded_size(self, size: Size) -> Size:
        """The same for all samples."""
        return self.frame


@dataclass(frozen=True)
class ResizePreset(Preset):
    """Fit the whole image into (long_side, short_side), pad to a multiple of 32."""

    short_side: int = 800
    long_side: int = 1333

    def geometry(self, size: Size, objects: Objects, rng: np.random.Generator) -> Geometry:
        """The whole image."""
        resized = fit(size, self.short_side, self.long_side)
        return Geometry(size, resized, (0, 0), resized)

    def padded_size(self, size: Size) -> Size:
        """The next multiples of 32."""
        return -(-size[0] // SIZE_DIVISOR) * SIZE_DIVISOR, -(-size[1] // SIZE_DIVISOR) * SIZE_DIVISOR


@dataclass(frozen=True)
class FinetunePreset(ResizePreset):
    """Stage 2: the resized image, half of the images flipped."""

    flips: str = "horizontal"
    color_jitter: float = 0.0

    def geometry(self, size: Size, objects: Objects, rng: np.random.Generator) -> Geometry:
        """The whole image, perhaps flipped."""
        return replace(super().geometry(size, objects, rng), **draw_flips(self.flips, rng))


@dataclass(frozen=True)
class TestPreset(ResizePreset):
    """Testing: as in stage 2, without anything random.

    Attributes:
        tiling: the tiles that are looked at too, each of them transformed as an image; None for none.
    """

    __test__ = False  # pytest would take a class of this name for a test case
    tiling: Tiling | None = None

    def labelled_sample(self, size: Size, objects: Objects, read: Callable[[Size], np.ndarray]) -> Sample:
        """The sample of an image and its objects; arguments as for `image_sample`."""
        geometry = self.geometry(size, objects, np.random.default_rng(0))
        return render(read(geometry.resized), objects, geometry, self.padded_size(geometry.size))

    def image_sample(self, size: Size, read: Callable[[Size], np.ndarray]) -> Sample:
        """The sample of an image without objects.

        Args:
            size: (height, width) of the image.
            read: returns the image [h, w, 3] uint8 RGB, or a smaller copy that has at least the given (height, width).
        """
        return self.labelled_sample(size, Objects.none(), read)

    def black_sample(self, size: Size) -> Sample:
        """The sample that stands in for an unreadable image of `size` (height, width)."""
        return self.image_sample(size, lambda least: np.zeros((*least, 3), np.uint8))


def render(image: np.ndarray, objects: Objects, geometry: Geometry, padded_size: Size) -> Sample:
    """Apply one geometry to pixels, boxes and masks; objects outside of the sample are dropped.

    Args:
        image: [h, w, 3] uint8 RGB, the original or a smaller copy of it.
        objects: in the original's frame.
        geometry: from the original to the sample.
        padded_size: (height, width) that the sample is padded to.
    """
    scale_x, scale_y = geometry.scale
    boxes = geometry.boxes(objects.boxes)
    moved = Objects(boxes, objects.labels, objects.areas * scale_x * scale_y, objects.crowd, objects.segmentations)
    moved = moved.keep(has_extent(boxes))
    return Sample(
        image=torch.from_numpy(geometry.image(image)).permute(2, 0, 1),
        padded_size=padded_size,
        original_size=geometry.original,
        scale=geometry.scale,
        objects=moved,
        masks=None if moved.segmentations is None else rasterize(moved, geometry),
    )
