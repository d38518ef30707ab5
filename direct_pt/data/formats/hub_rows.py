"""Rows of a detection set in the `datasets` library's form, as records.

The layout is the hub's usual one: an image column, and a column `objects` with `bbox` and `category`, perhaps `area`,
`iscrowd` and `segmentation`, as lists beside each other or as a list of objects.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from direct_pt.errors import InputError

OBJECTS = ("objects", "annotations")
BOXES = ("bbox", "bboxes", "boxes")
CATEGORIES = ("category", "categories", "category_id", "label", "labels", "class")
OPTIONAL = ("area", "iscrowd", "segmentation")
SIDES = (("x", "y", "width", "height"), ("x", "y", "w", "h"))  # of boxes whose numbers have names
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"))
ROWS = 1000  # read at a time
Json = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Which columns hold what.

    Attributes:
        image: column of the images.
        objects: column of the objects.
        boxes: field of them.
        categories: field of them.
        classes: {id: name}.
        ids: {name: id} where the categories are names.
        corners: whether boxes are (x1, y1, x2, y2).
    """

    image: str
    objects: str
    boxes: str
    categories: str
    classes: dict[int, str]
    ids: dict[str, int] | None
    corners: bool

    def category_records(self) -> list[Json]:
        """As in COCO files."""
        return [{"id": number, "name": name} for number, name in self.classes.items()]

    def records(self, rows: pa.Table, first: int, first_object: int) -> tuple[list[Json], list[Json]]:
        """The images and annotations of some rows as in COCO files.

        Image ids are the column `image_id`, where it is of whole numbers, else the rows' numbers from 1 on.

        Args:
            rows: in Arrow format, images not decoded.
            first: number of the first of them, from 0.
            first_object: number of their first object, from 1.
        """
        there = {"width", "height", "file_name"} & set(rows.column_names)
        columns = {name: rows[name].to_pylist() for name in there}
        names = columns.pop("file_name", None) or _paths(rows[self.image])
        ids = list(range(first + 1, first + 1 + len(rows)))
        if "image_id" in rows.column_names and pa.types.is_integer(rows["image_id"].type):
            ids = rows["image_id"].to_pylist()
        images: list[Json] = []
        annotations: list[Json] = []
        for place, objects in enumerate(rows[self.objects].to_pylist()):
            name = f", {Path(str(names[place])).name}" if names[place] else ""
            sides = {side: values[place] for side, values in columns.items()}
            images.append({"id": ids[place], "file_name": f"row {first + place}{name}", **sides})
            for found in _list(objects):
                category: Any = found.get(self.categories)
                record = {
                    "id": first_object + len(annotations),
                    "image_id": ids[place],
                    "category_id": category if self.ids is None else self.ids.get(category, category),
                    "bbox": self._box(found.get(self.boxes)),
                }
                annotations.append(record | {key: found[key] for key in OPTIONAL if found.get(key) is not None})
        return images, annotations

    def _box(self, box: Any) -> Any:
        """(x, y, width, height); what is no box stays as it is, for who reads the records to refuse."""
        corners = self.corners
        if isinstance(box, dict):
            keys = next((keys for keys in (*SIDES, *CORNERS) if set(keys) <= set(box)), None)
            if keys is None:
                return box
            box, corners = [box[key] for key in keys], keys in CORNERS
        if not corners or not isinstance(box, list) or [type(one) in (int, float) for one in box] != [True] * 4:
            return box
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def find_layout(features: datasets.Features, source: str, bbox_format: str, splits: Iterable[Any]) -> Layout:
    """Which columns hold what.

    Args:
        features: of the splits.
        source: for messages.
        bbox_format: "coco" or "voc", of boxes whose numbers have no names.
        splits: to look the classes up in, where the features do not name them.

    Raises:
        InputError: with the columns that there are.
    """
    columns = f"its columns are {', '.join(features)}"
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images and set(_fields(features.get("image"))) == {"bytes", "path"}:
        images = ["image"]
    if not images:
        remedy = "put the images beside the file that names them" if "file_name" in features else "cast one to Image()"
        raise InputError(f"--data {source}: has no image column ({columns}); {remedy}")
    objects = next((name for name in OBJECTS if name in features), None)
    if objects is None:
        raise InputError(f"--data {source}: has no column 'objects' with 'bbox' and 'category' ({columns})")
    fields = _fields(features[objects])
    boxes = next((name for name in BOXES if name in fields), None)
    categories = next((name for name in CATEGORIES if name in fields), None)
    if boxes is None or categories is None:
        wanted, there = "bbox" if boxes is None else "category", ", ".join(fields) or "nothing"
        raise InputError(f"--data {source}: its '{objects}' lack '{wanted}'; they have {there}")
    kind = fields[categories]
    if isinstance(features[objects], dict):  # lists beside each other
        kind = getattr(kind, "feature", kind)
    where, ids = f"--data {source}: '{objects}.{categories}'", None
    if isinstance(kind, datasets.ClassLabel):
        classes = dict(enumerate(kind.names))
    elif str(getattr(kind, "dtype", kind)).startswith(("int", "uint")):
        found = _values(splits, objects, categories, source)
        classes = {value: str(value) for value in sorted(found) if value >= 0}  # -1 is the library's "none"
    elif str(getattr(kind, "dtype", kind)).endswith("string"):
        names = sorted(name for name in _values(splits, objects, categories, source) if name.strip())
        classes = dict(enumerate(names))
        ids = {name: number for number, name in classes.items()}
    else:
        raise InputError(f"{where} is of the type {kind!s:.60}; classes are whole numbers or names")
    if not classes:
        raise InputError(f"{where} has no class in any row: whole numbers from 0 on, or names")
    return Layout(images[0], objects, boxes, categories, classes, ids, bbox_format == "voc")


def _fields(feature: Any) -> Json:
    """Of a struct, or of a list of structs."""
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, list) and feature:
        feature = feature[0]
    return dict(feature) if isinstance(feature, dict) else {}


def _values(splits: Iterable[Any], objects: str, field: str, source: str) -> set[Any]:
    """All categories of all splits."""
    found: set[Any] = set()
    for rows in splits:
        if isinstance(rows, datasets.IterableDataset):
            raise InputError(
                f"--data {source}: the classes are not named in its features, and --streaming does not look at all "
                f"rows first; cast '{objects}.{field}' to datasets.ClassLabel"
            )
        for some in rows.select_columns([objects]).with_format("arrow").iter(ROWS):
            found.update(one.get(field) for cell in some[objects].to_pylist() for one in _list(cell))
    return found - {None}


def _list(objects: Any) -> list[Json]:
    """The objects of an image one by one; of lists that are too short the last ones lack a value."""
    if isinstance(objects, dict):
        lists = {name: values for name, values in objects.items() if isinstance(values, list)}
        return [dict(zip(lists, values, strict=True)) for values in zip_longest(*lists.values())]
    return [one or {} for one in objects or []]


def _paths(images: pa.ChunkedArray) -> list[str | None]:
    """The images' file names, as far as they have some; their bytes are not touched."""
    if not pa.types.is_struct(images.type):
        return [None] * len(images)
    return pa.chunked_array([chunk.field("path") for chunk in images.chunks], pa.string()).to_pylist()
