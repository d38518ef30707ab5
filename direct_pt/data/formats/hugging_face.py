"""Data sets of the Hugging Face `datasets` library: off the hub, or a folder (imagefolder, parquet, save_to_disk)."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from direct_pt.data.formats.hub_rows import ROWS, Layout, find_layout
from direct_pt.data.problems import DataError, Problems
from direct_pt.data.records import Chunk
from direct_pt.errors import InputError

NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}  # what splits are called
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
LOCAL = (*SAVED, "metadata.jsonl", "*/metadata.jsonl", "*.parquet", "*/*.parquet")  # what tells a folder of a data set
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"


class ArrowImages:
    """The images of a data set, by row."""

    def __init__(self, rows: datasets.Dataset, column: str, root: Path | None) -> None:
        """`rows` have an undecoded image `column`; files that it names are read in `root` alone."""
        self.rows = rows
        self.column = column
        self.root = root

    @property
    def fingerprint(self) -> str:
        """The library's: another one for other rows."""
        return str(self.rows._fingerprint)

    def content(self, row: int) -> bytes:
        """What a file of the image would hold. Raises OSError."""
        return image_bytes(self.rows[int(row)][self.column], self.root)

    def select(self, rows: np.ndarray) -> "ArrowImages":
        """Only those of some rows."""
        return ArrowImages(self.rows.select(rows), self.column, self.root)


def image_bytes(cell: dict[str, Any] | None, root: Path | None) -> bytes:
    """The encoded image of an undecoded cell of an image column. Raises OSError."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise OSError("there is no image")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    path = Path(os.path.normpath(cell["path"]))
    if root is None or not path.is_relative_to(root):
        raise OSError(f"its file {cell['path']!s:.200} does not lie in the data set; store the images' bytes there")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise OSError(f"its file {cell['path']!s:.200}: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True)
class ArrowSplit:
    """One split, read by rows.

    Attributes:
        rows: with undecoded images.
        layout: of their columns.
        source: for messages.
        root: that image files lie in, where the images are files.
        folder: of none.
    """

    rows: datasets.Dataset
    layout: Layout
    source: str
    root: Path | None
    folder: Path = Path()

    annotation_file = None

    @property
    def encoded(self) -> ArrowImages:
        """The images."""
        return ArrowImages(self.rows.select_columns([self.layout.image]), self.layout.image, self.root)

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """As in COCO files."""
        yield "categories", 0, self.layout.category_records()
        first, first_object = 0, 0
        for key in ("images", "annotations"):
            yield key, 0, []
        for rows in self.rows.with_format("arrow").iter(ROWS):
            images, annotations = self.layout.records(rows, first, first_object + 1)
            yield "images", first, images
            yield "annotations", first_object, annotations
            first, first_object = first + len(images), first_object + len(annotations)


def find_hugging_face(data: Path, bbox_format: str, streaming: bool = False) -> dict[str, ArrowSplit] | None:
    """The splits of a local folder or of a data set on the hub; None where it is none.

    Args:
        data: the folder or name.
        bbox_format: "coco" or "voc".
        streaming: leave out the training split, and read the others into memory; nothing is kept on the disk.

    Raises:
        InputError: it cannot be loaded, or has not the columns of a detection set.
    """
    found = load_splits(data, streaming)
    if not found:
        return None
    if streaming:
        found = {split: _in_memory(rows) for split, rows in found.items() if split != "train"}
        if not found:
            return {}
    layout = find_layout(next(iter(found.values())).features, str(data), bbox_format, found.values())
    undecoded = datasets.Image(decode=False)
    return {
        split: ArrowSplit(rows.cast_column(layout.image, undecoded), layout, f"{data} ({split})", image_root(data))
        for split, rows in found.items()
    }


def _in_memory(rows: Any) -> datasets.Dataset:
    if isinstance(rows, datasets.Dataset):  # of save_to_disk
        return rows
    pieces = list(rows.with_format("arrow").iter(ROWS))
    return datasets.Dataset(pa.concat_tables(pieces)) if pieces else datasets.Dataset.from_dict({})


def image_root(data: Path) -> Path | None:
    """The folder that image files of a local set lie in, without links, as the library names them."""
    return data.resolve() if data.exists() else None


def load_splits(data: Path, streaming: bool = False) -> dict[str, Any]:
    """The library's data sets by our names of the splits; nothing where `data` is no name and no folder of one.

    Raises:
        InputError: it cannot be loaded.
    """
    local = data.is_dir() and any(next(data.glob(pattern), None) for pattern in LOCAL)
    if not local and (data.exists() or not re.fullmatch(HUB_NAME, str(data))):
        return {}
    try:
        with _quiet():
            loaded = _load_folder(data, streaming) if local else datasets.load_dataset(str(data), streaming=streaming)
    except InputError:
        raise
    except Exception as error:  # the library has no base class for what its readers raise
        if not local:
            what = "no such folder, and the hub gives no such data set"
            raise InputError(f"--data {data}: {what} ({_root_cause(error)})") from error
        what = f"cannot be loaded by the datasets library ({_root_cause(error)})"
        raise InputError(f"{damaged_file(data) or f'--data {data}'}: {what}; mend it, or save the set anew") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    ours = {split: [loaded[name] for name in names if name in loaded] for split, names in NAMES.items()}
    if not any(ours.values()):
        raise InputError(f"--data {data}: has the splits {', '.join(loaded)}, and none called train or validation")
    return {split: found[0] for split, found in ours.items() if found}


def _load_folder(data: Path, streaming: bool) -> Any:
    """The library's data sets of a local folder, in which all their files lie. Raises InputError, and what it likes."""
    if any((data / name).is_file() for name in SAVED):
        loaded = datasets.load_from_disk(str(data))
        for split, rows in loaded.items() if isinstance(loaded, dict) else [("", loaded)]:
            _require_inside(data, (file["filename"] for file in rows.cache_files), f"{split}/state.json".lstrip("/"))
        return loaded
    for path in sorted(data.rglob("metadata.jsonl")):
        _check_metadata(path)
    files = datasets.load_dataset_builder(str(data)).config.data_files or {}
    _require_inside(data, chain.from_iterable(files.values()), "README.md")
    return datasets.load_dataset(str(data), streaming=streaming)


def _require_inside(data: Path, files: Iterable[str], named_by: str) -> None:
    roots = Path(os.path.abspath(data)), data.resolve()  # noqa: PTH100  # the library follows the folder's own link
    for file in files:
        path = Path(os.path.abspath(file))  # noqa: PTH100
        if not any(path.is_relative_to(root) for root in roots):
            text = f"names the file {file}, which does not lie in {data}; nothing else is read: remove it there"
            raise DataError("path", data / named_by, text)


def _check_metadata(path: Path) -> None:
    """Look through a metadata.jsonl, of whose faults the library does not say where they are, or nothing.

    A list that begins with null gets the values of other rows from it (pyarrow's JSON reader leaves out the null).

    Raises:
        DataError: naming the line.
    """
    lines: dict[str, int] = {}  # of each image
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
                if not isinstance(record, dict):
                    raise ValueError("it is something else")
            except (ValueError, RecursionError) as error:
                text = f"is no JSON object ({error}); write one for each image, on a line of its own, in UTF-8"
                raise DataError("JSON", f"{path}:{number}", text) from error
            if re.search(rb"\[\s*null", line) and _begins_with_null(record):
                text = "has a list that begins with null, which is not read as such; leave that object out"
                raise DataError("null", f"{path}:{number}", text)
            name = str(record.get("file_name") or number)
            if lines.setdefault(name, number) < number:
                text = f"names {name!r:.200} again, after line {lines[name]}; join their objects on one line"
                raise DataError("duplicate image", f"{path}:{number}", text, name)
    if not lines:
        raise DataError("no images", path, "is empty; write an object for each image, on a line of its own")


def _begins_with_null(value: Any) -> bool:
    """Whether that is, or holds, a list whose first element is null."""
    if isinstance(value, dict):
        return any(map(_begins_with_null, value.values()))
    return isinstance(value, list) and bool(value) and (value[0] is None or any(map(_begins_with_null, value)))


def damaged_file(data: Path) -> Path | None:
    """The first parquet file that is none: the library's errors do not name it."""
    for path in sorted(data.rglob("*.parquet")):
        try:
            parquet.read_metadata(path)
        except (pa.ArrowException, OSError):
            return path
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """The library logs the errors that it raises, too."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
