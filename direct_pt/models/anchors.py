"""Anchors of a feature pyramid, for a whole batch. Semantics follow MMDetection's AnchorGenerator.

The heads that predict at every anchor (the RPN, RetinaNet) share the functions below. Everywhere an image's N anchors
are ordered (level, row, column, anchor of the cell).
"""

import torch
from torch import Tensor, nn

from direct_pt.models.boxes import decode, gather_boxes

ANCHOR_STDS = (1.0, 1.0, 1.0, 1.0)  # of the box coder


class Anchors(nn.Module):
    """Boxes of fixed scales and ratios, centred on the (x * stride, y * stride) grid of every level.

    Args:
        strides: pixels per cell, one per level.
        scales: an anchor's side at ratio 1, in strides.
        ratios: height / width, at constant area.
    """

    def __init__(self, strides: tuple[int, ...], scales: tuple[float, ...], ratios: tuple[float, ...]) -> None:
        super().__init__()
        self.strides = strides
        self.per_cell = len(scales) * len(ratios)
        roots = torch.tensor(ratios).sqrt()
        widths = (torch.tensor(scales)[None, :] / roots[:, None]).flatten()
        heights = (torch.tensor(scales)[None, :] * roots[:, None]).flatten()
        cell_anchors = 0.5 * torch.stack([-widths, -heights, widths, heights], dim=1)  # [A, 4], in strides
        self.cell_anchors: Tensor
        self.register_buffer("cell_anchors", cell_anchors, persistent=False)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Anchors [h * w * A, 4] of each level of `features`, of which only the sizes count."""
        levels = []
        for feature, stride in zip(features, self.strides, strict=True):
            height, width = feature.shape[-2:]
            x = torch.arange(width, device=feature.device, dtype=torch.float32) * stride
            y = torch.arange(height, device=feature.device, dtype=torch.float32) * stride
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([columns, rows, columns, rows], dim=-1).view(-1, 1, 4)
            levels.append((shifts + self.cell_anchors * stride).view(-1, 4))
        return levels

    def inside_padding(self, features: list[Tensor], padded_sizes: Tensor) -> Tensor:
        """Whether each anchor's cell lies within its own image's padded size (MMDetection's valid_flags).

        Args:
            features: the pyramid, [B, C, h, w] per level.
            padded_sizes: [B, 2] (h, w) that each image alone would be padded to.

        Returns:
            [B, N] bool.
        """
        levels = []
        for feature, stride in zip(features, self.strides, strict=True):
            height, width = feature.shape[-2:]
            cells = torch.div(padded_sizes + stride - 1, stride, rounding_mode="floor")
            rows = torch.arange(height, device=feature.device)[None, :] < cells[:, :1]
            columns = torch.arange(width, device=feature.device)[None, :] < cells[:, 1:]
            valid = rows[:, :, None, None] & columns[:, None, :, None]
            levels.append(valid.expand(-1, -1, -1, self.per_cell).flatten(1))
        return torch.cat(levels, dim=1)


def inside_images(anchors: Tensor, sizes: Tensor) -> Tensor:
    """[B, N] bool, which of `anchors` [N, 4] lie inside images of `sizes` [B, 2] (h, w), short of the far borders."""
    limits = sizes[:, None, [1, 0]]
    return (anchors[:, :2] >= 0).all(dim=-1) & (anchors[:, 2:] < limits).all(dim=-1)


def flatten_level(level: Tensor, values: int) -> Tensor:
    """A head's map [B, A * values, h, w] as [B, h * w * A, values], in the anchors' order."""
    batch, _, height, width = level.shape
    return level.view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, values)


def flatten_levels(levels: list[Tensor], values: int) -> Tensor:
    """A head's maps [B, A * values, h, w] of all levels as [B, N, values], in the anchors' order."""
    return torch.cat([flatten_level(level, values) for level in levels], dim=1)


def decode_best(
    anchors: list[Tensor], logits: list[Tensor], deltas: list[Tensor], num_classes: int, count: int, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decode each level's `count` best pairs of an anchor and a class.

    Args:
        anchors: [h * w * A, 4] per level.
        logits: [B, A * num_classes, h, w] per level.
        deltas: [B, 4 A, h, w] per level.
        num_classes: 1 for the RPN's objectness.
        count: fewer where a level has fewer pairs.
        sizes: [B, 2] (h, w) of the images, which the boxes are clipped to.

    Returns:
        Of the K pairs of all levels: boxes [B, K, 4], scores [B, K], classes [B, K], levels [B, K]; level by level,
        best first in each.
    """
    boxes, scores, classes, levels = [], [], [], []
    for level, level_anchors in enumerate(anchors):
        level_scores = flatten_level(logits[level], num_classes).float().sigmoid().flatten(1)
        best, pairs = level_scores.topk(min(count, level_scores.shape[1]), dim=1)
        rows = pairs // num_classes  # all classes of an anchor, then those of the next
        best_deltas = gather_boxes(flatten_level(deltas[level], 4), rows)
        boxes.append(decode(level_anchors[rows], best_deltas, ANCHOR_STDS, sizes))
        scores.append(best)
        classes.append(pairs % num_classes)
        levels.append(torch.full_like(rows, level))
    return torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(classes, dim=1), torch.cat(levels, dim=1)
