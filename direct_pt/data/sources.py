"""Where annotations come from: COCO-format files in two folder layouts or under four explicit paths."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from direct_pt.data.annotations import (
    SIZES_FROM_FILES,
    AnnotationTable,
    Segmentations,
    decode_name,
    encode_name,
    starts_of,
)
from direct_pt.data.images import UnreadableImage, image_size
from direct_pt.data.json_stream import NotAnObject, read_members
from direct_pt.data.table_cache import cached_table
from direct_pt.errors import InputError

Json = dict[str, Any]
Columns = dict[str, np.ndarray]  # of many records, by field
LARGEST = 1e15  # no coordinate and no area is larger, in pixels


@dataclass(frozen=True)
class SplitPaths:
    """One split: the folder of its images and its annotation file."""

    images: Path
    annotations: Path


def find_splits(data: Path) -> dict[str, SplitPaths]:
    """The splits ("train", "val") of a COCO tree; the layout is recognised from what the folder holds.

    COCO 2017's: annotations/instances_train2017.json with train2017/; or annotations/instances_train.json with images/.

    Raises:
        InputError: it is neither.
    """
    if not data.is_dir():
        raise InputError(f"--data {data}: no such folder")
    folder = data / "annotations"
    splits = {}
    for split in ("train", "val"):
        for name, images in ((f"instances_{split}2017.json", f"{split}2017"), (f"instances_{split}.json", "images")):
            if (folder / name).is_file():
                splits[split] = SplitPaths(data / images, folder / name)
                break
    if not splits:
        raise InputError(
            f"--data {data}: holds neither annotations/instances_train2017.json (with images in train2017/) nor "
            "annotations/instances_train.json (with images in images/); or name the four paths with --train-images, "
            "--train-annotations, --val-images, --val-annotations"
        )
    return splits


def load_split(paths: SplitPaths, like: AnnotationTable | None = None) -> AnnotationTable:
    """Read one split, from the cache where it holds a large file's table, and check that its images are there.

    Args:
        paths: of the split.
        like: a table whose classes this one must share (validation like training).

    Raises:
        InputError: naming the file, the field and the annotation, and the remedy.
    """
    if not paths.annotations.is_file():
        raise InputError(f"{paths.annotations}: no such annotation file")
    if not paths.images.is_dir():
        raise InputError(f"{paths.images}: no such image folder (the images of {paths.annotations})")
    table = cached_table(paths.annotations, paths.images, lambda: _read_coco(paths))
    _check_images(paths, table.file_names)
    if like is not None and dict(zip(table.category_ids, table.class_names, strict=True)) != dict(
        zip(like.category_ids, like.class_names, strict=True)
    ):
        raise InputError(
            f"{paths.annotations}: its categories (id and name) differ from those of {like.source}; "
            "both splits must list the same ones"
        )
    return table


def _read_coco(paths: SplitPaths) -> AnnotationTable:
    source = str(paths.annotations)
    with _no_garbage_collection():
        columns = _read_columns(paths.annotations)
    categories, images, objects = (columns[key] for key in READERS)
    for records, key, remedy in (
        (categories, "categories", "list the classes there"),
        (images, "images", "there is nothing to read"),
    ):
        if not len(records["id"]):
            raise InputError(f"{source}: '{key}' is empty; {remedy}")
        unique, counts = np.unique(records["id"], return_counts=True)
        if len(unique) < len(records["id"]):
            raise InputError(f"{source}: {key}[].id {unique[counts > 1][0]} is used twice; ids must be unique")

    by_id = np.argsort(categories["id"])
    category_ids, class_names = categories["id"][by_id], categories["name"][by_id]
    repairs: dict[str, int] = {}
    measured = _fill_in_sizes(images, paths)
    if measured:
        repairs[SIZES_FROM_FILES] = measured
    image_of = _rows(objects["image_id"], "image_id", images["id"], objects["id"], source)
    label_of = _rows(objects["category_id"], "category_id", category_ids, objects["id"], source)
    sizes, stated = images["size"][image_of], objects["run_length_size"]
    wrong = np.flatnonzero((stated > 0).all(axis=1) & (stated != sizes).any(axis=1))
    if len(wrong):
        reason = f"its size {stated[wrong[0]].tolist()} is not the image's {sizes[wrong[0]].tolist()}"
        raise _bad_outline(objects["id"][wrong[0]], reason, source)
    missing = np.isnan(objects["area"])
    if missing.any():
        repairs["area filled in from the box"] = int(missing.sum())
    areas = np.where(missing, objects["bbox"][:, 2] * objects["bbox"][:, 3], objects["area"])

    order = np.argsort(image_of, kind="stable")
    segmentations = Segmentations(
        coordinates=objects.pop("coordinates"),
        polygon_starts=starts_of(objects.pop("corners")),
        object_polygons=starts_of(objects.pop("polygons")),
        run_lengths=objects.pop("run_lengths"),
        run_length_starts=starts_of(objects.pop("run_length_bytes")),
    )
    table = AnnotationTable(
        source=source,
        folder=paths.images,
        file_names=images["file_name"],
        image_ids=images["id"],
        sizes=images["size"],
        starts=np.searchsorted(image_of[order], np.arange(len(images["id"]) + 1)),
        boxes=objects["bbox"][order],
        labels=label_of[order],
        areas=areas[order],
        crowd=objects["iscrowd"][order],
        annotation_ids=objects["id"][order],
        segmentations=segmentations.select(order),
        class_names=tuple(class_names.tolist()),
        category_ids=tuple(category_ids.tolist()),
        repairs=repairs,
    )
    dropped = int((~table.usable()).sum())
    if dropped:
        repairs["boxes under 1 pixel, not trained on"] = dropped
    corners = np.concatenate([table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]], axis=1)
    outside = int((np.abs(table.corner_boxes() - corners) > 1).any(axis=1).sum())
    if outside:
        repairs["boxes clipped to their image by more than 1 pixel"] = outside
    return table


def _read_columns(path: Path) -> dict[str, Columns]:
    """The columns of each list of records that READERS names. Python objects of one chunk of them live at a time."""
    chunks: dict[str, list[Columns]] = {}
    for key, first, records in _members(path):
        if key in READERS and isinstance(records, list):
            if first == 0:  # of a key that stands there twice the last one counts, as everywhere in JSON
                chunks[key] = []
            chunks[key].append(READERS[key](records, first, str(path)))
        elif key in READERS:
            chunks.pop(key, None)
    for key in READERS:
        if key not in chunks:
            raise InputError(f"{path}: needs the key '{key}' with a list; a COCO detection file has one")
    # A column's pieces are let go as soon as they are joined.
    return {
        key: {name: np.concatenate([chunk.pop(name) for chunk in chunks[key]]) for name in list(chunks[key][0])}
        for key in READERS
    }


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Objects made from JSON hold no cycles; to look for some takes a third of the time that reading takes."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _members(path: Path) -> Iterator[tuple[str, int, Any]]:
    """As read_members, with messages for the user."""
    try:
        yield from read_members(path)
    except NotAnObject as error:
        what = "expected an object with 'images', 'annotations', 'categories'"
        raise InputError(f"{path}: is no COCO file: {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error


def _read_categories(records: list[Any], first: int, source: str) -> Columns:
    """id [n] int64 and name [n] str of the categories, the first of which has the number `first`."""
    _require(records, first, "categories", ("id", "name"), source)
    names = np.array([str(record["name"]) for record in records], dtype=np.str_)
    return {"id": _integers(records, first, "categories", "id", source), "name": names}


def _read_images(records: list[Any], first: int, source: str) -> Columns:
    """id [n] int64, file_name [n] bytes, and size [n, 2] int32 (height, width), 0 where the record states none."""
    _require(records, first, "images", ("id", "file_name"), source)
    sizes = np.zeros((len(records), 2), np.int32)
    for row, record in enumerate(records):
        stated = (record.get("height"), record.get("width"))
        if all(type(side) is int and 0 < side < 2**31 for side in stated):
            sizes[row] = stated
    names = np.array([encode_name(str(record["file_name"])) for record in records], dtype=np.bytes_)
    return {"id": _integers(records, first, "images", "id", source), "file_name": names, "size": sizes}


def _read_annotations(records: list[Any], first: int, source: str) -> Columns:
    """id, image_id, category_id [n] int64, bbox [n, 4], area [n], NaN where there is none, iscrowd [n], the outlines'.

    An annotation's id is its number in the file where the file gives none.
    """
    _require(records, first, "annotations", ("image_id", "category_id", "bbox"), source)
    numbered = [{"id": record.get("id", first + row)} for row, record in enumerate(records)]
    ids = _integers(numbered, first, "annotations", "id", source)
    return {
        "id": ids,
        "image_id": _integers(records, first, "annotations", "image_id", source),
        "category_id": _integers(records, first, "annotations", "category_id", source),
        "bbox": _boxes(records, ids, source),
        "area": _areas(records),
        "iscrowd": _crowd(records, ids, source),
        **_outlines([record.get("segmentation") for record in records], ids, source),
    }


READERS: dict[str, Callable[[list[Any], int, str], Columns]] = {
    "categories": _read_categories,
    "images": _read_images,
    "annotations": _read_annotations,
}


def _require(records: list[Any], first: int, key: str, needed: Sequence[str], source: str) -> None:
    """Every record must be an object that has the keys `needed`."""
    for row, record in enumerate(records, first):
        absent = [name for name in needed if not isinstance(record, dict) or name not in record]
        if absent:
            raise InputError(f"{source}: {_name(key, row, record)} lacks '{absent[0]}'")


def _name(key: str, row: int, record: Any) -> str:
    """How messages call one record of `key`'s list."""
    return f"{key}[{row}]" + (f" (id {record['id']})" if isinstance(record, dict) and "id" in record else "")


def _integers(records: list[Json], first: int, key: str, field: str, source: str) -> np.ndarray:
    """[n] int64, each record's `field`; anything but whole numbers is an error."""
    for row, record in enumerate(records, first):
        value = record[field]
        if type(value) is not int or abs(value) >= 2**63:
            raise InputError(f"{source}: {_name(key, row, record)} has {field} {value!r}; it must be a whole number")
    return np.array([record[field] for record in records], dtype=np.int64)


def _rows(values: np.ndarray, field: str, known: np.ndarray, ids: np.ndarray, source: str) -> np.ndarray:
    """[M] int64: for each annotation the row of `known` that its `field`, of these `values`, names."""
    order = np.argsort(known)
    rows = order[np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)]
    unknown = np.flatnonzero(known[rows] != values)
    if len(unknown):
        where = "images" if field == "image_id" else "categories"
        raise InputError(
            f"{source}: annotation {ids[unknown[0]]} has {field} {values[unknown[0]]}, which '{where}' does not list"
        )
    return rows


def _boxes(annotations: list[Json], ids: np.ndarray, source: str) -> np.ndarray:
    """[n, 4] float64 (x, y, width, height)."""
    boxes = np.zeros((len(annotations), 4))
    for row, record in enumerate(annotations):
        box = record["bbox"]
        fine = isinstance(box, list) and len(box) == 4 and set(map(type, box)) <= {int, float}
        if not fine or not all(abs(side) < LARGEST for side in box) or min(box[2:]) < 0:
            raise InputError(
                f"{source}: annotation {ids[row]} has bbox {box!r}; expected [x, y, width, height] in pixels, finite, "
                "no side negative"
            )
        boxes[row] = box
    return boxes


def _areas(annotations: list[Json]) -> np.ndarray:
    """[n] float64 square pixels, NaN where the file gives none."""
    areas = np.full(len(annotations), np.nan)
    for row, record in enumerate(annotations):
        area = record.get("area")
        if isinstance(area, int | float) and not isinstance(area, bool) and abs(area) < LARGEST:
            areas[row] = area
    return areas


def _crowd(annotations: list[Json], ids: np.ndarray, source: str) -> np.ndarray:
    """[n] bool; 0 where the file says nothing."""
    crowd = [record.get("iscrowd") or 0 for record in annotations]
    for row, value in enumerate(crowd):
        if value not in (0, 1):
            raise InputError(f"{source}: annotation {ids[row]} has iscrowd {value!r}; expected 0 or 1")
    return np.array(crowd, dtype=bool)


def _outlines(values: list[Any], ids: np.ndarray, source: str) -> Columns:
    """The columns of _pack; the annotation whose outline cannot be packed is named."""
    try:
        return _pack(values)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        for value, number in zip(values, ids, strict=True) if len(values) > 1 else ():
            _outlines([value], np.array([number]), source)
        raise _bad_outline(ids[0], error, source) from error


def _bad_outline(number: int, reason: object, source: str) -> InputError:
    return InputError(
        f"{source}: annotation {number} has a 'segmentation' that is neither polygons "
        f"[[x1, y1, x2, y2, ...], ...] nor COCO run lengths ({reason})"
    )


def _pack(values: list[Any]) -> Columns:
    """Outlines of n objects (None, polygons, run lengths) in flat arrays: what Segmentations holds, and the sizes.

    Returns:
        coordinates [K, 2] float64, corners [P] int64 of each polygon, polygons [n] int64 of each object, run_lengths
        [R] uint8, run_length_bytes [n] int64 of each object, run_length_size [n, 2] int64 (height, width) of the image
        that the run lengths state, 0 of other objects.
    """
    polygons: list[list[float]] = []
    run_lengths: list[bytes] = []
    polygon_counts, byte_counts = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
    sizes = np.zeros((len(values), 2), np.int64)
    for row, value in enumerate(values):
        if isinstance(value, dict):
            sizes[row], packed = _run_lengths(value)
            run_lengths.append(packed)
            byte_counts[row] = len(packed)
        elif value:
            kept = [polygon for polygon in value if len(polygon) >= 6]
            polygons.extend(kept)
            polygon_counts[row] = len(kept)
    flat = list(chain.from_iterable(polygons))
    if not set(map(type, flat)) <= {int, float}:
        raise TypeError("it has a coordinate that is no number")
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
        "run_lengths": np.frombuffer(b"".join(run_lengths), np.uint8),
        "run_length_bytes": byte_counts,
        "run_length_size": sizes,
    }


def _run_lengths(value: Json) -> tuple[tuple[int, int], bytes]:
    """The (height, width) that run lengths state, and their counts in COCO's compressed form."""
    height, width = (int(side) for side in value["size"])
    if not (0 < height < 2**31 and 0 < width < 2**31):
        raise ValueError(f"its size {value['size']} is no image's")
    if isinstance(value["counts"], list):
        if sum(value["counts"]) != height * width:
            raise ValueError(f"its counts do not sum to the {height * width} pixels of its size")
        value = coco_mask.frPyObjects(value, height, width)
    counts = value["counts"]
    return (height, width), counts if isinstance(counts, bytes) else counts.encode()


def _fill_in_sizes(images: Columns, paths: SplitPaths) -> int:
    """Read the sizes that the records do not state from the image files. How many these were."""
    unknown = np.flatnonzero(images["size"][:, 0] == 0)
    for row in unknown:
        try:
            images["size"][row] = image_size(paths.images / decode_name(images["file_name"][row]))
        except UnreadableImage as error:
            _check_images(paths, images["file_name"])
            raise InputError(
                f"{paths.annotations}: image {images['id'][row]} states no width and height, and {error}"
            ) from error
    return len(unknown)


def _check_images(paths: SplitPaths, file_names: np.ndarray) -> None:
    """Every image file must exist."""
    folder = str(paths.images)
    names = map(decode_name, file_names.tolist())
    # pathlib would take several times as long over 100,000 files.
    absent = [name for name in names if not os.path.isfile(os.path.join(folder, name))]  # noqa: PTH113, PTH118
    if absent:
        raise InputError(
            f"{paths.images / absent[0]}: listed in {paths.annotations} but not there ({len(absent)} of "
            f"{len(file_names)} images are missing); check the image folder"
        )
