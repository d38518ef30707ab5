"""From an image and its objects to a sample: the presets of the two stages and the one for testing.

To try another augmentation, edit the preset that it belongs to. Source: the paper's released configuration.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from direct_pt.batch import Objects, PackedMasks, Sample

cv2.setNumThreads(0)  # worker processes are what runs in parallel; threads of its own do not survive their start

SIZE_DIVISOR = 32  # the coarsest stride that the backbone's maps are read at
CROP_TRIES = 50
NOTHING = np.zeros((0, 0), np.uint8)  # the mask of an object of which nothing is seen
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
        moved = boxes * (self.scale * 2) - (self.corner[::-1] * 2)
        height, width = self.size
        if self.flip:
            moved[:, [0, 2]] = width - moved[:, [2, 0]]
        return np.minimum(np.maximum(moved, 0), (width, height, width, height))

    def image(self, image: np.ndarray) -> np.ndarray:
        """[height, width, 3] uint8 out of the pixels [h, w, 3] of the original, or of a smaller copy of it.

        Bilinear between pixel centres, as in the recipe, which takes OpenCV's; means over areas where that would leave
        pixels out.
        """
        (top, left), (height, width) = self.corner, self.size
        halved = image.shape[0] >= 2 * self.resized[0] and image.shape[1] >= 2 * self.resized[1]
        interpolation = cv2.INTER_AREA if halved else cv2.INTER_LINEAR
        resized = cv2.resize(image, self.resized[::-1], interpolation=interpolation)
        crop = resized[top : top + height, left : left + width]
        return cv2.flip(crop, 1) if self.flip else crop

    def mask(self, mask: np.ndarray) -> tuple[list[int], np.ndarray]:
        """A binary mask [h, w] of the original image, nearest neighbour: its window in the sample, what is there."""
        window, places = [], []
        for axis in (1, 0):  # x, then y
            content = np.flatnonzero(mask.any(axis=1 - axis))
            if not len(content):
                return [0, 0, 0, 0], NOTHING
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
            return [0, 0, 0, 0], NOTHING
        return [left, top, right, bottom], mask[np.ix_(places[1], places[0])]


class Preset(ABC):
    """What happens to an image and its objects, drawn before the pixels are read: only those needed must be."""

    @abstractmethod
    def geometry(self, size: tuple[int, int], objects: Objects, rng: np.random.Generator) -> Geometry:
        """Where an image of `size` (height, width) with these objects, in its own frame, goes."""

    @abstractmethod
    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """What a sample of `size` is padded to."""

    def __call__(self, image: np.ndarray, objects: Objects, rng: np.random.Generator) -> Sample:
        """The sample of an image [h, w, 3] uint8 RGB and its objects, both in the original frame."""
        geometry = self.geometry((image.shape[0], image.shape[1]), objects, rng)
        return render(image, objects, geometry, self.padded_size(geometry.size))


@dataclass(frozen=True)
class PretrainPreset(Preset):
    """Stage 1: fit into image_size * U(scale range), crop image_size, mirror half of them, pad to image_size.

    A crop that keeps no object of an image that has some is drawn again.
    """

    image_size: int = 448
    scale_range: tuple[float, float] = (0.8, 1.2)
    flip: float = 0.5

    def geometry(self, size: tuple[int, int], objects: Objects, rng: np.random.Generator) -> Geometry:
        """Drawn anew each time."""
        side = int(self.image_size * rng.uniform(*self.scale_range))
        resized = fit(size, side, side)
        crop = (min(self.image_size, resized[0]), min(self.image_size, resized[1]))
        flip = bool(rng.random() < self.flip)
        targets = objects.boxes[~objects.crowd]
        for _ in range(CROP_TRIES):
            corner = (int(rng.integers(resized[0] - crop[0] + 1)), int(rng.integers(resized[1] - crop[1] + 1)))
            geometry = Geometry(size, resized, corner, crop, flip)
            if not len(targets) or has_extent(geometry.boxes(targets)).any():
                return geometry
        # Objects in a far corner only: centre the crop on one of them.
        x, y = targets[rng.integers(len(targets))].reshape(2, 2).mean(axis=0)
        top = int(np.clip(y * resized[0] / size[0] - crop[0] / 2, 0, resized[0] - crop[0]))
        left = int(np.clip(x * resized[1] / size[1] - crop[1] / 2, 0, resized[1] - crop[1]))
        return Geometry(size, resized, (top, left), crop, flip)

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """One for all."""
        return self.image_size, self.image_size


@dataclass(frozen=True)
class FinetunePreset(Preset):
    """Stage 2: fit into (long_side, short_side), mirror half of them, pad to a multiple of 32."""

    short_side: int = 800
    long_side: int = 1333
    flip: float = 0.5

    def geometry(self, size: tuple[int, int], objects: Objects, rng: np.random.Generator) -> Geometry:
        """The whole image."""
        resized = fit(size, self.short_side, self.long_side)
        return Geometry(size, resized, (0, 0), resized, flip=bool(rng.random() < self.flip))

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """To multiples of 32."""
        return -(-size[0] // SIZE_DIVISOR) * SIZE_DIVISOR, -(-size[1] // SIZE_DIVISOR) * SIZE_DIVISOR


@dataclass(frozen=True)
class TestPreset(FinetunePreset):
    """Testing: as in stage 2, never mirrored."""

    __test__ = False  # no test case, whatever its name suggests
    flip: float = 0.0


def fit(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """The largest size of the same aspect ratio with no side above `long_side` and the shorter within `short_side`."""
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def has_extent(boxes: np.ndarray) -> np.ndarray:
    """[G] bool, whether boxes [G, 4] have width and height, in float32 as the detector will see them."""
    boxes = boxes.astype(np.float32)
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def render(image: np.ndarray, objects: Objects, geometry: Geometry, padded_size: tuple[int, int]) -> Sample:
    """Pixels, boxes and masks through one geometry; objects that it leaves nothing of are dropped.

    Args:
        image: [h, w, 3] uint8 RGB, the original or a smaller copy of it.
        objects: in the original's frame.
        geometry: of the original.
        padded_size: what the sample is padded to.
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


def rasterize(objects: Objects, geometry: Geometry) -> PackedMasks:
    """The objects' masks, drawn at the sample's resolution, small ones at a finer one. Crowd regions get an empty mask.

    A small object's outline would be lost in whole pixels, while its mask target has 28 cells a side whatever its size.
    """
    outlines = objects.segmentations or []
    crops = [NOTHING] * len(objects)
    windows, zooms = np.zeros((len(objects), 4), np.int64), np.ones(len(objects), np.int64)
    drawn = [row for row, outline in enumerate(outlines) if outline and not objects.crowd[row]]
    shapes = [row for row in drawn if isinstance(outlines[row], list)]
    if shapes:
        masks, windows[shapes], zooms[shapes] = _fill([outlines[row] for row in shapes], geometry)
        for row, mask in zip(shapes, masks, strict=True):
            crops[row] = mask
    for row in set(drawn).difference(shapes):
        x, y, width, height = coco_mask.toBbox(outlines[row])
        zooms[row] = _zooms(geometry.boxes(np.array([[x, y, x + width, y + height]])))[0]
        windows[row], crops[row] = geometry.zoomed(int(zooms[row])).mask(coco_mask.decode(outlines[row]))
    return PackedMasks.pack(crops, windows, zooms[:, None] * geometry.size, zooms)


def _zooms(boxes: np.ndarray) -> np.ndarray:
    """[G] int64, how many times larger than life outlines are drawn, by what is seen of them: their `boxes` [G, 4]."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0)
    finest = 4 * MASK_DETAIL / sides.max(axis=1)  # lest a long thin one becomes huge
    zooms = np.minimum(np.ceil(MASK_DETAIL / np.sqrt(sides.prod(axis=1))), finest)
    return np.maximum(np.minimum(zooms, MOST_ZOOM), 1).astype(np.int64)


def _fill(outlines: list[list[np.ndarray]], geometry: Geometry) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Objects as their polygons [P, 2] are filled: masks, their windows [G, 4] in the zoomed sample, zooms [G]."""
    polygons = [polygon for outline in outlines for polygon in outline]
    ends = np.cumsum([len(polygon) for polygon in polygons])
    last = np.cumsum([len(outline) for outline in outlines])  # polygon of each object, exclusive
    starts = np.concatenate([[0], ends[last[:-1] - 1]])
    counts = ends[last - 1] - starts
    points = np.concatenate(polygons)
    bounds = np.concatenate([np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)], axis=1)
    zooms = _zooms(geometry.boxes(bounds))
    points = geometry.points(points) * np.repeat(zooms, counts)[:, None]
    low, high = np.floor(np.minimum.reduceat(points, starts)), np.ceil(np.maximum.reduceat(points, starts))
    limits = zooms[:, None] * (geometry.size[::-1] * 2)
    windows = np.minimum(np.maximum(np.concatenate([low, high], axis=1), 0), limits).astype(np.int64)
    flat = (points - np.repeat(windows[:, :2], counts, axis=0)).ravel().tolist()
    pieces = [flat[start:end] for start, end in pairwise([0, *(2 * ends).tolist()])]
    masks, first = [], 0
    for (x1, y1, x2, y2), end in zip(windows.tolist(), last.tolist(), strict=True):
        mask = NOTHING
        if x2 > x1 and y2 > y1:
            runs = coco_mask.frPyObjects(pieces[first:end], y2 - y1, x2 - x1)
            mask = coco_mask.decode(runs[0] if len(runs) == 1 else coco_mask.merge(runs))
        masks.append(mask)
        first = end
    windows[[not mask.size for mask in masks]] = 0
    return masks, windows, zooms
