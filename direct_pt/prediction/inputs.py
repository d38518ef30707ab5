"""Which image files to look at, and what their results are called; nothing of the user's is written over."""

from pathlib import Path

from PIL import Image

from direct_pt.data.names import walk_images
from direct_pt.data.problems import Problems
from direct_pt.errors import InputError
from direct_pt.files import MAX_NAME_BYTES, check_inputs_kept, reading, shortened, what_is_there
from direct_pt.images.decoding import FORMATS

RESULTS = "predictions.json"
ANNOTATIONS, YOLO, LABEL_STUDIO, CVAT, CROPS = "annotations.json", "yolo", "label_studio.json", "cvat.xml", "crops"
RESERVED = {RESULTS, ANNOTATIONS, YOLO, LABEL_STUDIO, CVAT, CROPS}  # where no pictures are to lie
LONGEST_ENDING = 16  # bytes of what follows the name of an image in that of a result
COMMENT = b"detections drawn by predict.py"  # in the pictures, which later runs may replace


@reading("the images")
def find_images(inputs: list[Path], output: Path, problems: Problems) -> tuple[list[tuple[Path, Path]], int]:
    """The image files, and how many in `output` were left out of the search: a run before this one may have made them.

    Folders are searched as those of training data are; `problems` gets notes on what else is left out.

    Returns:
        Each image file and the relative path that its picture gets, no two the same, also where case does not count;
        and the number left out.
    """
    found: dict[str, tuple[Path, Path]] = {}
    own, left_out = output.resolve(), 0
    for given in inputs:
        if given.is_dir():
            check_inputs_kept([output], [given])
            inside = sorted(walk_images(given, problems))
            if own.is_relative_to(given.resolve()):
                count, inside = len(inside), [path for path in inside if not path.resolve().is_relative_to(own)]
                left_out += count - len(inside)
            pairs = [(path, path.relative_to(given)) for path in inside]
        elif given.is_file():
            pairs = [(given, Path(given.name))]
        else:
            there = what_is_there(given)
            raise InputError(f"{given}: no such image or folder" + (there and f" ({there})"))
        for path, name in pairs:
            picture, copy = picture_name(name), 1
            while (key := str(picture).casefold()) in found:
                copy += 1
                picture = picture_name(name, f"_{copy}")
            found[key] = path, picture
    if not found:
        notes = "".join(f"; {note}: {count}" for note, count in problems.summary().items())
        raise InputError(f"{', '.join(map(str, inputs))}: no image files there ({', '.join(FORMATS)}){notes}")
    return list(found.values()), left_out


def picture_name(image: Path, number: str = "") -> Path:
    """The picture's path: the image's with another ending, cut to what file systems take, apart from other results."""
    first, *others = image.parent.parts or ("",)
    folder = Path(f"{first}_images" if first.casefold() in RESERVED else first, *others)
    return folder / f"{shortened(image.stem, MAX_NAME_BYTES - LONGEST_ENDING - len(number))}{number}.jpg"


def check_pictures(files: list[tuple[Path, Path]], output: Path) -> None:
    """Raise InputError where something would be written over an image or a foreign file, or through a link."""
    check_inputs_kept([output / picture for _, picture in files], [path for path, _ in files])
    for place in (output / RESULTS, *(output / picture for _, picture in files)):
        if place.is_file() and not place.is_symlink() and not is_own(place):
            raise InputError(f"--output-dir {output}: {place} was not made by predict.py; name another place")
    for folder in {output / folder for _, picture in files for folder in picture.parents[:-1]}:
        if folder.is_symlink():
            raise InputError(f"--output-dir {output}: {folder} is a link to another folder; name another place")


def is_own(path: Path) -> bool:
    """Whether an existing file is the result of an earlier run."""
    try:
        if path.suffix == ".json":
            with path.open() as file:
                start = file.read(10_000)
            return start.strip() == "[]" or '"category_name"' in start
        with Image.open(path) as picture:
            return picture.info.get("comment") == COMMENT
    except (OSError, ValueError):
        return False
