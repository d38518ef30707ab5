"""What the tests of YOLO and Pascal VOC trees share: writing their files, and reading a split's records."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from direct_pt.data.problems import Problems
from direct_pt.data.records import Source

Lists = dict[str, list[dict[str, Any]]]
WIDTH, HEIGHT = 64, 32


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def save_image(path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, **options)


def read(split: Source, problems: Problems | None = None) -> Lists:
    """All records, by key, without the areas; the chunks must say where they belong."""
    lists: Lists = defaultdict(list)
    for key, first, records in split.records(problems or Problems()):
        assert first == len(lists[key])
        lists[key] += records
    assert set(lists) == {"categories", "images", "annotations"}
    for record in lists["annotations"]:
        assert record.pop("area") == record["bbox"][2] * record["bbox"][3]
    return lists


def names(lists: Lists) -> list[str]:
    return [record["file_name"] for record in lists["images"]]
