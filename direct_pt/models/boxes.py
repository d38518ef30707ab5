"""Box arithmetic on whole batches: box coder, overlaps, non-maximum suppression (NMS). All in float32 or better.

Boxes are (x1, y1, x2, y2) in pixels. Semantics follow MMDetection's DeltaXYWHBBoxCoder and bbox_overlaps.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torchvision
from torch import Tensor

from direct_pt.batch import Detections
from direct_pt.models.layers import takes_gpu_path

MAX_LOG_RATIO = abs(math.log(16 / 1000))  # a decoded side is at most 62.5 times the reference's


def encode(references: Tensor, targets: Tensor, stds: tuple[float, float, float, float]) -> Tensor:
    """Deltas [..., 4] (dx, dy, dw, dh) that move `references` [..., 4] onto `targets` [..., 4], divided by `stds`.

    Both must have positive width and height.
    """
    x, y, w, h = _centers_and_sides(references)
    target_x, target_y, target_w, target_h = _centers_and_sides(targets)
    deltas = (target_x - x) / w, (target_y - y) / h, torch.log(target_w / w), torch.log(target_h / h)
    return torch.stack([delta / std for delta, std in zip(deltas, stds, strict=True)], dim=-1)


def decode(references: Tensor, deltas: Tensor, stds: tuple[float, float, float, float], sizes: Tensor) -> Tensor:
    """Boxes [B, ..., 4] from `references` and `deltas` of that shape, clipped to the images' `sizes` [B, 2] (h, w).

    NaN coordinates, from weights that have diverged, become 0: such a box is empty, and safe to compute with.
    """
    x, y, w, h = _centers_and_sides(references)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.float().unbind(-1), stds, strict=True))
    half_w = 0.5 * w * dw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    half_h = 0.5 * h * dh.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    x, y = x + w * dx, y + h * dy
    boxes = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)
    return clip(boxes.nan_to_num(nan=0.0), sizes)


def _centers_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.float().unbind(-1)
    return (x1 + x2) * 0.5, (y1 + y2) * 0.5, x2 - x1, y2 - y1


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, ..., 4] clipped to the images' `sizes` [B, 2] (h, w)."""
    limits = sizes.to(boxes.dtype).flip(1).repeat(1, 2)
    limits = limits.view(boxes.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def unit_boxes_where_invalid(boxes: Tensor, valid: Tensor) -> Tensor:
    """`boxes` [..., 4] where `valid` [...] holds, elsewhere (0, 0, 1, 1), which can be encoded and pooled."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([torch.where(valid[..., None], low, 0.0), torch.where(valid[..., None], high, 1.0)], dim=-1)


def gather_boxes(boxes: Tensor, rows: Tensor) -> Tensor:
    """[B, S, 4]: the boxes (or deltas) at `rows` [B, S] of each image's `boxes` [B, N, 4]."""
    return boxes.gather(1, rows[..., None].expand(-1, -1, 4))


def area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pairwise IoU, and intersection over the area of `second`.

    Args:
        first: [B, G, 4].
        second: [B or 1, N, 4].

    Returns:
        Two [B, G, N] tensors.
    """
    top_left = torch.maximum(first[:, :, None, :2], second[:, None, :, :2])
    bottom_right = torch.minimum(first[:, :, None, 2:], second[:, None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    second_area = area(second)[:, None, :]
    union = area(first)[:, :, None] + second_area - intersection
    return intersection / union.clamp(min=1e-6), intersection / second_area.clamp(min=1e-6)


def group_sizes(groups: Tensor, count: int) -> list[int]:
    """How many of `groups` [M] are 0, 1, ..., `count` - 1. Waits for the GPU once; bincount would twice."""
    return (groups[:, None] == torch.arange(count, device=groups.device)).sum(dim=0).tolist()


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Greedy NMS inside each group, for all groups at once.

    Args:
        boxes: [M, 4].
        scores: [M].
        groups: [M] int64 from 0; boxes of different groups never suppress each other.
        threshold: a box is suppressed if its IoU with a kept, better one is strictly above this.

    Returns:
        The kept rows [K], best score first.
    """
    if takes_gpu_path(boxes):
        # One kernel for all: groups are moved apart, in float64 so that large coordinates keep their digits.
        shift = groups.double() * (boxes.max() - boxes.min() + 1).double() if len(boxes) else groups.double()
        return torchvision.ops.nms(boxes.double() + shift[:, None], scores.double(), threshold)
    # The CPU kernel compares every kept box with all that follow, in one thread: so one call a group, in parallel.
    order = torch.argsort(groups, stable=True)
    if not len(order):
        return order
    members = [rows for rows in order.split(torch.bincount(groups).tolist()) if len(rows)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        kept = list(pool.map(lambda rows: rows[torchvision.ops.nms(boxes[rows], scores[rows], threshold)], members))
    rows = torch.cat(kept)
    return rows[torch.argsort(scores[rows], descending=True, stable=True)]


def best_detections(
    candidates: Detections, num_images: int, num_classes: int, nms_threshold: float, max_detections: int
) -> Detections:
    """Class-wise NMS, then the best `max_detections` of each image, sorted by image and falling score."""
    groups = candidates.image * num_classes + candidates.labels
    kept = grouped_nms(candidates.boxes, candidates.scores, groups, nms_threshold)
    kept = kept[torch.argsort(candidates.image[kept], stable=True)]
    image = candidates.image[kept]
    first = torch.searchsorted(image, torch.arange(num_images, device=image.device))  # row of each image's best
    rank = torch.arange(len(image), device=image.device) - first[image]
    return candidates.keep(kept[rank < max_detections])
