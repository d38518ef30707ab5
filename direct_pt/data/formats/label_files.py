"""Shared by the formats with one label file per image: reading text, and numbering the records."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from direct_pt.data.formats.json_stream import CHUNK
from direct_pt.data.problems import DataError
from direct_pt.data.records import Chunk, Json


def number_records(categories: list[Json], images: Iterable[tuple[Json, list[Json]]]) -> Iterator[Chunk]:
    """The records of one split in chunks: see Source.records.

    Args:
        categories: complete records.
        images: the record of each image and those of its objects, without ids and areas, which these formats lack: ids
            are numbered from 1 in this order, and the area is the box's.
    """
    yield "categories", 0, categories
    waiting: dict[str, list[Json]] = {"images": [], "annotations": []}
    passed = {"images": 0, "annotations": 0}
    for image_id, (image, objects) in enumerate(images, start=1):
        waiting["images"].append({"id": image_id, **image})
        first = passed["annotations"] + len(waiting["annotations"]) + 1
        for number, record in enumerate(objects, first):
            area = record["bbox"][2] * record["bbox"][3]
            waiting["annotations"].append({"id": number, "image_id": image_id, "area": area, **record})
        for key, records in waiting.items():
            if len(records) >= CHUNK:
                yield key, passed[key], records
                passed[key] += len(records)
                waiting[key] = []
    for key, records in waiting.items():
        if records or not passed[key]:
            yield key, passed[key], records


def read_text(path: Path) -> str:
    """A file's text, with or without a byte order mark. Raises DataError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("unreadable text", path, f"cannot be read as UTF-8 text ({error}); save it anew") from error
