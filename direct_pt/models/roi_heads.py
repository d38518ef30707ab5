"""What happens to proposals: sampling, RoI features, class scores and boxes. Semantics follow MMDetection's."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.batch import Batch, Detections
from direct_pt.models.boxes import decode, encode, grouped_nms
from direct_pt.models.matching import Matching, Sampling, match, sample
from direct_pt.models.roi_align import pyramid_roi_align
from direct_pt.models.rpn import Proposals


class BoxHead(nn.Module):
    """Shared convolutions and fully connected layers, then class logits and class-specific box deltas.

    Args:
        channels: of the RoI features.
        num_classes: without the background, which is the last of the `num_classes + 1` logits.
        num_convs: 3x3, with bias, no norm.
        num_fcs: at least 1.
        fc_width: of each fully connected layer.
        output_size: cells a side of the RoI features.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_convs: int = 4,
        num_fcs: int = 1,
        fc_width: int = 1024,
        output_size: int = 7,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.output_size = output_size
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))
        widths = [channels * output_size**2] + [fc_width] * num_fcs
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.class_logits = nn.Linear(fc_width, num_classes + 1)
        self.deltas = nn.Linear(fc_width, 4 * num_classes)
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
        """Logits [R, num_classes + 1] and deltas [R, num_classes, 4] of RoI features [R, C, s, s]."""
        for conv in self.convs:
            features = F.relu(conv(features))
        hidden = features.flatten(1)
        for fc in self.fcs:
            hidden = F.relu(fc(hidden))
        return self.class_logits(hidden), self.deltas(hidden).view(-1, self.num_classes, 4)


class RoIHead(nn.Module):
    """The second stage of Faster R-CNN.

    Args:
        box_head: scores and refines RoIs.
        strides: of the pyramid levels that RoIs are read from.
        matching: which proposals learn which object.
        sampling: how many enter the loss.
        stds: of the box coder.
        score_threshold: detections score strictly more.
        nms_threshold: IoU above which the lesser detection of a class goes.
        max_detections: an image.
    """

    def __init__(
        self,
        box_head: BoxHead,
        strides: list[int],
        matching: Matching,
        sampling: Sampling,
        stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.box_head = box_head
        self.strides = strides
        self.matching = matching
        self.sampling = sampling
        self.stds = stds
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    def forward(self, features: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S, num_classes + 1] and deltas [B, S, num_classes, 4] of `rois` [B, S, 4], in float32."""
        levels = features[: len(self.strides)]
        pooled = pyramid_roi_align(levels, self.strides, rois, self.box_head.output_size)
        logits, deltas = self.box_head(pooled)
        return logits.float().unflatten(0, rois.shape[:2]), deltas.float().unflatten(0, rois.shape[:2])

    def losses(self, features: list[Tensor], proposals: Proposals, batch: Batch) -> dict[str, Tensor]:
        """Class (cross-entropy) and box (L1, the object's own class) loss, both over the number of sampled RoIs."""
        rois, target, positive, sampled = self.sample(proposals, batch)
        logits, deltas = self(features, rois)
        labels = batch.labels.gather(1, target).masked_fill(~positive, self.box_head.num_classes)
        own_class = labels.clamp(max=self.box_head.num_classes - 1)[..., None, None].expand(-1, -1, 1, 4)
        delta = deltas.gather(2, own_class).squeeze(2)
        objects = batch.boxes.gather(1, target[..., None].expand(-1, -1, 4))
        delta_target = encode(rois, torch.where(positive[..., None], objects, rois), self.stds)
        normalizer = self.sampling.normalizer(sampled)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(sampled)
        return {
            "roi_class": (cross_entropy * sampled).sum() / normalizer,
            "roi_box": ((delta - delta_target).abs() * positive[..., None]).sum() / normalizer,
        }

    @torch.no_grad()
    def sample(self, proposals: Proposals, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The RoIs that enter the loss; the objects themselves are candidates too, as positives.

        They come last, lest a proposal's draw depend on how many objects another image of the batch has.

        Returns:
            rois [B, S, 4], target [B, S] slots of objects, positive [B, S], sampled [B, S]. A slot that is not
            sampled holds a unit box.
        """
        matches = match(self.matching, proposals.boxes, proposals.valid, batch.boxes, batch.valid, batch.crowd)
        slots = torch.arange(batch.boxes.shape[1], device=batch.boxes.device).expand(len(batch), -1)
        matches.target = torch.cat([matches.target, slots], dim=1)
        matches.positive = torch.cat([matches.positive, batch.valid], dim=1)
        matches.negative = torch.cat([matches.negative, torch.zeros_like(batch.valid)], dim=1)
        rows, positive, sampled = sample(self.sampling, matches, batch.seeds, salt=1)
        candidates = torch.cat([proposals.boxes, batch.boxes], dim=1)
        rois = candidates.gather(1, rows[..., None].expand(-1, -1, 4))
        rois = torch.where(sampled[..., None], rois, rois.new_tensor([0.0, 0.0, 1.0, 1.0]))
        return rois, matches.target.gather(1, rows), positive, sampled

    @torch.no_grad()
    def detect(self, features: list[Tensor], proposals: Proposals, batch: Batch) -> Detections:
        """Scored boxes in the original images' frames, at most `max_detections` an image."""
        most = int(proposals.valid.sum(dim=1).max())  # slots are filled from the front
        rois, valid = proposals.boxes[:, :most], proposals.valid[:, :most]
        logits, deltas = self(features, rois)
        scores = logits.softmax(dim=-1)[..., :-1].masked_fill(~valid[..., None], 0)
        boxes = decode(rois[:, :, None].expand_as(deltas), deltas, self.stds, batch.sizes)
        boxes = boxes / batch.scales.repeat(1, 2)[:, None, None]
        image, roi, label = torch.nonzero(scores > self.score_threshold, as_tuple=True)
        candidates = Detections(image, boxes[image, roi, label], scores[image, roi, label], label)
        return best_detections(candidates, len(batch), scores.shape[2], self.nms_threshold, self.max_detections)


def best_detections(
    candidates: Detections, num_images: int, num_classes: int, nms_threshold: float, max_detections: int
) -> Detections:
    """Class-wise NMS, then the best `max_detections` of each image, ordered by image and falling score."""
    groups = candidates.image * num_classes + candidates.labels
    kept = grouped_nms(candidates.boxes, candidates.scores, groups, nms_threshold)
    kept = kept[torch.argsort(candidates.image[kept], stable=True)]
    image = candidates.image[kept]
    first = torch.searchsorted(image, torch.arange(num_images, device=image.device))
    rank = torch.arange(len(image), device=image.device) - first[image]
    kept = kept[rank < max_detections]
    return candidates.keep(kept)
