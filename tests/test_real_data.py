"""Small real data sets, where they lie beside the project: some COCO 2017 images, and two sets in the plain layout."""

from pathlib import Path

import numpy as np
import pytest
import small_runs as runs

from direct_pt.checkpoint import from_pretrained, save_model
from direct_pt.data.formats.coco import find_coco
from direct_pt.data.loader import Share, TableFeed
from direct_pt.data.sources import load_split
from direct_pt.transforms import PretrainPreset

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets do not lie beside the project")


@pytest.mark.parametrize(("model", "kinds"), [(runs.MODEL, ["bbox"]), ("mask_rcnn_r50_fpn", ["bbox", "segm"])])
def test_coco_images_train_and_evaluate(model: str, kinds: list[str], tmp_path: Path) -> None:
    """A few steps on COCO images with crowd regions; predictions carry COCO's ids, figures are pycocotools'."""
    data, run = DATA / "coco_permissive", tmp_path / "run"
    flags = (*runs.PRETRAIN, "--model", model, "--global-batch-size", 8, "--micro-batch-size", 4, "--max-steps", 3)
    runs.train("pretrain", "--data", data, *flags, *runs.NO_EVALUATION, "--output-dir", run)
    losses = [record["loss"] for record in runs.records(run) if "loss" in record]
    assert np.isfinite(losses).all()
    found, eager = tmp_path / "found", tmp_path / "eager"
    detector = from_pretrained(runs.make_eager(run, eager))
    detector.roi_head.box_heads[0].class_logits.weight.data[:-1] *= 1000  # of 80 classes, some are to stand out
    detector.roi_head.box_heads[0].class_logits.weight.data[-1] = 0
    if detector.has_masks:
        detector.roi_head.mask_head.logits.bias.data += 5  # boxes are filled, which some objects do too
    save_model(eager, detector, [])
    runs.call_script("evaluate", "--checkpoint", eager, "--data", data, *runs.MACHINE, "--output-dir", found)

    annotations = data / "annotations/instances_val2017.json"
    truth, rows = runs.read_json(annotations), runs.read_json(found / "predictions.json")
    assert {row["image_id"] for row in rows} <= {image["id"] for image in truth["images"]} and len(rows) > 100
    assert {row["category_id"] for row in rows} <= {category["id"] for category in truth["categories"]}
    metrics = runs.read_metrics(found / "metrics.json")
    assert set(metrics) == {*kinds, "per_class"}
    for kind in kinds:
        figures = runs.pycocotools_figures(annotations, found / "predictions.json", kind)
        assert list(metrics[kind].values()) == pytest.approx(figures, abs=1e-12)
        assert metrics[kind]["AP"] > 0 and metrics[kind]["AR100"] > 0


@pytest.mark.parametrize(
    ("name", "images", "objects", "classes"),
    [("cbc", 288, 3861, 3), ("rice_leaf", 91, 563, 3), ("coco_permissive", 33, 246, 80)],
)
def test_every_image_becomes_a_sample(name: str, images: int, objects: int, classes: int) -> None:
    table = load_split(find_coco(DATA / name)["train"])
    assert (len(table), len(table.boxes), len(table.class_names)) == (images, objects, classes)
    with_masks = bool(table.segmentations.present().all())
    feed = TableFeed(table, PretrainPreset(96), 0, with_masks, num_workers=0)
    seen = []
    for batch in feed.batches(Share(8, 0, -(-images // 8))):
        assert batch.images.shape[1:] == (3, 96, 96) and not batch.unreadable
        sides = batch.boxes[batch.valid][:, 2:] - batch.boxes[batch.valid][:, :2]
        assert (sides > 0).all() and batch.boxes.min() >= 0 and batch.boxes.max() <= 96
        if with_masks:
            assert batch.masks is not None
            assert len(batch.masks) == int((batch.valid | batch.crowd).sum())
        seen += batch.indices.tolist()
    assert set(seen) == set(range(images))
