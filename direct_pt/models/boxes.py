"""Box arithmetic on whole batches: coder, overlaps, non-maximum suppression. All in float32 or better.

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
    x, y, w, h = _centres(references)
    tx, ty, tw, th = _centres(targets)
    deltas = (tx - x) / w, (ty - y) / h, torch.log(tw / w), torch.log(th / h)
    return torch.stack([delta / std for delta, std in zip(deltas, stds, strict=True)], dim=-1)


def decode(references: Tensor, deltas: Tensor, stds: tuple[float, float, float, float], sizes: Tensor) -> Tensor:
    """Boxes [B, ..., 4] from `references` and `deltas` of that shape, clipped to the images' `sizes` [B, 2] (h, w).

    A box whose deltas are not numbers, from weights that have diverged, is empty: it must not be an index of anything.
    """
    x, y, w, h = _centres(references)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.float().unbind(-1), stds, strict=True))
    half_w = 0.5 * w * dw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    half_h = 0.5 * h * dh.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    x, y = x + w * dx, y + h * dy
    boxes = torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)
    return clip(boxes.nan_to_num(nan=0.0), sizes)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [B, ..., 4] cut to the images' `sizes` [B, 2] (h, w)."""
    limits = sizes.to(boxes.dtype)[:, [1, 0, 1, 0]]
    limits = limits.view(len(boxes), *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def unit_unless(keep: Tensor, boxes: Tensor) -> Tensor:
    """`boxes` [..., 4], but (0, 0, 1, 1) where `keep` [...] does not hold."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([torch.where(keep[..., None], low, 0.0), torch.where(keep[..., None], high, 1.0)], dim=-1)


def group_sizes(groups: Tensor, count: int) -> list[int]:
    """How many of `groups` [M] are 0, 1, ... up to `count` - 1. Waits for the device once; bincount would twice."""
    return (groups[:, None] == torch.arange(count, device=groups.device)).sum(dim=0).tolist()


def area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pairwise IoU and intersection over `second`'s own area.

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


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Greedy NMS inside each group, for all groups at once.

    Args:
        boxes: [M, 4].
        scores: [M].
        groups: [M] int64 from 0; boxes of different groups never suppress each other.
        threshold: a box goes where its IoU with a better one is strictly above this.

    Returns:
        The kept rows [K], best score first.
    """
    if takes_gpu_path(boxes):
        # One kernel for all: groups are moved apart, in float64 so that far-off coordinates keep their digits.
        shift = groups.double() * (boxes.max() - boxes.min() + 1).double() if len(boxes) else groups.double()
        return torchvision.ops.nms(boxes.double() + shift[:, None], scores.double(), threshold)
    # The CPU kernel compares every kept box with all that follow and uses one thread: each group is a call of its own.
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
    """Class-wise NMS, then the best `max_detections` of each image, ordered by image and falling score."""
    groups = candidates.image * num_classes + candidates.labels
    kept = grouped_nms(candidates.boxes, candidates.scores, groups, nms_threshold)
    kept = kept[torch.argsort(candidates.image[kept], stable=True)]
    image = candidates.image[kept]
    first = torch.searchsorted(image, torch.arange(num_images, device=image.device))
    rank = torch.arange(len(image), device=image.device) - first[image]
    kept = kept[rank < max_detections]
    return candidates.keep(kept)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.float().unbind(-1)
    return (x1 + x2) * 0.5, (y1 + y2) * 0.5, x2 - x1, y2 - y1
