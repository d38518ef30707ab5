"""What happens to proposals: sampling, RoI features, class scores and boxes. Semantics follow MMDetection's."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.batch import Batch, Detections
from direct_pt.models.boxes import best_detections, decode, encode, unit_unless
from direct_pt.models.masks import MaskHead, mask_targets
from direct_pt.models.matching import Matching, Sampling, match, sample
from direct_pt.models.roi_align import pyramid_roi_align
from direct_pt.models.rpn import Proposals


class BoxHead(nn.Module):
    """Shared convolutions and fully connected layers, then class logits and box deltas.

    Args:
        channels: of the RoI features.
        num_classes: without the background, which is the last of the `num_classes + 1` logits.
        num_convs: 3x3, with bias, no norm.
        num_fcs: at least 1.
        class_agnostic: one box for all classes, not one for each.
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
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
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
    """How one box head of the second stage learns.

    Attributes:
        matching: which boxes learn which object.
        stds: of its box coder.
        weight: of its losses.
    """

    matching: Matching
    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    weight: float = 1.0


@dataclass
class SampledRoIs:
    """The RoIs that enter the losses, S an image.

    Attributes:
        boxes: [B, S, 4]; a slot that is not `sampled` holds a unit box.
        target: [B, S] slots of the objects that they learn.
        positive: [B, S] bool.
        sampled: [B, S] bool.
        is_object: [B, S] bool, the annotated boxes themselves.
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
        mask_head: says which pixels of a box are the object's.
        beta: of the smooth L1 box loss, 0 for L1.
        score_threshold: detections score strictly more.
        nms_threshold: IoU above which the lesser detection of a class goes.
        max_detections: an image.
    """

    def __init__(
        self,
        box_heads: list[BoxHead],
        refinements: list[Refinement],
        strides: list[int],
        sampling: Sampling,
        mask_head: MaskHead | None = None,
        beta: float = 0.0,
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
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    def forward(self, features: list[Tensor], rois: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Box head `number`'s logits [B, S, num_classes + 1] and deltas [B, S, num_classes or 1, 4] of `rois`
        [B, S, 4], in float32."""
        images = torch.arange(len(rois), device=rois.device).repeat_interleave(rois.shape[1])
        logits, deltas = self.box_heads[number](self.pool(features, images, rois.flatten(0, 1), self.input_size))
        return logits.float().unflatten(0, rois.shape[:2]), deltas.float().unflatten(0, rois.shape[:2])

    def pool(self, features: list[Tensor], images: Tensor, boxes: Tensor, size: int) -> Tensor:
        """RoI features [R, C, size, size] of `boxes` [R, 4] in the batch's `images` [R]."""
        return pyramid_roi_align(features[: len(self.strides)], self.strides, images, boxes, size)

    def losses(self, features: list[Tensor], proposals: Proposals, batch: Batch) -> dict[str, Tensor]:
        """Class (cross-entropy) and box (smooth L1, the object's own class) loss of each box head, over the number of
        sampled RoIs, and the mask loss."""
        losses = {}
        boxes, valid = proposals.boxes, proposals.valid
        for number, refinement in enumerate(self.refinements):
            rois = self.sample(number, boxes, valid, batch)
            logits, deltas = self(features, rois.boxes, number)
            name = "roi" if len(self.refinements) == 1 else f"roi{number}"
            class_loss, box_loss = self.box_losses(refinement, rois, logits, deltas, batch)
            losses[f"{name}_class"], losses[f"{name}_box"] = class_loss, box_loss
            if number == 0 and self.mask_head is not None:
                losses["mask"] = self.mask_loss(self.mask_head, features, rois, batch)
            # The objects themselves were added by sampling, and are again for the next head.
            boxes = decode(rois.boxes, deltas[:, :, 0].detach(), refinement.stds, batch.sizes)
            valid = rois.sampled & ~rois.is_object
        return losses

    def box_losses(
        self, refinement: Refinement, rois: SampledRoIs, logits: Tensor, deltas: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Of one box head: class and box loss."""
        labels = batch.labels.gather(1, rois.target).masked_fill(~rois.positive, self.num_classes)
        column = labels.clamp(max=deltas.shape[2] - 1)[..., None, None].expand(-1, -1, 1, 4)
        delta = deltas.gather(2, column).squeeze(2)
        objects = batch.boxes.gather(1, rois.target[..., None].expand(-1, -1, 4))
        # Negatives may have no extent to encode.
        boxes, objects = (unit_unless(rois.positive, box) for box in (rois.boxes, objects))
        target = encode(boxes, objects, refinement.stds)
        weights = self.sampling.weights(rois.sampled) * refinement.weight
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(weights)
        distance = F.smooth_l1_loss(delta, target, reduction="none", beta=self.beta).sum(dim=-1)
        return (cross_entropy * weights).sum(), (distance * weights * rois.positive).sum()

    def mask_loss(self, mask_head: MaskHead, features: list[Tensor], rois: SampledRoIs, batch: Batch) -> Tensor:
        """Binary cross-entropy of the positive RoIs' own class, over their number."""
        assert batch.masks is not None and batch.mask_rows is not None
        image, slot = torch.nonzero(rois.positive, as_tuple=True)
        boxes, target = rois.boxes[image, slot], rois.target[image, slot]
        maps = mask_head(self.pool(features, image, boxes, mask_head.input_size))
        logits = own_class(maps, batch.labels[image, target])
        targets = mask_targets(batch.masks, batch.mask_rows[image, target], boxes, logits.shape[-1])
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(1, 2))
        return (loss * self.sampling.weights(rois.positive)[image, slot]).sum()

    @torch.no_grad()
    def sample(self, number: int, boxes: Tensor, valid: Tensor, batch: Batch) -> SampledRoIs:
        """The RoIs that box head `number` learns from: of `boxes` [B, P, 4] where `valid` [B, P], and of the objects
        themselves, as positives.

        They come last, lest a proposal's draw depend on how many objects another image of the batch has.
        """
        matches = match(self.refinements[number].matching, boxes, valid, batch.boxes, batch.valid, batch.crowd)
        slots = torch.arange(batch.boxes.shape[1], device=boxes.device).expand(len(batch), -1)
        matches.target = torch.cat([matches.target, slots], dim=1)
        matches.positive = torch.cat([matches.positive, batch.valid], dim=1)
        matches.negative = torch.cat([matches.negative, torch.zeros_like(batch.valid)], dim=1)
        rows, positive, sampled = sample(self.sampling, matches, batch.seeds, salt=1 + number)
        rois = torch.cat([boxes, batch.boxes], dim=1).gather(1, rows[..., None].expand(-1, -1, 4))
        return SampledRoIs(
            unit_unless(sampled, rois), matches.target.gather(1, rows), positive, sampled, rows >= boxes.shape[1]
        )

    @torch.no_grad()
    def detect(self, features: list[Tensor], proposals: Proposals, batch: Batch) -> Detections:
        """Scored boxes in the original images' frames, at most `max_detections` an image."""
        most = int(proposals.valid.sum(dim=1).max())  # slots are filled from the front
        rois, valid = proposals.boxes[:, :most], proposals.valid[:, :most]
        scores, boxes = self.score(features, rois, batch)
        scores = scores.masked_fill(~valid[..., None], 0)
        image, roi, label = torch.nonzero(scores > self.score_threshold, as_tuple=True)
        candidates = Detections(
            image, boxes.expand(*scores.shape, 4)[image, roi, label], scores[image, roi, label], label
        )
        found = best_detections(candidates, len(batch), self.num_classes, self.nms_threshold, self.max_detections)
        if self.mask_head is not None:
            pooled = self.pool(features, found.image, found.boxes, self.mask_head.input_size)
            found.masks = own_class(self.mask_head(pooled), found.labels).sigmoid()
        found.boxes = found.boxes / batch.scales.repeat(1, 2)[found.image]
        return found

    def score(self, features: list[Tensor], rois: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Class scores [B, S, num_classes], from the mean of all heads' logits, and the last head's boxes
        [B, S, num_classes or 1, 4]."""
        total = torch.zeros((), device=rois.device)
        for number, refinement in enumerate(self.refinements):
            logits, deltas = self(features, rois, number)
            boxes = decode(rois[:, :, None].expand_as(deltas), deltas, refinement.stds, batch.sizes)
            total, rois = total + logits, boxes[:, :, 0]
        return (total / len(self.refinements)).softmax(dim=-1)[..., :-1], boxes


def own_class(maps: Tensor, labels: Tensor) -> Tensor:
    """[R, h, w] float32, of `maps` [R, num_classes, h, w] the map of each label [R]."""
    return maps[torch.arange(len(labels), device=labels.device), labels].float()
