"""RoI features out of a pyramid."""

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from direct_pt.models.boxes import area, group_sizes
from direct_pt.models.layers import takes_gpu_path

FINEST_SCALE = 56  # RoIs under twice this side, in pixels, are read from the finest level


def roi_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """The pyramid level [...] int64 that each box [..., 4] is read from, 0 the finest."""
    scale = area(boxes).clamp(min=0).sqrt()
    return torch.log2(scale / FINEST_SCALE + 1e-6).floor().clamp(0, num_levels - 1).long()


def pyramid_roi_align(
    features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, output_size: int
) -> Tensor:
    """RoIAlign (aligned, adaptive sampling) of each box on the level that its size asks for, computed in float32.

    Semantics follow MMDetection's SingleRoIExtractor.

    Args:
        features: [B, C, h, w] a level.
        strides: pixels a cell, one a level.
        images: [R] int64, the position in the batch that each box lies in.
        boxes: [R, 4].
        output_size: cells a side.

    Returns:
        [R, C, output_size, output_size] of the features' dtype.
    """
    pool = roi_align if takes_gpu_path(boxes) else roi_align_by_rows
    return pool(features, strides, images, boxes, output_size).to(features[0].dtype)


def roi_align(features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, output_size: int) -> Tensor:
    """`pyramid_roi_align` by torchvision's kernel, level by level."""
    levels = roi_levels(boxes, len(features))
    order = torch.argsort(levels, stable=True)
    counts = group_sizes(levels, len(features))
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = [
        torchvision.ops.roi_align(feature.float(), rois[rows], output_size, 1 / stride, sampling_ratio=0, aligned=True)
        for feature, stride, rows in zip(features, strides, order.split(counts), strict=True)
    ]
    return torch.cat(pooled).index_select(0, torch.argsort(order))


def roi_align_by_rows(
    features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, output_size: int
) -> Tensor:
    """The same, made for CPUs, where torchvision's goes channel by channel: each output is a weighted sum of a few
    rows of one table [cells of all levels and images, C], forward and backward.

    Bilinear sampling and averaging are separable: a cell's weight is the product of one along y and one along x.
    """
    channels = features[0].shape[1]
    table = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features]).float()
    with torch.no_grad():
        rows, weights, starts = _summands(features, strides, images, boxes, output_size)
    pooled = F.embedding_bag(rows, table, starts, per_sample_weights=weights.to(table.dtype), mode="sum")
    return pooled.view(len(boxes), output_size, output_size, channels).permute(0, 3, 1, 2)


def _summands(
    features: list[Tensor], strides: list[int], images: Tensor, boxes: Tensor, bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of the table each of the `bins` x `bins` outputs of each box adds up: rows [T], their weights [T], and
    where each output's begin [R bins bins]."""
    levels = roi_levels(boxes, len(features))
    shapes = torch.tensor([feature.shape[-2:] for feature in features])
    cells = shapes.prod(dim=1)
    level_starts = (cells * len(features[0])).cumsum(0) - cells * len(features[0])
    height, width = shapes[levels].unbind(dim=1)
    boxes = boxes / torch.tensor(strides)[levels, None]
    y, down = _axis_weights(boxes[:, 1], boxes[:, 3], bins, height)
    x, across = _axis_weights(boxes[:, 0], boxes[:, 2], bins, width)
    y = y * width[:, None, None] + (level_starts[levels] + images * cells[levels])[:, None, None]

    # An output's summands are runs along x, one for each of its cells along y. Weights are nowhere zero but at the end.
    heights, widths = ((weight != 0).any(dim=1).sum(dim=1).clamp(min=1) for weight in (down, across))
    of_output = torch.arange(len(boxes) * bins * bins)
    roi = of_output // (bins * bins)
    row, column = of_output // bins, roi * bins + of_output % bins  # of [R bins, K]
    runs = heights[roi]
    output = of_output.repeat_interleave(runs)
    nth = torch.arange(len(output)) - (runs.cumsum(0) - runs)[output]
    place = row[output] * y.shape[-1] + nth
    length = widths[roi[output]]
    run = torch.arange(len(output)).repeat_interleave(length)
    run_starts = length.cumsum(0) - length
    step = (column[output] * x.shape[-1] - run_starts)[run] + torch.arange(len(run))
    rows = y.flatten()[place][run] + x.flatten()[step]
    weights = down.flatten()[place][run] * across.flatten()[step]
    outputs = runs * widths[roi]
    return rows, weights, outputs.cumsum(0) - outputs


def _axis_weights(low: Tensor, high: Tensor, bins: int, length: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis, which cells each bin of each box sums up, and with which weights.

    Args:
        low: [R] where the boxes begin, in cells.
        high: [R] where they end.
        bins: that each is cut into.
        length: [R] int64, of the axis.

    Returns:
        Cells [R, bins, K] int64 and weights [R, bins, K].
    """
    size = ((high - low) / bins)[:, None, None]
    number = size.ceil()  # of samples in a bin; a box without extent has none
    sample = torch.arange(int(number.max().clamp(min=1)) if len(number) else 1)
    start = low[:, None, None] - 0.5 + torch.arange(bins)[:, None] * size
    place = start + (sample + 0.5) * size / number.clamp(min=1)
    last = length[:, None, None] - 1
    counts = ((sample < number) & (place >= -1) & (place <= last + 1)) / number.clamp(min=1)
    place = place.clamp(min=0).minimum(last)
    first = place.floor()
    share = (place - first) * counts
    begin = first[:, :, :1]
    offset = (first - begin).long()
    weights = place.new_zeros(*place.shape[:2], len(sample) + 1)
    weights.scatter_add_(2, offset, counts - share)
    weights.scatter_add_(2, (offset + 1).clamp(max=len(sample)), share)
    cells = begin.long() + torch.arange(len(sample) + 1)
    return cells.minimum(last), weights
