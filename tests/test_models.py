"""The detectors on whole batches: order, padding, nothing to learn, freezing; and their parts by brute force."""

import copy
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
import torch
import torchvision
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.batch import Batch, Detections, Objects, PackedMasks, collate
from direct_pt.data.formats.coco import find_coco
from direct_pt.data.images import read_image
from direct_pt.data.loader import TrainingImages
from direct_pt.data.sources import load_split
from direct_pt.errors import InputError
from direct_pt.models import matching, rpn
from direct_pt.models.anchors import Anchors, flatten_level, inside_images
from direct_pt.models.backbone import Backbone, DetectionSwinBlock
from direct_pt.models.boxes import best_detections, decode, grouped_nms
from direct_pt.models.detector import MODELS, Detector, DetectorConfig, RetinaNet, TwoStage, build_detector
from direct_pt.models.layers import batchnorms, force_gpu_path, use_groupnorm
from direct_pt.models.masks import mask_targets
from direct_pt.models.matching import Matches, Matching, Sampling, match, random_keys, sample
from direct_pt.models.roi_align import pyramid_roi_align, roi_levels
from direct_pt.models.roi_heads import SampledRoIs
from direct_pt.recipes import parameter_groups
from direct_pt.transforms import PretrainPreset, TestPreset, has_extent

CLASSES = 10
ROIS = 16
SIDE = 128  # pixels; smaller ones have no object that an anchor fits
FASTER, CASCADE, SWIN = "faster_rcnn_r50_fpn", "cascade_rcnn_r50_fpn", "mask_rcnn_swin_t_fpn"
RETINANET, MASK = "retinanet_r50_fpn", "mask_rcnn_r50_fpn"
RPN_LOSSES = {"rpn_objectness", "rpn_box"}
LOSSES = {
    RETINANET: {"class", "box"},
    FASTER: {*RPN_LOSSES, "roi_class", "roi_box"},
    CASCADE: {*RPN_LOSSES, *(f"roi{number}_{kind}" for number in range(3) for kind in ("class", "box"))},
    MASK: {*RPN_LOSSES, "roi_class", "roi_box", "mask"},
    SWIN: {*RPN_LOSSES, "roi_class", "roi_box", "mask"},
}


def small_detector(
    name: str = FASTER, norm: str = "batch", backbone: str | None = None, proposals: int = 64, rois: int = ROIS
) -> Detector:
    """A ResNet-18 or, of that name, a Swin-T; narrow, with weights that are the same each time."""
    return copy.deepcopy(
        _built(name, norm, backbone or (MODELS[SWIN] if name == SWIN else "resnet18"), proposals, rois)
    )


@functools.cache
def _built(name: str, norm: str, backbone: str, proposals: int, rois: int) -> Detector:
    torch.manual_seed(1)
    config = DetectorConfig.from_paper(
        name, tuple(str(digit) for digit in range(CLASSES)), tuple(range(10, 10 * CLASSES + 1, 10))
    )
    config = replace(
        config,
        backbone=backbone,
        norm=norm,
        channels=32,
        proposals=proposals,
        rois_per_image=rois,
        short_side=SIDE,
        long_side=SIDE,
    )
    detector = build_detector(name, config=config)
    # Scores apart, so that rounding swaps no two of them; and RetinaNet's up from their start at one in a hundred.
    if isinstance(detector, RetinaNet):
        nn.init.normal_(detector.head.logits.weight, std=0.2)
        nn.init.constant_(detector.head.logits.bias, -2.0)
    else:
        nn.init.normal_(detector.rpn.objectness.weight, std=1.0)
    return detector


def without_drop_path(detector: Detector) -> Detector:
    for layer in detector.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
    return detector


@pytest.fixture(scope="session")
def images(demo: Path) -> TrainingImages:
    return TrainingImages(load_split(find_coco(demo)["train"]), PretrainPreset(SIDE), seed=0, with_masks=True)


@pytest.fixture
def batch(images: TrainingImages) -> Batch:
    """Four real images, with unequal numbers of objects."""
    batch = collate([images[0, image] for image in range(4)])
    assert len(set(batch.valid.sum(dim=1).tolist())) > 1
    return batch


@pytest.fixture(scope="module")
def group_detector() -> Detector:
    """With GroupNorm: each image on its own, in training too."""
    return small_detector(norm="group").train()


@pytest.fixture(scope="module", params=MODELS)
def each_detector(request: pytest.FixtureRequest) -> Detector:
    """All five, each image on its own."""
    return without_drop_path(small_detector(request.param, norm="group")).train()


def total(detector: Detector, batch: Batch) -> Tensor:
    losses = detector(batch)
    assert set(losses) == LOSSES[detector.config.name]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values()), losses
    return torch.stack(list(losses.values())).sum()


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some images of a batch, in another order."""
    tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


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


def without_objects(batch: Batch) -> Batch:
    """As `collate` gives it of images that have none."""
    count = len(batch)
    none = torch.zeros(count, 1, dtype=torch.bool)
    return replace(
        batch,
        boxes=torch.zeros(count, 1, 4),
        labels=torch.zeros(count, 1, dtype=torch.int64),
        valid=none,
        crowd=none,
        masks=PackedMasks.pack([], np.zeros((0, 4)), np.zeros((0, 2)), np.zeros(0)),
        mask_rows=torch.full((count, 1), -1),
    )


@torch.no_grad()
def test_loss_does_not_depend_on_the_order_of_images_nor_on_padding_slots(
    each_detector: Detector, batch: Batch
) -> None:
    expected, shuffled, padded = (
        {name: loss.item() for name, loss in each_detector(one).items()}
        for one in (batch, rows_of(batch, [2, 0, 3, 1]), with_slots(batch, 5))
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
        batch, parts = rows_of(batch, [0, 3]), [[1], [0]]
    loss = total(each_detector, batch)
    loss.backward()
    expected = gradients(each_detector)
    micro_batches = [rows_of(batch, rows) for rows in parts]
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
        part = total(each_detector, micro_batch) * share / len(parts)
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
    total(detector, CONTENTS[content](rows_of(batch, [0, 3]))).backward()
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
        losses = detector(CONTENTS[content](rows_of(batch, [0, 3])))
        assert {kind for kind, loss in losses.items() if loss == 0} == {
            kind for kind in losses if kind.endswith(("box", "mask"))
        }


def test_slivers_give_no_nan(each_detector: Detector, batch: Batch) -> None:
    """The narrowest box that survives the crop: one step of float32."""
    edge = torch.tensor(float(SIDE))
    batch.boxes[0, 0] = torch.stack([torch.nextafter(edge, edge - 1), torch.tensor(3.0), edge, torch.tensor(30.0)])
    batch.valid[0, 0] = True
    assert total(each_detector, batch).isfinite()


def test_boxes_that_float32_makes_empty_are_dropped() -> None:
    """A crop's edge on an object's edge leaves rounding noise of float64 as its width."""
    boxes = np.array([[448 - 1e-10, 3, 448, 30], [3, 10, 30, 10 + 1e-13], [3, 3, 30, 30.5]])
    assert has_extent(boxes).tolist() == [False, False, True]


def two_stage(detector: Detector) -> TwoStage:
    assert isinstance(detector, TwoStage)
    return detector


def shove_proposals_out(detector: Detector) -> TwoStage:
    """Every proposal lies beyond the right edge, and has no width left when it is clipped."""
    moved = copy.deepcopy(two_stage(detector))
    nn.init.zeros_(moved.rpn.deltas.weight)
    with torch.no_grad():
        moved.rpn.deltas.bias.view(-1, 4).copy_(torch.tensor([1000.0, 0.0, 0.0, 0.0]))
    return moved


@pytest.mark.parametrize("name", [CASCADE, MASK])
def test_no_valid_proposal(batch: Batch, name: str) -> None:
    batch = rows_of(batch, [0, 3])
    detector = shove_proposals_out(small_detector(name, norm="group").train())
    features = detector.features(batch)
    assert not detector.rpn.proposals(features, *detector.rpn(features), batch).valid.any()
    total(detector, batch).backward()  # the objects themselves are RoIs still
    total(detector, without_objects(batch)).backward()  # and now there are none
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert_nothing(detector.eval().detect(batch), detector.has_masks)


def assert_nothing(found: Detections, has_masks: bool) -> None:
    assert len(found) == 0 and found.boxes.shape == (0, 4)
    assert found.labels.dtype == found.image.dtype == torch.int64
    assert (found.masks is not None) == has_masks
    assert found.masks is None or (found.masks.shape == (0, 28, 28) and found.masks.dtype == torch.float32)


def test_nothing_detected(each_detector: Detector, batch: Batch) -> None:
    detector = copy.deepcopy(each_detector).eval()
    head = detector.head if isinstance(detector, RetinaNet) else two_stage(detector).roi_head
    head.score_threshold = 1.0
    assert_nothing(detector.detect(batch), detector.config.name in (MASK, SWIN))
    (result,) = detector.predict([np.zeros((40, 50, 3), np.uint8)])
    assert len(result["scores"]) == 0 and result["boxes"].shape == (0, 4)
    assert ("masks" in result) == detector.has_masks
    assert result.get("masks", np.zeros((0, 40, 50), bool)).shape == (0, 40, 50)


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


def test_empty_proposals_are_not_valid_and_give_no_nan(group_detector: Detector, batch: Batch) -> None:
    """Some proposals without width or height, some NaN-free corner boxes, beside real ones."""
    detector = copy.deepcopy(two_stage(group_detector))
    with torch.no_grad():  # two of the three anchors of a cell go out of the image or shrink to the limit
        detector.rpn.deltas.bias.view(-1, 4)[0] = torch.tensor([0.0, -1000.0, 0.0, 0.0])
        detector.rpn.deltas.bias.view(-1, 4)[1] = torch.tensor([0.0, 0.0, -1000.0, -1000.0])
        features = detector.features(batch)
        proposals = detector.rpn.proposals(features, *detector.rpn(features), batch)
    sides = proposals.boxes[..., 2:] - proposals.boxes[..., :2]
    assert proposals.boxes.isfinite().all() and (sides[proposals.valid] > 0).all()
    assert 0 < proposals.valid.sum() <= proposals.valid.numel()
    assert total(detector, batch).isfinite()
    found = detector.eval().detect(batch)
    assert found.boxes.isfinite().all() and found.scores.isfinite().all()


def test_invalid_proposals_are_never_sampled(group_detector: Detector, batch: Batch) -> None:
    nowhere = torch.full((len(batch), 8, 4), float("nan"))
    none = torch.zeros(nowhere.shape[:2], dtype=torch.bool)
    rois = two_stage(group_detector).roi_head.sample_rois(0, nowhere, none, batch)
    assert torch.equal(rois.sampled, rois.positive) and rois.boxes.isfinite().all()
    assert torch.equal(rois.sampled, rois.is_object & rois.sampled)
    assert rois.sampled.sum(dim=1).tolist() == batch.valid.sum(dim=1).clamp(max=ROIS // 4).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_detect_on_an_untrained_detector(batch: Batch, name: str) -> None:
    """Images of one size in a batch, and each alone."""
    batch = rows_of(batch, [0, 3, 1])
    with runs.float64():  # untrained, scores are close to each other: a last digit would change the order
        detector = small_detector(name).double().eval()
        found = detector.detect(batch)
        assert_sound(found, len(batch), batch.original_sizes)
        alone = [detector.detect(rows_of(batch, [row])) for row in range(len(batch))]
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
def test_predict_images_of_several_sizes(demo: Path, name: str) -> None:
    detector = small_detector(name).train()
    photo = np.array(read_image(sorted((demo / "images").glob("val_*.jpg"))[0]))
    pictures = [photo, photo[:40], photo[:, :7], np.tile(photo, (2, 4, 1)), np.zeros((1, 1, 3), np.uint8)]
    results = detector.predict(pictures)
    assert len(results) == len(pictures) and detector.training
    keys = {"boxes", "scores", "labels", "category_ids"} | ({"masks"} if name in (MASK, SWIN) else set())
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


# RetinaNet


def test_loss_weight_counts_positive_anchors(batch: Batch) -> None:
    """At least one an image; and it divides both losses."""
    detector = small_detector(RETINANET, norm="group").train()
    assert isinstance(detector, RetinaNet)
    positives = detector.head.match(detector.features(batch), batch).positive.sum(dim=1)
    assert (positives > 1).any()
    assert int(detector.loss_weight(batch)) == int(positives.clamp(min=1).sum())
    assert int(detector.loss_weight(without_objects(batch))) == len(batch)
    padded = replace(batch, images=F.pad(batch.images, (0, 96, 0, 32)))  # as beside a larger image
    assert detector.loss_weight(padded) == detector.loss_weight(batch)


def test_retinanet_starts_from_rare_objects() -> None:
    torch.manual_seed(0)
    detector = build_detector(RETINANET, num_classes=5, backbone="resnet18")
    assert isinstance(detector, RetinaNet)
    logits, _ = detector.head([torch.randn(1, 256, 4, 4)])
    assert logits[0].sigmoid().mean().item() == pytest.approx(0.01, rel=0.1)


# Cascade R-CNN


def watch_sampling(detector: TwoStage, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, SampledRoIs]]:
    """Filled with what each box head's sampling gets and gives."""
    calls: list[tuple[Tensor, Tensor, SampledRoIs]] = []
    sampling = detector.roi_head.sample_rois

    def sampled(number: int, boxes: Tensor, valid: Tensor, batch: Batch) -> SampledRoIs:
        assert number == len(calls)
        calls.append((boxes, valid, sampling(number, boxes, valid, batch)))
        return calls[-1][-1]

    monkeypatch.setattr(detector.roi_head, "sample_rois", sampled)
    return calls


def test_cascade_refines_proposals_and_adds_objects_anew(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = two_stage(small_detector(CASCADE, norm="group", rois=64).train())
    calls = watch_sampling(detector, monkeypatch)
    with torch.no_grad():
        total(detector, batch)
        features = detector.features(batch)
    assert len(calls) == len(detector.roi_head.refinements) == 3
    for (_, _, before), (boxes, valid, _), number in zip(calls, calls[1:], range(2), strict=False):
        assert before.is_object.any() and (before.sampled & ~before.is_object).any()
        assert torch.equal(valid, before.sampled & ~before.is_object)
        with torch.no_grad():
            _, deltas = detector.roi_head(features, before.boxes, number)
        stds = detector.roi_head.refinements[number].stds
        torch.testing.assert_close(boxes, decode(before.boxes, deltas[:, :, 0], stds, batch.sizes), atol=1e-2, rtol=0)
        assert not torch.allclose(boxes[valid], before.boxes[valid])
    for (boxes, valid, after), threshold in zip(calls, (0.5, 0.6, 0.7), strict=True):
        assert torch.equal(after.is_object.sum(dim=1), batch.valid.sum(dim=1))
        assert (after.positive & after.sampled)[after.is_object].all()
        objects = batch.boxes.gather(1, after.target[..., None].expand(-1, -1, 4))
        assert torch.equal(after.boxes[after.is_object], objects[after.is_object])
        for image in range(len(batch)):
            positive = after.positive[image] & ~after.is_object[image]
            iou = torchvision.ops.box_iou(after.boxes[image, positive], objects[image, positive]).diagonal()
            assert (iou >= threshold).all()
            drawn = after.boxes[image, after.sampled[image] & ~after.is_object[image]]
            offered = boxes[image, valid[image]]
            assert (drawn[:, None] == offered).all(dim=-1).any(dim=1).all()


@pytest.mark.parametrize("shift", [[1000.0, 0.0, 0.0, 0.0], [-1000.0, -1000.0, 0.0, 0.0], [0.0, 0.0, -1000.0, 1000.0]])
def test_cascade_with_degenerate_refined_boxes(
    batch: Batch, shift: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes beyond a border have no extent once they are clipped."""
    detector = two_stage(small_detector(CASCADE, norm="group").train())
    with torch.no_grad():
        for head in detector.roi_head.box_heads[:2]:
            head.deltas.bias.copy_(torch.tensor(shift))
    calls = watch_sampling(detector, monkeypatch)
    total(detector, batch).backward()
    sides = (calls[1][0][..., 2:] - calls[1][0][..., :2])[calls[1][1]]
    assert len(sides) > 0 and (shift[2] < 0 or (sides == 0).any(dim=1).all())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    monkeypatch.undo()
    found = detector.eval().detect(batch)
    assert found.boxes.isfinite().all() and found.scores.isfinite().all()


def test_cascade_scores_are_of_the_mean_logits(batch: Batch) -> None:
    """And boxes are the last head's, one for all classes."""
    detector = two_stage(small_detector(CASCADE).eval())
    rois = torch.tensor([[10.0, 10, 60, 70], [5, 40, 100, 90]]).expand(len(batch), -1, -1)
    with torch.no_grad():
        features = detector.features(batch)
        scores, boxes = detector.roi_head.score(features, rois, batch)
        total_logits, refined = torch.zeros(len(batch), 2, CLASSES + 1), rois
        for number, refinement in enumerate(detector.roi_head.refinements):
            logits, deltas = detector.roi_head(features, refined, number)
            total_logits += logits
            refined = decode(refined, deltas[:, :, 0], refinement.stds, batch.sizes)
    torch.testing.assert_close(scores, (total_logits / 3).softmax(dim=-1)[..., :CLASSES])
    torch.testing.assert_close(boxes[:, :, 0], refined)
    assert boxes.shape == (len(batch), 2, 1, 4)


# Mask R-CNN


def test_mask_loss_by_definition(batch: Batch) -> None:
    """Each positive RoI's own class against its own object's mask; the mean of the images' means."""
    detector = two_stage(small_detector(MASK, norm="group").train())
    head = detector.roi_head.mask_head
    assert head is not None and batch.masks is not None and batch.mask_rows is not None
    with torch.no_grad():
        features = detector.features(batch)
        proposals = detector.rpn.proposals(features, *detector.rpn(features), batch)
        rois = detector.roi_head.sample_rois(0, proposals.boxes, proposals.valid, batch)
        loss = detector.roi_head.mask_loss(head, features, rois, batch)
        images = []
        for image in range(len(batch)):
            alone = [level[image : image + 1] for level in features]
            of_image = []
            for slot in rois.positive[image].nonzero().flatten().tolist():
                target, box = int(rois.target[image, slot]), rois.boxes[image, slot : slot + 1]
                pooled = pyramid_roi_align(alone[:4], [4, 8, 16, 32], torch.zeros(1).long(), box, 14)
                logits = head(pooled)[0, batch.labels[image, target]]
                truth = mask_targets(batch.masks, batch.mask_rows[image, target, None], box, 28)[0]
                assert 0.05 < truth.mean() < 1
                of_image.append(F.binary_cross_entropy_with_logits(logits, truth))
            images.append(torch.stack(of_image).mean() if of_image else torch.zeros(()))
    assert len(set(rois.positive.sum(dim=1).tolist())) > 1
    assert loss.item() == pytest.approx(torch.stack(images).mean().item(), rel=1e-4)


# Matching and sampling


def test_crowd_takes_negatives_out() -> None:
    references = torch.tensor([[[0, 0, 10, 10], [20, 0, 30, 10], [24, 0, 34, 10], [60, 0, 70, 10]]]).float()
    boxes = torch.tensor([[[0, 0, 10, 10], [15, 0, 30, 10], [60, 0, 70, 10]]]).float()
    valid, crowd = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    usable = torch.ones(1, 4, dtype=torch.bool)
    for rule in (Matching(0.7, 0.3, 0.3), Matching(0.5, 0.5)):
        matches = match(rule, references, usable, boxes, valid, crowd)
        assert matches.positive.tolist() == [[True, False, False, False]]
        # The second lies in the crowd region wholly, the third by 60 %, the fourth over a slot that holds nothing.
        assert matches.negative.tolist() == [[False, False, False, True]]
        assert matches.target[0, 0] == 0
    beyond = references + torch.tensor([2.0, 0, 2, 0])  # the third: 40 % inside
    assert match(Matching(0.5, 0.5), beyond, usable, boxes, valid, crowd).negative.tolist()[0][2]
    nothing = match(Matching(0.7, 0.3, 0.3), references, ~usable, boxes, valid, crowd)
    assert not (nothing.positive | nothing.negative).any()


def test_no_object_makes_all_negative() -> None:
    references = torch.rand(1, 20, 4).cumsum(dim=-1)
    boxes, none = torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.bool)
    for rule in (Matching(0.7, 0.3, 0.3), Matching(0.5, 0.5), Matching(0.5, 0.4, 0.0)):
        matches = match(rule, references, torch.ones(3, 20, dtype=torch.bool), boxes, none, none)
        assert matches.negative.all() and not matches.positive.any()


def matches_of(positives: list[int], negatives: list[int], count: int = 100) -> Matches:
    """One image a figure: that many positives, then that many negatives, then neither."""
    place = torch.arange(count)[None, :]
    first, second = torch.tensor(positives)[:, None], torch.tensor(negatives)[:, None]
    return Matches(
        torch.zeros(len(positives), count).long(), place < first, (place >= first) & (place < first + second)
    )


def test_sample_counts() -> None:
    rule = Sampling(per_image=16, positive_share=0.25)
    positives, negatives = [0, 2, 4, 40, 40, 3, 0], [80, 80, 80, 60, 5, 1, 0]
    matches = matches_of(positives, negatives)
    rows, positive, sampled = sample(rule, matches, torch.arange(7), salt=0)
    assert rows.shape == (7, 16)
    assert positive.sum(dim=1).tolist() == [0, 2, 4, 4, 4, 3, 0]  # a quarter at most
    assert sampled.sum(dim=1).tolist() == [16, 16, 16, 16, 9, 4, 0]  # and negatives up to the count
    assert not (positive & ~sampled).any()
    assert (matches.positive.gather(1, rows) >= positive).all()
    assert (matches.negative.gather(1, rows) >= (sampled & ~positive)).all()
    for image in range(7):
        drawn = rows[image, sampled[image]].tolist()
        assert len(drawn) == len(set(drawn))


def test_sample_takes_all_without_a_count_or_with_few_candidates() -> None:
    for rule in (Sampling(per_image=None, positive_share=0.25), Sampling(per_image=512, positive_share=0.25)):
        _, positive, sampled = sample(rule, matches_of([5], [20]), torch.zeros(1).long(), salt=0)
        assert int(positive.sum()) == 5 and int(sampled.sum()) == 25


def drawn_rows(matches: Matches, seeds: list[int], salt: int) -> list[list[int]]:
    rows, _, sampled = sample(Sampling(16, 0.25), matches, torch.tensor(seeds), salt)
    return [sorted(rows[image, sampled[image]].tolist()) for image in range(len(seeds))]


def test_sample_follows_the_seed_alone() -> None:
    seeds = [7, 2**61 + 3, 8]
    together = drawn_rows(matches_of([40] * 3, [60] * 3), seeds, salt=0)
    assert drawn_rows(matches_of([40] * 3, [60] * 3), seeds[::-1], salt=0) == together[::-1]
    assert drawn_rows(matches_of([40], [60]), [8], salt=0) == [together[2]]
    torch.manual_seed(1)  # no generator has a say
    assert drawn_rows(matches_of([40] * 3, [60] * 3), seeds, salt=0) == together
    assert len({tuple(rows) for rows in together}) == 3
    assert drawn_rows(matches_of([40] * 3, [60] * 3), seeds, salt=1) != together


def test_sample_is_uniform() -> None:
    """Over many seeds each candidate is drawn about as often as any other."""
    count = 2000
    rows, _, _ = sample(Sampling(16, 0.25), matches_of([0] * count, [64] * count, 64), torch.arange(count), salt=0)
    hits = rows.flatten().bincount(minlength=64)
    assert (hits / count - 0.25).abs().max() < 5 * (0.25 * 0.75 / count) ** 0.5
    keys = random_keys(torch.arange(count), 64, salt=0)
    assert keys.min() >= 0 and keys.max() < 1 and abs(keys.mean() - 0.5) < 0.005


def brute_force_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """The definition, one pair at a time."""
    kept: list[int] = []
    for row in scores.argsort(descending=True, stable=True).tolist():
        rivals = [other for other in kept if groups[other] == groups[row]]
        if not rivals or torchvision.ops.box_iou(boxes[[row]], boxes[rivals]).max() <= threshold:
            kept.append(row)
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.7])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_grouped_nms(count: int, threshold: float) -> None:
    torch.manual_seed(count)
    corners = torch.rand(count, 2) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(count, 2) * 30], dim=1)
    scores = torch.rand(count)
    groups = torch.randint(0, 4, (count,)) * 3  # numbers with holes
    kept = grouped_nms(boxes, scores, groups, threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force_nms(boxes, scores, groups, threshold)
    if count:
        assert kept.tolist() == torchvision.ops.batched_nms(boxes, scores, groups, threshold).tolist()


def test_grouped_nms_with_ties_and_empty_boxes() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 10, 10]]).float()
    kept = grouped_nms(boxes, torch.full((5,), 0.5), torch.tensor([0, 0, 0, 0, 1]), 0.5)
    assert sorted(kept.tolist()) == [0, 2, 3, 4]  # the first of a tie; empty boxes suppress nothing


def test_weights_are_the_mean_of_the_images_means() -> None:
    counted = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    weights = Sampling(per_image=4, positive_share=0.25).weights(counted)
    assert (weights * 12).tolist() == pytest.approx(np.array([[2, 2, 0, 0], [4, 0, 0, 0], [0] * 4]))
    pooled = Sampling(per_image=None, positive_share=0.25).weights(counted)
    assert (pooled * 3).tolist() == pytest.approx(counted.double().numpy(), abs=1e-6)
    assert not Sampling(None, 0.25).weights(torch.zeros(2, 3, dtype=torch.bool)).any()


def test_best_detections() -> None:
    """Class-wise NMS and the best of each image, by the definition."""
    torch.manual_seed(0)
    corners = torch.rand(300, 2) * 40
    found = Detections(
        image=torch.randint(0, 4, (300,)) * 2 % 7,  # images 0, 2, 4, 6; none in the odd ones
        boxes=torch.cat([corners, corners + 5 + torch.rand(300, 2) * 30], dim=1),
        scores=torch.rand(300),
        labels=torch.randint(0, 3, (300,)),
    )
    best = best_detections(found, num_images=8, num_classes=3, nms_threshold=0.5, max_detections=9)
    expected = []
    for image in range(8):
        rows = (found.image == image).nonzero().flatten()
        kept = brute_force_nms(found.boxes[rows], found.scores[rows], found.labels[rows], 0.5)
        expected += rows[kept][:9].tolist()
    assert torch.equal(best.boxes, found.boxes[expected]) and torch.equal(best.labels, found.labels[expected])
    assert torch.equal(best.image, found.image[expected]) and torch.equal(best.scores, found.scores[expected])
    assert best.image.bincount(minlength=8).tolist() == [9, 0, 9, 0, 9, 0, 9, 0]
    nothing = best_detections(found.keep(torch.zeros(0, dtype=torch.int64)), 3, 3, 0.5, 9)
    assert len(nothing) == 0 and nothing.boxes.shape == (0, 4)


def test_anchors_in_order_and_which_of_them_count() -> None:
    """One by one: the cells row by row, in each the scales of every ratio; and a map's values in that order."""
    anchors = Anchors((8, 16), scales=(2.0, 3.0), ratios=(0.5, 2.0))
    features = [torch.arange(12.0).view(1, 1, 3, 4), torch.arange(4.0).view(1, 1, 2, 2)]
    expected, cells = [], []
    for feature, stride in zip(features, (8, 16), strict=True):
        for row in range(feature.shape[2]):
            for column in range(feature.shape[3]):
                for ratio in (0.5, 2.0):
                    for scale in (2.0, 3.0):
                        w, h = scale * stride / ratio**0.5 / 2, scale * stride * ratio**0.5 / 2
                        x, y = column * stride, row * stride
                        expected.append([x - w, y - h, x + w, y + h])
                        cells.append((row, column, stride))
    boxes = torch.cat(anchors(features))
    torch.testing.assert_close(boxes, torch.tensor(expected))

    padded = torch.tensor([[24, 32], [16, 9], [1, 32]])
    usable = [
        [row < -(-height // stride) and column < -(-width // stride) for row, column, stride in cells]
        for height, width in padded.tolist()
    ]
    assert anchors.inside_padding(features, padded).tolist() == usable

    edges = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10.5, 20], [-0.5, 0, 5, 5], [0, 0, 9, 19.9], [1, 1, 30, 12]])
    sizes = torch.tensor([[20, 10], [21, 11], [13, 31]])  # height, width
    assert inside_images(edges, sizes).tolist() == [
        [False, False, False, True, False],
        [True, True, False, True, False],
        [False, False, False, False, True],
    ]

    values = torch.randn(2, 4 * 3, 5, 6)
    flat = flatten_level(values, 3)
    for row, column, anchor in ((0, 0, 0), (1, 2, 3), (4, 5, 1)):
        place = (row * 6 + column) * 4 + anchor
        assert torch.equal(flat[:, place], values[:, 3 * anchor : 3 * anchor + 3, row, column])


def test_roi_features_come_from_the_right_image_and_level() -> None:
    """Each box alone on its own level; sides under 112 pixels are read from the finest."""
    torch.manual_seed(0)
    strides = [4, 8, 16, 32]
    features = [torch.randn(3, 5, 512 // stride, 512 // stride) for stride in strides]
    sides = torch.tensor([3.0, 50, 111, 113, 200, 223, 225, 440, 449, 500, 0])
    corners = torch.rand(len(sides), 2) * (512 - sides[:, None])
    boxes = torch.cat([corners, corners + sides[:, None] * torch.tensor([1.0, 1.0])], dim=1)
    levels = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0]
    assert roi_levels(boxes, 4).tolist() == levels and roi_levels(boxes, 2).max() == 1
    images = torch.tensor([2, 0, 1, 2, 2, 1, 0, 0, 1, 2, 0])
    found = pyramid_roi_align(features, strides, images, boxes, 7)
    for row, (level, image) in enumerate(zip(levels, images.tolist(), strict=True)):
        alone = torchvision.ops.roi_align(
            features[level][image : image + 1], [boxes[row : row + 1]], 7, 1 / strides[level], 0, aligned=True
        )
        torch.testing.assert_close(found[row], alone[0])
    assert pyramid_roi_align(features, strides, images[:0], boxes[:0], 14).shape == (0, 5, 14, 14)


# What trains


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_frozen_from_scratch(name: str) -> None:
    detector = small_detector(name).train()
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert all(layer.training for layer in batchnorms(detector))
    assert len(batchnorms(detector)) == (0 if name == SWIN else 20)
    assert not any(layer.training for layer in batchnorms(detector.eval()))


@pytest.mark.parametrize(
    ("backbone", "first"),
    [
        ("resnet18", ("conv1.", "bn1.", "layer1.")),
        ("resnet50", ("conv1.", "bn1.", "layer1.")),
        ("mobilenetv3_large_100", ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
        ("efficientnet_b0", ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
    ],
)
def test_freeze_for_finetuning(backbone: str, first: tuple[str, ...]) -> None:
    """BatchNorm everywhere, and all that comes before the second stage."""
    detector = small_detector(backbone=backbone).train()
    detector.freeze_for_finetuning()
    frozen = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    norms = {
        f"{name}.{part}"
        for name, module in detector.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    prefixes = tuple(f"backbone.network.{prefix}" for prefix in first)
    beginning = {name for name, _ in detector.named_parameters() if name.startswith(prefixes)}
    assert len(detector.backbone.stem_and_first_stage()) == len(beginning)
    assert len(norms) > 20 and len(beginning - norms) > len(first)
    assert frozen == norms | beginning
    for mode in (detector.train(), detector.eval().train()):
        assert mode.training and not any(layer.training for layer in batchnorms(mode))


@pytest.mark.parametrize(("name", "backbone"), [(SWIN, MODELS[SWIN]), (FASTER, "convnext_atto")])
def test_networks_with_layernorm_train_whole(name: str, backbone: str) -> None:
    detector = small_detector(name, backbone=backbone).train()
    detector.freeze_for_finetuning()
    assert detector.backbone.has_layernorm and batchnorms(detector) == []
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert all(module.training for module in detector.train().modules())


def test_frozen_batchnorm_keeps_its_statistics(batch: Batch) -> None:
    detector = small_detector().train()
    detector.freeze_for_finetuning()
    before = copy.deepcopy(detector.state_dict())
    optimizer = torch.optim.SGD(parameter_groups(detector, 1e-4), lr=0.01)
    total(detector, batch).backward()
    optimizer.step()
    changed = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, parameter in detector.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("name", "norm"), [(FASTER, "batch"), (FASTER, "group"), (SWIN, "batch")])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameter_groups(name: str, norm: str, frozen: bool) -> None:
    detector = small_detector(name, norm)
    if frozen:
        detector.freeze_for_finetuning()
    nothing = {"params": [], "weight_decay": 0.0}
    decayed, exempt, *more = [*parameter_groups(detector, 1e-4), nothing]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (1e-4, 0.0) and more in ([], [nothing])
    listed = [id(parameter) for parameter in decayed["params"] + exempt["params"]]
    trained = {id(parameter) for parameter in detector.parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trained
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    free = {id(p) for m in detector.modules() if isinstance(m, kinds) for p in m.parameters()}
    free |= {i for i, name in names.items() if name.endswith("relative_position_bias_table")}
    assert {names[id(p)] for p in exempt["params"]} == {names[i] for i in free & trained}
    assert any(names[id(p)].endswith("bias") for p in decayed["params"])  # biases of convolutions decay
    assert bool(exempt["params"]) == (not frozen or norm == "group" or name == SWIN)


# Swin


@pytest.fixture(scope="module")
def swin() -> Backbone:
    """In eval mode, with position biases that tell places apart."""
    backbone = small_detector(SWIN).backbone.eval()
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if name.endswith(("relative_position_bias_table", "qkv.bias")):
            nn.init.normal_(parameter)
    return backbone


def swin_blocks(backbone: Backbone) -> list[DetectionSwinBlock]:
    return [module for module in backbone.modules() if isinstance(module, DetectionSwinBlock)]


def test_every_odd_block_shifts(swin: Backbone) -> None:
    blocks = swin_blocks(swin)
    assert len(blocks) == 12
    assert [block.shift_size for block in blocks] == [(0, 0), (3, 3)] * 6
    assert all(block.window_size == (7, 7) for block in blocks)


def windowed_attention(block: DetectionSwinBlock, features: Tensor) -> Tensor:
    """By the paper: pad to whole windows, roll, attend inside each window to what was near before, roll back."""
    attention, side, shift = block.attn, 7, block.shift_size[0]
    _, height, width, channels = features.shape
    padded = F.pad(features, (0, 0, 0, -width % side, 0, -height % side))
    rolled = padded.roll((-shift, -shift), dims=(1, 2))
    rows, columns = rolled.shape[1:3]
    output = torch.zeros_like(rolled)

    def region(place: int, length: int) -> int:
        return (place >= length - side) + (place >= length - shift) if shift else 0

    places = [(y, x) for y in range(side) for x in range(side)]
    heads, depth = attention.num_heads, channels // attention.num_heads
    bias = torch.stack(
        [
            torch.stack([attention.relative_position_bias_table[(y - v + 6) * 13 + x - u + 6] for v, u in places])
            for y, x in places
        ]
    )
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            window = rolled[:, top : top + side, left : left + side].reshape(-1, side * side, channels)
            regions = [(region(top + y, rows), region(left + x, columns)) for y, x in places]
            apart = torch.tensor([[-100.0 * (one != other) for other in regions] for one in regions])
            query, key, value = attention.qkv(window).split(channels, dim=-1)
            results = []
            for head in range(heads):
                part = slice(head * depth, (head + 1) * depth)
                scores = query[..., part] @ key[..., part].transpose(1, 2) / depth**0.5 + bias[..., head] + apart
                results.append(scores.softmax(dim=-1) @ value[..., part])
            mixed = attention.proj(torch.cat(results, dim=-1))
            output[:, top : top + side, left : left + side] = mixed.reshape(-1, side, side, channels)
    return output.roll((shift, shift), dims=(1, 2))[:, :height, :width]


@pytest.mark.parametrize("size", [(10, 13), (7, 14), (3, 9), (1, 1)])
@pytest.mark.parametrize("number", [0, 1, 11])
@torch.no_grad()
def test_swin_attention(swin: Backbone, number: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = swin_blocks(swin)[number]
    features = torch.randn(2, *size, block.dim)
    expected = windowed_attention(block, features)
    assert expected.std() > 0.01
    torch.testing.assert_close(block._attn(features), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_swin_at_any_size(swin: Backbone) -> None:
    """Maps are normalised, and do not depend on what size came before."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 96, 128)
    maps = swin(images)
    assert [tuple(level.shape) for level in maps] == [(1, 96 * 2**n, 24 >> n, 32 >> n) for n in range(4)]
    for level in maps:
        torch.testing.assert_close(level.mean(dim=1), torch.zeros_like(level[:, 0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(level.var(dim=1, correction=0), torch.ones_like(level[:, 0]), atol=1e-2, rtol=0)
    swin(torch.randn(2, 3, 64, 224))
    assert all(torch.equal(one, other) for one, other in zip(maps, swin(images), strict=True))


def test_swin_learns_from_images_of_any_size(batch: Batch) -> None:
    """75 x 110 pixels: a multiple neither of the windows nor of the strides."""
    image = torch.randint(0, 256, (75, 110, 3), dtype=torch.uint8).numpy()
    outline = np.array([[10.0, 8], [70, 12], [60, 66]])
    objects = Objects(np.array([[10.0, 8, 70, 66]]), np.array([3]), np.array([1500.0]), np.array([False]), [[outline]])
    sample = TestPreset(75, 110)(image, objects, np.random.default_rng(0))
    small = collate([sample])
    assert small.sizes.tolist() == [[75, 110]] and small.images.shape[-2:] == (96, 128)
    detector = small_detector(SWIN).train()
    assert total(detector, small).isfinite()
    (result,) = detector.predict([image])
    assert result["masks"].shape[1:] == (75, 110) and np.isfinite(result["boxes"]).all()


def test_drop_path_where_there_is_layernorm() -> None:
    """Growing from nothing to 0.2 over Swin's blocks; none in a ResNet."""
    rates = [layer.drop_path1.drop_prob for layer in swin_blocks(small_detector(SWIN).backbone)[1:]]
    assert rates == pytest.approx(np.linspace(0, 0.2, 12)[1:].tolist())
    convnext = [layer.drop_prob for layer in Backbone("convnextv2_atto").modules() if isinstance(layer, DropPath)]
    assert max(convnext) == pytest.approx(0.2)
    assert not any(isinstance(layer, DropPath) for layer in small_detector().modules())


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


@pytest.mark.parametrize("name", MODELS)
def test_use_groupnorm(name: str) -> None:
    """Also after the convolutions of pyramid and heads, but for predictors and the RPN's one convolution."""
    detector = small_detector(name, backbone="resnet18")
    count = len(batchnorms(detector))
    lists = {RETINANET: 3 + 5 + 8, FASTER: 8 + 4, CASCADE: 8, MASK: 8 + 4 + 4, SWIN: 8 + 4 + 4}[name]
    convolutions = [n for n, layer in detector.named_modules() if isinstance(layer, nn.Conv2d)]
    use_groupnorm(detector)
    assert count > 0 and batchnorms(detector) == []
    assert sum(isinstance(module, nn.GroupNorm) for module in detector.modules()) == count + lists
    bare = {
        n
        for n, layer in detector.named_modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not n.startswith("backbone.") and n in convolutions
    }
    rpn = {"rpn.conv", "rpn.objectness", "rpn.deltas"}
    expected = {
        RETINANET: {"head.logits", "head.deltas"},
        FASTER: rpn,
        CASCADE: rpn,
        MASK: rpn | {"roi_head.mask_head.logits"},
        SWIN: rpn | {"roi_head.mask_head.logits"},
    }[name]
    assert bare == expected  # the others are now the first of a pair


@pytest.mark.parametrize("backbone", ["resnet18", "regnetx_002", "mobilenetv3_large_100"])
@torch.no_grad()
def test_groupnorm_in_any_backbone(backbone: str) -> None:
    """Where channels are no multiple of 32, and where a norm carries its activation."""
    detector = small_detector(backbone=backbone)
    count = len(batchnorms(detector))
    image = torch.rand(1, 3, 64, 64)
    shapes = [level.shape for level in detector.eval().backbone(image)]
    use_groupnorm(detector)
    assert count > 0 and batchnorms(detector) == []
    assert sum(isinstance(module, nn.GroupNorm) for module in detector.backbone.modules()) == count
    assert [level.shape for level in detector.backbone(image)] == shapes
    # Each norm is followed by what followed it: without activations the network would be linear up to the norms.
    relu = sum(isinstance(module, nn.ReLU) for module in detector.backbone.modules())
    assert relu == sum(isinstance(module, nn.ReLU) for module in small_detector(backbone=backbone).backbone.modules())


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_padding_does_not_blow_up_gradients(name: str) -> None:
    """Of networks with LayerNorm: maps without any contrast have it multiply gradients by 1,000."""
    torch.manual_seed(0)
    network = Backbone(name).train()
    images = torch.randn(2, 3, 96, 96)
    images[:, :, 48:] = 0  # as padding is
    sum((maps * torch.randn_like(maps)).mean() for maps in network(images)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    assert 0.01 < norm < 100


def test_residual_branches_start_at_one() -> None:
    assert all((layer.weight == 1).all() for layer in batchnorms(small_detector()))


def test_unknown_model() -> None:
    with pytest.raises(InputError, match=r"--model yolo.*choose one of retinanet_r50_fpn"):
        DetectorConfig.from_paper("yolo", (), ())
    with pytest.raises(InputError, match=r"yolo.*choose one of retinanet_r50_fpn.*mask_rcnn_swin_t_fpn"):
        build_detector("yolo", 3, "resnet18")
    with pytest.raises(InputError, match="num_classes or config"):
        build_detector(runs.MODEL)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet8", "no model of this name; try .*resnet"),
        ("swin_tinny_patch4_window7_224", "no model of this name; try .*swin_tiny_patch4_window7_224"),
        ("vit_tiny_patch16_224", "no feature maps at strides 4, 8, 16 and 32"),
        ("maxvit_tiny_tf_224", "no maps at strides 4, 8, 16 and 32 of images of any size"),
        ("hiera_tiny_224", "no maps at strides 4, 8, 16 and 32 of images of any size"),
    ],
)
def test_unfit_backbone(backbone: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--backbone {backbone}: .*{message}"):
        build_detector(runs.MODEL, 3, backbone)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("convnextv2_atto", [40, 80, 160, 320]),
        ("mobilenetv3_large_100", [24, 40, 112, 960]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
    ],
)
@torch.no_grad()
def test_backbones_that_fit(backbone: str, channels: list[int]) -> None:
    found = small_detector(SWIN if backbone == MODELS[SWIN] else FASTER, backbone=backbone).backbone.train()
    assert found.channels == channels
    maps = found(torch.randn(2, 3, 96, 160))
    assert [tuple(level.shape) for level in maps] == [
        (2, width, 96 // stride, 160 // stride) for width, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert all(level.isfinite().all() and level.std() > 0 for level in maps)


@pytest.mark.parametrize("rule", [Matching(0.7, 0.3, 0.3), Matching(0.5, 0.5), Matching(0.5, 0.4, 0.0)])
def test_matching_in_parts(rule: Matching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowded images are matched a few references at a time: with ties between the parts, crowds, unused slots."""
    draw = torch.Generator().manual_seed(0)
    for count in (1, 30, 211):
        corners, sides = (torch.randint(low, 14, (3, count + 6, 2), generator=draw).float() for low in (0, 1))
        boxes = torch.cat([corners, corners + sides], dim=-1)
        usable, valid, crowd = (
            torch.rand(3, n, generator=draw) < share for n, share in ((count, 0.8), (6, 0.7), (6, 1))
        )
        arguments = boxes[:, 6:], usable, boxes[:, :6], valid, crowd & ~valid
        at_once = match(rule, *arguments)
        for pairs in (1, 18 * 7):
            with monkeypatch.context() as patch:
                patch.setattr(matching, "MAX_PAIRS", pairs)
                in_parts = match(rule, *arguments)
            assert vars(at_once).keys() == vars(in_parts).keys()
            assert all(torch.equal(values, getattr(in_parts, name)) for name, values in vars(at_once).items())


def test_nms_of_some_images_at_a_time(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = two_stage(small_detector()).train()
    features = detector.features(batch)
    maps = detector.rpn(features)
    at_once = detector.rpn.proposals(features, *maps, batch)
    for boxes in (1, 2 * at_once.boxes.shape[1] * len(features)):
        monkeypatch.setattr(rpn, "MAX_NMS_BOXES", boxes)
        assert all(
            map(torch.equal, vars(at_once).values(), vars(detector.rpn.proposals(features, *maps, batch)).values())
        )
