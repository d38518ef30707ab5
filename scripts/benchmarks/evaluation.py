"""COCO metrics of a synthetic set beside pycocotools, and masks from the network's output to run lengths.

The set has images of 640x480, 7.2 objects of 80 classes and 100 detections an image, 1 % of the objects crowd regions.
Half of the detections are moved objects, four of five with the right class; the others are boxes of any size, place
and class. Timed, in a process each:

* from files: from annotations and results, both JSON, to the twelve figures. Ours reads both into arrays and also
  gives the figures of each class; the peer is COCO(file), loadRes(file), evaluate, accumulate, summarize, for masks a
  second time with the boxes left out of the results.
* from arrays: from the annotation table and the detections in memory, as after each evaluation in training. The peer's
  time is the same as above: it starts from files.
* the report: from the figures to report.html and report.json, intervals and pictures included; its megabytes beside it.

Seconds are the process's own processor time. The peak memory is of the whole process; the libraries, torch among them,
take 0.7 GiB of it in each, the peer's too. With --masks, objects have polygons (crowd regions run lengths), detections
have run lengths, and the masks' figures are computed beside the boxes'. The last row times 28x28 probabilities and
their boxes to run lengths in the image; the peer is torchvision's paste_masks_in_image and pycocotools' encode on the
same masks.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.rows import Row, in_process, peak_gib, row, seconds
from direct_pt.coco_eval import METRICS, Predictions, coco_metrics
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.sources import load_split
from direct_pt.files import write_json
from direct_pt.flags import positive_integer
from direct_pt.models.mask_encoding import mask_run_lengths
from direct_pt.reports.evaluation import Judged, analyse
from direct_pt.reports.evaluation_page import write_evaluation_page

HEIGHT, WIDTH = 480, 640
OBJECTS, DETECTIONS, CLASSES = 7.2, 100, 80  # an image, an image, in all
CELLS = 28  # a side of the network's masks
PASTED = 400  # detections
BLOCK = 2**20  # bytes of results that are parsed together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the set, and what is measured."""
    parser.add_argument(
        "--images", type=positive_integer, default=5000, metavar="N", help="of the synthetic set (default: 5000)"
    )
    parser.add_argument("--masks", action="store_true", help="objects and detections have masks too")
    parser.add_argument("--no-peer", action="store_true", help="without pycocotools, which takes minutes")


def measure(args: argparse.Namespace) -> list[Row]:
    """Seconds and memory of the metrics, the difference of the figures, and milliseconds a pasted mask."""
    peer = None if args.no_peer else "pycocotools"
    if peer and not find_spec(peer):
        print(f"{peer} is not installed: measured without it")
        peer = None
    with tempfile.TemporaryDirectory() as folder:
        in_process("evaluation", "make", folder, str(args.images), str(int(args.masks)))
        ours, arrays, report = (
            json.loads(in_process("evaluation", how, folder)) for how in ("files", "arrays", "report")
        )
        theirs = json.loads(in_process("evaluation", peer, folder)) if peer else {}
    rows = []
    name = f"{args.images} images, {'boxes and masks' if args.masks else 'boxes'}"
    for how, measured, target in (("files", ours, "1/20 of the peer's"), ("arrays", arrays, "1/40 of the peer's")):
        rows.append(row("evaluation", f"{name}, from {how}", measured["s"], "s", peer, theirs.get("s"), target))
        peak = theirs.get("gib")
        rows.append(row("evaluation", f"{name}, from {how}: peak", measured["gib"], "GiB", peer, peak, "under 1.4"))
    rows.append(row("evaluation", f"{name}: report", report["s"], "s", target="under 60"))
    rows.append(row("evaluation", f"{name}: report.html", report["mb"], "MB", target="under 15"))
    rows.append(row("evaluation", f"{name}: report, peak", report["gib"], "GiB"))
    if peer:
        pairs = zip(theirs["figures"], ours["figures"], arrays["figures"], strict=True)
        difference = max(max(abs(a - b), abs(a - c)) for a, b, c in pairs)
        rows.append(row("evaluation", f"{name}: largest difference", difference, "of the figures", target="0"))
    return rows + pasting(peer)


def pasting(peer: str | None) -> list[Row]:
    """Milliseconds a detection from the network's masks to run lengths."""
    probabilities, boxes = network_masks(np.random.default_rng(1))
    sizes = np.tile([HEIGHT, WIDTH], (PASTED, 1))

    def ours() -> list[dict[str, Any]]:
        return mask_run_lengths(probabilities, boxes, sizes)

    def theirs() -> list[dict[str, Any]]:
        return paste_with_torchvision(probabilities, boxes)

    name, per = "28x28 to run lengths in 640x480", 1000 / PASTED
    if peer is None:
        return [row("evaluation", name, seconds(ours, repeats=5)[0] * per, "ms a detection")]
    own, other = (spent * per for spent in seconds(ours, theirs, repeats=5))
    return [row("evaluation", name, own, "ms a detection", "torchvision, pycocotools", other)]


def network_masks(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, 28, 28] float32, an ellipse with soft and uneven borders each, and boxes [n, 4] float32."""
    y, x = np.meshgrid(*[(np.arange(CELLS) + 0.5) / CELLS * 2 - 1] * 2, indexing="ij")
    noise = rng.normal(0, 1, (PASTED, CELLS, CELLS)).cumsum(axis=1).cumsum(axis=2) / CELLS
    probabilities = 1 / (1 + np.exp(-(6 * (0.8 - np.hypot(x, y)) + noise)))
    boxes = random_boxes(rng, PASTED)
    boxes[:, 2:] += boxes[:, :2]
    return probabilities.astype(np.float32), boxes.astype(np.float32)


def paste_with_torchvision(probabilities: np.ndarray, boxes: np.ndarray) -> list[dict[str, Any]]:
    """100 at a time, as many as an image has: whole images of masks, then their run lengths."""
    import torch
    from pycocotools import mask as coco_mask
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    encoded = []
    for first in range(0, len(boxes), DETECTIONS):
        rows = slice(first, first + DETECTIONS)
        maps = torch.from_numpy(probabilities[rows])[:, None]
        pasted = paste_masks_in_image(maps, torch.from_numpy(boxes[rows]), (HEIGHT, WIDTH), padding=1)
        masks = (pasted[:, 0] >= 0.5).numpy().astype(np.uint8)
        encoded += coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    return encoded


# The synthetic set


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 4] float64 (x, y, width, height) inside the image: two fifths small, a quarter large, as in COCO."""
    side, aspect = rng.lognormal(np.log(45), 1.1, count), rng.lognormal(0, 0.4, count)
    sides = np.clip(np.stack([side * aspect, side / aspect], axis=1), 4, [WIDTH, HEIGHT])
    return np.concatenate([rng.random((count, 2)) * ([WIDTH, HEIGHT] - sides), sides], axis=1).round(2)


def outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """A polygon in a box, x, y, x, y, ..."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    reach = 0.5 * rng.uniform(0.8, 1, 24)
    points = box[:2] + box[2:] * (0.5 + np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach[:, None])
    return points.round(2).ravel().tolist()


def make(folder: Path, images: int, masks: bool) -> None:
    """Write annotations.json, results.json and arrays.npz (the detections) into `folder`."""
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    frequency = 1 / np.arange(3, CLASSES + 3)
    frequency /= frequency.sum()
    in_image = rng.choice(CLASSES, (images, 3), p=frequency)  # an image shows few classes

    count = round(images * OBJECTS)
    image_of = np.sort(rng.integers(images, size=count))
    labels = in_image[image_of, rng.integers(3, size=count)]
    objects = random_boxes(rng, count)
    crowd = rng.random(count) < 0.01
    annotations = []
    for number in range(count):
        polygon = outline(rng, objects[number])
        annotations.append(
            {
                "id": number + 1,
                "image_id": int(image_of[number]) + 1,
                "category_id": int(labels[number]) + 1,
                "bbox": objects[number].tolist(),
                "area": float(objects[number, 2] * objects[number, 3]) * 0.7,
                "iscrowd": int(crowd[number]),
                "segmentation": run_lengths(coco_mask, polygon) if crowd[number] else [polygon],
            }
        )
    (folder / "images").mkdir()
    names = [f"{number:06d}.jpg" for number in range(1, images + 1)]
    noise = np.random.default_rng(2).integers(256, size=(HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((WIDTH, HEIGHT)).save(folder / "image.jpg")
    for name in names:
        os.link(folder / "image.jpg", folder / "images" / name)  # metrics do not look into the images, the report does
    truth = {
        "images": [{"id": i, "file_name": n, "height": HEIGHT, "width": WIDTH} for i, n in enumerate(names, start=1)],
        "annotations": annotations,
        "categories": [{"id": number + 1, "name": f"class {number + 1}"} for number in range(CLASSES)],
    }
    (folder / "annotations.json").write_text(json.dumps(truth))

    # Half of an image's detections are near its objects, if it has any.
    found_in = np.repeat(np.arange(images), DETECTIONS)
    starts = np.searchsorted(image_of, np.arange(images + 1))
    here = np.diff(starts)[found_in]
    near = (rng.random(len(found_in)) < 0.5) & (here > 0)
    source = np.minimum(starts[found_in] + (rng.random(len(found_in)) * here).astype(int), count - 1)
    moved = rng.normal(0, rng.choice([0.02, 0.1, 0.3], (len(found_in), 1)), (len(found_in), 4))
    boxes = np.where(near[:, None], objects[source] + moved * objects[source][:, [2, 3, 2, 3]], 0)
    boxes[~near] = random_boxes(rng, int((~near).sum()))
    corners = np.clip(boxes[:, :2], 0, [WIDTH - 2, HEIGHT - 2])
    boxes = np.concatenate([corners, np.clip(boxes[:, 2:], 1, [WIDTH, HEIGHT] - corners)], axis=1).round(2)
    right = near & (rng.random(len(near)) < 0.8)
    guesses = np.where(rng.random(len(near)) < 0.5, in_image[found_in, 0], rng.choice(CLASSES, len(near), p=frequency))
    found_labels = np.where(right, labels[source], guesses)
    quality = np.exp(-np.abs(moved).sum(axis=1) * 2) * right
    scores = np.clip(0.1 + 0.8 * quality * rng.random(len(near)) + rng.normal(0, 0.05, len(near)), 0.01, 1).round(4)

    encoded = [run_lengths(coco_mask, outline(rng, box)) for box in boxes] if masks else []
    counts = "".join(mask["counts"] for mask in encoded).encode()
    np.savez(
        folder / "arrays.npz",
        images=found_in,
        boxes=boxes,
        scores=scores,
        labels=found_labels,
        counts=np.frombuffer(counts, np.uint8),
        lengths=np.array([len(mask["counts"]) for mask in encoded], np.int64),
    )
    values = zip(found_in.tolist(), found_labels.tolist(), boxes.tolist(), scores.tolist(), strict=True)
    results: list[dict[str, Any]] = [
        {"image_id": i + 1, "category_id": c + 1, "bbox": b, "score": s} for i, c, b, s in values
    ]
    for result, mask in zip(results, encoded, strict=False):
        result["segmentation"] = mask
    (folder / "results.json").write_text(json.dumps(results))


def run_lengths(coco_mask: Any, polygon: list[float]) -> dict[str, Any]:
    """COCO's compressed run lengths of one polygon."""
    encoded = coco_mask.frPyObjects([polygon], HEIGHT, WIDTH)[0]
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


# What each process measures: it prints seconds, peak memory and the figures as JSON.


def from_files(folder: Path) -> dict[str, Any]:
    """Ours, from both files."""
    start = time.process_time()
    table = load_split(CocoSplit(folder / "images", folder / "annotations.json"))
    predictions = read_results(folder / "results.json")
    figures = coco_metrics(table, predictions)
    return {"s": time.process_time() - start, "gib": peak_gib(), "figures": flat(figures)}


def in_memory(folder: Path) -> tuple[AnnotationTable, Predictions]:
    """The table and the detections."""
    table = load_split(CocoSplit(folder / "images", folder / "annotations.json"))
    with np.load(folder / "arrays.npz") as arrays:
        counts, ends = arrays["counts"].tobytes().decode(), np.cumsum(arrays["lengths"]).tolist()
        predictions = Predictions(*(arrays[name] for name in ("images", "boxes", "scores", "labels")))
    if ends:
        pairs = zip([0, *ends], ends, strict=False)
        predictions.masks = [{"size": [HEIGHT, WIDTH], "counts": counts[first:end]} for first, end in pairs]
    return table, predictions


def from_arrays(folder: Path) -> dict[str, Any]:
    """Ours, the table and the detections in memory."""
    table, predictions = in_memory(folder)
    start = time.process_time()
    figures = coco_metrics(table, predictions)
    return {"s": time.process_time() - start, "gib": peak_gib(), "figures": flat(figures)}


def report(folder: Path) -> dict[str, Any]:
    """Ours, from the figures to the page."""
    table, predictions = in_memory(folder)
    metrics = coco_metrics(table, predictions)
    start = time.process_time()
    judged = Judged.of(table, predictions, metrics)
    figures = analyse(judged)
    write_json(folder / "report.json", figures)
    write_evaluation_page(folder / "report.html", judged, figures, {"model": "none"})
    megabytes = (folder / "report.html").stat().st_size / 1e6
    return {"s": time.process_time() - start, "gib": peak_gib(), "mb": megabytes}


def read_results(path: Path) -> Predictions:
    """Results of this set, whose image and category ids count from 1, some rows at a time."""
    text, begin, parts = path.read_bytes(), 1, []
    gc.disable()  # as for annotations: what is read from JSON has no cycles
    while begin < len(text) - 1:
        end = text.find(b', {"image_id"', begin + BLOCK)
        end = len(text) - 1 if end < 0 else end
        results = json.loads(b"[" + text[begin:end] + b"]")
        begin = end + 1
        images, boxes, scores, labels = (
            np.array([result[name] for result in results]) for name in ("image_id", "bbox", "score", "category_id")
        )
        masks = [result["segmentation"] for result in results] if "segmentation" in results[0] else None
        parts.append(Predictions(images - 1, boxes, scores, labels - 1, masks=masks))
    gc.enable()
    return Predictions.concatenate(parts)


def with_pycocotools(folder: Path) -> dict[str, Any]:
    """The peer, from both files."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    start = time.process_time()
    figures: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "annotations.json"))
        kinds = ["bbox"]
        for kind in kinds:
            results = json.loads((folder / "results.json").read_bytes())
            if kind == "bbox" and "segmentation" in results[0]:
                kinds.append("segm")
            if kind == "segm":  # as the results of a mask challenge are handed in
                for result in results:
                    del result["bbox"]
            scorer = COCOeval(truth, truth.loadRes(results), kind)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
            figures += scorer.stats.tolist()
    return {"s": time.process_time() - start, "gib": peak_gib(), "figures": figures}


def flat(figures: dict[str, Any]) -> list[float]:
    """The twelve figures of the boxes, then those of the masks."""
    return [figures[kind][name] for kind in ("bbox", "segm") if kind in figures for name in METRICS]


TASKS = {"files": from_files, "arrays": from_arrays, "report": report, "pycocotools": with_pycocotools}

if __name__ == "__main__":
    task, folder = sys.argv[1], Path(sys.argv[2])
    os.environ["DIRECT_PT_CACHE"] = str(folder / "cache")  # read from files, not from what an earlier run left
    if task == "make":
        make(folder, int(sys.argv[3]), sys.argv[4] == "1")
    else:
        print(json.dumps(TASKS[task](folder)))
