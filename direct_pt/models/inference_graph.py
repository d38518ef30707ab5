"""A detector as one graph of tensors, from pixels to detections, which `torch.export` and ONNX can hold.

It computes what `Detector.detect` does for images of one size, with the same modules in the same order, but in shapes
that a graph can have: slots of a fixed number where the detector drops rows, one NMS for all groups.
"""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.models.anchors import ANCHOR_STDS, flatten_level
from direct_pt.models.backbone import DetectionSwinBlock
from direct_pt.models.boxes import decode, gather_boxes
from direct_pt.models.detector import Detector, RetinaNet, TwoStage, normalized
from direct_pt.models.masks import MaskHead
from direct_pt.models.retinanet import RetinaHead
from direct_pt.models.roi_align import roi_levels
from direct_pt.models.roi_heads import RoIHead
from direct_pt.models.rpn import RPN

EMPTY = -1.0  # the score of a slot without a box
NMS = Callable[[Tensor, Tensor, float], Tensor]


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The scores of the boxes that survive NMS, EMPTY elsewhere; torchvision's operator, for all groups at once.

    Args:
        boxes: [G, K, 4].
        scores: [G, C, K] of each class; boxes of different groups or classes do not suppress each other.
        threshold: a box is suppressed if its IoU with a kept, better one is strictly above this.
    """
    group, label, row = torch.nonzero(scores > EMPTY, as_tuple=True)
    # Groups are moved apart, in float64 so that coordinates keep their digits.
    shift = (group * scores.shape[1] + label).double() * (boxes.abs().max() * 2 + 1).double()
    apart = boxes[group, row].double() + shift[:, None]
    kept = torchvision.ops.nms(apart, scores[group, label, row].double(), threshold)
    places = group[kept], label[kept], row[kept]
    return torch.full_like(scores, EMPTY).index_put(places, scores[places])


class InferenceGraph(nn.Module):
    """The graph of one detector.

    Args:
        detector: in eval mode. It is changed: give a copy.
        suppress: what computes NMS, with the meaning of `nms`.
        half: float16 weights and features; boxes, scores, RoIAlign and NMS stay in float32.
    """

    def __init__(self, detector: Detector, suppress: NMS = nms, half: bool = False) -> None:
        super().__init__()
        self.dtype = torch.float16 if half else torch.float32
        self.pixel_mean, self.pixel_std = detector.pixel_mean.clone(), detector.pixel_std.clone()
        self.detector = detector.to(self.dtype)
        for module in detector.modules():
            if isinstance(module, DetectionSwinBlock):
                module.__class__ = IndexedSwinBlock
        self.suppress = suppress

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """The detections of a batch, by image and falling score.

        Args:
            images: [B, H, W, 3] uint8 RGB, sides multiples of 32, zero outside each image.
            sizes: [B, 2] int64 (height, width) of each image.

        Returns:
            image [D] int64, the position in the batch; boxes [D, 4] float32 in the images' pixels; scores [D] float32;
            labels [D] int64; of mask detectors also probabilities [D, m, m] float32 inside each box.
        """
        features = self.features(images, sizes)
        if isinstance(self.detector, RetinaNet):
            return self.best_pairs(self.detector.head, features, sizes)
        assert isinstance(self.detector, TwoStage)
        head = self.detector.roi_head
        found = self.best_rois(head, features, *self.proposals(self.detector.rpn, features, sizes), sizes)
        if head.mask_head is None:
            return found
        return *found, self.masks(head, head.mask_head, features, *found)

    def features(self, images: Tensor, sizes: Tensor) -> list[Tensor]:
        """The pyramid of normalised images."""
        pixels = normalized(images.permute(0, 3, 1, 2), sizes, self.pixel_mean, self.pixel_std)
        return self.detector.fpn(self.detector.backbone(pixels.to(self.dtype)))

    def proposals(self, rpn: RPN, features: list[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [B, P, 4] and scores [B, P] of the RPN, best first; EMPTY slots follow."""
        counts, (logits, deltas) = rpn.test_counts, rpn(features)
        boxes, scores, _ = best_of_levels(rpn.anchors(features), logits, deltas, 1, counts.before_nms, sizes)
        alive = self.suppress(boxes.flatten(0, 1), scores.flatten(0, 1)[:, None], rpn.nms_threshold)
        alive = alive.flatten(1).view(boxes.shape[0], -1)
        scores, rows = alive.topk(min(counts.after_nms, counts.before_nms * len(features)), dim=1)
        return gather_boxes(boxes.flatten(1, 2), rows), scores

    def best_rois(
        self, head: RoIHead, features: list[Tensor], rois: Tensor, objectness: Tensor, sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """The RoI head's detections."""
        batch, slots = objectness.shape
        image, slot = torch.nonzero(objectness > EMPTY, as_tuple=True)
        flat = rois[image, slot]
        total = torch.zeros((), device=rois.device)
        for box_head, refinement in zip(head.box_heads, head.refinements, strict=True):
            pooled, order = self.pool(head, features, image, flat, head.input_size)
            logits, deltas = (restored(values.float(), order) for values in box_head(pooled))
            decoded = decode(flat[:, None].expand_as(deltas), deltas, refinement.stds, sizes[image])
            total, flat = total + logits, decoded[:, 0]
        scores = (total / len(head.refinements)).softmax(dim=-1)[:, :-1]
        scores = torch.where(scores > head.score_threshold, scores, EMPTY)
        all_scores = torch.full((batch, slots, head.num_classes), EMPTY, device=rois.device)
        all_scores = all_scores.index_put((image, slot), scores).transpose(1, 2)
        all_boxes = torch.zeros((batch, slots, decoded.shape[1], 4), device=rois.device)
        all_boxes = all_boxes.index_put((image, slot), decoded).transpose(1, 2)  # [B, classes or 1, P, 4]
        if all_boxes.shape[1] == 1:
            alive = self.suppress(all_boxes[:, 0], all_scores, head.nms_threshold)
        else:
            alive = self.suppress(all_boxes.flatten(0, 1), all_scores.flatten(0, 1)[:, None], head.nms_threshold)
        best, rows = alive.reshape(batch, -1).topk(min(head.max_detections, head.num_classes * slots), dim=1)
        boxes = gather_boxes(all_boxes.expand(-1, head.num_classes, -1, -1).flatten(1, 2), rows)
        return filled(best, boxes, rows // slots)

    def pool(
        self, head: RoIHead, features: list[Tensor], image: Tensor, boxes: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """RoI features [R, C, size, size], level by level, and which of `boxes` [R, 4] each of them is of."""
        levels = roi_levels(boxes, len(head.strides), head.finest_scale)
        rois = torch.cat([image[:, None].float(), boxes], dim=1)
        rows = [torch.nonzero(levels == level).squeeze(1) for level in range(len(head.strides))]
        pooled = [
            torchvision.ops.roi_align(feature.float(), rois[row], size, 1 / stride, sampling_ratio=0, aligned=True)
            for feature, stride, row in zip(features, head.strides, rows, strict=False)
        ]
        return torch.cat(pooled).to(self.dtype), torch.cat(rows)

    def masks(
        self,
        head: RoIHead,
        mask_head: MaskHead,
        features: list[Tensor],
        image: Tensor,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """Each detection's probabilities [D, m, m], of its own class."""
        pooled, order = self.pool(head, features, image, boxes, mask_head.input_size)
        maps = mask_head(pooled)
        own = labels[order][:, None, None, None].expand(-1, 1, *maps.shape[2:])
        return restored(maps.gather(1, own).squeeze(1).float().sigmoid(), order)

    def best_pairs(self, head: RetinaHead, features: list[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
        """RetinaNet's detections."""
        logits, deltas = head(features)
        levels = best_of_levels(head.anchors(features), logits, deltas, head.num_classes, head.before_nms, sizes)
        boxes, scores, labels = (values.flatten(1, 2) for values in levels)
        scores = torch.where(scores > head.score_threshold, scores, EMPTY)
        classes = torch.arange(head.num_classes, device=labels.device)[:, None]
        by_class = torch.where(labels[:, None] == classes, scores[:, None], EMPTY)
        alive = self.suppress(boxes, by_class, head.nms_threshold).amax(dim=1)
        best, rows = alive.topk(min(head.max_detections, head.before_nms * len(features)), dim=1)
        return filled(best, gather_boxes(boxes, rows), labels.gather(1, rows))


class IndexedSwinBlock(DetectionSwinBlock):
    """The same, with windows that are read and written by index: how many there are is not a product of rounded
    quotients of the image's sides, which `torch.export` could hardly simplify."""

    def _attn(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        (rows, columns), (up, left) = self.window_size, self.shift_size
        padded_height, padded_width = (height + rows - 1) // rows * rows, (width + columns - 1) // columns * columns
        starts = (torch.arange(height, device=x.device) % rows == 0)[:, None] & (
            torch.arange(width, device=x.device) % columns == 0
        )
        image, top, first = torch.nonzero(starts.expand(batch, height, width), as_tuple=True)
        cell = torch.arange(rows * columns, device=x.device)
        y, x_place = top[:, None] + cell // columns, first[:, None] + cell % columns  # [windows, cells], once shifted
        mask = None
        if up or left:
            region = 3 * ((y >= padded_height - rows).long() + (y >= padded_height - up))
            region = region + (x_place >= padded_width - columns) + (x_place >= padded_width - left)
            mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0).to(x.dtype)
        y, x_place = y + up, x_place + left
        y = torch.where(y >= padded_height, y - padded_height, y)
        places = image[:, None].expand_as(y), y, torch.where(x_place >= padded_width, x_place - padded_width, x_place)
        windows = self.attn(F.pad(x, (0, 0, 0, columns, 0, rows))[places], mask=mask)
        joined = x.new_zeros(batch, height + rows, width + columns, channels).index_put(places, windows)
        return joined[:, :height, :width].contiguous()


def best_of_levels(
    anchors: list[Tensor],
    logits: list[Tensor],
    deltas: list[Tensor],
    num_classes: int,
    count: int,
    sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`anchors.decode_best` in `count` slots for each level: boxes [B, L, K, 4], scores and classes [B, L, K].

    Slots without a pair, and pairs whose box has no area, are EMPTY.
    """
    all_boxes, all_scores, all_classes = [], [], []
    for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
        flat = flatten_level(level_logits, num_classes).float().sigmoid().flatten(1)
        scores, pairs = F.pad(flat, (0, count), value=EMPTY).topk(count, dim=1)
        pairs = torch.where(scores > EMPTY, pairs, 0)
        rows = pairs // num_classes
        boxes = decode(level_anchors[rows], gather_boxes(flatten_level(level_deltas, 4), rows), ANCHOR_STDS, sizes)
        all_boxes.append(boxes)
        all_scores.append(torch.where((boxes[..., 2:] > boxes[..., :2]).all(dim=-1), scores, EMPTY))
        all_classes.append(pairs % num_classes)
    return torch.stack(all_boxes, dim=1), torch.stack(all_scores, dim=1), torch.stack(all_classes, dim=1)


def restored(values: Tensor, order: Tensor) -> Tensor:
    """`values` [R, ...] of boxes `order` [R], in the order of the boxes."""
    return torch.zeros_like(values).index_put((order,), values)


def filled(scores: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The slots [B, M] that hold a detection: their image, box, score and label."""
    image, slot = torch.nonzero(scores > EMPTY, as_tuple=True)
    return image, boxes[image, slot], scores[image, slot], labels[image, slot]
