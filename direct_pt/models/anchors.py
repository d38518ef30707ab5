"""Anchors of a feature pyramid, for the whole batch. Semantics follow MMDetection's AnchorGenerator."""

import torch
from torch import Tensor, nn


class Anchors(nn.Module):
    """Boxes of fixed scales and ratios, centred on the (x * stride, y * stride) grid of every level.

    Args:
        strides: pixels a cell, one a level.
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
        cell = 0.5 * torch.stack([-widths, -heights, widths, heights], dim=1)
        self.cell_anchors: Tensor
        self.register_buffer("cell_anchors", cell, persistent=False)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Anchors of each level, [h * w * per_cell, 4], ordered (row, column, anchor)."""
        levels = []
        for feature, stride in zip(features, self.strides, strict=True):
            height, width = feature.shape[-2:]
            x = torch.arange(width, device=feature.device, dtype=torch.float32) * stride
            y = torch.arange(height, device=feature.device, dtype=torch.float32) * stride
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([columns, rows, columns, rows], dim=-1).view(-1, 1, 4)
            levels.append((shifts + self.cell_anchors * stride).view(-1, 4))
        return levels

    def on_padded_images(self, features: list[Tensor], padded_sizes: Tensor) -> Tensor:
        """Whether each anchor's cell lies within its own image's padded size.

        Args:
            features: the pyramid, [B, C, h, w] a level.
            padded_sizes: [B, 2] (h, w) that each image alone would be padded to.

        Returns:
            [B, anchors of all levels] bool.
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


def inside(anchors: Tensor, sizes: Tensor) -> Tensor:
    """[B, N] bool, which of `anchors` [N, 4] lie inside images of `sizes` [B, 2] (h, w), short of the far borders."""
    limits = sizes[:, None, [1, 0]]
    return (anchors[:, :2] >= 0).all(dim=-1) & (anchors[:, 2:] < limits).all(dim=-1)


def per_anchor(level: Tensor, values: int) -> Tensor:
    """[B, A * values, h, w] as [B, h * w * A, values], the anchors' order."""
    batch, _, height, width = level.shape
    return level.view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, values)
