"""COCO annotation files, in the folder layouts of COCO, Roboflow and others."""

import gc
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from direct_pt.data.formats.json_stream import NotAnObject, read_members
from direct_pt.data.names import Folder, is_no_folder, split_folders
from direct_pt.data.problems import DataError, Problems
from direct_pt.data.records import Chunk
from direct_pt.files import open_regular, what_is_there

YEARS = ("2017", "")  # after the split in the names of annotation files; COCO 2017's, and the plain ones
IMAGE_FOLDERS = ("{split}{year}", "images/{split}{year}", "images/{split}", "{split}", "images")  # the first is taken
FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
CHUNK_BYTES = 1 << 20
WHOLE_SETS = ("annotations/instances_default.json", "result.json")  # CVAT's and Label Studio's, without splits
ROBOFLOW_FILE = "_annotations.coco.json"  # beside the images


@dataclass(frozen=True)
class CocoSplit:
    """One split: the folder of its images, its annotation file, and whether no other split's images are there."""

    images: Path
    annotations: Path
    owns_folder: bool = field(default=False, compare=False)

    encoded = None

    @property
    def source(self) -> str:
        """The annotation file."""
        return str(self.annotations)

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return self.images

    @property
    def paths_read(self) -> tuple[Path, ...]:
        """The folder of the images and the annotation file."""
        return self.images, self.annotations

    @property
    def annotation_file(self) -> Path:
        """The annotation file."""
        return self.annotations

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """The file's lists, in pieces. Raises DataError."""
        if not self.annotations.is_file():
            there = what_is_there(self.annotations)
            raise DataError("missing file", self.annotations, "no such annotation file" + (there and f" ({there})"))
        if not self.images.is_dir():
            text = f"no such image folder (the images of {self.annotations})"
            raise DataError("missing file", self.images, text)
        with _no_garbage_collection():
            try:
                yield from read_members(self.annotations)
            except NotAnObject as error:
                text = "is no COCO file: expected an object with 'images', 'annotations', 'categories'"
                raise DataError("JSON", self.annotations, text) from error
            except (OSError, ValueError, RecursionError) as error:
                reason = str(error).partition(";")[0]  # the rest is advice for programmers
                text = f"cannot be read as JSON ({reason}); write it anew, in UTF-8"
                raise DataError("JSON", self.annotations, text) from error


def find_coco(folder: Path) -> dict[str, CocoSplit]:
    """The splits of a folder in the layout of COCO 2017, the plain one, or Roboflow's export; empty if it has none.

    Where splits have folders of their own, each has its annotation file beside its images, or beside their folder: any
    name, if it is the only JSON file there. Exports of CVAT and Label Studio without splits are all "train".
    """
    splits, own_folders = {}, split_folders(folder)
    for split in ("train", "val", "test"):
        for year in YEARS:
            path = folder / f"annotations/instances_{split}{year}.json"
            if is_no_folder(path):
                splits[split] = CocoSplit(_image_folder(folder, path, split, year), path)
                break
        place = own_folders.get(split)
        if split in splits or place is None:
            continue
        files = [name for name in sorted(Folder(place).names) if name.lower().endswith(".json")]
        name = ROBOFLOW_FILE if ROBOFLOW_FILE in files else files[0] if len(files) == 1 else None
        if name is not None:
            splits[split] = CocoSplit(place / "images" if (place / "images").is_dir() else place, place / name)
    for whole in (folder / name for name in WHOLE_SETS):
        if not splits and is_no_folder(whole):
            splits["train"] = CocoSplit(_image_folder(folder, whole, "default", ""), whole)
    folders = [split.images for split in splits.values()]
    return {
        split: replace(source, owns_folder=sum(_overlap(source.images, other) for other in folders) == 1)
        for split, source in splits.items()
    }


def find_coco_file(file: Path) -> dict[str, CocoSplit]:
    """The splits of the set that an annotation file is a part of, or, where it is the part of none, itself as "train".

    Its images are then in the folder `images` beside it, or where their names lead from its own folder.
    """
    above = [file.parent, *([file.parent.parent] if file.parent.name != ".." else [])]
    for folder in above:
        splits = find_coco(folder)
        if any(split.annotations.resolve() == file.resolve() for split in splits.values()):
            return splits
    folder = above[-1] if file.parent.name == "annotations" else file.parent
    images = _image_folder(folder, file, "default", "")
    return {"train": CocoSplit(images if images.is_dir() else folder, file)}


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _image_folder(folder: Path, annotations: Path, split: str, year: str) -> Path:
    """The folder of an annotation file's images: the only one of IMAGE_FOLDERS, or that which its first image is in."""
    places = [folder / name.format(split=split, year=year) for name in IMAGE_FOLDERS]
    found = [place for place in dict.fromkeys(places) if place.is_dir()]
    if len(found) > 1 and (name := _first_file_name(annotations)) is not None:
        found = [place for place in found if os.path.isfile(place / name)] or found  # noqa: PTH113 (raises for some names)
    return found[0] if found else places[0 if year else -1]


def _first_file_name(annotations: Path) -> str | None:
    """The first "file_name" in an annotation file; None if it cannot be found there."""
    with suppress(OSError, ValueError), open_regular(annotations) as file:
        text = b""
        while chunk := file.read(CHUNK_BYTES):
            text = text[-CHUNK_BYTES:] + chunk  # a name may lie across two chunks
            if found := FILE_NAME.search(text):
                return str(json.loads(found.group(1)))
    return None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """JSON values contain no reference cycles; searching for cycles takes a third of the reading time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
