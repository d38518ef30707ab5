"""Synthetic data sets for the benchmarks: annotations of COCO's size, JPEGs, parquet shards, batches of noise.

The set of the metrics, with its detections, is in evaluation.py.
"""

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from direct_pt.batch import Batch

COCO_IMAGES, COCO_OBJECTS = 118_287, 860_001  # of train2017
COCO_SIZES = ((480, 640), (640, 480), (427, 640))  # (height, width)
CLASSES = 80
OUTLINES = 4096  # different ones; every object has one of them


def write_coco_annotations(folder: Path, images: int) -> None:
    """labels.json and pictures/ (empty files) of a COCO set. A tenth of its images have half of the objects.

    Polygons are as long as COCO's; one object in 90 is a crowd region, in run lengths.
    """
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    names = [f"{number + 1:012d}.jpg" for number in range(images)]
    for name in names:
        (pictures / name).touch()
    sizes = rng.integers(len(COCO_SIZES), size=images)
    outlines = [_outline_members(rng) for _ in range(OUTLINES)]
    crowds = [[_crowd_members(rng, size) for _ in range(32)] for size in COCO_SIZES]
    objects = round(images * COCO_OBJECTS / COCO_IMAGES)
    image_of = np.concatenate([rng.integers(images, size=objects // 2), rng.integers(-(-images // 10), size=objects)])
    chosen, labels = rng.integers(OUTLINES, size=objects), rng.integers(CLASSES, size=objects)
    with (folder / "unfinished.json").open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [{"id": 1, "name": "none"}], "images": [')
        for number, (name, kind) in enumerate(zip(names, sizes, strict=True)):
            height, width = COCO_SIZES[kind]
            record = {"license": 1, "file_name": name, "height": height, "width": width, "id": number + 1}
            record |= {"coco_url": f"http://localhost/train2017/{name}", "date_captured": "2013-11-14 16:28:13"}
            record |= {"flickr_url": f"http://localhost/{number:010d}_{number:010x}_z.jpg"}
            file.write(", " * (number > 0) + json.dumps(record))
        file.write('], "annotations": [')
        for number, (image, label) in enumerate(zip(image_of[:objects].tolist(), labels.tolist(), strict=True)):
            crowd = number % 90 == 89
            members = crowds[sizes[image]][number % 32] if crowd else outlines[chosen[number]]
            file.write(
                f'{", " * (number > 0)}{{{members}, "iscrowd": {int(crowd)}, "image_id": {image + 1}, '
                f'"category_id": {label + 1}, "id": {1_000_000 + number}}}'
            )
        categories = [{"supercategory": "thing", "id": number + 1, "name": f"c{number}"} for number in range(CLASSES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    (folder / "unfinished.json").rename(folder / "labels.json")


def _outline_members(rng: np.random.Generator) -> str:
    """The JSON members of an object's outline: one polygon, or two, with as many corners as COCO's."""
    center, radius = rng.uniform([100, 100], [320, 300]), np.exp(rng.normal(3.4, 0.8)).clip(3, 95)
    polygons = []
    for part in range(1 + (rng.random() < 0.1)):
        corners = int(np.exp(rng.normal(2.8, 0.65)).clip(4, 200))
        polygons.append((center + 2 * radius * part + polygon(rng, corners, radius, 0.7)).round(2))
    points = np.concatenate(polygons)
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    box = [round(float(side), 2) for side in (*low, *extent)]
    text = [ring.ravel().round(2).tolist() for ring in polygons]
    return f'"segmentation": {json.dumps(text)}, "area": {extent.prod() * 0.6:.4f}, "bbox": {json.dumps(box)}'


def _crowd_members(rng: np.random.Generator, size: tuple[int, int]) -> str:
    """The JSON members of a crowd region in an image of `size`."""
    edges = np.sort(rng.choice(size[0] * size[1], size=400, replace=False))
    counts = np.diff([0, *edges, size[0] * size[1]]).tolist()
    outline = {"counts": counts, "size": list(size)}
    return f'"segmentation": {json.dumps(outline)}, "area": {sum(counts[1::2])}, "bbox": [1.0, 2.0, 300.5, 200.25]'


def polygon(rng: np.random.Generator, corners: int, radius: float, least: float) -> np.ndarray:
    """[corners, 2] points (x, y) around the origin, at `least` to 1 times the radius from it."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(least, 1, (corners, 1)) * radius


def write_coco_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """labels.json and images/ of a COCO set: `count` JPEGs of `size` (height, width), 7 objects each."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    height, width = size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    distinct = [jpeg(rng, size) for _ in range(min(count, 4))]
    for number in range(count):
        name = f"{number}.jpg"
        (folder / "images" / name).write_bytes(distinct[number % len(distinct)])
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for _ in range(7):
            radius = np.exp(rng.uniform(np.log(15), np.log(300))) / 2 * max(size) / 640
            ring = polygon(rng, 25, radius, 0.6)
            corners = (rng.uniform([0, 0], [width, height]) + ring).clip(0, [width, height]).round(2)
            (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [corners.ravel().tolist()]}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, **box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "labels.json").write_text(json.dumps(content))


def jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG of noise at all scales, for photographs have detail at all scales."""
    total = np.zeros((*size, 3), np.float32)
    for cells in (cells for cells in (4, 16, 64, 256, 640, 1500, 3000) if cells <= size[1]):
        noise = rng.normal(size=(cells * 3 // 4, cells, 3)).astype(np.float32)
        total += cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC) / cells**0.5
    pixels = (128 + 110 * total).clip(0, 255).astype(np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        return file.getvalue()


def write_parquet(folder: Path, rows: int, shards: int, side: int) -> None:
    """Parquet shards of a training split: rows of one JPEG of noise, side x side, and three boxes."""
    import datasets  # not above: the memory of other benchmarks' processes is measured

    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8)).save(file, "JPEG")
    names = datasets.List(datasets.ClassLabel(names=["a", "b", "c"]))
    boxes = datasets.List(datasets.List(datasets.Value("float64")))
    features = datasets.Features(image=datasets.Image(), objects={"bbox": boxes, "category": names})
    datasets.disable_progress_bars()
    for shard in range(shards):
        content = [
            {
                "image": {"bytes": file.getvalue(), "path": None},
                "objects": {"bbox": rng.uniform(1, side / 2, (3, 4)).tolist(), "category": [0, 1, 2]},
            }
            for _ in range(rows // shards)
        ]
        part = datasets.Dataset.from_list(content, features=features)
        part.to_parquet(str(folder / f"train-{shard:05d}-of-{shards:05d}.parquet"))


def noise_batch(count: int, side: int, objects: int = 7) -> Batch:
    """`count` images of noise, side x side, with boxes of all sizes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=draw).permute(0, 3, 1, 2)
    sides = torch.exp(torch.rand(count, objects, 2, generator=draw) * 2.5) * side / 16
    centres = sides / 2 + torch.rand(count, objects, 2, generator=draw) * (side - sides)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
    size = torch.full((count, 2), side)
    return Batch(
        images,
        sizes=size,
        padded_sizes=size,
        original_sizes=size,
        scales=torch.ones(count, 2),
        indices=torch.arange(count),
        seeds=torch.arange(count),
        boxes=boxes,
        labels=torch.randint(CLASSES, (count, objects), generator=draw),
        valid=torch.ones(count, objects, dtype=torch.bool),
        crowd=torch.zeros(count, objects, dtype=torch.bool),
    )
