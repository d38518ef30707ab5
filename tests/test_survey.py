"""Figures about annotation tables, and what is proposed for them."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from conftest import MakeCocoFolder

from direct_pt.data.annotations import AnnotationTable
from direct_pt.models.anchors import Anchors
from direct_pt.models.boxes import overlaps
from direct_pt.models.detector import RetinaNet, TwoStage, build_detector
from direct_pt.reports.survey import (
    STAGE_1,
    STAGE_2,
    advice,
    anchor_recall,
    best_ious,
    class_counts,
    describe,
    fitting_image_size,
    object_sides,
    share_small,
    summary,
    whole_image,
)
from direct_pt.transforms import TestPreset

Box = Sequence[float]


def boxes_in(image: int, *boxes: Box, **values: object) -> list[dict[str, object]]:
    return [{"image_id": image, "bbox": list(box), **values} for box in boxes]


def rpn_anchors() -> Anchors:
    detector = build_detector("faster_rcnn_r50_fpn", 1, "resnet18")
    assert isinstance(detector, TwoStage)
    return detector.rpn.anchors


def retinanet_anchors() -> Anchors:
    detector = build_detector("retinanet_r50_fpn", 1, "resnet18")
    assert isinstance(detector, RetinaNet)
    return detector.head.anchors


def of_side(coco_folder: MakeCocoFolder, sides: Sequence[float], name: str = "set") -> AnnotationTable:
    """A table with square objects in one image whose stated size is 1000x1000."""
    folder = coco_folder([(8, 8)], boxes_in(10, *[(9, 9, side, side) for side in sides]), name=name)
    folder.content["images"][0] |= {"width": 1000, "height": 1000}
    return folder.load()


def test_the_figures_of_a_split(coco_folder: MakeCocoFolder) -> None:
    outline = [[0, 0, 16, 0, 16, 4]]
    annotations = [
        *boxes_in(10, (0, 0, 16, 4), segmentation=outline),
        *boxes_in(10, (8, 8, 8, 8), (20, 20, 0.5, 9)),  # the second is too narrow to be learnt
        *boxes_in(20, (0, 0, 32, 32), category_id=2),
        *boxes_in(20, (0, 0, 40, 20), iscrowd=1),
    ]
    table = coco_folder([(32, 64), (64, 64), (32, 64)], annotations).load()
    found = describe(table)
    counts = ("images", "images_without_objects", "objects", "crowd_regions", "boxes_under_1_pixel")
    assert [found[key] for key in counts] == [3, 1, 3, 1, 1]
    assert found["objects_with_outline"] == 1 and found["source"] == table.source
    assert found["classes"] == [
        {"id": 2, "name": "two", "objects": 1, "images": 1},
        {"id": 7, "name": "seven", "objects": 2, "images": 1},
    ]
    assert found["objects_per_image"] == {"least": 0, "p10": 0.2, "median": 1, "p90": 1.8, "largest": 2}
    sizes = found["image_sizes"]
    assert sizes["different"] == 2
    assert sizes["most_frequent"] == [
        {"width": 64, "height": 32, "images": 2},
        {"width": 64, "height": 64, "images": 1},
    ]
    assert sizes["aspect_ratio"]["median"] == 2 and sizes["height"]["largest"] == 64
    assert found["object_sides"]["in_files"]["median"] == 8 and found["object_sides"]["in_files"]["largest"] == 32
    assert found["object_sides"]["stage_1"]["median"] == 56  # 64 pixels become 448
    assert found["object_sides"]["stage_2"]["largest"] == 32 * 800 / 64
    json.dumps(found, allow_nan=False)


def test_a_split_without_objects_has_figures_too(coco_folder: MakeCocoFolder) -> None:
    table = coco_folder([(16, 16)]).load()
    found = describe(table)
    assert found["objects"] == 0 and found["object_sides"]["in_files"]["median"] is None
    assert anchor_recall(table, STAGE_1, rpn_anchors())["all"] == {"objects": 0, "recall": None, "under_0.3": None}
    assert share_small(table, STAGE_1) == 0 and fitting_image_size(table) == (448, 0)
    lines = advice({"train": table}, {"448x448": {"RPN": anchor_recall(table, STAGE_1, rpn_anchors())}})
    assert any("no validation split" in line for line in lines) and not any("--drop-empty" in line for line in lines)
    json.dumps([found, lines], allow_nan=False)


def test_sides_follow_the_preset(coco_folder: MakeCocoFolder) -> None:
    table = coco_folder([(50, 100)], boxes_in(10, (0, 0, 9, 16), (90, 40, 100, 100))).load()
    assert object_sides(table).tolist() == [12, 10]  # the second is cut to its image
    assert object_sides(table, TestPreset(100, 200)).tolist() == [24, 20]
    assert object_sides(table, whole_image(448)) == pytest.approx([12 * 4.48, 44.8])


@pytest.mark.parametrize(
    ("small", "side", "expected"),
    [(1, 10, 448), (2, 10, 800), (2, 17.8, 480), (2, 17.9, 448), (2, 6.1, 1312)],
)
def test_image_size_by_object_sizes(coco_folder: MakeCocoFolder, small: int, side: float, expected: int) -> None:
    """At most one of ten may be under 8 pixels: at 800 an object of 10 in 1000 pixels is not any more."""
    table = of_side(coco_folder, [side] * small + [500] * (10 - small))
    size, share = fitting_image_size(table)
    assert size == expected and share <= 0.1
    assert share_small(table, whole_image(size)) == share
    assert size == 448 or share_small(table, whole_image(size - 32)) > 0.1


def test_proposed_image_size_and_its_cost(coco_folder: MakeCocoFolder) -> None:
    lines = advice({"train": of_side(coco_folder, [10] * 3 + [500] * 7)}, {})
    text = "30% of the training objects are under 8 pixels at 448x448, hardly learnt: --image-size 800 leaves 0%"
    assert lines[0] == f"{text}, at 3.2 times the pixels a step"


def test_objects_too_small_for_any_size_ask_for_tiles(coco_folder: MakeCocoFolder) -> None:
    lines = advice({"train": of_side(coco_folder, [2] * 9 + [500])}, {})
    assert "90% still at 1312x1312; give --train-tiles" in lines[0]
    assert lines[1].startswith("90% of the training objects are under 8 pixels at 1333x800")


@pytest.mark.parametrize("make", [rpn_anchors, retinanet_anchors])
@pytest.mark.parametrize("frame", [(96, 160), (448, 448)])
def test_best_ious_are_those_of_all_anchors(make: Callable[[], Anchors], frame: tuple[int, int]) -> None:
    """Nearest by are the best ones: as a search through the whole grid says."""
    anchors, rng = make(), np.random.default_rng(0)
    height, width = frame
    low = rng.uniform(0, (width, height), (60, 2))
    boxes = np.concatenate([low, np.minimum(low + np.exp(rng.uniform(0.5, 5.5, (60, 2))), (width, height))], axis=1)
    boxes[:3] = [[0, 0, width, height], [0, 0, 2, 2], [width - 3, 0, width, height]]
    features = [torch.zeros(1, 1, -(-height // stride), -(-width // stride)) for stride in anchors.strides]
    grid = torch.cat(anchors(features)).double()
    expected = overlaps(torch.from_numpy(boxes)[None], grid[None])[0][0].amax(dim=1)
    found = best_ious(boxes, np.tile(frame, (60, 1)), anchors)
    assert found == pytest.approx(expected.numpy(), rel=1e-5)


def test_anchor_recall_by_size_and_shape(coco_folder: MakeCocoFolder) -> None:
    """An image that keeps its size: boxes that are anchors, one too small, one too long."""
    boxes = [(48, 48, 32, 32), (0, 0, 64, 64), (100, 100, 8, 8), (8, 200, 400, 10)]
    folder = coco_folder([(8, 8)], boxes_in(10, *boxes))
    folder.content["images"][0] |= {"width": 448, "height": 448}
    found = anchor_recall(folder.load(), STAGE_1, rpn_anchors())
    assert {name: (of["objects"], of["recall"]) for name, of in found.items()} == {
        "all": (4, 0.5),
        "small": (1, 0.0),  # 8x8 in 32x32 is a sixteenth
        "medium": (3, 0.6667),
        "large": (0, None),
        "wide": (1, 0.0),
        "between": (3, 0.6667),
        "tall": (0, None),
    }
    assert found["all"]["under_0.3"] == 0.5


def test_badly_fitting_anchors_are_reported(coco_folder: MakeCocoFolder) -> None:
    folder = coco_folder([(8, 8)], boxes_in(10, (100, 100, 8, 8), (48, 48, 32, 32), (8, 200, 400, 10)))
    folder.content["images"][0] |= {"width": 448, "height": 448}
    table, anchors = folder.load(), rpn_anchors()
    recalls = {
        "448x448": {"RPN": anchor_recall(table, STAGE_1, anchors)},
        "1333x800": {"RPN": anchor_recall(table, STAGE_2, anchors)},
    }
    lines = [line for line in advice({"train": table}, recalls) if "anchor" in line]
    assert lines[0].startswith("33% of the objects are small at 448x448, and of these only 0% (RPN)")
    assert "--image-size" in lines[0]
    assert any("are wide at 1333x800" in line and "the recipe's anchors are 1:2, 1:1 and 2:1" in line for line in lines)
    assert not any("are wide at 448x448" in line for line in lines)


def test_classes_that_are_missing_or_rare(coco_folder: MakeCocoFolder) -> None:
    annotations = boxes_in(10, (0, 0, 9, 9)) + boxes_in(20, (0, 0, 9, 9), (0, 0, 5, 5), category_id=2)
    small = coco_folder([(16, 16)] * 2, annotations).load()
    table = small.select(np.repeat([0, 1], [2100, 2]))
    in_images, objects = class_counts(table)
    assert in_images.tolist() == [2, 2100] and objects.tolist() == [4, 2100]
    lines = advice({"train": table, "val": small.select(np.zeros(60, np.int64))}, {})
    assert lines == [
        "1 of 2 classes occur in under 0.1% of the training images (two): --repeat-threshold 0.001 shows those images "
        "more often",
        "1 of 2 classes have no object in val (two): their AP is unknown",
    ]
    assert not advice({"train": table.select(np.arange(200, 2102)), "val": small.select(np.tile([0, 1], 25))}, {})


def test_small_splits_and_many_negatives(coco_folder: MakeCocoFolder) -> None:
    both = boxes_in(10, (0, 0, 9, 9)) + boxes_in(10, (0, 0, 9, 9), category_id=2)
    table = coco_folder([(16, 16)] * 3, both).load()
    assert advice({"train": table, "val": table}, {}) == [
        "67% of the training images have no object: --drop-empty trains on the others alone",
        "val has 2 objects: under 50, its AP is mostly chance",
    ]
    assert advice({"val": table.select(np.zeros(25, np.int64))}, {}) == []  # no training split, nothing to say


def test_summary_is_short(coco_folder: MakeCocoFolder) -> None:
    table = of_side(coco_folder, [10] * 3 + [500] * 7)
    lines = summary({"train": table}, STAGE_1)
    assert lines[0] == (
        "objects at 448x448: a tenth are under 4 pixels (square root of the box's area), half under 224, a tenth above "
        "224"
    )
    assert "--image-size 800" in lines[1] and "classes have no object in train (two)" in lines[2]
    everything = {split: table.select(np.array([0])) for split in ("train", "val", "test", "more")}
    assert len(summary(everything, STAGE_1)) == 6
    assert "at 1333x800" in summary({"train": table}, STAGE_2)[0]
