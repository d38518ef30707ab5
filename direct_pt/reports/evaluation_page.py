"""The report of an evaluation as one HTML file that asks nothing of any server: figures, charts and pictures in it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from direct_pt.coco_eval import METRICS
from direct_pt.data.annotations import AnnotationTable
from direct_pt.errors import printable
from direct_pt.files import write_text
from direct_pt.images.decoding import UnreadableImage
from direct_pt.reports.charts import Line, Mark, bar_chart, line_chart
from direct_pt.reports.evaluation import ERRORS, Judged
from direct_pt.reports.overlays import Overlay, data_uri, detections, draw_overlay, ground_truth, window_around
from direct_pt.reports.page import render

MAX_MATRIX_CLASSES = 40
MAX_CONFUSIONS = 20


@dataclass
class Example:
    """One place in one image; name, link and pictures are filled in by `draw_examples`.

    Attributes:
        image: row in the table.
        title: what is to be seen.
        label: the class by which the page filters; None for whole images.
        box: [4] (x, y, width, height) that is shown with its surroundings; None for the whole image.
    """

    image: int
    title: str
    label: int | None = None
    box: Sequence[float] | None = None
    name: str = ""
    link: str = ""
    problem: str = ""
    pictures: list[str] = field(default_factory=list)


@dataclass
class Examples:
    """Those of one kind: what they are, how many there are in all, and the ones that are shown."""

    title: str
    text: str
    total: int
    shown: list[Example]


def write_evaluation_page(
    path: Path,
    judged: Judged,
    figures: Mapping[str, Any],
    about: Mapping[str, str],
    other: Judged | None = None,
    other_name: str = "",
    other_about: str = "",
) -> None:
    """Write the page.

    Args:
        path: of the HTML file, which is replaced as a whole.
        judged: the detections.
        figures: what `analyse` returns; with another detector, "comparison" is what `comparison` returns.
        about: lines of the page's head, text by title.
        other: another detector's detections.
        other_name: what it is called.
        other_about: at which size it was tested, and its best threshold, in words.

    Raises:
        OSError: it cannot be written.
    """
    table = judged.table
    kinds = choose_examples(table, figures)
    layers = [lambda row: ground_truth(judged, row), lambda row: detections(judged, row)]
    draw_examples(table, layers, [one for kind in kinds for one in kind.shown])
    disagreements = None
    if other is not None:
        disagreements = choose_disagreements(table, figures["comparison"])
        layers = [lambda row: detections(judged, row), lambda row: detections(other, row)]
        draw_examples(table, layers, disagreements.shown)
    page = render(
        "evaluation.html",
        title=f"Evaluation of {about['model']}",
        f=figures,
        about=about,
        names=[printable(name) for name in table.class_names],
        metric_names=METRICS,
        kinds={"bbox": "boxes", "segm": "masks"},
        error_names=ERRORS,
        charts=_charts(table, figures),
        matrix=_matrix(figures["confusion"]),
        confusions=_confusions(figures["confusion"]),
        examples=kinds,
        disagreements=disagreements,
        other_name=other_name,
        other_about=other_about,
    )
    write_text(path, page)


def _charts(table: AnnotationTable, figures: Mapping[str, Any]) -> dict[str, Any]:
    curves, best = figures["curves"], figures["thresholds"]
    points: list[tuple[int | None, Any, Any]] = [(None, curves["all"], best["all"])]
    points += [
        (label, curves["per_class"][name], best["per_class"][name]) for label, name in enumerate(table.class_names)
    ]
    marks = [Mark(label, at["threshold"], f"{at['threshold']:g}: F1 {at['f1']:.2f}") for label, _, at in points if at]
    precision = [Line(label, [(recall, precision) for _, precision, recall, _ in curve]) for label, curve, _ in points]
    f1 = [Line(label, [(score, f1) for score, _, _, f1 in curve]) for label, curve, _ in points]
    bars = [
        (one["low"], one["high"], one["precision"], f"{one['detections']} detections: {one['precision']:.2f} are right")
        for one in figures["calibration"]["bins"]
        if one["detections"]
    ]
    return {
        "precision": line_chart("Precision and recall", "recall", "precision", precision),
        "f1": line_chart("F1 by threshold", "score threshold", "F1", f1, marks),
        "calibration": bar_chart("Calibration", "score", "share that is right", bars),
    }


def _matrix(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """The confusion matrix as the page shows it: the classes with the most mistakes, each cell's share of its row."""
    counts = np.array(confusion["matrix"])
    wrong = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    classes = len(counts) - 1
    chosen = np.sort(np.argsort(-wrong[:-1], kind="stable")[:MAX_MATRIX_CLASSES])
    rows = np.append(chosen, classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [printable(confusion["classes"][row]) for row in rows]
    cells = [
        {"name": name, "cells": [(int(counts[row, column]), float(shares[row, column])) for column in rows]}
        for name, row in zip(names, rows, strict=True)
    ]
    return {"names": names, "rows": cells, "left_out": classes - len(chosen)}


def _confusions(confusion: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The most frequent pairs of classes that are taken for each other: (truth, said, times)."""
    counts = np.array(confusion["matrix"])[:-1, :-1]
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:MAX_CONFUSIONS]
    names = [printable(name) for name in confusion["classes"]]
    pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [(names[truth], names[said], int(counts[truth, said])) for truth, said in pairs if counts[truth, said]]


def choose_examples(table: AnnotationTable, figures: Mapping[str, Any]) -> list[Examples]:
    """What is shown of each kind, without the pictures."""

    def labelled(error: Mapping[str, Any]) -> str:
        said = f"{printable(error['class'])} {error['score']:.2f}"
        return f"{said}, labelled {printable(error['labelled'])}" if error["labelled"] else f"{said}, not labelled"

    kinds = [
        ("worst_images", "Worst images", "Most objects missed and false alarms, at the model's threshold.",
         lambda one: f"{one['missed']} of {one['objects']} missed, {one['false_alarms']} false alarms"),
        ("false_alarms", "Most confident false alarms", "Detections without an object of their class.",
         lambda one: f"{printable(one['class'])} {one['score']:.2f}"),
        ("missed", "Missed objects", "The largest objects without a detection above the threshold.",
         lambda one: printable(one["class"])),
        ("label_errors", "Likely label errors", "Where the detector is sure and the labels say something else: look at "
         "these before training again.", labelled),
    ]  # fmt: skip
    rows = _rows_of_images(table)
    labels = {name: label for label, name in enumerate(table.class_names)}
    chosen = []
    for key, title, text, describe in kinds:
        found = figures["examples"][key]
        shown = [
            Example(rows[one["image_id"]], describe(one), labels.get(one.get("class")), one.get("box"))
            for one in found["first"]
        ]
        chosen.append(Examples(title, text, found["total"], shown))
    return chosen


def choose_disagreements(table: AnnotationTable, compared: Mapping[str, Any]) -> Examples:
    """Images where one detector makes more mistakes than the other."""
    rows = _rows_of_images(table)
    shown = [
        Example(rows[one["image_id"]], f"mistakes: {one['mistakes']} here, {one['others_mistakes']} of the other")
        for one in compared["images"]["first"]
    ]
    return Examples("", "", compared["images"]["total"], shown)


def _rows_of_images(table: AnnotationTable) -> dict[int, int]:
    return {int(image): row for row, image in enumerate(table.image_ids)}


def draw_examples(
    table: AnnotationTable, layers: Sequence[Callable[[int], Overlay]], examples: Iterable[Example]
) -> None:
    """Fill in the pictures: what each of the layers says of an image.

    Each image is read once. One that cannot be read gets the reason in place of its pictures.
    """
    by_image: dict[int, list[Example]] = {}
    for example in examples:
        by_image.setdefault(example.image, []).append(example)
    for row, those in by_image.items():
        try:
            photo, problem = Image.fromarray(table.read_image(row)), ""
        except UnreadableImage as error:
            photo, problem = None, printable(str(error))
        drawn = [layer(row) for layer in layers]
        for example in those:
            example.name, example.problem = printable(table.image_name(row)), problem
            example.link = "" if table.encoded is not None else table.path(row).absolute().as_uri()
            if photo is not None:
                window = window_around(example.box, photo.size)
                example.pictures = [data_uri(draw_overlay(photo, window, overlay)) for overlay in drawn]
