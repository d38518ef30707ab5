"""What tiles are worth: AP on images of 4000x3000 pixels with objects of 20, trained and tested on tiles or whole.

The images are made on the spot, of handwritten digits on photographs. Two small detectors are trained for the same
steps, one on tiles of 256 pixels and the whole images, one on whole images alone, and tested by the scripts themselves.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import make_demo_data as demo
from benchmarks.rows import Row, row, run_script
from direct_pt.files import read_json
from direct_pt.flags import any_path, positive_integer

SIZE = (3000, 4000)  # height, width
SIDES = (16, 24)  # of the digits, in pixels
OBJECTS = 80  # of an image
MARGIN = 2  # pixels between two
TILE = 256
IMAGES = {"train": 16, "val": 4}
DETECTOR = ("--model", "faster_rcnn_r50_fpn", "--backbone", "resnet18", "--channels", "64", "--rois-per-image", "32",
            "--proposals", "256", "--image-size", "160", "--micro-batch-size", "8", "--num-workers", "0",
            "--anchor-scale", "auto", "--cache", "raw", "--val-share", "0", "--eval-every", "10000")  # fmt: skip
ARMS = {"tiles": ("--train-tiles", str(TILE)), "whole images": ()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, and how long."""
    parser.add_argument("--output-dir", type=any_path, required=True, metavar="DIR", help="of the set and the runs")
    parser.add_argument("--steps", type=positive_integer, default=1500, metavar="N", help="of 8 images (1500)")


def measure(args: argparse.Namespace) -> list[Row]:
    """An AP for each way to train and to test."""
    data = args.output_dir / "data"
    if not data.exists():
        make_set(data)
    rows = []
    paths = ("--train-images", data / "images", "--train-annotations", data / "annotations/instances_train.json")
    for arm, flags in ARMS.items():
        run = args.output_dir / f"trained on {arm}"
        own = (*DETECTOR, *flags, "--max-steps", args.steps, "--output-dir", run, "--resume")
        run_script("pretrain", *paths, *own)
        for test, tiles in (("tiles", TILE), ("whole images", 0)):
            folder = args.output_dir / f"{arm} tested on {test}"
            run_script("evaluate", "--checkpoint", run, "--data", data, "--tiles", tiles, "--batch-size", 16,
                       "--num-workers", 1, "--output-dir", folder)  # fmt: skip
            metrics = read_json(folder / "metrics.json")["bbox"]
            setting = f"trained on {arm}, tested on {test}"
            rows += [row("tiles", f"{setting}: {name}", round(metrics[name], 4), "") for name in ("AP", "AP50")]
    return rows


def make_set(folder: Path) -> None:
    """Both splits in COCO's layout."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number, (split, source) in enumerate(zip(demo.SPLITS, demo.load_sources(), strict=True)):
        rng, images = np.random.default_rng([0, number]), []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, IMAGES[split] + 1):
            pixels, found = make_image(source, rng)
            name = f"{split}_{image_id}.png"
            Image.fromarray(pixels).save(folder / "images" / name, compress_level=1)
            images.append({"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            annotations += [
                {"id": len(annotations) + 1 + at, "image_id": image_id, **one} for at, one in enumerate(found)
            ]
        categories = [{"id": id_, "name": str(digit)} for digit, id_ in enumerate(demo.CATEGORY_IDS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def make_image(source: demo.Source, rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An image [3000, 4000, 3] uint8 and its annotations, without ids."""
    height, width = SIZE
    pixels, taken = demo.draw_background(source, width, rng)[:height], np.zeros(SIZE, bool)
    found: list[dict[str, Any]] = []
    while len(found) < OBJECTS:
        scan = int(rng.integers(len(source.scans)))
        alpha = demo.enlarge(source.scans[scan], rng.uniform(*SIDES))
        top, left = (
            int(rng.integers(MARGIN, side - length - MARGIN)) for side, length in zip(SIZE, alpha.shape, strict=True)
        )
        bottom, right = top + alpha.shape[0], left + alpha.shape[1]
        around = slice(top - MARGIN, bottom + MARGIN), slice(left - MARGIN, right + MARGIN)
        if taken[around].any():
            continue
        taken[around] = True
        window = pixels[top:bottom, left:right]
        window += alpha[..., None] * (demo.pick_colour(window, alpha, rng) - window)
        box = [left, top, alpha.shape[1], alpha.shape[0]]
        category = demo.CATEGORY_IDS[source.digits[scan]]
        found.append({"category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return pixels.round().clip(0, 255).astype(np.uint8), found
