"""Detect objects in image files: drawn pictures and COCO results.

  python scripts/predict.py --checkpoint RUN IMAGE_OR_FOLDER... [--output-dir DIR] [--tiles PIXELS]

Folders are searched recursively, but for the output folder. Writes each picture with its detections drawn, and
predictions.json: COCO results with the data set's own category ids, masks as run lengths; images are numbered from 1 in
the order of their names, and named in each row, with bytes that are no UTF-8 as \\udcXX. Nothing is written over the
images, or over what predict.py did not make.
"""

from direct_pt.program.run import run_program
import json
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from direct_pt.batch import Sample
from direct_pt.checkpoint import (
    CHECKPOINT_HELP,
    KINDS,
    PROVIDER_HELP,
    WEIGHTS_HELP,
    check_provider,
    load_detector,
)
from direct_pt.coco_eval import Predictions
from direct_pt.data.loader import make_loader
from direct_pt.data.names import walk_images
from direct_pt.data.problems import Problems
from direct_pt.data.reader_processes import runs
from direct_pt.data.sources import DecodingOptions
from direct_pt.distributed.launch import DeviceOptions, make_accelerator
from direct_pt.errors import InputError, printable
from direct_pt.files import (
    MAX_NAME_BYTES,
    check_inputs_kept,
    check_output,
    counted_folder,
    reading,
    replacing,
    shortened,
    valid_unicode,
    what_is_there,
    writing,
)
from direct_pt.flags import add_flags, any_path, batch_size, make_parser, path_or_name, read_flags, share
from direct_pt.images.decoding import FORMATS, Decoding, Size, UnreadableImage, image_size, read_image
from direct_pt.images.tiles import Tiling, add_tile_flags, find_in_tiles, tiling_of
from direct_pt.images.visualize import MAX_JPEG_SIDE, draw_detections, drawable_name
from direct_pt.models.api import DetectorAPI
from direct_pt.onnx_detector import Found, paste_masks
from direct_pt.program.folder_lock import folder_held
from direct_pt.training.limits import check_images_at_once
from direct_pt.transforms import TestPreset

RESULTS = "predictions.json"
THRESHOLDS = ("model", "per-class")
THRESHOLD_HELP = "of what is drawn and written: a number, the model's own, or its own of each class (model)"
COMMENT = b"detections drawn by predict.py"  # in the pictures, which later runs may replace


class ImageFiles(Dataset[Sample]):
    """Test samples of files; an unreadable one comes back black and named."""

    def __init__(self, paths: list[Path], preset: TestPreset, decoding: Decoding) -> None:
        self.paths = paths
        self.preset = preset
        self.decoding = decoding

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        try:
            size = image_size(path, self.decoding)
            sample = self.preset.image_sample(size, lambda least: read_image(path, size, least, self.decoding))
            return replace(sample, index=index)
        except UnreadableImage:
            return replace(self.preset.black_sample((32, 32)), index=index, unreadable=(index,))


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
            picture, copy = picture_name(name, ".jpg"), 1
            while (key := str(picture).casefold()) in found:
                copy += 1
                picture = picture_name(name, f"_{copy}.jpg")
            found[key] = path, picture
    if not found:
        notes = "".join(f"; {note}: {count}" for note, count in problems.summary().items())
        raise InputError(f"{', '.join(map(str, inputs))}: no image files there ({', '.join(FORMATS)}){notes}")
    return list(found.values()), left_out


def picture_name(image: Path, ending: str) -> Path:
    """The image's path with another ending, its name cut to what file systems take."""
    return image.with_name(shortened(image.stem, MAX_NAME_BYTES - len(ending)) + ending)


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


def threshold(text: str) -> float | str:
    """The value of --score-threshold."""
    return text if text in THRESHOLDS else share(text)


def describe_threshold(detector: DetectorAPI, threshold: float | str) -> str:
    """In words."""
    if threshold == "per-class":
        pairs = zip(detector.config.class_names, detector.class_thresholds, strict=True)
        return ", ".join(f"{name} {score:g}" for name, score in pairs)
    return f"{detector.score_threshold:g}, the model's own" if threshold == "model" else f"{threshold:g}"


class Looked(NamedTuple):
    """What was found in a file.

    Attributes:
        file: its place in the list.
        size: of the image.
        found: the detections to show; None where it cannot be read.
    """

    file: int
    size: Size
    found: Found | None


def in_whole_images(
    detector: DetectorAPI,
    images: ImageFiles,
    thresholds: np.ndarray,
    accelerator: Accelerator,
    at_once: int,
    num_workers: int,
) -> Generator[Looked, None, None]:
    """The detections of all files, in batches that worker processes read."""
    keys = partial(iter, runs(0, len(images), at_once))
    with closing(iter(make_loader(images, keys, num_workers))) as batches:
        for batch in batches:
            with accelerator.autocast():
                everything = detector.detect(batch.to(detector.device)).to("cpu").arrays(len(batch))
            for index, (height, width), found in zip(
                batch.indices.tolist(), batch.original_sizes.tolist(), everything, strict=True
            ):
                unreadable = index in batch.unreadable
                yield Looked(index, (height, width), None if unreadable else found.above(thresholds))


def in_tiles(
    detector: DetectorAPI,
    images: ImageFiles,
    thresholds: np.ndarray,
    accelerator: Accelerator,
    at_once: int,
    tiling: Tiling,
) -> Generator[Looked, None, None]:
    """The same, of overlapping tiles and the whole of each image."""

    def find(crops: list[np.ndarray]) -> list[Found]:
        with accelerator.autocast():
            return [found.above(thresholds) for found in detector.find(crops, images.preset)]

    for index, path in enumerate(images.paths):
        try:
            pixels = read_image(path, decoding=images.decoding)
        except UnreadableImage:
            yield Looked(index, (1, 1), None)
            continue
        size = pixels.shape[0], pixels.shape[1]
        yield Looked(index, size, find_in_tiles(pixels, tiling, find, at_once))


def draw(photo: Image.Image, found: Found, names: list[str]) -> Image.Image:
    """One image with its detections; `names` are those of the classes, as they can be drawn."""
    values = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    captions = [f"{names[label]} {score:.2f}" for label, score in values]
    masks = None
    if found.masks is not None:
        size, pairs = (photo.height, photo.width), zip(found.masks, found.boxes, strict=True)
        masks = (paste_masks(probabilities[None], box[None], size)[0] for probabilities, box in pairs)  # one at a time
    return draw_detections(photo, found.boxes, found.labels, captions, masks)


def main() -> None:
    """Predict, image by image: its rows are written and its picture drawn before the next one."""
    p = make_parser(__doc__ or "")
    p.add_argument(
        "images", nargs="+", type=any_path, metavar="IMAGE_OR_FOLDER", help="image files, or folders of them"
    )
    p.add_argument("--checkpoint", required=True, type=path_or_name, metavar="RUN", help=CHECKPOINT_HELP)
    p.add_argument("--weights", choices=KINDS, default="best", help=WEIGHTS_HELP)
    p.add_argument("--output-dir", type=any_path, metavar="DIR", help="where to write (runs/predict, -2 and so on)")
    p.add_argument(
        "--score-threshold", type=threshold, default="model", metavar="X|model|per-class", help=THRESHOLD_HELP
    )
    p.add_argument(
        "--micro-batch-size", "--batch-size", type=batch_size, default=4, metavar="N", help="images at once (4)"
    )
    add_tile_flags(p)
    add_flags(p, DecodingOptions)
    add_flags(p, DeviceOptions)
    p.add_argument("--provider", metavar="NAME", help=PROVIDER_HELP)
    args = p.parse_args()

    check_provider(args.provider, [args.checkpoint])
    tiling = tiling_of(args)
    output: Path = args.output_dir or counted_folder(Path("runs/predict"))
    check_output(output)
    notes = Problems()
    files, left_out = find_images(args.images, output, notes)
    check_pictures(files, output)
    if left_out:
        print(f"not searched, as it is --output-dir: {printable(str(output))} ({left_out} image files)")
    for note, count in notes.summary().items():
        print(f"{printable(note)}: {count}")
    decoding = read_flags(args, DecodingOptions).decoding
    accelerator = make_accelerator(args.mixed_precision, device=args.device)
    detector, _, description = load_detector(args.checkpoint, args.weights, args.provider)
    print(printable(f"weights: {description}"))
    detector = detector.to(accelerator.device).eval()
    print(printable(f"score threshold: {describe_threshold(detector, args.score_threshold)}"))
    config = detector.config
    preset = TestPreset(config.short_side, config.long_side)
    check_images_at_once(min(args.micro_batch_size, len(files)), preset)
    images = ImageFiles([path for path, _ in files], preset, decoding)
    thresholds = detector.thresholds(args.score_threshold)
    if tiling is None:
        looked_at = in_whole_images(detector, images, thresholds, accelerator, args.micro_batch_size, args.num_workers)
    else:
        looked_at = in_tiles(detector, images, thresholds, accelerator, args.micro_batch_size, tiling)
    image_ids = np.arange(1, len(files) + 1)
    class_names = dict(zip(config.category_ids, config.class_names, strict=True))
    drawn_names = [drawable_name(name, category_id) for category_id, name in class_names.items()]
    unreadable: list[str] = []
    rows = 0
    with ExitStack() as stack:
        stack.enter_context(writing(f"--output-dir {output}"))
        stack.enter_context(folder_held(output, "predict"))
        file = stack.enter_context(stack.enter_context(replacing(output / RESULTS)).open("w"))
        bar = stack.enter_context(tqdm(total=len(files), desc="predict", unit="image"))
        for index, size, found in stack.enter_context(closing(looked_at)):
            path, picture = files[index]
            bar.update()
            try:
                photo = Image.fromarray(read_image(path, decoding=decoding))
                if found is None:
                    raise UnreadableImage(f"{path}: could not be read before, and can now")
            except UnreadableImage as error:
                unreadable.append(printable(str(error)))
                bar.write(f"unreadable, skipped: {unreadable[-1]}")
                continue
            for result in Predictions.of_image(index, found, size).coco(image_ids, config.category_ids):
                image_id, category_id = result["image_id"], result["category_id"]
                row = {
                    "image_id": image_id,
                    "file_name": valid_unicode(str(path)),
                    "category_id": category_id,
                    "category_name": class_names[category_id],
                    **result,
                }
                file.write((",\n" if rows else "[\n") + json.dumps(row))
                rows += 1
            target = output / picture
            target.parent.mkdir(parents=True, exist_ok=True)
            drawn = draw(photo, found, drawn_names)
            if max(drawn.size) > MAX_JPEG_SIDE:
                bar.write(printable(f"drawn smaller, as a JPEG has at most {MAX_JPEG_SIDE} pixels a side: {path}"))
                drawn.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
            with replacing(target, to_disk=False) as temporary:
                drawn.save(temporary, "JPEG", quality=92, comment=COMMENT)
        file.write("\n]\n" if rows else "[]\n")
    if len(unreadable) == len(files):
        few = " | ".join(unreadable[:3]) + " | ..." * (len(files) > 3)
        raise InputError(f"none of the {len(files)} files could be read as an image: {few}")
    counts = f"{len(files) - len(unreadable)} images, {len(unreadable)} unreadable, {rows} detections"
    print(f"{counts}: {printable(str(output))}")


if __name__ == "__main__":
    with torch.inference_mode():
        run_program(main)
