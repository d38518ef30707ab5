"""From a detector and a table to COCO metrics: every image once, over all processes."""

import contextlib
import io
from dataclasses import dataclass
from itertools import chain
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
from direct_pt.models.masks import THRESHOLD, encode_mask, paste_mask

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
    preset: Preset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
) -> Predictions:
    """Run the detector over every image of the table once, shared between the processes.

    The detector and the table list the same category ids, in any order. Every process must call it; every process gets
    all predictions.
    """
    loader = evaluation_loader(
        table, preset, micro_batch_size, accelerator.process_index, accelerator.num_processes, num_workers
    )
    classes = np.array([table.category_ids.index(category) for category in detector.config.category_ids])
    was_training = detector.training
    detector.eval()
    parts = []
    progress = tqdm(loader, desc="evaluate", unit="batch", disable=not accelerator.is_main_process, leave=False)
    with torch.no_grad(), accelerator.autocast():
        for batch in progress:
            # Packed as they come: on the device they would pile up, and be gathered as ragged tensors.
            parts.append(_pack(batch, detector.detect(batch.to(accelerator.device)).to("cpu"), classes))
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
        None if everything.masks is None else [everything.masks[row] for row in order],
    )


def evaluate(
    detector: Detector,
    table: AnnotationTable,
    preset: Preset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
) -> tuple[dict[str, Any], Predictions]:
    """Predictions of a split and their metrics, the same on every process. Every process must call it.

    Raises:
        InputError: the detector finds masks, and objects of the split have none to compare with.
    """
    if detector.has_masks:
        table.require_masks()
    predictions = predict_split(detector, table, preset, micro_batch_size, accelerator, num_workers)
    metrics = [coco_metrics(table, predictions) if accelerator.is_main_process else None]
    broadcast_object_list(metrics)
    assert metrics[0] is not None
    return metrics[0], predictions


def coco_metrics(table: AnnotationTable, predictions: Predictions) -> dict[str, Any]:
    """COCO's figures: {"bbox": {"AP": ...}, "per_class": {class name: {"bbox": {"AP", "AP50"}, "objects"}}}.

    Where there are masks, also "segm", beside each "bbox". Equal to pycocotools' on the same files. -1 stands where
    there is no object to find.
    """
    with_masks = predictions.masks is not None
    figures: dict[str, Any] = {}
    precisions: dict[str, np.ndarray] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(_truth_with_masks(table) if with_masks else table.coco())
        for kind in ("bbox", "segm") if with_masks else ("bbox",):
            results = predictions.coco(table)
            if kind == "segm":  # a detection is as large as its mask then, which a box would hide
                results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
            scorer = COCOeval_faster(truth, truth.loadRes(results), iouType=kind)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
            figures[kind] = {name: float(value) for name, value in zip(METRICS, scorer.stats, strict=False)}
            precisions[kind] = scorer.eval["precision"]  # [IoU, recall, class, area, detections]
    real = np.bincount(table.labels[~table.crowd], minlength=len(table.class_names))
    figures["per_class"] = {
        name: {
            kind: {"AP": _mean(precision[:, :, row, 0, -1]), "AP50": _mean(precision[0, :, row, 0, -1])}
            for kind, precision in precisions.items()
        }
        | {"objects": int(real[row])}
        for row, name in enumerate(table.class_names)
    }
    return figures


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


def mask_run_lengths(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """A detection's mask as COCO's compressed run lengths.

    Args:
        probabilities: [m, m] inside the box.
        box: (x1, y1, x2, y2) in the original image's pixels.
        size: (height, width) of that image.
    """
    corner, inside = paste_mask(probabilities, box, size)
    return encode_mask(corner, inside >= THRESHOLD, size)


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
        sizes = map(tuple, batch.original_sizes[found.image].tolist())
        masks = [mask_run_lengths(*mask) for mask in zip(found.masks.numpy(), corners, sizes, strict=True)]
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
