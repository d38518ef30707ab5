"""RetinaNet's head: every anchor scores every class. Semantics follow MMDetection's RetinaHead (3.x)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from direct_pt.batch import Batch, Detections
from direct_pt.models.anchors import ANCHOR_STDS, Anchors, decode_best, flatten_levels
from direct_pt.models.boxes import best_detections, encode, gather_boxes
from direct_pt.models.matching import Matches, Matching, match

PRIOR = 0.01  # every class's score before training: almost all anchors are background


class RetinaHead(nn.Module):
    """Two towers of four convolutions, shared by all levels: class logits and box deltas for every anchor.

    Args:
        channels: of the pyramid.
        num_classes: without a background.
        anchors: of the pyramid's levels.
        matching: which anchors learn which object.
        score_threshold: detections score strictly more.
        before_nms: how many detections per level enter NMS.
        nms_threshold: IoU with a better detection of the same class, above which a detection is suppressed.
        max_detections: per image.
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
        """Maps of each level: class logits [B, A * num_classes, h, w] and deltas [B, 4 A, h, w]."""
        logits, deltas = [], []
        for feature in features:
            class_hidden, box_hidden = feature, feature
            for class_conv, box_conv in zip(self.class_convs, self.box_convs, strict=True):
                class_hidden, box_hidden = F.relu(class_conv(class_hidden)), F.relu(box_conv(box_hidden))
            logits.append(self.logits(class_hidden))
            deltas.append(self.deltas(box_hidden))
        return logits, deltas

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Focal class loss of all anchors and L1 box loss of the positive ones, both over `normalizer`."""
        logits, deltas = self(features)
        anchors = torch.cat(self.anchors(features))
        matches = self.match(features, batch)
        labels = batch.labels.gather(1, matches.target)
        classes = torch.arange(self.num_classes, device=labels.device)
        class_targets = (labels[..., None] == classes) & matches.positive[..., None]  # [B, N, num_classes]
        objects = gather_boxes(batch.boxes, matches.target)
        objects = torch.where(matches.positive[..., None], objects, anchors)  # empty slots cannot be encoded
        delta_targets = encode(anchors[None], objects, ANCHOR_STDS)

        flat_logits, flat_deltas = flatten_levels(logits, self.num_classes).float(), flatten_levels(deltas, 4).float()
        focal = sigmoid_focal_loss(
            flat_logits, class_targets.to(flat_logits.dtype), alpha=0.25, gamma=2.0, reduction="none"
        ).sum(dim=-1)
        normalizer = self.normalizer(matches)
        return {
            "class": (focal * (matches.positive | matches.negative)).sum() / normalizer,
            "box": ((flat_deltas - delta_targets).abs() * matches.positive[..., None]).sum() / normalizer,
        }

    @torch.no_grad()
    def match(self, features: list[Tensor], batch: Batch) -> Matches:
        """Which anchor learns which object. Of `features` only the sizes count."""
        usable = self.anchors.inside_padding(features, batch.padded_sizes)
        anchors = torch.cat(self.anchors(features))
        return match(self.matching, anchors[None], usable, batch.boxes, batch.valid, batch.crowd)

    def normalizer(self, matches: Matches) -> Tensor:
        """What a batch's losses are divided by: its number of positive anchors, at least one per image."""
        return matches.positive.sum(dim=1).clamp(min=1).sum()

    def loss_weight(self, batch: Batch) -> Tensor:
        """The normalizer that a batch's losses will have, known before the forward pass.

        Training needs it of all micro-batches of a step in advance. Say one has 3 positive anchors, the next one 9:
        their losses are sums over 3 and over 9, and the plain mean of the two would count each anchor of the first
        three times as much. Weighted by 3 and 9 they make the loss of the large batch, one sum over 12.
        """
        # Matching needs no features, only the sizes of their levels: maps without any content, one channel each.
        height, width = batch.images.shape[-2:]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in self.anchors.strides]  # rounded up
        return self.normalizer(self.match([batch.boxes.new_empty(1, 1, *size) for size in sizes], batch))

    @torch.no_grad()
    def detect(self, features: list[Tensor], batch: Batch) -> Detections:
        """Scored boxes in the original images' frames, at most `max_detections` per image."""
        logits, deltas = self(features)
        boxes, scores, labels, _ = decode_best(
            self.anchors(features), logits, deltas, self.num_classes, self.before_nms, batch.sizes
        )
        usable = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1) & (scores > self.score_threshold)
        image, row = torch.nonzero(usable, as_tuple=True)
        candidates = Detections(image, boxes[image, row], scores[image, row], labels[image, row])
        found = best_detections(candidates, len(batch), self.num_classes, self.nms_threshold, self.max_detections)
        found.boxes = found.boxes / batch.scales.repeat(1, 2)[found.image]
        return found
