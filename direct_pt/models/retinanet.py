"""RetinaNet's head: every anchor scores every class. Semantics follow MMDetection's RetinaHead (3.x)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from direct_pt.batch import Batch, Detections
from direct_pt.models.anchors import Anchors, per_anchor
from direct_pt.models.boxes import best_detections, decode, encode
from direct_pt.models.matching import Matches, Matching, match

STDS = (1.0, 1.0, 1.0, 1.0)
PRIOR = 0.01  # the score that every class starts from


class RetinaHead(nn.Module):
    """Two towers of four convolutions, shared by all levels: class logits and box deltas for every anchor.

    Args:
        channels: of the pyramid.
        num_classes: without a background.
        anchors: of the pyramid's levels.
        matching: which anchors learn which object.
        score_threshold: detections score strictly more.
        before_nms: how many detections a level enter NMS.
        nms_threshold: IoU above which the lesser detection of a class goes.
        max_detections: an image.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        anchors: Anchors,
        matching: Matching,
        score_threshold: float = 0.05,
        before_nms: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.anchors = anchors
        self.matching = matching
        self.score_threshold = score_threshold
        self.before_nms = before_nms
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.class_convs, self.box_convs = (
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4)) for _ in range(2)
        )
        self.logits = nn.Conv2d(channels, anchors.per_cell * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(channels, anchors.per_cell * 4, 3, padding=1)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.01)
        nn.init.constant_(self.logits.get_parameter("bias"), -math.log((1 - PRIOR) / PRIOR))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Raw maps of each level: class logits [B, A num_classes, h, w] and deltas [B, 4 A, h, w]."""
        logits, deltas = [], []
        for feature in features:
            for_class, for_box = feature, feature
            for class_conv, box_conv in zip(self.class_convs, self.box_convs, strict=True):
                for_class, for_box = F.relu(class_conv(for_class)), F.relu(box_conv(for_box))
            logits.append(self.logits(for_class))
            deltas.append(self.deltas(for_box))
        return logits, deltas

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Focal class loss of all anchors and L1 box loss of the positive ones, both over `positives`."""
        logits, deltas = self(features)
        anchors = torch.cat(self.anchors(features))
        matches = self.match(features, batch)
        labels = batch.labels.gather(1, matches.target)
        classes = torch.arange(self.num_classes, device=labels.device)
        target = (labels[..., None] == classes) & matches.positive[..., None]
        logit = torch.cat([per_anchor(level, self.num_classes) for level in logits], dim=1).float()
        delta = torch.cat([per_anchor(level, 4) for level in deltas], dim=1).float()
        focal = sigmoid_focal_loss(logit, target.to(logit.dtype), alpha=0.25, gamma=2.0, reduction="none").sum(dim=-1)
        objects = batch.boxes.gather(1, matches.target[..., None].expand(-1, -1, 4))
        delta_target = encode(anchors[None], torch.where(matches.positive[..., None], objects, anchors), STDS)
        normalizer = self.positives(matches)
        return {
            "class": (focal * (matches.positive | matches.negative)).sum() / normalizer,
            "box": ((delta - delta_target).abs() * matches.positive[..., None]).sum() / normalizer,
        }

    @torch.no_grad()
    def match(self, features: list[Tensor], batch: Batch) -> Matches:
        """Which anchor learns which object; only the features' sizes count."""
        usable = self.anchors.on_padded_images(features, batch.padded_sizes)
        anchors = torch.cat(self.anchors(features))
        return match(self.matching, anchors[None], usable, batch.boxes, batch.valid, batch.crowd)

    def positives(self, matches: Matches) -> Tensor:
        """How many anchors of a batch learn an object, at least one an image: what its losses are divided by."""
        return matches.positive.sum(dim=1).clamp(min=1).sum()

    def loss_weight(self, batch: Batch) -> Tensor:
        """What the losses of a batch will be divided by."""
        height, width = batch.images.shape[-2:]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in self.anchors.strides]
        return self.positives(self.match([batch.boxes.new_empty(1, 1, *size) for size in sizes], batch))

    @torch.no_grad()
    def detect(self, features: list[Tensor], batch: Batch) -> Detections:
        """Scored boxes in the original images' frames, at most `max_detections` an image."""
        logits, deltas = self(features)
        boxes, scores, labels = [], [], []
        for level, anchors in enumerate(self.anchors(features)):
            score = per_anchor(logits[level], self.num_classes).float().sigmoid().flatten(1)
            best, pairs = score.topk(min(self.before_nms, score.shape[1]), dim=1)
            rows = pairs // self.num_classes
            delta = per_anchor(deltas[level], 4).gather(1, rows[..., None].expand(-1, -1, 4))
            boxes.append(decode(anchors[rows], delta, STDS, batch.sizes))
            scores.append(best)
            labels.append(pairs % self.num_classes)
        box, score, label = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(labels, dim=1)
        usable = (box[..., 2:] > box[..., :2]).all(dim=-1) & (score > self.score_threshold)
        image, row = torch.nonzero(usable, as_tuple=True)
        candidates = Detections(image, box[image, row], score[image, row], label[image, row])
        found = best_detections(candidates, len(batch), self.num_classes, self.nms_threshold, self.max_detections)
        found.boxes = found.boxes / batch.scales.repeat(1, 2)[found.image]
        return found
