"""Folds of a data set: images that look nearly alike, or belong to one clip or photograph, stay together."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.errors import InputError
from direct_pt.files import write_json
from direct_pt.reports.duplicates import MAX_BITS, perceptual_hash
from small_sets.plan import DataSet


def fold_flags(data: DataSet, root: Path, fold: int, folder: Path) -> tuple[str, ...]:
    """The flags that name a fold's training and validation images; its files are written into `folder` if needed.

    Raises:
        InputError: the set cannot be read, or has too few groups of images.
    """
    own = [str(data.images)] * bool(data.images) + [f"near{data.near_bits}"] * (data.near_bits != MAX_BITS)
    place = folder / "-".join([data.name, str(data.folds), *own])
    files = {split: place / f"{split}-{fold}.json" for split in ("train", "val")}
    if not all(path.exists() for path in files.values()):
        write_folds(data, root, place)
    images = str(data.path(root).resolve())
    pairs = [(f"--{split}-images", images, f"--{split}-annotations", str(path)) for split, path in files.items()]
    return tuple(text for pair in pairs for text in pair)


def write_folds(data: DataSet, root: Path, place: Path) -> None:
    """Write all folds of a set as COCO files, the same on any machine."""
    path = data.path(root)
    tables = list(load_tables(DataOptions(data=path, val_share=0.0)).values())
    names = [os.path.relpath(table.path(row), path) for table in tables for row in range(len(table))]
    groups = same_group(tables, names, data.group, data.near_bits)
    try:
        fold_of = assign(groups, data.folds, names)
    except InputError as error:
        raise InputError(f"set {data.name}: {error}; give it fewer folds, or a lower near_bits") from error
    place.mkdir(parents=True, exist_ok=True)
    whole = _joined(tables, names)
    for fold in range(data.folds):
        for split, rows in (("train", fold_of != fold), ("val", fold_of == fold)):
            chosen = np.flatnonzero(rows)
            if split == "train" and data.images:
                if data.images > len(chosen):
                    raise InputError(f"set {data.name}: images {data.images}, and a fold has {len(chosen)} to train on")
                chosen = np.random.default_rng(0).permutation(chosen)[: data.images]  # each holds the smaller ones
            ids = set((chosen + 1).tolist())
            part = {
                "images": [image for image in whole["images"] if image["id"] in ids],
                "annotations": [one for one in whole["annotations"] if one["image_id"] in ids],
                "categories": whole["categories"],
            }
            write_json(place / f"{split}-{fold}.json", part)


def same_group(tables: list[AnnotationTable], names: list[str], pattern: str, near_bits: int = MAX_BITS) -> np.ndarray:
    """[N] the group of each image: near-duplicates, and images whose names match `pattern` alike, share one."""
    rows = [(table, row) for table in tables for row in range(len(table))]
    hashes = np.stack([np.unpackbits(perceptual_hash(table.read_image(row))) for table, row in rows]).astype(np.int16)
    group = np.arange(len(rows))
    keys: dict[str, int] = {}
    for number, name in enumerate(names):
        near = np.flatnonzero((hashes != hashes[number]).sum(axis=1) <= near_bits)
        found = re.search(pattern, name) if pattern else None
        same = [keys.setdefault(found.group(), number)] if found else []
        joined = group[[number, *near.tolist(), *same]]
        group[np.isin(group, joined)] = joined.min()
    return group


def assign(groups: np.ndarray, folds: int, names: list[str]) -> np.ndarray:
    """[N] the fold of each image: groups in a fixed random order, the largest first, each to the smallest fold.

    Raises:
        InputError: there are fewer groups than folds.
    """
    numbers, counts = np.unique(groups, return_counts=True)
    if len(numbers) < folds:
        raise InputError(f"{len(names)} images are in {len(numbers)} groups that belong together: under {folds} folds")
    order = np.random.default_rng(0).permutation(len(numbers))
    order = order[np.argsort(-counts[order], kind="stable")]
    fold_of, sizes = np.zeros(len(groups), np.int64), np.zeros(folds, np.int64)
    for row in order.tolist():
        fold = int(np.argmin(sizes))
        fold_of[groups == numbers[row]] = fold
        sizes[fold] += counts[row]
    return fold_of


def _joined(tables: list[AnnotationTable], names: list[str]) -> dict[str, Any]:
    """The annotations of all tables as one COCO dictionary, with images and objects numbered from 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for table in tables:
        coco = table.coco(with_masks=True)
        first = {image["id"]: len(images) + number for number, image in enumerate(coco["images"], start=1)}
        images += [{**image, "id": first[image["id"]], "file_name": names[first[image["id"]] - 1]}
                   for image in coco["images"]]  # fmt: skip
        for one in coco["annotations"]:
            outline = one.pop("segmentation")
            if isinstance(outline, dict):
                outline = {**outline, "counts": outline["counts"].decode()}
            more = {"segmentation": outline} if outline else {}
            annotations.append({**one, **more, "id": len(annotations) + 1, "image_id": first[one["image_id"]]})
    return json.loads(json.dumps({"images": images, "annotations": annotations, "categories": coco["categories"]}))
