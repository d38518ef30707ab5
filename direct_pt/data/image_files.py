"""The image files that a source's names lead to."""

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from direct_pt.data.annotations import AnnotationTable, decode_name, encode_name
from direct_pt.data.names import Folders, walk_images
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problem, Problems
from direct_pt.files import what_is_there

JOIN = "join the annotations of the two records"


def find_files(folder: Path, names: np.ndarray, source: str, problems: Problems) -> tuple[np.ndarray, np.ndarray]:
    """The names [N] of the image files on the disk, and [N] bool, whether they exist; missing ones are errors.

    A file whose name means the same is taken, once: see normal_name.

    Args:
        folder: the folder that the names are relative to.
        names: [N] bytes.
        source: name of what lists them, for messages.
        problems: gets the repairs and errors.
    """
    folders = Folders(folder)
    # os.path: pathlib takes several times as long for 100,000 files.
    exists = np.array([os.path.isfile(os.path.join(folder, decode_name(name))) for name in names.tolist()], bool)  # noqa: PTH113, PTH118
    absent = [(row, decode_name(names[row])) for row in np.flatnonzero(~exists).tolist()]
    listed = set(plain_paths(names[exists]).tolist()) if absent else set()
    taken: dict[str, str] = {}  # for which name each file of other spelling was taken
    for row, name in list(absent):
        found = folders.find(posixpath.normpath(name))
        if found is None or encode_name(found) in listed or not os.path.isfile(folder / found):  # noqa: PTH113
            continue
        absent.remove((row, name))
        if (other := taken.setdefault(found, name)) != name:
            with problems.caught():
                text = f"lists {other!r} and {name!r}, which both mean {found!r}; {JOIN}, or give each its own file"
                raise DataError("duplicate image", source, text, name)
            continue
        problems.add(Problem(REPAIRED, "images of other spelling taken", source, f"{name} is {found}", name))
        names, exists[row] = _with_name(names, row, encode_name(found)), True
    for _, name in absent:
        remedy = "check the image folder"
        if "\\" in name and os.path.isfile(folder / name.replace("\\", "/")):  # noqa: PTH113
            remedy = "write its name with / in place of \\"
        with problems.caught():
            missing = f"({len(absent)} of {len(names)} images are missing)"
            there = what_is_there(folder / name)
            what = f"but not a file that can be read: {there}" if there else "but not there"
            text = f"listed in {source} {what} {missing}; {remedy}"
            raise DataError("missing image", folder / name, text, name)
    return names, exists


def plain_paths(names: np.ndarray) -> np.ndarray:
    """The names [N] without superfluous "./" and "//"; the same array where there are none."""
    odd = np.flatnonzero((np.char.find(names, b"./") >= 0) | (np.char.find(names, b"//") >= 0))
    if not len(odd):
        return names
    paths = names.copy()
    paths[odd] = [posixpath.normpath(name) for name in names[odd].tolist()]
    return paths


def _with_name(names: np.ndarray, row: int, name: bytes) -> np.ndarray:
    """The names with another one, which may be longer than all."""
    names = names.astype(f"S{max(names.itemsize, len(name))}")
    names[row] = name
    return names


def note_unlisted_images(folder: Path, names: np.ndarray, source: str, problems: Problems) -> None:
    """Note the images in a folder that its annotation file does not list: nothing is learnt from them.

    Args:
        folder: of this file's images alone.
        names: [N] bytes, those that are listed, relative to it.
        source: the annotation file.
        problems: gets the notes.
    """
    listed = set(plain_paths(names).tolist())
    for path in walk_images(folder, problems):
        name = path.relative_to(folder).as_posix()
        if encode_name(name) not in listed:
            text = f"is left out: {source} does not list it; an image without objects must be listed too"
            problems.add(Problem(NOTE, "images that are not listed", str(path), text, name))


def note_shared_images(tables: Mapping[str, AnnotationTable], problems: Problems) -> None:
    """Note the images of other splits that "train" has too: the AP on them is not that on new images."""
    train = tables.get("train")
    for split, table in tables.items():
        if train is None or table is train or table.encoded is not None or train.encoded is not None:
            continue
        folders = [os.path.realpath(one.folder) for one in (train, table)]
        common = os.path.commonpath(folders)
        if common not in folders:
            continue  # as usual: each split has a folder of its own
        names = [
            one.file_names
            if own == common
            else np.char.add(encode_name(f"{os.path.relpath(own, common)}/"), one.file_names)
            for one, own in zip((train, table), folders, strict=True)
        ]
        shared = table.file_names[np.isin(names[1], names[0])]
        for name in map(decode_name, shared.tolist()):
            text = f"is in train too: the AP on {split} is not that on new images; take it out of one"
            problems.add(Problem(NOTE, f"images of {split} that train has too", str(table.folder / name), text, name))
