"""What a detector finds, misses and mixes up on one split: the figures of evaluate.py's report.

Matching is hotcoco's: within a class, detections by falling score each take the object of the highest IoU that is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from hotcoco import COCO, COCOeval, compare

from direct_pt.coco_eval import METRICS, Predictions, scorer_categories, scorer_input
from direct_pt.data.annotations import AnnotationTable
from direct_pt.files import valid_unicode
from direct_pt.models.api import SCORE_THRESHOLD

IOU = 0.5  # from which on a box is right
RESAMPLES = 200  # of the images, for the intervals
SEED = 0
CONFIDENCE = 0.95
MAX_CURVE_POINTS = 100
CALIBRATION_BINS = 10
MAX_EXAMPLES = 24  # of each kind
MAX_CLASS_EXAMPLES = 40  # of each kind: the first one of so many classes
MIN_LABEL_ERROR_SCORE = 0.5  # what a detector is less sure of says little of a label
SIZES = {"small": ("APs", 0.0, 32.0**2), "medium": ("APm", 32.0**2, 96.0**2), "large": ("APl", 96.0**2, np.inf)}
# TIDE's kinds of errors, in words.
ERRORS = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box too far off",
    "Both": "wrong class and box too far off",
    "Dupe": "found a second time",
    "Bkg": "nothing is there",
    "Miss": "not found at all",
}


@dataclass
class Matches:
    """Detections and objects of a split at an IoU of 0.5, in terms of the rows of predictions and table.

    Attributes:
        right: [D] bool, whether a detection found an object that no better one had.
        counted: [D] bool, False on crowd regions, where COCO counts nothing.
        finder: [M] int64, the detection that found each object, or -1.
        target: [M] bool, whether an object is one to find: no crowd region.
    """

    right: np.ndarray
    counted: np.ndarray
    finder: np.ndarray
    target: np.ndarray

    @classmethod
    def of(cls, table: AnnotationTable, evaluation: COCOeval, detections: int) -> Self:
        """The scorer's own matching. `detections`: how many there are."""
        found = evaluation.image_diagnostics(iou_thr=IOU, score_thr=0.0)
        right, counted = np.zeros(detections, bool), np.zeros(detections, bool)
        status = found["dt_status"]
        counted[_rows(status)] = True
        right[_rows([number for number, kind in status.items() if kind == "tp"])] = True
        finder = np.full(len(table.boxes), -1, np.int64)
        finder[_rows(found["gt_match"])] = _rows(found["gt_match"].values())
        return cls(right, counted, finder, ~table.crowd)

    def found_above(self, scores: np.ndarray, threshold: float) -> np.ndarray:
        """[M] bool, whether each object was found by a detection with a higher score."""
        return (self.finder >= 0) & (np.append(scores, -1.0)[self.finder] > threshold)


def _rows(numbers: Any) -> np.ndarray:
    """Rows from 0 of the scorer's numbers from 1."""
    return np.fromiter(numbers, np.int64, len(numbers)) - 1


@dataclass
class Curve:
    """Counts of the detections above each threshold; a threshold never splits equal scores.

    Attributes:
        scores: [T] the lowest score that is still counted, falling.
        true: [T] objects found.
        false: [T] false alarms.
        objects: to find.
    """

    scores: np.ndarray
    true: np.ndarray
    false: np.ndarray
    objects: int

    @classmethod
    def of(cls, scores: np.ndarray, right: np.ndarray, objects: int) -> Self:
        """Of detections [D] that are counted, in any order."""
        order = np.argsort(-scores, kind="stable")
        scores, right = scores[order], right[order]
        last = np.flatnonzero(np.diff(scores, append=-np.inf))  # of each run of equal scores
        true = np.cumsum(right)[last]
        return cls(scores[last], true, last + 1 - true, objects)

    def precision(self) -> np.ndarray:
        """[T]."""
        return self.true / (self.true + self.false)

    def recall(self) -> np.ndarray:
        """[T]."""
        return self.true / max(self.objects, 1)

    def f1(self) -> np.ndarray:
        """[T]."""
        return 2 * self.true / (self.true + self.false + self.objects)

    def best(self) -> dict[str, Any] | None:
        """The threshold of the highest F1, the highest one of several; None where nothing is found."""
        if not self.true.any():
            return None
        row = int(np.argmax(self.f1()))
        below = float(self.scores[row + 1]) if row + 1 < len(self.scores) else 0.0
        return self.at(_shortest_between(below, float(self.scores[row])))

    def at(self, threshold: float) -> dict[str, Any]:
        """What the detections with scores above a threshold are worth; None where that is 0 / 0."""
        kept = int((self.scores > threshold).sum())
        true, false = (int(values[kept - 1]) if kept else 0 for values in (self.true, self.false))
        counts = {"true_positives": true, "false_positives": false, "false_negatives": self.objects - true}
        shares = {
            "precision": _ratio(true, true + false),
            "recall": _ratio(true, self.objects),
            "f1": _ratio(2 * true, true + false + self.objects),
        }
        return {"threshold": threshold, **shares, **counts}

    def points(self) -> list[list[float]]:
        """At most MAX_CURVE_POINTS of (score, precision, recall, f1), rounded."""
        count = len(self.scores)
        rows = np.unique(np.linspace(0, count - 1, min(count, MAX_CURVE_POINTS)).round().astype(int))
        columns = (self.scores, self.precision(), self.recall(), self.f1())
        return [[round(float(values[row]), 4) for values in columns] for row in rows]


def _shortest_between(low: float, high: float) -> float:
    """The number of fewest digits near the middle of an open interval."""
    middle = (low + high) / 2
    for digits in range(1, 17):
        if low < (short := round(middle, digits)) < high:
            return short
    return low  # neighbours among the floats: what is above `low` is kept all the same


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def score(table: AnnotationTable, predictions: Predictions, kind: str = "bbox", with_crowds: bool = True) -> COCOeval:
    """The scorer after it has seen the whole split at once, as its diagnostics need it."""
    images, objects, found, masks = next(scorer_input(table, predictions, kind, max(len(table), 1)))
    objects = objects if with_crowds else [one for one in objects if not one["iscrowd"]]
    truth = COCO({"images": images, "annotations": objects, "categories": scorer_categories(table)})
    evaluation = COCOeval(truth, truth.load_res(found, segmentation=masks), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()
    return evaluation


def curves(table: AnnotationTable, predictions: Predictions, matches: Matches) -> tuple[Curve, list[Curve]]:
    """Of all classes together, and of each."""

    def curve(detections: np.ndarray, objects: np.ndarray) -> Curve:
        rows = detections & matches.counted
        return Curve.of(predictions.scores[rows], matches.right[rows], int((objects & matches.target).sum()))

    every = curve(np.ones(len(predictions.scores), bool), np.ones(len(table.labels), bool))
    labels = range(len(table.class_names))
    return every, [curve(predictions.labels == label, table.labels == label) for label in labels]


@dataclass
class Judged:
    """A detector's predictions over a whole split, matched with its objects; boxes are judged, of mask detectors too.

    Attributes:
        table: the split.
        predictions: over the whole of it.
        metrics: what `coco_metrics` says of them.
        evaluation: the scorer of the boxes.
        matches: of the boxes.
        every: counts by threshold, of all classes together.
        classes: [C] the same of each class.
        thresholds: {"all": ..., "per_class": {name: ...}} of the highest F1; None where nothing is found.
    """

    table: AnnotationTable
    predictions: Predictions
    metrics: dict[str, Any]
    evaluation: COCOeval
    matches: Matches
    every: Curve
    classes: list[Curve]
    thresholds: dict[str, Any]

    @classmethod
    def of(cls, table: AnnotationTable, predictions: Predictions, metrics: dict[str, Any]) -> Self:
        """Match them."""
        evaluation = score(table, predictions)
        matches = Matches.of(table, evaluation, len(predictions.scores))
        every, classes = curves(table, predictions, matches)
        best = dict(zip(table.class_names, (curve.best() for curve in classes), strict=True))
        thresholds = {"all": every.best(), "per_class": best}
        return cls(table, predictions, metrics, evaluation, matches, every, classes, thresholds)

    @property
    def threshold(self) -> float:
        """Of all classes."""
        return self.thresholds["all"]["threshold"] if self.thresholds["all"] else SCORE_THRESHOLD

    def best_thresholds(self) -> dict[str, Any] | None:
        """As a model's history keeps them: {"all": score, "per_class": {name: score or None}}; None if none is best."""
        if self.thresholds["all"] is None:
            return None
        per_class = {name: at and at["threshold"] for name, at in self.thresholds["per_class"].items()}
        return {"all": self.threshold, "per_class": per_class}

    def scorers(self) -> dict[str, COCOeval]:
        """Of boxes and, if any, masks."""
        if self.predictions.masks is None:
            return {"bbox": self.evaluation}
        return {"bbox": self.evaluation, "segm": score(self.table, self.predictions, "segm")}

    def without_crowds(self, threshold: float) -> COCOeval:
        """The scorer of the detections above a threshold, without crowd regions and what lies on them.

        Its error types and its confusion matrix would count those.
        """
        found = self.predictions
        rows = np.flatnonzero(self.matches.counted & (found.scores > threshold))
        shown = Predictions(found.images[rows], found.boxes[rows], found.scores[rows], found.labels[rows])
        return score(self.table, shown, with_crowds=False)

    def mistakes(self) -> tuple[np.ndarray, np.ndarray]:
        """[F] false alarms and [G] missed objects at the threshold, as rows of predictions and table."""
        false = self.matches.counted & ~self.matches.right & (self.predictions.scores > self.threshold)
        missed = self.matches.target & ~self.matches.found_above(self.predictions.scores, self.threshold)
        return np.flatnonzero(false), np.flatnonzero(missed)

    def mistakes_per_image(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] false alarms and [N] missed objects of each image."""
        false, missed = self.mistakes()
        images = self.predictions.images[false], self.table.image_of_object()[missed]
        return np.bincount(images[0], minlength=len(self.table)), np.bincount(images[1], minlength=len(self.table))


def analyse(judged: Judged) -> dict[str, Any]:
    """All figures of the report, as a JSON value."""
    table, metrics = judged.table, judged.metrics
    tide = judged.without_crowds(0.0).tide_errors(pos_thr=IOU)
    calibration = judged.evaluation.calibration(n_bins=CALIBRATION_BINS, iou_threshold=IOU)
    intervals = {kind: bootstrap(table, kind, scorer) for kind, scorer in judged.scorers().items()}
    points = zip(table.class_names, (curve.points() for curve in judged.classes), strict=True)
    return {
        "images": len(table),
        "objects": int(judged.matches.target.sum()),
        "detections": len(judged.predictions.scores),
        "metrics": {kind: metrics[kind] for kind in intervals},
        "intervals": {"confidence": CONFIDENCE, "resamples": RESAMPLES, **intervals},
        "per_class": metrics["per_class"],
        "thresholds": {"iou": IOU, **judged.thresholds},
        "curves": {
            "columns": ["score", "precision", "recall", "f1"],
            "all": judged.every.points(),
            "per_class": dict(points),
        },
        "sizes": _sizes(table, metrics["bbox"]),
        "errors": {
            "ap50": tide["ap_base"],
            "kinds": {kind: {"count": tide["counts"][kind], "cost": tide["delta_ap"][kind]} for kind in ERRORS},
            "false_positives": tide["delta_ap"]["FP"],
            "false_negatives": tide["delta_ap"]["FN"],
        },
        "confusion": _confusion(judged),
        "calibration": {
            "expected_error": calibration["ece"],
            "bins": [
                {"low": one["bin_lower"], "high": one["bin_upper"], "detections": one["count"],
                 "mean_score": one["avg_confidence"], "precision": one["avg_accuracy"]}
                for one in calibration["bins"]
            ],
        },
        "examples": _examples(judged),
    }  # fmt: skip


def comparison(judged: Judged, other: Judged) -> dict[str, Any]:
    """A detector beside another one on the same split, as a JSON value; differences are in favour of the first."""
    difference = {}
    theirs = other.scorers()
    for kind, scorer in judged.scorers().items():
        if kind in theirs:
            found = compare(theirs[kind], scorer, n_bootstrap=RESAMPLES, seed=SEED, confidence=CONFIDENCE)
            difference[kind] = {
                name: {
                    "value": found["deltas"][name],
                    "low": found["ci"][name]["lower"],
                    "high": found["ci"][name]["upper"],
                }
                for name in METRICS
                if found["metrics_a"][name] >= 0
            }
    per_class = {
        name: {"AP": row["bbox"]["AP"], "other": other.metrics["per_class"][name]["bbox"]["AP"]}
        for name, row in judged.metrics["per_class"].items()
        if row["objects"]
    }
    own, others = (np.sum(one.mistakes_per_image(), axis=0) for one in (judged, other))
    order = np.argsort(-np.abs(own - others), kind="stable")[: int((own != others).sum())]
    images = [
        {**_image(judged.table, int(row)), "mistakes": int(own[row]), "others_mistakes": int(others[row])}
        for row in order[:MAX_EXAMPLES]
    ]
    return {
        "metrics": {kind: other.metrics[kind] for kind in difference},
        "difference": difference,
        "per_class": per_class,
        "threshold": other.threshold,
        "images": {"total": len(order), "first": images},
    }


def bootstrap(table: AnnotationTable, kind: str, evaluation: COCOeval) -> dict[str, list[float]]:
    """[low, high] of each of COCO's figures, over resampled images; figures that are unknown (-1) have none."""
    none = np.zeros(0, np.int64)
    nothing = score(table, Predictions(none, np.zeros((0, 4)), np.zeros(0), none, masks=[]), kind)
    # Against a detector that finds nothing, the difference is the figure itself.
    found = compare(nothing, evaluation, n_bootstrap=RESAMPLES, seed=SEED, confidence=CONFIDENCE)
    known = [name for name in METRICS if found["metrics_b"][name] >= 0]
    return {name: [found["ci"][name]["lower"], found["ci"][name]["upper"]] for name in known}


def _sizes(table: AnnotationTable, metrics: dict[str, float]) -> dict[str, dict[str, Any]]:
    areas = table.areas[~table.crowd]
    return {
        name: {"AP": metrics[key], "objects": int(((areas >= low) & (areas < high)).sum())}
        for name, (key, low, high) in SIZES.items()
    }


def _confusion(judged: Judged) -> dict[str, Any]:
    """[C + 1][C + 1] counts: rows are the truth, columns what was said, the last of each is background."""
    matrix = judged.without_crowds(judged.threshold).confusion_matrix(iou_thr=IOU)["matrix"]
    return {
        "threshold": judged.threshold,
        "classes": [*judged.table.class_names, "background"],
        "matrix": matrix.tolist(),
    }


# Examples


def _examples(judged: Judged) -> dict[str, dict[str, Any]]:
    """The worst images, detections, objects and labels: {"total": how many, "first": the worst of them}."""
    table, predictions = judged.table, judged.predictions
    images = table.image_of_object()
    targets = np.bincount(images[judged.matches.target], minlength=len(table))
    false_alarms, misses = judged.mistakes_per_image()
    worst = np.argsort(-(false_alarms + misses), kind="stable")[: int((false_alarms + misses > 0).sum())]
    false, missed = judged.mistakes()
    false = false[np.argsort(-predictions.scores[false], kind="stable")]
    missed = missed[np.argsort(-table.areas[missed], kind="stable")]
    score = max(judged.threshold, MIN_LABEL_ERROR_SCORE)
    found = judged.evaluation.image_diagnostics(iou_thr=IOU, score_thr=score)["label_errors"]
    labelled = {int(error["dt_id"]) - 1: error["gt_category"] for error in found}  # None: nothing is labelled there
    errors = np.array(sorted(labelled, key=lambda row: (-predictions.scores[row], row)), np.int64)

    def image(row: int) -> dict[str, Any]:
        counts = {"objects": int(targets[row]), "missed": int(misses[row]), "false_alarms": int(false_alarms[row])}
        return {**_image(table, row), **counts}

    def detection(row: int) -> dict[str, Any]:
        name, box = table.class_names[predictions.labels[row]], predictions.boxes[row].tolist()
        place = _image(table, int(predictions.images[row]))
        return {**place, "class": name, "score": float(predictions.scores[row]), "box": box}

    def missed_object(row: int) -> dict[str, Any]:
        name, box = table.class_names[table.labels[row]], table.boxes[row].tolist()
        place = _image(table, int(images[row]))
        return {**place, "class": name, "annotation_id": int(table.annotation_ids[row]), "box": box}

    def first(rows: np.ndarray, labels: np.ndarray, describe: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """The first rows, and the first one of each class."""
        _, of_class = np.unique(labels[rows], return_index=True)
        chosen = np.union1d(np.arange(min(len(rows), MAX_EXAMPLES)), of_class[:MAX_CLASS_EXAMPLES])
        return {"total": len(rows), "first": [describe(int(row)) for row in rows[chosen.astype(int)]]}

    return {
        "worst_images": first(worst, np.zeros(len(table), np.int64), image),
        "false_alarms": first(false, predictions.labels, detection),
        "missed": first(missed, table.labels, missed_object),
        "label_errors": first(errors, predictions.labels, lambda row: {**detection(row), "labelled": labelled[row]}),
    }


def _image(table: AnnotationTable, row: int) -> dict[str, Any]:
    return {"image_id": int(table.image_ids[row]), "file": valid_unicode(table.image_name(row))}
