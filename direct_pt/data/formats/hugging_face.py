"""Data sets of the Hugging Face `datasets` library: from the hub, or a folder (imagefolder, parquet, save_to_disk)."""

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

from direct_pt.data.formats.hub_rows import ROWS_PER_READ, Layout, find_layouts
from direct_pt.data.names import is_no_data
from direct_pt.data.problems import NOTE, DataError, Problem, Problems
from direct_pt.data.records import Chunk
from direct_pt.errors import InputError

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}
SAVED = ("dataset_dict.json", "state.json")  # files that save_to_disk writes
LOCAL = (*SAVED, "metadata.jsonl", "*/metadata.jsonl", "*.parquet", "*/*.parquet")  # mark the folder of a data set
PATTERN = "*?["
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"


class ArrowImages:
    """The images of a data set, by row: see EncodedImages."""

    def __init__(self, rows: datasets.Dataset, column: str, root: Path | None) -> None:
        """`rows` have an undecoded image `column`; files that it names are read only inside `root`."""
        self.rows = rows
        self.column = column
        self.root = root

    @property
    def fingerprint(self) -> str:
        """The library's fingerprint of the rows."""
        return str(self.rows._fingerprint)

    def content(self, row: int) -> bytes:
        """The encoded image. Raises OSError."""
        return image_bytes(self.rows[int(row)][self.column], self.root)

    def select(self, rows: np.ndarray) -> "ArrowImages":
        """The images of some rows."""
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
    """One split: see Source.

    Attributes:
        rows: the rows, with undecoded images.
        layout: of their columns.
        source: name in messages.
        root: the folder that image files must lie in.
        unused: names of splits that are not used, to be noted.
        folder: not used, because the images are not files of their own.
    """

    rows: datasets.Dataset
    layout: Layout
    source: str
    root: Path | None
    unused: tuple[str, ...] = ()
    folder: Path = Path()

    annotation_file = None
    paths_read = ()  # the library finds the files

    @property
    def encoded(self) -> ArrowImages:
        """The images."""
        return ArrowImages(self.rows.select_columns([self.layout.image]), self.layout.image, self.root)

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """The rows as COCO-like records."""
        for name in self.unused:
            text = f"the split {name!r} is not used: rename it to train, validation or test"
            problems.add(Problem(NOTE, "splits that are not used", self.source, text))
        yield "categories", 0, self.layout.category_records()
        first, first_object = 0, 0
        for key in ("images", "annotations"):
            yield key, 0, []
        for rows in self.rows.with_format("arrow").iter(ROWS_PER_READ):
            images, annotations = self.layout.records(rows, first, first_object + 1)
            yield "images", first, images
            yield "annotations", first_object, annotations
            first, first_object = first + len(images), first_object + len(annotations)


def find_hugging_face(
    data: Path, bbox_format: str, streaming: bool = False, subset: str | None = None
) -> dict[str, ArrowSplit] | None:
    """The splits of a local folder or of a data set on the hub; None if it is neither.

    Args:
        data: the folder or name.
        bbox_format: "coco" or "voc".
        streaming: leave out the training split, and read the others into memory; nothing is kept on the disk.
        subset: which of several; the library calls them configurations.

    Raises:
        InputError: it cannot be loaded, or lacks the columns of a detection set.
    """
    found, unused = load_splits(data, streaming, subset)
    if not found:
        return None
    for split, rows in found.items():
        if split != "train" and not isinstance(rows, datasets.Dataset):  # save_to_disk's sets are not streamed
            pieces = list(rows.with_format("arrow").iter(ROWS_PER_READ))
            found[split] = datasets.Dataset(pa.concat_tables(pieces)) if pieces else datasets.Dataset.from_dict({})
    layouts = find_layouts(found, str(data), bbox_format)
    if streaming:
        found.pop("train", None)
    splits = {}
    for split, rows in found.items():
        undecoded = rows.cast_column(layouts[split].image, datasets.Image(decode=False))
        splits[split] = ArrowSplit(undecoded, layouts[split], f"{data} ({split})", image_root(data), tuple(unused))
        unused = []  # noted once
    return splits


def image_root(data: Path) -> Path | None:
    """The folder that image files of a local set must lie in, with links resolved, as the library does."""
    return data.resolve() if data.exists() else None


def load_splits(data: Path, streaming: bool = False, subset: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The library's data sets by our names of the splits, and the names of other splits.

    Both are empty if `data` is neither a hub name nor the folder of a data set.

    Raises:
        InputError: it cannot be loaded.
    """
    local = data.is_dir() and any(next(data.glob(pattern), None) for pattern in LOCAL)
    if not local and (data.exists() or not re.fullmatch(HUB_NAME, str(data))):
        return {}, []
    try:
        with _quiet():
            if local:
                loaded = _load_folder(data, streaming, subset)
            else:
                loaded = datasets.load_dataset(str(data), subset, streaming=streaming)
    except InputError:
        raise
    except Exception as error:  # the library's errors have no common base class
        if subsets := re.search(r"available configs: \[(.*?)\]|not found\. Available: \[(.*?)\]", str(error)):
            there = ", ".join(re.findall(r"'([^']*)'", "".join(filter(None, subsets.groups()))))
            if subset is not None:
                raise InputError(f"--subset {subset}: --data {data} has none of this name, only {there}") from error
            text = f"has several subsets: choose one with --subset, of {there}"
            raise InputError(f"--data {data}: {text}") from error
        if not local:
            what = "no such folder, and the hub gives no such data set"
            raise InputError(f"--data {data}: {what} ({_root_cause(error)})") from error
        what = f"cannot be loaded by the datasets library ({_root_cause(error)})"
        raise InputError(f"{damaged_file(data) or f'--data {data}'}: {what}; mend it, or save the set anew") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    found = {split: [loaded[name] for name in names if name in loaded] for split, names in SPLIT_NAMES.items()}
    if not any(found.values()):
        raise InputError(f"--data {data}: has the splits {', '.join(loaded)}, and none called train or validation")
    taken = [next(name for name in SPLIT_NAMES[split] if name in loaded) for split, rows in found.items() if rows]
    unused = [str(name) for name in loaded if name not in taken]
    return {split: rows[0] for split, rows in found.items() if rows}, unused


def _load_folder(data: Path, streaming: bool, subset: str | None) -> Any:
    """The library's data sets of a local folder, with all their files inside. Raises InputError and library errors.

    Each split is loaded alone: together, all would be read with the columns and class numbers of the first.
    """
    if any((data / name).is_file() for name in SAVED):
        loaded = datasets.load_from_disk(str(data))
        for split, rows in loaded.items() if isinstance(loaded, dict) else [("", loaded)]:
            _require_inside(data, (file["filename"] for file in rows.cache_files), f"{split}/state.json".lstrip("/"))
        return loaded
    for path in sorted(data.rglob("metadata.jsonl")):
        if not any(map(is_no_data, path.relative_to(data).parts)):
            _check_metadata(path)
    if wild := set(PATTERN) & set(os.path.abspath(data)):  # noqa: PTH100
        text = f"the datasets library takes {' '.join(sorted(wild))} in a path for a pattern; rename the folder"
        raise InputError(f"--data {data}: {text}")
    builder = datasets.load_dataset_builder(str(data), subset)
    files: dict[Any, list[str]] = dict(builder.config.data_files or {})
    _require_inside(data, chain.from_iterable(files.values()), "README.md")
    kind = type(builder).__module__.rpartition(".")[2]
    loaded = {}
    for split, names in files.items():
        escaped = [re.sub("([*?[])", r"[\1]", name) for name in names]
        loaded[str(split)] = datasets.load_dataset(
            kind, data_files={str(split): escaped}, split=str(split), streaming=streaming
        )
        _check_classes(names, loaded[str(split)].features)
    return loaded


def _check_classes(files: Iterable[str], features: datasets.Features | None) -> None:
    """Raise DataError where a parquet file numbers its classes otherwise than the first: the library does not look."""
    for name in files:
        if name.endswith(".parquet") and features is not None:
            try:
                schema = parquet.read_schema(name)
            except (pa.ArrowException, OSError):
                continue  # reported where its rows are read
            own = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
            if any(column in own and own[column] != kind for column, kind in features.items()):
                text = "its columns or classes are not those of the split's first file; save all of the split anew"
                raise DataError("columns", name, text)


def _require_inside(data: Path, files: Iterable[str], named_by: str) -> None:
    roots = Path(os.path.abspath(data)), data.resolve()  # noqa: PTH100  # the library follows the folder's own link
    for file in files:
        path = Path(os.path.abspath(file))  # noqa: PTH100
        if not any(path.is_relative_to(root) for root in roots):
            text = f"names the file {file}, which does not lie in {data}; nothing else is read: remove it there"
            raise DataError("path", data / named_by, text)


def _check_metadata(path: Path) -> None:
    """Check a metadata.jsonl, because the library's errors name no line, and it reads some faults silently.

    It gives a list that begins with null the values of other rows (pyarrow's JSON reader drops the null).

    Raises:
        DataError: naming the line.
    """
    lines: dict[str, int] = {}  # line of each image
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
    """Whether a JSON value is, or contains, a list whose first element is null."""
    if isinstance(value, dict):
        return any(map(_begins_with_null, value.values()))
    return isinstance(value, list) and bool(value) and (value[0] is None or any(map(_begins_with_null, value)))


def damaged_file(data: Path) -> Path | None:
    """The first damaged parquet file: the library's errors do not name it."""
    for path in sorted(data.rglob("*.parquet")):
        try:
            parquet.read_metadata(path)
        except (pa.ArrowException, OSError):
            return path
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """No log messages of the library: it logs the errors that it raises."""
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
