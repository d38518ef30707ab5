"""The same 200 images through every source: the same objects, the same samples, the same AP."""

import json
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import small_runs as runs
from accelerate import Accelerator

from direct_pt.checkpoint import from_pretrained
from direct_pt.coco_eval import coco_metrics, predict_split
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import find_coco
from direct_pt.data.loader import Share, TableFeed
from direct_pt.data.sources import DataOptions, load_split, load_tables
from direct_pt.data.stream import StreamFeed, open_stream
from direct_pt.images.decoding import Decoding
from direct_pt.transforms import PretrainPreset, TestPreset

IMAGES = 200
PRESET = TestPreset(64, 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An annotation file's content and the images: its objects are what a detector finds, so that AP is not 0."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("same")
    flags = ("--train-images", IMAGES, "--val-images", 1, "--image-size", 64)
    runs.load_script("make_demo_data").main(["--output-dir", str(folder / "demo"), *map(str, flags)])
    table = load_split(find_coco(folder / "demo")["train"])
    run = runs.make_eager(runs.pretrained_run(tmp_path_factory), folder / "eager")
    with runs.fresh_process():
        found = predict_split(from_pretrained(run), table, PRESET, 8, Accelerator(cpu=True), 0)
    content = json.loads((folder / "demo/annotations/instances_train.json").read_text())
    inside = [
        row for row in found.coco(table.image_ids, table.category_ids)[::7]
        if min(row["bbox"][2:]) > 2 and row["bbox"][0] + row["bbox"][2] < 64 and row["bbox"][1] + row["bbox"][3] < 64
    ]  # fmt: skip
    content["annotations"] = [
        {"id": number, "image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"]}
        for number, row in enumerate(inside, start=1)
    ]
    assert len(content["annotations"]) > IMAGES
    return content, folder / "demo/images"


@pytest.fixture(scope="module")
def reference(source: tuple[dict[str, Any], Path], tmp_path_factory: pytest.TempPathFactory) -> AnnotationTable:
    return exported("coco", source, tmp_path_factory.mktemp("reference"))


def exported(name: str, source: tuple[dict[str, Any], Path], folder: Path) -> AnnotationTable:
    """The set in one format, in terms of COCO's classes."""
    images = folder / "images"
    images.mkdir()
    for image in source[0]["images"]:
        (images / image["file_name"]).hardlink_to(source[1] / image["file_name"])
    exports.FORMATS[name](source[0], images, folder / name)
    table = load_tables(DataOptions(data=folder / name, val_share=0))["train"]
    names = exports.names_of(source[0])
    assert set(table.class_names) <= set(names.values())  # VOC and plain names know those that have objects
    return table.with_classes(tuple(names.values()), tuple(names))


def name_of(table: AnnotationTable, row: int) -> str:
    return table.image_name(row).replace(", ", "/").split("/")[-1]


@pytest.mark.parametrize("name", exports.FORMATS)
def test_same_samples_and_the_same_ap(
    name: str, source: tuple[dict[str, Any], Path], reference: AnnotationTable, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    table = exported(name, source, tmp_path)
    assert [name_of(table, row) for row in range(IMAGES)] == [name_of(reference, row) for row in range(IMAGES)]
    np.testing.assert_array_equal(table.sizes, reference.sizes)
    np.testing.assert_array_equal(table.starts, reference.starts)
    np.testing.assert_array_equal(table.labels, reference.labels)
    np.testing.assert_allclose(table.boxes, reference.boxes, rtol=0, atol=1e-12)
    share = Share(8, 0, 25)
    feeds = (TableFeed(one, PretrainPreset(64), 3, False, 0) for one in (table, reference))
    for found, expected in zip(*(feed.batches(share) for feed in feeds), strict=True):
        assert found.images.equal(expected.images) and found.labels.equal(expected.labels)
        assert found.valid.equal(expected.valid) and found.indices.equal(expected.indices)
        np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=1e-5)
    run = runs.make_eager(runs.pretrained_run(tmp_path_factory), tmp_path / "eager")
    with runs.fresh_process():
        found = predict_split(from_pretrained(run), table, PRESET, 8, Accelerator(cpu=True), 0)
    metrics, expected = coco_metrics(table, found), coco_metrics(reference, found)
    assert metrics == expected and metrics["bbox"]["AP"] > 0.05
    print(f"{name}: AP {metrics['bbox']['AP']:.6f}")


def test_same_samples_in_a_stream(
    source: tuple[dict[str, Any], Path], reference: AnnotationTable, tmp_path: Path
) -> None:
    exports.parquet(source[0], source[1], tmp_path / "set")
    feed = StreamFeed(open_stream(tmp_path / "set", "coco", Decoding(), 50), PRESET, 0, False, 0)
    whole = {
        name_of(reference, int(batch.indices[0])): batch
        for batch in TableFeed(reference, PRESET, 0, False, 0).batches(Share(1, 0, IMAGES))
    }
    seen = set()
    for batch in feed.batches(Share(1, 0, IMAGES)):
        name = feed.image_name(int(batch.indices[0])).split(", ")[-1]
        seen.add(name)
        for field in ("images", "labels", "valid", "boxes"):
            assert getattr(batch, field).equal(getattr(whole[name], field)), field
    assert len(seen) == IMAGES
