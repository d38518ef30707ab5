"""A table whose images are tiles of another table's images, and these images whole: for small objects in large images.

Tiles are read, transformed, cached and learnt from as any image; their objects are cut as crops cut them.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from direct_pt.data.annotations import MIN_SIDE, AnnotationTable, corners_of
from direct_pt.data.outlines import Segmentations, positions_of, run_length_counts, starts_of
from direct_pt.images.decoding import Size
from direct_pt.images.tiles import Tiling
from direct_pt.images.windows import Window

MAX_EMPTY_SHARE = 0.2  # of a training table's images, that are tiles without an object


def tiled(table: AnnotationTable, tiling: Tiling) -> tuple[AnnotationTable, np.ndarray]:
    """The table of the images' windows, and [T] int64, the row of each one's image; an image's windows are together.

    Its boxes are in pixels of the windows, and may reach beyond them; `AnnotationTable.objects` cuts them.
    """
    windows_of = [tiling.windows((height, width)) for height, width in table.sizes.tolist()]
    origins = np.repeat(np.arange(len(table)), [len(windows) for windows in windows_of])
    corners = np.array([window for windows in windows_of for window in windows], np.int64).reshape(-1, 4)
    tile_of = np.repeat(np.arange(len(origins)), np.diff(table.starts)[origins])
    rows = positions_of(table.starts, origins)  # each object once for each window of its image
    boxes, limits = corners_of(table.boxes[rows]), corners[tile_of]
    shown = np.minimum(boxes[:, 2:], limits[:, 2:]) - np.maximum(boxes[:, :2], limits[:, :2])
    kept = (shown >= MIN_SIDE).all(axis=1)
    rows, tile_of = rows[kept], tile_of[kept]
    values: dict[str, Any] = {name: getattr(table, name)[origins] for name in ("file_names", "image_ids")}
    values |= {name: getattr(table, name)[rows] for name in ("labels", "areas", "crowd", "annotation_ids")}
    values["sizes"] = (corners[:, [3, 2]] - corners[:, [1, 0]]).astype(np.int32)
    values["starts"] = starts_of(np.bincount(tile_of, minlength=len(origins)))
    values["boxes"] = table.boxes[rows] - np.pad(corners[tile_of, :2], ((0, 0), (0, 2)))
    values["places"] = np.hstack([corners[:, :2], table.sizes[origins]]).astype(np.int64)
    values["segmentations"] = moved(
        table.segmentations.select(rows), corners[tile_of], table.sizes[table.image_of_object()[rows]]
    )
    values["encoded"] = None if table.encoded is None else table.encoded.select(origins)
    return replace(table, **values), origins


def training_tiles(table: AnnotationTable, tiling: Tiling) -> AnnotationTable:
    """`tiled`, of which most tiles without objects are left out at random; `repairs` says how many."""
    tiles, _ = tiled(table, tiling)
    assert tiles.places is not None
    is_whole = (tiles.sizes == tiles.places[:, 2:]).all(axis=1)
    empty = (tiles.targets_per_image() == 0) & ~is_whole
    rows = np.flatnonzero(empty)
    most = int((len(tiles) - len(rows)) * MAX_EMPTY_SHARE / (1 - MAX_EMPTY_SHARE))
    dropped = np.random.default_rng(0).permutation(rows)[most:]
    kept = np.setdiff1d(np.arange(len(tiles)), dropped)
    notes = {f"files, whole {tiling}": len(table)}
    if len(dropped):
        notes["tiles without objects left out"] = len(dropped)
    return replace(tiles.select(kept), repairs={**table.repairs, **notes})


def moved(outlines: Segmentations, windows: np.ndarray, sizes: np.ndarray) -> Segmentations:
    """Outlines of M objects, in the frames of windows [M, 4] of their images of `sizes` [M, 2].

    Polygons may reach beyond them; run lengths are cut.
    """
    corner = np.repeat(windows[:, :2], np.diff(outlines.object_polygons), axis=0)
    coordinates = outlines.coordinates - np.repeat(corner, np.diff(outlines.polygon_starts), axis=0)
    parts = [
        cut_run_lengths(outlines.run_lengths[start:stop], (int(height), int(width)), Window(*window))
        for (start, stop), window, (height, width) in zip(
            pairwise(outlines.run_length_starts.tolist()), windows.tolist(), sizes.tolist(), strict=True
        )
    ]
    run_lengths = np.frombuffer(b"".join(parts), np.uint8)
    starts = starts_of(np.array([len(part) for part in parts], np.int64))
    return replace(outlines, coordinates=coordinates, run_lengths=run_lengths, run_length_starts=starts)


def cut_run_lengths(compressed: np.ndarray, size: Size, window: Window) -> bytes:
    """COCO's compressed run lengths [R] uint8 of a mask of `size`, inside a window; empty for none."""
    if not len(compressed):
        return b""
    counts, _, _ = run_length_counts(compressed, np.array([0, len(compressed)]))
    ends = np.cumsum(counts)
    first, last = ends[0::2][: len(ends) // 2], ends[1::2]  # of each run of ones, column by column
    height = size[0]
    columns = np.arange(window.x1, window.x2)
    # Of each column the runs that touch it: those from the first that ends in it to the last that begins in it.
    begin = np.searchsorted(last, columns * height, side="right")
    stop = np.searchsorted(first, (columns + 1) * height, side="left")
    touching = np.maximum(stop - begin, 0)
    column = np.repeat(columns, touching)
    runs = np.repeat(begin - np.cumsum(touching) + touching, touching) + np.arange(touching.sum())
    low = np.clip(first[runs] - column * height, window.y1, window.y2) - window.y1
    high = np.clip(last[runs] - column * height, window.y1, window.y2) - window.y1
    rows = window.y2 - window.y1
    offset = (column - window.x1) * rows
    low, high = (low + offset)[high > low], (high + offset)[high > low]
    edges, times = np.unique(np.concatenate([low, high]), return_counts=True)
    edges = edges[times == 1]  # else one run ends where the next one begins
    ends = edges if len(edges) and edges[-1] == rows * len(columns) else np.append(edges, rows * len(columns))
    value = {"size": list(window.size), "counts": np.diff(ends, prepend=0).tolist()}
    encoded: bytes = coco_mask.frPyObjects(value, *window.size)["counts"]
    return encoded
