"""Which reference box (anchor or proposal) learns which object, and which references are sampled: for a whole batch.

Semantics follow MMDetection's MaxIoUAssigner and RandomSampler. Unlike MMDetection's default settings, references
inside crowd regions are no negatives.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from direct_pt.models.boxes import overlaps

MAX_CROWD_OVERLAP = 0.5  # a negative with a larger share of its area in a crowd region is ignored
MAX_PAIRS = 2**25  # of references and objects at once: crowded images of many anchors would take gigabytes


@dataclass(frozen=True)
class Matching:
    """IoU thresholds of positive and negative references.

    Attributes:
        positive: a reference whose best IoU is at least this learns that object.
        negative: a reference whose best IoU is below this learns the background. Between the two it learns nothing.
        low_quality: an object's best reference learns it, whatever `positive` says, if their IoU is at least this;
            None: no such matches.
    """

    positive: float
    negative: float
    low_quality: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How many references per image enter the loss, and what fraction of them at most is positive. None takes all."""

    per_image: int | None
    positive_share: float

    def weights(self, counted: Tensor) -> Tensor:
        """[B, S] that make the sum of weighted losses a mean over the references that are `counted` [B, S].

        It is the mean of the images' means. Where every image fills its samples, as it does at the recipe's sizes, that
        is the mean over all references. No image's weight depends on the other images, so accumulated micro-batches
        have the gradient of one large batch. Where all references are taken it is MMDetection's one mean over the
        batch.
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
    chunk_size = max(1, MAX_PAIRS // valid.numel())
    chunks = list(zip(references.split(chunk_size, dim=1), usable.split(chunk_size, dim=1), strict=True))
    object_best, bests, targets, crowded = boxes.new_full((*valid.shape, 1), -1), [], [], []
    for chunk, chunk_usable in chunks:
        iou, in_crowd = _masked_overlaps(chunk, chunk_usable, boxes, valid, crowd)
        object_best = torch.maximum(object_best, iou.amax(dim=2, keepdim=True))
        best, target = iou.max(dim=1)
        bests.append(best)
        targets.append(target)
        crowded.append(in_crowd)
    best, target, in_crowd = torch.cat(bests, dim=1), torch.cat(targets, dim=1), torch.cat(crowded, dim=1)
    positive = best >= rule.positive
    negative = best < rule.negative
    if rule.low_quality is not None:
        # Every reference that ties for an object's best IoU takes that object; of several objects the last one wins.
        slots = torch.arange(boxes.shape[1], device=boxes.device)[None, :, None]
        taken_slots = []
        for chunk, chunk_usable in chunks:
            if len(chunks) > 1:  # their IoUs were too many to keep
                iou, _ = _masked_overlaps(chunk, chunk_usable, boxes, valid, crowd)
            is_best = (iou == object_best) & (object_best >= rule.low_quality)
            taken_slots.append(torch.where(is_best, slots, -1).amax(dim=1))
        taken = torch.cat(taken_slots, dim=1)  # [B, N], -1: none
        target = torch.where(taken >= 0, taken, target)
        positive = positive | (taken >= 0)
    return Matches(target, positive & usable, negative & ~positive & ~in_crowd & usable)


def _masked_overlaps(
    references: Tensor, usable: Tensor, boxes: Tensor, valid: Tensor, crowd: Tensor
) -> tuple[Tensor, Tensor]:
    """IoU [B, G, N] of objects and references, -1 where either is masked out, and which references [B, N] lie in crowd
    regions."""
    iou, share_covered = overlaps(boxes, references)
    in_crowd = (share_covered.masked_fill(~crowd[:, :, None], 0).amax(dim=1) > MAX_CROWD_OVERLAP) & usable
    return iou.masked_fill(~(valid[:, :, None] & usable[:, None, :]), -1), in_crowd


@torch.no_grad()
def sample(rule: Sampling, matches: Matches, seeds: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw references for the loss at random, positives first, then negatives.

    The draw depends only on each image's own seed: not on the other images of the batch, nor on a generator's state.

    Args:
        rule: how many.
        matches: of [B, N] references.
        seeds: [B] int64, one per image.
        salt: a different one for each head that samples.

    Returns:
        rows [B, S], positive [B, S], sampled [B, S]: slots that are not `sampled` are unused.
    """
    count = matches.positive.shape[1]
    size = count if rule.per_image is None else min(rule.per_image, count)
    max_positives = count if rule.per_image is None else min(int(rule.per_image * rule.positive_share), count)
    # Each reference has a random key in [0, 1), and topk draws: first among the positives ...
    keys = random_keys(seeds, count, salt)
    chosen = torch.where(matches.positive, keys, -1.0).topk(max_positives, dim=1)
    is_chosen = torch.zeros_like(matches.positive).scatter(1, chosen.indices, chosen.values >= 0)
    # ... then the chosen positives, in [1, 2), come before all negatives, in [0, 1); the rest, at -1, fills the slots.
    keys = torch.where(is_chosen, keys + 1, torch.where(matches.negative, keys, -1.0))
    drawn = keys.topk(size, dim=1)
    return drawn.indices, is_chosen.gather(1, drawn.indices), drawn.values >= 0


def random_keys(seeds: Tensor, count: int, salt: int) -> Tensor:
    """[B, count] float32 in [0, 1), a hash of (seed, salt, position): the same on every device and in every batch."""
    low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0x7FFFFFFF
    stream = _mix_bits(low ^ _mix_bits(high + 0x9E3779B9 * (salt + 1)))
    keys = _mix_bits(torch.arange(count, device=seeds.device)[None, :] * 0x9E3779B1 + stream[:, None])
    return (keys >> 8).float() / 2**24


def _mix_bits(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser (public domain), on int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
