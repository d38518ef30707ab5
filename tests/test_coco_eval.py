"""COCO metrics against pycocotools, and a detector's way to them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CocoFolder, MakeCocoFolder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from direct_pt import coco_eval
from direct_pt.coco_eval import METRICS, Predictions, coco_metrics, evaluate, metrics_table, predict_split
from direct_pt.data.annotations import AnnotationTable, Segmentations
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.sources import load_split
from direct_pt.images.decoding import read_image
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.transforms import TestPreset

REFERENCE = golden.FOLDER / "coco_eval"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference results are not on this machine")
SIZE = (480, 640)
CLASSES = {3: "many", 9: "a few", 12: "never there", 20: "crowd only", 21: "never found"}
PRESENT = (3, 9, 21)
NOTHING = Predictions(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def pycocotools_figures(
    truth: dict[str, Any], results: list[dict[str, Any]], category_id: int | None = None, kind: str = "bbox"
) -> list[float]:
    """The twelve figures of boxes or masks ("segm"), of one category or of all."""
    if kind == "segm":  # as the results of a mask challenge are handed in
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), kind)
        if category_id is not None:
            scorer.params.catIds = [category_id]
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats.tolist()


def predictions_of(table: AnnotationTable, results: list[dict[str, Any]]) -> Predictions:
    """COCO results as the structure that a detector's detections end in."""
    image_rows = {int(image_id): row for row, image_id in enumerate(table.image_ids)}
    results = sorted(results, key=lambda result: image_rows[result["image_id"]])
    return Predictions(
        np.array([image_rows[result["image_id"]] for result in results]),
        np.array([result["bbox"] for result in results], np.float64),
        np.array([result["score"] for result in results], np.float64),
        np.array([table.category_ids.index(result["category_id"]) for result in results]),
        masks=[result["segmentation"] for result in results] if "segmentation" in results[0] else None,
    )


def synthetic_set(folder: CocoFolder, rng: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth with crowds, empty images and degenerate boxes; results near it, beside it, and far too many.

    Scores are coarse, so that many are equal.
    """
    image_ids = [image["id"] for image in folder.content["images"]]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in image_ids[2:]:  # the first two are empty
        for _ in range(rng.integers(1, 12)):
            side = rng.choice([12, 50, 200])  # small, medium, large
            box = np.concatenate([rng.uniform(0, 400, 2), rng.uniform(0.5, 1.5, 2) * side]).round(2)
            category = int(rng.choice([3, 3, 3, 9, 20, 21]))
            crowd = int(category == 20 or rng.random() < 0.1)
            odd = rng.choice([0, 1023.99, 1024, 1024.01, 9216, 9216.01, 1e9])  # around the limits of the sizes
            area = float(odd if rng.random() < 0.3 else box[2] * box[3] * rng.uniform(0.4, 1))  # as of a mask
            annotations.append(
                {"image_id": image_id, "category_id": category, "bbox": box.tolist(), "area": area, "iscrowd": crowd}
            )
            for _ in range(rng.integers(0, 4) if category != 21 else 0):
                near = box + rng.normal(0, 0.08, 4) * box[[2, 3, 2, 3]]
                label = category if rng.random() < 0.8 else 9
                results.append({"image_id": image_id, "category_id": label, "bbox": np.abs(near).tolist()})
    annotations.append({"image_id": image_ids[3], "category_id": 3, "bbox": [50, 50, 0, 0], "area": 0, "iscrowd": 0})
    annotations.append({"image_id": image_ids[3], "category_id": 9, "bbox": [700, 50, 9, 9], "area": 81, "iscrowd": 0})
    for image_id in (image_ids[0], *[image_ids[5]] * 130):  # on an empty image, and more than 100 on one image
        box = [*rng.uniform(0, 400, 2), *rng.uniform(5, 100, 2)]
        results.append({"image_id": image_id, "category_id": 3, "bbox": box})
    results.append({"image_id": image_ids[3], "category_id": 3, "bbox": [50.0, 50.0, 0.0, 0.0]})
    results.append({"image_id": image_ids[4], "category_id": 12, "bbox": [5.0, 5.0, 50.0, 50.0]})
    for result in results:
        result["score"] = round(float(rng.random()), 1)
    folder.content["annotations"] = [{"id": 7 * row + 1, **a} for row, a in enumerate(annotations)]
    folder.content["categories"] = [{"id": i, "name": name} for i, name in CLASSES.items()][::-1]
    order = rng.permutation(len(image_ids))
    folder.content["images"] = [folder.content["images"][row] for row in order]
    return folder.content, [results[row] for row in rng.permutation(len(results))]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 5, 6])
def test_equal_to_pycocotools(coco_folder: MakeCocoFolder, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, and in several blocks of images."""
    monkeypatch.setattr(coco_eval, "IMAGES_AT_ONCE", 3)
    folder = coco_folder([(8, 8)] * 10)
    for image in folder.content["images"]:
        image["height"], image["width"] = SIZE
    truth, results = synthetic_set(folder, np.random.default_rng(seed))
    table = folder.load()
    predictions = predictions_of(table, results)
    # Equal scores rank in the order of the results, so both see the same one.
    ordered = sorted(results, key=lambda result: table.image_ids.tolist().index(result["image_id"]))
    metrics = coco_metrics(table, predictions)

    assert list(metrics["bbox"]) == list(METRICS)
    assert list(metrics["bbox"].values()) == pycocotools_figures(truth, ordered)
    assert 0.05 < metrics["bbox"]["AP"] < 0.9

    assert set(metrics["per_class"]) == set(CLASSES.values())
    for category_id, name in CLASSES.items():
        row = metrics["per_class"][name]
        assert [row["bbox"]["AP"], row["bbox"]["AP50"]] == pycocotools_figures(truth, ordered, category_id)[:2]
        real = [a for a in truth["annotations"] if a["category_id"] == category_id and not a["iscrowd"]]
        assert row["objects"] == len(real)
        assert (row["bbox"]["AP"] >= 0) == (category_id in PRESENT)
    assert metrics["per_class"]["never found"]["bbox"]["AP"] == 0
    json.dumps(metrics, allow_nan=False)
    text = metrics_table(metrics)
    assert "many" in text and "never there" not in text


def test_thousands_of_images() -> None:
    """To the last bit too. Images lie in another order than their ids, by which equal scores rank."""
    rng = np.random.default_rng(0)
    images, classes, objects, detections = 2500, 4, 4000, 30000
    image_of = np.sort(rng.integers(images, size=objects))
    boxes = np.concatenate([rng.uniform(0, 400, (objects, 2)), rng.lognormal(4, 1, (objects, 2))], axis=1)
    labels, crowd = rng.integers(classes - 1, size=objects), rng.random(objects) < 0.05
    areas = np.where(rng.random(objects) < 0.2, rng.choice([0, 1024, 9216], objects), boxes[:, 2:].prod(axis=1))
    empty = np.zeros(0)
    starts, nothing = np.zeros(objects + 1, np.int64), np.zeros(1, np.int64)
    table = AnnotationTable(
        source="made up", folder=Path(), file_names=np.zeros(images, "S1"), image_ids=rng.permutation(images) + 10,
        sizes=np.tile(SIZE, (images, 1)), starts=np.searchsorted(image_of, np.arange(images + 1)), boxes=boxes,
        labels=labels, areas=areas, crowd=crowd, annotation_ids=np.arange(objects),
        segmentations=Segmentations(np.zeros((0, 2)), nothing, starts, empty.astype(np.uint8), starts),
        class_names=tuple("abcd"), category_ids=tuple(range(3, 3 + classes)), repairs={},
    )  # fmt: skip
    source = np.sort(rng.integers(objects, size=detections))
    near = np.abs(boxes[source] * rng.normal(1, rng.choice([0.01, 0.05, 0.3], (detections, 1)), (detections, 4)))
    found_labels = np.where(rng.random(detections) < 0.8, labels[source], rng.integers(classes, size=detections))
    scores = rng.random(detections).round(rng.choice([1, 2]))
    predictions = Predictions(image_of[source], near, scores, found_labels)
    results = predictions.coco(table.image_ids, table.category_ids)
    metrics = coco_metrics(table, predictions)
    assert list(metrics["bbox"].values()) == pycocotools_figures(table.coco(), results)
    assert 0.1 < metrics["bbox"]["AP"] < 0.9
    figures = list(metrics["per_class"]["a"]["bbox"].values())
    assert figures == pycocotools_figures(table.coco(), results, table.category_ids[0])[:2]


def test_large_ids_stay_apart(coco_folder: MakeCocoFolder) -> None:
    """Ids that are the same number as floats: what is found in one image is not found in another."""
    boxes = [[2.0, 3.0, 10.0, 12.0], [30.0, 5.0, 20.0, 8.0], [5.0, 25.0, 40.0, 10.0]]
    folder = coco_folder([(40, 60)] * 3)
    for category in folder.content["categories"]:
        category["id"] += 10**17
    for row, image in enumerate(folder.content["images"]):
        image["id"] = 10**17 + 1 + row
        folder.content["annotations"].append(
            {"id": 10**17 + row, "image_id": image["id"], "category_id": 10**17 + 7, "bbox": boxes[row]}
        )
    table = folder.load()
    rows, scores = np.arange(3), np.array([0.9, 0.8, 0.7])
    metrics = coco_metrics(table, Predictions(rows, np.array(boxes)[[2, 0, 1]], scores, table.labels))
    assert [metrics["bbox"][name] for name in ("AP", "AP50", "AR1", "AR100")] == [0, 0, 0, 0]
    right = Predictions(rows, np.array(boxes), scores, table.labels)
    metrics = coco_metrics(table, right)
    assert metrics["bbox"]["AR1"] == 1 and metrics["bbox"]["AP"] == pytest.approx(1)
    results = right.coco(table.image_ids, table.category_ids)
    assert [(row["image_id"], row["category_id"]) for row in results] == [
        (10**17 + number, 10**17 + 7) for number in (1, 2, 3)
    ]


def test_perfect_predictions(coco_folder: MakeCocoFolder) -> None:
    boxes = [[2.0, 3, 10, 12], [20, 5, 8, 8]]
    table = coco_folder([(40, 60)], [{"image_id": 10, "bbox": box} for box in boxes]).load()
    metrics = coco_metrics(table, Predictions(np.zeros(2, int), np.array(boxes), np.ones(2), table.labels))
    assert metrics["bbox"]["AP"] == metrics["bbox"]["AR100"] == pytest.approx(1)
    assert metrics["bbox"]["APl"] == -1  # no object is large
    assert metrics["per_class"]["seven"] == {"bbox": {"AP": pytest.approx(1), "AP50": pytest.approx(1)}, "objects": 2}


def test_no_predictions(coco_folder: MakeCocoFolder) -> None:
    annotations = [{"image_id": 10, "bbox": [2, 3, 10, 12]}, {"image_id": 20, "bbox": [2, 3, 10, 12], "iscrowd": 1}]
    metrics = coco_metrics(coco_folder([(40, 60)] * 3, annotations).load(), NOTHING)
    assert [metrics["bbox"][name] for name in ("AP", "AP50", "AR100", "APs", "APm")] == [0, 0, 0, 0, -1]
    assert metrics["per_class"]["seven"] == {"bbox": {"AP": 0, "AP50": 0}, "objects": 1}
    assert metrics["per_class"]["two"] == {"bbox": {"AP": -1, "AP50": -1}, "objects": 0}
    assert NOTHING.coco(np.array([10]), (2, 7)) == []


@pytest.mark.parametrize("found", [0, 3])
def test_nothing_to_find(coco_folder: MakeCocoFolder, found: int) -> None:
    predictions = Predictions(np.zeros(found, int), np.full((found, 4), 5.0), np.ones(found), np.zeros(found, int))
    metrics = coco_metrics(coco_folder([(40, 60)] * 2).load(), predictions)
    assert set(metrics["bbox"].values()) == {-1}


def test_results_carry_the_original_ids(coco_folder: MakeCocoFolder) -> None:
    table = coco_folder([(40, 60)] * 3).load()  # image ids 10, 20, 30; category ids 2, 7
    boxes = np.array([[1.5, 2, 3, 4], [5, 6, 7.25, 8]])
    predictions = Predictions(np.array([0, 2]), boxes, np.array([0.75, 0.5]), np.array([1, 0]))
    results = predictions.coco(table.image_ids, table.category_ids)
    assert results == [
        {"image_id": 10, "category_id": 7, "bbox": [1.5, 2.0, 3.0, 4.0], "score": 0.75},
        {"image_id": 30, "category_id": 2, "bbox": [5.0, 6.0, 7.25, 8.0], "score": 0.5},
    ]
    assert json.loads(json.dumps(results)) == results


@needs_reference
def test_reference_figures(tmp_path: Path) -> None:
    """Twenty COCO images, crowds among them; the expected figures are pycocotools'."""
    truth = json.loads((REFERENCE / "instances_20.json").read_text())
    for image in truth["images"]:
        (tmp_path / image["file_name"]).touch()  # metrics do not look into the images
    table = load_split(CocoSplit(tmp_path, REFERENCE / "instances_20.json"))
    results = json.loads((REFERENCE / "bbox_results_20.json").read_text())
    predictions = predictions_of(table, results)
    expected = json.loads((REFERENCE / "expected_bbox.json").read_text())["bbox"]
    metrics = coco_metrics(table, predictions)
    assert metrics["bbox"] == pytest.approx(expected, abs=1e-12)
    ids = table.image_ids
    assert predictions.coco(ids, table.category_ids) == sorted(results, key=lambda r: ids.tolist().index(r["image_id"]))
    names = {category["id"]: category["name"] for category in truth["categories"]}
    some = {a["category_id"] for a in truth["annotations"][::40]}
    for category_id in some:
        figures = pycocotools_figures(truth, results, category_id)
        row = metrics["per_class"][names[category_id]]["bbox"]
        assert [row["AP"], row["AP50"]] == pytest.approx(figures[:2], abs=1e-12)


# From a detector


@pytest.fixture
def detector(accelerator: Accelerator) -> Detector:
    """Random weights: it finds both classes everywhere, and not the same in any two images."""
    torch.manual_seed(0)
    config = DetectorConfig(
        "faster_rcnn_r50_fpn", ("two", "seven"), (2, 7), backbone="resnet18", channels=16, proposals=20,
        short_side=64, long_side=96,
    )  # fmt: skip
    return build_detector(config.name, config=config).to(accelerator.device)


SHAPES = [(64, 96), (96, 64), (64, 64), (60, 90), (64, 80)]  # like shapes are predicted together: not in this order


def test_predictions_are_those_of_each_image(
    coco_folder: MakeCocoFolder, detector: Detector, accelerator: Accelerator
) -> None:
    table = coco_folder(SHAPES).load()
    detector.train()
    found = predict_split(detector, table, TestPreset(64, 96), 1, accelerator, num_workers=0)
    assert detector.training
    assert (np.diff(found.images) >= 0).all() and found.unreadable == ()
    for row in range(5):
        (alone,) = detector.predict([read_image(table.path(row))], score_threshold=0.05)
        mine = found.images == row
        x, y, width, height = found.boxes[mine].T
        np.testing.assert_allclose(np.stack([x, y, x + width, y + height], axis=1), alone["boxes"], atol=1e-3)
        np.testing.assert_allclose(found.scores[mine], alone["scores"], atol=1e-5)
        assert np.array(table.category_ids)[found.labels[mine]].tolist() == alone["category_ids"]
        assert set(alone["category_ids"]) == {2, 7}


def test_unreadable_images_have_no_detections(
    coco_folder: MakeCocoFolder, detector: Detector, accelerator: Accelerator
) -> None:
    """Not even what is found in the blank image that stands in."""
    table = coco_folder(SHAPES).load()
    whole = predict_split(detector, table, TestPreset(64, 96), 2, accelerator, num_workers=0)
    assert set(whole.images.tolist()) == {0, 1, 2, 3, 4}
    table.path(2).write_bytes(table.path(2).read_bytes()[:100])
    metrics, damaged = evaluate(detector, table, TestPreset(64, 96), 2, accelerator, num_workers=0)
    assert damaged.unreadable == (2,)
    others = whole.images != 2
    np.testing.assert_array_equal(damaged.images, whole.images[others])
    np.testing.assert_allclose(damaged.boxes, whole.boxes[others], atol=1e-3)
    assert metrics["bbox"]["AP"] == -1  # there is no object
