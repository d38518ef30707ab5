"""Which files of a folder are data, and file names that mean the same although they are spelt otherwise."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from direct_pt.data.problems import NOTE, DataError, Problem, Problems
from direct_pt.files import what_is_there
from direct_pt.images.decoding import FORMATS

# Folders that file managers, archives and notebooks leave behind, with copies of images in them.
NO_DATA = ("@eadir", "__macosx", "$recycle.bin", "lost+found", "system volume information", "thumbnails")
NOT_READ = (  # suffixes of images that Pillow does not read
    ".heic", ".heif", ".jxl", ".tga", ".psd", ".svg", ".exr", ".hdr",
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2",
)  # fmt: skip


SPLIT_NAMES = {  # that folders and lists of a split have, in any case; the first that is there is taken
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
    "trainval": ("trainval",),
}

LIST_FOLDERS = ("ImageSets/Main", "ImageSets")  # Pascal VOC's
SPLIT = re.compile(
    rf"(instances_)?({'|'.join(chain.from_iterable(SPLIT_NAMES.values()))}|eval)(20\d\d)?(\.json|\.txt)?"
)


def is_no_data(name: str) -> bool:
    """Whether a file or folder is left out by its name: hidden, or one that programs leave behind."""
    return name.startswith(".") or name.casefold() in NO_DATA


def normal_name(name: str) -> str:
    """The same text for names that differ only in Unicode composition, case or percent-encoding."""
    return unicodedata.normalize("NFC", unquote(name)).casefold()


class Spellings:
    """Names that are found by others that mean the same."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self._by_normal_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> list[str]:
        """The name itself if it is there, or else all that mean the same, sorted."""
        if name in self.names:
            return [name]
        if self._by_normal_name is None:
            self._by_normal_name = defaultdict(list)
            for own in sorted(self.names):
                self._by_normal_name[normal_name(own)].append(own)
        return self._by_normal_name.get(normal_name(name), [])


class Folder:
    """The names in one folder, none if it does not exist. Raises DataError if it cannot be listed.

    Attributes:
        names: as they are on the disk, but for those that are no data.
        left_out: those that are no data.
    """

    def __init__(self, path: Path) -> None:
        try:
            found = set(os.listdir(path))  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
            found = set()
        except OSError as error:
            raise DataError("unreadable folder", path, f"cannot be listed ({error.strerror}); allow it") from error
        self.left_out = set(filter(is_no_data, found))
        self.names = found - self.left_out
        self._spellings = Spellings(self.names)

    def find(self, name: str) -> str | None:
        """The file of this name, even if it is no data, or else the only one whose name means the same."""
        if name in self.left_out:  # who names it exactly means it
            return name
        found = self._spellings.find(name)
        return found[0] if len(found) == 1 else None


class Folders:
    """The folders below `root` that were asked for; each is listed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, Folder] = {}

    def __getitem__(self, relative: str) -> Folder:
        if relative not in self._known:
            self._known[relative] = Folder(self.root / relative)
        return self._known[relative]

    def find(self, path: str) -> str | None:
        """The file at a path relative to the root, or else the only one whose path means the same."""
        found = ""
        for part in path.split("/"):
            name = self[found].find(part)
            if name is None:
                return None
            found = f"{found}/{name}" if found else name
        return found


def walk_folders(place: Path, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """The folders in a place, itself first, each with the names of its files. Links to folders are followed.

    Each folder comes once: at its own place if that is inside, else by the first link to it. What is left out is noted:
    folders that are no data, links that lead to what is searched anyway, to a folder around the place, or nowhere.

    Raises:
        DataError: a folder cannot be listed.
    """

    def leave_out(kind: str, path: str, text: str) -> None:
        problems.add(Problem(NOTE, kind, path, f"is left out: {text}"))

    whole = Path(os.path.realpath(place))
    seen: set[str] = set()
    waiting = [str(place)]
    for top in waiting:  # it grows by the links
        for folder, below, names in os.walk(top, onerror=_fail_to_list):
            target = os.path.realpath(folder)
            if target in seen or (seen and whole.is_relative_to(target)):
                below.clear()
                if folder == top:
                    text = f"it leads to {target}, which is searched anyway or holds this folder; copy what is needed"
                    leave_out("links to folders left out", folder, text)
                continue
            seen.add(target)
            for name in filter(is_no_data, below):
                leave_out("folders left out", os.path.join(folder, name), "its name says that it holds no data")  # noqa: PTH118
            for name in names:
                path = os.path.join(folder, name)  # noqa: PTH118
                if "." not in name and os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
                    leave_out("links that lead nowhere", path, "there is no file or folder where it leads; mend it")
            below[:] = [name for name in below if not is_no_data(name)]
            paths = [os.path.join(folder, name) for name in sorted(below)]  # noqa: PTH118
            waiting += filter(os.path.islink, paths)  # os.walk does not enter them
            yield folder, names


def _fail_to_list(error: OSError) -> NoReturn:
    raise DataError("unreadable folder", error.filename, f"cannot be listed ({error.strerror}); allow it") from error


def require_readable(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Check a folder that a library reads: it would wait for a pipe, and leave out folders that it may not list.

    Raises:
        DataError: a folder in it cannot be listed, or a pipe, socket or device has one of these suffixes.
    """
    for place, below, names in os.walk(folder, onerror=_fail_to_list):
        below[:] = [name for name in below if not is_no_data(name)]
        for path in (Path(place, name) for name in names if name.endswith(suffixes)):
            if (there := what_is_there(path)) not in ("", "a file", "a folder"):
                raise DataError("no file", path, f"cannot be read as a file: {there}; put one there, or remove it")


def walk_images(place: Path, problems: Problems) -> Iterator[Path]:
    """The image files in a folder and its subfolders: see walk_folders. Images that are left out are noted.

    Raises:
        DataError: a folder cannot be listed.
    """
    for folder, names in walk_folders(place, problems):
        for name in names:
            if is_image(Path(folder, name), problems):
                yield Path(folder, name)


def is_image(path: Path, problems: Problems) -> bool:
    """Whether a file is read as an image, by its name; images that are not are noted."""
    suffix = path.suffix.lower()
    if suffix in NOT_READ and not is_no_data(path.name):
        text = f"is left out: images of the format {suffix} are not read; convert it to JPEG or PNG"
        problems.add(Problem(NOTE, "images of other formats left out", str(path), text, path.name))
    if suffix not in FORMATS:
        return False
    if is_no_data(path.name):
        problems.add(Problem(NOTE, "hidden images left out", str(path), "is left out: it is hidden", path.name))
        return False
    return True


def is_no_folder(path: Path) -> bool:
    """Whether something is there that is no folder: a file, or what stands in its place, and reading it will name.

    Raises:
        OSError: the folder around it cannot be entered.
    """
    try:
        return (path.is_symlink() or path.exists()) and not path.is_dir()
    except ValueError:  # a name that no file can have
        return False


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder that are named as splits."""
    return _named_as_splits(folder, "", Path.is_dir)


def split_files(folder: Path, suffix: str) -> dict[str, Path]:
    """The files with this suffix in a folder that are named as splits."""
    return _named_as_splits(folder, suffix, is_no_folder)


def report_unused_splits(data: Path, used: Iterable[Path], problems: Problems) -> None:
    """Note the folders and lists that are named as splits of the data set in `data`, and are none of those `used`."""
    used = list(used)
    roots = {data, *(path.parent for path in used if data in path.parents)}
    places = {folder / name for folder in roots for name in ("", "images", "annotations", *LIST_FOLDERS)}
    for place in sorted(places):
        if any(place == one or one in place.parents for one in used):  # all in it is used, and may be many images
            continue
        for name in sorted(Folder(place).names):
            path = place / name
            if not SPLIT.fullmatch(name.lower()) or not (path.is_dir() or path.suffix in (".json", ".txt")):
                continue
            if not any(path == one or path in one.parents or one in path.parents for one in used):
                text = "is named as a split, but is not used: it is not part of the layout that was recognised"
                problems.add(Problem(NOTE, "splits that are not used", str(path), text))


def _named_as_splits(folder: Path, suffix: str, is_kind: Callable[[Path], bool]) -> dict[str, Path]:
    names = {name.lower(): name for name in sorted(Folder(folder).names)}
    found: dict[str, Path] = {}
    for split, spellings in SPLIT_NAMES.items():
        for spelling in spellings:
            name = names.get(spelling + suffix)
            if name is not None and split not in found and is_kind(folder / name):
                found[split] = folder / name
    return found
