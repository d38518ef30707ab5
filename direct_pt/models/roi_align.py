"""RoI features out of a pyramid."""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

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
    levels = roi_levels(boxes, len(features))
    align = roi_align if boxes.is_cuda else roi_align_by_rows
    return _in_groups(
        levels,
        len(features),
        lambda level, rows: align(features[level].float(), images[rows], boxes[rows] / strides[level], output_size),
    )


def roi_align(feature: Tensor, images: Tensor, boxes: Tensor, output_size: int) -> Tensor:
    """torchvision's RoIAlign of `boxes` [R, 4], in cells of `feature` [B, C, h, w]."""
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
    return torchvision.ops.roi_align(feature, rois, output_size, sampling_ratio=0, aligned=True)


def roi_align_by_rows(feature: Tensor, images: Tensor, boxes: Tensor, output_size: int) -> Tensor:
    """The same, made for CPUs, where torchvision's goes channel by channel: each output is a weighted sum of a few
    of the map's rows [B h w, C], forward and backward.

    Bilinear sampling and averaging are separable: a weight is the product of one along y and one along x.
    """
    samples = ((boxes[:, 2:] - boxes[:, :2]) / output_size).ceil().clamp(min=1)
    kinds, kind = samples.log2().ceil().unique(dim=0, return_inverse=True)  # of alike many rows a sum
    feature = feature.contiguous(memory_format=torch.channels_last)
    return _in_groups(
        kind, max(1, len(kinds)), lambda _, rows: _sum_rows(feature, images[rows], boxes[rows], output_size)
    )


def _in_groups(group: Tensor, count: int, pool: Callable[[int, Tensor], Tensor]) -> Tensor:
    """What `pool` gives for the rows of each of `count` groups, in the order of `group` [R]."""
    order = torch.argsort(group, stable=True)
    sizes = torch.bincount(group, minlength=count).tolist()  # waits for the device
    parts = [pool(number, rows) for number, rows in enumerate(order.split(sizes))]
    return torch.cat(parts).index_select(0, torch.argsort(order)) if count > 1 else parts[0]


def _sum_rows(feature: Tensor, images: Tensor, boxes: Tensor, output_size: int) -> Tensor:
    """`roi_align_by_rows` for boxes that take about as many samples a bin."""
    channels, height, width = feature.shape[1:]
    column, across = _axis_weights(boxes[:, 0], boxes[:, 2], output_size, width)
    row, down = _axis_weights(boxes[:, 1], boxes[:, 3], output_size, height)
    cells = (row + images[:, None, None] * height)[:, :, None, :, None] * width + column[:, None, :, None, :]
    weights = down[:, :, None, :, None] * across[:, None, :, None, :]
    table = feature.permute(0, 2, 3, 1).reshape(-1, channels)
    taps = weights.shape[-2] * weights.shape[-1]
    pooled = F.embedding_bag(cells.reshape(-1, taps), table, per_sample_weights=weights.reshape(-1, taps), mode="sum")
    return pooled.view(len(boxes), output_size, output_size, channels).permute(0, 3, 1, 2)


def _axis_weights(low: Tensor, high: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor]:
    """Along one axis, which cells each bin of each box sums up, and with which weights.

    Args:
        low: [R] where the boxes begin, in cells.
        high: [R] where they end.
        bins: that each is cut into.
        length: of the axis.

    Returns:
        Cells [R, bins, K] int64 and weights [R, bins, K].
    """
    size = (high - low) / bins
    number = size.ceil()[:, None, None]  # of samples in a bin; a box without extent has none
    sample = torch.arange(int(number.max().clamp(min=1)) if len(number) else 1, device=low.device)
    bin_start = torch.arange(bins, device=low.device)[None, :, None] * size[:, None, None]
    place = (low[:, None, None] - 0.5) + bin_start + (sample + 0.5) * size[:, None, None] / number.clamp(min=1)
    counts = ((sample < number) & (place >= -1) & (place <= length)) / number.clamp(min=1)
    place = place.clamp(0, length - 1)
    first = place.floor()
    share = (place - first) * counts
    begin = first[:, :, :1]
    offset = (first - begin).long()
    weights = place.new_zeros(*place.shape[:2], len(sample) + 1)
    weights.scatter_add_(2, offset, counts - share)
    weights.scatter_add_(2, (offset + 1).clamp(max=len(sample)), share)
    cells = begin.long() + torch.arange(len(sample) + 1, device=low.device)
    return cells.clamp(max=length - 1), weights
