"""Stage-1 input: from JPEGs, or from the low-resolution cache, to a uint8 batch of 448x448, one core.

Images per CPU second of one process, in batches of 8: reading the file (from the page cache), decoding, resizing,
cropping, mirroring, boxes, masks, collating. Synthetic JPEGs: 640x480 of about 75 KB and 4000x3000 of about 2 MB, with
noise at several scales; 7 objects an image, 15 to 300 pixels large, polygons of 25 corners. Each figure is the median
of several passes over the images after a warm-up pass, ours and the peers' in turn.

The peers do the same job. "MMDetection's steps" are the operations of its stage-1 pipeline with the libraries that it
uses (OpenCV, pycocotools), normalising and padding on the CPU as it does; "torchvision" is its own decoder and
transforms v2, without normalising.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from pycocotools import mask as coco_mask
from torchvision.transforms import v2

from benchmarks.rows import Row, row, seconds
from benchmarks.synthetic import COCO_IMAGES, write_coco_images
from direct_pt.batch import collate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.image_cache import KINDS, ImageCache, open_image_cache
from direct_pt.data.loader import TrainingImages
from direct_pt.data.mixing import Mix
from direct_pt.data.sources import load_split
from direct_pt.flags import positive_integer
from direct_pt.models.detector import PIXEL_MEAN, PIXEL_STD
from direct_pt.transforms import PretrainPreset

BATCH = 8
SIDE = 448
PLAIN = PretrainPreset(SIDE)
AUGMENTATIONS: tuple[tuple[str, PretrainPreset, Mix | None, str | None], ...] = (  # name, preset, mix, target
    ("flips and turns", replace(PLAIN, flips="dihedral"), None, "85 % of the rate without"),
    ("colour jitter", replace(PLAIN, color_jitter=0.3), None, "85 % of the rate without"),
    ("scale jitter 0.5 1.5", replace(PLAIN, scale_range=(0.5, 1.5)), None, "85 % of the rate without"),
    ("scale jitter 0.1 2", replace(PLAIN, scale_range=(0.1, 2.0)), None, "85 % of the rate without"),
    ("half of them mosaics", PLAIN, Mix("mosaic", 0.5), "half of the rate without"),
    ("half of them copy-paste", PLAIN, Mix("copy-paste", 0.5), None),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The number of images and of passes."""
    parser.add_argument("--images", type=positive_integer, default=96, metavar="N", help="640x480 ones (96)")
    parser.add_argument("--repeats", type=positive_integer, default=5, metavar="N", help="passes over them (5)")


def measure(args: argparse.Namespace) -> list[Row]:
    """JPEGs, cache, large photographs."""
    torch.set_num_threads(1)
    timed = partial(seconds, repeats=args.repeats, clock=time.process_time)
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        table = synthetic_table(folder / "small", args.images, (480, 640))
        for masks, target in ((False, 400), (True, 300)):
            setting = "640x480 JPEG, boxes" + (" and masks" if masks else "")
            peers = {"MMDetection's steps": partial(mmdetection, table, masks)}
            if not masks:
                peers["torchvision"] = partial(torchvision_v2, table)
            ours, *theirs = timed(partial(load, table, masks), *peers.values())
            for peer, spent in zip(peers, theirs, strict=True):
                rows.append(rate(setting, len(table), ours, peer, spent, f"{target} images/s"))
        for setting, preset, mix, goal in AUGMENTATIONS:
            varied, plain = timed(partial(load, table, False, None, preset, mix), partial(load, table, False))
            rows.append(rate(f"640x480 JPEG, {setting}", len(table), varied, "without", plain, goal))
        for kind in KINDS:
            cache = open_image_cache(table, kind, SIDE, folder, 0)
            assert cache is not None
            for masks, target in ((False, 1800), (True, 700)):
                setting = f"{kind} cache, boxes" + (" and masks" if masks else "")
                from_cache, from_files = timed(partial(load, table, masks, cache), partial(load, table, masks))
                goal = f"{target} images/s" if kind == "raw" else None
                rows.append(rate(setting, len(table), from_cache, "from the files", from_files, goal))
            space = cache.gigabytes / len(table) * COCO_IMAGES
            goal = "at most 30 GB" if kind == "raw" else "at most 8 GB"
            rows.append(row("input", f"{kind} cache, {COCO_IMAGES:,} such images", space, "GB", target=goal))
        large = synthetic_table(folder / "large", 8, (3000, 4000))
        spent, theirs_spent = timed(partial(load, large, False), partial(mmdetection, large, False))
        peer = "MMDetection's steps"
        rows.append(rate("4000x3000 JPEG, boxes", len(large), spent, peer, theirs_spent, "45 images/s"))
    return rows


def synthetic_table(folder: Path, count: int, size: tuple[int, int]) -> AnnotationTable:
    """The table of a new COCO set: `count` JPEGs of `size` (height, width)."""
    write_coco_images(folder, count, size)
    return load_split(CocoSplit(folder / "images", folder / "labels.json"))


def rate(setting: str, images: int, ours: float, peer: str, theirs: float, target: str | None) -> Row:
    """Images a second, from the seconds of a pass, ours and the peer's."""
    return row("input", setting, images / ours, "images/s", peer, images / theirs, target)


def load(
    table: AnnotationTable,
    masks: bool,
    cache: ImageCache | None = None,
    preset: PretrainPreset = PLAIN,
    mix: Mix | None = None,
) -> None:
    """One pass as in training, with new random choices each time. Each batch is freed before the next, as in all."""
    images = TrainingImages(table, preset, 0, masks, cache, mix)
    epoch = time.perf_counter_ns()
    for start in range(0, len(table), BATCH):
        collate([images[epoch, image] for image in range(start, min(start + BATCH, len(table)))])


def mmdetection(table: AnnotationTable, masks: bool) -> None:
    """One pass of LoadImage, LoadAnnotations, Resize, RandomCrop, RandomFlip, Normalize, Pad."""
    rng = np.random.default_rng()
    mean, std = (np.array(values, np.float64).reshape(1, 3) for values in (PIXEL_MEAN, PIXEL_STD))
    for start in range(0, len(table), BATCH):
        images = []
        for index in range(start, min(start + BATCH, len(table))):
            image: Any = cv2.imdecode(np.frombuffer(table.path(index).read_bytes(), np.uint8), cv2.IMREAD_COLOR)
            objects = table.objects(index, masks)
            height, width = image.shape[:2]
            outlines = [[ring.ravel().tolist() for ring in outline] for outline in objects.segmentations or []]
            runs = [coco_mask.merge(coco_mask.frPyObjects(rings, height, width)) for rings in outlines]
            bitmaps = [coco_mask.decode(run) for run in runs]
            scale = SIDE * rng.uniform(0.8, 1.2) / max(height, width)
            size = (int(width * scale + 0.5), int(height * scale + 0.5))
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            bitmaps = [cv2.resize(bitmap, size, interpolation=cv2.INTER_NEAREST) for bitmap in bitmaps]
            boxes = (objects.boxes * scale).astype(np.float32)
            top, left = (int(rng.integers(max(side - SIDE, 0) + 1)) for side in image.shape[:2])
            image = image[top : top + SIDE, left : left + SIDE]
            bitmaps = [bitmap[top : top + SIDE, left : left + SIDE] for bitmap in bitmaps]
            boxes = (boxes - np.array([left, top] * 2)).clip(0, [image.shape[1], image.shape[0]] * 2)
            if rng.random() < 0.5:
                image, bitmaps = cv2.flip(image, 1), [bitmap[:, ::-1] for bitmap in bitmaps]
                boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
            image = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2RGB)
            cv2.subtract(image, mean, image)
            cv2.multiply(image, 1 / std, image)
            border = (0, SIDE - image.shape[0], 0, SIDE - image.shape[1], cv2.BORDER_CONSTANT)
            image = cv2.copyMakeBorder(image, *border, value=0)
            if bitmaps:
                torch.from_numpy(np.stack([cv2.copyMakeBorder(np.ascontiguousarray(b), *border) for b in bitmaps]))
            images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
        torch.stack(images)


def torchvision_v2(table: AnnotationTable) -> None:
    """One pass of its decoder and transforms, boxes with the images."""
    flip, crop = v2.RandomHorizontalFlip(), v2.RandomCrop(SIDE, pad_if_needed=True)
    for start in range(0, len(table), BATCH):
        images = []
        for index in range(start, min(start + BATCH, len(table))):
            image = torchvision.io.decode_image(str(table.path(index)), torchvision.io.ImageReadMode.RGB)
            boxes = torch.from_numpy(table.objects(index, False).boxes)
            sample = (
                torchvision.tv_tensors.Image(image),
                torchvision.tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:]),
            )
            side = int(SIDE * np.random.uniform(0.8, 1.2))
            resize = v2.Resize(side * min(image.shape[1:]) // max(image.shape[1:]))
            images.append(flip(crop(resize(sample)))[0])
        torch.stack(images)
