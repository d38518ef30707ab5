"""The region proposal network. Semantics follow MMDetection's RPNHead."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.batch import Batch
from direct_pt.models.anchors import Anchors, inside, per_anchor
from direct_pt.models.boxes import decode, encode, grouped_nms
from direct_pt.models.matching import Matching, Sampling, match, sample

STDS = (1.0, 1.0, 1.0, 1.0)
BOXES_AT_ONCE = 2**16  # in NMS: a GPU takes a bit for each pair of them


@dataclass(frozen=True)
class ProposalCounts:
    """How many boxes a level enter NMS, and how many an image leave it."""

    before_nms: int
    after_nms: int


@dataclass
class Proposals:
    """Boxes [B, P, 4] in pixels, best first, their scores [B, P], and which slots are filled: valid [B, P] bool."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor


class RPN(nn.Module):
    """One shared 3x3 convolution, objectness and box deltas for every anchor.

    Args:
        channels: of the pyramid.
        anchors: of the pyramid's levels.
        matching: which anchors learn which object.
        sampling: how many enter the loss.
        train_counts: of proposals in training.
        test_counts: of proposals in inference.
        nms_threshold: IoU above which the lesser proposal of a level goes.
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
        """Raw maps of each level: objectness logits [B, A, h, w] and deltas [B, 4 A, h, w]."""
        hidden = [F.relu(self.conv(feature)) for feature in features]
        return [self.objectness(h) for h in hidden], [self.deltas(h) for h in hidden]

    def losses(
        self, features: list[Tensor], logits: list[Tensor], deltas: list[Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Objectness (binary cross-entropy) and box (smooth L1) loss, both over the number of sampled anchors."""
        anchors = torch.cat(self.anchors(features))
        usable = self.anchors.on_padded_images(features, batch.padded_sizes)
        if self.inside_only:
            usable = usable & inside(anchors, batch.sizes)
        matches = match(self.matching, anchors[None], usable, batch.boxes, batch.valid, batch.crowd)
        rows, positive, sampled = sample(self.sampling, matches, batch.seeds, salt=0)
        flat_logits = torch.cat([per_anchor(level, 1) for level in logits], dim=1).squeeze(-1)
        flat_deltas = torch.cat([per_anchor(level, 4) for level in deltas], dim=1)
        logit = flat_logits.gather(1, rows).float()
        delta = flat_deltas.gather(1, rows[..., None].expand(-1, -1, 4)).float()

        anchor = anchors[rows]
        objects = batch.boxes.gather(1, matches.target.gather(1, rows)[..., None].expand(-1, -1, 4))
        target = encode(anchor, torch.where(positive[..., None], objects, anchor), STDS)
        weights = self.sampling.weights(sampled)
        objectness = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
        distance = F.smooth_l1_loss(delta, target, reduction="none", beta=self.beta).sum(dim=-1)
        return {
            "rpn_objectness": (objectness * weights).sum(),
            "rpn_box": (distance * weights * positive).sum(),
        }

    @torch.no_grad()
    def proposals(self, features: list[Tensor], logits: list[Tensor], deltas: list[Tensor], batch: Batch) -> Proposals:
        """The best boxes of each image, after NMS within each level."""
        counts = self.train_counts if self.training else self.test_counts
        boxes, scores, levels = [], [], []
        for level, anchors in enumerate(self.anchors(features)):
            score = per_anchor(logits[level], 1).squeeze(-1).float().sigmoid()
            best, rows = score.topk(min(counts.before_nms, len(anchors)), dim=1)
            delta = per_anchor(deltas[level], 4).gather(1, rows[..., None].expand(-1, -1, 4))
            boxes.append(decode(anchors[rows], delta, STDS, batch.sizes))
            scores.append(best)
            levels.append(torch.full_like(rows, level))
        box, score, level_of = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels, dim=1)
        usable = (box[..., 2:] > box[..., :2]).all(dim=-1) & (score >= 0)  # not so where it is not a number
        image = torch.arange(len(box), device=box.device)[:, None]
        group = image * len(logits) + level_of
        # Unusable boxes go into NMS as empty ones, which suppress nothing, so that shapes stay fixed.
        real = torch.where(usable[..., None], box, 0.0)
        survives = torch.zeros_like(usable)
        together = max(1, BOXES_AT_ONCE // box.shape[1])  # images
        for part in (slice(first, first + together) for first in range(0, len(box), together)):
            boxes_of, scores_of, groups_of = (values[part].flatten(0, 1) for values in (real, score, group))
            kept = grouped_nms(boxes_of, scores_of, groups_of, self.nms_threshold)
            survives[part].view(-1).index_fill_(0, kept, True)
        survives &= usable
        score, rows = torch.where(survives, score, -1.0).topk(min(counts.after_nms, score.shape[1]), dim=1)
        return Proposals(box.gather(1, rows[..., None].expand(-1, -1, 4)), score, score >= 0)
