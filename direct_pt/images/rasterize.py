"""Outlines to masks at a sample's resolution, which Mask R-CNNs learn from."""

from itertools import pairwise

import numpy as np
from pycocotools import mask as coco_mask

from direct_pt.batch import Objects, PackedMasks
from direct_pt.images.geometry import EMPTY_MASK, Geometry

MASK_SIDE = 112  # pixels that a mask is drawn wide and high, roughly
MAX_ZOOM = 16  # supersampling factor of small objects' masks


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
    return PackedMasks.pack(crops, windows, zooms[:, None] * geometry.frame, zooms)


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
    limits = zooms[:, None] * (geometry.frame[::-1] * 2)
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
