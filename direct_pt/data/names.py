"""Which files of a folder are data, and file names that mean the same although they are spelt otherwise."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

from direct_pt.data.problems import NOTE, DataError, Problem, Problems
from direct_pt.images import FORMATS

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


class Folder:
    """The names in one folder, none if it does not exist. Raises DataError if it cannot be listed.

    Attributes:
        names: as they are on the disk, but for those that are no data.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.names = {name for name in os.listdir(path) if not is_no_data(name)}  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
            self.names = set()
        except OSError as error:
            raise DataError("unreadable folder", path, f"cannot be listed ({error.strerror}); allow it") from error
        self._by_normal_name: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The file of this name, or else the only one whose name means the same."""
        if name in self.names:
            return name
        if self._by_normal_name is None:
            self._by_normal_name = defaultdict(list)
            for own in self.names:
                self._by_normal_name[normal_name(own)].append(own)
        found = self._by_normal_name.get(normal_name(name), [])
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


def walk_images(place: Path, problems: Problems, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[Path]:
    """The image files in a folder and its subfolders, except for links to folders.

    What is left out is noted: folders that are no data, hidden images, images of formats that are not read.

    Args:
        place: the folder.
        problems: gets the notes.
        wanted: whether a subfolder, by its path, is searched.

    Raises:
        DataError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise DataError("unreadable folder", error.filename, f"cannot be listed ({error.strerror})") from error

    for folder, below, names in os.walk(place, onerror=fail):
        for name in [name for name in below if is_no_data(name)]:
            text = "is left out: its name says that it holds no data"
            problems.add(Problem(NOTE, "folders left out", str(Path(folder, name)), text))
        below[:] = [name for name in below if not is_no_data(name) and wanted(os.path.join(folder, name))]  # noqa: PTH118
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


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder that are named as splits."""
    return _named_as_splits(folder, "", Path.is_dir)


def split_files(folder: Path, suffix: str) -> dict[str, Path]:
    """The files with this suffix in a folder that are named as splits."""
    return _named_as_splits(folder, suffix, Path.is_file)


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
