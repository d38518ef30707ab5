"""From a detector and a table to COCO metrics: every image once, over all processes."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from tqdm import tqdm

from direct_pt.batch import Batch, Detections
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import Preset, evaluation_loader
from direct_pt.models.detector import Detector

# The twelve figures of COCO's summary, in its order. -1 where no object is of that size.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class Predictions:
    """The detections of a whole split.

    Attributes:
        images: [D] int64 rows of the annotation table, rising.
        boxes: [D, 4] float64 (x, y, width, height) in the original images' pixels.
        scores: [D] float64.
        labels: [D] int64 class indices.
        unreadable: rows of the images that could not be read; they have no detections.
    """

    images: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    unreadable: tuple[int, ...] = ()

    def coco(self, table: AnnotationTable) -> list[dict[str, Any]]:
        """In COCO's results format, with the table's own image and category ids."""
        ids = table.image_ids[self.images].tolist()
        categories = np.array(table.category_ids)[self.labels].tolist()
        rows = zip(ids, categories, self.boxes.tolist(), self.scores.tolist(), strict=True)
        return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]


def predict_split(
    detector: Detector,
    table: AnnotationTable,
    preset: Preset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
) -> Predictions:
    """Run the detector over every image of the table once, shared between the processes.

    Every process must call it; every process gets all predictions.
    """
    loader = evaluation_loader(
        table, preset, micro_batch_size, accelerator.process_index, accelerator.num_processes, num_workers
    )
    was_training = detector.training
    detector.eval()
    parts = []
    progress = tqdm(loader, desc="evaluate", unit="batch", disable=not accelerator.is_main_process, leave=False)
    with torch.no_grad(), accelerator.autocast():
        for batch in progress:
            # Packed as they come: on the device they would pile up, and be gathered as ragged tensors.
            parts.append(_pack(batch, detector.detect(batch.to(accelerator.device)).to("cpu")))
    detector.train(was_training)
    merged = gather_object([_concatenate(parts)])
    everything = _concatenate(merged)
    order = np.argsort(everything.images, kind="stable")
    return Predictions(
        everything.images[order],
        everything.boxes[order],
        everything.scores[order],
        everything.labels[order],
        tuple(sorted(everything.unreadable)),
    )


def evaluate(
    detector: Detector,
    table: AnnotationTable,
    preset: Preset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
) -> tuple[dict[str, Any], Predictions]:
    """Predictions of a split and their metrics, the same on every process. Every process must call it."""
    predictions = predict_split(detector, table, preset, micro_batch_size, accelerator, num_workers)
    metrics = [coco_metrics(table, predictions) if accelerator.is_main_process else None]
    broadcast_object_list(metrics)
    assert metrics[0] is not None
    return metrics[0], predictions


def coco_metrics(table: AnnotationTable, predictions: Predictions) -> dict[str, Any]:
    """COCO's figures: {"bbox": {"AP": ...}, "per_class": {class name: {"bbox": {"AP", "AP50"}, "objects"}}}.

    Equal to pycocotools' on the same files. -1 stands where there is no object to find.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(table.coco())
        scorer = COCOeval_faster(truth, truth.loadRes(predictions.coco(table)), iouType="bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision = scorer.eval["precision"]  # [IoU, recall, class, area, detections]
    real = np.bincount(table.labels[~table.crowd], minlength=len(table.class_names))
    per_class = {
        name: {
            "bbox": {"AP": _mean(precision[:, :, row, 0, -1]), "AP50": _mean(precision[0, :, row, 0, -1])},
            "objects": int(real[row]),
        }
        for row, name in enumerate(table.class_names)
    }
    figures = {name: float(value) for name, value in zip(METRICS, scorer.stats, strict=False)}
    return {"bbox": figures, "per_class": per_class}


def metrics_table(metrics: dict[str, Any]) -> str:
    """The figures and the classes that have objects, for people."""
    box = metrics["bbox"]
    lines = ["  ".join(f"{name} {box[name]:.3f}" for name in METRICS[:6])]
    width = max(len(name) for name in metrics["per_class"])
    lines.append(f"{'class':{width}}  objects     AP   AP50")
    for name, row in metrics["per_class"].items():
        if row["objects"]:
            lines.append(f"{name:{width}}  {row['objects']:7d}  {row['bbox']['AP']:.3f}  {row['bbox']['AP50']:.3f}")
    return "\n".join(lines)


def _mean(precision: np.ndarray) -> float:
    found = precision[precision > -1]
    return float(found.mean()) if found.size else -1.0


def _pack(batch: Batch, found: Detections) -> Predictions:
    """A batch's detections with the images' rows in the table; none of unreadable images."""
    images = batch.indices.numpy()[found.image.numpy()]
    boxes = found.boxes.numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    keep = ~np.isin(images, batch.unreadable)
    return Predictions(
        images[keep], boxes[keep], found.scores.numpy().astype(np.float64)[keep], found.labels.numpy()[keep],
        batch.unreadable,
    )  # fmt: skip


def _concatenate(parts: list[Predictions]) -> Predictions:
    empty = Predictions(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    parts = [empty, *parts]
    return Predictions(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.labels for part in parts]),
        tuple(row for part in parts for row in part.unreadable),
    )
