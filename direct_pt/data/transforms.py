"""From an image and its objects to a sample: the presets of the two stages and the one for testing.

To try another augmentation, edit the preset that it belongs to. Source: the paper's released configuration.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from direct_pt.batch import Objects, PackedMasks, Sample

SIZE_DIVISOR = 32  # the coarsest stride that the backbone's maps are read at
CROP_TRIES = 50
MASK_DETAIL, MOST_ZOOM = 112, 16  # a mask is drawn this wide and high, roughly, or so many times larger than life


@dataclass(frozen=True)
class Geometry:
    """From the original image to the sample's frame: resize, then crop, then mirror. Sizes are (height, width).

    Attributes:
        original: size of the image.
        resized: size of the whole image after resizing.
        corner: (top, left) of the crop in the resized image, whole pixels.
        size: of the crop.
        flip: mirror the crop horizontally.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    flip: bool

    def zoomed(self, zoom: int) -> "Geometry":
        """The same crop in finer pixels."""
        resized, corner, size = ((pair[0] * zoom, pair[1] * zoom) for pair in (self.resized, self.corner, self.size))
        return replace(self, resized=resized, corner=corner, size=size)

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors."""
        return self.resized[1] / self.original[1], self.resized[0] / self.original[0]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] (x, y) in the sample's frame; they may lie outside it."""
        moved = points * self.scale - np.array(self.corner[::-1])
        if self.flip:
            moved[..., 0] = self.size[1] - moved[..., 0]
        return moved

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [G, 4] in the sample's frame, cut to it; without width or height where they lie outside."""
        corners = self.points(boxes.reshape(-1, 2, 2))
        corners = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        height, width = self.size
        return np.clip(corners, 0, [width, height, width, height])

    def image(self, image: Image.Image) -> Image.Image:
        """The pixels; only those inside the crop are resized."""
        (top, left), (height, width), (scale_x, scale_y) = self.corner, self.size, self.scale
        window = (left / scale_x, top / scale_y, (left + width) / scale_x, (top + height) / scale_y)
        window = (*window[:2], min(window[2], image.width), min(window[3], image.height))
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=window)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def mask(self, mask: np.ndarray) -> tuple[list[int], np.ndarray]:
        """A binary mask [h, w] of the original image, nearest neighbour: its window in the sample, what is there."""
        window, places = [], []
        for axis in (1, 0):  # x, then y
            content = np.flatnonzero(mask.any(axis=1 - axis))
            if not len(content):
                return _nothing()
            factor, shift = self.resized[axis] / self.original[axis], self.corner[axis]
            ends = np.array([np.floor(content[0] * factor), np.ceil((content[-1] + 1) * factor)]) - shift
            low, high = np.clip(ends, 0, self.size[axis]).astype(int).tolist()
            source = (2 * (np.arange(low, high) + shift) + 1) * self.original[axis] // (2 * self.resized[axis])
            if axis == 1 and self.flip:
                low, high, source = self.size[1] - high, self.size[1] - low, source[::-1]
            window.append((low, high))
            places.append(source)
        (left, right), (top, bottom) = window
        if right <= left or bottom <= top:
            return _nothing()
        return [left, top, right, bottom], mask[np.ix_(places[1], places[0])]


@dataclass(frozen=True)
class PretrainPreset:
    """Stage 1: fit into image_size * U(scale range), crop image_size, mirror half of them, pad to image_size.

    A crop that keeps no object of an image that has some is drawn again.
    """

    image_size: int = 448
    scale_range: tuple[float, float] = (0.8, 1.2)
    flip: float = 0.5

    def __call__(self, image: Image.Image, objects: Objects, rng: np.random.Generator) -> Sample:
        """The sample of an RGB image and its objects, both in the original frame."""
        original = (image.height, image.width)
        side = int(self.image_size * rng.uniform(*self.scale_range))
        resized = fit(original, side, side)
        size = (min(self.image_size, resized[0]), min(self.image_size, resized[1]))
        flip = bool(rng.random() < self.flip)
        targets = objects.boxes[~objects.crowd]
        for _ in range(CROP_TRIES):
            corner = (int(rng.integers(resized[0] - size[0] + 1)), int(rng.integers(resized[1] - size[1] + 1)))
            geometry = Geometry(original, resized, corner, size, flip)
            if not len(targets) or has_extent(geometry.boxes(targets)).any():
                break
        else:  # objects in a far corner only: centre the crop on one of them
            x, y = targets[rng.integers(len(targets))].reshape(2, 2).mean(axis=0)
            top = int(np.clip(y * resized[0] / original[0] - size[0] / 2, 0, resized[0] - size[0]))
            left = int(np.clip(x * resized[1] / original[1] - size[1] / 2, 0, resized[1] - size[1]))
            geometry = Geometry(original, resized, (top, left), size, flip)
        return render(image, objects, geometry, (self.image_size, self.image_size))


@dataclass(frozen=True)
class FinetunePreset:
    """Stage 2: fit into (long_side, short_side), mirror half of them, pad to a multiple of 32."""

    short_side: int = 800
    long_side: int = 1333
    flip: float = 0.5

    def __call__(self, image: Image.Image, objects: Objects, rng: np.random.Generator) -> Sample:
        """The sample of an RGB image and its objects, both in the original frame."""
        original = (image.height, image.width)
        resized = fit(original, self.short_side, self.long_side)
        geometry = Geometry(original, resized, (0, 0), resized, flip=bool(rng.random() < self.flip))
        return render(image, objects, geometry, round_up(resized))


@dataclass(frozen=True)
class TestPreset(FinetunePreset):
    """Testing: as in stage 2, never mirrored."""

    __test__ = False  # no test case, whatever its name suggests
    flip: float = 0.0


def fit(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """The largest size of the same aspect ratio with no side above `long_side` and the shorter within `short_side`."""
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def round_up(size: tuple[int, int]) -> tuple[int, int]:
    """To multiples of 32."""
    return -(-size[0] // SIZE_DIVISOR) * SIZE_DIVISOR, -(-size[1] // SIZE_DIVISOR) * SIZE_DIVISOR


def has_extent(boxes: np.ndarray) -> np.ndarray:
    """[G] bool, whether boxes [G, 4] have width and height, in float32 as the detector will see them."""
    boxes = boxes.astype(np.float32)
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def render(image: Image.Image, objects: Objects, geometry: Geometry, padded_size: tuple[int, int]) -> Sample:
    """Pixels, boxes and masks through one geometry; objects that it leaves nothing of are dropped."""
    scale_x, scale_y = geometry.scale
    boxes = geometry.boxes(objects.boxes)
    moved = Objects(boxes, objects.labels, objects.areas * scale_x * scale_y, objects.crowd, objects.segmentations)
    moved = moved.keep(has_extent(boxes))
    pixels = np.array(geometry.image(image))
    return Sample(
        image=torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
        padded_size=padded_size,
        original_size=geometry.original,
        scale=geometry.scale,
        objects=moved,
        masks=None if moved.segmentations is None else rasterize(moved, geometry),
    )


def rasterize(objects: Objects, geometry: Geometry) -> PackedMasks:
    """The objects' masks, drawn at the sample's resolution, small ones at a finer one. Crowd regions get an empty mask.

    A small object's outline would be lost in whole pixels, while its mask target has 28 cells a side whatever its size.
    """
    crops, windows, zooms = [], np.zeros((len(objects), 4), np.int64), np.ones(len(objects), np.int64)
    for row, segmentation in enumerate(objects.segmentations or []):
        window, crop = _nothing()
        if not objects.crowd[row] and segmentation:
            zooms[row] = _zoom(segmentation, geometry)
            finer = geometry.zoomed(int(zooms[row]))
            if isinstance(segmentation, dict):
                window, crop = finer.mask(coco_mask.decode(segmentation))
            else:
                window, crop = _fill([finer.points(polygon) for polygon in segmentation], *finer.size)
        windows[row] = window
        crops.append(crop)
    return PackedMasks.pack(crops, windows, zooms[:, None] * geometry.size, zooms)


def _zoom(segmentation: Any, geometry: Geometry) -> int:
    """How many times larger than life an outline is drawn. It follows what is seen of it, not the annotated box."""
    if isinstance(segmentation, dict):
        x, y, width, height = coco_mask.toBbox(segmentation)
        corners = np.array([[x, y], [x + width, y + height]])
    else:
        corners = np.concatenate(segmentation)
    ((x1, y1, x2, y2),) = geometry.boxes(np.concatenate([corners.min(axis=0), corners.max(axis=0)])[None])
    width, height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
    finest = 4 * MASK_DETAIL / max(width, height)  # lest a long thin one becomes huge
    return int(np.clip(min(np.ceil(MASK_DETAIL / np.sqrt(width * height)), finest), 1, MOST_ZOOM))


def _fill(polygons: list[np.ndarray], height: int, width: int) -> tuple[list[int], np.ndarray]:
    """The union of polygons [P, 2] inside a (height, width) frame: its window and the mask there."""
    corners = np.concatenate(polygons)
    x1, y1 = np.clip(np.floor(corners.min(axis=0)), 0, [width, height]).astype(int)
    x2, y2 = np.clip(np.ceil(corners.max(axis=0)), 0, [width, height]).astype(int)
    if x2 <= x1 or y2 <= y1:
        return _nothing()
    shifted = [(polygon - [x1, y1]).ravel().tolist() for polygon in polygons]
    merged = coco_mask.merge(coco_mask.frPyObjects(shifted, int(y2 - y1), int(x2 - x1)))
    return [int(x1), int(y1), int(x2), int(y2)], coco_mask.decode(merged)


def _nothing() -> tuple[list[int], np.ndarray]:
    """The window and the mask of an object of which nothing is seen."""
    return [0, 0, 0, 0], np.zeros((0, 0), np.uint8)
