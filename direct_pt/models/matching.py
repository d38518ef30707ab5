"""Which reference box (anchor or proposal) learns which object, and which of them are sampled: a whole batch at once.

Semantics follow MMDetection's MaxIoUAssigner and RandomSampler. Crowd regions are taken out of the negatives, which
MMDetection's default settings do not do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from direct_pt.models.boxes import overlaps

CROWD_OVERLAP = 0.5  # a negative that lies in crowd regions by more than this share of its area is ignored
PAIRS_AT_ONCE = 2**25  # of references and objects: crowded images of many anchors would take gigabytes


@dataclass(frozen=True)
class Matching:
    """The rule: `positive` and `negative` IoU, and what a best but low match needs (None: low matches do not count)."""

    positive: float
    negative: float
    low_quality: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How many references of an image enter the loss, and at most what share of them positive. None takes all."""

    per_image: int | None
    positive_share: float

    def weights(self, counted: Tensor) -> Tensor:
        """[B, S] that make the sum of weighted losses a mean over the references that are `counted` [B, S].

        It is the mean of the images' means: the mean over all of them when every image fills its samples, as it does
        at the recipe's sizes. No image's weight depends on its neighbours, so that accumulated micro-batches have the
        gradient of one large batch. Where all candidates are taken it is MMDetection's one mean over the batch.
        """
        numbers = counted.sum(dim=1, keepdim=True)
        if self.per_image is None:
            return counted / (numbers.sum() + torch.finfo(torch.float32).eps)
        return counted / (numbers.clamp(min=1) * len(counted))


@dataclass
class Matches:
    """For each of N references: `target` [B, N] the object's slot, `positive` and `negative` [B, N] bool."""

    target: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def match(rule: Matching, references: Tensor, usable: Tensor, boxes: Tensor, valid: Tensor, crowd: Tensor) -> Matches:
    """Match references to objects by IoU.

    Args:
        rule: the thresholds.
        references: [B or 1, N, 4] boxes.
        usable: [B, N] bool; the others are neither positive nor negative.
        boxes: [B, G, 4] objects.
        valid: [B, G] bool, which of them are to be learnt.
        crowd: [B, G] bool, which are regions to ignore.
    """
    size = max(1, PAIRS_AT_ONCE // valid.numel())
    parts = list(zip(references.split(size, dim=1), usable.split(size, dim=1), strict=True))
    best_of_object, columns = boxes.new_full((*valid.shape, 1), -1), []
    for some, of_use in parts:
        iou, in_crowd = _overlaps(some, of_use, boxes, valid, crowd)
        best_of_object = torch.maximum(best_of_object, iou.amax(dim=2, keepdim=True))
        columns.append((*iou.max(dim=1), in_crowd))
    best, target, in_crowd = (torch.cat(column, dim=1) for column in zip(*columns, strict=True))
    positive = best >= rule.positive
    negative = best < rule.negative
    if rule.low_quality is not None:
        # Every reference that ties for an object's best takes that object; of several objects the last one wins.
        slots = torch.arange(boxes.shape[1], device=boxes.device)[None, :, None]
        takers = []
        for some, of_use in parts:
            if len(parts) > 1:  # they were too many to keep
                iou, _ = _overlaps(some, of_use, boxes, valid, crowd)
            taken = (iou == best_of_object) & (best_of_object >= rule.low_quality)
            takers.append(torch.where(taken, slots, -1).amax(dim=1))
        last = torch.cat(takers, dim=1)
        target = torch.where(last >= 0, last, target)
        positive = positive | (last >= 0)
    return Matches(target, positive & usable, negative & ~positive & ~in_crowd & usable)


def _overlaps(references: Tensor, usable: Tensor, boxes: Tensor, valid: Tensor, crowd: Tensor) -> tuple[Tensor, Tensor]:
    """IoU [B, G, N] of objects and references, -1 where either does not count, and which references [B, N] lie in
    crowd regions."""
    iou, covered = overlaps(boxes, references)
    in_crowd = (covered.masked_fill(~crowd[:, :, None], 0).amax(dim=1) > CROWD_OVERLAP) & usable
    return iou.masked_fill(~(valid[:, :, None] & usable[:, None, :]), -1), in_crowd


@torch.no_grad()
def sample(rule: Sampling, matches: Matches, seeds: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw references for the loss, positives first.

    The draw depends on each image's own seed alone: not on the batch that it is in, nor on a generator's state.

    Args:
        rule: how many.
        matches: of [B, N] references.
        seeds: [B] int64.
        salt: tells one use from another.

    Returns:
        rows [B, S], positive [B, S], sampled [B, S]: slots that are not `sampled` hold nothing.
    """
    count = matches.positive.shape[1]
    size = count if rule.per_image is None else min(rule.per_image, count)
    positives = count if rule.per_image is None else min(int(rule.per_image * rule.positive_share), count)
    keys = random_keys(seeds, count, salt)
    positive_keys = torch.where(matches.positive, keys, -1.0)
    chosen = positive_keys.topk(positives, dim=1)
    is_chosen = torch.zeros_like(matches.positive).scatter(1, chosen.indices, chosen.values >= 0)
    keys = torch.where(is_chosen, keys + 1, torch.where(matches.negative, keys, -1.0))
    drawn = keys.topk(size, dim=1)
    return drawn.indices, is_chosen.gather(1, drawn.indices), drawn.values >= 0


def random_keys(seeds: Tensor, count: int, salt: int) -> Tensor:
    """[B, count] float32 in [0, 1), a hash of (seed, salt, position): the same on every device and in every batch."""
    low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0x7FFFFFFF
    stream = _mix(low ^ _mix(high + 0x9E3779B9 * (salt + 1)))
    keys = _mix(torch.arange(count, device=seeds.device)[None, :] * 0x9E3779B1 + stream[:, None])
    return (keys >> 8).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (the public-domain MurmurHash3 one), on int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
