"""Masks: the head, the targets that it learns, and its probabilities pasted into images. Semantics follow MMDetection's
FCNMaskHead and BitmapMasks."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from direct_pt.batch import PackedMasks
from direct_pt.models.boxes import group_sizes

CANVAS_PIXELS = 2**22  # of the masks that are unpacked at once
LARGEST_EXPONENT = 16  # of 2: no canvas has a longer side
THRESHOLD = 0.5


class MaskHead(nn.Module):
    """Four convolutions, a transposed one that doubles the size, and a mask for every class.

    Args:
        channels: of the RoI features.
        num_classes: without a background.
        input_size: cells a side of the RoI features; masks have twice as many.
    """

    def __init__(self, channels: int, num_classes: int, input_size: int = 14) -> None:
        super().__init__()
        self.input_size = input_size
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.logits = nn.Conv2d(channels, num_classes, 1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """Logits [R, num_classes, 2 s, 2 s] of RoI features [R, C, s, s]."""
        for conv in self.convs:
            features = F.relu(conv(features))
        return self.logits(F.relu(self.upsample(features)))


@torch.no_grad()
def mask_targets(masks: PackedMasks, rows: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """What the mask head is to say inside each box: RoIAlign of the object's mask, then a threshold.

    Masks are unpacked a few at a time, each inside its own window only, so that memory does not follow the number of
    objects times the image size.

    Args:
        masks: of a batch.
        rows: [R] int64, the mask of each box.
        boxes: [R, 4] in the images' pixels.
        cells: a side.

    Returns:
        [R, cells, cells] float32, 0 or 1.
    """
    # Canvases are square, their side a power of 2 that holds the window and a margin of one pixel.
    extents = (masks.windows[:, 2:] - masks.windows[:, :2]).amax(dim=1) + 2
    exponents = torch.log2(extents.double()).ceil().long()
    order = torch.argsort(exponents)
    position = torch.argsort(order)[rows]  # of each box's object in that order
    parts, start = [], 0
    for exponent, count in enumerate(group_sizes(exponents, LARGEST_EXPONENT + 1)):
        room, end = max(1, CANVAS_PIXELS >> (2 * exponent)), start + count
        parts += [(first, min(first + room, end), 2**exponent) for first in range(start, end, room)]
        start = end
    stops = torch.tensor([stop for _, stop, _ in parts]).to(position.device, non_blocking=True)
    part = torch.bucketize(position, stops, right=True)
    members = torch.argsort(part).split(group_sizes(part, len(parts)))

    targets = boxes.new_zeros(len(boxes), cells, cells)
    for (start, stop, side), on_part in zip(parts, members, strict=True):
        if len(on_part):
            mask = rows[on_part]
            canvases = _unpack(masks, order[start:stop], side)
            origins = (masks.windows[mask, :2] - 1).repeat(1, 2)
            corners = boxes[on_part] * masks.zooms[mask, None] - origins
            rois = torch.cat([(position[on_part] - start)[:, None].to(corners.dtype), corners], dim=1)
            targets[on_part] = roi_align(canvases, rois, cells, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    return (targets >= THRESHOLD).float()


def _unpack(masks: PackedMasks, objects: Tensor, side: int) -> Tensor:
    """[n, 1, side, side] float32: each mask from one pixel above and left of its window on, and what lies around it.

    Around it there is nothing, but for the image's border pixels, which go on beyond the border as in RoIAlign.
    """
    x1, y1, x2, y2 = masks.windows[objects, :, None].unbind(dim=1)
    limits = masks.frames[objects] - 1
    steps = torch.arange(-1, side - 1, device=objects.device)
    y = (y1 + steps).clamp(min=0).minimum(limits[:, :1])
    x = (x1 + steps).clamp(min=0).minimum(limits[:, 1:])
    rows = masks.offsets[objects, None] + (y - y1) * (x2 - x1)
    inside = ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]
    places = torch.where(inside, rows[:, :, None] + (x - x1)[:, None, :], 0)
    bits = masks.bits if len(masks.bits) else masks.bits.new_zeros(1)
    return (bits[places] * inside).float()[:, None]


def paste_mask(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> tuple[tuple[int, int], np.ndarray]:
    """A mask of a box in the image: bilinear between the cells' centres, at every pixel's centre.

    Args:
        probabilities: [m, m].
        box: (x1, y1, x2, y2) in the image's pixels.
        size: (height, width) of the image.

    Returns:
        (top, left) of the pixels that the box touches, and [h, w] float32 probabilities there; all others are under
        one half.
    """
    return next(paste_windows(probabilities[None], box[None], np.array([size])))


def paste_windows(
    probabilities: np.ndarray, boxes: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """`paste_mask` of each of the masks [D, m, m] and `boxes` [D, 4] in images of `sizes` [D, 2] (height, width)."""
    limits, cells = sizes[:, [1, 0]], probabilities.shape[-1]
    first = np.clip(np.floor(boxes[:, :2]), 0, limits).astype(np.int64)
    last = np.clip(np.ceil(boxes[:, 2:]), first, np.maximum(first, limits)).astype(np.int64)
    exact = boxes.astype(np.float64)
    columns, rows = (
        _interpolation(first[:, side], last[:, side], exact[:, side], exact[:, side + 2], cells) for side in (0, 1)
    )
    for (left, top), maps, across, down in zip(
        first.tolist(), probabilities.astype(np.float32, copy=False), columns, rows, strict=True
    ):
        yield (top, left), (across @ (down @ maps).T).T  # columns lie together in memory, as run lengths need them


def paste_masks(probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[D, height, width] bool: the masks [D, m, m] of `boxes` [D, 4] in a whole image of `size`."""
    masks = np.zeros((len(boxes), *size), bool)
    windows = paste_windows(probabilities, boxes, np.tile(size, (len(boxes), 1)))
    for mask, ((top, left), inside) in zip(masks, windows, strict=True):
        mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside >= THRESHOLD
    return masks


def _interpolation(
    first: np.ndarray, last: np.ndarray, low: np.ndarray, high: np.ndarray, cells: int
) -> list[np.ndarray]:
    """For each of D boxes [last - first, cells] weights of cells from `low` to `high`, at pixels `first` to `last`."""
    counts = last - first
    ends = np.cumsum(counts)
    box = np.repeat(np.arange(len(first)), counts)
    pixels = np.arange(len(box)) - (ends - counts - first)[box]
    centres = (pixels + 0.5 - low[box]) / np.maximum(high - low, 1e-6)[box] * cells - 0.5
    below = np.floor(centres)
    # A pixel lies between two cells. Two more on each side take what lies beyond.
    place = np.clip(below, -2, cells).astype(np.int64) + 2
    weights = np.zeros((len(box), cells + 4), np.float32)
    weights[np.arange(len(box)), place] = 1 - (centres - below)
    weights[np.arange(len(box)), place + 1] = 1 - (below + 1 - centres)
    stretches = zip((ends - counts).tolist(), ends.tolist(), strict=True)
    return [weights[begin:end, 2:-2] for begin, end in stretches]


def encode_masks(
    corners: Sequence[tuple[int, int]], masks: Sequence[np.ndarray], sizes: np.ndarray
) -> list[dict[str, Any]]:
    """Masks as COCO's compressed run lengths. The time that it takes follows the masks' sizes, not the images'.

    Args:
        corners: D (top, left), where each mask's first pixel lies in its image.
        masks: D of [h, w] bool.
        sizes: [D, 2] (height, width) of the images.
    """
    shapes = np.array([mask.shape for mask in masks], np.int64).reshape(-1, 2)
    heights = shapes[:, 0] + 2
    ends = np.cumsum(heights * shapes[:, 1])
    flat = np.zeros(ends[-1] if len(ends) else 0, bool)
    for mask, height, end in zip(masks, heights.tolist(), ends.tolist(), strict=True):
        # Columns first, as in COCO, and nothing above and below each.
        flat[end - height * mask.shape[1] : end].reshape(-1, height)[:, 1:-1] = mask.T
    places = np.flatnonzero(flat[1:] != flat[:-1])
    owner = np.searchsorted(ends, places, side="right")
    column, row = np.divmod(places - (ends - heights * shapes[:, 1])[owner], heights[owner])
    tops, lefts = np.array(corners, np.int64).reshape(-1, 2).T
    changes = (lefts[owner] + column) * sizes[owner, 0] + tops[owner] + row
    # A run that reaches the bottom and goes on at the next top is one.
    joined = (changes[1:-1:2] == changes[2::2]) & (owner[1:-1:2] == owner[2::2])
    kept = np.ones(len(changes), bool)
    kept[1:-1] = np.repeat(~joined, 2)
    changes, owner = changes[kept], owner[kept]

    # Each mask's changes between the first pixel and the end.
    last = np.cumsum(np.bincount(owner, minlength=len(masks)) + 2) - 1
    edges = np.zeros(len(changes) + 2 * len(masks), np.int64)
    edges[np.arange(len(changes)) + 2 * owner + 1] = changes
    edges[last] = sizes[:, 0] * sizes[:, 1]
    counts, encoded, start = np.diff(edges).tolist(), [], 0
    for size, stop in zip(sizes.tolist(), last.tolist(), strict=True):
        if stop - start > 1 and not counts[stop - 1]:  # COCO leaves an empty run at the end out
            mine = counts[start : stop - 1]
        else:
            mine = counts[start:stop]
        found = coco_mask.frPyObjects({"size": size, "counts": mine}, *size)
        encoded.append({"size": size, "counts": found["counts"].decode()})
        start = stop + 1
    return encoded
