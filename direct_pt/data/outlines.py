"""Outlines of objects, polygons or COCO run lengths: from JSON values, through their checks, to flat arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from direct_pt.data.problems import DataError, Problems

MIN_POLYGON_NUMBERS = 6  # x and y of three corners
MAX_CORNER_DISTANCE = 3.0  # of a corner from the image's origin, in multiples of the image's longer side
OUTLINE_TOLERANCE = 1.0  # pixels between an outline and its box: corners count from 0 or 1, sides are rounded
MIN_SIDE_TO_JUDGE_SHARES = 4.0  # pixels, of a box; outlines within one pixel of the origin fit smaller ones
MAX_COUNT_CHARACTERS = 6  # of one run length: 5 bits each, so that counts stay under 2**30


@dataclass
class Segmentations:
    """The outlines of M objects: polygons, or run lengths, or none.

    Attributes:
        coordinates: [K, 2] float64 polygon corners (x, y) in pixels.
        polygon_starts: [P + 1] int64; polygon p is `coordinates[polygon_starts[p]:polygon_starts[p + 1]]`.
        object_polygons: [M + 1] int64; object m has the polygons `object_polygons[m]:object_polygons[m + 1]`.
        run_lengths: [R] uint8, COCO's compressed counts.
        run_length_starts: [M + 1] int64, the same for `run_lengths`.
    """

    coordinates: np.ndarray
    polygon_starts: np.ndarray
    object_polygons: np.ndarray
    run_lengths: np.ndarray
    run_length_starts: np.ndarray

    def present(self) -> np.ndarray:
        """[M] bool, whether an object has an outline."""
        return (np.diff(self.object_polygons) > 0) | (np.diff(self.run_length_starts) > 0)

    def of_object(self, row: int, size: tuple[int, int]) -> list[np.ndarray] | dict[str, Any]:
        """Object `row`'s polygons ([P, 2] arrays; none without an outline), or its COCO RLE for an image of `size`."""
        start, end = self.run_length_starts[row : row + 2]
        if end > start:
            return {"size": list(size), "counts": self.run_lengths[start:end].tobytes()}
        polygons = range(self.object_polygons[row], self.object_polygons[row + 1])
        return [self.coordinates[self.polygon_starts[p] : self.polygon_starts[p + 1]] for p in polygons]

    def select(self, rows: np.ndarray) -> "Segmentations":
        """The objects `rows` [m] int64, in that order."""
        polygons = positions_of(self.object_polygons, rows)
        return Segmentations(
            coordinates=self.coordinates[positions_of(self.polygon_starts, polygons)],
            polygon_starts=starts_of(np.diff(self.polygon_starts)[polygons]),
            object_polygons=starts_of(np.diff(self.object_polygons)[rows]),
            run_lengths=self.run_lengths[positions_of(self.run_length_starts, rows)],
            run_length_starts=starts_of(np.diff(self.run_length_starts)[rows]),
        )

    @staticmethod
    def concatenate(parts: Sequence["Segmentations"]) -> "Segmentations":
        """The objects of all parts, in order."""
        joined = {}
        for field in fields(Segmentations):
            arrays = [getattr(part, field.name) for part in parts]
            if field.name in ("polygon_starts", "object_polygons", "run_length_starts"):
                joined[field.name] = starts_of(np.concatenate([np.diff(starts) for starts in arrays]))
            else:
                joined[field.name] = np.concatenate(arrays)
        return Segmentations(**joined)


def starts_of(counts: np.ndarray) -> np.ndarray:
    """[n + 1] int64: where n consecutive ranges of `counts` [n] elements start, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def positions_of(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """All positions in the ranges `starts[row]:starts[row + 1]`, one range after another."""
    begins = starts[rows]
    counts = starts[rows + 1] - begins
    ends = np.cumsum(counts)
    return np.repeat(begins - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def read_outlines(records: Sequence[dict[str, Any]], ids: np.ndarray, source: str) -> dict[str, np.ndarray]:
    """The columns of `_pack` for the "segmentation" of each annotation record.

    Raises:
        DataError: naming the first annotation whose outline is neither polygons nor run lengths.
    """
    try:
        return _pack([record.get("segmentation") for record in records])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        for record, number in zip(records, ids, strict=True) if len(records) > 1 else ():
            read_outlines([record], np.array([number]), source)
        raise _outline_error(int(ids[0]), records[0]["image_id"], error, source) from error


def _pack(values: list[Any]) -> dict[str, np.ndarray]:
    """Outlines of n objects (None, polygons, run lengths) in flat arrays. Raises the errors `read_outlines` catches.

    Returns:
        coordinates [K, 2] float64, corners [P] int64 of each polygon, polygons [n] int64 of each object, dropped [n]
        int64 polygons of each object with too few corners, run_lengths [R] uint8, run_length_bytes [n] int64 of each
        object, run_length_size [n, 2] int64 (height, width) as stated beside the run lengths, 0 for other objects.
    """
    polygons: list[list[float]] = []
    run_lengths: list[bytes] = []
    polygon_counts, byte_counts, dropped = (np.zeros(len(values), np.int64) for _ in range(3))
    sizes = np.zeros((len(values), 2), np.int64)
    for row, value in enumerate(values):
        if isinstance(value, dict):
            sizes[row], packed = _compressed_run_lengths(value)
            run_lengths.append(packed)
            byte_counts[row] = len(packed)
        elif value:
            kept = [polygon for polygon in value if len(polygon) >= MIN_POLYGON_NUMBERS]
            if len(kept) < len(value):
                _require_numbers(chain.from_iterable(short for short in value if len(short) < MIN_POLYGON_NUMBERS))
            polygons.extend(kept)
            polygon_counts[row], dropped[row] = len(kept), len(value) - len(kept)
    flat = list(chain.from_iterable(polygons))
    _require_numbers(flat)
    coordinates = np.array(flat, np.float64)
    if not np.isfinite(coordinates).all():
        raise ValueError("it has a coordinate that is not finite")
    lengths = np.array([len(polygon) for polygon in polygons], np.int64)
    if (lengths % 2).any():
        raise ValueError("it has an x without a y")
    return {
        "coordinates": coordinates.reshape(-1, 2),
        "corners": lengths // 2,
        "polygons": polygon_counts,
        "dropped": dropped,
        "run_lengths": np.frombuffer(b"".join(run_lengths), np.uint8),
        "run_length_bytes": byte_counts,
        "run_length_size": sizes,
    }


def _require_numbers(values: Any) -> None:
    if not set(map(type, values)) <= {int, float}:
        raise TypeError("it has a coordinate that is no number")


def _compressed_run_lengths(value: dict[str, Any]) -> tuple[tuple[int, int], bytes]:
    """The (height, width) that run lengths state, and their counts in COCO's compressed form."""
    height, width = (int(side) for side in value["size"])
    if not (0 < height < 2**31 and 0 < width < 2**31):
        raise ValueError(f"its size {value['size']} is no image's")
    if isinstance(value["counts"], list):
        if sum(value["counts"]) != height * width or min(value["counts"], default=0) < 0:
            raise ValueError(f"its counts do not sum to the {height * width} pixels of its size")
        value = coco_mask.frPyObjects(value, height, width)
    counts = value["counts"]
    return (height, width), counts if isinstance(counts, bytes) else counts.encode()


def _outline_error(number: int, image: Any, reason: object, source: str) -> DataError:
    text = (
        f"annotation {number} has a 'segmentation' that is neither polygons [[x1, y1, x2, y2, ...], ...] nor COCO run "
        f"lengths ({reason!s:.100})"
    )
    return DataError("segmentation", source, text, image, number)


def pop_segmentations(columns: dict[str, np.ndarray]) -> Segmentations:
    """The outlines of all objects, taken out of the columns of `read_outlines`."""
    return Segmentations(
        coordinates=columns.pop("coordinates"),
        polygon_starts=starts_of(columns.pop("corners")),
        object_polygons=starts_of(columns.pop("polygons")),
        run_lengths=columns.pop("run_lengths"),
        run_length_starts=starts_of(columns.pop("run_length_bytes")),
    )


def outlines_fit(
    outlines: Segmentations,
    objects: dict[str, np.ndarray],
    sizes: np.ndarray,
    known: np.ndarray,
    source: str,
    problems: Problems,
) -> np.ndarray:
    """[M] bool, whether each object's outline fits its image and its box.

    Args:
        outlines: of M objects.
        objects: their columns id, image_id, bbox and run_length_size.
        sizes: [M, 2] (height, width) of each object's image.
        known: [M] bool, whether the object's image and class are known; the others are not checked.
        source: for messages.
        problems: where the errors go.
    """
    stated = objects["run_length_size"]
    with_runs = (stated > 0).all(axis=1)
    other_size = with_runs & (stated != sizes).any(axis=1)
    totals = run_length_totals(outlines.run_lengths, outlines.run_length_starts)
    broken = with_runs & ~other_size & (totals != sizes.prod(axis=1, dtype=np.int64))
    extents = polygon_extents(outlines)
    # Drawing an outline takes time and memory up to its farthest corner.
    far = np.abs(extents).max(axis=1) > MAX_CORNER_DISTANCE * sizes.max(axis=1)
    drawn = (np.diff(outlines.object_polygons) > 0) & ~far
    masks = np.flatnonzero(with_runs & ~other_size & ~broken)
    extents[masks] = run_length_extents(outlines, sizes, masks)
    drawn[masks] = extents[masks, 2] > 0  # not of no pixel
    in_shares, outside = _off_their_boxes(extents, objects["bbox"], sizes, drawn)
    in_shares &= ~with_runs
    wrong = known & (other_size | broken | far | in_shares | outside)
    for row in np.flatnonzero(wrong):
        with problems.caught():
            number, image = int(objects["id"][row]), int(objects["image_id"][row])
            if in_shares[row] or outside[row]:
                box = [float(f"{side:.6g}") for side in objects["bbox"][row]]
                text = f"annotation {number} has a 'segmentation' outside of its bbox {box}, or of its image; mend one"
                if in_shares[row]:
                    text = (
                        f"annotation {number} has a 'segmentation' within 1 pixel and the bbox {box}: it looks like "
                        "shares of the image's sides; outlines are in pixels"
                    )
                raise DataError("segmentation", source, text, image, number)
            reason = "its counts do not sum to the pixels of its size"
            if other_size[row]:
                reason = f"its size {stated[row].tolist()} is not the image's {sizes[row].tolist()}"
            elif far[row]:
                reason = f"it has a corner far outside of its image of {sizes[row, 1]}x{sizes[row, 0]} pixels"
            raise _outline_error(number, image, reason, source)
    return ~wrong


def polygon_extents(outlines: Segmentations) -> np.ndarray:
    """[M, 4] float64 (x1, y1, x2, y2) around each object's polygons; zeros where there are none."""
    extents = np.zeros((len(outlines.object_polygons) - 1, 4))
    rows = np.flatnonzero(np.diff(outlines.object_polygons))
    if len(rows):
        begins = outlines.polygon_starts[outlines.object_polygons[rows]]  # an object's corners stand together
        extents[rows, :2] = np.minimum.reduceat(outlines.coordinates, begins)
        extents[rows, 2:] = np.maximum.reduceat(outlines.coordinates, begins)
    return extents


def run_length_extents(outlines: Segmentations, sizes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[m, 4] float64 (x1, y1, x2, y2) around the sound run lengths of the objects `rows` [m]; zeros if of no pixel."""
    if not len(rows):
        return np.zeros((0, 4))
    boxes = coco_mask.toBbox([outlines.of_object(row, tuple(sizes[row].tolist())) for row in rows.tolist()])
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _off_their_boxes(
    extents: np.ndarray, boxes: np.ndarray, sizes: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether masks would be empty: [M] bool, if outlines are shares of the image, and [M] bool, if they miss the box.

    Args:
        extents: [M, 4] (x1, y1, x2, y2) around the outlines.
        boxes: [M, 4] (x, y, width, height).
        sizes: [M, 2] (height, width) of the images.
        rows: [M] bool, which objects to check.
    """
    low, high = boxes[:, :2].clip(0, sizes[:, ::-1]), (boxes[:, :2] + boxes[:, 2:]).clip(0, sizes[:, ::-1])
    rows = rows & (high - low >= 1).all(axis=1)  # others are not trained on
    unit = (extents >= 0).all(axis=1) & (extents <= 1).all(axis=1)
    in_shares = rows & unit & ((high - low).max(axis=1) > MIN_SIDE_TO_JUDGE_SHARES)
    outside = (extents[:, 2:] < low - OUTLINE_TOLERANCE).any(axis=1)
    outside |= (extents[:, :2] > high + OUTLINE_TOLERANCE).any(axis=1)
    return in_shares, rows & outside & ~in_shares


def run_length_totals(characters: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[n] int64: how many pixels the compressed counts of n masks cover; -1 if malformed, 0 if there are none.

    Checked before decoding, because decoders trust the counts.

    Args:
        characters: [R] uint8 of all masks, one after another.
        starts: [n + 1] where each mask's characters start.
    """
    sums = np.zeros(len(starts) - 1, np.int64)
    if len(characters):
        counts, mask_of, malformed = run_length_counts(characters, starts)
        np.add.at(sums, mask_of, counts)
        sums[malformed] = -1
    return sums


def run_length_counts(characters: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The counts in the compressed run lengths of n masks.

    The format is pycocotools': a count is written in groups of five bits, lowest first, one character a group,
    starting at chr(48); bit 5 says that another group follows, bit 4 of the last group is the sign. From the fourth
    count on, the difference to the count two before is written.

    Args:
        characters: [R] uint8 of all masks, one after another; at least one.
        starts: [n + 1] where each mask's characters start.

    Returns:
        [C] int64 counts, mask by mask; [C] int64 the mask of each; [n] bool, which masks are malformed.
    """
    lengths = np.diff(starts)
    codes = characters.astype(np.int64) - 48
    ends = codes & 32 == 0  # the last character of each count
    mask_of = np.repeat(np.arange(len(lengths)), lengths)
    malformed = np.bincount(mask_of, (codes < 0) | (codes > 63), len(lengths)) > 0
    last = starts[1:][lengths > 0] - 1
    malformed[mask_of[last]] |= ~ends[last]  # the last count of a mask is cut short
    ends[last] = True

    begins = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])  # of each count
    sizes = np.diff(np.append(begins, len(codes)))
    place = np.arange(len(codes)) - np.repeat(begins, sizes)
    mask_of = mask_of[begins]
    malformed |= np.bincount(mask_of, sizes > MAX_COUNT_CHARACTERS, len(lengths)) > 0
    values = np.add.reduceat((codes & 31) << np.minimum(5 * place, 5 * MAX_COUNT_CHARACTERS), begins)
    negative = codes[begins + sizes - 1] & 16 > 0
    values -= np.where(negative, 1 << np.minimum(5 * sizes, 5 * MAX_COUNT_CHARACTERS), 0)

    firsts = np.searchsorted(mask_of, mask_of)  # the first count of each count's mask
    number = np.arange(len(values)) - firsts
    # A mask's counts form three chains, the first count alone and then every other one: the differences in a chain
    # add up to its counts.
    chains = 3 * mask_of + np.where(number == 0, 0, 1 + (number + 1) % 2)
    order = np.argsort(chains, kind="stable")
    summed, chains = np.cumsum(values[order]), chains[order]
    before = np.concatenate([[0], summed])[np.searchsorted(chains, chains)]
    counts = np.empty_like(values)
    counts[order] = summed - before
    malformed |= np.bincount(mask_of, counts < 0, len(lengths)) > 0
    return counts, mask_of, malformed
