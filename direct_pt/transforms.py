"""From an image and its objects to a sample: presets for stage 1, stage 2 and testing.

To try another augmentation, edit the preset of its stage. Source: the paper's released configuration.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from direct_pt.batch import Objects, PackedMasks, Sample

cv2.setNumThreads(0)  # worker processes run in parallel already, and OpenCV's own threads do not survive a fork

SIZE_DIVISOR = 32  # the coarsest stride of the backbone's feature maps
MAX_CROP_TRIES = 50
EMPTY_MASK = np.zeros((0, 0), np.uint8)  # of an object that is not visible
MASK_SIDE = 112  # pixels that a mask is drawn wide and high, roughly
MAX_ZOOM = 16  # supersampling factor of small objects' masks


@dataclass(frozen=True)
class Geometry:
    """From the original image to the sample's frame: resize, then crop, then flip. Sizes are (height, width).

    Attributes:
        original: size of the image.
        resized: size of the whole image after resizing.
        corner: (top, left) of the crop in the resized image, whole pixels.
        size: size of the crop.
        flip: whether the crop is flipped horizontally.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    flip: bool

    def zoomed(self, zoom: int) -> "Geometry":
        """The same crop in pixels that are `zoom` times finer."""
        resized, corner, size = ((pair[0] * zoom, pair[1] * zoom) for pair in (self.resized, self.corner, self.size))
        return replace(self, resized=resized, corner=corner, size=size)

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from the original image to the sample's frame."""
        return self.resized[1] / self.original[1], self.resized[0] / self.original[0]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] (x, y) in the sample's frame; they may lie outside it."""
        moved = points * self.scale - np.array(self.corner[::-1])
        if self.flip:
            moved[..., 0] = self.size[1] - moved[..., 0]
        return moved

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [G, 4] in the sample's frame, clipped to it; those outside of it lose their width or height."""
        moved = boxes * (self.scale * 2) - (self.corner[::-1] * 2)
        height, width = self.size
        if self.flip:
            moved[:, [0, 2]] = width - moved[:, [2, 0]]
        return np.minimum(np.maximum(moved, 0), (width, height, width, height))

    def image(self, image: np.ndarray) -> np.ndarray:
        """[height, width, 3] uint8, the sample's pixels from those of the original [h, w, 3] or of a smaller copy.

        Bilinear between pixel centres, as OpenCV does in the recipe; area means where bilinear would skip pixels.
        """
        (top, left), (height, width) = self.corner, self.size
        halved = image.shape[0] >= 2 * self.resized[0] and image.shape[1] >= 2 * self.resized[1]
        interpolation = cv2.INTER_AREA if halved else cv2.INTER_LINEAR
        resized = cv2.resize(image, self.resized[::-1], interpolation=interpolation)
        crop = resized[top : top + height, left : left + width]
        return cv2.flip(crop, 1) if self.flip else crop

    def mask(self, mask: np.ndarray) -> tuple[list[int], np.ndarray]:
        """A binary mask [h, w] of the original image in the sample, by nearest neighbour.

        Returns:
            its window (x1, y1, x2, y2) in the sample, and the mask inside it.
        """
        window, sources = [], []
        for axis in (1, 0):  # x, then y
            content = np.flatnonzero(mask.any(axis=1 - axis))
            if not len(content):
                return [0, 0, 0, 0], EMPTY_MASK
            factor, shift = self.resized[axis] / self.original[axis], self.corner[axis]
            ends = np.array([np.floor(content[0] * factor), np.ceil((content[-1] + 1) * factor)]) - shift
            low, high = np.clip(ends, 0, self.size[axis]).astype(int).tolist()
            source = (2 * (np.arange(low, high) + shift) + 1) * self.original[axis] // (2 * self.resized[axis])
            if axis == 1 and self.flip:
                low, high, source = self.size[1] - high, self.size[1] - low, source[::-1]
            window.append((low, high))
            sources.append(source)
        (left, right), (top, bottom) = window
        if right <= left or bottom <= top:
            return [0, 0, 0, 0], EMPTY_MASK
        return [left, top, right, bottom], mask[np.ix_(sources[1], sources[0])]


class Preset(ABC):
    """The transforms of an image and its objects, drawn before the pixels are read, so that fewer pixels suffice."""

    @abstractmethod
    def geometry(self, size: tuple[int, int], objects: Objects, rng: np.random.Generator) -> Geometry:
        """The geometry for an image of `size` (height, width) with these objects, which are in its own frame."""

    @abstractmethod
    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that a sample of `size` is padded to."""

    def __call__(self, image: np.ndarray, objects: Objects, rng: np.random.Generator) -> Sample:
        """The sample of an image [h, w, 3] uint8 RGB and its objects, both in the original frame."""
        geometry = self.geometry((image.shape[0], image.shape[1]), objects, rng)
        return render(image, objects, geometry, self.padded_size(geometry.size))


@dataclass(frozen=True)
class PretrainPreset(Preset):
    """Stage 1: fit into image_size * U(scale range), crop image_size, flip half of the images, pad to image_size.

    If a crop contains none of the image's objects, another one is drawn.
    """

    image_size: int = 448
    scale_range: tuple[float, float] = (0.8, 1.2)
    flip: float = 0.5

    def geometry(self, size: tuple[int, int], objects: Objects, rng: np.random.Generator) -> Geometry:
        """Random scale, crop and flip."""
        side = int(self.image_size * rng.uniform(*self.scale_range))
        resized = fit(size, side, side)
        crop = (min(self.image_size, resized[0]), min(self.image_size, resized[1]))
        flip = bool(rng.random() < self.flip)
        targets = objects.boxes[~objects.crowd]
        for _ in range(MAX_CROP_TRIES):
            corner = (int(rng.integers(resized[0] - crop[0] + 1)), int(rng.integers(resized[1] - crop[1] + 1)))
            geometry = Geometry(size, resized, corner, crop, flip)
            if not len(targets) or has_extent(geometry.boxes(targets)).any():
                return geometry
        # All objects are hard to hit, as in a corner: centre the crop on one of them.
        x, y = targets[rng.integers(len(targets))].reshape(2, 2).mean(axis=0)
        top = int(np.clip(y * resized[0] / size[0] - crop[0] / 2, 0, resized[0] - crop[0]))
        left = int(np.clip(x * resized[1] / size[1] - crop[1] / 2, 0, resized[1] - crop[1]))
        return Geometry(size, resized, (top, left), crop, flip)

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The same for all samples."""
        return self.image_size, self.image_size


@dataclass(frozen=True)
class ResizePreset(Preset):
    """Fit the whole image into (long_side, short_side), pad to a multiple of 32."""

    short_side: int = 800
    long_side: int = 1333

    def geometry(self, size: tuple[int, int], objects: Objects, rng: np.random.Generator) -> Geometry:
        """The whole image."""
        resized = fit(size, self.short_side, self.long_side)
        return Geometry(size, resized, (0, 0), resized, flip=False)

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The next multiples of 32."""
        return -(-size[0] // SIZE_DIVISOR) * SIZE_DIVISOR, -(-size[1] // SIZE_DIVISOR) * SIZE_DIVISOR


@dataclass(frozen=True)
class FinetunePreset(ResizePreset):
    """Stage 2: the resized image, half of the images flipped."""

    flip: float = 0.5

    def geometry(self, size: tuple[int, int], objects: Objects, rng: np.random.Generator) -> Geometry:
        """The whole image, perhaps flipped."""
        return replace(super().geometry(size, objects, rng), flip=bool(rng.random() < self.flip))


@dataclass(frozen=True)
class TestPreset(ResizePreset):
    """Testing: as in stage 2, without anything random."""

    __test__ = False  # pytest would take a class of this name for a test case

    def sample(self, size: tuple[int, int], read: Callable[[tuple[int, int]], np.ndarray]) -> Sample:
        """The sample of an image without objects.

        Args:
            size: (height, width) of the image.
            read: returns the image [h, w, 3] uint8 RGB, or a smaller copy that has at least the given (height, width).
        """
        geometry = self.geometry(size, Objects.none(), np.random.default_rng(0))
        return render(read(geometry.resized), Objects.none(), geometry, self.padded_size(geometry.size))

    def black_sample(self, size: tuple[int, int]) -> Sample:
        """The sample that stands in for an unreadable image of `size` (height, width)."""
        return self.sample(size, lambda _: np.zeros((*size, 3), np.uint8))


def fit(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """The largest size of the same aspect ratio with the longer side in `long_side` and the shorter in `short_side`."""
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def has_extent(boxes: np.ndarray) -> np.ndarray:
    """[G] bool, whether boxes [G, 4] have width and height, in float32 as the detector sees them."""
    boxes = boxes.astype(np.float32)
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def render(image: np.ndarray, objects: Objects, geometry: Geometry, padded_size: tuple[int, int]) -> Sample:
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


def rasterize(objects: Objects, geometry: Geometry) -> PackedMasks:
    """The objects' masks at the sample's resolution, supersampled for small objects; crowd regions get an empty mask.

    Whole pixels would lose the outline of a small object, while its mask target has 28 x 28 cells whatever its size.
    """
    outlines = objects.segmentations or []
    crops = [EMPTY_MASK] * len(objects)
    windows, zooms = np.zeros((len(objects), 4), np.int64), np.ones(len(objects), np.int64)
    drawn = [row for row, outline in enumerate(outlines) if outline and not objects.crowd[row]]
    polygons = [row for row in drawn if isinstance(outlines[row], list)]
    if polygons:
        masks, windows[polygons], zooms[polygons] = _fill_polygons([outlines[row] for row in polygons], geometry)
        for row, mask in zip(polygons, masks, strict=True):
            crops[row] = mask
    for row in set(drawn).difference(polygons):  # run lengths
        x, y, width, height = coco_mask.toBbox(outlines[row])
        zooms[row] = _supersampling(geometry.boxes(np.array([[x, y, x + width, y + height]])))[0]
        windows[row], crops[row] = geometry.zoomed(int(zooms[row])).mask(coco_mask.decode(outlines[row]))
    return PackedMasks.pack(crops, windows, zooms[:, None] * geometry.size, zooms)


def _supersampling(boxes: np.ndarray) -> np.ndarray:
    """[G] int64 supersampling factors of masks with the visible `boxes` [G, 4]."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0)
    limit = 4 * MASK_SIDE / sides.max(axis=1)  # keeps the masks of long thin objects small
    zooms = np.minimum(np.ceil(MASK_SIDE / np.sqrt(sides.prod(axis=1))), limit)
    return np.maximum(np.minimum(zooms, MAX_ZOOM), 1).astype(np.int64)


def _fill_polygons(
    outlines: list[list[np.ndarray]], geometry: Geometry
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The filled polygons [P, 2] of G objects: masks, their windows [G, 4] in the supersampled sample, factors [G]."""
    polygons = [polygon for outline in outlines for polygon in outline]
    ends = np.cumsum([len(polygon) for polygon in polygons])
    last = np.cumsum([len(outline) for outline in outlines])  # one past the last polygon of each object
    starts = np.concatenate([[0], ends[last[:-1] - 1]])
    counts = ends[last - 1] - starts
    points = np.concatenate(polygons)
    bounds = np.concatenate([np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)], axis=1)
    zooms = _supersampling(geometry.boxes(bounds))
    points = geometry.points(points) * np.repeat(zooms, counts)[:, None]
    low, high = np.floor(np.minimum.reduceat(points, starts)), np.ceil(np.maximum.reduceat(points, starts))
    limits = zooms[:, None] * (geometry.size[::-1] * 2)
    windows = np.minimum(np.maximum(np.concatenate([low, high], axis=1), 0), limits).astype(np.int64)
    flat = (points - np.repeat(windows[:, :2], counts, axis=0)).ravel().tolist()
    pieces = [flat[start:end] for start, end in pairwise([0, *(2 * ends).tolist()])]
    masks, first = [], 0
    for (x1, y1, x2, y2), end in zip(windows.tolist(), last.tolist(), strict=True):
        mask = EMPTY_MASK
        if x2 > x1 and y2 > y1:
            runs = coco_mask.frPyObjects(pieces[first:end], y2 - y1, x2 - x1)
            mask = coco_mask.decode(runs[0] if len(runs) == 1 else coco_mask.merge(runs))
        masks.append(mask)
        first = end
    windows[[not mask.size for mask in masks]] = 0
    return masks, windows, zooms
