"""Where annotations come from: COCO-format files in two folder layouts or under four explicit paths."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from direct_pt.data.annotations import AnnotationTable, Segmentations
from direct_pt.data.images import UnreadableImage, image_size
from direct_pt.errors import InputError

Json = dict[str, Any]
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
    """Read one split and check that its images are there.

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
    table = _read_coco(paths)
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
    content = _load_json(paths.annotations)
    categories = _records(content, "categories", ("id", "name"), source)
    images = _records(content, "images", ("id", "file_name"), source)
    annotations = _records(content, "annotations", ("image_id", "category_id", "bbox"), source)
    if not categories:
        raise InputError(f"{source}: 'categories' is empty; list the classes there")
    if not images:
        raise InputError(f"{source}: 'images' is empty; there is nothing to read")

    category_ids = _integers(categories, "categories", "id", source)
    categories, category_ids = [categories[row] for row in np.argsort(category_ids)], np.sort(category_ids)
    image_ids = _integers(images, "images", "id", source)
    for values, field in ((category_ids, "categories[].id"), (image_ids, "images[].id")):
        unique, counts = np.unique(values, return_counts=True)
        if len(unique) < len(values):
            raise InputError(f"{source}: {field} {unique[counts > 1][0]} is used twice; ids must be unique")
    file_names, sizes = _image_files(images, paths, source)

    repairs: dict[str, int] = {}
    ids = _annotation_ids(annotations, source)
    image_of = _rows(annotations, "image_id", image_ids, ids, source)
    label_of = _rows(annotations, "category_id", category_ids, ids, source)
    boxes = _boxes(annotations, ids, source)
    segmentations, order = [record.get("segmentation") for record in annotations], np.argsort(image_of, kind="stable")
    areas, missing = _areas(annotations, boxes)
    crowd = _crowd(annotations, ids, source)
    if missing.any():
        repairs["area filled in from the box"] = int(missing.sum())

    table = AnnotationTable(
        source=source,
        folder=paths.images,
        file_names=file_names,
        image_ids=image_ids,
        sizes=sizes,
        starts=np.searchsorted(image_of[order], np.arange(len(images) + 1)),
        boxes=boxes[order],
        labels=label_of[order],
        areas=areas[order],
        crowd=crowd[order],
        annotation_ids=ids[order],
        segmentations=_segmentations([segmentations[row] for row in order], sizes[image_of[order]], ids[order], source),
        class_names=tuple(str(record["name"]) for record in categories),
        category_ids=tuple(int(i) for i in category_ids),
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


def _load_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no COCO file: expected an object with 'images', 'annotations', 'categories'")
    return content


def _records(content: Json, key: str, needed: Sequence[str], source: str) -> list[Json]:
    """`content[key]`, a list of objects that have the keys `needed`."""
    records = content.get(key)
    if not isinstance(records, list):
        raise InputError(f"{source}: needs the key '{key}' with a list; a COCO detection file has one")
    for row, record in enumerate(records):
        absent = [name for name in needed if not isinstance(record, dict) or name not in record]
        if absent:
            raise InputError(f"{source}: {_name(key, row, record)} lacks '{absent[0]}'")
    return records


def _name(key: str, row: int, record: Any) -> str:
    """How messages call one record of `key`'s list."""
    return f"{key}[{row}]" + (f" (id {record['id']})" if isinstance(record, dict) and "id" in record else "")


def _integers(records: list[Json], key: str, field: str, source: str) -> np.ndarray:
    """[n] int64, each record's `field`; anything but whole numbers is an error."""
    for row, record in enumerate(records):
        value = record[field]
        if type(value) is not int or abs(value) >= 2**63:
            raise InputError(f"{source}: {_name(key, row, record)} has {field} {value!r}; it must be a whole number")
    return np.array([record[field] for record in records], dtype=np.int64)


def _annotation_ids(annotations: list[Json], source: str) -> np.ndarray:
    """The annotations' own ids; their position in the file where the file gives none."""
    numbered = [{"id": record.get("id", row)} for row, record in enumerate(annotations)]
    return _integers(numbered, "annotations", "id", source)


def _rows(annotations: list[Json], field: str, known: np.ndarray, ids: np.ndarray, source: str) -> np.ndarray:
    """For each annotation the row of `known` that its `field` names."""
    values = _integers(annotations, "annotations", field, source)
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
    """[M, 4] float64 (x, y, width, height)."""
    boxes = np.zeros((len(annotations), 4))
    for row, record in enumerate(annotations):
        box = record["bbox"]
        fine = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
        if not fine or not all(abs(side) < LARGEST for side in box) or min(box[2:]) < 0:
            raise InputError(
                f"{source}: annotation {ids[row]} has bbox {box!r}; expected [x, y, width, height] in pixels, finite, "
                "no side negative"
            )
        boxes[row] = box
    return boxes


def _areas(annotations: list[Json], boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[M] float64 square pixels, the box's where the file gives none, and [M] bool where that is so."""
    stated = np.full(len(annotations), np.nan)
    for row, record in enumerate(annotations):
        area = record.get("area")
        if isinstance(area, int | float) and not isinstance(area, bool) and abs(area) < LARGEST:
            stated[row] = area
    missing = np.isnan(stated)
    return np.where(missing, boxes[:, 2] * boxes[:, 3], stated), missing


def _crowd(annotations: list[Json], ids: np.ndarray, source: str) -> np.ndarray:
    """[M] bool; 0 where the file says nothing."""
    crowd = [record.get("iscrowd") or 0 for record in annotations]
    for row, value in enumerate(crowd):
        if value not in (0, 1):
            raise InputError(f"{source}: annotation {ids[row]} has iscrowd {value!r}; expected 0 or 1")
    return np.array(crowd, dtype=bool)


def _image_files(images: list[Json], paths: SplitPaths, source: str) -> tuple[np.ndarray, np.ndarray]:
    """File names [N] bytes and sizes [N, 2] int32 (height, width); every file must exist."""
    names, sizes = [], np.zeros((len(images), 2), np.int32)
    absent = []
    for row, record in enumerate(images):
        name = str(record["file_name"])
        path = paths.images / name
        if not path.is_file():
            absent.append(path)
            continue
        names.append(name.encode())
        stated = [record.get("height"), record.get("width")]
        if all(type(side) is int and 0 < side < 2**31 for side in stated):
            sizes[row] = np.array(stated)
        else:
            try:
                sizes[row] = image_size(path)
            except UnreadableImage as error:
                raise InputError(f"{source}: image {record['id']} states no width and height, and {error}") from error
    if absent:
        raise InputError(
            f"{absent[0]}: listed in {source} but not there ({len(absent)} of {len(images)} images are missing); "
            "check the image folder"
        )
    return np.array(names, dtype="S"), sizes


def _segmentations(values: list[Any], sizes: np.ndarray, ids: np.ndarray, source: str) -> Segmentations:
    """Outlines of objects (None, polygons, run lengths) packed into flat arrays."""
    polygons: list[np.ndarray] = []
    run_lengths: list[bytes] = []
    polygon_counts, run_length_counts = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
    for row, value in enumerate(values):
        try:
            if isinstance(value, dict):
                height, width = (int(side) for side in sizes[row])
                if [int(side) for side in value["size"]] != [height, width]:
                    raise ValueError(f"its size {value['size']} is not the image's [{height}, {width}]")
                if isinstance(value["counts"], list):
                    if sum(value["counts"]) != height * width:
                        raise ValueError(f"its counts do not sum to the image's {height * width} pixels")
                    value = coco_mask.frPyObjects(value, height, width)
                counts = value["counts"]
                run_lengths.append(counts if isinstance(counts, bytes) else counts.encode())
                run_length_counts[row] = len(run_lengths[-1])
            elif value:
                corners = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in value if len(polygon) >= 6]
                if not all(np.isfinite(polygon).all() for polygon in corners):
                    raise ValueError("it has a coordinate that is not finite")
                polygons.extend(corners)
                polygon_counts[row] = len(corners)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(
                f"{source}: annotation {ids[row]} has a 'segmentation' that is neither polygons "
                f"[[x1, y1, x2, y2, ...], ...] nor COCO run lengths ({error})"
            ) from error
    return Segmentations(
        coordinates=np.concatenate(polygons) if polygons else np.zeros((0, 2)),
        polygon_starts=np.concatenate([[0], np.cumsum([len(polygon) for polygon in polygons])]).astype(np.int64),
        object_polygons=np.concatenate([[0], np.cumsum(polygon_counts)]),
        run_lengths=np.frombuffer(b"".join(run_lengths), np.uint8),
        run_length_starts=np.concatenate([[0], np.cumsum(run_length_counts)]),
    )
