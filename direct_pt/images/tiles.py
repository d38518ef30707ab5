"""Large images in overlapping tiles: where they lie, and one detection for each object out of those of all tiles.

What is smaller than the tiles' overlap lies whole in at least one of them. What is larger is found in pieces, and in
the whole image, which is looked at as well. A detection that ends at an edge of its window, inside the image, may be a
piece: it is `cut`. Detections of one class in two windows are one object where they agree about what both windows show:

    neither is cut   their boxes overlap
    one is cut       it overlaps the part of the other that lies in its window, or lies inside the other
    both are cut     the parts of both that lie in both windows overlap

Of an object's detections the best one that is not cut is kept, as NMS does; where all are cut, the box around them.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from direct_pt.errors import InputError
from direct_pt.flags import flag, share, whole_number
from direct_pt.images.decoding import Size
from direct_pt.images.windows import Window
from direct_pt.onnx_detector import Found

SAME_IOU = 0.5  # at least, of what overlaps; NMS's threshold
COVERED = 0.8  # the share of a cut detection inside another one, from which on it is a piece of that
EDGE_PIXELS = 3.0  # a box that ends so near to an edge may have been cut there
MIN_SIDE, MAX_SIDE = 64, 100_000  # pixels of a tile
MAX_OVERLAP = 0.9


def tile_side(text: str) -> int:
    """The check of --tiles: 0 for none, else no smaller than two of the coarsest strides."""
    return 0 if text == "0" else whole_number(MIN_SIDE, MAX_SIDE)(text)


def tile_overlap(text: str) -> float:
    """The check of --overlap."""
    if (value := share(text)) > MAX_OVERLAP:
        raise ArgumentTypeError(f"{text}: give a number from 0 to {MAX_OVERLAP}")
    return value


def overlap_flag() -> Any:
    """A field for --overlap."""
    return flag(None, "of tiles, as a share of their side (0.2)", tile_overlap, metavar="X")


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        size: side of a tile, in the image's pixels.
        overlap: of neighbours at least, as a share of the side.
    """

    size: int
    overlap: float = 0.2

    def __str__(self) -> str:
        return f"and in tiles of {self.size}, overlap {self.overlap:g}"

    def windows(self, size: Size) -> list[Window]:
        """The tiles of an image of `size` (height, width), row by row, and at the end the whole image."""
        height, width = size
        rows, columns = (tile_starts(side, self.size, self.overlap) for side in size)
        tiles = [Window(x, y, min(x + self.size, width), min(y + self.size, height)) for y in rows for x in columns]
        return [*tiles, Window.whole(size)] if len(tiles) > 1 else [Window.whole(size)]


@dataclass(frozen=True, kw_only=True)
class TileOptions:
    """How images are looked at."""

    tiles: int | None = flag(
        None,
        "look at overlapping tiles of so many pixels a side, and at the whole image, for small objects; 0: at that "
        "alone (as in training)",
        tile_side, metavar="PIXELS",
    )  # fmt: skip
    overlap: float | None = overlap_flag()

    def tiling(self, own: Tiling | None) -> Tiling | None:
        """How images are cut, None where they are not; `own` is the detector's. Raises InputError."""
        return chosen_tiling("--tiles", self.tiles, self.overlap, own)


def chosen_tiling(flag_name: str, side: int | None, overlap: float | None, own: Tiling | None) -> Tiling | None:
    """How images are cut, None where they are not.

    Args:
        flag_name: that gives the side.
        side: of a tile; 0 for no tiles, None for those of `own`.
        overlap: see `Tiling`; None for the usual one.
        own: where there is no `side`.

    Raises:
        InputError: there is an overlap without tiles.
    """
    chosen = own if side is None else Tiling(side) if side else None
    if chosen is None and overlap is not None:
        raise InputError(f"--overlap {overlap:g} is of tiles: give {flag_name} PIXELS too, or leave it out")
    return chosen if chosen is None or overlap is None else replace(chosen, overlap=overlap)


def checked_tiling(tiles: Any, overlap: Any, own: Tiling | None) -> Tiling | None:
    """`chosen_tiling` of values that are no flags. Raises InputError."""
    for name, value, check in (("tiles", tiles, tile_side), ("overlap", overlap, tile_overlap)):
        try:
            if value is not None:
                check(str(value))
        except ArgumentTypeError as error:
            raise InputError(f"{name}: {error}") from error
    return chosen_tiling("tiles", tiles, overlap, own)


def trained_tiling(history: Sequence[dict[str, Any]]) -> Tiling | None:
    """The tiles that a detector was trained on last, by its `history`; None for whole images."""
    tiles = next(iter(history[-1:]), {}).get("tiles")
    return None if tiles is None else Tiling(tiles["size"], tiles["overlap"])


def tile_starts(side: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along a side: evenly, the first at its begin and the last at its end."""
    if side <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    count = -(-(side - tile) // step) + 1
    return [round(place * (side - tile) / (count - 1)) for place in range(count)]


def find_in_tiles(
    pixels: np.ndarray, tiling: Tiling, find: Callable[[list[np.ndarray]], list[Found]], at_once: int
) -> Found:
    """The detections in an image [h, w, 3], of which `find` gets windows, at most `at_once` together."""
    windows = tiling.windows((pixels.shape[0], pixels.shape[1]))
    parts: list[Found] = []
    for first in range(0, len(windows), at_once):
        parts += find([pixels[y1:y2, x1:x2] for x1, y1, x2, y2 in windows[first : first + at_once]])
    return merged(windows, parts)


class TileMerger:
    """Collects the detections of windows until all of an image are there."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        self.waiting: dict[int, tuple[list[Window], list[Found | None]]] = {}

    def add(self, image: int, size: Size, found: Found | None) -> list[Found | None]:
        """Add those of an image's next window.

        Args:
            image: any number that tells it from others.
            size: of the image.
            found: None where the window could not be read.

        Returns:
            With the last window one item: the detections in the image, or None where a window could not be read.
        """
        if image not in self.waiting:
            self.waiting[image] = self.tiling.windows(size), []
        windows, parts = self.waiting[image]
        parts.append(found)
        if len(parts) < len(windows):
            return []
        del self.waiting[image]
        readable = [part for part in parts if part is not None]
        return [merged(windows, readable) if len(readable) == len(parts) else None]


def merged(windows: Sequence[Window], parts: Sequence[Found]) -> Found:
    """One detection for each object, in the image's pixels, best first.

    Args:
        windows: that were looked at.
        parts: the detections in each, in its own pixels.
    """
    pieces = Pieces(windows, parts)
    alive = np.ones(len(pieces.scores), bool)
    kept, boxes, masks = [], [], []
    for seed in np.lexsort((-pieces.scores, pieces.cut)).tolist():  # whole ones first, then by falling score
        if not alive[seed]:
            continue
        members, waiting = [], [seed]
        alive[seed] = False
        while waiting:
            members.append(waiting.pop())
            same = pieces.same_object(members[-1], alive)
            alive[same] = False
            waiting += same.tolist() if pieces.cut[seed] else []
        box = np.concatenate([pieces.boxes[members, :2].min(axis=0), pieces.boxes[members, 2:].max(axis=0)])
        kept.append(seed)
        boxes.append(box)
        if pieces.masks is not None:
            masks.append(joined_mask(pieces.masks[members], pieces.boxes[members], box))
    order = np.argsort(-pieces.scores[kept], kind="stable")
    return Found(
        np.array(boxes, np.float32).reshape(-1, 4)[order],
        pieces.scores[kept][order],
        pieces.labels[kept][order],
        None if pieces.masks is None else np.array(masks, np.float32).reshape(-1, *pieces.masks.shape[1:])[order],
    )


class Pieces:
    """The detections of all windows, N of them.

    Attributes:
        boxes: [N, 4] float64 in the image's pixels.
        scores: [N] float32.
        labels: [N] int64.
        masks: [N, m, m] or None.
        cut: [N] bool, whether it ends at an edge of its window that is none of the image.
        limits: [N, 4] float64: its window, where it is cut; otherwise everything.
    """

    def __init__(self, windows: Sequence[Window], parts: Sequence[Found]) -> None:
        self.areas = areas = np.array(windows, np.float64)
        self.window = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
        self.occupied = np.unique(self.window)  # windows with detections
        self.known: dict[int, np.ndarray] = {}
        corners = areas[self.window]
        self.boxes = np.concatenate([part.boxes for part in parts]).astype(np.float64) + np.tile(corners[:, :2], 2)
        self.scores = np.concatenate([part.scores for part in parts])
        self.labels = np.concatenate([part.labels for part in parts])
        parts_masks = [part.masks for part in parts if part.masks is not None]
        self.masks = np.concatenate(parts_masks) if parts_masks else None
        far = areas[:, 2:].max(axis=0)
        low = (self.boxes[:, :2] < corners[:, :2] + EDGE_PIXELS) & (corners[:, :2] > 0)
        high = (self.boxes[:, 2:] > corners[:, 2:] - EDGE_PIXELS) & (corners[:, 2:] < far)
        self.cut = (low | high).any(axis=1)
        everything = np.array([-np.inf, -np.inf, np.inf, np.inf])
        self.limits = np.where(self.cut[:, None], corners, everything)
        self.rows: dict[tuple[int, int], np.ndarray] = {}
        order = np.lexsort((self.labels, self.window))
        keys = np.stack([self.window[order], self.labels[order]], axis=1)
        changes = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
        for rows in np.split(order, changes):
            if len(rows):
                self.rows[int(self.window[rows[0]]), int(self.labels[rows[0]])] = rows

    def neighbours(self, window: int) -> np.ndarray:
        """The other windows with detections that overlap a window. There may be too many windows for a table of all."""
        if window not in self.known:
            own, others = self.areas[window], self.areas[self.occupied]
            touching = (others[:, :2] < own[2:]).all(axis=1) & (own[:2] < others[:, 2:]).all(axis=1)
            self.known[window] = self.occupied[touching & (self.occupied != window)]
        return self.known[window]

    def same_object(self, row: int, alive: np.ndarray) -> np.ndarray:
        """The rows, of those `alive` [N] bool, whose object is that of `row`."""
        label = int(self.labels[row])
        found = [self.rows.get((int(window), label)) for window in self.neighbours(int(self.window[row]))]
        others = np.concatenate([rows for rows in found if rows is not None] or [np.zeros(0, np.int64)])
        others = others[alive[others]]
        limits = self.limits[others].copy()
        limits[:, :2] = np.maximum(limits[:, :2], self.limits[row, :2])
        limits[:, 2:] = np.minimum(limits[:, 2:], self.limits[row, 2:])
        ours, theirs = clipped(self.boxes[row][None], limits), clipped(self.boxes[others], limits)
        shared = extent(np.hstack([np.maximum(ours[:, :2], theirs[:, :2]), np.minimum(ours[:, 2:], theirs[:, 2:])]))
        union = extent(ours) + extent(theirs) - shared
        same = shared >= SAME_IOU * np.maximum(union, 1e-9)
        if not self.cut[row]:
            same |= self.cut[others] & (shared >= COVERED * np.maximum(extent(theirs), 1e-9))
        return others[same]


def clipped(boxes: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Boxes [n or 1, 4] cut to `limits` [n, 4]."""
    return np.hstack([np.maximum(boxes[:, :2], limits[:, :2]), np.minimum(boxes[:, 2:], limits[:, 2:])])


def extent(boxes: np.ndarray) -> np.ndarray:
    """Areas [n] of boxes [n, 4]; 0 where a box has no width or height."""
    return np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)


def joined_mask(masks: np.ndarray, boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The highest of the probabilities [n, m, m] of n boxes at each cell of the box around them, [m, m]."""
    if len(masks) == 1:
        return masks[0]
    cells = masks.shape[-1]
    centres = (np.arange(cells) + 0.5) / cells
    joined = np.zeros((cells, cells), np.float32)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        x = (box[0] + centres * (box[2] - box[0]) - x1) / max(x2 - x1, 1e-6) * cells - 0.5
        y = (box[1] + centres * (box[3] - box[1]) - y1) / max(y2 - y1, 1e-6) * cells - 0.5
        inside = ((y >= -0.5) & (y <= cells - 0.5))[:, None] & ((x >= -0.5) & (x <= cells - 0.5))
        grid_x, grid_y = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
        sampled = cv2.remap(mask, grid_x, grid_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        joined = np.maximum(joined, sampled * inside)
    return joined
