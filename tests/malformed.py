"""Small data sets of each kind, and everything that can be wrong with them: made by code, nothing is kept."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco_mask

from direct_pt.data.sources import DataOptions

Json = dict[str, Any]
WIDTH, HEIGHT = 64, 48


def picture(**options: Any) -> bytes:
    """A PNG file, or one of another format."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **{"format": "PNG", **options})
    return file.getvalue()


PICTURE = picture()


def turned() -> bytes:
    """Stored lying, with an EXIF orientation that turns it upright: 48 wide, 64 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large, and is not."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def run_lengths(height: int = HEIGHT, width: int = WIDTH) -> Json:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[10:20, 8:28] = 1
    packed = coco_mask.encode(mask)
    return {"size": [height, width], "counts": packed["counts"].decode()}


BOXES = {11: [4, 5, 20, 10], 12: [30.5, 8, 16, 32], 13: [8, 10, 20, 10]}
SQUARE = [[31, 8, 46, 8, 46, 40, 31, 40]]


@dataclass
class Coco:
    folder: Path
    layout: str = "plain"
    train: Json = field(default_factory=dict)
    val: Json = field(default_factory=dict)
    encode: Callable[[str], bytes] = str.encode

    def __post_init__(self) -> None:
        of = {
            "explicit": ("labels.json", "pictures", "other.json", "pictures"),
            "plain": ("annotations/instances_train.json", "images", "annotations/instances_val.json", "images"),
            "coco2017": (
                "annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017"
            ),
            "roboflow": ("train/_annotations.coco.json", "train", "valid/_annotations.coco.json", "valid"),
        }[self.layout]
        self.file, self.images, self.val_file, self.val_images = (self.folder / name for name in of)
        for path in (self.file.parent, self.images, self.val_file.parent, self.val_images):
            path.mkdir(parents=True, exist_ok=True)
        names = {1: "a.png", 2: "b.png"}
        for name in names.values():
            (self.images / name).write_bytes(PICTURE)
        (self.val_images / "v.png").write_bytes(PICTURE)
        categories = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}]
        size = {"height": HEIGHT, "width": WIDTH}
        self.train = {
            "info": {"year": 2024},
            "images": [{"id": number, "file_name": name, **size} for number, name in names.items()],
            "annotations": [
                {"id": 11, "image_id": 1, "category_id": 1, "bbox": BOXES[11], "area": 200, "iscrowd": 0},
                {"id": 12, "image_id": 1, "category_id": 3, "bbox": BOXES[12], "area": 480.5, "segmentation": SQUARE},
                {"id": 13, "image_id": 2, "category_id": 3, "bbox": BOXES[13], "area": 200, "segmentation": run_lengths()},
            ],
            "categories": categories,
        }
        self.val = {
            "images": [{"id": 7, "file_name": "v.png", **size}],
            "annotations": [{"id": 21, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 11], "area": 110}],
            "categories": list(categories),
        }

    def write(self) -> DataOptions:
        self.file.write_bytes(self.encode(json.dumps(self.train)))
        self.val_file.write_text(json.dumps(self.val))
        if self.layout != "explicit":
            return DataOptions(data=self.folder)
        return DataOptions(
            train_images=(self.images,), train_annotations=(self.file,),
            val_images=(self.val_images,), val_annotations=(self.val_file,),
        )
