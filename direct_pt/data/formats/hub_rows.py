"""Rows of a detection set of the `datasets` library as COCO-like records.

The layout is the usual one on the hub: an image column, and a column `objects` with `bbox` and `category`, perhaps
`area`, `iscrowd` and `segmentation`, as a dictionary of lists or as a list of objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from direct_pt.errors import InputError, class_differences

IMAGES = ("image", "img", "images", "picture", "photo")  # that is taken if there are several
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
        ids: from what the rows hold, names or a split's own numbers, to ids; None if they hold ids.
        corners: whether boxes are (x1, y1, x2, y2).
    """

    image: str
    objects: str
    boxes: str
    categories: str
    classes: dict[int, str]
    ids: dict[Any, int] | None
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
                if self.ids is not None and isinstance(category, int | str):
                    category = self.ids.get(category, self._no_class(category))
                record = {
                    "id": first_object + len(annotations),
                    "image_id": ids[place],
                    "category_id": category,
                    "bbox": self._box(found.get(self.boxes)),
                }
                annotations.append(record | {key: found[key] for key in OPTIONAL if found.get(key) is not None})
        return images, annotations

    def _no_class(self, category: int | str) -> int | str:
        """A category that names no class, and is no other class's id either: records.py rejects it."""
        return min(-1, category) if category in self.classes else category

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


@dataclass(frozen=True)
class _Columns:
    """The columns of one split, and of what kind its categories are: ClassLabel, or the type of a value.

    A ClassLabel may be README.md's, and its names, not their numbers, stand in the rows.
    """

    image: str
    objects: str
    boxes: str
    categories: str
    kind: Any
    names_in_rows: bool = False

    @property
    def kind_name(self) -> str:
        """ "int" or "string", or another type that classes cannot have."""
        dtype = str(getattr(self.kind, "dtype", self.kind))
        return "int" if dtype.startswith(("int", "uint")) else "string" if dtype.endswith("string") else dtype


def find_layouts(
    splits: Mapping[str, Any], source: str, bbox_format: str, declared: Mapping[str, Any] | None = None
) -> dict[str, Layout]:
    """The layout of each split's columns, all with the same classes: those of the first split, then those of others.

    Args:
        splits: the data sets. Their rows are searched for classes if the features do not name them.
        source: name in messages.
        bbox_format: "coco" or "voc", for boxes that are lists.
        declared: features that README.md states, for what the splits' own do not say: images and names of classes.

    Raises:
        InputError: naming the columns that exist.
    """
    columns = {
        split: _find_columns(
            rows.features or {}, f"--data {source}{f' ({split})' if len(splits) > 1 else ''}", declared or {}
        )
        for split, rows in splits.items()
    }
    named = {split: c.kind.names for split, c in columns.items() if isinstance(c.kind, datasets.ClassLabel)}
    kinds = {c.kind_name for split, c in columns.items() if split not in named}
    first = next(iter(columns.values()))
    where = f"--data {source}: '{first.objects}.{first.categories}'"
    for own in columns.values():
        if own.kind_name not in ("int", "string") and not isinstance(own.kind, datasets.ClassLabel):
            raise InputError(f"{where} is of the type {own.kind!s:.60}; classes are whole numbers or names")
    if "int" in kinds and (named or "string" in kinds):
        raise InputError(f"{where} holds numbers in one split, names in another; give all splits the same classes")
    found = {split: _values(splits[split], c, source) for split, c in columns.items() if split not in named}
    if kinds == {"int"}:
        values = sorted(value for value in set().union(*found.values()) if value >= 0)  # the library's -1 is no class
        classes = {value: str(value) for value in values}
    else:
        names = list(dict.fromkeys(name for own in named.values() for name in own))
        names += sorted({name for own in found.values() for name in own if name.strip()} - set(names))
        classes = dict(enumerate(names))
    if not classes:
        raise InputError(f"{where} has no class in any row: whole numbers from 0 on, or names")
    ids = {name: number for number, name in classes.items()}
    layouts = {}
    for split, own in columns.items():
        own_ids: dict[Any, int] | None = ids if kinds != {"int"} else None
        if split in named:
            numbers = {number: ids[name] for number, name in enumerate(named[split])}
            if own.names_in_rows:
                own_ids = {name: ids[name] for name in named[split]}
            else:
                own_ids = None if numbers == {number: number for number in classes} else numbers
        layouts[split] = Layout(
            own.image, own.objects, own.boxes, own.categories, classes, own_ids, bbox_format == "voc"
        )
    return layouts


def _find_columns(features: Mapping[str, Any], where: str, declared: Mapping[str, Any]) -> _Columns:
    """The columns of one split with these features. Raises InputError, beginning with `where`."""
    features = {
        name: declared[name] if _is_image(kind, declared.get(name)) else kind for name, kind in features.items()
    }
    columns = f"its columns are {', '.join(features)}"
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if not images and set(_fields(features.get("image"))) == {"bytes", "path"}:
        images = ["image"]
    if not images:
        remedy = "put the images beside the file that names them" if "file_name" in features else "cast one to Image()"
        raise InputError(f"{where}: has no image column ({columns}); {remedy}")
    image = images[0] if len(images) == 1 else next((name for name in IMAGES if name in images), None)
    if image is None:
        raise InputError(f"{where}: has the image columns {', '.join(images)}; rename the one to learn from to 'image'")
    objects = next((name for name in OBJECTS if name in features), None)
    if objects is None:
        raise InputError(f"{where}: has no column 'objects' with 'bbox' and 'category' ({columns})")
    fields = _fields(features[objects])
    boxes = next((name for name in BOXES if name in fields), None)
    categories = next((name for name in CATEGORIES if name in fields), None)
    if boxes is None or categories is None:
        missing, present = "bbox" if boxes is None else "category", ", ".join(fields) or "nothing"
        raise InputError(f"{where}: its '{objects}' lack '{missing}'; they have {present}")
    kind = _kind(features[objects], categories)
    stated = _kind(declared.get(objects), categories)
    if not isinstance(stated, datasets.ClassLabel):
        return _Columns(image, objects, boxes, categories, kind)
    if isinstance(kind, datasets.ClassLabel) and kind.names != stated.names:
        differences = class_differences(dict(enumerate(kind.names)), dict(enumerate(stated.names)))
        text = f"its files name other classes than its README.md: {differences}; mend the one that is wrong"
        raise InputError(f"{where}: {text}")
    own = _Columns(image, objects, boxes, categories, kind)
    if own.kind_name not in ("int", "string"):
        return own
    return _Columns(image, objects, boxes, categories, stated, own.kind_name == "string")


def _is_image(kind: Any, stated: Any) -> bool:
    """Whether a column without a kind of its own is declared as one of images."""
    return isinstance(stated, datasets.Image) and set(_fields(kind)) == {"bytes", "path"}


def _kind(objects: Any, categories: str) -> Any:
    """The kind of one category of the objects' feature; None if there is none."""
    kind = _fields(objects).get(categories)
    return getattr(kind, "feature", kind) if isinstance(objects, dict) else kind  # a dictionary of lists


def _fields(feature: Any) -> Json:
    """The fields of a struct, or of a list of structs."""
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, list) and feature:
        feature = feature[0]
    return dict(feature) if isinstance(feature, dict) else {}


def _values(rows: Any, columns: _Columns, source: str) -> set[Any]:
    """All categories of a split."""
    if isinstance(rows, datasets.IterableDataset):
        raise InputError(
            f"--data {source}: the classes are not named in its features, and --streaming does not look at all "
            f"rows first; cast '{columns.objects}.{columns.categories}' to datasets.ClassLabel"
        )
    found: set[Any] = set()
    for piece in rows.select_columns([columns.objects]).with_format("arrow").iter(ROWS_PER_READ):
        cells = piece[columns.objects].to_pylist()
        found.update(record.get(columns.categories) for cell in cells for record in _list(cell))
    return found - {None}


def _list(objects: Any) -> list[Json]:
    """The objects of an image as a list; if the lists of a dictionary differ in length, missing values are None."""
    if isinstance(objects, dict):
        lists = {name: values for name, values in objects.items() if isinstance(values, list)}
        return [dict(zip(lists, values, strict=True)) for values in zip_longest(*lists.values())]
    return [record or {} for record in objects or []]
