"""Masks on the way out: metrics against pycocotools, run lengths of what a detector finds, pictures, real scripts."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import torch
from accelerate import Accelerator
from conftest import MakeCocoFolder
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from test_coco_eval import REFERENCE, needs_reference, predictions_of, pycocotools_figures

from direct_pt import coco_eval
from direct_pt.checkpoint import save_model
from direct_pt.coco_eval import METRICS, Predictions, coco_metrics, evaluate, metrics_table, predict_split
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit, find_coco
from direct_pt.data.sources import load_split
from direct_pt.errors import InputError
from direct_pt.images import visualize
from direct_pt.images.decoding import read_image
from direct_pt.models.detector import Detector, DetectorConfig, TwoStage, build_detector
from direct_pt.models.mask_encoding import mask_run_lengths
from direct_pt.onnx_detector import paste_masks
from direct_pt.reports import plots
from direct_pt.transforms import TestPreset

Json = dict[str, Any]
NAMES = {2: "two", 7: "seven"}


def encode(mask: np.ndarray) -> Json:
    """COCO's own run lengths of a mask [h, w], as they stand in a file."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def result(image_id: int, category_id: int, score: float, mask: np.ndarray) -> Json:
    """A row of COCO results. Its box says nothing of the mask: neither figure must depend on the other's area."""
    box = [0.5, 1.0, 199.0, 178.0]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score, "segmentation": encode(mask)}


# Metrics


def assert_equal_to_pycocotools(table: AnnotationTable, truth: Json, results: list[Json], every: int = 1) -> Json:
    """All figures to the last bit, and those of each class of the truth, or of every second, third, ... of them."""
    images = table.image_ids.tolist()
    results = sorted(results, key=lambda row: images.index(row["image_id"]))  # equal scores rank in this order
    metrics = coco_metrics(table, predictions_of(table, results))
    assert list(metrics) == ["bbox", "segm", "per_class"]
    for kind in ("bbox", "segm"):
        assert list(metrics[kind]) == list(METRICS)
        assert list(metrics[kind].values()) == pycocotools_figures(truth, results, kind=kind)
        for category in truth["categories"][::every]:
            figures = metrics["per_class"][category["name"]][kind]
            assert list(figures) == ["AP", "AP50"]
            assert list(figures.values()) == pycocotools_figures(truth, results, category["id"], kind)[:2]
    json.dumps(metrics, allow_nan=False)
    return metrics


def star(rng: np.random.Generator, reach: float) -> list[float]:
    """A polygon around a point of a 180x200 image, at places beyond it: x, y, x, y, ..."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    points = rng.uniform([0, 0], [200, 180]) + (rng.uniform(0.5, 1, 12) * reach * [np.cos(angles), np.sin(angles)]).T
    return points.round(2).ravel().tolist()


def noisy(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A mask moved by a few pixels, with a stripe taken away."""
    moved = np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1))
    row = rng.integers(len(mask))
    moved[row : row + 4] = 0
    return moved


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 5])
def test_equal_to_pycocotools(coco_folder: MakeCocoFolder, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polygons in one or several parts, crowds as run lengths of both kinds; results near them, and far too many.

    Some objects' areas in the file are not those of their masks, and lie at the limits of the sizes.
    """
    monkeypatch.setattr(coco_eval, "IMAGES_AT_ONCE", 3)
    rng = np.random.default_rng(seed)
    folder = coco_folder([(180, 200)] * 7)
    annotations, results = [], []
    for image_id in (20, 30, 40, 50, 60):  # the first and the last are empty
        for _ in range(6):
            reach = rng.choice([8, 35, 90])
            polygons = [star(rng, reach) for _ in range(rng.choice([1, 1, 3]))]
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 180, 200)))
            crowd = rng.random() < 0.25
            outline: Any = encode(mask) if crowd else polygons
            if crowd and rng.random() < 0.5:
                changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0)).tolist()
                outline = {"size": [180, 200], "counts": np.diff([0, *changes, mask.size]).tolist()}
            category = int(rng.choice([2, 7]))
            common = {"image_id": image_id, "category_id": category}
            box = coco_mask.toBbox(encode(mask)).tolist()
            area = int(rng.choice([0, 1024, 9216]) if rng.random() < 0.2 else mask.sum())
            annotations.append({**common, "bbox": box, "area": area, "iscrowd": int(crowd), "segmentation": outline})
            for _ in range(rng.integers(0, 4)):
                score = round(float(rng.random()), 1)  # many are equal
                results.append(result(image_id, category, score, noisy(rng, mask)))
                if rng.random() < 0.5:
                    results[-1]["bbox"] = (np.array(box) + 0.5).tolist()
    everywhere = [result(30, 7, 0.55, noisy(rng, np.ones((180, 200), bool))) for _ in range(130)]
    nowhere = [result(image_id, 2, 0.95, np.zeros((180, 200), bool)) for image_id in (10, 20, 40)]
    folder.content["annotations"] = [{"id": row + 1, **each} for row, each in enumerate(annotations)]
    assert {type(each["segmentation"]) for each in annotations} == {list, dict}
    metrics = assert_equal_to_pycocotools(folder.load(), folder.content, results + everywhere + nowhere)
    assert 0.05 < metrics["segm"]["AP"] < 0.9 and metrics["segm"]["APs"] >= 0 and metrics["segm"]["APl"] >= 0
    assert abs(metrics["segm"]["AP"] - metrics["bbox"]["AP"]) > 0.02


@needs_reference
def test_equal_to_pycocotools_on_coco_images(tmp_path: Path) -> None:
    """Twenty COCO images, crowds among them; what is found are their masks, moved, and boxes beside them."""
    rng = np.random.default_rng(0)
    path, results = REFERENCE / "instances_20.json", []
    truth = COCO(str(path))
    for image in truth.dataset["images"]:
        (tmp_path / image["file_name"]).touch()  # metrics do not look into the images
    for annotation in truth.dataset["annotations"]:
        mask = noisy(rng, truth.annToMask(annotation))
        row = result(annotation["image_id"], annotation["category_id"], round(float(rng.random()), 3), mask)
        results.append({**row, "bbox": np.add(annotation["bbox"], [1, 1, 2, 2]).tolist()})
    metrics = assert_equal_to_pycocotools(load_split(CocoSplit(tmp_path, path)), truth.dataset, results, every=8)
    assert 0.2 < metrics["segm"]["AP"] < 0.9


def square(y1: int, x1: int, y2: int, x2: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    """A mask of one rectangle."""
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def test_crowd_without_an_outline_counts_with_its_box(coco_folder: MakeCocoFolder) -> None:
    """COCO's tools cannot read such a file; a detection in the region is neither right nor wrong."""
    outline = [[2.0, 3.0, 12.0, 3.0, 12.0, 15.0, 2.0, 15.0]]
    real = {"image_id": 10, "bbox": [2.0, 3.0, 10.0, 12.0], "segmentation": outline}
    crowd = {"image_id": 10, "bbox": [30.0, 10.0, 100.0, 20.0], "iscrowd": 1}
    tiny = {"image_id": 10, "bbox": [20.0, 5.0, 0.5, 0.5]}  # nothing is learnt from it either
    folder = coco_folder([(40, 60)], [real, crowd, tiny])
    table = folder.load()
    results = [result(10, 7, 0.5, square(3, 2, 15, 12)), result(10, 7, 0.9, square(12, 31, 28, 50))]
    metrics = coco_metrics(table, predictions_of(table, results))
    truth = json.loads(json.dumps(folder.content))
    for annotation, corners in zip(
        truth["annotations"][1:],
        ([30, 10, 60, 10, 60, 30, 30, 30], [20, 5, 20.5, 5, 20.5, 5.5, 20, 5.5]),
        strict=True,
    ):
        annotation["segmentation"] = [corners]
    for row, annotation in enumerate(truth["annotations"]):
        annotation |= {"area": float(table.areas[row]), "iscrowd": int(table.crowd[row])}
    expected = pycocotools_figures(truth, results, kind="segm")
    assert list(metrics["segm"].values()) == expected
    assert metrics["segm"]["AP50"] == pytest.approx(51 / 101)  # one of two objects found, nothing in its place


def test_figures_for_people(coco_folder: MakeCocoFolder) -> None:
    outline = [[2.0, 3.0, 12.0, 3.0, 12.0, 15.0, 2.0, 15.0]]
    table = coco_folder([(40, 60)], [{"image_id": 10, "bbox": [2, 3, 10, 12], "segmentation": outline}]).load()
    row = {**result(10, 7, 0.5, square(3, 2, 15, 12)), "bbox": [20.0, 20.0, 5.0, 5.0]}
    metrics = coco_metrics(table, predictions_of(table, [row]))
    assert metrics["per_class"] == {
        "two": {"bbox": {"AP": -1, "AP50": -1}, "segm": {"AP": -1, "AP50": -1}, "objects": 0},
        "seven": {
            "bbox": {"AP": 0, "AP50": 0},
            "segm": {"AP": pytest.approx(1), "AP50": pytest.approx(1)},
            "objects": 1,
        },
    }
    assert metrics_table(metrics).splitlines() == [
        "box  AP 0.000  AP50 0.000  AP75 0.000  APs 0.000  APm -1.000  APl -1.000",
        "mask AP 1.000  AP50 1.000  AP75 1.000  APs 1.000  APm -1.000  APl -1.000",
        "class  objects  box AP  box AP50  mask AP  mask AP50",
        "seven        1   0.000     0.000    1.000      1.000",
    ]
    boxes_only = {
        "bbox": metrics["bbox"],
        "per_class": {name: {**row, "segm": {}} for name, row in metrics["per_class"].items()},
    }
    assert metrics_table(boxes_only).splitlines() == [
        "AP 0.000  AP50 0.000  AP75 0.000  APs 0.000  APm -1.000  APl -1.000",
        "class  objects     AP   AP50",
        "seven        1  0.000  0.000",
    ]


# From a detector


def test_run_lengths_are_the_pasted_mask() -> None:
    """Boxes of fractions of a pixel, across the borders, and as large as the image."""
    rng = np.random.default_rng(0)
    probabilities = rng.random((6, 28, 28), np.float32)
    probabilities[4] = 0.5  # the threshold itself counts
    boxes = np.array(
        [[3.2, 4.7, 30.1, 22.9], [0, 0, 60, 40], [50.5, 31.5, 75, 44], [7.1, 7.2, 7.4, 7.9], [10, 10, 20, 20],
         [60, 12, 60, 18]], np.float32,
    )  # fmt: skip
    masks = paste_masks(probabilities, boxes, (40, 60))
    assert masks[4].sum() == 100 and masks[:3].any(axis=(1, 2)).all() and not masks[5].any()
    for mask, encoded in zip(masks, mask_run_lengths(probabilities, boxes, np.tile([40, 60], (6, 1))), strict=True):
        assert json.loads(json.dumps(encoded)) == encoded and encoded["size"] == [40, 60]
        np.testing.assert_array_equal(coco_mask.decode(encoded), mask)


def random_detector(names: dict[int, str], **sizes: int) -> TwoStage:
    """A mask detector with random weights: it finds all classes everywhere, and not the same in any two images."""
    torch.manual_seed(0)
    config = DetectorConfig("mask_rcnn_r50_fpn", tuple(names.values()), tuple(names), backbone="resnet18", **sizes)
    detector = build_detector(config.name, config=config)
    assert isinstance(detector, TwoStage) and detector.has_masks
    return detector


@pytest.fixture
def detector(accelerator: Accelerator) -> TwoStage:
    """It finds a few dozen objects an image."""
    return random_detector(NAMES, channels=16, proposals=20, short_side=64, long_side=96).to(accelerator.device)


SHAPES = [(128, 192), (192, 128), (64, 64), (90, 135), (50, 40)]  # not the size that the detector sees


def test_masks_are_those_of_each_image(
    coco_folder: MakeCocoFolder, detector: TwoStage, accelerator: Accelerator
) -> None:
    """Each with its own box and in its own image's frame, though like shapes are predicted together."""
    table = coco_folder(SHAPES).load()
    found = predict_split(detector, table, TestPreset(64, 96), 1, accelerator, num_workers=0)
    assert found.masks is not None and len(found.masks) == len(found.boxes)
    areas = []
    for row, size in enumerate(SHAPES):
        (alone,) = detector.predict([read_image(table.path(row))], score_threshold=0.05)
        masks = [found.masks[place] for place in np.flatnonzero(found.images == row)]
        assert len(masks) == len(alone["masks"]) > 5
        for mask, expected in zip(masks, alone["masks"], strict=True):
            assert mask["size"] == list(size)
            areas.append(expected.sum())
            assert (coco_mask.decode(mask) != expected).sum() <= areas[-1] // 1000  # rounding at the threshold
    assert len(set(areas)) > 50


@pytest.mark.parametrize("broken", [2, None])
def test_unreadable_images_and_empty_batches(
    coco_folder: MakeCocoFolder, detector: TwoStage, accelerator: Accelerator, broken: int | None
) -> None:
    """They have no masks; what belongs to the others stays with them. Without any detection there are still figures."""
    outline = [[8.0, 8.0, 40.0, 8.0, 40.0, 40.0, 8.0, 40.0]]
    table = coco_folder(SHAPES, [{"image_id": 10, "bbox": [8, 8, 32, 32], "segmentation": outline}]).load()
    whole = predict_split(detector, table, TestPreset(64, 96), 2, accelerator, num_workers=0)
    assert whole.masks is not None
    if broken is None:
        detector.roi_head.score_threshold = 1.0
        metrics, found = evaluate(detector, table, TestPreset(64, 96), 2, accelerator, num_workers=0)
        assert found.masks == [] and found.coco(table.image_ids, table.category_ids) == []
        expected = []
    else:
        table.path(broken).write_bytes(table.path(broken).read_bytes()[:100])
        metrics, found = evaluate(detector, table, TestPreset(64, 96), 2, accelerator, num_workers=0)
        assert found.unreadable == (broken,)
        rows = zip(whole.masks, whole.images.tolist(), strict=True)
        expected = [mask for mask, image in rows if image != broken]
    assert found.masks == expected and len(found.images) == len(expected)
    assert metrics["segm"].keys() == metrics["bbox"].keys() and metrics["segm"]["AP"] >= 0


def test_shared_between_processes(
    coco_folder: MakeCocoFolder, detector: TwoStage, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with two processes, one after another: with few images the second has none and does not know of masks."""
    table = coco_folder(SHAPES).load()
    gathered: list[Predictions] = []
    monkeypatch.setattr(coco_eval, "gather_to_main", lambda part, _: gathered.append(part) or list(gathered))
    for micro_batch_size in (1, 8):
        alone = predict_split(detector, table, TestPreset(64, 96), micro_batch_size, accelerator, num_workers=0)
        gathered.clear()
        for rank in (1, 0):
            part: Any = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=False)
            part.device, part.mixed_precision = accelerator.device, accelerator.mixed_precision
            shared = predict_split(detector, table, TestPreset(64, 96), micro_batch_size, part, num_workers=0)
        assert (len(gathered[0].images) == 0) == (micro_batch_size == 8)
        assert shared.masks is not None and len(shared.masks) == len(alone.images) > 0
        rows, expected = (found.coco(table.image_ids, table.category_ids) for found in (shared, alone))
        assert rows == expected
        gathered.clear()


def test_the_order_of_the_classes_is_the_detectors_own(
    coco_folder: MakeCocoFolder, detector: TwoStage, accelerator: Accelerator
) -> None:
    """The table's classes stand in the order of their ids; results name a class by its id."""
    table = coco_folder(SHAPES[:2]).load()

    def categories(by: Detector) -> list[int]:
        found = predict_split(by, table, TestPreset(64, 96), 2, accelerator, num_workers=0)
        return [row["category_id"] for row in found.coco(table.image_ids, table.category_ids)]

    one = categories(detector)
    detector.config = replace(detector.config, class_names=("seven", "two"), category_ids=(7, 2))
    assert set(one) == {2, 7} and categories(detector) == [9 - category for category in one]


def test_objects_without_an_outline_are_refused(
    coco_folder: MakeCocoFolder, detector: TwoStage, accelerator: Accelerator
) -> None:
    table = coco_folder(SHAPES[:1], [{"image_id": 10, "bbox": [8, 8, 32, 32]}]).load()
    with pytest.raises(InputError, match=r"labels\.json: 1 object\(s\) without .segmentation., .* \(id 100\)"):
        evaluate(detector, table, TestPreset(64, 96), 2, accelerator, num_workers=0)


# Pictures


@pytest.mark.parametrize("lazily", [False, True])
def test_masks_are_drawn_under_boxes_and_captions(lazily: bool) -> None:
    """A picture changes in the masks, half towards the class's colour, and where boxes and captions lie over them."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(200, 300, 3), dtype=np.uint8)
    boxes = np.array([[20.4, 50.6, 120, 150], [90, 100, 280, 190], [250, 150, 330, 230]], np.float32)
    labels, captions = np.array([0, 3, 1]), ["first 0.90", "second 0.80", "third"]
    masks = np.zeros((3, 200, 300), bool)
    masks[0, 60:140, 30:110] = rng.random((80, 80)) < 0.5
    masks[1, 110:190, 130:280] = True  # the second's and the third's overlap
    masks[2, 160:200, 260:300] = True
    image = Image.fromarray(pixels)
    plain = np.asarray(visualize.draw_detections(image, boxes, labels, captions)).astype(int)
    given = (mask for mask in masks) if lazily else masks
    drawn = np.asarray(visualize.draw_detections(image, boxes, labels, captions, given)).astype(int)
    np.testing.assert_array_equal(pixels, np.asarray(image))

    over = (plain != pixels).any(axis=2)
    np.testing.assert_array_equal(drawn[over], plain[over])
    tinted = masks.any(axis=0) & ~over
    np.testing.assert_array_equal(drawn[~tinted & ~over], pixels[~tinted & ~over])
    expected = pixels.astype(float)
    for mask, label in zip(masks, labels.tolist(), strict=True):
        expected[mask] = (expected[mask] + visualize.class_color(label)) / 2
    assert np.abs(drawn - expected)[tinted].max() <= 2 and tinted.sum() > 10000


def test_curves_of_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [{"step": 1, "loss": 2.0, "losses": {"mask": 2.0}, "lr": 0.1}]
    boxes = [{"step": step, "bbox": {"AP": 0.1 * step, "AP50": 0.2, "AP75": 0.3}} for step in (1, 2)]
    masks = [{**record, "segm": {"AP": 0.05 * record["step"], "AP50": 0.15}} for record in boxes]
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    for records in (boxes, masks):
        plots.plot_curves(losses + records, tmp_path / "curves.png")
    (box_lines, mask_lines) = ({line.get_label(): line for line in figure.axes[1].lines} for figure in figures)
    assert list(box_lines) == ["AP", "AP50", "AP75"]
    assert list(mask_lines) == [*box_lines, "mask AP", "mask AP50"]
    assert mask_lines["mask AP"].get_ydata() == pytest.approx([0.05, 0.1])
    assert {line.get_linestyle() for line in list(mask_lines.values())[3:]} == {"--"}


# The scripts


@pytest.fixture(scope="module")
def eager(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds something in every image. It lists the demo set's classes the other way round."""
    content = runs.read_json(demo / "annotations/instances_val.json")
    names = {category["id"]: category["name"] for category in content["categories"][::-1]}
    detector = random_detector(names, channels=32, proposals=64, short_side=runs.SIZE, long_side=128)
    with torch.no_grad():
        detector.roi_head.box_heads[0].class_logits.bias[-1] -= 10
    folder = tmp_path_factory.mktemp("eager_masks")
    save_model(folder, detector, [])
    return folder


@pytest.fixture(scope="module")
def truth_data(eager: Path, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data, with some of what `eager` finds as the validation images' objects, and what it found."""
    runs.call_script("evaluate", "--checkpoint", eager, "--data", demo, *runs.MACHINE)
    folder = runs.make_truth(demo, eager / "predictions.json", tmp_path_factory.mktemp("truth_masks"))
    path = folder / "annotations/instances_val.json"
    content = runs.read_json(path)
    for annotation, row in zip(content["annotations"], runs.read_json(eager / "predictions.json")[::7], strict=True):
        mask = row["segmentation"]
        annotation |= {"segmentation": mask, "area": float(coco_mask.area(mask))}
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def evaluated(eager: Path, truth_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What evaluate.py leaves."""
    folder = tmp_path_factory.mktemp("evaluated_masks")
    flags = ("--checkpoint", eager, "--data", truth_data, "--output-dir", folder, "--micro-batch-size", 16)
    runs.call_script("evaluate", *flags, *runs.MACHINE)
    return folder


def test_evaluate(evaluated: Path, truth_data: Path) -> None:
    rows = runs.read_json(evaluated / "predictions.json")
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"} and len(rows) > 9 * 50
    table = load_split(find_coco(truth_data)["val"])
    truth = runs.read_json(truth_data / "annotations/instances_val.json")
    metrics = assert_equal_to_pycocotools(table, truth, rows, every=4)
    assert metrics == runs.read_metrics(evaluated / "metrics.json")
    assert min(metrics["bbox"]["AP"], metrics["segm"]["AP"]) > 0.05


def test_evaluate_refuses_objects_without_outlines(eager: Path, demo: Path, tmp_path: Path) -> None:
    content = runs.read_json(demo / "annotations/instances_val.json")
    del content["annotations"][3]["segmentation"]
    (tmp_path / "data/annotations").mkdir(parents=True)
    (tmp_path / "data/images").symlink_to(demo / "images")
    (tmp_path / "data/annotations/instances_val.json").write_text(json.dumps(content))
    flags = ("--checkpoint", eager, "--data", tmp_path / "data", "--output-dir", tmp_path / "found", *runs.MACHINE)
    with pytest.raises(InputError, match=r"instances_val\.json: 1 object\(s\) without .segmentation., .* \(id 4\)"):
        runs.call_script("evaluate", *flags)
    assert not (tmp_path / "found").exists()


def test_predict(eager: Path, evaluated: Path, demo: Path, tmp_path: Path) -> None:
    """The same masks as in the evaluation, in the file and in the pictures."""
    photos = sorted((demo / "images").glob("val_*"))[:2]
    scores = [row["score"] for row in runs.read_json(evaluated / "predictions.json") if row["image_id"] <= 2]
    threshold = sorted(scores)[-20]
    flags = ("--checkpoint", eager, "--output-dir", tmp_path, "--score-threshold", threshold, *runs.MACHINE)
    runs.call_script("predict", *photos, *flags)
    found = runs.read_json(tmp_path / "predictions.json")
    known = [row for row in runs.read_json(evaluated / "predictions.json") if row["score"] > threshold - 1e-4]
    assert {row["image_id"] for row in found} == {1, 2} and 15 <= len(found) <= 20
    for row in found:
        same = [
            other
            for other in known
            if (other["image_id"], other["category_id"]) == (row["image_id"], row["category_id"])
            and other["bbox"] == pytest.approx(row["bbox"], abs=1e-3)
        ]
        masks = [coco_mask.decode(each["segmentation"]) for each in (*same, row)]
        assert (
            len(masks) == 2 and masks[0].shape == (runs.FILE_SIZE, runs.FILE_SIZE) and (masks[0] != masks[1]).sum() < 5
        )

    names = {row["category_id"]: row["category_name"] for row in found}
    order = list(names_of_model(eager))
    for number, photo in enumerate(photos, start=1):
        mine = [row for row in found if row["image_id"] == number]
        x, y, width, height = np.array([row["bbox"] for row in mine]).T
        drawn = visualize.draw_detections(
            Image.fromarray(read_image(photo)),
            np.stack([x, y, x + width, y + height], axis=1),
            np.array([order.index(names[row["category_id"]]) for row in mine]),
            [f"{row['category_name']} {row['score']:.2f}" for row in mine],
            [coco_mask.decode(row["segmentation"]).astype(bool) for row in mine],
        )
        drawn.save(tmp_path / "again.jpg", quality=92)
        again, picture = (np.asarray(Image.open(tmp_path / name)) for name in ("again.jpg", photo.name))
        np.testing.assert_array_equal(picture, again)


def names_of_model(folder: Path) -> list[str]:
    """In the order of its class indices."""
    return runs.read_json(folder / "config.json")["detector"]["class_names"]
