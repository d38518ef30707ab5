"""Small detectors for the tests of `direct_pt.models`, and changed batches for them."""

import copy
import functools
from dataclasses import replace

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from direct_pt.batch import Batch, PackedMasks
from direct_pt.models.detector import MODELS, Detector, DetectorConfig, RetinaNet, TwoStage, build_detector

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
    """A detector with 32 channels on ResNet-18, or on Swin-T where its name says so. Weights are the same each time."""
    backbone = backbone or (MODELS[SWIN] if name == SWIN else "resnet18")
    return copy.deepcopy(_cached_detector(name, norm, backbone, proposals, rois))


@functools.cache
def _cached_detector(name: str, norm: str, backbone: str, proposals: int, rois: int) -> Detector:
    torch.manual_seed(1)
    class_names, ids = tuple(map(str, range(CLASSES))), tuple(range(10, 10 * CLASSES + 1, 10))
    config = DetectorConfig.from_paper(name, class_names, ids)
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
    # Scores that differ clearly, so that rounding swaps none; and RetinaNet's well above their initial 0.01.
    if isinstance(detector, RetinaNet):
        nn.init.normal_(detector.head.logits.weight, std=0.2)
        nn.init.constant_(detector.head.logits.bias, -2.0)
    else:
        nn.init.normal_(detector.rpn.objectness.weight, std=1.0)
    return detector


def without_drop_path(detector: Detector) -> Detector:
    """The same detector, changed in place."""
    for layer in detector.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
    return detector


def two_stage(detector: Detector) -> TwoStage:
    """The same detector, for the type checker."""
    assert isinstance(detector, TwoStage)
    return detector


def total_loss(detector: Detector, batch: Batch) -> Tensor:
    """The sum of a batch's losses, which must be those of that detector, and finite."""
    losses = detector(batch)
    assert set(losses) == LOSSES[detector.config.name]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values()), losses
    return torch.stack(list(losses.values())).sum()


def select_images(batch: Batch, rows: list[int]) -> Batch:
    """The images `rows` of a batch, in that order."""
    tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def without_objects(batch: Batch) -> Batch:
    """The same images, as `collate` returns those that have no objects."""
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
