"""The five detectors on whole batches: order, padding, nothing to learn, weights that have diverged, detection."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
import torch
from small_detectors import (
    CASCADE,
    CLASSES,
    FASTER,
    LOSSES,
    MASK,
    RETINANET,
    SIDE,
    SWIN,
    select_images,
    small_detector,
    total_loss,
    two_stage,
    without_drop_path,
    without_objects,
)
from torch import Tensor, nn

from direct_pt.batch import Batch, Detections
from direct_pt.errors import InputError
from direct_pt.images.decoding import read_image
from direct_pt.models.detector import MODELS, Detector, DetectorConfig, RetinaNet, TwoStage, build_detector
from direct_pt.models.layers import force_gpu_path


@pytest.fixture(scope="module", params=MODELS)
def each_detector(request: pytest.FixtureRequest) -> Detector:
    """All five, each image on its own."""
    return without_drop_path(small_detector(request.param, norm="group")).train()


def with_slots(batch: Batch, more: int) -> Batch:
    """The same batch with `more` empty slots for objects."""
    count = len(batch)
    assert batch.mask_rows is not None
    return replace(
        batch,
        boxes=torch.cat([batch.boxes, torch.zeros(count, more, 4)], dim=1),
        labels=torch.cat([batch.labels, torch.zeros(count, more, dtype=torch.int64)], dim=1),
        valid=torch.cat([batch.valid, torch.zeros(count, more, dtype=torch.bool)], dim=1),
        crowd=torch.cat([batch.crowd, torch.zeros(count, more, dtype=torch.bool)], dim=1),
        mask_rows=torch.cat([batch.mask_rows, torch.full((count, more), -1)], dim=1),
    )


# Training


@torch.no_grad()
def test_loss_does_not_depend_on_the_order_of_images_nor_on_padding_slots(
    each_detector: Detector, batch: Batch
) -> None:
    expected, shuffled, padded = (
        {name: loss.item() for name, loss in each_detector(one).items()}
        for one in (batch, select_images(batch, [2, 0, 3, 1]), with_slots(batch, 5))
    )
    assert shuffled == pytest.approx(expected, rel=1e-4)
    assert padded == pytest.approx(expected, rel=1e-5)


def gradients(detector: Detector) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in detector.named_parameters() if parameter.grad is not None}
    detector.zero_grad()
    return found


def test_accumulated_micro_batches_are_one_large_batch(each_detector: Detector, batch: Batch) -> None:
    """Each image's loss is its own, whatever stands beside it; what RetinaNet's are divided by, the weights mend."""
    batch.valid[1, 1:] = batch.valid[3] = False  # unequal numbers of positives, none in one image
    parts = [[3, 0], [1, 2]]
    if each_detector.config.name in (RETINANET, FASTER):
        parts = [[2], [0], [3], [1]]
    elif each_detector.config.name == SWIN:  # slow
        batch, parts = select_images(batch, [0, 3]), [[1], [0]]
    loss = total_loss(each_detector, batch)
    loss.backward()
    expected = gradients(each_detector)
    micro_batches = [select_images(batch, rows) for rows in parts]
    weights = [each_detector.loss_weight(micro_batch) for micro_batch in micro_batches]
    if isinstance(each_detector, RetinaNet):
        shares = torch.stack([weight for weight in weights if weight is not None]).float()
        assert len(shares) == len(parts) and len(shares.unique()) > 1
        assert shares.sum() == each_detector.loss_weight(batch)
        shares = shares / shares.mean()
    else:
        assert weights == [None] * len(parts)
        shares = torch.ones(len(parts))
    accumulated = torch.zeros(())
    for micro_batch, share in zip(micro_batches, shares, strict=True):
        part = total_loss(each_detector, micro_batch) * share / len(parts)
        part.backward()
        accumulated += part.detach()
    assert accumulated.item() == pytest.approx(loss.item(), rel=1e-5)
    found = gradients(each_detector)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        # Rounding is 1e-5 at most; where it takes a ReLU over its kink, which another build of torch may, 1e-2.
        assert (found[name] - gradient).norm() <= 3e-2 * gradient.norm() + 1e-6 * largest, name


CONTENTS: dict[str, Callable[[Batch], Batch]] = {
    "objects": lambda batch: batch,
    "nothing": without_objects,
    "crowd only": lambda batch: replace(batch, crowd=batch.valid, valid=torch.zeros_like(batch.valid)),
    "one image of two empty": lambda batch: replace(batch, valid=batch.valid & torch.tensor([[True], [False]])),
}


@pytest.mark.parametrize(
    ("name", "norm", "content"),
    [
        *((name, "batch", content) for name in MODELS for content in ("objects", "nothing", "crowd only")),
        *((name, "batch", "one image of two empty") for name in (RETINANET, MASK)),
        *((FASTER, "group", content) for content in ("objects", "nothing")),
    ],
)
def test_every_parameter_gets_a_finite_gradient(batch: Batch, name: str, norm: str, content: str) -> None:
    """Every head is in the graph always, as training in several processes needs it."""
    detector = without_drop_path(small_detector(name, norm)).train()
    total_loss(detector, CONTENTS[content](select_images(batch, [0, 3]))).backward()
    without = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters() if parameter.grad is not None)
    if content == "objects":
        zero = {name for name, p in detector.named_parameters() if p.grad is not None and not p.grad.any()}
        # No anchor of the coarser levels lies inside so small an image, nor is any RoI so large.
        assert zero == (
            set() if name != CASCADE else {f"fpn.output.{n}.{p}" for n in (2, 3) for p in ("weight", "bias")}
        )
    elif content != "one image of two empty":  # no positive: nothing for boxes and masks, all for classes
        losses = detector(CONTENTS[content](select_images(batch, [0, 3])))
        assert {kind for kind, loss in losses.items() if loss == 0} == {
            kind for kind in losses if kind.endswith(("box", "mask"))
        }


def test_slivers_give_no_nan(each_detector: Detector, batch: Batch) -> None:
    """The narrowest box that survives the crop: one step of float32."""
    edge = torch.tensor(float(SIDE))
    batch.boxes[0, 0] = torch.stack([torch.nextafter(edge, edge - 1), torch.tensor(3.0), edge, torch.tensor(30.0)])
    batch.valid[0, 0] = True
    assert total_loss(each_detector, batch).isfinite()


def shove_proposals_out(detector: Detector) -> TwoStage:
    """Every proposal lies beyond the right edge, and has no width left when it is clipped."""
    moved = copy.deepcopy(two_stage(detector))
    nn.init.zeros_(moved.rpn.deltas.weight)
    with torch.no_grad():
        moved.rpn.deltas.bias.view(-1, 4).copy_(torch.tensor([1000.0, 0.0, 0.0, 0.0]))
    return moved


def assert_nothing(found: Detections, has_masks: bool) -> None:
    assert len(found) == 0 and found.boxes.shape == (0, 4)
    assert found.labels.dtype == found.image.dtype == torch.int64
    assert (found.masks is not None) == has_masks
    assert found.masks is None or (found.masks.shape == (0, 28, 28) and found.masks.dtype == torch.float32)


@pytest.mark.parametrize("name", [CASCADE, MASK])
def test_no_valid_proposal(batch: Batch, name: str) -> None:
    batch = select_images(batch, [0, 3])
    detector = shove_proposals_out(small_detector(name, norm="group").train())
    features = detector.features(batch)
    assert not detector.rpn.proposals(features, *detector.rpn(features), batch).valid.any()
    total_loss(detector, batch).backward()  # the objects themselves are RoIs still
    total_loss(detector, without_objects(batch)).backward()  # and now there are none
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert_nothing(detector.eval().detect(batch), detector.has_masks)


@pytest.mark.parametrize("part", ["", "deltas", "objectness", "class_logits", "convs"])
@pytest.mark.parametrize("where", [nullcontext, force_gpu_path])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_have_diverged(
    each_detector: Detector, batch: Batch, part: str, where: Callable[[], AbstractContextManager[None]], value: float
) -> None:
    """A run whose weights are not finite any more goes on until it knows that it has diverged: in an evaluation too."""
    detector = copy.deepcopy(each_detector)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if part in name and name.endswith("weight"):
                parameter.fill_(value)
    with where():
        assert set(detector.train()(batch)) == LOSSES[detector.config.name]
        found = detector.eval().detect(batch)
    assert found.boxes.isfinite().all() and found.scores.isfinite().all()


# Detection


def test_nothing_detected(each_detector: Detector, batch: Batch) -> None:
    detector = copy.deepcopy(each_detector).eval()
    head = detector.head if isinstance(detector, RetinaNet) else two_stage(detector).roi_head
    head.score_threshold = 1.0
    assert_nothing(detector.detect(batch), detector.config.name in (MASK, SWIN))
    (result,) = detector.predict([np.zeros((40, 50, 3), np.uint8)], score_threshold=0.05)
    assert len(result["scores"]) == 0 and result["boxes"].shape == (0, 4)
    assert ("masks" in result) == detector.has_masks
    assert result.get("masks", np.zeros((0, 40, 50), bool)).shape == (0, 40, 50)


@pytest.mark.parametrize("where", [nullcontext, force_gpu_path])
def test_some_images_whose_maps_are_not_finite(
    each_detector: Detector, batch: Batch, where: Callable[[], AbstractContextManager[None]]
) -> None:
    """As in float16 shortly before a run diverges; the others are detected as without them."""
    detector = copy.deepcopy(each_detector).eval()
    with where(), torch.no_grad():
        features = detector.features(batch)
        expected = detector.detections(features, batch)
        for feature in features:
            feature[1:] = math.nan
        found = detector.detections(features, batch)
    assert found.boxes.isfinite().all() and set(found.image.tolist()) == {0}
    assert torch.equal(found.of_image(0).boxes, expected.of_image(0).boxes)
    assert torch.equal(found.of_image(0).scores, expected.of_image(0).scores)


def assert_sound(found: Detections, count: int, sizes: Tensor) -> None:
    """Ordered, within the images, at most a hundred each."""
    assert len(found) > 0
    assert (found.image.diff() >= 0).all() and int(found.image.max()) < count
    assert found.image.bincount().max() <= 100
    for row in range(count):
        assert (found.of_image(row).scores.diff() <= 0).all()
    limits = sizes[found.image][:, [1, 0, 1, 0]]
    assert (found.boxes >= 0).all() and (found.boxes <= limits + 1e-3).all()
    assert ((found.scores > 0.05) & (found.scores <= 1)).all()
    assert ((found.labels >= 0) & (found.labels < CLASSES)).all()


@pytest.mark.parametrize("name", MODELS)
def test_detect_on_an_untrained_detector(batch: Batch, name: str) -> None:
    """Images of one size in a batch, and each alone."""
    batch = select_images(batch, [0, 3, 1])
    with runs.float64():  # untrained, scores are close to each other: a last digit would change the order
        detector = small_detector(name).double().eval()
        found = detector.detect(batch)
        assert_sound(found, len(batch), batch.original_sizes)
        alone = [detector.detect(select_images(batch, [row])) for row in range(len(batch))]
        for row, single in enumerate(alone):
            of_row = found.of_image(row)
            assert torch.equal(of_row.labels, single.labels)
            torch.testing.assert_close(of_row.boxes, single.boxes, atol=1e-3, rtol=0)
            torch.testing.assert_close(of_row.scores, single.scores, atol=1e-4, rtol=0)
            if found.masks is not None:
                torch.testing.assert_close(of_row.masks, single.masks, atol=1e-3, rtol=0)
        assert (found.masks is not None) == (name in (MASK, SWIN))
        if found.masks is not None:
            assert found.masks.shape == (len(found), 28, 28)
            head, boxes = two_stage(detector).roi_head, found.boxes * batch.scales.repeat(1, 2)[found.image]
            with torch.no_grad():  # of the found boxes and their own classes
                probabilities = head.mask_head(head.pool(detector.features(batch), found.image, boxes, 14)).sigmoid()
            expected = probabilities[torch.arange(len(found)), found.labels]
            torch.testing.assert_close(found.masks, expected, atol=1e-3, rtol=0)
            assert (found.masks >= 0).all() and (found.masks <= 1).all() and found.masks.std() > 0


@pytest.mark.parametrize("name", MODELS)
def test_predict_images_of_several_sizes(demo: Path, name: str) -> None:
    detector = small_detector(name).train()
    photo = np.array(read_image(sorted((demo / "images").glob("val_*.jpg"))[0]))
    pictures = [photo, photo[:40], photo[:, :7], np.tile(photo, (2, 4, 1)), np.zeros((1, 1, 3), np.uint8)]
    results = detector.predict(pictures, score_threshold=0.05)
    assert len(results) == len(pictures) and detector.training
    keys = {"boxes", "scores", "labels", "class_ids", "category_ids"} | ({"masks"} if name in (MASK, SWIN) else set())
    for picture, result in zip(pictures, results, strict=True):
        count = len(result["scores"])
        assert set(result) == keys
        assert result["boxes"].shape == (count, 4) and len(result["labels"]) == len(result["category_ids"]) == count
        assert (np.diff(result["scores"]) <= 0).all()
        height, width = picture.shape[:2]
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= np.array([width, height] * 2) + 1e-3).all()
        assert [10 * int(name) + 10 for name in result["labels"]] == result["category_ids"]
        if "masks" in result:
            assert result["masks"].dtype == bool and result["masks"].shape == (count, height, width)
            for mask, (x1, y1, x2, y2) in zip(result["masks"], result["boxes"], strict=True):
                rows, columns = np.nonzero(mask)
                assert (rows + 1 > y1).all() and (rows < y2).all() and (columns + 1 > x1).all() and (columns < x2).all()
    assert all(len(result["scores"]) > 0 for result in results[:2])
    assert name not in (MASK, SWIN) or results[0]["masks"].any()
    assert all((r["scores"] > 0.999).all() for r in detector.predict(pictures[:1], score_threshold=0.999))
    assert detector.predict([]) == []


# Building


@pytest.mark.parametrize("name", MODELS)
def test_what_the_detectors_are_made_of(name: str) -> None:
    """Levels, anchors, heads and thresholds of the paper's recipes."""
    detector = small_detector(name, backbone="resnet18")
    levels = detector.fpn(detector.backbone(torch.zeros(1, 3, 64, 96)))
    strides = [96 / level.shape[-1] for level in levels]
    assert detector.has_masks == (name in (MASK, SWIN))
    if name == RETINANET:
        assert isinstance(detector, RetinaNet)
        assert strides == [8, 16, 32, 48, 96] and detector.head.anchors.strides == (8, 16, 32, 64, 128)
        assert detector.head.anchors.per_cell == 9 and detector.head.logits.out_channels == 9 * CLASSES
        sides = (detector.head.anchors.cell_anchors[:, 2:] * 2).prod(dim=1).sqrt()
        assert sides.tolist() == pytest.approx([4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)] * 3)
        return
    detector = two_stage(detector)
    assert strides == [4, 8, 16, 32, 48] and detector.rpn.anchors.strides == (4, 8, 16, 32, 64)
    assert detector.rpn.anchors.per_cell == 3 and detector.rpn.inside_only == (name == CASCADE)
    assert detector.rpn.train_counts.before_nms == 128 and detector.rpn.test_counts.after_nms == 64
    assert detector.rpn.train_counts.after_nms == (128 if name == CASCADE else 64)
    heads, rules = detector.roi_head.box_heads, [one.matching for one in detector.roi_head.refinements]
    assert [(rule.positive, rule.low_quality) for rule in rules] == {
        FASTER: [(0.5, None)],
        CASCADE: [(0.5, None), (0.6, None), (0.7, None)],
        MASK: [(0.5, 0.5)],
        SWIN: [(0.5, 0.5)],
    }[name]
    for head in heads:
        assert head.class_logits.out_features == CLASSES + 1
        assert head.deltas.out_features == (4 if name == CASCADE else 4 * CLASSES)
        assert (len(head.convs), len(head.fcs)) == ((0, 2) if name == CASCADE else (4, 1))
    assert [one.weight for one in detector.roi_head.refinements] == ([1, 0.5, 0.25] if name == CASCADE else [1])
    if detector.roi_head.mask_head is not None:
        assert (
            detector.roi_head.mask_head.logits.out_channels == CLASSES and detector.roi_head.mask_head.input_size == 14
        )


def test_unknown_model() -> None:
    with pytest.raises(InputError, match=r"--model yolo.*choose one of retinanet_r50_fpn"):
        DetectorConfig.from_paper("yolo", (), ())
    with pytest.raises(InputError, match=r"yolo.*choose one of retinanet_r50_fpn.*mask_rcnn_swin_t_fpn"):
        build_detector("yolo", 3, "resnet18")
    with pytest.raises(InputError, match="num_classes or config"):
        build_detector(runs.MODEL)
