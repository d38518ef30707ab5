"""Pascal VOC data sets: one XML file per image, in the devkit's folders or beside the images (Roboflow's export)."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, nan
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder, XMLParser

from direct_pt.data.formats.label_files import number_records, read_text
from direct_pt.data.names import (
    LIST_FOLDERS,
    Folder,
    is_no_data,
    normal_name,
    split_files,
    split_folders,
    walk_folders,
    walk_images,
)
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problem, Problems
from direct_pt.data.records import Chunk, Json
from direct_pt.errors import first_names
from direct_pt.files import open_regular
from direct_pt.images.decoding import FORMATS

CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAX_XML_BYTES = 20 * 10**6


@dataclass(frozen=True)
class VocClasses:
    """The classes of a data set: the names of all objects in its folders of XML files, sorted, so that splits agree.

    Unreadable files are skipped here: the split that they belong to reports them.
    """

    folders: tuple[Path, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sorted names, read from all files on first use."""
        found: set[str] = set()
        for path in (path for folder in self.folders for path in xml_files(folder)):
            try:
                found |= {_text(element, "name") or "" for element in _read_xml(path).iterfind("object")}
            except DataError:
                continue
        return tuple(sorted(found - {""}))


@dataclass(frozen=True)
class VocSplit:
    """One split of a VOC data set: see Source.

    Boxes follow the devkit: pixels are counted from 1 and both corners belong to the box, so that it reaches from
    (xmin - 1, ymin - 1) to (xmax, ymax). Objects marked difficult become crowd regions: training ignores them, and
    evaluation ignores both them and detections in them. Category ids number the sorted names from 1.

    Attributes:
        source: name in messages.
        folder: of the images, which may lie in subfolders.
        annotations: folder of the XML files, which may lie in subfolders.
        listing: file that lists the split's XML files by their names without suffix; None for all of them.
        without: another such file, whose names are not of the split.
        classes: of all splits.
        unused: other trees beside this one.
        covered: a list that names nothing but what other lists do.
    """

    source: str
    folder: Path
    annotations: Path
    listing: Path | None
    classes: VocClasses
    without: Path | None = None
    unused: tuple[Path, ...] = ()
    covered: Path | None = None

    encoded = annotation_file = None
    owns_folder = False

    @property
    def paths_read(self) -> tuple[Path, ...]:
        """Its folders and lists."""
        lists = [path for path in (self.listing, self.without, self.covered) if path is not None]
        return self.folder, self.annotations, *lists

    def records(self, problems: Problems) -> Iterator[Chunk]:
        """COCO-like records: images in the order of the XML files' names, objects in the files' order.

        An image record has a size if its XML file states one. Raises DataError.
        """
        categories = [{"id": number, "name": name} for number, name in enumerate(self.classes.names, start=1)]
        return number_records(categories, self._images(problems))

    def _images(self, problems: Problems) -> Iterator[tuple[Json, list[Json]]]:
        ids = {name: number for number, name in enumerate(self.classes.names, start=1)}
        images: dict[str, list[str]] = {}  # file names by stem
        found_for: dict[str, Path] = {}  # XML files by image
        faulty: set[str] = set()  # stems of XML files
        files: list[Path] = []
        for tree in self.unused:
            text = f"is a VOC tree of its own, beside the one that is read; name it with --data {tree}, or remove it"
            problems.add(Problem(NOTE, "trees that are not used", str(tree), text))
        with problems.caught():
            files = self._files(problems)
            if not self.folder.is_dir():
                text = f"no such image folder (the images of {self.annotations})"
                raise DataError("missing folder", self.folder, text)
            for path in sorted(walk_images(self.folder, problems), key=str):
                images.setdefault(normal_name(path.stem), []).append(path.relative_to(self.folder).as_posix())
            if not images:
                raise DataError("no images", self.folder, f"holds no images (those of {self.annotations})")
        for path in files if images else ():
            found = None
            with problems.caught():
                root = _read_xml(path)
                image = self._image(root, path, images, problems)
                if image in found_for:
                    text = f"is of the image {image}, as is {found_for[image]}; correct its <filename>, or remove one"
                    raise DataError("duplicate image", path, text, image)
                found_for[image] = path
                found = {"file_name": image, **_size(root, path)}, _objects(root, path, image, ids, problems)
            if found is not None:
                yield found
            else:
                faulty.add(normal_name(path.stem))
        if self.listing is None:
            unlabelled = [name for stem, same in images.items() if stem not in faulty for name in same]
            for image in sorted(set(unlabelled) - set(found_for)):
                text = (
                    f"is left out: no XML file in {self.annotations} is of it; an image without objects needs one too"
                )
                problems.add(Problem(NOTE, "images without an XML file", str(self.folder / image), text, image))

    def _files(self, problems: Problems) -> list[Path]:
        """The split's XML files, sorted by path."""
        files = xml_files(self.annotations)
        if self.listing is None:
            return files
        names = XmlNames(files, self.annotations)
        listed = self._listed(self.listing, names, problems)
        text = "lists no images; write a name without suffix on each line"
        if self.without is not None and listed:
            listed -= self._listed(self.without, names, Problems(collects=True))
            text = f"lists no image that {self.without} does not list too; take some lines out of that one"
        if not listed:
            raise DataError("no images", self.listing, text)
        return sorted(listed, key=str)

    def _listed(self, listing: Path, names: "XmlNames", problems: Problems) -> set[Path]:
        """The XML files that a list names, one a line."""
        lines: dict[Path, int] = {}
        for number, line in enumerate(map(str.strip, read_text(listing).splitlines()), start=1):
            with problems.caught():
                if not line:
                    continue
                found, whole = names.find(line), re.split(r"[/\\]", line)[-1]
                if not found:
                    text = f"lists {line!r}, but {self.annotations} has no {whole}.xml; add it or remove the line"
                    raise DataError("missing XML", f"{listing}:{number}", text)
                if len(found) > 1:
                    fitting = first_names([path.relative_to(self.annotations).as_posix() for path in found])
                    text = f"lists {line!r}, which may be {fitting}; write the name as it is there, with its folder"
                    raise DataError("ambiguous XML", f"{listing}:{number}", text)
                if lines.setdefault(found[0], number) < number:
                    text = f"lists {whole!r} again, after line {lines[found[0]]}; remove one"
                    raise DataError("listed twice", f"{listing}:{number}", text)
        return set(lines)

    def _image(self, root: Element, path: Path, images: dict[str, list[str]], problems: Problems) -> str:
        """The image's file name: the stated one, or else the XML file's name with an image suffix.

        An exact name comes before one that means the same, an image in the XML file's own subfolder before others.
        """
        stated = _text(root, "filename") or ""
        name = re.split(r"[/\\]", stated)[-1]  # stated paths are never followed
        if name != stated:
            text = f"its <filename> {stated!r} is a path; only {name!r} of it counts"
            problems.add(Problem(NOTE, "filename is a path", str(path), text, name))
        own = PurePosixPath(path.parent.relative_to(self.annotations))
        alike = [PurePosixPath(image) for image in images.get(normal_name(Path(name).stem), [])]
        same = [image for image in alike if image.name == name]
        exact = bool(same)
        same = _nearest(same or [image for image in alike if normal_name(image.name) == normal_name(name)], own)
        if len(same) != 1:
            alike = [PurePosixPath(image) for image in images.get(normal_name(path.stem), [])]
            same = [image for image in alike if image.stem == path.stem]
            exact = bool(same)
            same = _nearest(same or alike, own)
        if len(same) != 1:
            fitting = ", ".join(map(str, same))
            what = f"several images fit ({fitting})" if same else f"no {path.stem}.jpg or the like either"
            text = f"its <filename> {name!r} is not in {self.folder}, and {what}; correct it or add the image"
            raise DataError("missing image", path, text, name)
        kinds = {"images of other spelling taken": not exact, "images in other subfolders taken": same[0].parent != own}
        for kind in (kind for kind, differs in kinds.items() if differs):
            problems.add(Problem(REPAIRED, kind, str(path), f"its image is {same[0]}", name))
        return str(same[0])


class XmlNames:
    """The XML files in a folder and its subfolders, found by the names that lists give them."""

    def __init__(self, files: list[Path], folder: Path) -> None:
        # By path without suffix, by name alone, and by the normal form of each: the first that holds a name counts.
        self._indexes: tuple[dict[str, list[Path]], ...] = tuple(defaultdict(list) for _ in range(4))
        self._depth = 1
        for file in files:
            stem = file.relative_to(folder).with_suffix("").as_posix()
            self._depth = max(self._depth, stem.count("/") + 1)
            for index, name in zip(
                self._indexes, (stem, file.stem, normal_name(stem), normal_name(file.stem)), strict=True
            ):
                index[name].append(file)

    def find(self, line: str) -> list[Path]:
        """The files that a line may mean: a name, perhaps with a suffix, folders before it, or 1 or -1 behind."""
        parts = re.split(r"[/\\]", line)
        spellings: list[str] = []
        for start in range(max(0, len(parts) - self._depth), len(parts)):
            whole = "/".join(parts[start:])
            spellings += [whole, re.sub(r"\s+-?[01]$", "", whole)]
        spellings += [stem for name in spellings for stem, suffix in [os.path.splitext(name)]  # noqa: PTH122
                      if suffix.lower() in (".xml", *FORMATS)]  # fmt: skip
        normal = [normal_name(name) for name in spellings]
        for index, names in zip(self._indexes, (spellings, spellings, normal, normal), strict=True):
            for name in names:
                if name in index:
                    return index[name]
        return []


def _nearest(images: list[PurePosixPath], folder: PurePosixPath) -> list[PurePosixPath]:
    """Those in the folder, or else all."""
    return [image for image in images if image.parent == folder] or images


def find_voc(folder: Path) -> dict[str, VocSplit] | None:
    """The splits ("train", "val", "test") of a VOC data set, None if the folder is not one.

    Either Annotations/, JPEGImages/ and ImageSets/Main/ in the folder, or in one VOC* folder of it or of its
    VOCdevkit/; without lists everything is "train". trainval.txt stands in for train.txt, without the images of
    val.txt. Or train/, valid/ and test/ with XML files beside the images, in one of them not only in subfolders.

    Raises:
        DataError: there are several VOC trees.
    """
    places = (folder, *sorted(folder.glob("VOC*")), *sorted(folder.glob("VOCdevkit/VOC*")))
    trees = [place for place in places if xml_files(place / "Annotations")]
    if len(trees) > 1 and trees[0] != folder:
        names = ", ".join(str(tree.relative_to(folder)) for tree in trees)
        raise DataError("several trees", folder, f"holds several VOC trees ({names}); name one with --data {trees[0]}")
    if not trees:
        places_of = split_folders(folder)
        # Deeper folders are searched only where some XML file is found: other data sets may be large.
        known = any(name.lower().endswith(".xml") for place in places_of.values() for name in Folder(place).names)
        found = {split: place for split, place in places_of.items() if known and xml_files(place)}
        classes = VocClasses(tuple(found.values()))
        return {split: VocSplit(str(place), place, place, None, classes) for split, place in found.items()} or None
    annotations, classes = trees[0] / "Annotations", VocClasses((trees[0] / "Annotations",))
    listed: dict[str, Path | None] = {}
    listed |= next((lists for name in LIST_FOLDERS if (lists := split_files(trees[0] / name, ".txt"))), {})
    without = None
    if "trainval" in listed and "train" not in listed:
        listed["train"], without = listed["trainval"], listed.get("val")
    if not any(split in listed for split in ("train", "val", "test")):
        listed = {}
    splits = {
        split: VocSplit(
            f"{trees[0]} ({split})", trees[0] / "JPEGImages", annotations, listing, classes,
            without if split == "train" else None,
        )
        for split, listing in (listed or {"train": None}).items()
        if split != "trainval"
    }  # fmt: skip
    first = "train" if "train" in splits else min(splits)
    covered = listed["trainval"] if "trainval" in listed and _covers(listed) else None
    return splits | {first: replace(splits[first], unused=tuple(trees[1:]), covered=covered)}


def _covers(listed: Mapping[str, Path | None]) -> bool:
    """Whether train.txt and val.txt together list all of trainval.txt, as the devkit's do."""
    with suppress(DataError):  # whoever reads the list reports it
        lines = {split: set(read_text(path).split("\n")) for split, path in listed.items() if path is not None}
        both = lines.get("train", set()) | lines.get("val", set())
        return {line.strip() for line in lines.get("trainval", set())} <= {line.strip() for line in both} | {""}
    return False


def xml_files(folder: Path) -> list[Path]:
    """The XML files in a folder and its subfolders, but for hidden ones, sorted; none if there is no such folder."""
    if not os.path.isdir(folder):  # noqa: PTH112 (which raises PermissionError)
        return []
    found = [Path(place, name) for place, names in walk_folders(folder, Problems()) for name in names
             if name.lower().endswith(".xml") and not is_no_data(name)]  # fmt: skip
    return sorted(found, key=str)


class _Builder(TreeBuilder):
    """Rejects document types, whose entities can make a small file large in memory, or refer to other files."""

    def doctype(self, *_: Any) -> None:
        raise ValueError("it declares a document type; remove the line <!DOCTYPE ...>")


def _read_xml(path: Path) -> Element:
    """The root element of an XML file."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_XML_BYTES + 1)
        if len(content) > MAX_XML_BYTES:
            raise ValueError("it is larger than 20 MB")
        parser = XMLParser(target=_Builder())
        parser.feed(content)
        root = parser.close()
    except (OSError, ParseError, ValueError, LookupError) as error:
        raise DataError("XML", path, f"cannot be read as XML ({error}); mend it, or save it anew in UTF-8") from error
    if root.tag != "annotation":
        raise DataError("XML", path, f"is no VOC annotation: its outermost element is <{root.tag}>, not <annotation>")
    return root


def _text(element: Element, tag: str) -> str | None:
    text = element.findtext(tag)
    return None if text is None else text.strip()


def _size(root: Element, path: Path) -> Json:
    """Height and width, if the file states them; 0 means unknown."""
    sides = {side: _text(root, f"size/{side}") or "0" for side in ("height", "width")}
    if not all(re.fullmatch("[0-9]{1,9}", side) for side in sides.values()):
        text = f"its <size> is {sides['width']} x {sides['height']}; expected whole numbers of pixels, or 0"
        raise DataError("size", path, text)
    return {side: int(text) for side, text in sides.items()} if all(map(int, sides.values())) else {}


def _objects(root: Element, path: Path, image: str, ids: dict[str, int], problems: Problems) -> list[Json]:
    objects = []
    for number, element in enumerate(root.iterfind("object"), start=1):
        with problems.caught():
            try:
                objects.append(_object(element, ids))
            except ValueError as error:
                raise DataError("object", path, f"object {number} {error}", image) from error
    return objects


def _object(element: Element, ids: dict[str, int]) -> Json:
    """category_id, bbox and iscrowd of an <object>. Raises ValueError with the reason."""
    name, difficult = _text(element, "name"), _text(element, "difficult") or "0"
    if not name:
        raise ValueError("has no <name>; write its class there")
    corners = []
    for tag in CORNERS:
        text = _text(element, f"bndbox/{tag}")
        if text is None:
            raise ValueError(f"has no <{tag}> in a <bndbox>; annotate it with a box, or remove it")
        try:
            corners.append(float(text))
        except ValueError:
            corners.append(nan)
        if not isfinite(corners[-1]):
            raise ValueError(f"has the <{tag}> {text!r:.60}; expected a number of pixels")
    x1, y1, x2, y2 = corners
    if x2 < x1 or y2 < y1:
        raise ValueError(
            f"has the corners ({x1:g}, {y1:g}) and ({x2:g}, {y2:g}); xmin and ymin must be the smaller ones"
        )
    if max(corners) <= 1 and corners != [1, 1, 1, 1]:
        raise ValueError("has corners within 1 pixel, which look like shares of the image's sides; write pixels")
    if difficult not in ("0", "1"):
        raise ValueError(f"has <difficult> {difficult!r:.60}; expected 0 or 1")
    return {
        "category_id": ids[name],
        "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
        "iscrowd": int(difficult),
    }
