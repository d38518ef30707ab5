"""Seconds and memory to read annotations at COCO train2017's size: the first start, later ones, and pycocotools.

The file is made up: polygons as long as COCO's, one object in 90 a crowd in run lengths, image files without contents.
Each start is a process of its own, timed without its imports; "at work" is the processor's time, which others on the
same machine slow less. Peak memory is the whole process's, PyTorch included, the peer's too. The worker is a forked
process that takes every image's objects once; its own memory is what it shares with no other process.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from benchmarks.rows import Row, in_process, peak_gib, row
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.sources import load_split
from direct_pt.flags import positive_integer

PART = "annotations"
IMAGES, OBJECTS_PER_IMAGE, CLASSES = 118_287, 860_001 / 118_287, 80
SIZES = ((480, 640), (640, 480), (427, 640))  # (height, width)
OUTLINES = 4096  # different ones; every object has one of them
READINGS = 100  # of the worker's memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much, and where."""
    parser.add_argument(
        "--images", type=positive_integer, default=IMAGES, metavar="N", help="images (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the made-up data here, and use them again")


def measure(args: argparse.Namespace) -> list[Row]:
    """The file, both kinds of start beside pycocotools, and a worker."""
    with _folder(args.folder) as folder:
        if not (folder / "labels.json").exists():
            make_data(folder, args.images)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            found = {
                what: json.loads(in_process(PART, what, str(folder), cache))
                for what in ("first", "pycocotools", "later", "worker")
            }
        megabytes = (folder / "labels.json").stat().st_size / 1e6
    rows = [row(PART, "annotation file", megabytes, "MB")]
    peer = found["pycocotools"]
    for what, seconds in (("first", "60 s"), ("later", "3 s")):
        one = found[what]
        name = f"{what} start"
        rows.append(row(PART, name, one["seconds"], "s", "pycocotools", peer["seconds"], f"under {seconds}"))
        rows.append(row(PART, f"{name}, at work", one["at_work"], "s", "pycocotools", peer["at_work"]))
        target = "under 3 GB" if what == "first" else None
        rows.append(row(PART, f"{name}, peak", one["gib"], "GiB", "pycocotools", peer["gib"], target))
    first, last = found["worker"]
    rows.append(row(PART, "a worker's own memory, first quarter", first, "MiB"))
    rows.append(row(PART, "the same, last quarter", last, "MiB", target="as the first quarter"))
    return rows


def make_data(folder: Path, images: int) -> None:
    """labels.json and pictures/ of a data set in COCO's form. A tenth of its images share half of the objects."""
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    names = [f"{number + 1:012d}.jpg" for number in range(images)]
    for name in names:
        (pictures / name).touch()
    sizes = rng.integers(len(SIZES), size=images)
    outlines = [_outline(rng) for _ in range(OUTLINES)]
    crowds = [[_crowd(rng, size) for _ in range(32)] for size in SIZES]
    objects = round(images * OBJECTS_PER_IMAGE)
    image_of = np.concatenate([rng.integers(images, size=objects // 2), rng.integers(-(-images // 10), size=objects)])
    chosen, labels = rng.integers(OUTLINES, size=objects), rng.integers(CLASSES, size=objects)
    with (folder / "unfinished.json").open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [{"id": 1, "name": "none"}], "images": [')
        for number, (name, kind) in enumerate(zip(names, sizes, strict=True)):
            height, width = SIZES[kind]
            record = {"license": 1, "file_name": name, "height": height, "width": width, "id": number + 1}
            record |= {"coco_url": f"http://localhost/train2017/{name}", "date_captured": "2013-11-14 16:28:13"}
            record |= {"flickr_url": f"http://localhost/{number:010d}_{number:010x}_z.jpg"}
            file.write(", " * (number > 0) + json.dumps(record))
        file.write('], "annotations": [')
        for number, (image, label) in enumerate(zip(image_of[:objects].tolist(), labels.tolist(), strict=True)):
            crowd = number % 90 == 89
            text = crowds[sizes[image]][number % 32] if crowd else outlines[chosen[number]]
            file.write(
                f'{", " * (number > 0)}{{{text}, "iscrowd": {int(crowd)}, "image_id": {image + 1}, '
                f'"category_id": {label + 1}, "id": {1_000_000 + number}}}'
            )
        categories = [{"supercategory": "thing", "id": number + 1, "name": f"c{number}"} for number in range(CLASSES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    (folder / "unfinished.json").rename(folder / "labels.json")


def _outline(rng: np.random.Generator) -> str:
    """The members that say where an object is: one polygon, or two, of as many corners as COCO's."""
    center, radius = rng.uniform([100, 100], [320, 300]), np.exp(rng.normal(3.4, 0.8)).clip(3, 95)
    polygons = []
    for part in range(1 + (rng.random() < 0.1)):
        corners = int(np.exp(rng.normal(2.8, 0.65)).clip(4, 200))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.7, 1, (corners, 1)) * radius
        polygons.append((center + 2 * radius * part + ring).round(2))
    points = np.concatenate(polygons)
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    box = [round(float(side), 2) for side in (*low, *extent)]
    text = [polygon.ravel().round(2).tolist() for polygon in polygons]
    return f'"segmentation": {json.dumps(text)}, "area": {extent.prod() * 0.6:.4f}, "bbox": {json.dumps(box)}'


def _crowd(rng: np.random.Generator, size: tuple[int, int]) -> str:
    """The same of a crowd region."""
    edges = np.sort(rng.choice(size[0] * size[1], size=400, replace=False))
    counts = np.diff([0, *edges, size[0] * size[1]]).tolist()
    outline = {"counts": counts, "size": list(size)}
    return f'"segmentation": {json.dumps(outline)}, "area": {sum(counts[1::2])}, "bbox": [1.0, 2.0, 300.5, 200.25]'


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(what: str, folder: str, cache: str) -> None:
    """One measurement, printed as JSON."""
    paths = CocoSplit(Path(folder, "pictures"), Path(folder, "labels.json"))
    os.environ["DIRECT_PT_CACHE"] = cache
    start, start_at_work = time.perf_counter(), time.process_time()
    if what == "pycocotools":
        with contextlib.redirect_stdout(io.StringIO()):
            COCO(str(paths.annotations))
    else:
        table = load_split(paths)
        table.require_masks()
    found = {"seconds": time.perf_counter() - start, "at_work": time.process_time() - start_at_work, "gib": peak_gib()}
    print(json.dumps(_worker(table) if what == "worker" else found))


def _worker(table: AnnotationTable) -> list[float]:
    """The MiB of its own that a worker holds over the first and over the last quarter of an epoch."""
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def epoch(sender: Connection) -> None:
        readings = []
        for number, image in enumerate(np.random.default_rng(0).permutation(len(table))):
            table.objects(int(image), with_masks=True)
            if number % max(1, len(table) // READINGS) == 0:
                readings.append(_own_mib())
        sender.send(readings)

    worker = get_context("fork").Process(target=epoch, args=(sender,))
    worker.start()
    sender.close()
    readings = receiver.recv()
    worker.join()
    quarter = len(readings) // 4
    return [float(np.mean(readings[:quarter])), float(np.mean(readings[-quarter:]))]


def _own_mib() -> float:
    """The memory that only this process holds, and would give back if it ended."""
    fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return sum(int(words[1]) for words in fields if words[0] == "Private_Dirty:") / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
