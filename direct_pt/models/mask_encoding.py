"""Masks of detections as COCO's compressed run lengths, in time that follows the masks' sizes and not the images'."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from direct_pt.onnx_detector import MASK_THRESHOLD, paste_windows

MASKS_AT_ONCE = 64  # pasted and encoded together


def mask_run_lengths(probabilities: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> list[dict[str, Any]]:
    """Detections' masks as COCO's compressed run lengths.

    Args:
        probabilities: [D, m, m] inside the boxes.
        boxes: [D, 4] (x1, y1, x2, y2) in the original images' pixels.
        sizes: [D, 2] (height, width) of those images.
    """
    encoded: list[dict[str, Any]] = []
    for first in range(0, len(boxes), MASKS_AT_ONCE):
        rows = slice(first, first + MASKS_AT_ONCE)
        windows = paste_windows(probabilities[rows], boxes[rows], sizes[rows])
        corners, masks = [], []
        for corner, inside in windows:
            corners.append(corner)
            masks.append(inside >= MASK_THRESHOLD)
        encoded += encode_masks(corners, masks, sizes[rows])
    return encoded


def encode_masks(
    corners: Sequence[tuple[int, int]], masks: Sequence[np.ndarray], sizes: np.ndarray
) -> list[dict[str, Any]]:
    """Masks as COCO's compressed run lengths. The time it takes depends on the masks' sizes, not on the images'.

    A mask's run lengths are the distances between its changes: the places, counted down the image's columns, where 0
    follows 1 or 1 follows 0. They are found in all masks at once.

    Args:
        corners: D (top, left), where each mask's first pixel lies in its image.
        masks: D of [h, w] bool.
        sizes: [D, 2] (height, width) of the images.
    """
    # All masks in one array, column by column, with a zero above and below each column.
    shapes = np.array([mask.shape for mask in masks], np.int64).reshape(-1, 2)
    heights = shapes[:, 0] + 2
    ends = np.cumsum(heights * shapes[:, 1])
    flat = np.zeros(ends[-1] if len(ends) else 0, bool)
    for mask, height, end in zip(masks, heights.tolist(), ends.tolist(), strict=True):
        flat[end - height * mask.shape[1] : end].reshape(-1, height)[:, 1:-1] = mask.T
    places = np.flatnonzero(flat[1:] != flat[:-1])
    owner = np.searchsorted(ends, places, side="right")  # the mask of each change
    column, row = np.divmod(places - (ends - heights * shapes[:, 1])[owner], heights[owner])
    tops, lefts = np.array(corners, np.int64).reshape(-1, 2).T
    changes = (lefts[owner] + column) * sizes[owner, 0] + tops[owner] + row  # counted in the whole image
    # A run that ends at the image's bottom joins the next one, if that begins at the top of the next column.
    joined = (changes[1:-1:2] == changes[2::2]) & (owner[1:-1:2] == owner[2::2])
    kept = np.ones(len(changes), bool)
    kept[1:-1] = np.repeat(~joined, 2)
    changes, owner = changes[kept], owner[kept]

    # Between an edge at 0 and one at the image's end, each mask's changes: the runs are the differences.
    last = np.cumsum(np.bincount(owner, minlength=len(masks)) + 2) - 1
    edges = np.zeros(len(changes) + 2 * len(masks), np.int64)
    edges[np.arange(len(changes)) + 2 * owner + 1] = changes
    edges[last] = sizes[:, 0] * sizes[:, 1]
    lengths, encoded, start = np.diff(edges).tolist(), [], 0
    for size, stop in zip(sizes.tolist(), last.tolist(), strict=True):
        counts = lengths[start:stop]
        if len(counts) > 1 and not counts[-1]:  # COCO omits an empty last run
            counts.pop()
        run_lengths = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
        encoded.append({"size": size, "counts": run_lengths["counts"].decode()})
        start = stop + 1
    return encoded
