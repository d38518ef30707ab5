"""From records to the annotation table: every source yields COCO-like records, which are checked and repaired here.

A record is a dictionary as in COCO files; boxes are [x, y, width, height] in pixels. Repairs, which are counted:
missing sizes, areas and iscrowd are filled in; boxes are clipped to their image, and those under a pixel are not
trained on; polygons with fewer than three corners are dropped. Everything else that is wrong is an error.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from direct_pt.data.annotations import (
    SIZES_FROM_FILES,
    AnnotationTable,
    EncodedImages,
    corners_of,
    decode_name,
    encode_name,
)
from direct_pt.data.image_files import JOIN, find_files, note_unlisted_images, plain_paths
from direct_pt.data.outlines import outlines_fit, pop_segmentations, read_outlines
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problem, Problems
from direct_pt.images.decoding import Decoding, UnreadableImage, encoded_size, image_size

Json = dict[str, Any]
Columns = dict[str, np.ndarray]  # one array per field, for many records
Chunk = tuple[str, int, Any]  # key, index of the first record in the list under that key, records
MAX_PIXEL_VALUE = 1e15  # of coordinates and areas
MIN_BOXES_TO_JUDGE_FORMAT = 10


class Source(Protocol):
    """One split of a data set, on the disk or on the hub."""

    @property
    def source(self) -> str:
        """Its name in messages: its annotation file, if it has one."""

    @property
    def folder(self) -> Path:
        """The folder that the records' file names are relative to."""

    @property
    def encoded(self) -> EncodedImages | None:
        """The images in the order of their records; None if they are files in `folder`."""

    @property
    def annotation_file(self) -> Path | None:
        """The one file with all annotations, whose table can be cached; None if there is no such file."""

    @property
    def owns_folder(self) -> bool:
        """Whether all images in `folder` should be in its records, and what is not shall be noted by who reads them."""

    @property
    def paths_read(self) -> tuple[Path, ...]:
        """The files and folders that belong to it, to tell others from them; empty if unknown."""

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """The records of "categories", "images" and "annotations", a few thousand at a time."""


def read_table(source: Source, problems: Problems, decoding: Decoding) -> AnnotationTable:
    """The annotation table of a source.

    Args:
        source: yields the records.
        problems: collects or counts the problems that are not fatal.
        decoding: how image files are read, because sizes may have to be read from them.

    Raises:
        InputError: naming the file, the field and the annotation, and the remedy. If problems are collected, only for
            an error that leaves nothing to read.
    """
    columns, rejected = _read_columns(source, problems)
    listed = {key: np.append(columns[key]["id"], np.array(rejected[key], np.int64)) for key in READERS}
    categories = _check_categories(columns["categories"], source, problems)
    images, encoded = _check_images(columns["images"], source, problems, decoding)
    objects = columns["annotations"]
    image_of, known = _look_up(objects, "image_id", images["id"], listed["images"], source.source, problems)
    label_of, known_class = _look_up(
        objects, "category_id", categories["id"], listed["categories"], source.source, problems
    )
    outlines = pop_segmentations(objects)
    kept = known & known_class
    kept &= outlines_fit(outlines, objects, images["size"][image_of], kept, source.source, problems)

    order = np.flatnonzero(kept)[np.argsort(image_of[kept], kind="stable")]  # by image
    image_of, objects = image_of[order], _select(objects, order)
    boxes, areas = objects["bbox"], objects["area"]
    table = AnnotationTable(
        source=source.source,
        folder=source.folder,
        file_names=images["file_name"],
        image_ids=images["id"],
        sizes=images["size"],
        starts=np.searchsorted(image_of, np.arange(len(images["id"]) + 1)),
        boxes=boxes,
        labels=label_of[order],
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        crowd=objects["iscrowd"],
        annotation_ids=objects["id"],
        segmentations=outlines.select(order),
        class_names=tuple(categories["name"].tolist()),
        category_ids=tuple(categories["id"].tolist()),
        repairs={},
        encoded=encoded,
        decoding=decoding,
    )
    if source.owns_folder:
        note_unlisted_images(source.folder, images["file_name"], source.source, problems)
    _reject_other_box_formats(table)
    _report_repairs(table, np.isnan(areas), objects["dropped"] > 0, problems)
    table.repairs = problems.summary()
    return table


def _read_columns(source: Source, problems: Problems) -> tuple[dict[str, Columns], dict[str, list[int]]]:
    """The columns of the records under each key of READERS, and the ids of records that are rejected as faulty.

    Only one chunk of records exists as Python objects at a time.
    """
    chunks: dict[str, list[Columns]] = {}
    rejected: dict[str, list[int]] = {key: [] for key in READERS}
    for key, first, records in source.records(problems):
        if key in READERS and isinstance(records, list):
            if first == 0:  # duplicate keys: the last wins, as usual in JSON
                chunks[key] = []
            chunks[key].append(_read_chunk(key, first, records, source.source, problems, rejected[key]))
        elif key in READERS:
            chunks.pop(key, None)
    for key in READERS:
        if key not in chunks:
            message = f"needs the key '{key}' with a list; a COCO detection file has one"
            raise DataError("missing key", source.source, message)
    joined = {
        key: {
            name: np.concatenate([chunk.pop(name) for chunk in chunks[key]])  # frees the pieces of each column
            for name in list(chunks[key][0])
        }
        for key in READERS
    }
    return joined, rejected


def _read_chunk(
    key: str, first: int, records: list[Any], source: str, problems: Problems, rejected: list[int]
) -> Columns:
    """The columns of some records. If problems are collected, faulty records are dropped and their ids `rejected`."""
    try:
        return READERS[key](records, first, source)
    except DataError:
        if not problems.collects:
            raise
    sound = []
    for row, record in enumerate(records, first):
        with problems.caught():
            READERS[key]([record], row, source)
            sound.append({"id": row, **record})  # the default id is the record's index in the whole list
            continue
        number = record.get("id") if isinstance(record, dict) else None
        rejected += [number] if type(number) is int and abs(number) < 2**63 else []
    return READERS[key](sound, first, source)


def _read_categories(records: list[Any], first: int, source: str) -> Columns:
    """id [n] int64 and name [n] str of categories; `first` is the index of the first one."""
    _require_keys(records, first, "categories", ("id", "name"), source)
    for row, record in enumerate(records, first):
        name = record["name"]
        if not isinstance(name, str | int) or isinstance(name, bool) or not _is_text(str(name)):
            text = f"has name {name!r:.60}; it must be text"
            raise _record_error("name", text, "categories", row, record, source)
    names = np.array([str(record["name"]) for record in records], dtype=np.str_)
    return {"id": _integers(records, first, "categories", "id", source), "name": names}


def _is_text(name: str) -> bool:
    """Whether it can be written and drawn: JSON can express lone surrogates."""
    return bool(name.strip()) and "\0" not in name and not re.search("[\ud800-\udfff]", name)


def _read_images(records: list[Any], first: int, source: str) -> Columns:
    """id [n] int64, file_name [n] bytes, and size [n, 2] int32 (height, width), 0 where the record states none."""
    _require_keys(records, first, "images", ("id", "file_name"), source)
    sizes = np.zeros((len(records), 2), np.int32)
    for row, record in enumerate(records):
        stated = (record.get("height"), record.get("width"))
        if all(type(side) is int and 0 < side < 2**31 for side in stated):
            sizes[row] = stated
        name = record["file_name"]
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
            text = f"has file_name {name!r}; it must lie in the image folder: give it relative to that, without '..'"
            raise _record_error("file_name", text, "images", first + row, record, source)
    names = np.array([encode_name(record["file_name"]) for record in records], dtype=np.bytes_)
    return {"id": _integers(records, first, "images", "id", source), "file_name": names, "size": sizes}


def _read_annotations(records: list[Any], first: int, source: str) -> Columns:
    """The columns of annotations, outlines included: see read_outlines for those.

    Returns:
        id [n] int64, the record's index in the file if it has none; image_id and category_id [n] int64; bbox [n, 4]
        float64 (x, y, width, height); area [n] float64 square pixels, NaN if the record states none; iscrowd [n] bool.
    """
    _require_keys(records, first, "annotations", ("image_id", "category_id", "bbox"), source)
    numbered = [{"id": record.get("id", first + row)} for row, record in enumerate(records)]
    ids = _integers(numbered, first, "annotations", "id", source)
    image_ids = _integers(records, first, "annotations", "image_id", source)
    category_ids = _integers(records, first, "annotations", "category_id", source)
    boxes = np.zeros((len(records), 4))
    areas = np.full(len(records), np.nan)
    crowd = np.zeros(len(records), bool)
    for row, record in enumerate(records):
        box = record["bbox"]
        numbers = isinstance(box, list) and len(box) == 4 and set(map(type, box)) <= {int, float}
        if not numbers or not all(abs(side) < MAX_PIXEL_VALUE for side in box) or min(box[2:]) < 0:
            text = f"annotation {ids[row]} has bbox {box!r:.100}; expected [x, y, width, height] in pixels, finite, "
            raise DataError("bbox", source, f"{text}no side negative", record["image_id"], int(ids[row]))
        boxes[row] = box
        area = record.get("area")
        if isinstance(area, int | float) and not isinstance(area, bool) and 0 <= area < MAX_PIXEL_VALUE:
            areas[row] = area
    for row, record in enumerate(records):
        iscrowd = record.get("iscrowd") or 0
        if iscrowd not in (0, 1):
            text = f"annotation {ids[row]} has iscrowd {iscrowd!r:.60}; expected 0 or 1"
            raise DataError("iscrowd", source, text, record["image_id"], int(ids[row]))
        crowd[row] = iscrowd
    return {
        "id": ids,
        "image_id": image_ids,
        "category_id": category_ids,
        "bbox": boxes,
        "area": areas,
        "iscrowd": crowd,
        **read_outlines(records, ids, source),
    }


READERS: dict[str, Callable[[list[Any], int, str], Columns]] = {
    "categories": _read_categories,
    "images": _read_images,
    "annotations": _read_annotations,
}


def _require_keys(records: list[Any], first: int, key: str, needed: Sequence[str], source: str) -> None:
    """Every record must be an object that has the keys `needed`."""
    for row, record in enumerate(records, first):
        absent = [name for name in needed if not isinstance(record, dict) or name not in record]
        if absent:
            raise _record_error("missing key", f"lacks '{absent[0]}'", key, row, record, source)


def _integers(records: list[Json], first: int, key: str, field: str, source: str) -> np.ndarray:
    """[n] int64, each record's `field`; anything but whole numbers is an error."""
    for row, record in enumerate(records, first):
        value = record[field]
        if type(value) is not int or abs(value) >= 2**63:
            is_name = field == "category_id" and isinstance(value, str) and not value.strip().isdigit()
            expected = "one of 'categories', or the object left out" if is_name else "a whole number"
            text = f"has {field} {value!r:.60}; it must be {expected}"
            raise _record_error(field, text, key, row, record, source)
    return np.array([record[field] for record in records], dtype=np.int64)


def _record_error(kind: str, text: str, key: str, row: int, record: Any, source: str) -> DataError:
    """An error of one record, named by its key, its index and its id."""
    fields = record if isinstance(record, dict) else {}
    name = f"{key}[{row}]" + (f" (id {fields['id']!r:.40})" if "id" in fields else "")
    image = fields.get("file_name" if key == "images" else "image_id")
    return DataError(kind, source, f"{name} {text}", image, fields.get("id") if key == "annotations" else None)


def _check_categories(categories: Columns, source: Source, problems: Problems) -> Columns:
    """The categories with unique ids and names, sorted by id."""
    if not len(categories["id"]):
        raise DataError("empty", source.source, "'categories' is empty; list the classes there")
    categories = _unique(categories, "categories", "id", "ids must be unique", source, problems)
    categories = _unique(categories, "categories", "name", "rename one, or give both one id", source, problems)
    return _select(categories, np.argsort(categories["id"]))


def _check_images(
    images: Columns, source: Source, problems: Problems, decoding: Decoding
) -> tuple[Columns, EncodedImages | None]:
    """The images with unique ids and names and known sizes that are there, and their encoded form if they have one."""
    if not len(images["id"]):
        raise DataError("empty", source.source, "'images' is empty; there is nothing to read")
    encoded = source.encoded
    images["row"] = np.arange(len(images["id"]))  # in `encoded`
    images = _unique(images, "images", "id", "ids must be unique", source, problems)
    if encoded is None:
        images = _unique(images, "images", "file_name", JOIN, source, problems)
        images = _unique_paths(images, source, problems)
        names, exists = find_files(source.folder, images["file_name"], source.source, problems)
        images = _select(images | {"file_name": names}, exists)
    images = _fill_in_sizes(images, source, problems, decoding, encoded)
    if encoded is not None and problems.collects:
        encoded = encoded.select(images["row"])
    if not len(images["id"]):
        raise DataError("empty", source.source, "none of its images can be read; the errors before this one say why")
    return images, encoded


def _unique(columns: Columns, key: str, field: str, remedy: str, source: Source, problems: Problems) -> Columns:
    """The records with the first of equal values of `field`; the others are errors."""
    values = columns[field]
    first = _is_first(values)
    for value in values[~first]:
        with problems.caught():
            shown = decode_name(value) if isinstance(value, bytes) else value
            name = f"{key}[].{field}"
            raise DataError(name, source.source, f"{name} {shown!s:.200} is used twice; {remedy}")
    return _select(columns, first)


def _unique_paths(images: Columns, source: Source, problems: Problems) -> Columns:
    """The images of different files; names that lead to the file of one before, such as ./a.jpg, are errors."""
    names = images["file_name"]
    paths = plain_paths(names)
    if paths is names:
        return images
    first = _is_first(paths)
    for row in np.flatnonzero(~first):
        with problems.caught():
            before = decode_name(names[np.flatnonzero(paths == paths[row])[0]])
            text = f"images[].file_name {before:.200} and {decode_name(names[row]):.200} are the same file; {JOIN}"
            raise DataError("images[].file_name", source.source, text)
    return _select(images, first)


def _is_first(values: np.ndarray) -> np.ndarray:
    """[n] bool, whether no value before is equal, for `values` [n] or [n, k]."""
    first = np.zeros(len(values), bool)
    first[np.unique(values, axis=0, return_index=True)[1]] = True
    return first


def _select(columns: Columns, rows: np.ndarray) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def _fill_in_sizes(
    images: Columns, source: Source, problems: Problems, decoding: Decoding, encoded: EncodedImages | None
) -> Columns:
    """The images with the sizes that their records do not state, read from the images; unreadable ones are dropped."""
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
            with problems.caught():
                text = f"image {images['id'][row]} states no width and height, and {error}"
                raise DataError("size", source.source, text, name) from error
    return _select(images, readable)


def _look_up(
    objects: Columns, field: str, ids: np.ndarray, listed: np.ndarray, source: str, problems: Problems
) -> tuple[np.ndarray, np.ndarray]:
    """[M] int64, the index in `ids` of each annotation's `field`, and [M] bool, whether it is there.

    Ids that are not there but `listed` belong to records that were rejected, and reported, before.
    """
    values, order = objects[field], np.argsort(ids)
    rows = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
    found = ids[rows] == values
    key = "images" if field == "image_id" else "categories"
    absent = np.flatnonzero(~found)
    for row in absent[~np.isin(values[absent], listed)]:
        with problems.caught():
            number, image = int(objects["id"][row]), int(objects["image_id"][row])
            text = f"annotation {number} has {field} {values[row]}, which '{key}' does not list; correct one of them"
            raise DataError(field, source, text, image, number)
    return rows, found


def _reject_other_box_formats(table: AnnotationTable) -> None:
    """Boxes as fractions of their image, or given by two corners, would train to nothing. Raises DataError."""
    boxes = table.boxes
    if len(boxes) and boxes.max() <= 1:
        text = "all its boxes lie within 1 pixel: they look like shares of the image's sides; boxes are in pixels"
        raise DataError("bbox", table.source, text)
    if len(boxes) < MIN_BOXES_TO_JUDGE_FORMAT:
        return
    limits = table.sizes[table.image_of_object(), ::-1] + 1
    fit_as_corners = (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= limits).all()
    if fit_as_corners and (boxes[:, :2] + boxes[:, 2:] > limits).any(axis=1).mean() > 0.5:
        text = (
            "its boxes look like [x1, y1, x2, y2]: most leave their images as [x, y, width, height], none as corners; "
            "rewrite them, or for a hub data set give --bbox-format voc"
        )
        raise DataError("bbox", table.source, text)


def _report_repairs(table: AnnotationTable, filled_in: np.ndarray, dropped: np.ndarray, problems: Problems) -> None:
    """Add the repairs, and notes on repeated ids and objects, to `problems`.

    Args:
        table: of M objects.
        filled_in: [M] bool, whether the area was missing.
        dropped: [M] bool, whether polygons with too few corners were dropped.
        problems: of the table's source.
    """
    image_of = table.image_of_object()

    def report(grade: str, kind: str, which: np.ndarray, message: str = "") -> None:
        names = [decode_name(name) for name in table.file_names[image_of[which]]] if problems.collects else []
        problems.add_all(grade, kind, table.source, message or kind, names, table.annotation_ids[which].tolist())

    report(REPAIRED, "area filled in from the box", filled_in)
    report(REPAIRED, "parts of outlines with fewer than 3 corners left out", dropped)
    report(REPAIRED, "boxes under 1 pixel, not trained on", ~table.usable())
    outside = (np.abs(table.corner_boxes() - corners_of(table.boxes)) > 1).any(axis=1)
    report(REPAIRED, "boxes clipped to their image by more than 1 pixel", outside)
    repeated = ~_is_first(table.annotation_ids)
    report(NOTE, "annotation ids used before", repeated, "its id is used before; only messages show it")
    objects = np.column_stack([image_of, table.labels, table.crowd, table.boxes])
    text = "there is the same box of the same class before"
    report(NOTE, "objects annotated twice", ~_is_first(objects), text)
