"""The table of a large annotation file, kept on disk between runs and mapped into memory.

A cached table is a safetensors file: the arrays, and as metadata which annotation file it was made from, and checksums.
It is read once to compare those, a fraction of a second; all processes of a machine share the same pages of memory.
"""

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from direct_pt.data.annotations import SIZES_FROM_FILES, AnnotationTable
from direct_pt.data.cache_files import ForeignFile, checksum, open_own
from direct_pt.data.outlines import Segmentations
from direct_pt.errors import printable
from direct_pt.files import parse_json

VERSION = 5  # of the cache's format; caches of other versions are not read
MIN_BYTES = 8 * 2**20  # smaller annotation files are read in less than a second, and not cached
ABOUT = "about"  # the key of the file's metadata: the table's origin and what is no array, as JSON
CHECKSUM = "checksum"  # the key of that text's checksum; in it, that of the arrays' checksums by name
CHUNK_BYTES = 1 << 20
TYPES = {"BOOL": "?", "U8": "u1", "I32": "i4", "I64": "i8", "F64": "f8"}  # safetensors' names, numpy's
# The arrays' types and shapes: N images, M objects, P polygons, K corners, R bytes of run lengths, W bytes a file name.
ROWS = {
    "file_names": "u1 N W",
    "image_ids": "i8 N",
    "sizes": "i4 N 2",
    "starts": "i8 N+1",
    "boxes": "f8 M 4",
    "labels": "i8 M",
    "areas": "f8 M",
    "crowd": "? M",
    "annotation_ids": "i8 M",
}
OUTLINES = {
    "coordinates": "f8 K 2",
    "polygon_starts": "i8 P+1",
    "object_polygons": "i8 M+1",
    "run_lengths": "u1 R",
    "run_length_starts": "i8 M+1",
}
LENGTHS = {"starts": "M", "polygon_starts": "K", "object_polygons": "P", "run_length_starts": "R"}  # what starts end at
Json = dict[str, Any]


def cache_root() -> Path:
    """The folder of all caches: $DIRECT_PT_CACHE, else direct_pt in $XDG_CACHE_HOME, else ~/.cache/direct_pt."""
    if named := os.environ.get("DIRECT_PT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "direct_pt"


def cached_table(annotations: Path, images: Path, read: Callable[[], AnnotationTable]) -> AnnotationTable:
    """The table of an annotation file, from the cache if that holds it.

    A cache that cannot be used or written only costs time and one line on stderr.

    Args:
        annotations: the file, which exists.
        images: the folder of its images.
        read: reads the table from the file; its exceptions pass through.
    """
    made_from = _identity(annotations, images)  # before reading, so that a change in the meantime is noticed
    if made_from["size"] < MIN_BYTES:
        return read()
    file, problem = None, ""
    try:
        key = hashlib.sha256(f"{made_from['annotations']}\n{made_from['images']}".encode(errors="surrogatepass"))
        name = f"{Path(made_from['annotations']).stem[:50]}-{key.hexdigest()[:16]}.safetensors"
        file = cache_root() / "annotations" / name
        return _load(file, made_from, annotations, images)
    except (FileNotFoundError, NotADirectoryError, _Outdated):
        pass
    except ForeignFile as error:
        problem, file = f"the cached annotations are not used: {error}; reading {annotations} instead", None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory
        problem = f"the cached annotations cannot be used ({error}); reading {annotations} instead"
    table = read()
    if file is not None and SIZES_FROM_FILES not in table.repairs:  # sizes may change without the annotation file
        try:
            _save(table, file, made_from)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error  # without the name of the temporary file
            problem = f"the annotations cannot be cached ({reason}); every start will read {annotations}"
        else:
            with suppress(OSError, ValueError, _Outdated):
                table = _load(file, made_from, annotations, images)  # frees the memory of the table that was read
    if problem:
        print(printable(f"warning: {file or 'cache'}: {problem}"), file=sys.stderr, flush=True)
    return table


@dataclass
class CachedTable(AnnotationTable):
    """A table whose arrays are mapped from a file, read-only.

    It is pickled as the name of its file, so that spawned worker processes map the same file. Tables made from it by
    dataclasses.replace are pickled as ordinary tables.

    Attributes:
        cache: the file.
        header: the file's header, as bytes.
    """

    cache: Path | None = field(default=None, init=False, repr=False)
    header: bytes = field(default=b"", init=False, repr=False)

    def __getstate__(self) -> Json:
        if self.cache is not None and _read_header(self.cache) == self.header:
            return {name: getattr(self, name) for name in ("cache", "header", "source", "folder", "decoding")}
        return self.__dict__

    def __setstate__(self, state: Json) -> None:
        if "boxes" not in state:
            mapped = _map(state["cache"], state["source"], state["folder"])
            if mapped.header != state["header"]:
                raise OSError(f"{state['cache']}: another process replaced it; start again")
            state = {**vars(mapped), "decoding": state["decoding"]}
        self.__dict__.update(state)


class _Outdated(Exception):
    """The cached table is of an earlier state of the annotation file."""


def _identity(annotations: Path, images: Path) -> Json:
    """The properties of the annotation file that a cached table must agree with."""
    status = annotations.stat()
    return {
        "annotations": str(annotations.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "images": str(images.resolve()),
    }


def _load(file: Path, made_from: Json, annotations: Path, images: Path) -> CachedTable:
    """The table in `file`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no cached table.
        _Outdated: it is of an earlier state of the annotation file.
        ForeignFile: it is a link, or another user's.
        OSError, ValueError: it is damaged, altered, or of another version.
    """
    table = _map(file, str(annotations), images)
    header = parse_json(table.header)
    if parse_json(header["__metadata__"][ABOUT]).get("made_from") != made_from:
        raise _Outdated
    with open_own(file) as stream:
        if stream.read(len(table.header) + 8)[8:] != table.header:
            raise ValueError("another process replaced it")
        _compare_checksums(stream, header)
    return table


def _compare_checksums(stream: IO[bytes], header: Json) -> None:
    """Raise ValueError where the content is not what was written.

    It is not read by way of the mapped memory, which would make each process as large as the file.
    """
    text, start = header["__metadata__"][ABOUT], stream.tell()
    expected = json.loads(text).get("checksums")
    if header["__metadata__"].get(CHECKSUM) != str(checksum(text.encode())) or not isinstance(expected, dict):
        raise ValueError("their checksum does not fit: the file was altered, or is damaged")
    for name in (*ROWS, *OUTLINES):
        first, last = header[name]["data_offsets"]
        stream.seek(start + first)
        chunks = (stream.read(min(CHUNK_BYTES, last - place)) for place in range(first, last, CHUNK_BYTES))
        if _checksum_of(chunks) != expected.get(name):
            raise ValueError(f"the checksum of {name} does not fit: the file was altered, or is damaged")


def _checksum_of(chunks: Iterable[bytes | np.ndarray]) -> int:
    """The checksum of an array in pieces of CHUNK_BYTES."""
    return functools.reduce(lambda before, chunk: checksum(chunk, before), chunks, 0)


def _map(file: Path, source: str, images: Path) -> CachedTable:
    """The table in `file`, of whatever state of the annotation file. Raises OSError or ValueError."""
    with open_own(file) as stream:
        content = np.memmap(stream, np.uint8, mode="r").view(np.ndarray)  # slicing a memmap is slow
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    try:
        header = parse_json(content[8:start].tobytes())
        about = parse_json(header["__metadata__"][ABOUT])
        if about["version"] != VERSION:
            raise ValueError(f"they are of version {about['version']}, this program's is {VERSION}")
        arrays: Json = {}
        for name in (*ROWS, *OUTLINES):
            first, last = header[name]["data_offsets"]
            if not 0 <= first <= last <= len(content) - start:
                raise ValueError(f"{name} lies outside of the file")
            values = content[start + first : start + last].view(TYPES[header[name]["dtype"]])
            arrays[name] = values.reshape(header[name]["shape"])
        _check(arrays, len(about["class_names"]))
        if len(about["class_names"]) != len(about["category_ids"]):
            raise ValueError("its classes have other names than ids")
        arrays["file_names"] = arrays["file_names"].view(f"S{arrays['file_names'].shape[1]}")[:, 0]
        table = CachedTable(
            source=source,
            folder=images,
            **{name: arrays[name] for name in ROWS},
            segmentations=Segmentations(**{name: arrays[name] for name in OUTLINES}),
            class_names=tuple(about["class_names"]),
            category_ids=tuple(about["category_ids"]),
            repairs=dict(about["repairs"]),
        )
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is damaged: {error!r}") from error
    table.cache, table.header = file, content[8:start].tobytes()
    return table


def _check(arrays: dict[str, np.ndarray], num_classes: int) -> None:
    """Raise ValueError where an array has another type or shape than it should have, or refers to nothing."""
    counts = {"N": len(arrays["image_ids"]), "M": len(arrays["labels"]), "K": len(arrays["coordinates"])}
    counts |= {
        "P": len(arrays["polygon_starts"]) - 1,
        "R": len(arrays["run_lengths"]),
        "W": arrays["file_names"].shape[1],
    }
    for name, layout in (ROWS | OUTLINES).items():
        dtype, *sides = layout.split()
        shape = [int(side) if side.isdigit() else counts[side[0]] + side.count("+") for side in sides]
        found = arrays[name]
        if (found.dtype, list(found.shape)) != (dtype, shape):
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)} in place of {np.dtype(dtype)} {shape}")
    for name, of in LENGTHS.items():
        starts = arrays[name]
        if starts[0] != 0 or starts[-1] != counts[of] or (np.diff(starts) < 0).any():
            raise ValueError(f"{name} does not rise from 0 to {counts[of]}")
    labels = arrays["labels"]
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"labels of other classes than the {num_classes} named")
    if (arrays["sizes"] < 1).any():
        raise ValueError("sizes of images without pixels")
    if not (np.isfinite(arrays["boxes"]).all() and np.isfinite(arrays["areas"]).all()):
        raise ValueError("boxes or areas that are not finite")
    names = arrays["file_names"].view(f"S{counts['W']}")[:, 0]
    if (arrays["file_names"][:, 0] == ord("/")).any() or any(b".." in name.split(b"/") for name in _with_dots(names)):
        raise ValueError("file_names that leave the folder of the images")


def _with_dots(names: np.ndarray) -> list[bytes]:
    return names[np.char.find(names, b"..") >= 0].tolist()


def _chunks(values: np.ndarray) -> Iterable[np.ndarray]:
    content = values.reshape(-1).view(np.uint8)
    return (content[place : place + CHUNK_BYTES] for place in range(0, len(content), CHUNK_BYTES))


def _save(table: AnnotationTable, file: Path, made_from: Json) -> None:
    """Replace the file as a whole; processes that have mapped the old one keep it. Raises OSError, SafetensorError."""
    arrays = {name: np.ascontiguousarray(getattr(table, name)) for name in ROWS}
    arrays |= {name: np.ascontiguousarray(getattr(table.segmentations, name)) for name in OUTLINES}
    arrays["file_names"] = arrays["file_names"][:, None].view(np.uint8)
    about = {
        "version": VERSION,
        "made_from": made_from,
        "class_names": list(table.class_names),
        "category_ids": list(table.category_ids),
        "repairs": table.repairs,
        "checksums": {name: _checksum_of(_chunks(values)) for name, values in arrays.items()},
    }
    text = json.dumps(about)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{file.name}.", dir=file.parent, ignore_cleanup_errors=True) as beside:
        temporary = Path(beside, file.name)
        save_file(arrays, temporary, {ABOUT: text, CHECKSUM: str(checksum(text.encode()))})
        temporary.replace(file)


def _read_header(file: Path) -> bytes:
    """The header of the file as it is now; empty if it cannot be read."""
    try:
        with open_own(file) as stream:
            return stream.read(min(int.from_bytes(stream.read(8), "little"), os.fstat(stream.fileno()).st_size))
    except OSError:
        return b""
