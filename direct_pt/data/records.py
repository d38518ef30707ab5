"""From records to the annotation table: every source ends in COCO-like records, which are checked and mended here.

A record is a dictionary as in COCO files; boxes are [x, y, width, height] in pixels. What is mended, and counted:
sizes, areas and iscrowd that are missing are filled in; boxes are clipped to their image, and not trained on under a
pixel; parts of outlines with fewer than three corners are left out. Everything else that is wrong is an error.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from direct_pt.data.annotations import (
    SIZES_FROM_FILES,
    AnnotationTable,
    EncodedImages,
    Segmentations,
    decode_name,
    encode_name,
    starts_of,
)
from direct_pt.data.images import Decoding, UnreadableImage, encoded_size, image_size
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problem, Problems
from direct_pt.data.run_lengths import totals

Json = dict[str, Any]
Columns = dict[str, np.ndarray]  # of many records, by field
Chunk = tuple[str, int, Any]  # key, the first record's number among those of the key, records
LARGEST = 1e15  # no coordinate and no area is larger, in pixels
FARTHEST = 3.0  # that a corner of an outline may lie from the image's corner, in sides of the image
LEAST_ALIKE = 10  # boxes that must look like another format, all of them, before they are refused as such


class Source(Protocol):
    """One split of a data set as it lies on the disk or the hub."""

    @property
    def source(self) -> str:
        """What messages call it: its annotation file, where it has one."""

    @property
    def folder(self) -> Path:
        """That the records' file names are relative to."""

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """The records of "categories", "images" and "annotations", some thousand at a time."""


def read_table(
    source: Source, problems: Problems, decoding: Decoding, encoded: EncodedImages | None = None
) -> AnnotationTable:
    """The table of a source's records.

    Args:
        source: of the records.
        problems: where those that are not fatal go.
        decoding: how image files are read, of which the size may be needed.
        encoded: the images in the order of their records, where they are no files.

    Raises:
        InputError: naming the file, the field and the annotation, and the remedy: the first, or the one that leaves
            nothing to be read.
    """
    columns, left_out = _read_columns(source, problems)
    categories, images, objects = (columns[key] for key in READERS)
    listed = {key: np.append(columns[key]["id"], np.array(left_out[key], np.int64)) for key in READERS}
    images["row"] = np.arange(len(images["id"]))
    for records, key, remedy in (
        (categories, "categories", "list the classes there"),
        (images, "images", "there is nothing to read"),
    ):
        if not len(records["id"]):
            raise DataError("empty", source.source, f"'{key}' is empty; {remedy}")
        _keep(records, _first_of(records["id"], f"{key}[].id", "ids must be unique", source.source, problems))
    remedy = "rename one, or give both one id"
    _keep(categories, _first_of(categories["name"], "categories[].name", remedy, source.source, problems))
    if encoded is None:
        remedy = "join the annotations of the two records"
        _keep(images, _first_of(images["file_name"], "images[].file_name", remedy, source.source, problems))

    by_id = np.argsort(categories["id"])
    category_ids, class_names = categories["id"][by_id], categories["name"][by_id]
    _fill_in_sizes(images, source, problems, decoding, encoded)
    if encoded is None:
        _keep(images, check_files(source, images["file_name"], problems))
    elif problems.collects:
        encoded = encoded.select(images["row"])
    if not len(images["id"]):
        raise DataError("empty", source.source, "none of its images can be read; the errors before this one say why")
    names = images["file_name"]
    image_of, known = _rows(objects, "image_id", images["id"], listed["images"], source.source, problems)
    label_of, of_class = _rows(objects, "category_id", category_ids, listed["categories"], source.source, problems)
    kept = known & of_class
    kept &= _outlines_fit(objects, images["size"][image_of], kept, source.source, problems)
    order = np.flatnonzero(kept)[np.argsort(image_of[kept], kind="stable")]
    image_of = image_of[order]
    segmentations = Segmentations(
        coordinates=objects.pop("coordinates"),
        polygon_starts=starts_of(objects.pop("corners")),
        object_polygons=starts_of(objects.pop("polygons")),
        run_lengths=objects.pop("run_lengths"),
        run_length_starts=starts_of(objects.pop("run_length_bytes")),
    )
    areas, boxes, numbers = objects["area"][order], objects["bbox"][order], objects["id"][order]
    missing = np.isnan(areas)
    table = AnnotationTable(
        source=source.source,
        folder=source.folder,
        file_names=names,
        image_ids=images["id"],
        sizes=images["size"],
        starts=np.searchsorted(image_of, np.arange(len(names) + 1)),
        boxes=boxes,
        labels=label_of[order],
        areas=np.where(missing, boxes[:, 2] * boxes[:, 3], areas),
        crowd=objects["iscrowd"][order],
        annotation_ids=numbers,
        segmentations=segmentations.select(order),
        class_names=tuple(class_names.tolist()),
        category_ids=tuple(category_ids.tolist()),
        repairs={},
        encoded=encoded,
        decoding=decoding,
    )
    _refuse_other_formats(table)

    def tell(grade: str, kind: str, which: np.ndarray, message: str = "") -> None:
        found = [decode_name(name) for name in names[image_of[which]]] if problems.collects else []
        problems.add_all(grade, kind, source.source, message or kind, found, numbers[which].tolist())

    tell(REPAIRED, "area filled in from the box", missing)
    tell(REPAIRED, "parts of outlines with fewer than 3 corners left out", objects["left_out"][order] > 0)
    tell(REPAIRED, "boxes under 1 pixel, not trained on", ~table.usable())
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    outside = (np.abs(table.corner_boxes() - corners) > 1).any(axis=1)
    tell(REPAIRED, "boxes clipped to their image by more than 1 pixel", outside)
    tell(NOTE, "annotation ids used before", ~_is_first(numbers), "its id is used before; only messages show it")
    same = np.column_stack([image_of, table.labels, table.crowd, boxes])
    tell(NOTE, "objects annotated twice", ~_is_first(same), "there is the same box of the same class before")
    table.repairs = problems.counts(REPAIRED)
    return table


def _read_columns(source: Source, problems: Problems) -> tuple[dict[str, Columns], dict[str, list[int]]]:
    """The columns of each list of records that READERS names, and the ids of records that are left out as wrong.

    Python objects of one chunk of them live at a time.
    """
    chunks: dict[str, list[Columns]] = {}
    left_out: dict[str, list[int]] = {key: [] for key in READERS}
    for key, first, records in source.records(problems):
        if key in READERS and isinstance(records, list):
            if first == 0:  # of a key that stands there twice the last one counts, as everywhere in JSON
                chunks[key] = []
            chunks[key].append(_read_chunk(key, first, records, source.source, problems, left_out[key]))
        elif key in READERS:
            chunks.pop(key, None)
    for key in READERS:
        if key not in chunks:
            message = f"needs the key '{key}' with a list; a COCO detection file has one"
            raise DataError("missing key", source.source, message)
    # A column's pieces are let go as soon as they are joined.
    joined = {
        key: {name: np.concatenate([chunk.pop(name) for chunk in chunks[key]]) for name in list(chunks[key][0])}
        for key in READERS
    }
    return joined, left_out


def _read_chunk(
    key: str, first: int, records: list[Any], source: str, problems: Problems, left_out: list[int]
) -> Columns:
    """The columns of some records; where problems are collected, of those in which nothing is wrong.

    The ids of the others are added to `left_out`.
    """
    try:
        return READERS[key](records, first, source)
    except DataError:
        if not problems.collects:
            raise
    sound = []
    for row, record in enumerate(records, first):
        with problems.caught():
            READERS[key]([record], row, source)
            sound.append({"id": row, **record})  # the number that it has among all
            continue
        number = record.get("id") if isinstance(record, dict) else None
        left_out += [number] if type(number) is int and abs(number) < 2**63 else []
    return READERS[key](sound, first, source)


def _read_categories(records: list[Any], first: int, source: str) -> Columns:
    """id [n] int64 and name [n] str of the categories, the first of which has the number `first`."""
    _require(records, first, "categories", ("id", "name"), source)
    for row, record in enumerate(records, first):
        name = record["name"]
        if not isinstance(name, str | int) or isinstance(name, bool) or not _is_text(str(name)):
            text = f"has name {name!r:.60}; it must be text"
            raise _of_record("name", text, "categories", row, record, source)
    names = np.array([str(record["name"]) for record in records], dtype=np.str_)
    return {"id": _integers(records, first, "categories", "id", source), "name": names}


def _is_text(name: str) -> bool:
    """Whether it can be written and drawn: JSON can say halves of characters."""
    return bool(name.strip()) and "\0" not in name and not re.search("[\ud800-\udfff]", name)


def _read_images(records: list[Any], first: int, source: str) -> Columns:
    """id [n] int64, file_name [n] bytes, and size [n, 2] int32 (height, width), 0 where the record states none."""
    _require(records, first, "images", ("id", "file_name"), source)
    sizes = np.zeros((len(records), 2), np.int32)
    for row, record in enumerate(records):
        stated = (record.get("height"), record.get("width"))
        if all(type(side) is int and 0 < side < 2**31 for side in stated):
            sizes[row] = stated
        name = record["file_name"]
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            text = f"has file_name {name!r}; it must lie in the image folder: give it relative to that, without '..'"
            raise _of_record("file_name", text, "images", first + row, record, source)
    names = np.array([encode_name(record["file_name"]) for record in records], dtype=np.bytes_)
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
        **_outlines([record.get("segmentation") for record in records], records, ids, source),
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
            raise _of_record("missing key", f"lacks '{absent[0]}'", key, row, record, source)


def _name(key: str, row: int, record: Any) -> str:
    """How messages call one record of `key`'s list."""
    return f"{key}[{row}]" + (f" (id {record['id']!r:.40})" if isinstance(record, dict) and "id" in record else "")


def _of_record(kind: str, text: str, key: str, row: int, record: Any, source: str) -> DataError:
    """An error of one record, with what it says of its image and its id."""
    said = record if isinstance(record, dict) else {}
    image = said.get("file_name" if key == "images" else "image_id")
    number = said.get("id") if key == "annotations" else None
    return DataError(kind, source, f"{_name(key, row, record)} {text}", *_printable(image, number))


def _printable(image: Any, number: Any) -> tuple[str | int | None, int | None]:
    return image if isinstance(image, str | int) else None, number if type(number) is int else None


def _integers(records: list[Json], first: int, key: str, field: str, source: str) -> np.ndarray:
    """[n] int64, each record's `field`; anything but whole numbers is an error."""
    for row, record in enumerate(records, first):
        value = record[field]
        if type(value) is not int or abs(value) >= 2**63:
            text = f"has {field} {value!r:.60}; it must be a whole number"
            raise _of_record(field, text, key, row, record, source)
    return np.array([record[field] for record in records], dtype=np.int64)


def _is_first(values: np.ndarray) -> np.ndarray:
    """[n] bool, whether `values` [n] or [n, k] have none before that is the same."""
    first = np.zeros(len(values), bool)
    first[np.unique(values, axis=0, return_index=True)[1]] = True
    return first


def _first_of(values: np.ndarray, field: str, remedy: str, source: str, problems: Problems) -> np.ndarray:
    """[n] bool, the first of equal `values` [n]; the others are errors."""
    first = _is_first(values)
    for row in np.flatnonzero(~first):
        with problems.caught():
            value = decode_name(values[row]) if isinstance(values[row], bytes) else values[row]
            raise DataError(field, source, f"{field} {value!s:.200} is used twice; {remedy}")
    return first


def _keep(columns: Columns, rows: np.ndarray) -> None:
    for name, values in columns.items():
        columns[name] = values[rows]


def _rows(
    objects: Columns, field: str, known: np.ndarray, listed: np.ndarray, source: str, problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """[M] int64: for each annotation the row of `known` that its `field` names; [M] bool, whether there is one.

    Those that are `listed` and not known any more have been told of as errors.
    """
    values, order = objects[field], np.argsort(known)
    rows = order[np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)]
    found = known[rows] == values
    where = "images" if field == "image_id" else "categories"
    absent = np.flatnonzero(~found)
    for row in absent[~np.isin(values[absent], listed)]:
        with problems.caught():
            number, image = int(objects["id"][row]), int(objects["image_id"][row])
            text = f"annotation {number} has {field} {values[row]}, which '{where}' does not list"
            raise DataError(field, source, text, image, number)
    return rows, found


def _boxes(annotations: list[Json], ids: np.ndarray, source: str) -> np.ndarray:
    """[n, 4] float64 (x, y, width, height)."""
    boxes = np.zeros((len(annotations), 4))
    for row, record in enumerate(annotations):
        box = record["bbox"]
        fine = isinstance(box, list) and len(box) == 4 and set(map(type, box)) <= {int, float}
        if not fine or not all(abs(side) < LARGEST for side in box) or min(box[2:]) < 0:
            text = f"annotation {ids[row]} has bbox {box!r:.100}; expected [x, y, width, height] in pixels, finite, "
            raise DataError("bbox", source, f"{text}no side negative", *_printable(record["image_id"], int(ids[row])))
        boxes[row] = box
    return boxes


def _areas(annotations: list[Json]) -> np.ndarray:
    """[n] float64 square pixels, NaN where the file gives none."""
    areas = np.full(len(annotations), np.nan)
    for row, record in enumerate(annotations):
        area = record.get("area")
        if isinstance(area, int | float) and not isinstance(area, bool) and 0 <= area < LARGEST:
            areas[row] = area
    return areas


def _crowd(annotations: list[Json], ids: np.ndarray, source: str) -> np.ndarray:
    """[n] bool; 0 where the file says nothing."""
    crowd = [record.get("iscrowd") or 0 for record in annotations]
    for row, value in enumerate(crowd):
        if value not in (0, 1):
            text = f"annotation {ids[row]} has iscrowd {value!r:.60}; expected 0 or 1"
            raise DataError("iscrowd", source, text, *_printable(annotations[row]["image_id"], int(ids[row])))
    return np.array(crowd, dtype=bool)


def _outlines(values: list[Any], records: list[Json], ids: np.ndarray, source: str) -> Columns:
    """The columns of _pack; the annotation whose outline cannot be packed is named."""
    try:
        return _pack(values)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        for value, record, number in zip(values, records, ids, strict=True) if len(values) > 1 else ():
            _outlines([value], [record], np.array([number]), source)
        raise _bad_outline(int(ids[0]), records[0]["image_id"], error, source) from error


def _bad_outline(number: int, image: Any, reason: object, source: str) -> DataError:
    text = (
        f"annotation {number} has a 'segmentation' that is neither polygons [[x1, y1, x2, y2, ...], ...] nor COCO run "
        f"lengths ({reason!s:.100})"
    )
    return DataError("segmentation", source, text, *_printable(image, number))


def _pack(values: list[Any]) -> Columns:
    """Outlines of n objects (None, polygons, run lengths) in flat arrays: what Segmentations holds, and the sizes.

    Returns:
        coordinates [K, 2] float64, corners [P] int64 of each polygon, polygons [n] int64 of each object, left_out [n]
        of each object that are none, run_lengths [R] uint8, run_length_bytes [n] int64 of each object, run_length_size
        [n, 2] int64 (height, width) of the image that the run lengths state, 0 of other objects.
    """
    polygons: list[list[float]] = []
    run_lengths: list[bytes] = []
    polygon_counts, byte_counts, left_out = (np.zeros(len(values), np.int64) for _ in range(3))
    sizes = np.zeros((len(values), 2), np.int64)
    for row, value in enumerate(values):
        if isinstance(value, dict):
            sizes[row], packed = _run_lengths(value)
            run_lengths.append(packed)
            byte_counts[row] = len(packed)
        elif value:
            kept = [polygon for polygon in value if len(polygon) >= 6]
            if any(not set(map(type, short)) <= {int, float} for short in value if len(short) < 6):
                raise TypeError("it has a coordinate that is no number")
            polygons.extend(kept)
            polygon_counts[row], left_out[row] = len(kept), len(value) - len(kept)
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
        "left_out": left_out,
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
        if sum(value["counts"]) != height * width or min(value["counts"], default=0) < 0:
            raise ValueError(f"its counts do not sum to the {height * width} pixels of its size")
        value = coco_mask.frPyObjects(value, height, width)
    counts = value["counts"]
    return (height, width), counts if isinstance(counts, bytes) else counts.encode()


def _outlines_fit(objects: Columns, sizes: np.ndarray, kept: np.ndarray, source: str, problems: Problems) -> np.ndarray:
    """[M] bool, whether an outline is of an image of the size `sizes` [M, 2] that its object's has."""
    stated = objects["run_length_size"]
    with_runs = (stated > 0).all(axis=1)
    other = with_runs & (stated != sizes).any(axis=1)
    sums = totals(objects["run_lengths"], starts_of(objects["run_length_bytes"]))
    broken = with_runs & ~other & (sums != sizes.prod(axis=1, dtype=np.int64))
    # A corner that lies miles away would be drawn pixel by pixel.
    far = np.zeros(len(sizes), bool)
    if len(objects["coordinates"]):
        of_polygon = np.repeat(np.arange(len(sizes)), objects["polygons"])
        of_corner = np.repeat(of_polygon, objects["corners"])
        limit = FARTHEST * sizes.max(axis=1)
        far[of_corner[(np.abs(objects["coordinates"]).max(axis=1) > limit[of_corner])]] = True
    wrong = kept & (other | broken | far)
    for row in np.flatnonzero(wrong):
        with problems.caught():
            reason = "its counts do not sum to the pixels of its size"
            if other[row]:
                reason = f"its size {stated[row].tolist()} is not the image's {sizes[row].tolist()}"
            elif far[row]:
                reason = f"it has a corner far outside of its image of {sizes[row, 1]}x{sizes[row, 0]} pixels"
            raise _bad_outline(int(objects["id"][row]), int(objects["image_id"][row]), reason, source)
    return ~wrong


def _fill_in_sizes(
    images: Columns, source: Source, problems: Problems, decoding: Decoding, encoded: EncodedImages | None
) -> None:
    """Read the sizes that the records do not state from the images; those that cannot be read are left out."""
    readable = np.ones(len(images["id"]), bool)
    for row in np.flatnonzero(images["size"][:, 0] == 0):
        name = decode_name(images["file_name"][row])
        try:
            if encoded is None:
                images["size"][row] = image_size(source.folder / name, decoding)
            else:
                images["size"][row] = encoded_size(encoded.content(images["row"][row]), name, decoding)
            problems.add(Problem(REPAIRED, SIZES_FROM_FILES, source.source, SIZES_FROM_FILES, name))
        except (UnreadableImage, OSError) as error:
            readable[row] = False
            # pathlib raises an OSError where a name is too long to be one.
            if encoded is None and not os.path.isfile(source.folder / name):  # noqa: PTH113
                readable[row] = True  # check_files says so
                continue
            with problems.caught():
                text = f"image {images['id'][row]} states no width and height, and {error}"
                raise DataError("size", source.source, text, name) from error
    _keep(images, readable)


def check_files(source: Source, names: np.ndarray, problems: Problems) -> np.ndarray:
    """[N] bool, whether the image files `names` are there."""
    folder = str(source.folder)
    # pathlib would take several times as long over 100,000 files.
    there = np.array([os.path.isfile(os.path.join(folder, decode_name(name))) for name in names.tolist()], bool)  # noqa: PTH113, PTH118
    absent = np.flatnonzero(~there)
    for row in absent:
        name = decode_name(names[row])
        remedy = "check the image folder"
        if "\\" in name and os.path.isfile(source.folder / name.replace("\\", "/")):  # noqa: PTH113
            remedy = "write its name with / in place of \\"
        with problems.caught():
            missing = f"({len(absent)} of {len(names)} images are missing)"
            text = f"listed in {source.source} but not there {missing}; {remedy}"
            raise DataError("missing image", source.folder / name, text, name)
    return there


def _refuse_other_formats(table: AnnotationTable) -> None:
    """Boxes in shares of their image, or given by two corners, would train to nothing. Raises DataError."""
    boxes = table.boxes
    if len(boxes) and boxes.max() <= 1:
        text = "all its boxes lie within 1 pixel: they look like shares of the image's sides; boxes are in pixels"
        raise DataError("bbox", table.source, text)
    if len(boxes) < LEAST_ALIKE:
        return
    limits = np.repeat(table.sizes[:, ::-1], np.diff(table.starts), axis=0) + 1
    fit_as_corners = (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= limits).all()
    if fit_as_corners and (boxes[:, :2] + boxes[:, 2:] > limits).any(axis=1).mean() > 0.5:
        text = (
            "its boxes look like [x1, y1, x2, y2]: most leave their images as [x, y, width, height], none as corners; "
            "rewrite them, or for a hub data set give --bbox-format voc"
        )
        raise DataError("bbox", table.source, text)
