"""Parameters and multiply-adds of the five detectors, and the lines of the source code.

The multiply-adds are for one image, at 448x448 and at 800x1333; two-stage detectors have 1,000 proposals and 100 masks.
Convolutions, linear layers and attention are counted, as is usual. The peer's parameters are those of MMDetection
3.3.0's models for the same 80 classes.
"""

import argparse

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.code_size import measure_code
from benchmarks.rows import Row, row
from direct_pt.models.detector import MODELS, Detector, RetinaNet, TwoStage, build_detector

SIZES = ((448, 448), (800, 1344))  # the second is 800x1333, padded to a multiple of 32
MMDETECTION_PARAMETERS = {
    "retinanet_r50_fpn": 37_968_692,
    "faster_rcnn_r50_fpn": 43_063_776,
    "cascade_rcnn_r50_fpn": 69_394_766,
    "mask_rcnn_r50_fpn": 45_707_056,
    "mask_rcnn_swin_t_fpn": 49_105_322,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This part has no flags."""


def measure(args: argparse.Namespace) -> list[Row]:
    """A count and two image sizes for each detector; then the source code."""
    rows = []
    for name in MODELS:
        detector = build_detector(name, num_classes=80).eval()
        count = sum(parameter.numel() for parameter in detector.parameters())
        rows.append(row("size", name, count, "parameters", "MMDetection 3.3.0", MMDETECTION_PARAMETERS[name]))
        for height, width in SIZES:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                run_once(detector, torch.zeros(1, 3, height, width))
            giga = counter.get_total_flops() / 2 / 1e9
            rows.append(row("size", f"{name} {height}x{width}", giga, "10^9 multiply-adds"))
    return rows + measure_code()


def run_once(detector: Detector, images: Tensor) -> None:
    """Compute all parts of a detector for full numbers of proposals and masks: untrained, it would find none."""
    features = detector.fpn(detector.backbone(images))
    if isinstance(detector, RetinaNet):
        detector.head(features)
    if isinstance(detector, TwoStage):
        detector.rpn(features)
        head = detector.roi_head
        boxes = torch.tensor([0.0, 0.0, 64.0, 64.0])
        for number in range(len(head.box_heads)):
            head(features, boxes.expand(1, 1000, 4), number)
        if head.mask_head is not None:
            inside = head.pool(features, torch.zeros(100).long(), boxes.expand(100, 4), head.mask_head.input_size)
            head.mask_head(inside)
