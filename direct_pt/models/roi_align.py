"""RoI features out of a pyramid: RoIAlign, with torchvision's kernel on GPUs, roi_align_cpu.py's on CPUs."""

import torch
import torchvision
from torch import Tensor

from direct_pt.models.boxes import area, group_sizes
from direct_pt.models.layers import takes_gpu_path
from direct_pt.models.roi_align_cpu import roi_align_by_rows

FINEST_SCALE = 56.0  # pixels: RoIs whose side is under twice this are read from the finest level


def roi_levels(boxes: Tensor, num_levels: int, finest_scale: float = FINEST_SCALE) -> Tensor:
    """The pyramid level [...] int64 that each box [..., 4] is read from, 0 the finest."""
    scale = area(boxes).clamp(min=0).sqrt()
    return torch.log2(scale / finest_scale + 1e-6).floor().clamp(0, num_levels - 1).long()


def pyramid_roi_align(
    features: list[Tensor],
    strides: list[int],
    images: Tensor,
    boxes: Tensor,
    output_size: int,
    finest_scale: float = FINEST_SCALE,
) -> Tensor:
    """RoIAlign (aligned, adaptive sampling) of each box on the level that suits its size, computed in float32.

    Semantics follow MMDetection's SingleRoIExtractor.

    Args:
        features: [B, C, h, w] per level.
        strides: pixels per cell, one per level.
        images: [R] int64, the position in the batch that each box lies in.
        boxes: [R, 4].
        output_size: bins a side.
        finest_scale: half the side under which boxes are read from the finest level, in pixels.

    Returns:
        [R, C, output_size, output_size] of the features' dtype.
    """
    pool = roi_align_by_levels if takes_gpu_path(boxes) else roi_align_by_rows
    levels = roi_levels(boxes, len(features), finest_scale)
    return pool(features, strides, images, boxes, levels, output_size).to(features[0].dtype)


def roi_align_by_levels(
    features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, levels: Tensor, output_size: int
) -> Tensor:
    """`pyramid_roi_align` with torchvision's kernel, one call per level; `levels` [R] are those of the boxes."""
    order = torch.argsort(levels, stable=True)
    counts = group_sizes(levels, len(features))
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = [
        torchvision.ops.roi_align(feature.float(), rois[rows], output_size, 1 / stride, sampling_ratio=0, aligned=True)
        for feature, stride, rows in zip(features, strides, order.split(counts), strict=True)
    ]
    return torch.cat(pooled).index_select(0, torch.argsort(order))
