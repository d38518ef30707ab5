"""Measure Direct-PT's parts, each beside its peers.

  python scripts/benchmark.py size [--output FILE.json]

size: parameters and multiply-adds of the five detectors for one image, at 448x448 and at 800x1333; two-stage detectors
      with 1,000 proposals and 100 masks. Convolutions, linear layers and attention are counted, as everywhere. The
      peer's parameters are those of MMDetection 3.3.0's models for the same 80 classes.

--output takes the figures as a list of rows: part, setting, value, unit, peer, peer_value, ratio, device, versions.
"""

import platform
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from direct_pt.checkpoint import write_json
from direct_pt.errors import run_program
from direct_pt.models.detector import MODELS, Detector, RetinaNet, TwoStage, build_detector
from direct_pt.settings import parser

SIZES = ((448, 448), (800, 1344))  # the second is 800x1333, padded to a multiple of 32
MMDETECTION_PARAMETERS = {
    "retinanet_r50_fpn": 37_968_692,
    "faster_rcnn_r50_fpn": 43_063_776,
    "cascade_rcnn_r50_fpn": 69_394_766,
    "mask_rcnn_r50_fpn": 45_707_056,
    "mask_rcnn_swin_t_fpn": 49_105_322,
}


def size() -> list[dict[str, Any]]:
    """Parameters and multiply-adds."""
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
    return rows


def run_once(detector: Detector, images: Tensor) -> None:
    """All that a detector computes for an image, whatever it finds there: untrained, it would find nothing."""
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


def row(
    part: str, setting: str, value: float, unit: str, peer: str | None = None, peer_value: float | None = None
) -> dict[str, Any]:
    """One figure."""
    return {
        "part": part,
        "setting": setting,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": None if peer_value is None else value / peer_value,
        "device": platform.processor() or platform.machine(),
        "versions": {module.__name__: module.__version__ for module in (torch, torchvision, timm)},
    }


PARTS = {"size": size}


def main() -> None:
    """Measure one part and print it."""
    p = parser(__doc__ or "")
    p.add_argument("part", choices=list(PARTS))
    p.add_argument("--output", type=Path, metavar="FILE", help="write the rows as JSON")
    args = p.parse_args()
    rows = PARTS[args.part]()
    for one in rows:
        value = f"{one['value']:,.1f}" if isinstance(one["value"], float) else f"{one['value']:,}"
        peer = f"   {one['peer']}: {one['peer_value']:,}, ratio {one['ratio']:.3f}" if one["peer"] else ""
        print(f"{one['setting']:32} {value:>12} {one['unit']}{peer}")
    if args.output:
        write_json(args.output, rows)


if __name__ == "__main__":
    run_program(main)
