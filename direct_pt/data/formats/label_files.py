"""Shared by the formats with one label file per image: finding and reading them, and numbering the records."""

import filecmp
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from direct_pt.data.formats.json_stream import CHUNK
from direct_pt.data.names import SPLIT, Folders, normal_name, walk_folders
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problem, Problems
from direct_pt.data.records import Chunk, Json
from direct_pt.errors import first_names
from direct_pt.files import read_regular, what_is_there
from direct_pt.images.decoding import FORMATS

MAX_SHARE_WITHOUT_LABELS = 0.1  # of the images, that is taken for granted
NO_LABELS = ("classes.txt", "predefined_classes.txt", "labels.txt", "notes.txt", "readme.txt")  # beside label files


class LabelFiles:
    """The label files of one YOLO split: which image has which, and which have no image.

    Attributes:
        folder: the data set's; all names are relative to it.
    """

    def __init__(self, folder: Path, problems: Problems) -> None:
        self.folder = folder
        self.problems = problems
        self.folders = Folders(folder)
        self.image_of: dict[str, str] = {}  # by label file
        self.label_of: dict[str, str | None] = {}  # by image
        self.image_folders: dict[str, set[str]] = defaultdict(set)  # by folder of labels
        self.stems: dict[str, set[str]] = {}  # of the images in a folder

    def of_image(self, image: str) -> Path | None:
        """The label file of an image, None if it has none.

        Where no file has exactly the image's name, the one whose name means the same is taken, or that has the image's
        whole name before its suffix; where there is none in the folder of labels, a file beside the image.

        Raises:
            DataError: the folder of labels cannot be listed.
        """
        path, label = PurePosixPath(image), PurePosixPath(label_name(image))
        if str(label.parent) not in self.image_folders:
            self._require_folder(str(label.parent))
        self.image_folders[str(label.parent)].add(str(path.parent))
        self.label_of[image] = None
        for place in dict.fromkeys((str(label.parent), str(path.parent))):
            for wanted in (label.name, f"{path.name}.txt"):
                name = self.folders[place].find(wanted)
                if name is None or (name != wanted and self._is_another_images(name, str(path.parent))):
                    continue
                found = str(PurePosixPath(place, name))
                self._take(found, str(label), image)
                return self.folder / found
        return None

    def _require_folder(self, labels: str) -> None:
        """Raise DataError where a folder of labels is a file, or a link that leads nowhere; it may be missing."""
        path = self.folder / labels
        while not os.path.lexists(path) and path != self.folder:
            path = path.parent
        if not os.path.isdir(path):  # noqa: PTH112 (which raises PermissionError)
            what = what_is_there(path) or "a link that leads nowhere"
            text = f"cannot be listed as a folder of labels ({what}); mend or remove it"
            raise DataError("unreadable folder", path, text)

    def _is_another_images(self, label: str, image_folder: str) -> bool:
        """Whether an image of the folder has exactly the label file's name."""
        if image_folder not in self.stems:
            split = map(os.path.splitext, self.folders[image_folder].names)
            self.stems[image_folder] = {stem for stem, suffix in split if suffix.lower() in FORMATS}
        return label.endswith(".txt") and label.removesuffix(".txt") in self.stems[image_folder]

    def _take(self, found: str, expected: str, image: str) -> None:
        self.label_of[image] = found
        first = self.image_of.setdefault(found, image)
        if first != image:
            text = f"is the label file of {first} and of {image}: both get its objects; rename one image and its labels"
            self.problems.add(Problem(NOTE, "label files of two images", str(self.folder / found), text, image))
        if found != expected:
            text = f"is taken as the label file of {image}, which would be called {expected}"
            file = str(self.folder / found)
            self.problems.add(Problem(REPAIRED, "label files of other names taken", file, text, image))

    def report(self, source: str, images: list[str], image_roots: Iterable[str]) -> None:
        """Note the label files that no image has, and many images without label files.

        Args:
            source: the split's name in messages.
            images: all of the split.
            image_roots: folders whose subfolders may hold images, all of the split.

        Raises:
            DataError: no image has a label file, although there are some.
        """
        roots = list(image_roots)
        for root in roots:
            self._add_folders(root)
        self._add_folders_around()
        unused = dict(sorted(self._unused(images, roots)))
        without = [image for image, label in self.label_of.items() if label is None]
        if without and len(without) == len(images):
            text = f"none of its {len(images)} images has a label file, such as {self.folder / label_name(without[0])}"
            if unused:
                text += f", but {len(unused)} label files have no image: {first_names(list(unused))}; "
                text += "give both the same name"
                raise DataError("label names", source, text)
            self.problems.add(Problem(NOTE, "splits without a label file", source, text))
        elif len(without) > MAX_SHARE_WITHOUT_LABELS * len(images):
            text = f"{len(without)} of {len(images)} images have no label file, and count as images without objects: "
            example = str(self.folder / without[0])
            self.problems.add(Problem(NOTE, "images without a label file", example, text + first_names(without)))
        lacking = {normal_name(PurePosixPath(image).stem): image for image in reversed(without)}
        for unused_file, image in unused.items():
            text = "is no image's label file, so it is not used; name and place it as its image, or remove it"
            if image and self.label_of.get(image):
                text = f"is not used, as the label file of {image} is {self.label_of[image]}; remove one of them"
            elif found := lacking.get(normal_name(PurePosixPath(unused_file).stem)):
                text = f"is not used; if it is of {found}, it must be {label_name(found)}: move it there, or remove it"
            self.problems.add(Problem(NOTE, "label files without an image", str(self.folder / unused_file), text))

    def _add_folders(self, root: str) -> None:
        """Note the folders of labels that belong to a folder of images and its subfolders."""
        labels = str(PurePosixPath(label_name(f"{root}/image.jpg")).parent)
        for inside in self._inside(labels):
            self.image_folders[os.path.normpath(f"{labels}/{inside}")].add(os.path.normpath(f"{root}/{inside}"))

    def _add_folders_around(self) -> None:
        """Note the folders from those of labels up to `labels` itself, and what in it has no folder of images."""
        tops = set()
        for labels, image_folders in list(self.image_folders.items()):
            for folder in image_folders - {labels}:
                place, images = PurePosixPath(labels), PurePosixPath(folder)
                while images.name != "images":
                    place, images = place.parent, images.parent
                    self.image_folders[str(place)].add(str(images))
                tops.add((str(place), str(images)))
        for top, of_images in sorted(tops):
            for inside in self._inside(top):
                if not os.path.isdir(self.folder / of_images / inside):  # noqa: PTH112
                    self.image_folders.setdefault(os.path.normpath(f"{top}/{inside}"), set())

    def _inside(self, place: str) -> list[str]:
        """The paths of a folder and its subfolders relative to it; none if it does not exist."""
        path = self.folder / place
        if not os.path.isdir(path):  # noqa: PTH112 (which raises PermissionError)
            return []
        return [os.path.relpath(folder, path) for folder, _ in walk_folders(path, Problems())]

    def _unused(self, images: list[str], roots: list[str]) -> Iterator[tuple[str, str]]:
        """The label files that no image uses, in the folders of labels and beside the images, each with the image that
        has its name, "" if none has.

        Not those of images of other splits, nor what says the same as the label file that its image uses.
        """
        own: dict[str, dict[str, str]] = defaultdict(dict)  # by folder and normal name, with and without suffix
        for image in images:
            file = PurePosixPath(image)
            own[str(file.parent)] |= {normal_name(file.name): image, normal_name(file.stem): image}
        labels_beside = {str(PurePosixPath(label).parent) for label in self.image_of}
        places = {folder: set(image_folders) for folder, image_folders in self.image_folders.items()}
        for folder in {folder for image_folders in places.values() for folder in image_folders} - set(places):
            places[folder] = {folder}
        for folder, image_folders in places.items():
            files = [name for name in self.folders[folder].names if self._may_be_unused(folder, name)]
            others = self._images_of_others(image_folders, own, roots) if files else set()
            for name in files:
                stem, path = normal_name(PurePosixPath(name).stem), str(PurePosixPath(folder, name))
                same = next((own[place][stem] for place in image_folders if stem in own[place]), None)
                is_text = folder not in self.image_folders and folder not in labels_beside and same is None
                if is_text or stem in others or (same is not None and self._says_the_same(path, same)):
                    continue
                if (self.folder / path).is_file():
                    yield path, same or ""

    def _may_be_unused(self, folder: str, name: str) -> bool:
        is_label = name.lower().endswith(".txt") and name.lower() not in NO_LABELS and not SPLIT.fullmatch(name.lower())
        return is_label and str(PurePosixPath(folder, name)) not in self.image_of

    def _images_of_others(self, folders: set[str], own: dict[str, dict[str, str]], roots: list[str]) -> set[str]:
        """The normal names, with and without suffix, of images in folders that are of other splits, or unreadable."""
        found = set()
        for folder in folders:
            names = [PurePosixPath(image).name for image in own[folder].values() if image not in self.label_of]
            if not any(PurePosixPath(folder).is_relative_to(root) for root in roots):
                listed = [name for name in self.folders[folder].names if name.lower().endswith(FORMATS)]
                names += [name for name in listed if normal_name(name) not in own[folder]]
            found |= {normal_name(spelling) for name in names for spelling in (name, PurePosixPath(name).stem)}
        return found

    def _says_the_same(self, path: str, image: str) -> bool:
        """Whether a label file has the content of the one that its image uses."""
        used = self.label_of.get(image)
        if used is None:
            return False
        try:
            return filecmp.cmp(self.folder / path, self.folder / used, shallow=False)
        except OSError:
            return False


def label_name(image: str) -> str:
    """The path of an image's label file; both are relative to the data set's folder."""
    return str(PurePosixPath("/labels/".join(f"/{image}".rsplit("/images/", 1))[1:]).with_suffix(".txt"))


def number_records(categories: list[Json], images: Iterable[tuple[Json, list[Json]]]) -> Iterator[Chunk]:
    """The records of one split in chunks: see Source.records.

    Args:
        categories: complete records.
        images: the record of each image and those of its objects, without ids and areas, which these formats lack: ids
            are numbered from 1 in this order, and the area is the box's.
    """
    yield "categories", 0, categories
    waiting: dict[str, list[Json]] = {"images": [], "annotations": []}
    passed = {"images": 0, "annotations": 0}
    for image_id, (image, objects) in enumerate(images, start=1):
        waiting["images"].append({"id": image_id, **image})
        first = passed["annotations"] + len(waiting["annotations"]) + 1
        for number, record in enumerate(objects, first):
            area = record["bbox"][2] * record["bbox"][3]
            waiting["annotations"].append({"id": number, "image_id": image_id, "area": area, **record})
        for key, records in waiting.items():
            if len(records) >= CHUNK:
                yield key, passed[key], records
                passed[key] += len(records)
                waiting[key] = []
    for key, records in waiting.items():
        if records or not passed[key]:
            yield key, passed[key], records


def read_text(path: Path) -> str:
    """A file's text, with or without a byte order mark. Raises DataError."""
    try:
        return read_regular(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("unreadable text", path, f"cannot be read as UTF-8 text ({error}); save it anew") from error
