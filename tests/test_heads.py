"""RPN, RetinaNet, Cascade R-CNN and Mask R-CNN: proposals, sampled RoIs, refinement, losses, by definition."""

import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from small_detectors import (
    CASCADE,
    CLASSES,
    MASK,
    RETINANET,
    ROIS,
    small_detector,
    total_loss,
    two_stage,
    without_objects,
)
from torch import Tensor
from torch.nn import functional as F

from direct_pt.batch import Batch
from direct_pt.models import rpn
from direct_pt.models.boxes import decode
from direct_pt.models.detector import Detector, RetinaNet, TwoStage, build_detector
from direct_pt.models.fpn import FPN
from direct_pt.models.masks import mask_targets
from direct_pt.models.roi_align import pyramid_roi_align
from direct_pt.models.roi_heads import SampledRoIs

# The pyramid


@pytest.mark.parametrize("height", [1, 2, 5])
def test_gradients_of_levels_one_pixel_wide(height: int) -> None:
    """In bf16 a stride-2 convolution of such a map took uninitialised memory for a part of its gradient."""
    torch.manual_seed(0)
    fpn, feature = FPN([32], 32, convolved_levels=2), torch.randn(2, 32, height, 1)
    gradients = []
    for enabled in (False, *[True] * 5):
        fpn.zero_grad()
        litter = [torch.full((2**20,), 3e18) for _ in range(8)]
        del litter
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels = fpn([feature])
        assert [level.shape[-1] for level in levels] == [1, 1, 1]
        torch.stack([level.float().square().sum() for level in levels]).sum().backward()
        gradients.append(fpn.output[1].weight.grad.clone())
    for found in gradients[1:]:
        assert (found - gradients[0]).abs().max() < 0.1 * gradients[0].abs().max()


# RPN and sampled RoIs


@pytest.fixture(scope="module")
def group_detector() -> Detector:
    """With GroupNorm: each image on its own, in training too."""
    return small_detector(norm="group").train()


def test_empty_proposals_are_not_valid_and_give_no_nan(group_detector: Detector, batch: Batch) -> None:
    """Some proposals have no width or height."""
    detector = copy.deepcopy(two_stage(group_detector))
    with torch.no_grad():  # two of the three anchors of a cell go out of the image or shrink to the limit
        detector.rpn.deltas.bias.view(-1, 4)[0] = torch.tensor([0.0, -1000.0, 0.0, 0.0])
        detector.rpn.deltas.bias.view(-1, 4)[1] = torch.tensor([0.0, 0.0, -1000.0, -1000.0])
        features = detector.features(batch)
        proposals = detector.rpn.proposals(features, *detector.rpn(features), batch)
    sides = proposals.boxes[..., 2:] - proposals.boxes[..., :2]
    assert proposals.boxes.isfinite().all() and (sides[proposals.valid] > 0).all()
    assert 0 < proposals.valid.sum() <= proposals.valid.numel()
    assert total_loss(detector, batch).isfinite()
    found = detector.eval().detect(batch)
    assert found.boxes.isfinite().all() and found.scores.isfinite().all()


def test_invalid_proposals_are_never_sampled(group_detector: Detector, batch: Batch) -> None:
    nowhere = torch.full((len(batch), 8, 4), float("nan"))
    none = torch.zeros(nowhere.shape[:2], dtype=torch.bool)
    rois = two_stage(group_detector).roi_head.sample_rois(0, nowhere, none, batch)
    assert torch.equal(rois.sampled, rois.positive) and rois.boxes.isfinite().all()
    assert torch.equal(rois.sampled, rois.is_object & rois.sampled)
    assert rois.sampled.sum(dim=1).tolist() == batch.valid.sum(dim=1).clamp(max=ROIS // 4).tolist()


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
    """Each box head's boxes, valid boxes and sampled RoIs; filled when the detector runs."""
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
        total_loss(detector, batch)
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
    total_loss(detector, batch).backward()
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
