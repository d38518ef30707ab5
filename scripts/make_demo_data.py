"""Make a small detection set without a download: real handwritten digits on crops of real photographs, COCO format.

The material comes with scikit-learn: 1,797 scans of digits (8x8 pixels) and two photographs. Validation images use
scans and parts of the photographs that no training image uses. The same arguments give the same bytes.
"""

from direct_pt.program.run import run_program
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import contour_generator
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from direct_pt.errors import InputError, printable
from direct_pt.files import DamagedFile, check_output, read_json, writing
from direct_pt.flags import any_path, make_parser, random_seed, whole_number

MAX_IMAGES = 1_000_000  # of a split
MIN_SIZE, MAX_SIZE = 64, 4096  # pixels
VERSION = "1"  # raise it when the images change: then an older set is not taken for the same
SPLITS = ("train", "val")
CATEGORY_IDS = tuple(range(10, 101, 10))  # of the digits 0 to 9; with gaps, as COCO's own ids have
HELD_OUT_SCANS = 0.2  # share of the scans, for validation
HELD_OUT_ROWS = 0.35  # share of each photograph's rows, the lowest, for validation
EMPTY_SHARE = 0.03  # of the images, without digits
MAX_DIGITS = 6
SIDE_RANGE = (1 / 8, 1 / 3)  # of an enlarged scan, relative to the image's side
MAX_IOU = 0.1  # between two boxes; strokes never overlap
MIN_CONTRAST = 70.0  # in luma (0 to 255), between a digit and its background
LUMA = np.array([0.299, 0.587, 0.114])
OUTLINE_LEVEL = 0.5  # opacity at a stroke's outline
MAX_PLACEMENTS = 50  # tries to place a digit


@dataclass
class Source:
    """The material of one split."""

    scans: np.ndarray  # [N, 8, 8] float32, 0 (paper) to 1 (ink)
    digits: np.ndarray  # [N] int64, 0 to 9
    numbers: np.ndarray  # [N] int64, the scans' positions in scikit-learn's list
    photos: list[np.ndarray]  # [h, w, 3] uint8 each, for the backgrounds
    max_crop: int  # side of the largest background in the photographs' pixels; the smallest is half of it


def hold_out(items: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split `items` along their first axis: training, and the last `share` for validation."""
    count = len(items) - round(share * len(items))
    return items[:count], items[count:]


def load_sources() -> list[Source]:
    """The material of each split, in the order of SPLITS. It does not depend on --seed."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise InputError(
            "scikit-learn, which contains the demo's data, is missing: pip install scikit-learn"
        ) from error
    data = load_digits()
    scans, order = (data.images / 16).astype(np.float32), np.random.default_rng(0).permutation(len(data.images))
    photos = [hold_out(photo, HELD_OUT_ROWS) for photo in load_sample_images().images]
    # The same sizes for both splits, so that backgrounds are equally coarse; they fit into the held-out rows.
    max_crop = min(len(rows) for _, rows in photos)
    return [
        Source(scans[numbers], data.target[numbers], numbers, [parts[split] for parts in photos], max_crop)
        for split, numbers in enumerate(hold_out(order, HELD_OUT_SCANS))
    ]


def draw_background(source: Source, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of a random photograph, perhaps mirrored: [size, size, 3] float64, 0 to 255."""
    photo = source.photos[rng.integers(len(source.photos))]
    side = rng.integers(source.max_crop // 2, source.max_crop, endpoint=True)
    top, left = (rng.integers(length - side, endpoint=True) for length in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BICUBIC)
    return np.array(crop, dtype=np.float64)[:, :: rng.choice((-1, 1))]


def enlarge(scan: np.ndarray, side: float) -> np.ndarray:
    """Opacity [h, w], 0 to 1, of a scan [8, 8] enlarged to about `side` pixels, cropped to its visible part."""
    padded = Image.fromarray(np.pad(scan, 1))  # so that strokes at the scan's edge fade out too
    pixels = round(side * padded.width / len(scan))
    smooth = np.asarray(padded.resize((pixels, pixels), Image.Resampling.BICUBIC), dtype=np.float64)
    alpha = np.clip((smooth - 0.25) / 0.4, 0, 1)  # steeper edges make strokes
    rows, columns = (np.flatnonzero(alpha.any(axis=axis)) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def outline(alpha: np.ndarray) -> list[np.ndarray]:
    """Polygons [P, 2] (x, y) around the parts of the strokes `alpha` [h, w], in its pixels; holes are filled."""
    rings = contour_generator(z=np.pad(alpha, 1), fill_type="OuterOffset").filled(OUTLINE_LEVEL, np.inf)
    # The outer ring comes first, and its last point repeats its first; -0.5: -1 for the padding, +0.5 for the centres.
    return [points[: offsets[1] - 1] - 0.5 for points, offsets in zip(*rings, strict=True)]


def pick_colour(background: np.ndarray, alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour [3] that stands out from `background` [h, w, 3] under the strokes `alpha` [h, w]."""
    candidates = rng.uniform(0, 255, (32, 3))
    contrast = np.abs((candidates - np.average(background, axis=(0, 1), weights=alpha)) @ LUMA)
    return candidates[np.minimum(contrast, MIN_CONTRAST).argmax()]  # the first with enough contrast, else the best


def draw_digits(pixels: np.ndarray, count: int, source: Source, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Draw up to `count` random digits into `pixels` [size, size, 3]. Returns their annotations, without ids."""
    size = len(pixels)
    inked = np.zeros((size, size), dtype=bool)
    annotations: list[dict[str, Any]] = []
    for _ in range(count):
        scan = rng.integers(len(source.scans))
        alpha = enlarge(source.scans[scan], size * rng.uniform(*SIDE_RANGE))
        polygons = outline(alpha)
        for _ in range(MAX_PLACEMENTS):  # a digit that does not fit is left out
            top, left = (rng.integers(size - length, endpoint=True) for length in alpha.shape)
            window = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
            placed = [np.round(polygon + np.array([left, top]), 2) for polygon in polygons]
            corners = np.concatenate(placed)
            box = np.concatenate([corners.min(axis=0), np.ptp(corners, axis=0)]).round(2)
            others = np.array([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
            overlap = np.max(coco_mask.iou(box[None], others, [0] * len(others)), initial=0)
            if overlap < MAX_IOU and not (inked[window] & (alpha > 0)).any():
                break
        else:
            continue
        pixels[window] += alpha[..., None] * (pick_colour(pixels[window], alpha, rng) - pixels[window])
        inked[window] |= alpha > 0
        segmentation = [polygon.ravel().tolist() for polygon in placed]
        area = coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(segmentation, size, size)))
        annotation = {"category_id": CATEGORY_IDS[source.digits[scan]], "bbox": box.tolist(), "area": int(area)}
        annotation |= {"iscrowd": 0, "segmentation": segmentation, "scan": int(source.numbers[scan])}
        annotations.append(annotation)
    return annotations


def make_split(folder: Path, split: str, source: Source, info: dict[str, Any]) -> None:
    """Write the images and the annotation file of `split` into `folder`."""
    size, count = info["arguments"]["image_size"], info["arguments"][f"{split}_images"]
    rng = np.random.default_rng([info["arguments"]["seed"], SPLITS.index(split)])
    empty = rng.choice(count, round(EMPTY_SHARE * count), replace=False)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in tqdm(range(1, count + 1), desc=split, unit="image", disable=None):
        pixels = draw_background(source, size, rng)
        digits = 0 if image_id - 1 in empty else int(rng.integers(1, MAX_DIGITS, endpoint=True))
        for annotation in draw_digits(pixels, digits, source, rng):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
        name = f"{split}_{image_id:06d}.jpg"
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / "images" / name, quality=95)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
    categories = [{"id": id_, "name": str(digit), "supercategory": "digit"} for digit, id_ in enumerate(CATEGORY_IDS)]
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def holds_same_set(folder: Path, info: dict[str, Any]) -> bool:
    """Whether `folder` contains a complete set with the same `info`."""
    try:
        tables = [read_json(folder / "annotations" / f"instances_{split}.json", 2**34) for split in SPLITS]
        files = [folder / "images" / image["file_name"] for table in tables for image in table["images"]]
        return all(table["info"] == info for table in tables) and all(file.is_file() for file in files)
    except (DamagedFile, OSError, ValueError, KeyError, TypeError):  # no such file, or not ours
        return False


def main(argv: list[str] | None = None) -> None:
    """Make the set, unless the folder contains it already."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--output-dir", type=any_path, required=True, help="new or empty folder")
    many, size = whole_number(1, MAX_IMAGES), whole_number(MIN_SIZE, MAX_SIZE)
    text = "(%(default)s)"
    parser.add_argument("--train-images", type=many, default=400, metavar="N", help=text)
    parser.add_argument("--val-images", type=many, default=80, metavar="N", help=text)
    parser.add_argument("--image-size", type=size, default=128, metavar="PIXELS", help=f"at least {MIN_SIZE} {text}")
    parser.add_argument("--seed", type=random_seed, default=0, metavar="N", help=text)
    arguments = vars(parser.parse_args(argv))
    output = arguments.pop("output_dir")
    info = {"description": "Handwritten digits on photographs", "version": VERSION, "arguments": arguments}
    if holds_same_set(output, info):
        print(printable(f"{output} already contains this set: nothing to do"))
        return
    check_output(output)
    sources, target = load_sources(), output.resolve()
    with writing(f"--output-dir {output}"):
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"{output} contains something else: name another --output-dir, or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Made in a temporary folder and moved at the end: a set in its place is complete.
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}-", dir=target.parent) as temporary:
            for part in ("images", "annotations"):
                (Path(temporary) / "set" / part).mkdir(parents=True)
            for split, source in zip(SPLITS, sources, strict=True):
                make_split(Path(temporary) / "set", split, source, info)
            (Path(temporary) / "set").rename(target)
    counts = f"{arguments['train_images']} training and {arguments['val_images']} validation images"
    print(printable(f"wrote {counts} to {output}"))


if __name__ == "__main__":
    run_program(main)
