"""COCO annotation files, in the folder layouts of COCO, Roboflow and others."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from direct_pt.data.formats.json_stream import NotAnObject, read_members
from direct_pt.data.names import Folder, split_folders
from direct_pt.data.problems import DataError, Problems
from direct_pt.data.records import Chunk

LAYOUTS = (  # annotation file, folder of its images
    ("annotations/instances_{split}2017.json", "{split}2017"),  # COCO 2017's
    ("annotations/instances_{split}.json", "images"),
)
ROBOFLOW_FILE = "_annotations.coco.json"  # beside the images


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
    """The splits of a folder in the layout of COCO 2017, the plain one, or Roboflow's export; empty if it has none.

    Where splits have folders of their own, each has its annotation file beside its images, or beside their folder: any
    name, if it is the only JSON file there.
    """
    splits, own_folders = {}, split_folders(folder)
    for split in ("train", "val", "test"):
        for annotations, images in LAYOUTS:
            path = folder / annotations.format(split=split)
            if path.is_file():
                splits[split] = CocoSplit(folder / images.format(split=split), path)
                break
        place = own_folders.get(split)
        if split in splits or place is None:
            continue
        files = [name for name in sorted(Folder(place).names) if name.lower().endswith(".json")]
        name = ROBOFLOW_FILE if ROBOFLOW_FILE in files else files[0] if len(files) == 1 else None
        if name is not None:
            splits[split] = CocoSplit(place / "images" if (place / "images").is_dir() else place, place / name)
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
