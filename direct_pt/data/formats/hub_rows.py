"""Rows of a detection set of the `datasets` library as COCO-like records.

The layout is the usual one on the hub: an image column, and a column `objects` with `bbox` and `category`, perhaps
`area`, `iscrowd` and `segmentation`, as a dictionary of lists or as a list of objects.
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
SIDES = (("x", "y", "width", "height"), ("x", "y", "w", "h"))  # keys of boxes that are dictionaries
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"))
ROWS_PER_READ = 1000
Json = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The columns of the rows and the fields of their objects.

    Attributes:
        image: column of the images.
        objects: column of the objects.
        boxes: field of the objects' boxes.
        categories: field of the objects' categories.
        classes: {id: name}.
        ids: {name: id} if the categories are names.
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
        """The classes as COCO-like records."""
        return [{"id": number, "name": name} for number, name in self.classes.items()]

    def records(self, rows: pa.Table, first: int, first_object: int) -> tuple[list[Json], list[Json]]:
        """The images and annotations of some rows as COCO-like records.

        Image ids are the column `image_id` if that holds whole numbers, otherwise the rows' numbers from 1.

        Args:
            rows: in Arrow format, images not decoded.
            first: number of the first row, from 0.
            first_object: number of the rows' first object, from 1.
        """
        optional = {"width", "height", "file_name"} & set(rows.column_names)
        columns = {name: rows[name].to_pylist() for name in optional}
        names = columns.pop("file_name", None)
        if not names:  # those of the image column; the images' bytes are not read
            names, cells = [None] * len(rows), rows[self.image]
            if pa.types.is_struct(cells.type):
                names = pa.chunked_array([chunk.field("path") for chunk in cells.chunks], pa.string()).to_pylist()
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
        """[x, y, width, height]; malformed boxes pass unchanged: records.py rejects them."""
        corners = self.corners
        if isinstance(box, dict):
            keys = next((keys for keys in (*SIDES, *CORNERS) if set(keys) <= set(box)), None)
            if keys is None:
                return box
            box, corners = [box[key] for key in keys], keys in CORNERS
        if not corners or not isinstance(box, list) or [type(value) in (int, float) for value in box] != [True] * 4:
            return box
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def find_layout(features: datasets.Features, source: str, bbox_format: str, splits: Iterable[Any]) -> Layout:
    """The layout of a data set's columns.

    Args:
        features: of all splits.
        source: name in messages.
        bbox_format: "coco" or "voc", for boxes that are lists.
        splits: their rows are searched for classes if the features do not name them.

    Raises:
        InputError: naming the columns that exist.
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
        missing, present = "bbox" if boxes is None else "category", ", ".join(fields) or "nothing"
        raise InputError(f"--data {source}: its '{objects}' lack '{missing}'; they have {present}")
    kind = fields[categories]
    if isinstance(features[objects], dict):  # a dictionary of lists
        kind = getattr(kind, "feature", kind)
    where, ids = f"--data {source}: '{objects}.{categories}'", None
    if isinstance(kind, datasets.ClassLabel):
        classes = dict(enumerate(kind.names))
    elif str(getattr(kind, "dtype", kind)).startswith(("int", "uint")):
        found = _values(splits, objects, categories, source)
        classes = {value: str(value) for value in sorted(found) if value >= 0}  # the library writes -1 for no class
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
    """The fields of a struct, or of a list of structs."""
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
        for piece in rows.select_columns([objects]).with_format("arrow").iter(ROWS_PER_READ):
            found.update(record.get(field) for cell in piece[objects].to_pylist() for record in _list(cell))
    return found - {None}


def _list(objects: Any) -> list[Json]:
    """The objects of an image as a list; if the lists of a dictionary differ in length, missing values are None."""
    if isinstance(objects, dict):
        lists = {name: values for name, values in objects.items() if isinstance(values, list)}
        return [dict(zip(lists, values, strict=True)) for values in zip_longest(*lists.values())]
    return [record or {} for record in objects or []]
