"""Masks: the head, the targets that it learns, and its probabilities pasted into images. Semantics follow MMDetection's
FCNMaskHead and BitmapMasks."""

from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from direct_pt.batch import PackedMasks

CANVAS_PIXELS = 2**22  # of the masks that are unpacked at once
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
    for exponent, count in enumerate(torch.bincount(exponents).tolist()):
        room, end = max(1, CANVAS_PIXELS >> (2 * exponent)), start + count
        parts += [(first, min(first + room, end), 2**exponent) for first in range(start, end, room)]
        start = end
    part = torch.bucketize(position, position.new_tensor([stop for _, stop, _ in parts]), right=True)
    members = torch.argsort(part).split(torch.bincount(part, minlength=len(parts)).tolist())

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
    corners = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])])
    left, top, right, bottom = np.clip(corners, 0, [size[1], size[0], size[1], size[0]]).astype(int).tolist()
    rows = _interpolation(top, bottom, float(box[1]), float(box[3]), len(probabilities))
    columns = _interpolation(left, right, float(box[0]), float(box[2]), len(probabilities))
    return (top, left), rows @ probabilities.astype(np.float32) @ columns.T


def paste_masks(probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[D, height, width] bool: the masks [D, m, m] of `boxes` [D, 4] in a whole image of `size`."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, probability, box in zip(masks, probabilities, boxes, strict=True):
        (top, left), inside = paste_mask(probability, box, size)
        mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside >= THRESHOLD
    return masks


def _interpolation(first: int, last: int, low: float, high: float, cells: int) -> np.ndarray:
    """[last - first, cells] weights of cells spread from `low` to `high`, at the pixels `first` to `last`."""
    centres = (np.arange(first, last) + 0.5 - low) / max(high - low, 1e-6) * cells - 0.5
    distances = np.abs(centres[:, None] - np.arange(cells))
    return np.maximum(0, 1 - distances).astype(np.float32)


def encode_mask(corner: tuple[int, int], mask: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """A mask [h, w] bool, whose first pixel is (top, left) = `corner` of an image of `size`, as COCO's compressed RLE.

    The time that it takes follows the mask's size, not the image's.
    """
    top, left = corner
    height, width = mask.shape
    columns = np.zeros((width, height + 2), bool)  # columns first, as in COCO, and nothing above and below each
    columns[:, 1:-1] = mask.T
    flat = columns.ravel()
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), height + 2)
    changes = (left + column) * size[0] + top + row
    joined = np.flatnonzero(changes[1:-1:2] == changes[2::2]) * 2 + 1  # reaches the bottom, goes on at the next top
    changes = np.delete(changes, np.concatenate([joined, joined + 1]))
    end = [size[0] * size[1]] if not len(changes) or changes[-1] < size[0] * size[1] else []
    counts = np.diff(np.concatenate([[0], changes, end])).astype(int).tolist()
    encoded = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)
    return {"size": list(size), "counts": encoded["counts"].decode()}
