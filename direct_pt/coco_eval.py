"""Detections of a whole split over all processes, and their COCO metrics."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from hotcoco import StreamingEval
from hotcoco.mask import area as mask_areas
from tqdm import tqdm

from direct_pt.batch import Batch, Detections
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.evaluation_loader import evaluation_loader
from direct_pt.data.tiled_table import tiled
from direct_pt.distributed.launch import autocast
from direct_pt.distributed.processes import gather_to_main
from direct_pt.images.decoding import Size
from direct_pt.images.tiles import TileMerger
from direct_pt.models.api import DetectorAPI
from direct_pt.models.detector import Detector
from direct_pt.models.mask_encoding import mask_run_lengths
from direct_pt.models.mean_losses import MeanLosses
from direct_pt.onnx_detector import Found
from direct_pt.transforms import TestPreset

IMAGES_AT_ONCE = 100  # scored together: their objects and detections take many times the room of the arrays

# The twelve figures of COCO's summary, in its order. -1 where no object is of that size.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class Predictions:
    """The detections of many images.

    Attributes:
        images: [D] int64 rows of the data set, rising.
        boxes: [D, 4] float64 (x, y, width, height) in the original images' pixels.
        scores: [D] float64.
        labels: [D] int64 rows of the classes.
        unreadable: rows of the images that could not be read; they have no detections.
        masks: [D] COCO's compressed run lengths in the original images, {"size": [height, width], "counts": text}; None
            for box detectors.
    """

    images: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    unreadable: tuple[int, ...] = ()
    masks: list[dict[str, Any]] | None = None

    @staticmethod
    def of_batch(batch: Batch, found: Detections) -> "Predictions":
        """A batch's detections, which are on the CPU; `labels` are the detector's."""
        found = found.keep(~torch.isin(batch.indices[found.image], torch.tensor(batch.unreadable, dtype=torch.int64)))
        corners = found.boxes.numpy()
        boxes = corners.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        masks = None
        if found.masks is not None:
            masks = mask_run_lengths(found.masks.numpy(), corners, batch.original_sizes[found.image].numpy())
        images, scores = batch.indices[found.image].numpy(), found.scores.numpy().astype(np.float64)
        return Predictions(images, boxes, scores, found.labels.numpy(), batch.unreadable, masks)

    @staticmethod
    def of_image(row: int, found: Found | None, size: Size) -> "Predictions":
        """The detections in one image of `size`, by the detector's labels; None: it could not be read."""
        if found is None:
            return replace(Predictions.concatenate([]), unreadable=(row,))
        boxes = found.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        count, masks = len(boxes), None
        if found.masks is not None:
            masks = mask_run_lengths(found.masks, found.boxes, np.tile(size, (count, 1)))
        return Predictions(np.full(count, row), boxes, found.scores.astype(np.float64), found.labels, (), masks)

    @staticmethod
    def concatenate(parts: list["Predictions"]) -> "Predictions":
        """All detections, sorted by image."""
        empty = Predictions(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        images, boxes, scores, labels = (
            np.concatenate([getattr(part, name) for part in (empty, *parts)])
            for name in ("images", "boxes", "scores", "labels")
        )
        order = np.argsort(images, kind="stable")
        unreadable = tuple(sorted(row for part in parts for row in part.unreadable))
        masks = None
        if any(part.masks is not None for part in parts):  # a process that had no images does not know of masks
            unsorted = [mask for part in parts for mask in part.masks or ()]
            masks = [unsorted[row] for row in order.tolist()]
        return Predictions(images[order], boxes[order], scores[order], labels[order], unreadable, masks)

    def coco(self, image_ids: np.ndarray, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """In COCO's results format, with the ids of the rows of images and classes; masks as "segmentation"."""
        images, categories = image_ids[self.images], np.array(category_ids)[self.labels]
        columns = (images.tolist(), categories.tolist(), self.boxes.tolist(), self.scores.tolist())
        names = ("image_id", "category_id", "bbox", "score")
        results = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        if self.masks is not None:
            for result, mask in zip(results, self.masks, strict=True):
                result["segmentation"] = mask
        return results


def predict_split(
    detector: DetectorAPI,
    table: AnnotationTable,
    preset: TestPreset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
    between_batches: Callable[[], None] = lambda: None,
    losses: MeanLosses | None = None,
) -> Predictions:
    """Run the detector over every image of the table once, shared between the processes.

    The detector and the table list the same category ids, in any order. Every process must call it; the main
    one gets all predictions, in terms of the table's rows, the others none. `losses` gets those of this process. With
    the preset's `tiling`, tiles of each image are looked at too.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    targets = "" if losses is None else "masks" if detector.has_masks else "boxes"
    seen, origins = (table, None) if preset.tiling is None else tiled(table, preset.tiling)
    loader = evaluation_loader(seen, preset, micro_batch_size, rank, world, num_workers, targets, origins)
    class_rows = np.array([table.category_ids.index(category) for category in detector.config.category_ids])
    own_labels = torch.from_numpy(np.argsort(class_rows))  # of each of the table's classes
    was_training = detector.training
    detector.eval()
    parts, merger = [], None if preset.tiling is None else TileMerger(preset.tiling)
    bar = tqdm(total=math.ceil(len(seen) / world), desc="evaluate", unit="image", disable=rank > 0, leave=False)
    with torch.no_grad(), autocast(accelerator), contextlib.closing(iter(loader)) as batches, bar:
        for batch in batches:
            between_batches()
            moved = replace(batch, labels=own_labels[batch.labels]).to(detector.device)
            if losses is None:
                found = detector.detect(moved).to("cpu")
            else:
                assert isinstance(detector, Detector)
                features = detector.features(moved)
                losses.add(detector, features, moved)
                found = detector.detections(features, moved).to("cpu")
            if merger is None or origins is None:
                parts.append(Predictions.of_batch(batch, found))  # at once: masks are 28x28 floats until then
            else:
                rows = origins[batch.indices.numpy()].tolist()
                for row, part in zip(rows, found.of_images(batch), strict=True):
                    size = table.image_size(row)
                    parts += [Predictions.of_image(row, whole, size) for whole in merger.add(row, size, part)]
            bar.update(len(batch))
    detector.train(was_training)
    predictions = Predictions.concatenate(gather_to_main(Predictions.concatenate(parts), accelerator))
    return replace(predictions, labels=class_rows[predictions.labels])


def evaluate(
    detector: DetectorAPI,
    table: AnnotationTable,
    preset: TestPreset,
    micro_batch_size: int,
    accelerator: Accelerator,
    num_workers: int,
    between_batches: Callable[[], None] = lambda: None,
    with_losses: bool = False,
) -> tuple[dict[str, Any], Predictions]:
    """A split's metrics, the same on every process, and its predictions, on the main one. Every process must call it.

    `between_batches` is called before each batch, and may raise to end the evaluation. `with_losses` adds the split's
    mean losses to the metrics: those of training, of the test images.

    Raises:
        InputError: the detector finds masks, and objects of the split have none to compare with.
    """
    if detector.has_masks:
        table.require_masks()
    losses = MeanLosses() if with_losses else None
    predictions = predict_split(
        detector, table, preset, micro_batch_size, accelerator, num_workers, between_batches, losses
    )
    means = {} if losses is None else MeanLosses().merged(gather_to_main(losses, accelerator)).record()
    metrics = [{**means, **coco_metrics(table, predictions)} if accelerator.is_main_process else None]
    broadcast_object_list(metrics)
    assert metrics[0] is not None
    return metrics[0], predictions


def coco_metrics(table: AnnotationTable, predictions: Predictions) -> dict[str, Any]:
    """COCO's figures: {"bbox": {"AP": ...}, "per_class": {class name: {"bbox": {"AP", "AP50"}, "objects"}}}.

    With masks, also "segm", beside each "bbox". Equal to pycocotools' on the same files. -1 where there is no object
    to find.
    """
    metrics: dict[str, Any] = {}
    per_class: list[dict[str, Any]] = [{} for _ in table.class_names]
    for kind, scorer in _match(table, predictions).items():
        evaluation = scorer.finalize()
        evaluation.accumulate()
        evaluation.summary_lines()  # computes `stats`; summarize() would print them too
        assert evaluation.eval is not None
        metrics[kind] = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
        precision = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, class]: all sizes, 100 detections
        for label, figures in enumerate(per_class):
            figures[kind] = {"AP": _mean(precision[..., label]), "AP50": _mean(precision[0, :, label])}
    objects = np.bincount(table.labels[~table.crowd], minlength=len(per_class))
    for figures, count in zip(per_class, objects.tolist(), strict=True):
        figures["objects"] = count
    return {**metrics, "per_class": dict(zip(table.class_names, per_class, strict=True))}


def _match(table: AnnotationTable, predictions: Predictions) -> dict[str, StreamingEval]:
    """Scorers that have seen all objects and detections: "bbox", and with masks "segm"."""
    kinds = ("bbox",) if predictions.masks is None else ("bbox", "segm")
    scorers = {kind: StreamingEval(scorer_categories(table), kind) for kind in kinds}
    for kind, scorer in scorers.items():
        for images, objects, found, masks in scorer_input(table, predictions, kind, IMAGES_AT_ONCE):
            scorer.update(images, objects, found, segmentation=masks)
    return scorers


def scorer_categories(table: AnnotationTable) -> list[dict[str, Any]]:
    """The classes as the scorer takes them, their ids the labels + 1."""
    return [{"id": number, "name": name} for number, name in enumerate(table.class_names, start=1)]


def scorer_input(
    table: AnnotationTable, predictions: Predictions, kind: str, images_at_once: int
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]], np.ndarray, list[Any] | None]]:
    """Blocks of a split's images, objects, detections [d, 7] (image, box, score, class) and, for "segm", their masks.

    The scorer reads ids as floats, in which large ones collide, so it gets numbers from 1. Those of images are in the
    order of their ids, as equal scores of two images rank by it.
    """
    numbers = np.argsort(np.argsort(table.image_ids, kind="stable")) + 1
    category_ids = tuple(range(1, len(table.class_names) + 1))
    numbered = replace(table, image_ids=numbers, category_ids=category_ids, encoded=None)
    for first in range(0, len(table), images_at_once):
        last = min(first + images_at_once, len(table))
        block = numbered.select(np.arange(first, last))
        rows = slice(*np.searchsorted(predictions.images, [first, last]))
        images, labels = numbers[predictions.images[rows]], predictions.labels[rows] + 1
        found = np.column_stack([images, predictions.boxes[rows], predictions.scores[rows], labels])
        truth = block.coco(with_masks=kind == "segm")
        if kind == "bbox" or predictions.masks is None:
            yield truth["images"], truth["annotations"], found, None
            continue
        # Crowd regions and objects under a pixel may have no outline, as nothing learns from them: their box stands in.
        corners = block.corner_boxes()
        for row in np.flatnonzero(~block.segmentations.present()).tolist():
            x1, y1, x2, y2 = corners[row].tolist()
            truth["annotations"][row]["segmentation"] = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        masks: list[Any] = predictions.masks[rows]
        found[:, 1:5] = [0, 0, 0, 1]
        found[:, 3] = mask_areas(masks)  # a detection's area is its row's width x height: here, its mask's area
        yield truth["images"], truth["annotations"], found, masks


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else -1.0


def metrics_table(metrics: dict[str, Any]) -> str:
    """The figures and those of the classes that have objects, as text."""
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
