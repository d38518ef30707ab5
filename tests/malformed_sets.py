"""Small data sets of every kind, made by code, all with the same objects: what is left after an error is compared."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from pycocotools import mask as coco_mask

from direct_pt.data.sources import DataOptions

Json = dict[str, Any]
Object = tuple[str, str, list[float]]  # image, class, box
FINE, UNREADABLE = "fine", "unreadable image"  # grades of cases: nothing is wrong; found when the pixels are read
WIDTH, HEIGHT = 64, 48
BOXES = [[8, 6, 16, 12], [24, 12, 16, 24], [16, 12, 32, 24]]
GOOD: list[Object] = [("a", "cat", BOXES[0]), ("a", "dog", BOXES[1]), ("b", "dog", BOXES[2])]
SQUARE = [[24, 12, 40, 12, 40, 36, 24, 36]]  # the second one's outline
AREA, SIZES = "area filled in from the box", "image sizes read from the image files"
SMALL, CLIPPED = "boxes under 1 pixel, not trained on", "boxes clipped to their image by more than 1 pixel"
PARTS = "parts of outlines with fewer than 3 corners left out"
AGAIN, TWICE = "annotation ids used before", "objects annotated twice"


# Image files


def picture(**options: Any) -> bytes:
    """A PNG file, or one of another format."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, **{"format": "PNG", **options})
    return file.getvalue()


def turned() -> bytes:
    """Stored lying; its EXIF orientation makes it 48 wide and 64 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


def png_of(width: int, height: int) -> bytes:
    """A small file whose header states a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


PICTURE = picture()
BOMB = png_of(60_000, 60_000)


# Good sets


@dataclass
class Tree:
    """A data set in a folder, beside which a file lies that nobody may read."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder.parent / "secret.jpg").write_bytes(PICTURE)
        self.fill()

    def fill(self) -> None:
        """Write its files, or prepare what `write` writes."""

    def put(self, name: str, content: str | bytes) -> None:
        """A file, in place of what is there."""
        path = self.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def drop(self, name: str) -> Path:
        """Remove a file or folder."""
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        return path

    def write(self) -> DataOptions:
        """What is not written yet, and how the set is named."""
        return DataOptions(data=self.folder)

    def paths(self) -> dict[str, Path]:
        """How messages in cases call some of its paths."""
        return {"SET": self.folder, "ROOT": self.folder.parent}


COCO = {  # annotations and images of both splits
    "explicit": ("labels.json", "pictures", "other.json", "pictures"),
    "plain": ("annotations/instances_train.json", "images", "annotations/instances_val.json", "images"),
    "coco2017": ("annotations/instances_train2017.json", "train2017", "annotations/instances_val2017.json", "val2017"),
    "roboflow": ("train/_annotations.coco.json", "train", "valid/_annotations.coco.json", "valid"),
}


@dataclass
class CocoTree(Tree):
    """`train` and `val` are the annotation files' contents, `encode` makes the training file's bytes of its JSON."""

    layout: str = "plain"
    train: Json = field(default_factory=dict)
    val: Json = field(default_factory=dict)
    encode: Callable[[str], bytes] = str.encode

    def fill(self) -> None:
        """Images, and the contents of the annotation files."""
        paths = (self.folder / name for name in COCO[self.layout])
        self.file, self.images, self.val_file, self.val_images = paths
        for path in (self.file.parent, self.images, self.val_file.parent, self.val_images):
            path.mkdir(parents=True, exist_ok=True)
        size = {"height": HEIGHT, "width": WIDTH}
        for folder, name in ((self.images, "a"), (self.images, "b"), (self.val_images, "v")):
            (folder / f"{name}.png").write_bytes(PICTURE)
        self.train = {
            "info": {"year": 2024},
            "images": [{"id": row, "file_name": f"{name}.png", **size} for row, name in ((1, "a"), (2, "b"))],
            "annotations": [
                {"id": 11, "image_id": 1, "category_id": 1, "bbox": BOXES[0], "area": 192, "iscrowd": 0},
                {"id": 12, "image_id": 1, "category_id": 3, "bbox": BOXES[1], "area": 384, "segmentation": SQUARE},
                {"id": 13, "image_id": 2, "category_id": 3, "bbox": BOXES[2], "area": 768, "segmentation": runs()},
            ],
            "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}],
        }
        self.val = {
            "images": [{"id": 7, "file_name": "v.png", **size}],
            "annotations": [{"id": 21, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 11], "area": 110}],
            "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        }

    def write(self) -> DataOptions:
        """The annotation files."""
        self.file.write_bytes(self.encode(json.dumps(self.train)))
        self.val_file.write_text(json.dumps(self.val))
        if self.layout != "explicit":
            return DataOptions(data=self.folder)
        train, val = (self.images,), (self.val_images,)
        return DataOptions(
            train_images=train, train_annotations=(self.file,), val_images=val, val_annotations=(self.val_file,)
        )

    def paths(self) -> dict[str, Path]:
        """The training split's, too."""
        return {"FILE": self.file, "IMAGES": self.images, "VAL": self.val_file, **super().paths()}


def runs(height: int = HEIGHT, width: int = WIDTH) -> Json:
    """An outline in COCO's compressed run lengths."""
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[12:36, 16:48] = 1
    return {"size": [height, width], "counts": coco_mask.encode(mask)["counts"].decode()}


@dataclass
class YoloTree(Tree):
    """data.yaml, images/ and labels/."""

    def fill(self) -> None:
        """All files."""
        self.put("data.yaml", "names: [cat, dog]\ntrain: images/train\nval: images/val\n")
        whole = "1 .5 .5 .5 .5"
        labels = {"train/a": "0 .25 .25 .25 .25\n1 .5 .5 .25 .5\n", "train/b": whole, "val/v": whole}
        for name, lines in labels.items():
            self.put(f"images/{name}.png", PICTURE)
            self.put(f"labels/{name}.txt", lines)


def voc_object(name: str = "cat", corners: tuple[object, ...] = (9, 7, 24, 18), more: str = "") -> str:
    """An <object>; the first of the good ones."""
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


SECOND = voc_object("dog", (25, 13, 40, 36))
THIRD = voc_object("dog", (17, 13, 48, 36))
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def voc_file(image: str, *objects: str, size: str = SIZE) -> str:
    """An XML file."""
    return f"<annotation><filename>{image}</filename>{size}{''.join(objects)}</annotation>"


@dataclass
class VocTree(Tree):
    """Annotations/, JPEGImages/ and ImageSets/Main/."""

    def fill(self) -> None:
        """All files."""
        objects = {"a": (voc_object(), SECOND), "b": (THIRD,), "v": (voc_object(),)}
        for name, found in objects.items():
            self.put(f"JPEGImages/{name}.png", PICTURE)
            self.put(f"Annotations/{name}.xml", voc_file(f"{name}.png", *found))
        self.put("ImageSets/Main/train.txt", "a\nb\n")
        self.put("ImageSets/Main/val.txt", "v\n")


@dataclass
class HubTree(Tree):
    """Of the `datasets` library: rows of images and objects. There is no validation split, and none is held out."""

    rows: list[Json] = field(default_factory=list)

    def fill(self) -> None:
        """The rows."""
        objects = ([BOXES[0], BOXES[1]], [0, 1]), ([BOXES[2]], [1])
        self.rows = [{"objects": {"bbox": list(boxes), "category": numbers}} for boxes, numbers in objects]

    def write(self) -> DataOptions:
        """The set as it is named."""
        return DataOptions(data=self.folder, val_share=0)


@dataclass
class MetadataTree(HubTree):
    """An image folder with metadata.jsonl, which `encode` makes of its text."""

    encode: Callable[[str], bytes] = str.encode

    def fill(self) -> None:
        """Images and rows. Classes have names here."""
        super().fill()
        for row, name in zip(self.rows, ("a.png", "b.png"), strict=True):
            row["file_name"] = name
            row["objects"]["category"] = [("cat", "dog")[number] for number in row["objects"]["category"]]
            self.put(f"train/{name}", PICTURE)

    def write(self) -> DataOptions:
        """metadata.jsonl."""
        self.put("train/metadata.jsonl", self.encode("".join(f"{json.dumps(row)}\n" for row in self.rows)))
        return super().write()

    def paths(self) -> dict[str, Path]:
        """And metadata.jsonl."""
        return {"FILE": self.folder / "train/metadata.jsonl", **super().paths()}


def features(category: Any = None, **more: Any) -> datasets.Features:
    """Of rows with images."""
    numbers = datasets.Sequence(category or datasets.ClassLabel(names=["cat", "dog"]))
    boxes = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    return datasets.Features({"image": datasets.Image(), "objects": {"bbox": boxes, "category": numbers}, **more})


@dataclass
class ParquetTree(HubTree):
    """A parquet file, with the columns that `features` name."""

    features: datasets.Features = field(default_factory=features)

    def fill(self) -> None:
        """The rows."""
        super().fill()
        for row, name in zip(self.rows, ("a.png", "b.png"), strict=True):
            row["image"] = {"bytes": PICTURE, "path": name}

    def table(self) -> pa.Table:
        """The rows as they are written."""
        return pa.Table.from_pylist(self.rows, schema=self.features.arrow_schema)

    def write(self) -> DataOptions:
        """The file."""
        parquet.write_table(self.table(), self.folder / "train-00000-of-00001.parquet")
        return super().write()

    def paths(self) -> dict[str, Path]:
        """And the file."""
        return {"FILE": self.folder / "train-00000-of-00001.parquet", **super().paths()}


@dataclass
class SavedTree(ParquetTree):
    """What save_to_disk writes, as the split `split`."""

    split: str = "train"

    def write(self) -> DataOptions:
        """All files."""
        datasets.DatasetDict({self.split: datasets.Dataset(self.table())}).save_to_disk(self.folder)
        return DataOptions(data=self.folder, val_share=0)


KINDS: dict[str, Callable[[Path], Tree]] = {
    **{layout: lambda folder, layout=layout: CocoTree(folder, layout) for layout in COCO},  # type: ignore[misc]
    "yolo": YoloTree,
    "voc": VocTree,
    "metadata": MetadataTree,
    "parquet": ParquetTree,
    "saved": SavedTree,
}
