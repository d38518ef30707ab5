"""Small data sets of every kind, each way in which they can be malformed, and what comes of it. All is made by code.

Every good set holds the same objects, so that whatever is left of one after an error can be compared with GOOD.
"""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from pycocotools import mask as coco_mask

from direct_pt.data.problems import ERROR, NOTE, REPAIRED
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
    """A data set in a folder, beside a file that must not be read."""

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


# Cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is spoilt, and what comes of it.

    Attributes:
        kind: of KINDS.
        spoil: makes the good set one that is not.
        after: the same, once all files are written.
        grade: ERROR, REPAIRED, NOTE, UNREADABLE or FINE.
        message: of ERROR and UNREADABLE: all of it, or how it begins where it ends in "...". FILE, SET and the like
            stand for paths: see Tree.paths.
        annotation: id that the problem names.
        counts: of repairs or notes, by kind.
        left: the objects that are read; of ERROR those that are where problems are collected, None where the split
            cannot be read, or nothing can.
        also: messages of further errors that are collected.
        split: that the problem belongs to.
        flags: makes other fields of DataOptions.
    """

    kind: str
    spoil: Callable[[Any], object]
    after: Callable[[Any], object]
    grade: str
    message: str
    annotation: int | None
    counts: dict[str, int]
    left: list[Object] | None
    also: tuple[str, ...]
    split: str
    flags: Callable[[Any], Json]

    def make(self, root: Path) -> tuple[Tree, DataOptions]:
        """The spoilt set in `root`, and how it is named."""
        tree = KINDS[self.kind](root / "set")
        self.spoil(tree)
        options = tree.write()
        self.after(tree)
        return tree, replace(options, **self.flags(tree))


CASES: dict[str, Case] = {}


def nothing(tree: Tree) -> None:
    """Spoil nothing."""


def add(name: str, grade: str, spoil: Callable[[Any], object] = nothing, message: str = "", **more: Any) -> None:
    """One case; its kind is the first word of its name."""
    assert name not in CASES, name
    values: Json = {"after": nothing, "annotation": None, "counts": {}, "also": (), "split": "train"}
    values |= {"left": None if grade == ERROR else GOOD, "flags": lambda tree: {}, **more}
    CASES[name] = Case(kind=name.split()[0], spoil=spoil, grade=grade, message=message, **values)


def put(key: str, row: int, name: str, value: Any) -> Callable[[CocoTree], None]:
    """Another value in one field of one COCO record."""
    return lambda tree: tree.train[key][row].__setitem__(name, value)


def cut(key: str, row: int, name: str) -> Callable[[CocoTree], object]:
    """A field less."""
    return lambda tree: tree.train[key][row].pop(name)


def text(change: Callable[[str], str | bytes]) -> Callable[[Any], None]:
    """Another text in the file of JSON."""

    def encode(content: str) -> bytes:
        changed = change(content)
        return changed if isinstance(changed, bytes) else changed.encode()

    return lambda tree: setattr(tree, "encode", encode)


def swap(old: str, new: str) -> Callable[[Any], None]:
    """Another piece of text in it."""
    return text(lambda content: content.replace(old, new, 1))


def file(name: str, content: str | bytes) -> Callable[[Tree], None]:
    """Another file."""
    return lambda tree: tree.put(name, content)


def loop(name: str) -> Callable[[Tree], None]:
    """A link to itself in place of a file."""

    def make(tree: Tree) -> None:
        path = tree.drop(name)
        path.symlink_to(path.name)

    return make


def folder(name: str) -> Callable[[Tree], None]:
    """A folder in place of a file."""
    return lambda tree: tree.drop(name).mkdir()


def all_of(*changes: Callable[[Any], object]) -> Callable[[Any], None]:
    """Several changes."""

    def change(tree: Any) -> None:
        for one in changes:
            one(tree)

    return change


# Tables, in which one argument a line would hide what belongs together.
# fmt: off

# COCO: the file

JSON = "cannot be read as JSON"
ANEW = "; write it anew, in UTF-8"
NO_COCO = "FILE: is no COCO file: expected an object with 'images', 'annotations', 'categories'"
DEEP = "maximum recursion depth exceeded while decoding a JSON array from a unicode string"
for layout in COCO:
    add(f"{layout} good", FINE)
    add(f"{layout} cut short", ERROR, text(lambda s: s[:300]), f"FILE: {JSON} (...")
for layout in ("explicit", "plain", "coco2017"):
    add(f"{layout} no image folder", ERROR, after=lambda tree: tree.images.rename(tree.folder / "elsewhere"),
        message="IMAGES: no such image folder (the images of FILE)",
        also=() if layout == "coco2017" else ("IMAGES: no such image folder (the images of VAL)",))
add("plain empty file", ERROR, text(lambda s: ""), f"FILE: {JSON} (Expecting value: line 1 column 1 (char 0)){ANEW}")
add("plain list", ERROR, text(lambda s: "[1, 2]"), NO_COCO)
add("plain null", ERROR, text(lambda s: "null"), NO_COCO)
add("plain results file", ERROR, lambda tree: setattr(tree, "train", tree.train["annotations"]), NO_COCO)
add("plain byte order mark", FINE, text(lambda s: s.encode("utf-8-sig")))
add("plain UTF-16", FINE, text(lambda s: s.encode("utf-16")))
add("plain Latin-1", ERROR, text(lambda s: s.replace("cat", "c\xe4t").encode("latin-1")),
    f"FILE: {JSON} ('utf-8' codec can't decode byte 0xe4 in position ...")
add("plain gzip", ERROR, text(lambda s: b"\x1f\x8b\x08" + s.encode()),
    f"FILE: {JSON} ('utf-8' codec can't decode byte 0x8b in position 1: invalid start byte){ANEW}")
add("plain one quote", ERROR, text(lambda s: s.replace('"', "'")),
    f"FILE: {JSON} (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)){ANEW}")
add("plain something behind", ERROR, text(lambda s: s + "\n" + s),
    f"FILE: {JSON} (Extra data: line 2 column 1 (char ...")
add("plain 1e400", ERROR, swap("[8, 6", "[1e400, 6"), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has bbox [inf, 6, 16, 12]; expected [x, y, width, height] in pixels, finite, ...")
add("plain NaN", ERROR, swap("[8, 6", "[NaN, 6"), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has bbox [nan, 6, 16, 12]; expected [x, y, width, height] in pixels, finite, ...")
add("plain 4,001 digits", ERROR, swap("[8, 6", f"[{10**4000}, 6"), annotation=11, left=GOOD[1:],
    message=f"FILE: annotation 11 has bbox [{10**98}; expected [x, y, width, height] in pixels, ...")
add("plain 5,000 digits", ERROR, swap("[8, 6", f"[{'9' * 5000}, 6"),
    f"FILE: {JSON} (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits){ANEW}")
add("plain deep nesting", ERROR, swap('"year": 2024', '"year": ' + "[" * 100_000), f"FILE: {JSON} ({DEEP}){ANEW}")
add("plain deep nesting, closed", ERROR, swap('"year": 2024', '"year": ' + "[" * 100_000 + "]" * 100_000),
    f"FILE: {JSON} ({DEEP}){ANEW}")
add("plain much white space", FINE, text(lambda s: " " * 10**7 + s.replace("[", "[" + "\n" * 10**7, 1)))
add("plain a key twice", FINE, swap('"info"', '"images": [], "info"'))  # the last one counts
add("plain a field twice", FINE, swap('"id": 11', '"category_id": 3, "id": 11'))
add("explicit annotations are a folder", ERROR, after=folder("labels.json"), message="FILE: no such annotation file")
add("explicit annotations link to themselves", ERROR, after=loop("labels.json"),
    message="FILE: no such annotation file")
add("explicit images are a file", ERROR, after=file("pictures", ""),
    message="IMAGES: no such image folder (the images of ...",
    also=("IMAGES: no such image folder (the images of VAL)",))
add("plain images link to themselves", ERROR, after=loop("images"),
    message="IMAGES: no such image folder (the images of FILE)",
    also=("IMAGES: no such image folder (the images of VAL)",))

# COCO: lists and records

for key in ("images", "annotations", "categories"):
    needs = f"FILE: needs the key '{key}' with a list; a COCO detection file has one"
    add(f"plain no {key}", ERROR, lambda tree, key=key: tree.train.pop(key), needs)
    add(f"plain {key} an object", ERROR, lambda tree, key=key: tree.train.update({key: {"1": {}}}), needs)
    first = "image_id" if key == "annotations" else "id"
    add(f"roboflow {key} with null", ERROR, lambda tree, key=key: tree.train[key].append(None),
        f"FILE: {key}[{2 + (key == 'annotations')}] lacks '{first}'", left=GOOD)
add("plain images empty", ERROR, lambda tree: tree.train["images"].clear(),
    "FILE: 'images' is empty; there is nothing to read")
add("plain categories empty", ERROR, lambda tree: tree.train["categories"].clear(),
    "FILE: 'categories' is empty; list the classes there")
add("plain annotations empty", FINE, lambda tree: tree.train["annotations"].clear(), left=[])
add("plain captions", ERROR, lambda tree: [record.pop("bbox") for record in tree.train["annotations"]],
    "FILE: annotations[0] (id 11) lacks 'bbox'", annotation=11, left=[],
    also=tuple(f"FILE: annotations[{row}] (id {12 + row - 1}) lacks 'bbox'" for row in (1, 2)))
for name in ("image_id", "category_id", "bbox"):
    add(f"coco2017 no {name}", ERROR, cut("annotations", 0, name), f"FILE: annotations[0] (id 11) lacks '{name}'",
        annotation=11, left=GOOD[1:])
add("plain no annotation id", FINE, cut("annotations", 0, "id"))
add("plain no file_name", ERROR, cut("images", 0, "file_name"), "FILE: images[0] (id 1) lacks 'file_name'",
    left=GOOD[2:])
add("plain no class name", ERROR, cut("categories", 1, "name"), "FILE: categories[1] (id 1) lacks 'name'",
    left=GOOD[1:])

WHOLE = "; it must be a whole number"
UNKNOWN = tuple(f"FILE: annotation {number} has image_id 1, which 'images' does not list" for number in (11, 12))
UNNAMED = ("FILE: annotation 11 has category_id 1, which 'categories' does not list",)
for what, value in {"text": "1", "a fraction": 1.0, "true": True, "null": None, "huge": 2**63, "a list": [1]}.items():
    reason = f"(id {value!r}) has id {value!r}{WHOLE}"
    add(f"explicit image id {what}", ERROR, put("images", 0, "id", value), f"FILE: images[0] {reason}", left=GOOD[2:],
        also=UNKNOWN)
    add(f"plain category id {what}", ERROR, put("categories", 1, "id", value), f"FILE: categories[1] {reason}",
        left=GOOD[1:], also=UNNAMED)
    add(f"roboflow annotation id {what}", ERROR, put("annotations", 0, "id", value), f"FILE: annotations[0] {reason}",
        left=GOOD[1:], annotation=value if what == "huge" else None)
    for name in ("image_id", "category_id"):
        add(f"coco2017 {name} {what}", ERROR, put("annotations", 0, name, value), annotation=11, left=GOOD[1:],
            message=f"FILE: annotations[0] (id 11) has {name} {value!r}{WHOLE}")
add("plain unknown image", ERROR, put("annotations", 0, "image_id", 99), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has image_id 99, which 'images' does not list")
add("plain unknown class", ERROR, put("annotations", 0, "category_id", 99), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has category_id 99, which 'categories' does not list")
add("plain image id twice", ERROR, put("images", 1, "id", 1), "FILE: images[].id 1 is used twice; ids must be unique",
    left=GOOD[:2], also=("FILE: annotation 13 has image_id 2, which 'images' does not list",))
add("plain file name twice", ERROR, put("images", 1, "file_name", "a.png"), left=GOOD[:2],
    message="FILE: images[].file_name a.png is used twice; join the annotations of the two records")
add("plain category id twice", ERROR, put("categories", 1, "id", 3), left=GOOD[1:],
    message="FILE: categories[].id 3 is used twice; ids must be unique", also=UNNAMED)
add("plain class name twice", ERROR, put("categories", 1, "name", "dog"), left=GOOD[1:],
    message="FILE: categories[].name dog is used twice; rename one, or give both one id")
for what, value in {"null": None, "a list": ["cat"], "true": True, "empty": ""}.items():
    add(f"plain class name {what}", ERROR, put("categories", 1, "name", value), left=GOOD[1:],
        message=f"FILE: categories[1] (id 1) has name {value!r}; it must be text")
add("plain annotation id twice", NOTE, put("annotations", 1, "id", 11), annotation=11, counts={AGAIN: 1})
add("plain annotated twice", NOTE,
    lambda tree: tree.train["annotations"].append({**tree.train["annotations"][0], "id": 14}),
    annotation=14, counts={TWICE: 1}, left=[*GOOD[:2], GOOD[0], GOOD[2]])
OTHER = "VAL: its categories (id and name) differ from those of FILE; all splits must list the same"
add("plain other classes in val", ERROR, lambda tree: tree.val["categories"].pop(0), OTHER, split="val", left=GOOD)
add("coco2017 renamed class in val", ERROR, lambda tree: tree.val["categories"][0].update(name="Cat"), OTHER,
    split="val", left=GOOD)
add("plain fault in val", ERROR, lambda tree: tree.val["annotations"][0].update(bbox=None), split="val", left=GOOD,
    annotation=21, message="VAL: annotation 21 has bbox None; expected [x, y, width, height] in pixels, ...")
add("plain unknown --classes", ERROR, message="--classes dgo: FILE has no such class; near ones: dog",
    flags=lambda tree: {"classes": ("dgo",)})
add("explicit two files of the same images", ERROR,
    after=lambda tree: shutil.copy(tree.file, tree.folder / "more.json"),
    message="SET/more.json: lists a.png, as does FILE; join its objects in one file",
    flags=lambda tree: {"train_annotations": (tree.file, tree.folder / "more.json")})

# COCO: boxes, areas, crowds, sizes

BOX = "; expected [x, y, width, height] in pixels, finite, no side negative"
BAD_BOXES: dict[str, Any] = {
    "negative width": [8, 6, -16, 12], "negative height": [8, 6, 16, -0.5], "infinite": [8, float("-inf"), 16, 12],
    "beyond all images": [8, 6, 1e300, 12], "of three": [8, 6, 16], "of five": [8, 6, 16, 12, 1], "text": "8 6 16 12",
    "of texts": ["8", "6", "16", "12"], "null": None, "of null": [8, 6, None, 12], "true": True, "empty": [],
    "of true": [True, 6, 16, 12], "an object": {"x": 8, "y": 6}, "nested": [[8, 6, 16, 12]],
}
for what, value in BAD_BOXES.items():
    add(f"plain box {what}", ERROR, put("annotations", 0, "bbox", value),
        f"FILE: annotation 11 has bbox {value!r}{BOX}", annotation=11, left=GOOD[1:])
MENDED_BOXES = {
    "without area": ([8, 6, 0, 0], {SMALL: 1}),
    "outside": ([70, 6, 16, 12], {SMALL: 1, CLIPPED: 1}),
    "over the edges": ([-5, -5, 80, 60], {CLIPPED: 1}),
    "in shares, one": ([0.1, 0.2, 0.3, 0.4], {SMALL: 1}),
}
for what, (box, counts) in MENDED_BOXES.items():
    add(f"plain box {what}", REPAIRED, put("annotations", 0, "bbox", box), annotation=11, counts=counts,
        left=[("a", "cat", box), *GOOD[1:]])
SHARES = "all its boxes lie within 1 pixel: they look like shares of the image's sides; boxes are in pixels"


def in_shares(tree: CocoTree) -> None:
    """All boxes in shares of the images' sides."""
    for record in tree.train["annotations"]:
        record["bbox"] = (np.array(record["bbox"]) / (WIDTH, HEIGHT, WIDTH, HEIGHT)).tolist()


def as_corners(tree: CocoTree) -> None:
    """Ten boxes as (x1, y1, x2, y2)."""
    boxes = [[20 + number, 25, 50 + number, 40] for number in range(10)]
    tree.train["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes]


add("coco2017 boxes in shares", ERROR, in_shares, f"FILE: {SHARES}")
add("roboflow boxes as corners", ERROR, as_corners,
    "FILE: its boxes look like [x1, y1, x2, y2]: most leave their images as [x, y, width, height], none as corners; "
    "rewrite them, or for a hub data set give --bbox-format voc")
BAD_AREAS: dict[str, Any] = {
    "negative": -192,
    "null": None, "text": "192", "true": True, "NaN": float("nan"), "1e400": 1e400, "401 digits": 10**400,
}
for what, value in BAD_AREAS.items():
    add(f"plain area {what}", REPAIRED, put("annotations", 0, "area", value), annotation=11, counts={AREA: 1})
add("plain no area", REPAIRED, cut("annotations", 0, "area"), annotation=11, counts={AREA: 1})
for what, value in {"2": 2, "text": "0", "a half": 0.5, "NaN": float("nan"), "a list": [0]}.items():
    add(f"plain iscrowd {what}", ERROR, put("annotations", 0, "iscrowd", value), annotation=11, left=GOOD[1:],
        message=f"FILE: annotation 11 has iscrowd {value!r}; expected 0 or 1")
for what, value in {"true": True, "null": None}.items():
    add(f"plain iscrowd {what}", FINE, put("annotations", 0, "iscrowd", value))
BAD_HEIGHTS = {"0": 0, "-1": -1, "text": "48", "a fraction": 48.5, "null": None, "2**31": 2**31, "true": True}
for what, value in BAD_HEIGHTS.items():
    add(f"plain height {what}", REPAIRED, put("images", 0, "height", value), counts={SIZES: 1})
add("plain no width", REPAIRED, cut("images", 0, "width"), counts={SIZES: 1})
add("plain height of another image", UNREADABLE, put("images", 0, "height", 50),
    "IMAGES/a.png: is 64x48 pixels, but its annotation says 64x50; put the image in place that was annotated, or ...")
add("plain sides swapped", UNREADABLE, lambda tree: tree.train["images"][0].update(height=WIDTH, width=HEIGHT),
    "IMAGES/a.png: is 64x48 pixels, but its annotation says 48x64; put the image in place that was annotated, or ...")

# COCO: outlines

NO_OUTLINE = "has a 'segmentation' that is neither polygons [[x1, y1, x2, y2, ...], ...] nor COCO run lengths"
FAR = f"it has a corner far outside of its image of {WIDTH}x{HEIGHT} pixels"
COUNTED = f"its counts do not sum to the {WIDTH * HEIGHT} pixels of its size"
PACKED = runs()["counts"]
OF_SIZE = {"size": [HEIGHT, WIDTH]}
SUM = "its counts do not sum to the pixels of its size"
BAD_OUTLINES: dict[str, tuple[Any, str]] = {
    "with an x too many": ([[24, 12, 40, 12, 40, 36, 24]], "it has an x without a y"),
    "not nested": (SQUARE[0], "..."),
    "of points": ([[[24, 12], [40, 12], [40, 36]]], "it has a coordinate that is no number"),
    "a text": ("24,12,40,12,40,36", "it has a coordinate that is no number"),
    "of texts": (["24 12 40 12 40 36"], "it has a coordinate that is no number"),
    "of NaN": ([[24, 12, 40, 12, 40, float("nan")]], "it has a coordinate that is not finite"),
    "of 401 digits": ([[24, 12, 40, 12, 40, 10**400]], "int too large to convert to float"),
    "far away": ([[24, 12, 1e9, 12, 40, 36]], FAR),
    "far above": ([[24, 12, 40, -5000, 40, 36]], FAR),
    "a number": (5, "..."),
    "true": (True, "..."),
    "an empty object": ({}, "..."),
    "run lengths turned": (runs(WIDTH, HEIGHT), "its size [64, 48] is not the image's [48, 64]"),
    "run lengths of a smaller image": (runs(40, 50), "its size [40, 50] is not the image's [48, 64]"),
    "run lengths without size": ({"counts": PACKED}, "..."),
    "run lengths of size null": ({"counts": PACKED, "size": None}, "..."),
    "run lengths of size 1e400": ({"counts": PACKED, "size": [1e400, 1]}, "..."),
    "run lengths of nonsense": ({"counts": "hello world", **OF_SIZE}, SUM),
    "run lengths not ASCII": ({"counts": "\u00e9\u00e9", **OF_SIZE}, SUM),
    "run lengths cut short": ({"counts": PACKED[:-1], **OF_SIZE}, SUM),
    "run lengths cut in the middle": ({"counts": PACKED[:-4], **OF_SIZE}, SUM),
    "run lengths empty": ({"counts": "", **OF_SIZE}, SUM),
    "counts negative": ({"counts": [-5, WIDTH * HEIGHT + 5], **OF_SIZE}, COUNTED),
    "counts too few": ({"counts": [5, 10], **OF_SIZE}, COUNTED),
    "counts too many": ({"counts": [5, WIDTH * HEIGHT], **OF_SIZE}, COUNTED),
    "counts of fractions": ({"counts": [5.5, WIDTH * HEIGHT - 5.5], **OF_SIZE}, SUM),
    "counts of texts": ({"counts": ["5"], **OF_SIZE}, "..."),
    "counts null": ({"counts": None, **OF_SIZE}, "..."),
    "counts of 30 digits": ({"counts": [10**30], **OF_SIZE}, COUNTED),
}
for what, (value, reason) in BAD_OUTLINES.items():
    end = "" if reason == "..." else ")"
    add(f"plain outline {what}", ERROR, put("annotations", 1, "segmentation", value), annotation=12,
        message=f"FILE: annotation 12 {NO_OUTLINE} ({reason}{end}", left=[GOOD[0], GOOD[2]])
LINE_ONLY = [24, 12, 40, 36]
for what, value in {"of two corners": [LINE_ONLY], "partly of two": [LINE_ONLY, *SQUARE], "empty part": [[]]}.items():
    add(f"plain outline {what}", REPAIRED, put("annotations", 1, "segmentation", value), annotation=12,
        counts={PARTS: 1})
for what, value in {"null": None, "empty": [], "counted": {"counts": [500, 40, 2532], **OF_SIZE}}.items():
    add(f"plain outline {what}", FINE, put("annotations", 1, "segmentation", value))

# COCO: names of image files, and the files

LIES = "it must lie in the image folder: give it relative to that, without '..'"
GONE = "listed in FILE but not there (1 of 2 images are missing); check the image folder"
LONG, LONGER = "x" * 300 + ".png", "x" * 5000
for what, value in {"above": "../secret.jpg", "outside": "../../secret.jpg", "aside": "x/../../../secret.jpg",
                    "absolute": "/etc/hostname"}.items():
    add(f"plain name {what}", ERROR, put("images", 0, "file_name", value), left=GOOD[2:],
        message=f"FILE: images[0] (id 1) has file_name {value!r}; {LIES}")
add("roboflow name outside", ERROR, put("images", 0, "file_name", "../../secret.jpg"), left=GOOD[2:],
    message=f"FILE: images[0] (id 1) has file_name '../../secret.jpg'; {LIES}")
for what, value in {"null": None, "a number": 5, "a list": ["a.png"], "empty": ""}.items():
    add(f"plain name {what}", ERROR, put("images", 0, "file_name", value), left=GOOD[2:],
        message=f"FILE: images[0] (id 1) has file_name {value!r}; {LIES}")
add("plain name with NUL", ERROR, put("images", 0, "file_name", "a.png\0"), left=GOOD[2:],
    message="FILE: images[0] (id 1) has file_name 'a.png\\x00'; ...")
MISSING_NAMES = {
    "of no file": "c.png", "with other case": "A.PNG", "long": LONG, "longer": LONGER, "half a character": "\ud800.png",
    "a drive's": "C:\\pictures\\a.png", "with backslashes": "sub\\a.png",
}
for what, value in MISSING_NAMES.items():
    add(f"plain name {what}", ERROR, put("images", 0, "file_name", value), f"IMAGES/{value}: {GONE}", left=GOOD[2:])
    add(f"coco2017 name {what}, no size", ERROR, left=GOOD[2:], message=f"IMAGES/{value}: {GONE}",
        spoil=all_of(put("images", 0, "file_name", value), cut("images", 0, "height")))


def into_a_folder(tree: CocoTree) -> None:
    """The file is there, under a name with another slash."""
    (tree.images / "sub").mkdir()
    (tree.images / "a.png").rename(tree.images / "sub/a.png")
    tree.train["images"][0]["file_name"] = "sub\\a.png"


add("plain name with backslashes for slashes", ERROR, into_a_folder, left=GOOD[2:],
    message="IMAGES/sub\\a.png: listed in FILE but not there (1 of 2 images are missing); write its name with / in "
    "place of \\")
add("plain image missing", ERROR, lambda tree: tree.drop("images/a.png"), f"IMAGES/a.png: {GONE}", left=GOOD[2:])
add("roboflow all images missing", ERROR, lambda tree: [tree.drop(f"train/{name}.png") for name in "ab"],
    message="IMAGES/a.png: listed in FILE but not there (2 of 2 images are missing); check the image folder",
    also=("IMAGES/b.png: listed in FILE but not there (2 of 2 images are missing); check the image folder",))
add("plain image a folder", ERROR, folder("images/a.png"), f"IMAGES/a.png: {GONE}", left=GOOD[2:])
add("plain image a link to itself", ERROR, loop("images/a.png"), f"IMAGES/a.png: {GONE}", left=GOOD[2:])
add("plain folder in itself", FINE, all_of(lambda tree: (tree.images / "again").symlink_to(tree.images),
    put("images", 0, "file_name", "again/again/again/a.png")))
NO_IMAGE = "is no JPEG, PNG, WebP, TIFF, BMP or GIF image, or its header is damaged; ..."
EMPTY = "is empty; replace or convert it, or leave it out"
TOO_LARGE = "has 60000x60000 = 3600000000 pixels, more than the ..."
BAD_IMAGES = {
    "empty": (b"", EMPTY), "a web page": (b"<html>404</html>", NO_IMAGE), "zeros": (bytes(1000), NO_IMAGE),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_IMAGE), "a bomb": (BOMB, TOO_LARGE),
    "a header": (PICTURE[:20], "cannot be read as an image (Truncated File Read); replace the file or leave it out"),
}
CUT = "cannot be read as an image (image file is truncated); replace the file or leave it out"
for what, (value, reason) in BAD_IMAGES.items():
    add(f"plain image {what}", UNREADABLE, file("images/a.png", value), f"IMAGES/a.png: {reason}")
    add(f"plain image {what}, no size", ERROR, all_of(file("images/a.png", value), cut("images", 0, "width")),
        f"FILE: image 1 states no width and height, and IMAGES/a.png: {reason}", left=GOOD[2:])
add("plain image cut short", UNREADABLE, file("images/a.png", PICTURE[:2000]), f"IMAGES/a.png: {CUT}")
add("plain image of another format", FINE, file("images/a.png", picture(format="JPEG")))
add("plain image turned, annotated as stored", FINE, file("images/a.png", turned()))
UPRIGHT = all_of(file("images/a.png", turned()), put("images", 0, "height", WIDTH), put("images", 0, "width", HEIGHT))
add("plain image turned, annotated upright", FINE, UPRIGHT)
add("plain image turned, annotated upright, exif ignored", UNREADABLE, UPRIGHT, flags=lambda tree: {"exif": "ignore"},
    message="IMAGES/a.png: is 64x48 pixels, but its annotation says 48x64, as it is once its EXIF ...")

# YOLO: label lines

LINE = "SET/labels/train/a.txt:1: "
FIELDS = "expected 'class x_center y_center width height', or a class and 3 or more points 'x y' of a polygon"
NO_NUMBER = f"has a field that is no number (could not convert string to float: {{!r}}); {FIELDS}"
NOT_FINITE = "has a number that is not finite; annotate the object anew, or remove the line"
PIXELS = "expected shares from 0 to 1: divide by the image's width and height"
BAD_LINES = {
    "class too high": ("2 .5 .5 .5 .5", "has the class 2; expected a whole number from 0 to 1, as in 'names'"),
    "class -1": ("-1 .5 .5 .5 .5", "has the class -1; expected a whole number from 0 to 1, as in 'names'"),
    "class between": ("0.5 .5 .5 .5 .5", "has the class 0.5; expected a whole number from 0 to 1, as in 'names'"),
    "class name": ("cat .5 .5 .5 .5", NO_NUMBER.format("cat")),
    "pixels": ("0 32 24 16 12", f"has 32, {PIXELS}"),
    "four numbers": ("0 .5 .5 .5", f"has 4 fields; {FIELDS}"),
    "six numbers": ("0 .5 .5 .5 .5 .9", f"has 6 fields; {FIELDS}"),
    "polygon with an x too many": ("0 .1 .1 .9 .1 .9 .9 .5", f"has 8 fields; {FIELDS}"),
    "commas between": ("0,.5,.5,.5,.5", f"has 1 fields; {FIELDS}"),
    "decimal commas": ("0 0,5 0,5 0,5 0,5", NO_NUMBER.format("0,5")),
    "header": ("class x y w h\n0 .5 .5 .5 .5", NO_NUMBER.format("class")),
    "NUL": ("0 .5 .5\0 .5 .5", NO_NUMBER.format(".5\0")),
    "NaN": ("0 nan .5 .5 .5", NOT_FINITE),
    "1e400": ("0 .5 .5 1e400 .5", NOT_FINITE),
    "5,000 digits": ("9" * 5000 + " .5 .5 .5 .5", NOT_FINITE),
    "negative width": ("0 .5 .5 -.5 .5", "has the negative width or height -0.5; write it without sign"),
}
for what, (value, reason) in BAD_LINES.items():
    left = [("a", "cat", [16, 12, 32, 24]), GOOD[2]] if what == "header" else GOOD[2:]
    add(f"yolo {what}", ERROR, file("labels/train/a.txt", value), LINE + reason, left=left)
NO_TEXT = "cannot be read as UTF-8 text ('utf-8' codec can't decode byte {} in position {}: ..."
for what, content, reason in (
    ("UTF-16", "0 .5 .5 .5 .5".encode("utf-16"), NO_TEXT.format("0xff", 0)),
    ("Latin-1", b"0 .5 .5 .5 .5 \xe4", NO_TEXT.format("0xe4", 14)),
):
    add(f"yolo {what}", ERROR, file("labels/train/a.txt", content), f"SET/labels/train/a.txt: {reason}", left=GOOD[2:])
add("yolo label a folder", ERROR, folder("labels/train/a.txt"), left=GOOD[2:],
    message="SET/labels/train/a.txt: cannot be read as UTF-8 text ([Errno 21] Is a directory: ...")
add("yolo label a link to itself", ERROR, loop("labels/train/a.txt"), left=GOOD[2:],
    message="SET/labels/train/a.txt: cannot be read as UTF-8 text ([Errno 40] Too many levels of symbolic links: ...")
WHOLE_A = ("a", "cat", [16, 12, 32, 24])
MENDED_LINES: dict[str, tuple[str, dict[str, int], list[Object]]] = {
    "without area": ("0 .5 .5 0 0", {SMALL: 1}, [("a", "cat", [32, 24, 0, 0])]),
    "over the edge": ("0 1 .5 .5 .5", {CLIPPED: 1}, [("a", "cat", [48, 12, 32, 24])]),
    "line twice": ("0 .5 .5 .5 .5\n0 .5 .5 .5 .5", {"label lines that repeat one left out": 1}, [WHOLE_A]),
}
for what, (value, counts, found) in MENDED_LINES.items():
    add(f"yolo {what}", REPAIRED, file("labels/train/a.txt", value), counts=counts, left=[*found, GOOD[2]])
FINE_LINES: dict[str, tuple[str, list[Object]]] = {
    "byte order mark": ("\ufeff0 .5 .5 .5 .5", [WHOLE_A]),
    "class with a point": ("0.0 .5 .5 .5 .5", [WHOLE_A]),
    "polygon": ("0 .25 .25 .75 .25 .75 .75", [WHOLE_A]),
    "line ends of Windows": ("0 .5 .5 .5 .5\r\n\r\n", [WHOLE_A]),
    "empty": ("", []),
    "blank": (" \n\n\t", []),
}
for what, (value, found) in FINE_LINES.items():
    add(f"yolo {what}", FINE, file("labels/train/a.txt", value), left=[*found, GOOD[2]])
add("yolo no label file", FINE, lambda tree: tree.drop("labels/train/a.txt"), left=GOOD[2:])
add("yolo no label files", NOTE, lambda tree: tree.drop("labels/train"), left=[], counts={"no label files": 1})

# YOLO: data.yaml and images

NAMES = "needs 'names', a list of the classes or a mapping {index: name}"
ELSEWHERE = "its 'train' {!r} is no folder and no .txt file in SET; write a path relative to it"
BAD_YAMLS = {
    "no names": ("train: images/train", NAMES),
    "names a text": ("names: cat\ntrain: images/train", NAMES),
    "name twice": ("names: [cat, cat]\ntrain: images/train",
                   "its 'names' has 'cat' 2 times; give every class a name of its own"),
    "names with a gap": ("names: {0: cat, 2: dog}\ntrain: images/train",
                         "its 'names' must number its 2 classes from 0 without gaps; found '2'"),
    "another nc": ("nc: 3\nnames: [cat, dog]\ntrain: images/train",
                   "its 'nc' is '3', but 'names' lists 2 classes; correct one of them"),
    "keypoints": ("names: [cat, dog]\ntrain: images/train\nkpt_shape: [17, 3]",
                  "has 'kpt_shape': its labels hold keypoints, which are not supported; export boxes or polygons"),
    "a list": ("- cat", "must hold a mapping with the keys 'names', 'train' and 'val'"),
    "no file of YAML": ("names: [cat", "cannot be read as YAML (while parsing a flow sequence ..."),
    "yaml of Latin-1": (b"names: [c\xe4t]\ntrain: images/train",
                        "cannot be read as YAML (unacceptable character #x00e4: ..."),
    "deep yaml": ("names: " + 500 * "[", "cannot be read as YAML (maximum recursion depth exceeded..."),
}
for what, (content, reason) in BAD_YAMLS.items():
    add(f"yolo {what}", ERROR, file("data.yaml", content), f"SET/data.yaml: {reason}")
BAD_PATHS = {
    "absent": "images/trane", "outside": "/etc", "above": "../../etc", "one up": "../",
    "with backslashes": "images\\train", "on the net": "https://x.org/a.zip",
}
for what, value in BAD_PATHS.items():
    add(f"yolo train {what}", ERROR, file("data.yaml", f"names: [cat, dog]\ntrain: {value}\nval: images/val\n"),
        f"SET/data.yaml: {ELSEWHERE.format(value)}")
add("yolo path above", ERROR, file("data.yaml", "path: ../\nnames: [cat, dog]\ntrain: images/train"),
    message="SET/data.yaml: its 'path' '../' lies outside of SET, where nothing is read; remove the line")
add("yolo path ignored", NOTE, counts={"path ignored": 1},
    spoil=file("data.yaml", "path: /datasets/mine\nnames: [cat, dog]\ntrain: images/train\nval: images/val\n"))
add("yolo yaml with byte order mark", FINE,
    file("data.yaml", "\ufeffnames: [cat, dog]\ntrain: images/train\nval: images/val"))
add("yolo yaml with a command", FINE, file("data.yaml", "names: [cat, dog]\ntrain: images/train\nval: images/val\n"
    "download: !!python/object/apply:os._exit [1]"))


def listed(*lines: str) -> Callable[[Tree], None]:
    """train is a list of images."""
    yaml = "names: [cat, dog]\ntrain: train.txt\nval: images/val\n"
    return all_of(file("data.yaml", yaml), file("train.txt", "\n".join(lines)))


NO_FILE = "SET/train.txt:1: lists {!r}, which is no file in SET; write paths relative to SET"
for what, value in {"outside": "../secret.jpg", "absolute": "/etc/hostname", "absent": "images/train/c.png",
                    "with NUL": "images/train/b.png\0", "longer": LONGER}.items():
    add(f"yolo listed image {what}", ERROR, listed(value, "images/train/b.png"), NO_FILE.format(value), left=GOOD[2:])
add("yolo listed image twice", REPAIRED, listed("images/train/b.png", "./images/train/b.png"),
    counts={"images listed again left out": 1}, left=GOOD[2:])
for what, (value, reason) in BAD_IMAGES.items():
    add(f"yolo image {what}", ERROR, file("images/train/a.png", value), f"SET/images/train/a.png: {reason}",
        left=GOOD[2:])
add("yolo image cut short", UNREADABLE, file("images/train/a.png", PICTURE[:2000]), f"SET/images/train/a.png: {CUT}")
add("yolo image a link to itself", ERROR, loop("images/train/a.png"), left=GOOD[2:],
    message="SET/images/train/a.png: cannot be read as an image (Too many levels of symbolic links); ...")
add("yolo folder in itself", FINE, lambda tree: (tree.folder / "images/train/again").symlink_to(tree.folder / "images"))
add("yolo folder with an image's name", FINE, file("images/train/c.png/notes", "no image"))

# Pascal VOC

FIRST = "SET/Annotations/a.xml: object 1 "
ABOUT = "xmin and ymin must be the smaller ones"
NO_BOX = "has no <xmin> in a <bndbox>; annotate it with a box, or remove it"
BAD_OBJECTS = {
    "corners swapped": (voc_object(corners=(24, 18, 9, 7)), f"has the corners (24, 18) and (9, 7); {ABOUT}"),
    "NaN": (voc_object(corners=("nan", 7, 24, 18)), "has the <xmin> 'nan'; expected a number of pixels"),
    "text": (voc_object(corners=(9, "top", 24, 18)), "has the <ymin> 'top'; expected a number of pixels"),
    "decimal comma": (voc_object(corners=(9, 7, "24,5", 18)), "has the <xmax> '24,5'; expected a number of pixels"),
    "1e400": (voc_object(corners=(9, 7, 24, "1e400")), "has the <ymax> '1e400'; expected a number of pixels"),
    "width and height": (voc_object().replace("xmin", "x"), NO_BOX),
    "5,000 digits": (voc_object(corners=(9, 7, 24, "9" * 5000)),
                     f"has the <ymax> '{'9' * 59}; expected a number of pixels"),
    "shares": (voc_object(corners=(0.125, 0.125, 0.375, 0.375)),
               "has corners within 1 pixel, which look like shares of the image's sides; write pixels"),
    "no box": ("<object><name>cat</name></object>", NO_BOX),
    "no name": ("<object/>", "has no <name>; write its class there"),
    "blank name": (voc_object(" "), "has no <name>; write its class there"),
    "difficult 2": (voc_object(more="<difficult>2</difficult>"), "has <difficult> '2'; expected 0 or 1"),
}
for what, (value, reason) in BAD_OBJECTS.items():
    add(f"voc {what}", ERROR, file("Annotations/a.xml", voc_file("a.png", value, SECOND)), FIRST + reason,
        left=GOOD[1:])
ENTITIES = "".join(f'<!ENTITY e{n} "{10 * f"&e{n - 1};"}">' for n in range(1, 10))
DOCTYPE = "it declares a document type; remove the line <!DOCTYPE ...>"
BAD_XMLS: dict[str, tuple[str | bytes, str]] = {
    "billion laughs": (f'<!DOCTYPE x [<!ENTITY e0 "ha">{ENTITIES}]><annotation>&e9;</annotation>', DOCTYPE),
    "file read by an entity": ('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
                               DOCTYPE),
    "tags left open": ("<annotation>\n<filename>a.png", "no element found: line 2, column 15"),
    "tags crossed": ("<annotation></object>", "mismatched tag: line 1, column 14"),
    "empty": ("", "no element found: line 1, column 0"),
    "bare ampersand": (voc_file("a.png", voc_object("cat & dog")), "not well-formed (invalid token): line 1, ..."),
    "Latin-1": (voc_file("a.png", voc_object("\xe4")).encode("latin-1"), "not well-formed (invalid token): line 1..."),
    "JSON": ("{}", "not well-formed (invalid token): line 1, column 0"),
    "two documents": (2 * voc_file("a.png"), "junk after document element: line 1, ..."),
    "deep": (10**4 * "<annotation>", "..."),
}
for what, (content, reason) in BAD_XMLS.items():
    end = "" if reason.endswith("...") else "); mend it, or save it anew in UTF-8"
    add(f"voc {what}", ERROR, file("Annotations/a.xml", content), left=GOOD[2:],
        message=f"SET/Annotations/a.xml: cannot be read as XML ({reason}{end}")
add("voc another document", ERROR, file("Annotations/a.xml", "<html/>"), left=GOOD[2:],
    message="SET/Annotations/a.xml: is no VOC annotation: its outermost element is <html>, not <annotation>")
for what, value in {"of text": "wide", "negative": "-64", "of fractions": "64.5", "of 10 digits": "1234567890"}.items():
    size = SIZE.replace("64", value)
    add(f"voc size {what}", ERROR, file("Annotations/a.xml", voc_file("a.png", voc_object(), size=size)), left=GOOD[2:],
        message=f"SET/Annotations/a.xml: its <size> is {value} x 48; expected whole numbers of pixels, or 0")
for what, size in {"none": "", "0": "<size><width>0</width><height>0</height></size>"}.items():
    spoil = file("Annotations/a.xml", voc_file("a.png", voc_object(), SECOND, size=size))
    add(f"voc size {what}", REPAIRED, spoil, counts={SIZES: 1})
add("voc size of another image", UNREADABLE,
    message="SET/JPEGImages/a.png: is 64x48 pixels, but its annotation says 64x50; ...",
    spoil=file("Annotations/a.xml", voc_file("a.png", voc_object(), SECOND, size=SIZE.replace("48", "50"))))
FINE_XMLS = {
    "byte order mark": ("\ufeff" + voc_file("a.png", voc_object(), SECOND)).encode(),
    "UTF-16": voc_file("a.png", voc_object(), SECOND).encode("utf-16"),
    "file name of another set": voc_file("000001.jpg", voc_object(), SECOND).encode(),
}
for what, content in FINE_XMLS.items():
    add(f"voc {what}", FINE, file("Annotations/a.xml", content))
PATHS = {"outside": "../../secret.jpg", "absolute": "/etc/passwd", "on a drive": "C:\\pictures\\a.png"}
for what, value in PATHS.items():
    spoil = file("Annotations/a.xml", voc_file(value, voc_object(), SECOND))
    add(f"voc file name {what}", NOTE, spoil, counts={"filename is a path": 1})
add("voc file name of another", ERROR, file("Annotations/a.xml", voc_file("b.png", voc_object())),
    left=[("b", "cat", BOXES[0])],
    message="SET/Annotations/b.xml: is of the image b.png, as is SET/Annotations/a.xml; correct its ...")
add("voc box over the edges", REPAIRED, counts={CLIPPED: 1}, left=[("a", "cat", [-6, -6, 86, 66]), GOOD[2]],
    spoil=file("Annotations/a.xml", voc_file("a.png", voc_object(corners=(-5, -5, 80, 60)))))
add("voc XML missing", ERROR, lambda tree: tree.drop("Annotations/a.xml"), left=GOOD[2:],
    message="SET/ImageSets/Main/train.txt:1: lists 'a', but SET/Annotations has no a.xml; add it or remove the line")
add("voc XML a link to itself", ERROR, loop("Annotations/a.xml"), left=GOOD[2:],
    message="SET/Annotations/a.xml: cannot be read as XML ([Errno 40] Too many levels of symbolic links: ...")
add("voc image missing", ERROR, lambda tree: tree.drop("JPEGImages/a.png"), left=GOOD[2:],
    message="SET/Annotations/a.xml: its <filename> 'a.png' is not in SET/JPEGImages, and no a.jpg or the like ...")
add("voc image a folder", ERROR, folder("JPEGImages/a.png"), left=GOOD[2:],
    message=f"SET/JPEGImages/a.png: {GONE.replace('FILE', 'SET (train)')}")
add("voc image empty", UNREADABLE, file("JPEGImages/a.png", b""), f"SET/JPEGImages/a.png: {EMPTY}")
add("voc image a bomb", UNREADABLE, file("JPEGImages/a.png", BOMB), f"SET/JPEGImages/a.png: {TOO_LARGE}")
add("voc name listed twice", ERROR, file("ImageSets/Main/train.txt", "b\na\nb\n"), left=GOOD,
    message="SET/ImageSets/Main/train.txt:3: lists 'b' again, after line 1; remove one")
add("voc name listed outside", ERROR, file("ImageSets/Main/train.txt", "../../secret\nb\n"), left=GOOD[2:],
    message="SET/ImageSets/Main/train.txt:1: lists '../../secret', but SET/Annotations has no ...")
add("voc list empty", ERROR, file("ImageSets/Main/train.txt", "\n"),
    message="SET/ImageSets/Main/train.txt: lists no images; write a name without suffix on each line")

# Hugging Face: image folders with metadata.jsonl

LIBRARY = "cannot be loaded by the datasets library"


def objects(row: int, **fields: Any) -> Callable[[HubTree], None]:
    """Other fields of a row's objects."""
    return lambda tree: tree.rows[row]["objects"].update(fields)


def one_value(row: int, name: str, number: int, one: Any) -> Callable[[HubTree], None]:
    """Another value of one object."""
    return lambda tree: tree.rows[row]["objects"][name].__setitem__(number, one)


def every(**fields: Any) -> Callable[[HubTree], None]:
    """Other fields of all rows' objects, each value again and again."""

    def change(tree: HubTree) -> None:
        for row in tree.rows:
            count = len(row["objects"]["category"])
            row["objects"].update({name: [one] * count for name, one in fields.items()})

    return change


add("metadata good", FINE)
add("metadata absent file", ERROR, lambda tree: tree.drop("train/a.png"), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and its file SET/train/a.png: No such file or directory")
LEADING_OUT = {"outside": "../../secret.jpg", "absolute": "/etc/hostname", "of a URL": "file:///etc/hostname"}
for what, name in LEADING_OUT.items():
    add(f"metadata name {what}", ERROR, lambda tree, name=name: tree.rows[0].update(file_name=name),
        f"--data SET: {LIBRARY} (ValueError: Invalid metadata file_name '{name}': `file_name` must be ...")
add("metadata name null", ERROR, lambda tree: tree.rows[0].update(file_name=None), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and there is no image")
add("metadata name twice", ERROR, lambda tree: tree.rows[0].update(file_name="b.png"),
    "FILE:2: names 'b.png' again, after line 1; join their objects on one line")
add("metadata name longer", ERROR, lambda tree: tree.rows[0].update(file_name=LONGER), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and its file SET/train/xxxxx...")
add("metadata no names", ERROR, lambda tree: [row.pop("file_name") for row in tree.rows],
    f"--data SET: {LIBRARY} (ValueError: `file_name`, ...")
add("metadata no images", ERROR, lambda tree: [tree.drop(f"train/{name}.png") for name in "ab"],
    "--data SET: has no image column (its columns are objects, file_name); put the images beside the file that ...")
add("metadata no objects", ERROR, lambda tree: [row.pop("objects") for row in tree.rows],
    "--data SET: has no column 'objects' with 'bbox' and 'category' (its columns are image)")
add("metadata objects a text", ERROR, lambda tree: [row.update(objects="x") for row in tree.rows],
    "--data SET: its 'objects' lack 'bbox'; they have nothing")
add("metadata objects null", FINE, lambda tree: tree.rows[0].update(objects=None), left=GOOD[2:])
add("metadata too few classes", ERROR, objects(0, category=["cat"]), annotation=2, left=[GOOD[0], GOOD[2]],
    message="SET (train): annotations[1] (id 2) has category_id None; it must be a whole number")
add("metadata too few boxes", ERROR, objects(0, bbox=BOXES[:1]), annotation=2, left=[GOOD[0], GOOD[2]],
    message=f"SET (train): annotation 2 has bbox None{BOX}")
NULL = "has a list that begins with null, which is not read as such; leave that object out"
add("metadata class null, first", ERROR, one_value(0, "category", 0, None), f"FILE:1: {NULL}")
add("metadata box null, first", ERROR, one_value(1, "bbox", 0, None), f"FILE:2: {NULL}")
add("metadata class null, second", ERROR, one_value(0, "category", 1, None), annotation=2, left=[GOOD[0], GOOD[2]],
    message="SET (train): annotations[1] (id 2) has category_id None; it must be a whole number")
add("metadata classes of numbers, one -1", ERROR, annotation=1,
    spoil=all_of(every(category=0), one_value(0, "category", 0, -1)),
    message="SET (train): annotation 1 has category_id -1, which 'categories' does not list",
    left=[("a", "0", BOXES[1]), ("b", "0", BOXES[2])])
for what, one, kind in (("fractions", 0.5, "float64"), ("true", True, "bool")):
    add(f"metadata classes of {what}", ERROR, every(category=one),
        f"--data SET: 'objects.category' is of the type Value('{kind}'); classes are whole numbers or names")
add("metadata classes in lists", ERROR, every(category=["cat"]), "--data SET: 'objects.category' is of the type ...")
add("metadata classes blank", ERROR, every(category=" "),
    "--data SET: 'objects.category' has no class in any row: whole numbers from 0 on, or names")
add("metadata classes mixed", ERROR, one_value(0, "category", 0, 5),
    f"--data SET: {LIBRARY} (ArrowInvalid: JSON parse error: ...")
add("metadata box of three", ERROR, one_value(0, "bbox", 0, [8, 6, 16]),
    f"SET (train): annotation 1 has bbox [8, 6, 16]{BOX}",
    annotation=1, left=GOOD[1:])
add("metadata boxes in shares", ERROR, every(bbox=[0.1, 0.2, 0.3, 0.4]), f"SET (train): {SHARES}")
add("metadata image id twice", ERROR, lambda tree: [row.update(image_id=5) for row in tree.rows],
    "SET (train): images[].id 5 is used twice; ids must be unique", left=[*GOOD[:2], ("a", "dog", BOXES[2])])
add("metadata size of another image", UNREADABLE, lambda tree: [row.update(width=64, height=50) for row in tree.rows],
    "SET (train): row 0, a.png: is 64x48 pixels, but its annotation says 64x50; put the image in place ...")
BAD_METADATA: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty file": (lambda s: "\n", ": is empty; write an object for each image, on a line of its own"),
    "cut short": (lambda s: s[: s.index("\n") + 20], ":2: is no JSON object (..."),
    "Latin-1": (lambda s: s.replace("cat", "c\xe4t").encode("latin-1"),
    ":1: is no JSON object ('utf-8' codec can't ..."),
    "UTF-16": (lambda s: s.encode("utf-16"), ":1: is no JSON object ('utf-8' codec can't decode byte 0xff in ..."),
    "array": (lambda s: f"[{s.strip().replace(chr(10), ',')}]", ":1: is no JSON object (it is something else); ..."),
    "deep nesting": (lambda s: '{"x": ' + "[" * 100_000, ":1: is no JSON object (maximum recursion depth exceeded ..."),
}
for what, (change, reason) in BAD_METADATA.items():
    add(f"metadata {what}", ERROR, text(change), f"FILE{reason}")
add("metadata byte order mark", FINE, text(lambda s: s.encode("utf-8-sig")))
add("metadata blank lines", FINE, text(lambda s: s.replace("\n", "\r\n\r\n")))
add("metadata NaN", ERROR, swap("[[8, 6", "[[NaN, 6"),
    f"SET (train): annotation 1 has bbox [nan, 6.0, 16.0, 12.0]{BOX}",
    annotation=1, left=GOOD[1:])
add("metadata 1e400", ERROR, swap("[[8, 6", "[[1e400, 6"),
    f"--data SET: {LIBRARY} (ArrowInvalid: JSON parse error: ...")
add("metadata image empty", ERROR, file("train/a.png", b""), left=GOOD[2:],
    message=f"SET (train): image 1 states no width and height, and row 0, a.png: {EMPTY}")
add("metadata image cut short", UNREADABLE, file("train/a.png", PICTURE[:2000]), f"SET (train): row 0, a.png: {CUT}")
add("metadata image a folder", ERROR, folder("train/a.png"), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and its file SET/train/a.png: Is a directory")
add("metadata folder in itself", FINE, lambda tree: (tree.folder / "train/again").symlink_to(tree.folder / "train"))


def through_a_link(tree: Tree) -> Json:
    """The set's folder under another name."""
    (tree.folder.parent / "link").symlink_to(tree.folder)
    return {"data": tree.folder.parent / "link"}


add("metadata through a link", FINE, flags=through_a_link)
README = "---\nconfigs:\n- config_name: default\n  data_files: ../{}\n---\n"
add("metadata README names files outside", ERROR, file("README.md", README.format("secret.jpg")),
    "SET/README.md: names the file SET/../secret.jpg, which does not lie in SET; nothing else is read: remove it there")

# Hugging Face: parquet files and save_to_disk


def cell(content: bytes | None, path: str | None = None) -> Callable[[ParquetTree], None]:
    """Another image in the first row; `path` may begin with ROOT or SET."""

    def change(tree: ParquetTree) -> None:
        place = None if path is None else path.replace("SET", "ROOT/set").replace("ROOT", str(tree.folder.parent))
        tree.rows[0]["image"] = None if content is None and path is None else {"bytes": content, "path": place}

    return change


def columns(**more: Any) -> Callable[[ParquetTree], None]:
    """Other columns, or none of that name."""

    def change(tree: ParquetTree) -> None:
        kept = {**tree.features, **more}
        tree.features = datasets.Features({name: kind for name, kind in kept.items() if kind is not None})

    return change


NO_SIZE = "SET (train): image 1 states no width and height, and "
NOT_IN = "its file {} does not lie in the data set; store the images' bytes there"
for kind in ("parquet", "saved"):
    add(f"{kind} good", FINE)
    add(f"{kind} no image column", ERROR, columns(image=None),
        "--data SET: has no image column (its columns are objects); cast one to Image()")
    add(f"{kind} no objects column", ERROR, columns(objects=None),
        "--data SET: has no column 'objects' with 'bbox' and 'category' (its columns are image)")
    add(f"{kind} image null", ERROR, cell(None), NO_SIZE + "there is no image", left=GOOD[2:])
    add(f"{kind} image no image", ERROR, cell(b"xx", "a.png"), f"{NO_SIZE}row 0, a.png: {NO_IMAGE}", left=GOOD[2:])
    add(f"{kind} image cut short", UNREADABLE, cell(PICTURE[:2000], "a.png"), f"SET (train): row 0, a.png: {CUT}")
    add(f"{kind} class -1", ERROR, one_value(0, "category", 0, -1), annotation=1, left=GOOD[1:],
        message="SET (train): annotation 1 has category_id -1, which 'categories' does not list")
    add(f"{kind} class too high", ERROR, one_value(0, "category", 0, 2), annotation=1, left=GOOD[1:],
        message="SET (train): annotation 1 has category_id 2, which 'categories' does not list")
    add(f"{kind} class null", ERROR, one_value(0, "category", 0, None), annotation=1, left=GOOD[1:],
        message="SET (train): annotations[0] (id 1) has category_id None; it must be a whole number")
    add(f"{kind} box null", ERROR, one_value(0, "bbox", 0, None), f"SET (train): annotation 1 has bbox None{BOX}",
        annotation=1, left=GOOD[1:])
    add(f"{kind} box of three", ERROR, one_value(0, "bbox", 0, [8, 6, 16]), annotation=1, left=GOOD[1:],
        message=f"SET (train): annotation 1 has bbox [8.0, 6.0, 16.0]{BOX}")
    add(f"{kind} box negative", ERROR, one_value(0, "bbox", 0, [8, 6, -16, 12]), annotation=1, left=GOOD[1:],
        message=f"SET (train): annotation 1 has bbox [8.0, 6.0, -16.0, 12.0]{BOX}")
    add(f"{kind} lists of unequal length", ERROR, objects(0, category=[0]), annotation=2, left=[GOOD[0], GOOD[2]],
        message="SET (train): annotations[1] (id 2) has category_id None; it must be a whole number")
for what, path in {"outside": "ROOT/secret.jpg", "above": "SET/../secret.jpg", "relative": "a.png",
                   "on the net": "http://127.0.0.1:9/a.png"}.items():
    add(f"parquet image file {what}", ERROR, cell(None, path), NO_SIZE + NOT_IN.format(path), left=GOOD[2:])
NUMBERS = features(datasets.Value("int64"))
add("parquet class -1, not named", ERROR, annotation=1, left=[("a", "1", BOXES[1]), ("b", "1", BOXES[2])],
    spoil=all_of(one_value(0, "category", 0, -1), lambda tree: setattr(tree, "features", NUMBERS)),
    message="SET (train): annotation 1 has category_id -1, which 'categories' does not list")
MAGIC = "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."
SAVE = "mend it, or save the set anew"
PIECE = "train-00000-of-00001.parquet"
add("parquet no parquet", ERROR, after=file(PIECE, "PAR1 nonsense"),
    message=f"FILE: {LIBRARY} (ArrowInvalid: {MAGIC}); {SAVE}")
add("parquet empty file", ERROR, after=file(PIECE, ""),
    message=f"FILE: {LIBRARY} (ArrowInvalid: Parquet file size is 0 bytes); {SAVE}")
add("parquet cut short", ERROR, after=lambda tree: tree.put(PIECE, (tree.folder / PIECE).read_bytes()[:-500]),
    message=f"FILE: {LIBRARY} (ArrowInvalid: {MAGIC}); {SAVE}")
add("parquet other columns in a second file", ERROR,
    after=lambda tree: parquet.write_table(pa.table({"x": [1]}), tree.folder / "train-00001-of-00002.parquet"),
    message=f"--data SET: {LIBRARY} (CastError: Couldn't cast x: int64 ...")
add("saved no split of training", ERROR, lambda tree: setattr(tree, "split", "holiday"),
    "--data SET: has the splits holiday, and none called train or validation")
ARROW = "data-00000-of-00001.arrow"
add("saved no arrow", ERROR, after=file(f"train/{ARROW}", "nonsense"),
    message=f"--data SET: {LIBRARY} (ArrowInvalid: ...")
add("saved cut short", ERROR,
    after=lambda tree: tree.put(f"train/{ARROW}", (tree.folder / "train" / ARROW).read_bytes()[:3000]),
    message=f"--data SET: {LIBRARY} (OSError: Expected to be able to read ...")
add("saved arrow missing", ERROR, after=lambda tree: tree.drop(f"train/{ARROW}"),
    message=f"--data SET: {LIBRARY} (FileNotFoundError: [Errno 2] No such file or directory: 'SET/train/{ARROW}...")
add("saved state no JSON", ERROR, after=file("train/state.json", "{"),
    message=f"--data SET: {LIBRARY} (JSONDecodeError: ...")
add("saved split missing", ERROR, after=file("dataset_dict.json", '{"splits": ["train", "test"]}'),
    message=f"--data SET: {LIBRARY} (FileNotFoundError: No such files: 'SET/test/dataset_info.json', nor ...")


def arrow_outside(tree: Tree) -> None:
    """The rows lie beside the set's folder, where state.json says they are."""
    (tree.folder / "train" / ARROW).rename(tree.folder.parent / "rows.arrow")
    state = (tree.folder / "train/state.json").read_text()
    tree.put("train/state.json", state.replace(ARROW, "../../rows.arrow"))


add("saved rows outside", ERROR, after=arrow_outside,
    message="SET/train/state.json: names the file ROOT/rows.arrow, which does not lie in SET; ...")
