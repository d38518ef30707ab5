"""Data sets of the Hugging Face `datasets` library: from the hub, or a folder (imagefolder, parquet, save_to_disk)."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.data_files import DataFilesPatternsDict
from pyarrow import parquet

from direct_pt.data.formats.hub_folder import check_named_files, without_network
from direct_pt.data.formats.hub_rows import ROWS_PER_READ, Layout, find_layouts
from direct_pt.data.names import is_no_data, require_readable
from direct_pt.data.problems import NOTE, DataError, Problem, Problems
from direct_pt.data.records import Chunk
from direct_pt.errors import InputError, printable
from direct_pt.files import open_regular, parse_json, read_regular
from direct_pt.images.decoding import blamed

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}
SAVED = ("dataset_dict.json", "state.json")  # files that save_to_disk writes
LOCAL = (*SAVED, "metadata.jsonl", "*/metadata.jsonl", "*.parquet", "*/*.parquet")  # mark the folder of a data set
INDEX_FILES = (*SAVED, "metadata.jsonl")  # each belongs to a split, as every parquet file does
OPENED = (".parquet", ".jsonl", ".json", ".arrow", ".md", ".csv")  # what the library opens by itself
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
        raise OSError("there is no image; leave the row out")
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    path = Path(os.path.normpath(cell["path"]))
    if root is None or not path.is_relative_to(root):
        raise OSError(f"its file {cell['path']!s:.200} does not lie in the data set; store the images' bytes there")
    try:
        return read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(blamed(error), "strerror", None) or error
        raise OSError(f"its file {cell['path']!s:.200}: {reason}; put the image there, or leave its row out") from error


@dataclass(frozen=True)
class ArrowSplit:
    """One split: see Source.

    Attributes:
        rows: the rows, with undecoded images.
        layout: of their columns.
        source: name in messages.
        root: the folder that image files must lie in.
        notes: on what of the data set is not used.
        folder: not used, because the images are not files of their own.
    """

    rows: datasets.Dataset
    layout: Layout
    source: str
    root: Path | None
    notes: tuple[Problem, ...] = ()
    folder: Path = Path()

    annotation_file = None
    owns_folder = False
    paths_read = ()  # the library finds the files

    @property
    def encoded(self) -> ArrowImages:
        """The images."""
        return ArrowImages(self.rows.select_columns([self.layout.image]), self.layout.image, self.root)

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """The rows as COCO-like records."""
        for note in self.notes:
            problems.add(note)
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
    found, notes, declared = load_splits(data, streaming, subset)
    if not found:
        return None
    for split, rows in found.items():
        if split != "train" and not isinstance(rows, datasets.Dataset):  # save_to_disk's sets are not streamed
            pieces = list(rows.with_format("arrow").iter(ROWS_PER_READ))
            found[split] = datasets.Dataset(pa.concat_tables(pieces)) if pieces else datasets.Dataset.from_dict({})
    layouts = find_layouts(found, str(data), bbox_format, declared)
    if streaming:
        found.pop("train", None)
    splits = {}
    for split, rows in found.items():
        undecoded = rows.cast_column(layouts[split].image, datasets.Image(decode=False))
        splits[split] = ArrowSplit(undecoded, layouts[split], f"{data} ({split})", image_root(data), tuple(notes))
        notes = []  # noted once
    return splits


def image_root(data: Path) -> Path | None:
    """The folder that image files of a local set must lie in, with links resolved, as the library does."""
    return data.resolve() if data.exists() else None


class Loaded(NamedTuple):
    """A data set of the library.

    Attributes:
        splits: its data sets by our names of the splits.
        notes: on what of it is not used.
        declared: the features that a local folder's README.md states.
    """

    splits: dict[str, Any]
    notes: list[Problem]
    declared: datasets.Features | None = None


def holds_saved_rows(data: Path) -> bool:
    """Whether a folder looks like a data set of the library."""
    return data.is_dir() and any(next(data.glob(pattern), None) for pattern in LOCAL)


def load_splits(data: Path, streaming: bool = False, subset: str | None = None) -> Loaded:
    """The splits of a data set; none if `data` is neither a hub name nor the folder of a data set.

    Raises:
        InputError: it cannot be loaded.
    """
    local = holds_saved_rows(data)
    if not local and (data.exists() or not re.fullmatch(HUB_NAME, str(data))):
        return Loaded({}, [])
    notes: list[Problem] = []
    declared = None
    if not local:  # without a network this takes half a minute to fail
        print(printable(f"--data {data}: no such folder, asking the Hugging Face hub"), file=sys.stderr, flush=True)
    try:
        with _quiet():
            if local:
                check_named_files(data)
                with without_network():
                    loaded, notes, declared = _load_folder(data, streaming, subset)
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
    for name in (name for name in loaded if name not in taken):
        text = f"the split {str(name)!r} is not used: rename it to train, validation or test"
        notes.append(Problem(NOTE, "splits that are not used", str(data), text))
    return Loaded({split: rows[0] for split, rows in found.items() if rows}, notes, declared)


def _load_folder(data: Path, streaming: bool, subset: str | None) -> Loaded:
    """A local folder, its splits by the library's names, with all their files inside. Raises InputError and others.

    Each split is loaded alone: together, all would be read with the columns and class numbers of the first.
    """
    require_readable(data, OPENED)
    if any((data / name).is_file() for name in SAVED):
        loaded = datasets.load_from_disk(str(data.absolute()))
        for split, rows in loaded.items() if isinstance(loaded, dict) else [("", loaded)]:
            _require_inside(data, (file["filename"] for file in rows.cache_files), f"{split}/state.json".lstrip("/"))
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        own = [data / name for name in SAVED]
        own += [data / split / SAVED[1] for split in splits] if splits is loaded else []
        notes = _unused_files(data, own, "it is no part of what save_to_disk wrote here; move it elsewhere")
        if subset is not None:
            text = "has no effect: what save_to_disk wrote has no subsets"
            notes.append(Problem(NOTE, "flags without effect", "--subset", text))
        return Loaded(splits, notes)
    for path in sorted(data.rglob("metadata.jsonl")):
        if not any(map(is_no_data, path.relative_to(data).parts)):
            _check_metadata(path)
    if wild := set(PATTERN) & set(os.path.abspath(data)):  # noqa: PTH100
        text = f"the datasets library takes {' '.join(sorted(wild))} in a path for a pattern; rename the folder"
        raise InputError(f"--data {data}: {text}")
    # Not a relative path: the library's own kinds of data, such as "parquet", come before folders of that name.
    builder = datasets.load_dataset_builder(str(data.absolute()), subset)
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
    remedy = "name it train, validation or test, list it under 'configs' in README.md, or remove it"
    subsets = {name: _files_of_subset(one, builder.base_path) for name, one in builder.builder_configs.items()}
    notes = _unused_files(data, chain.from_iterable(subsets.values()), remedy)
    for name in subsets if subset is None else ():
        if name != builder.config.name:
            text = f"the subset {name!r} is not used: --subset chooses it"
            notes.append(Problem(NOTE, "subsets that are not used", str(data), text))
    return Loaded(loaded, notes, builder.info.features)


def _unused_files(data: Path, used: Iterable[Path], remedy: str) -> list[Problem]:
    """Notes on the files of rows that the library puts in no split."""
    known = {os.path.realpath(path) for path in used}
    notes = []
    for folder, below, names in os.walk(data):
        below[:] = sorted(name for name in below if not is_no_data(name))
        for name in sorted(name for name in names if name in INDEX_FILES or name.endswith(".parquet")):
            path = Path(folder, name)
            if not is_no_data(name) and os.path.realpath(path) not in known:
                notes.append(Problem(NOTE, "files that are in no split", str(path), f"is in no split: {remedy}"))
    return notes


def _files_of_subset(config: datasets.BuilderConfig, folder: str) -> Iterator[Path]:
    """The files of one of the configurations in a README.md; none if its patterns find none."""
    files: Any = config.data_files or {}
    with suppress(OSError, ValueError):
        if isinstance(files, DataFilesPatternsDict):  # as written: the library resolves those of the chosen one alone
            files = files.resolve(folder)
        yield from map(Path, chain.from_iterable(files.values()))


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
        if not any(path.is_relative_to(root) for root in roots) or "::" in file:
            text = f"names the file {file}, which does not lie in {data}; nothing else is read: remove it there"
            raise DataError("path", data / named_by, text)


def _check_metadata(path: Path) -> None:
    """Check a metadata.jsonl, because the library's errors name no line, and it reads some faults silently.

    It gives a list that begins with null the values of other rows (pyarrow's JSON reader drops the null).

    Raises:
        DataError: naming the line.
    """
    lines: dict[str, int] = {}  # line of each image
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line.decode("utf-8-sig"))
                if not isinstance(record, dict):
                    raise ValueError("it is something else")
            except ValueError as error:
                text = f"is no JSON object ({error}); write one for each image, on a line of its own, in UTF-8"
                raise DataError("JSON", f"{path}:{number}", text) from error
            if re.search(rb"\[\s*null", line) and _begins_with_null(record):
                text = "has a list that begins with null, which is not read as such; leave that object out"
                raise DataError("null", f"{path}:{number}", text)
            name = os.path.normpath(str(record.get("file_name") or number))
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
