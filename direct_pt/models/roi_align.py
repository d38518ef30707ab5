"""RoI features out of a pyramid."""

import torch
from torch import Tensor
from torchvision.ops import roi_align

from direct_pt.models.boxes import area

FINEST_SCALE = 56  # RoIs under twice this side, in pixels, are read from the finest level


def roi_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """The pyramid level [...] int64 that each box [..., 4] is read from, 0 the finest."""
    scale = area(boxes).clamp(min=0).sqrt()
    return torch.log2(scale / FINEST_SCALE + 1e-6).floor().clamp(0, num_levels - 1).long()


def pyramid_roi_align(
    features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, output_size: int
) -> Tensor:
    """RoIAlign (aligned, adaptive sampling) of each box on the level that its size asks for, in float32.

    Semantics follow MMDetection's SingleRoIExtractor.

    Args:
        features: [B, C, h, w] a level.
        strides: pixels a cell, one a level.
        images: [R] int64, the position in the batch that each box lies in.
        boxes: [R, 4].
        output_size: cells a side.

    Returns:
        [R, C, output_size, output_size].
    """
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
    levels = roi_levels(boxes, len(features))
    order = torch.argsort(levels, stable=True)
    counts = torch.bincount(levels, minlength=len(features)).tolist()  # the one wait for the device
    parts = [
        roi_align(feature.float(), rois[on_level], output_size, 1.0 / stride, sampling_ratio=0, aligned=True)
        for feature, stride, on_level in zip(features, strides, order.split(counts), strict=True)
    ]
    return torch.cat(parts)[torch.argsort(order)]
