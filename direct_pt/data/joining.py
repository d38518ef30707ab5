"""Several annotation tables as one."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from direct_pt.data.annotations import AnnotationTable, Segmentations, decode_name, encode_name, starts_of
from direct_pt.data.problems import DataError


def join(tables: list[AnnotationTable], like: AnnotationTable | None = None) -> AnnotationTable:
    """All images of some tables, with their classes joined by name.

    Ids stay where they agree. Classes with contradicting ids are numbered from 1 on in the order of their appearance,
    images with contradicting ids from 1 on.

    Args:
        tables: of image files.
        like: one whose classes and ids the joined table gets, as far as they are the same.

    Raises:
        DataError: several list the same image; each would teach that there is nothing but its own objects.
    """
    ids: dict[str, int] = dict(zip(like.class_names, like.category_ids, strict=True)) if like is not None else {}
    pairs = [pair for table in tables for pair in zip(table.class_names, table.category_ids, strict=True)]
    names = list(dict.fromkeys([*ids, *(name for name, _ in pairs)]))
    if like is None:
        ids = dict(pairs)
        if len(set(pairs)) > len(names) or len(set(ids.values())) < len(names):
            ids = {name: number for number, name in enumerate(names, start=1)}
    free = max(ids.values(), default=0) + 1
    for name in names:  # of a split that has classes which the training split has not; it is refused
        ids.setdefault(name, free)
    names.sort(key=ids.__getitem__)
    classes = tuple(names), tuple(ids[name] for name in names)
    parts = [table.with_classes(*classes) for table in tables]

    folder = Path(os.path.commonpath([table.folder.absolute() for table in tables]))
    paths: list[Path] = []
    listed_by: dict[Path, AnnotationTable] = {}
    for table in tables:
        for name in map(decode_name, table.file_names.tolist()):
            paths.append(table.folder.absolute() / name)
            if listed_by.setdefault(paths[-1], table) is not table:
                text = f"lists {name}, as does {listed_by[paths[-1]].source}; join its objects in one file"
                raise DataError("duplicate image", table.source, text, name)
    image_ids = np.concatenate([table.image_ids for table in tables])
    if len(np.unique(image_ids)) < len(image_ids):
        image_ids = np.arange(1, len(image_ids) + 1)
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("sizes", "boxes", "labels", "areas", "crowd", "annotation_ids")
    }
    repairs: dict[str, int] = {}
    for table in tables:
        for kind, count in table.repairs.items():
            repairs[kind] = repairs.get(kind, 0) + count
    return replace(
        parts[0],
        source=" + ".join(table.source for table in tables),
        folder=folder,
        file_names=np.array([encode_name(str(path.relative_to(folder))) for path in paths], dtype=np.bytes_),
        image_ids=image_ids,
        starts=starts_of(np.concatenate([np.diff(part.starts) for part in parts])),
        segmentations=_join_outlines([part.segmentations for part in parts]),
        repairs=repairs,
        **joined,
    )


def _join_outlines(parts: list[Segmentations]) -> Segmentations:
    values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Segmentations)}
    return Segmentations(
        **{
            name: starts_of(np.concatenate([np.diff(starts) for starts in arrays]))
            if name.endswith("starts") or name == "object_polygons"
            else np.concatenate(arrays)
            for name, arrays in values.items()
        }
    )
