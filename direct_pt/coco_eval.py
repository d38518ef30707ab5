"""From a detector and a table to COCO metrics: every image once, over all processes."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask
from tqdm import tqdm

from direct_pt.batch import Batch, Detections
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import evaluation_loader, read_batches
from direct_pt.distributed.launch import autocast
from direct_pt.distributed.processes import gather_to_main
from direct_pt.models.detector import Detector
from direct_pt.models.masks import MASK_THRESHOLD, encode_masks, paste_windows
from direct_pt.transforms import TestPreset

ENCODED_AT_ONCE = 64  # masks

# The twelve figures of COCO's summary, in its order. -1 where no object is of that size.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class Predictions:
    """The detections of a whole split.

    Attributes:
        images: [D] int64 rows of the annotation table, rising.
        boxes: [D, 4] float64 (x, y, width, height) in the original images' pixels.
        scores: [D] float64.
        labels: [D] int64 rows of the table's classes.
        unreadable: rows of the images that could not be read; they have no detections.
        masks: [D] COCO's compressed run lengths in the original images, {"size": [height, width], "counts": text}; None
            of box detectors.
    """

    images: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    unreadable: tuple[int, ...] = ()
    masks: list[dict[str, Any]] | None = None

    def coco(self, table: AnnotationTable) -> list[dict[str, Any]]:
        """In COCO's results format, with the table's own image and category ids; masks as "segmentation"."""
        ids = table.image_ids[self.images].tolist()
        categories = np.array(table.category_ids)[self.labels].tolist()
        rows = zip(ids, categories, self.boxes.tolist(), self.scores.tolist(), strict=True)
        results = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]
        if self.masks is not None:
            for result, mask in zip(results, self.masks, strict=True):
                result["segmentation"] = mask
        return results


def predict_split(
    detector: Detector,
    table: AnnotationTable,
    preset: TestPreset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
    between_batches: Callable[[], None] = lambda: None,
) -> Predictions:
    """Run the detector over every image of the table once, shared between the processes.

    The detector and the table list the same category ids, in any order. Every process must call it; the main
    one gets all predictions, the others none.
    """
    loader = evaluation_loader(
        table, preset, micro_batch_size, accelerator.process_index, accelerator.num_processes, num_workers
    )
    classes = np.array([table.category_ids.index(category) for category in detector.config.category_ids])
    was_training = detector.training
    detector.eval()
    parts = []
    quiet = not accelerator.is_main_process
    with torch.no_grad(), autocast(accelerator), contextlib.closing(read_batches(loader)) as batches:
        for batch in tqdm(batches, desc="evaluate", unit="batch", disable=quiet, leave=False):
            # Packed as they come: on the device they would pile up, and be gathered as ragged tensors.
            between_batches()
            parts.append(_pack(batch, detector.detect(batch.to(accelerator.device)).to("cpu"), classes))
    detector.train(was_training)
    merged = gather_to_main(_concatenate(parts), accelerator)
    everything = _concatenate(merged)
    order = np.argsort(everything.images, kind="stable")
    return Predictions(
        everything.images[order],
        everything.boxes[order],
        everything.scores[order],
        everything.labels[order],
        tuple(sorted(everything.unreadable)),
        None if everything.masks is None else [everything.masks[row] for row in order],
    )


def evaluate(
    detector: Detector,
    table: AnnotationTable,
    preset: TestPreset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], Predictions]:
    """A split's metrics, the same on every process, and its predictions, on the main one. Every process must call it.

    `between_batches` is called before each batch, and may raise to end it.

    Raises:
        InputError: the detector finds masks, and objects of the split have none to compare with.
    """
    if detector.has_masks:
        table.require_masks()
    predictions = predict_split(detector, table, preset, micro_batch_size, accelerator, num_workers, between_batches)
    metrics = [coco_metrics(table, predictions) if accelerator.is_main_process else None]
    broadcast_object_list(metrics)
    assert metrics[0] is not None
    return metrics[0], predictions


def coco_metrics(table: AnnotationTable, predictions: Predictions) -> dict[str, Any]:
    """COCO's figures: {"bbox": {"AP": ...}, "per_class": {class name: {"bbox": {"AP", "AP50"}, "objects"}}}.

    Where there are masks, also "segm", beside each "bbox". Equal to pycocotools' on the same files. -1 stands where
    there is no object to find.
    """
    areas = {"bbox": predictions.boxes[:, 2] * predictions.boxes[:, 3]}
    if predictions.masks is not None:  # a detection is as large as its mask then, which its box would hide
        areas["segm"] = np.array([coco_mask.area(mask) for mask in predictions.masks], np.float64)
    totals = {kind: COCOeval_faster(iouType=kind) for kind in areas}
    for total in totals.values():
        sides = [len(getattr(total.params, name)) for name in ("iouThrs", "recThrs", "areaRng", "maxDets")]
        shape = (*sides[:2], len(table.class_names), *sides[2:])  # [IoU, recall, class, area, detections]
        total.eval = {"precision": np.full(shape, -1.0), "recall": np.full(shape[:1] + shape[2:], -1.0)}
    with _no_cycle_collector():
        for label, rows, truth, found in _classes(table, predictions):
            for kind, total in totals.items():
                for result, area in zip(found.dataset["annotations"], areas[kind][rows].tolist(), strict=True):
                    result["area"] = area
                scorer = COCOeval_faster(truth, found, iouType=kind)
                scorer.evaluate()
                scorer.accumulate()
                for name, figures in total.eval.items():
                    np.moveaxis(figures, -3, 0)[label] = np.moveaxis(scorer.eval[name], -3, 0)[0]
    for total in totals.values():
        total.summarize()
    metrics: dict[str, Any] = {
        kind: {name: float(value) for name, value in zip(METRICS, total.stats, strict=False)}
        for kind, total in totals.items()
    }
    real = np.bincount(table.labels[~table.crowd], minlength=len(table.class_names))
    metrics["per_class"] = {
        name: {
            kind: {"AP": _mean(precision[:, :, row, 0, -1]), "AP50": _mean(precision[0, :, row, 0, -1])}
            for kind, precision in ((kind, total.eval["precision"]) for kind, total in totals.items())
        }
        | {"objects": int(real[row])}
        for row, name in enumerate(table.class_names)
    }
    return metrics


def metrics_table(metrics: dict[str, Any]) -> str:
    """The figures and the classes that have objects, for people."""
    kinds = {"bbox": "box ", "segm": "mask "} if "segm" in metrics else {"bbox": ""}
    width, margin = (max(map(len, names)) for names in (metrics["per_class"], kinds.values()))
    lines = [
        f"{title:{margin}}" + "  ".join(f"{name} {metrics[kind][name]:.3f}" for name in METRICS[:6])
        for kind, title in kinds.items()
    ]
    columns = [(kind, name, f"{title + name:>5}") for kind, title in kinds.items() for name in ("AP", "AP50")]
    lines.append("  ".join([f"{'class':{width}}", "objects", *(label for _, _, label in columns)]))
    for class_name, row in metrics["per_class"].items():
        if row["objects"]:
            figures = [f"{row[kind][name]:{len(label)}.3f}" for kind, name, label in columns]
            lines.append("  ".join([f"{class_name:{width}}", f"{row['objects']:7d}", *figures]))
    return "\n".join(lines)


def mask_run_lengths(probabilities: np.ndarray, boxes: np.ndarray, sizes: np.ndarray) -> list[dict[str, Any]]:
    """Detections' masks as COCO's compressed run lengths.

    Args:
        probabilities: [D, m, m] inside the boxes.
        boxes: [D, 4] (x1, y1, x2, y2) in the original images' pixels.
        sizes: [D, 2] (height, width) of those images.
    """
    encoded: list[dict[str, Any]] = []
    for first in range(0, len(boxes), ENCODED_AT_ONCE):
        some = slice(first, first + ENCODED_AT_ONCE)
        windows = paste_windows(probabilities[some], boxes[some], sizes[some])
        found = [(corner, inside >= MASK_THRESHOLD) for corner, inside in windows]
        encoded += encode_masks([corner for corner, _ in found], [mask for _, mask in found], sizes[some])
    return encoded


def _classes(table: AnnotationTable, predictions: Predictions) -> Iterator[tuple[int, np.ndarray, COCO, COCO]]:
    """Each class that has objects: its row, its detections' rows, its objects and its detections for COCO's scorer.

    A class at a time, because Python takes many times the packed size for each detection.
    """
    content = table.coco() if predictions.masks is None else _truth_with_masks(table)
    objects: list[list[dict[str, Any]]] = [[] for _ in table.class_names]
    for annotation, label in zip(content["annotations"], table.labels.tolist(), strict=True):
        objects[label].append(annotation)
    image_of = table.image_of_object()
    order = np.argsort(predictions.labels, kind="stable")
    starts = np.searchsorted(predictions.labels[order], np.arange(len(table.class_names) + 1))
    for label in np.unique(table.labels[~table.crowd]).tolist():
        rows = order[starts[label] : starts[label + 1]]
        found_in, present = predictions.images[rows], np.unique(image_of[table.labels == label])
        results = _results(table, predictions, rows)
        if predictions.masks is not None:  # the others' are compared with nothing
            for place in np.flatnonzero(np.isin(found_in, present)).tolist():
                results[place]["segmentation"] = predictions.masks[rows[place]]
        shared = {
            "images": [content["images"][image] for image in np.union1d(found_in, present).tolist()],
            "categories": [content["categories"][label]],
        }
        yield label, rows, COCO({**shared, "annotations": objects[label]}), COCO({**shared, "annotations": results})


def _results(table: AnnotationTable, predictions: Predictions, rows: np.ndarray) -> list[dict[str, Any]]:
    """Some detections' boxes in COCO's results format, numbered from 1 on."""
    ids = table.image_ids[predictions.images[rows]].tolist()
    categories = np.array(table.category_ids)[predictions.labels[rows]].tolist()
    values = zip(ids, categories, predictions.boxes[rows].tolist(), predictions.scores[rows].tolist(), strict=True)
    return [
        {"id": number, "image_id": i, "category_id": c, "bbox": b, "score": s}
        for number, (i, c, b, s) in enumerate(values, start=1)
    ]


@contextlib.contextmanager
def _no_cycle_collector() -> Iterator[None]:
    """Python's collector of cycles is off: it would go through every detection again and again, and find none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _truth_with_masks(table: AnnotationTable) -> dict[str, Any]:
    """The annotations with an outline each, as COCO's tools need it.

    Those may lack one that nothing learns from: crowd regions, and objects under a pixel. Their box stands in.
    """
    truth = table.coco(with_masks=True)
    corners = table.corner_boxes()
    for row in np.flatnonzero(~table.segmentations.present()):
        x1, y1, x2, y2 = corners[row].tolist()
        truth["annotations"][row]["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    return truth


def _mean(precision: np.ndarray) -> float:
    found = precision[precision > -1]
    return float(found.mean()) if found.size else -1.0


def _pack(batch: Batch, found: Detections, classes: np.ndarray) -> Predictions:
    """A batch's detections with the images' rows and the `classes` of the table; none of unreadable images."""
    found = found.keep(~torch.isin(batch.indices[found.image], torch.tensor(batch.unreadable, dtype=torch.int64)))
    corners = found.boxes.numpy()
    boxes = corners.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    masks = None
    if found.masks is not None:
        masks = mask_run_lengths(found.masks.numpy(), corners, batch.original_sizes[found.image].numpy())
    return Predictions(
        batch.indices[found.image].numpy(),
        boxes,
        found.scores.numpy().astype(np.float64),
        classes[found.labels.numpy()],
        batch.unreadable,
        masks,
    )


def _concatenate(parts: list[Predictions]) -> Predictions:
    """One after another. A process without images has none to say whether there are masks: the others do."""
    masks = [part.masks for part in parts if part.masks is not None]
    empty = Predictions(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    parts = [empty, *parts]
    return Predictions(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
        tuple(row for part in parts for row in part.unreadable),
        list(chain.from_iterable(masks)) if masks else None,
    )
