"""The table of a large annotation file, kept on disk between runs and mapped into memory.

A cached table is a folder: an .npy file per array, and manifest.json, which says from what file it was made and what it
contains. Reading it takes milliseconds, and all processes of a machine share the same pages of memory.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from direct_pt.data.annotations import SIZES_FROM_FILES, AnnotationTable
from direct_pt.data.outlines import Segmentations

VERSION = 2  # of the cache's format; caches of other versions are not read
MIN_BYTES = 8 * 2**20  # smaller annotation files are read in less than a second, and not cached
MANIFEST = "manifest.json"
ROWS = ("file_names", "image_ids", "sizes", "starts", "boxes", "labels", "areas", "crowd", "annotation_ids")
OUTLINES = ("coordinates", "polygon_starts", "object_polygons", "run_lengths", "run_length_starts")
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
    folder, problem = None, ""
    try:
        key = hashlib.sha256(f"{made_from['annotations']}\n{made_from['images']}".encode(errors="surrogatepass"))
        name = f"{Path(made_from['annotations']).stem[:50]}-{key.hexdigest()[:16]}"
        folder = cache_root() / "annotations" / name
        return _load(folder, made_from, annotations, images)
    except (FileNotFoundError, NotADirectoryError, _Outdated):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home directory
        problem = f"the cached annotations cannot be used ({error}); reading {annotations} instead"
    table = read()
    if folder is not None and SIZES_FROM_FILES not in table.repairs:  # sizes may change without the annotation file
        try:
            _save(table, folder, made_from)
        except OSError as error:
            reason = error if error.errno else f"is the disk full? {error}"
            problem = f"the annotations cannot be cached ({reason}); every start will read {annotations}"
        else:
            with suppress(OSError, ValueError, _Outdated):
                table = _load(folder, made_from, annotations, images)  # frees the memory of the table that was read
    if problem:
        print(f"warning: {folder or 'cache'}: {problem}", file=sys.stderr, flush=True)
    return table


@dataclass
class CachedTable(AnnotationTable):
    """A table whose arrays are mapped from files, read-only.

    It is pickled as the name of its folder, so that spawned worker processes map the same files. Tables made from it by
    dataclasses.replace are pickled as ordinary tables.

    Attributes:
        cache: the folder.
        manifest: the content of its manifest.json.
    """

    cache: Path | None = field(default=None, init=False, repr=False)
    manifest: Json = field(default_factory=dict, init=False, repr=False)

    def __getstate__(self) -> Json:
        if self.cache is not None and _has_manifest(self.cache, self.manifest):
            return {name: getattr(self, name) for name in ("cache", "manifest", "source", "folder", "decoding")}
        return self.__dict__

    def __setstate__(self, state: Json) -> None:
        if "boxes" not in state:
            mapped = vars(_map(state["cache"], state["manifest"], state["source"], state["folder"]))
            state = {**mapped, "decoding": state["decoding"]}
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


def _load(folder: Path, made_from: Json, annotations: Path, images: Path) -> CachedTable:
    """The table in `folder`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no cached table.
        _Outdated: it is of an earlier state of the annotation file.
        OSError, ValueError: it is damaged, or of another version.
    """
    manifest = _read_manifest(folder)
    if manifest.get("version") != VERSION:
        raise ValueError(f"they are of version {manifest.get('version')}, this program's is {VERSION}")
    if manifest.get("made_from") != made_from:
        raise _Outdated
    return _map(folder, manifest, str(annotations), images)


def _map(folder: Path, manifest: Json, source: str, images: Path) -> CachedTable:
    """The table in `folder`, whose manifest is known. Raises OSError, ValueError or _Outdated."""
    try:
        arrays: Json = {
            name: _map_array(folder / f"{name}.npy", *manifest["arrays"][name]) for name in (*ROWS, *OUTLINES)
        }
        table = CachedTable(
            source=source,
            folder=images,
            **{name: arrays[name] for name in ROWS},
            segmentations=Segmentations(**{name: arrays[name] for name in OUTLINES}),
            class_names=tuple(manifest["class_names"]),
            category_ids=tuple(manifest["category_ids"]),
            repairs=dict(manifest["repairs"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {error!r}") from error
    if not _has_manifest(folder, manifest):  # another process replaced it while the files were opened
        raise _Outdated
    table.cache, table.manifest = folder, manifest
    return table


def _map_array(path: Path, dtype: str, shape: list[int]) -> np.ndarray:
    """The array in an .npy file, which must be of this type and shape."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if [array.dtype.str, list(array.shape)] != [dtype, shape]:
        raise ValueError(f"{path.name} holds {array.dtype.str} {list(array.shape)} in place of {dtype} {shape}")
    return np.asarray(array)  # the same memory; slicing a memmap is slow


def _save(table: AnnotationTable, folder: Path, made_from: Json) -> None:
    """Write `table` beside `folder`, then rename it, so that `folder` is always complete or absent."""
    arrays = {name: getattr(table, name) for name in ROWS}
    arrays |= {name: getattr(table.segmentations, name) for name in OUTLINES}
    manifest = {
        "version": VERSION,
        "made_from": made_from,
        "arrays": {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()},
        "class_names": list(table.class_names),
        "category_ids": list(table.category_ids),
        "repairs": table.repairs,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array, allow_pickle=False)
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2))
        with suppress(FileNotFoundError):
            folder.rename(old)  # deleted with the temporary folder; processes that have mapped its files keep them
        try:
            new.rename(folder)
        except OSError:
            if not _has_manifest(folder, manifest):  # otherwise another process wrote the same table first
                raise


def _read_manifest(folder: Path) -> Json:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds no object")
    return manifest


def _has_manifest(folder: Path, manifest: Json) -> bool:
    """Whether the folder exists, with this manifest."""
    try:
        return _read_manifest(folder) == manifest
    except (OSError, ValueError):
        return False
