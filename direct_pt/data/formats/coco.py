"""COCO annotation files, in the folder layouts of COCO, Roboflow and others."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from direct_pt.data.formats.json_stream import NotAnObject, read_members
from direct_pt.data.problems import DataError, Problems
from direct_pt.data.records import Chunk

LAYOUTS = (  # annotation file, folder of its images
    ("annotations/instances_{split}2017.json", "{split}2017"),  # COCO 2017's
    ("annotations/instances_{split}.json", "images"),
)
ROBOFLOW_FILE = "_annotations.coco.json"  # beside the images
ROBOFLOW_FOLDERS = {"train": "train", "val": "valid", "test": "test"}


@dataclass(frozen=True)
class CocoSplit:
    """One split: the folder of its images and its annotation file."""

    images: Path
    annotations: Path

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
    def annotation_file(self) -> Path:
        """The annotation file."""
        return self.annotations

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """The file's lists, in pieces. Raises DataError."""
        if not self.annotations.is_file():
            raise DataError("missing file", self.annotations, "no such annotation file")
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
    """The splits of a folder in the layout of COCO 2017, the plain one, or Roboflow's export; empty if it has none."""
    splits = {}
    for split, exported in ROBOFLOW_FOLDERS.items():
        for annotations, images in (*LAYOUTS, (f"{exported}/{ROBOFLOW_FILE}", exported)):
            path = folder / annotations.format(split=split)
            if path.is_file():
                splits[split] = CocoSplit(folder / images.format(split=split), path)
                break
    return splits


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
