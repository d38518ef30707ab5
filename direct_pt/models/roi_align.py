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


def pyramid_roi_align(features: list[Tensor], strides: list[int], boxes: Tensor, output_size: int) -> Tensor:
    """RoIAlign (aligned, adaptive sampling) of each box on the level that its size asks for, in float32.

    Semantics follow MMDetection's SingleRoIExtractor.

    Args:
        features: [B, C, h, w] a level.
        strides: pixels a cell, one a level.
        boxes: [B, S, 4].
        output_size: cells a side.

    Returns:
        [B * S, C, output_size, output_size].
    """
    batch, slots = boxes.shape[:2]
    images = torch.arange(batch, device=boxes.device, dtype=boxes.dtype)
    rois = torch.cat([images.repeat_interleave(slots)[:, None], boxes.flatten(0, 1)], dim=1)
    levels = roi_levels(rois[:, 1:], len(features))
    rows, parts = [], []
    for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        on_level = torch.nonzero(levels == level).squeeze(1)
        rows.append(on_level)
        parts.append(
            roi_align(feature.float(), rois[on_level], output_size, 1.0 / stride, sampling_ratio=0, aligned=True)
        )
    return torch.cat(parts)[torch.argsort(torch.cat(rows))]
