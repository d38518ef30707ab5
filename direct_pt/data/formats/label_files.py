"""Shared by the formats with one label file per image: finding and reading them, and numbering the records."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from direct_pt.data.formats.json_stream import CHUNK
from direct_pt.data.names import Folders, is_no_data, normal_name
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problem, Problems
from direct_pt.data.records import Chunk, Json
from direct_pt.errors import first_names
from direct_pt.images import FORMATS

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
        self.used: set[str] = set()
        self.image_folders: dict[str, set[str]] = defaultdict(set)  # by folder of labels
        self.stems: dict[str, set[str]] = {}  # of the images in a folder
        self.without: list[str] = []

    def of_image(self, image: str) -> Path | None:
        """The label file of an image, None if it has none.

        Where no file has exactly the image's name, the one whose name means the same is taken, or that has the image's
        whole name before its suffix; where there is no folder of labels, a file beside the image.
        """
        path, label = PurePosixPath(image), PurePosixPath(label_name(image))
        places = [str(label.parent)]
        self.image_folders[places[0]].add(str(path.parent))
        if not self.folders[places[0]].names:
            places.append(str(path.parent))
        for place in dict.fromkeys(places):
            for wanted in (label.name, f"{path.name}.txt"):
                name = self.folders[place].find(wanted)
                if name is None or (name != wanted and self._is_another_images(name, str(path.parent))):
                    continue
                found = str(PurePosixPath(place, name))
                if found != str(label):
                    self._note_other_name(found, str(label), image)
                self.used.add(found)
                return self.folder / found
        self.without.append(image)
        return None

    def _is_another_images(self, label: str, image_folder: str) -> bool:
        """Whether an image of the folder has exactly the label file's name."""
        if image_folder not in self.stems:
            split = map(os.path.splitext, self.folders[image_folder].names)
            self.stems[image_folder] = {stem for stem, suffix in split if suffix.lower() in FORMATS}
        return label.endswith(".txt") and label.removesuffix(".txt") in self.stems[image_folder]

    def _note_other_name(self, found: str, expected: str, image: str) -> None:
        text = f"is taken as the label file of {image}, which would be called {expected}"
        self.problems.add(Problem(REPAIRED, "label files of other names taken", str(self.folder / found), text, image))

    def report(self, source: str, images: int, image_roots: Iterable[str]) -> None:
        """Note the label files that no image has, and many images without label files.

        Args:
            source: the split's name in messages.
            images: how many the split has.
            image_roots: folders whose subfolders may hold images.

        Raises:
            DataError: no image has a label file, although there are some.
        """
        for root in image_roots:
            labels = str(PurePosixPath(label_name(f"{root}/image.jpg")).parent)
            for folder, below, _ in os.walk(self.folder / labels):
                below[:] = [name for name in below if not is_no_data(name)]
                inside = os.path.relpath(folder, self.folder / labels)
                self.image_folders[os.path.relpath(folder, self.folder)].add(os.path.normpath(f"{root}/{inside}"))
        unused = sorted(name for folder in self.image_folders for name in self._without_image(folder))
        if self.without and len(self.without) == images:
            text = f"none of its {images} images has a label file, such as {self.folder / label_name(self.without[0])}"
            if unused:
                text += f", but {len(unused)} label files have no image: {first_names(unused)}; give both the same name"
                raise DataError("label names", source, text)
            self.problems.add(Problem(NOTE, "no label files", source, text))
        elif len(self.without) > MAX_SHARE_WITHOUT_LABELS * images:
            text = f"{len(self.without)} of {images} images have no label file, and count as images without objects: "
            example = str(self.folder / self.without[0])
            self.problems.add(Problem(NOTE, "images without a label file", example, text + first_names(self.without)))
        for name in unused:
            text = "no image has this name, so it is not used; name it as its image, or remove it"
            self.problems.add(Problem(NOTE, "label files without an image", str(self.folder / name), text))

    def _without_image(self, folder: str) -> Iterator[str]:
        """The label files in a folder whose image is in none of the folders of its images."""
        images: set[str] = set()
        for place in self.image_folders[folder]:
            for name in self.folders[place].names:
                if name.lower().endswith(FORMATS):
                    images |= {normal_name(name), normal_name(PurePosixPath(name).stem)}
        for name in self.folders[folder].names:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122
            path = str(PurePosixPath(folder, name))
            if suffix.lower() != ".txt" or name.lower() in NO_LABELS or path in self.used:
                continue
            if normal_name(stem) not in images and (self.folder / path).is_file():
                yield path


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
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("unreadable text", path, f"cannot be read as UTF-8 text ({error}); save it anew") from error
