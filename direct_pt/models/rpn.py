"""The region proposal network. Semantics follow MMDetection's RPNHead."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.batch import Batch
from direct_pt.models.anchors import ANCHOR_STDS, Anchors, decode_best, flatten_levels, inside_images
from direct_pt.models.boxes import encode, gather_boxes, grouped_nms
from direct_pt.models.matching import Matching, Sampling, match, sample

MAX_NMS_BOXES = 2**16  # in one call: a GPU's NMS takes a bit for each pair of boxes


@dataclass(frozen=True)
class ProposalCounts:
    """How many boxes per level enter NMS, and how many per image leave it."""

    before_nms: int
    after_nms: int


@dataclass
class Proposals:
    """Boxes [B, P, 4] in pixels, best first, their scores [B, P], and which slots are filled: valid [B, P] bool."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor


class RPN(nn.Module):
    """One shared 3x3 convolution, then objectness and box deltas for every anchor.

    Args:
        channels: of the pyramid.
        anchors: of the pyramid's levels.
        matching: which anchors learn which object.
        sampling: how many anchors enter the loss.
        train_counts: of proposals in training.
        test_counts: of proposals in inference.
        nms_threshold: IoU with a better proposal of the same level, above which a proposal is suppressed.
        beta: of the smooth L1 box loss, 0 for L1.
        inside_only: only anchors that lie inside the image learn.
    """

    def __init__(
        self,
        channels: int,
        anchors: Anchors,
        matching: Matching,
        sampling: Sampling,
        train_counts: ProposalCounts,
        test_counts: ProposalCounts,
        nms_threshold: float = 0.7,
        beta: float = 0.0,
        inside_only: bool = False,
    ) -> None:
        super().__init__()
        self.anchors = anchors
        self.matching = matching
        self.sampling = sampling
        self.train_counts = train_counts
        self.test_counts = test_counts
        self.nms_threshold = nms_threshold
        self.beta = beta
        self.inside_only = inside_only
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors.per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors.per_cell * 4, 1)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.01)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of each level: objectness logits [B, A, h, w] and deltas [B, 4 A, h, w]."""
        hidden = [F.relu(self.conv(feature)) for feature in features]
        return [self.objectness(h) for h in hidden], [self.deltas(h) for h in hidden]

    def losses(
        self, features: list[Tensor], logits: list[Tensor], deltas: list[Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Objectness (binary cross-entropy) and box (smooth L1) loss, both over the number of sampled anchors."""
        anchors = torch.cat(self.anchors(features))
        usable = self.anchors.inside_padding(features, batch.padded_sizes)
        if self.inside_only:
            usable = usable & inside_images(anchors, batch.sizes)
        matches = match(self.matching, anchors[None], usable, batch.boxes, batch.valid, batch.crowd)
        rows, positive, sampled = sample(self.sampling, matches, batch.seeds, salt=0)

        sampled_logits = flatten_levels(logits, 1).squeeze(-1).gather(1, rows).float()
        sampled_deltas = gather_boxes(flatten_levels(deltas, 4), rows).float()
        sampled_anchors = anchors[rows]
        objects = gather_boxes(batch.boxes, matches.target.gather(1, rows))
        objects = torch.where(positive[..., None], objects, sampled_anchors)  # empty slots cannot be encoded
        delta_targets = encode(sampled_anchors, objects, ANCHOR_STDS)

        weights = self.sampling.weights(sampled)
        objectness = F.binary_cross_entropy_with_logits(sampled_logits, positive.float(), reduction="none")
        distance = F.smooth_l1_loss(sampled_deltas, delta_targets, reduction="none", beta=self.beta).sum(dim=-1)
        return {
            "rpn_objectness": (objectness * weights).sum(),
            "rpn_box": (distance * weights * positive).sum(),
        }

    @torch.no_grad()
    def proposals(self, features: list[Tensor], logits: list[Tensor], deltas: list[Tensor], batch: Batch) -> Proposals:
        """The best boxes of each image, after NMS within each level."""
        counts = self.train_counts if self.training else self.test_counts
        anchors = self.anchors(features)
        boxes, scores, _, levels = decode_best(anchors, logits, deltas, 1, counts.before_nms, batch.sizes)
        usable = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1) & (scores >= 0)  # false for NaN scores too
        images = torch.arange(len(boxes), device=boxes.device)[:, None]
        groups = images * len(logits) + levels
        # Unusable boxes enter NMS as empty ones, which suppress nothing: filtering would make the GPU wait.
        nms_boxes = torch.where(usable[..., None], boxes, 0.0)
        survives = torch.zeros_like(usable)
        images_at_once = max(1, MAX_NMS_BOXES // boxes.shape[1])
        for start in range(0, len(boxes), images_at_once):
            part = slice(start, start + images_at_once)
            part_boxes, part_scores, part_groups = (
                values[part].flatten(0, 1) for values in (nms_boxes, scores, groups)
            )
            kept = grouped_nms(part_boxes, part_scores, part_groups, self.nms_threshold)
            survives[part].view(-1).index_fill_(0, kept, True)
        survives &= usable
        scores, rows = torch.where(survives, scores, -1.0).topk(min(counts.after_nms, scores.shape[1]), dim=1)
        return Proposals(gather_boxes(boxes, rows), scores, scores >= 0)
