"""Masks: the head, and the targets that it learns. `onnx_detector.py` pastes its probabilities into images.

Semantics follow MMDetection's FCNMaskHead and BitmapMasks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from direct_pt.batch import PackedMasks
from direct_pt.models.boxes import group_sizes
from direct_pt.onnx_detector import MASK_THRESHOLD

MAX_CANVAS_PIXELS = 2**22  # of the masks that are unpacked at once
MAX_SIDE_EXPONENT = 16  # a canvas has a side of at most 2**16 pixels


class MaskHead(nn.Module):
    """Four convolutions, a transposed one that doubles the size, and a mask for every class.

    Args:
        channels: of the RoI features.
        num_classes: without a background.
        input_size: cells per side of the RoI features; masks have twice as many.
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
    """The mask head's targets: in each box, RoIAlign of the object's mask, then a threshold.

    RoIAlign reads images, but masks are packed, each kept inside its own window only. Full-size images of all masks
    would need memory for the number of objects times the image size, so masks are unpacked on small square canvases.
    A canvas's side is the smallest power of 2 that holds the window and a margin of one pixel on every side: few sizes,
    so that many masks share one stack of canvases [n, 1, side, side], and one call of RoIAlign. Sorted by side:

        objects   a  b  c  d  e | f  g | h  i | j
        sides    16 16 16 16 16 |32 32 |32 32 |128
        stacks   (0, 5, 16)      (5, 7, 32), (7, 9, 32), (9, 10, 128)

    A stack has at most `MAX_CANVAS_PIXELS`; therefore the 32s above fill two.

    Args:
        masks: of a batch.
        rows: [R] int64, the mask of each box.
        boxes: [R, 4] in the images' pixels.
        cells: per side.

    Returns:
        [R, cells, cells] float32, 0 or 1.
    """
    extents = (masks.windows[:, 2:] - masks.windows[:, :2]).amax(dim=1) + 2
    exponents = torch.log2(extents.double()).ceil().long()
    order = torch.argsort(exponents)
    position = torch.argsort(order)[rows]  # of each box's object among the sorted ones
    stacks, first = [], 0  # (start, stop, side): the sorted objects from `start` to `stop`
    for exponent, count in enumerate(group_sizes(exponents, MAX_SIDE_EXPONENT + 1)):
        end, stack_size = first + count, max(1, MAX_CANVAS_PIXELS >> (2 * exponent))
        stacks += [(start, min(start + stack_size, end), 2**exponent) for start in range(first, end, stack_size)]
        first = end
    stops = torch.tensor([stop for _, stop, _ in stacks]).to(position.device, non_blocking=True)
    stack_of_box = torch.bucketize(position, stops, right=True)
    boxes_by_stack = torch.argsort(stack_of_box).split(group_sizes(stack_of_box, len(stacks)))

    targets = boxes.new_zeros(len(boxes), cells, cells)
    for (start, stop, side), box_rows in zip(stacks, boxes_by_stack, strict=True):
        if len(box_rows):
            mask_rows = rows[box_rows]
            canvases = _unpack(masks, order[start:stop], side)
            origins = (masks.windows[mask_rows, :2] - 1).repeat(1, 2)  # of the canvas, in the mask's frame
            corners = boxes[box_rows] * masks.zooms[mask_rows, None] - origins
            rois = torch.cat([(position[box_rows] - start)[:, None].to(corners.dtype), corners], dim=1)
            targets[box_rows] = roi_align(canvases, rois, cells, 1.0, sampling_ratio=0, aligned=True)[:, 0]
    return (targets >= MASK_THRESHOLD).float()


def _unpack(masks: PackedMasks, rows: Tensor, side: int) -> Tensor:
    """Canvases [n, 1, side, side] float32 of the masks `rows` [n], each with its window from pixel (1, 1) on.

    A canvas is zero around the window, except beyond the image's border: there the border's pixels are repeated, as
    RoIAlign does with those of a whole image.
    """
    x1, y1, x2, y2 = masks.windows[rows, :, None].unbind(dim=1)
    limits = masks.frames[rows] - 1
    steps = torch.arange(-1, side - 1, device=rows.device)
    y = (y1 + steps).clamp(min=0).minimum(limits[:, :1])  # [n, side], each canvas row's place in the mask's frame
    x = (x1 + steps).clamp(min=0).minimum(limits[:, 1:])
    row_offsets = masks.offsets[rows, None] + (y - y1) * (x2 - x1)
    inside = ((y >= y1) & (y < y2))[:, :, None] & ((x >= x1) & (x < x2))[:, None, :]
    bit_indices = torch.where(inside, row_offsets[:, :, None] + (x - x1)[:, None, :], 0)
    bits = masks.bits if len(masks.bits) else masks.bits.new_zeros(1)
    return (bits[bit_indices] * inside).float()[:, None]
