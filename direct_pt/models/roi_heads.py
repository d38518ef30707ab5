"""The second stage: proposals are sampled, pooled to RoI features, classified and refined.

Semantics follow MMDetection's StandardRoIHead, CascadeRoIHead and ConvFCBBoxHead.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.batch import Batch, Detections
from direct_pt.models.boxes import best_detections, decode, encode, gather_boxes, unit_boxes_where_invalid
from direct_pt.models.masks import MaskHead, mask_targets
from direct_pt.models.matching import Matching, Sampling, match, sample
from direct_pt.models.roi_align import FINEST_SCALE, pyramid_roi_align
from direct_pt.models.rpn import Proposals


class BoxHead(nn.Module):
    """Shared convolutions and fully connected layers, then class logits and box deltas.

    Args:
        channels: of the RoI features.
        num_classes: without the background, which is the last of the `num_classes + 1` logits.
        num_convs: 3x3, with bias, no norm.
        num_fcs: at least 1.
        class_agnostic: one box for all classes instead of one for each.
        fc_width: of each fully connected layer.
        input_size: cells a side of the RoI features.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_convs: int,
        num_fcs: int,
        class_agnostic: bool = False,
        fc_width: int = 1024,
        input_size: int = 7,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.input_size = input_size
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))
        widths = [channels * input_size**2] + [fc_width] * num_fcs
        self.fcs = nn.ModuleList(nn.Linear(width_in, width_out) for width_in, width_out in pairwise(widths))
        self.class_logits = nn.Linear(fc_width, num_classes + 1)
        self.deltas = nn.Linear(fc_width, 4 if class_agnostic else 4 * num_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("convs"):
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            elif name.startswith("fcs"):
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, num_classes + 1] and deltas [R, num_classes or 1, 4] of RoI features [R, C, s, s]."""
        for conv in self.convs:
            features = F.relu(conv(features))
        hidden = features.flatten(1)
        for fc in self.fcs:
            hidden = F.relu(fc(hidden))
        return self.class_logits(hidden), self.deltas(hidden).unflatten(1, (-1, 4))


@dataclass(frozen=True)
class Refinement:
    """How one box head learns. Cascade R-CNN has three, each with higher IoU thresholds than the one before.

    Attributes:
        matching: which boxes learn which object.
        stds: of the box coder.
        weight: of the losses.
    """

    matching: Matching
    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    weight: float = 1.0


@dataclass
class SampledRoIs:
    """The RoIs that enter the losses, S per image.

    Attributes:
        boxes: [B, S, 4]; a slot that is not `sampled` holds a unit box.
        target: [B, S] slots of the objects that they learn.
        positive: [B, S] bool.
        sampled: [B, S] bool.
        is_object: [B, S] bool, which RoIs are annotated boxes.
    """

    boxes: Tensor
    target: Tensor
    positive: Tensor
    sampled: Tensor
    is_object: Tensor


class RoIHead(nn.Module):
    """The second stage of Faster R-CNN; with several box heads, of Cascade R-CNN; with a mask head, of Mask R-CNN.

    Args:
        box_heads: each scores RoIs and refines them for the next one. All but the last are class-agnostic.
        refinements: how each of them learns.
        strides: of the pyramid levels that RoIs are read from.
        sampling: how many RoIs enter the losses.
        mask_head: predicts which pixels of a box are the object's.
        beta: of the smooth L1 box loss, 0 for L1.
        finest_scale: see `pyramid_roi_align`.
        score_threshold: detections score strictly more.
        nms_threshold: IoU with a better detection of the same class, above which a detection is suppressed.
        max_detections: per image.
    """

    def __init__(
        self,
        box_heads: list[BoxHead],
        refinements: list[Refinement],
        strides: list[int],
        sampling: Sampling,
        mask_head: MaskHead | None = None,
        beta: float = 0.0,
        finest_scale: float = FINEST_SCALE,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.box_heads = nn.ModuleList(box_heads)
        self.num_classes, self.input_size = box_heads[0].num_classes, box_heads[0].input_size
        self.refinements = refinements
        self.strides = strides
        self.sampling = sampling
        self.mask_head = mask_head
        self.beta = beta
        self.finest_scale = finest_scale
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    def forward(self, features: list[Tensor], rois: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Box head `index`'s logits [B, S, num_classes + 1] and deltas [B, S, num_classes or 1, 4] of `rois`
        [B, S, 4], in float32."""
        images = torch.arange(len(rois), device=rois.device).repeat_interleave(rois.shape[1])
        logits, deltas = self.box_heads[index](self.pool(features, images, rois.flatten(0, 1), self.input_size))
        return logits.float().unflatten(0, rois.shape[:2]), deltas.float().unflatten(0, rois.shape[:2])

    def pool(self, features: list[Tensor], images: Tensor, boxes: Tensor, size: int) -> Tensor:
        """RoI features [R, C, size, size] of `boxes` [R, 4] in the batch's `images` [R]."""
        levels = features[: len(self.strides)]
        return pyramid_roi_align(levels, self.strides, images, boxes, size, self.finest_scale)

    def losses(self, features: list[Tensor], proposals: Proposals, batch: Batch) -> dict[str, Tensor]:
        """Class (cross-entropy) and box (smooth L1, the object's own class) loss of each box head, over the number of
        sampled RoIs, and the mask loss."""
        losses = {}
        boxes, valid = proposals.boxes, proposals.valid
        for index, refinement in enumerate(self.refinements):
            rois = self.sample_rois(index, boxes, valid, batch)
            logits, deltas = self(features, rois.boxes, index)
            name = "roi" if len(self.refinements) == 1 else f"roi{index}"
            class_loss, box_loss = self.box_losses(refinement, rois, logits, deltas, batch)
            losses[f"{name}_class"], losses[f"{name}_box"] = class_loss, box_loss
            if index == 0 and self.mask_head is not None:
                losses["mask"] = self.mask_loss(self.mask_head, features, rois, batch)
            # The next head refines these boxes again; sampling adds the objects to them anew.
            boxes = decode(rois.boxes, deltas[:, :, 0].detach(), refinement.stds, batch.sizes)
            valid = rois.sampled & ~rois.is_object
        return losses

    @torch.no_grad()
    def sample_rois(self, index: int, boxes: Tensor, valid: Tensor, batch: Batch) -> SampledRoIs:
        """The RoIs that box head `index` learns from: of `boxes` [B, P, 4] where `valid` [B, P], and of the annotated
        objects, which are positives.

        The objects come last, so that a proposal's random key does not depend on how many slots for objects the batch
        has.
        """
        matches = match(self.refinements[index].matching, boxes, valid, batch.boxes, batch.valid, batch.crowd)
        object_slots = torch.arange(batch.boxes.shape[1], device=boxes.device).expand(len(batch), -1)
        matches.target = torch.cat([matches.target, object_slots], dim=1)
        matches.positive = torch.cat([matches.positive, batch.valid], dim=1)
        matches.negative = torch.cat([matches.negative, torch.zeros_like(batch.valid)], dim=1)
        rows, positive, sampled = sample(self.sampling, matches, batch.seeds, salt=1 + index)  # 0 is the RPN's
        rois = gather_boxes(torch.cat([boxes, batch.boxes], dim=1), rows)
        return SampledRoIs(
            boxes=unit_boxes_where_invalid(rois, sampled),
            target=matches.target.gather(1, rows),
            positive=positive,
            sampled=sampled,
            is_object=rows >= boxes.shape[1],
        )

    def box_losses(
        self, refinement: Refinement, rois: SampledRoIs, logits: Tensor, deltas: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Class and box loss of one box head."""
        labels = batch.labels.gather(1, rois.target).masked_fill(~rois.positive, self.num_classes)
        # Of each RoI the deltas of its own class, or of the only one there is; negatives' do not count.
        column = labels.clamp(max=deltas.shape[2] - 1)[..., None, None].expand(-1, -1, 1, 4)
        own_deltas = deltas.gather(2, column).squeeze(2)
        # Negatives may have no width or height, and then cannot be encoded.
        boxes = unit_boxes_where_invalid(rois.boxes, rois.positive)
        objects = unit_boxes_where_invalid(gather_boxes(batch.boxes, rois.target), rois.positive)
        delta_targets = encode(boxes, objects, refinement.stds)
        weights = self.sampling.weights(rois.sampled) * refinement.weight
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(weights)
        distance = F.smooth_l1_loss(own_deltas, delta_targets, reduction="none", beta=self.beta).sum(dim=-1)
        return (cross_entropy * weights).sum(), (distance * weights * rois.positive).sum()

    def mask_loss(self, mask_head: MaskHead, features: list[Tensor], rois: SampledRoIs, batch: Batch) -> Tensor:
        """Binary cross-entropy of the positive RoIs' own class, over the number of positive RoIs."""
        assert batch.masks is not None and batch.mask_rows is not None
        image, slot = torch.nonzero(rois.positive, as_tuple=True)
        boxes, target = rois.boxes[image, slot], rois.target[image, slot]
        maps = mask_head(self.pool(features, image, boxes, mask_head.input_size))
        logits = own_class_masks(maps, batch.labels[image, target])
        targets = mask_targets(batch.masks, batch.mask_rows[image, target], boxes, logits.shape[-1])
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(1, 2))
        return (loss * self.sampling.weights(rois.positive)[image, slot]).sum()

    @torch.no_grad()
    def detect(self, features: list[Tensor], proposals: Proposals, batch: Batch) -> Detections:
        """Scored boxes in the original images' frames, at most `max_detections` per image."""
        max_proposals = int(proposals.valid.sum(dim=1).max())  # slots are filled from the front
        rois, valid = proposals.boxes[:, :max_proposals], proposals.valid[:, :max_proposals]
        scores, boxes = self.score(features, rois, batch)
        scores = scores.masked_fill(~valid[..., None], 0)
        image, roi, label = torch.nonzero(scores > self.score_threshold, as_tuple=True)
        candidates = Detections(
            image, boxes.expand(*scores.shape, 4)[image, roi, label], scores[image, roi, label], label
        )
        found = best_detections(candidates, len(batch), self.num_classes, self.nms_threshold, self.max_detections)
        if self.mask_head is not None:  # masks are read at the boxes in the batch's frame
            pooled = self.pool(features, found.image, found.boxes, self.mask_head.input_size)
            found.masks = own_class_masks(self.mask_head(pooled), found.labels).sigmoid()
        found.boxes = found.boxes / batch.scales.repeat(1, 2)[found.image]
        return found

    def score(self, features: list[Tensor], rois: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Class scores [B, S, num_classes], from the mean of all heads' logits, and the last head's boxes
        [B, S, num_classes or 1, 4]."""
        total_logits = torch.zeros((), device=rois.device)
        for index, refinement in enumerate(self.refinements):
            logits, deltas = self(features, rois, index)
            boxes = decode(rois[:, :, None].expand_as(deltas), deltas, refinement.stds, batch.sizes)
            total_logits, rois = total_logits + logits, boxes[:, :, 0]
        return (total_logits / len(self.refinements)).softmax(dim=-1)[..., :-1], boxes


def own_class_masks(maps: Tensor, labels: Tensor) -> Tensor:
    """[R, h, w] float32: of each of `maps` [R, num_classes, h, w] the one of its class `labels` [R]."""
    return maps[torch.arange(len(labels), device=labels.device), labels].float()
