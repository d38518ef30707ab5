"""YOLO data sets in Ultralytics' format: a YAML file of classes and splits, a text file of objects per image."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, ScalarNode

from direct_pt.data.formats.label_files import LabelFiles, number_records, read_text
from direct_pt.data.names import SPLIT_NAMES, Folders, is_no_folder, walk_images
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problem, Problems
from direct_pt.data.records import Chunk, Json
from direct_pt.errors import first_names
from direct_pt.files import open_regular, what_is_there
from direct_pt.images.decoding import Decoding, UnreadableImage, image_size

YAML_FILES = ("data.yaml", "dataset.yaml", "data.yml")
SPLITS = ("train", "val", "test")
REQUIRED_KEYS = re.compile(rb"^[\"']?(names|train)[\"']?\s*:", re.MULTILINE)
MAX_YAML_BYTES = 10**6
EMPTY_VALUES: tuple[object, ...] = (None, "", "~", "null", "Null", "NULL", [])
EXPECTED = "expected 'class x_center y_center width height', or a class and 3 or more points 'x y' of a polygon"


@dataclass(frozen=True)
class YoloSplit:
    """One split of a YOLO data set: see Source.

    A label file has the image's path with its last `images` part replaced by `labels`, and the suffix .txt. If it is
    missing or empty, the image has no objects. Category ids are the class indices, from 0.

    Attributes:
        source: name in messages.
        folder: the data set's folder; nothing outside of it is read (links in it are followed).
        file: the YAML file.
        key: the split's key in the YAML file.
        paths: the key's value: folders, searched recursively, or .txt files that list images.
        root: the value of the key `path`: `paths` and the lines of .txt files are relative to it.
        class_names: by index.
        decoding: how image files are read, because their sizes are needed.
    """

    source: str
    folder: Path
    file: Path
    key: str
    paths: tuple[str, ...]
    root: str | None
    class_names: tuple[str, ...]
    decoding: Decoding

    encoded = annotation_file = None
    owns_folder = False

    @property
    def paths_read(self) -> tuple[Path, ...]:
        """The folders and lists that the YAML file names, as it may mean them."""
        written = [text for path in self.paths for text in (path, re.sub(r"^(\.\./)+", "", path))]
        roots = (self.folder, self.folder / (self.root or ""))
        return tuple(Path(os.path.normpath(root / path)) for root in roots for path in written)

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """COCO-like records: images in the order of their names, objects in the order of their lines.

        Lines that repeat an earlier one are dropped. Raises DataError.
        """
        categories = [{"id": index, "name": name} for index, name in enumerate(self.class_names)]
        return number_records(categories, self._images(problems))

    def _images(self, problems: Problems) -> Iterator[tuple[Json, list[Json]]]:
        names, folders = self._image_names(problems)
        labels = LabelFiles(self.folder, problems)
        for name in names:
            found = None
            with problems.caught():
                try:
                    height, width = image_size(self.folder / name, self.decoding)
                except UnreadableImage as error:
                    text = str(error).removeprefix(f"{self.folder / name}: ")
                    raise DataError("unreadable image", self.folder / name, text, name) from error
                path = labels.of_image(name)
                objects = self._objects(path, name, height, width, problems) if path else []
                found = {"file_name": name, "height": height, "width": width}, objects
            if found is not None:
                yield found
        with problems.caught():
            labels.report(self.source, names, folders)

    def _image_names(self, problems: Problems) -> tuple[list[str], list[str]]:
        """The split's images, sorted, and the folders among its paths; all relative to the data set's folder."""
        found: list[str] = []
        folders: list[str] = []
        with problems.caught():
            root = self._root(problems)
            for path in self.paths:
                with problems.caught():
                    place = self._place(root, path)
                    if place.endswith(".txt") and os.path.isfile(self.folder / place):  # noqa: PTH113
                        found += self._lines(root, self.folder / place, problems)
                        continue
                    images = [
                        os.path.relpath(image, self.folder) for image in walk_images(self.folder / place, problems)
                    ]
                    if not images:
                        text = f"its '{self.key}' names {self.folder / place}, which holds no images"
                        raise DataError("no images", self.file, text)
                    found += images
                    folders.append(place)
        for name, count in Counter(found).items():
            if count > 1:
                text = f"its '{self.key}' lists {name} {count} times; it counts once"
                problems.add(Problem(REPAIRED, "images listed again left out", str(self.file), text, name))
        return sorted(set(found)), folders

    def _root(self, problems: Problems) -> Path:
        if self.root is None:
            return self.folder
        root = self.folder / self.root
        if not os.path.isdir(root):  # noqa: PTH112 (which raises PermissionError)
            text = f"its 'path' {self.root!r} is not there: paths are taken relative to {self.folder}"
            problems.add(Problem(NOTE, "YAML 'path' that is not there", str(self.file), text))
            return self.folder
        if self._inside(root) is None:
            text = (
                f"its 'path' {self.root!r} lies outside of {self.folder}, where nothing is read; copy the file into "
                f"{os.path.normpath(root)}, and give that folder as --data"
            )
            raise DataError("path", self.file, text)
        return root

    def _place(self, root: Path, path: str) -> str:
        """The folder or .txt file that one of `paths` means. Exports write ../train/images for one beside the YAML."""
        for written in (path, re.sub(r"^(\.\./)+", "", path)):
            inside = self._inside(root / written)
            if inside is None or (inside == "." and written != path):  # "../" alone names no folder beside the file
                continue
            place = self.folder / inside
            if os.path.isdir(place) or (place.suffix == ".txt" and os.path.isfile(place)):  # noqa: PTH112, PTH113
                return inside
        there = what_is_there(root / path) if self._inside(root / path) is not None else ""
        reason = f" ({there})" if there not in ("", "a file", "a folder") else ""
        remedy = "write a path relative to it"
        text = f"its '{self.key}' {path!r} is no folder and no .txt file in {self.folder}{reason}; {remedy}"
        if self.key.lower() not in SPLIT_NAMES["train"]:
            text += f", or remove the line '{self.key}'"
        raise DataError("path", self.file, text)

    def _lines(self, root: Path, path: Path, problems: Problems) -> list[str]:
        """The image files that a .txt file lists."""
        found, folders = [], Folders(self.folder)
        lines = read_text(path).splitlines()
        for number, line in enumerate(map(str.strip, lines), start=1):
            with problems.caught():
                name = self._inside(root / line)
                if name is not None and not os.path.isfile(self.folder / name):  # noqa: PTH113
                    name = folders.find(name)
                if line and name is None:
                    text = f"lists {line!r}, which is no file in {self.folder}; write paths relative to {root}"
                    raise DataError("missing image", f"{path}:{number}", text, line)
                found += [name] if line and name else []
        if not any(map(str.strip, lines)):
            raise DataError("no images", path, f"lists no images (the '{self.key}' of {self.file})")
        return found

    def _inside(self, path: Path) -> str | None:
        """A path relative to the data set's folder, None if it leads outside; links are not resolved for that."""
        relative = os.path.relpath(path, self.folder)
        return None if Path(relative).parts[:1] == ("..",) else relative

    def _objects(self, path: Path, image: str, height: int, width: int, problems: Problems) -> list[Json]:
        """The objects of an image's label file."""
        objects = []
        first: dict[tuple[str, ...], int] = {}  # line of each content
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            words = line.split()
            if not words:
                continue
            before = first.setdefault(tuple(words), number)
            if before < number:
                text = f"is the same as line {before}; it is left out"
                problems.add(Problem(REPAIRED, "label lines that repeat one left out", f"{path}:{number}", text, image))
                continue
            with problems.caught():
                try:
                    objects.append(_object(words, len(self.class_names), height, width))
                except ValueError as error:
                    raise DataError("label line", f"{path}:{number}", str(error), image) from error
        return objects


def find_yolo(place: Path, decoding: Decoding = Decoding()) -> dict[str, YoloSplit] | None:  # noqa: B008
    """The splits ("train", "val", "test") of a YOLO data set, None if there is no YAML file of it.

    Args:
        place: the YAML file, or its folder with one: data.yaml, dataset.yaml, or another with `names` and `train`.
        decoding: how image files are read.

    Raises:
        DataError: the YAML file is malformed, or there are several that differ. The splits' paths are only checked when
            their records are read.
    """
    files = [place] if place.suffix in (".yaml", ".yml") and is_no_folder(place) else yaml_files(place)
    if len(files) > 1:
        named = first_names([path.name for path in files])
        text = f"holds several YAML files of a YOLO set ({named}): give one of them, --data {files[0]}"
        raise DataError("several YAML files", place, text)
    if not files:
        return None
    file, folder = files[0], files[0].parent
    content = _read_yaml(file)
    if content.get("kpt_shape") not in EMPTY_VALUES:
        text = "has 'kpt_shape': its labels hold keypoints, which are not supported; export boxes or polygons"
        raise DataError("keypoints", file, text)
    class_names = _class_names(content, file)
    root = None if content.get("path") in EMPTY_VALUES else content["path"]
    if not isinstance(root, str | None):
        raise DataError("path", file, "its 'path' must be one path")
    splits = {}
    for split in SPLITS:
        found = _split_paths(content, split, file)
        if found is not None:
            splits[split] = YoloSplit(f"{file} ({split})", folder, file, *found, root, class_names, decoding)
    if not splits:
        raise DataError("path", file, "needs the key 'train' or 'val' with the folder of its images")
    return splits


def _split_paths(content: Json, split: str, file: Path) -> tuple[str, tuple[str, ...]] | None:
    """The key of a split, in one of its usual spellings, and its paths. Raises DataError, also if two keys differ."""
    spellings = SPLIT_NAMES[split]
    keys = [key for key in content if isinstance(key, str) and key.lower() in spellings]
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(keys, key=lambda key: (spellings.index(key.lower()), key)):
        value = content[key]
        if value in EMPTY_VALUES:
            continue
        paths = value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) and path for path in paths):
            raise DataError("path", file, f"its '{key}' must be a path or a list of paths")
        found[key] = tuple(paths)
    if len(set(found.values())) > 1:
        named = " and ".join(f"'{key}'" for key in found)
        raise DataError("path", file, f"has {named} for one split, which differ: leave one of them")
    return next(iter(found.items()), None)


def yaml_files(folder: Path) -> list[Path]:
    """The YAML files in a folder that may be of a data set: those of a usual name, and all others with the needed keys.

    Of files with the same content, the first.
    """
    found: dict[bytes, Path] = {}
    usual = [folder / name for name in YAML_FILES]
    for path in dict.fromkeys([*usual, *sorted(folder.glob("*.y*ml"))]):
        if path.suffix in (".yaml", ".yml") and is_no_folder(path):
            content = str(path).encode()  # of one that cannot be read: find_yolo says why
            with suppress(OSError), open_regular(path) as file:
                content = file.read(MAX_YAML_BYTES)
            if path in usual or len(set(REQUIRED_KEYS.findall(content))) == 2:
                found.setdefault(content, path)
    return list(found.values())


class _RepeatedKey(Exception):
    """A mapping has a key twice; the message says which, `line` where."""

    def __init__(self, key: str, line: int, first: int) -> None:
        super().__init__(f"has the key {key!r:.60} again, after line {first}; YAML allows it once: remove one")
        self.line = line


class _Loader(yaml.BaseLoader):
    """Reads every scalar as text, and refuses a key that a mapping has twice: PyYAML would keep the last."""

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> Json:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, MappingNode) else ():
            if isinstance(key, ScalarNode):
                if key.value in lines:
                    raise _RepeatedKey(key.value, key.start_mark.line + 1, lines[key.value])
                lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Json:
    """The file's mapping, with every scalar as text.

    So a class named no is not False, no Python objects are created, and merge keys, which could multiply the content,
    have no effect.
    """
    try:
        with open_regular(path) as file:
            content = file.read(MAX_YAML_BYTES + 1)
        if len(content) > MAX_YAML_BYTES:
            raise ValueError("it is larger than 1 MB")
        loaded = yaml.load(content, _Loader)
    except _RepeatedKey as error:
        raise DataError("YAML", f"{path}:{error.line}", str(error)) from error
    except (OSError, yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise DataError("YAML", path, f"cannot be read as YAML ({' '.join(str(error).split())}); mend it") from error
    if not isinstance(loaded, dict):
        raise DataError("YAML", path, "must hold a mapping with the keys 'names', 'train' and 'val'")
    return loaded


def _class_names(content: Json, path: Path) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, dict):
        unknown = sorted(set(names) - set(map(str, range(len(names)))))
        if unknown:
            text = f"its 'names' must number its {len(names)} classes from 0 without gaps; found {unknown[0][:20]!r}"
            raise DataError("names", path, text)
        names = [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError("names", path, "needs 'names', a list of the classes or a mapping {index: name}")
    for name, count in Counter(names if all(isinstance(name, str) for name in names) else [""]).items():
        if not name.strip() or count > 1:
            what = f"{name!r} {count} times" if name.strip() else "an entry without text"
            raise DataError("names", path, f"its 'names' has {what}; give every class a name of its own")
    number = content.get("nc")
    if number not in (*EMPTY_VALUES, str(len(names))):
        found = repr(number[:20]) if isinstance(number, str) else "no number"
        text = f"its 'nc' is {found}, but 'names' lists {len(names)} classes; correct one of them"
        raise DataError("names", path, text)
    return tuple(names)


def _object(words: list[str], classes: int, height: int, width: int) -> Json:
    """category_id, bbox and, for a polygon, segmentation of a label line. Raises ValueError with the reason."""
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise ValueError(f"has {len(words)} fields; {EXPECTED}")
    try:
        label, *shares = map(float, words)
    except ValueError as error:
        raise ValueError(f"has a field that is no number ({error}); {EXPECTED}") from error
    if not all(map(isfinite, (label, *shares))):
        raise ValueError("has a number that is not finite; annotate the object anew, or remove the line")
    if label % 1 or not 0 <= label < classes:
        known = f"a whole number from 0 to {classes - 1}, as in 'names'"
        raise ValueError(f"has the class {words[0]}; expected {known}: correct it, or add a name")
    if len(shares) == 4 and min(shares[2:]) < 0:
        raise ValueError(f"has the negative width or height {min(shares[2:]):g}; write it without sign")
    least, most = min(shares), max(shares)
    if least < -0.5 or most > 1.5:
        found = most if most > 1.5 else least
        raise ValueError(f"has {found:g}, expected shares from 0 to 1: divide by the image's width and height")
    if len(shares) == 4:
        x, y, w, h = shares
        return {"category_id": int(label), "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]}
    xs, ys = [x * width for x in shares[::2]], [y * height for y in shares[1::2]]
    shares[::2], shares[1::2] = xs, ys
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return {"category_id": int(label), "bbox": box, "segmentation": [shares]}
