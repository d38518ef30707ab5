"""Matching, sampling, NMS, anchors and RoI features, by brute force."""

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from direct_pt.batch import Detections
from direct_pt.images.geometry import has_extent
from direct_pt.models import matching
from direct_pt.models.anchors import Anchors, flatten_level, inside_images
from direct_pt.models.boxes import best_detections, grouped_nms
from direct_pt.models.matching import Matches, Matching, Sampling, match, random_keys, sample
from direct_pt.models.roi_align import pyramid_roi_align, roi_levels

# Matching


def test_crowd_takes_negatives_out() -> None:
    references = torch.tensor([[[0, 0, 10, 10], [20, 0, 30, 10], [24, 0, 34, 10], [60, 0, 70, 10]]]).float()
    boxes = torch.tensor([[[0, 0, 10, 10], [15, 0, 30, 10], [60, 0, 70, 10]]]).float()
    valid, crowd = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    usable = torch.ones(1, 4, dtype=torch.bool)
    for rule in (Matching(0.7, 0.3, 0.3), Matching(0.5, 0.5)):
        matches = match(rule, references, usable, boxes, valid, crowd)
        assert matches.positive.tolist() == [[True, False, False, False]]
        # The second lies in the crowd region wholly, the third by 60 %, the fourth over a slot that holds nothing.
        assert matches.negative.tolist() == [[False, False, False, True]]
        assert matches.target[0, 0] == 0
    beyond = references + torch.tensor([2.0, 0, 2, 0])  # the third: 40 % inside
    assert match(Matching(0.5, 0.5), beyond, usable, boxes, valid, crowd).negative.tolist()[0][2]
    nothing = match(Matching(0.7, 0.3, 0.3), references, ~usable, boxes, valid, crowd)
    assert not (nothing.positive | nothing.negative).any()


def test_no_object_makes_all_negative() -> None:
    references = torch.rand(1, 20, 4).cumsum(dim=-1)
    boxes, none = torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.bool)
    for rule in (Matching(0.7, 0.3, 0.3), Matching(0.5, 0.5), Matching(0.5, 0.4, 0.0)):
        matches = match(rule, references, torch.ones(3, 20, dtype=torch.bool), boxes, none, none)
        assert matches.negative.all() and not matches.positive.any()


@pytest.mark.parametrize("rule", [Matching(0.7, 0.3, 0.3), Matching(0.5, 0.5), Matching(0.5, 0.4, 0.0)])
def test_matching_in_parts(rule: Matching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowded images are matched a few references at a time: with ties between the parts, crowds, unused slots."""
    draw = torch.Generator().manual_seed(0)
    for count in (1, 30, 211):
        corners, sides = (torch.randint(low, 14, (3, count + 6, 2), generator=draw).float() for low in (0, 1))
        boxes = torch.cat([corners, corners + sides], dim=-1)
        usable, valid, crowd = (
            torch.rand(3, n, generator=draw) < share for n, share in ((count, 0.8), (6, 0.7), (6, 1))
        )
        arguments = boxes[:, 6:], usable, boxes[:, :6], valid, crowd & ~valid
        at_once = match(rule, *arguments)
        for pairs in (1, 18 * 7):
            with monkeypatch.context() as patch:
                patch.setattr(matching, "MAX_PAIRS", pairs)
                in_parts = match(rule, *arguments)
            assert vars(at_once).keys() == vars(in_parts).keys()
            assert all(torch.equal(values, getattr(in_parts, name)) for name, values in vars(at_once).items())


# Sampling


def matches_of(positives: list[int], negatives: list[int], count: int = 100) -> Matches:
    """One image a figure: that many positives, then that many negatives, then neither."""
    place = torch.arange(count)[None, :]
    first, second = torch.tensor(positives)[:, None], torch.tensor(negatives)[:, None]
    return Matches(
        torch.zeros(len(positives), count).long(), place < first, (place >= first) & (place < first + second)
    )


def test_sample_counts() -> None:
    rule = Sampling(per_image=16, positive_share=0.25)
    positives, negatives = [0, 2, 4, 40, 40, 3, 0], [80, 80, 80, 60, 5, 1, 0]
    matches = matches_of(positives, negatives)
    rows, positive, sampled = sample(rule, matches, torch.arange(7), salt=0)
    assert rows.shape == (7, 16)
    assert positive.sum(dim=1).tolist() == [0, 2, 4, 4, 4, 3, 0]  # a quarter at most
    assert sampled.sum(dim=1).tolist() == [16, 16, 16, 16, 9, 4, 0]  # and negatives up to the count
    assert not (positive & ~sampled).any()
    assert (matches.positive.gather(1, rows) >= positive).all()
    assert (matches.negative.gather(1, rows) >= (sampled & ~positive)).all()
    for image in range(7):
        drawn = rows[image, sampled[image]].tolist()
        assert len(drawn) == len(set(drawn))


def test_sample_takes_all_without_a_count_or_with_few_candidates() -> None:
    for rule in (Sampling(per_image=None, positive_share=0.25), Sampling(per_image=512, positive_share=0.25)):
        _, positive, sampled = sample(rule, matches_of([5], [20]), torch.zeros(1).long(), salt=0)
        assert int(positive.sum()) == 5 and int(sampled.sum()) == 25


def drawn_rows(matches: Matches, seeds: list[int], salt: int) -> list[list[int]]:
    rows, _, sampled = sample(Sampling(16, 0.25), matches, torch.tensor(seeds), salt)
    return [sorted(rows[image, sampled[image]].tolist()) for image in range(len(seeds))]


def test_sample_follows_the_seed_alone() -> None:
    seeds = [7, 2**61 + 3, 8]
    together = drawn_rows(matches_of([40] * 3, [60] * 3), seeds, salt=0)
    assert drawn_rows(matches_of([40] * 3, [60] * 3), seeds[::-1], salt=0) == together[::-1]
    assert drawn_rows(matches_of([40], [60]), [8], salt=0) == [together[2]]
    torch.manual_seed(1)  # no generator has a say
    assert drawn_rows(matches_of([40] * 3, [60] * 3), seeds, salt=0) == together
    assert len({tuple(rows) for rows in together}) == 3
    assert drawn_rows(matches_of([40] * 3, [60] * 3), seeds, salt=1) != together


def test_sample_is_uniform() -> None:
    """Over many seeds each candidate is drawn about as often as any other."""
    count = 2000
    rows, _, _ = sample(Sampling(16, 0.25), matches_of([0] * count, [64] * count, 64), torch.arange(count), salt=0)
    hits = rows.flatten().bincount(minlength=64)
    assert (hits / count - 0.25).abs().max() < 5 * (0.25 * 0.75 / count) ** 0.5
    keys = random_keys(torch.arange(count), 64, salt=0)
    assert keys.min() >= 0 and keys.max() < 1 and abs(keys.mean() - 0.5) < 0.005


def test_weights_are_the_mean_of_the_images_means() -> None:
    counted = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    weights = Sampling(per_image=4, positive_share=0.25).weights(counted)
    assert (weights * 12).tolist() == pytest.approx(np.array([[2, 2, 0, 0], [4, 0, 0, 0], [0] * 4]))
    pooled = Sampling(per_image=None, positive_share=0.25).weights(counted)
    assert (pooled * 3).tolist() == pytest.approx(counted.double().numpy(), abs=1e-6)
    assert not Sampling(None, 0.25).weights(torch.zeros(2, 3, dtype=torch.bool)).any()


# Boxes and NMS


def test_boxes_that_float32_makes_empty_are_dropped() -> None:
    """A crop's edge on an object's edge leaves rounding noise of float64 as its width."""
    boxes = np.array([[448 - 1e-10, 3, 448, 30], [3, 10, 30, 10 + 1e-13], [3, 3, 30, 30.5]])
    assert has_extent(boxes).tolist() == [False, False, True]


def brute_force_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """The definition, one pair at a time."""
    kept: list[int] = []
    for row in scores.argsort(descending=True, stable=True).tolist():
        rivals = [other for other in kept if groups[other] == groups[row]]
        if not rivals or torchvision.ops.box_iou(boxes[[row]], boxes[rivals]).max() <= threshold:
            kept.append(row)
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.7])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_grouped_nms(count: int, threshold: float) -> None:
    torch.manual_seed(count)
    corners = torch.rand(count, 2) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(count, 2) * 30], dim=1)
    scores = torch.rand(count)
    groups = torch.randint(0, 4, (count,)) * 3  # numbers with holes
    kept = grouped_nms(boxes, scores, groups, threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force_nms(boxes, scores, groups, threshold)
    if count:
        assert kept.tolist() == torchvision.ops.batched_nms(boxes, scores, groups, threshold).tolist()


def test_grouped_nms_with_ties_and_empty_boxes() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 10, 10]]).float()
    kept = grouped_nms(boxes, torch.full((5,), 0.5), torch.tensor([0, 0, 0, 0, 1]), 0.5)
    assert sorted(kept.tolist()) == [0, 2, 3, 4]  # the first of a tie; empty boxes suppress nothing


def test_best_detections() -> None:
    """Class-wise NMS and the best of each image, by the definition."""
    torch.manual_seed(0)
    corners = torch.rand(300, 2) * 40
    found = Detections(
        image=torch.randint(0, 4, (300,)) * 2 % 7,  # images 0, 2, 4, 6; none in the odd ones
        boxes=torch.cat([corners, corners + 5 + torch.rand(300, 2) * 30], dim=1),
        scores=torch.rand(300),
        labels=torch.randint(0, 3, (300,)),
    )
    best = best_detections(found, num_images=8, num_classes=3, nms_threshold=0.5, max_detections=9)
    expected = []
    for image in range(8):
        rows = (found.image == image).nonzero().flatten()
        kept = brute_force_nms(found.boxes[rows], found.scores[rows], found.labels[rows], 0.5)
        expected += rows[kept][:9].tolist()
    assert torch.equal(best.boxes, found.boxes[expected]) and torch.equal(best.labels, found.labels[expected])
    assert torch.equal(best.image, found.image[expected]) and torch.equal(best.scores, found.scores[expected])
    assert best.image.bincount(minlength=8).tolist() == [9, 0, 9, 0, 9, 0, 9, 0]
    nothing = best_detections(found.keep(torch.zeros(0, dtype=torch.int64)), 3, 3, 0.5, 9)
    assert len(nothing) == 0 and nothing.boxes.shape == (0, 4)


# Anchors and RoI features


def test_anchors_in_order_and_which_of_them_count() -> None:
    """One by one: the cells row by row, in each the scales of every ratio; and a map's values in that order."""
    anchors = Anchors((8, 16), scales=(2.0, 3.0), ratios=(0.5, 2.0))
    features = [torch.arange(12.0).view(1, 1, 3, 4), torch.arange(4.0).view(1, 1, 2, 2)]
    expected, cells = [], []
    for feature, stride in zip(features, (8, 16), strict=True):
        for row in range(feature.shape[2]):
            for column in range(feature.shape[3]):
                for ratio in (0.5, 2.0):
                    for scale in (2.0, 3.0):
                        w, h = scale * stride / ratio**0.5 / 2, scale * stride * ratio**0.5 / 2
                        x, y = column * stride, row * stride
                        expected.append([x - w, y - h, x + w, y + h])
                        cells.append((row, column, stride))
    boxes = torch.cat(anchors(features))
    torch.testing.assert_close(boxes, torch.tensor(expected))

    padded = torch.tensor([[24, 32], [16, 9], [1, 32]])
    usable = [
        [row < -(-height // stride) and column < -(-width // stride) for row, column, stride in cells]
        for height, width in padded.tolist()
    ]
    assert anchors.inside_padding(features, padded).tolist() == usable

    edges = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10.5, 20], [-0.5, 0, 5, 5], [0, 0, 9, 19.9], [1, 1, 30, 12]])
    sizes = torch.tensor([[20, 10], [21, 11], [13, 31]])  # height, width
    assert inside_images(edges, sizes).tolist() == [
        [False, False, False, True, False],
        [True, True, False, True, False],
        [False, False, False, False, True],
    ]

    values = torch.randn(2, 4 * 3, 5, 6)
    flat = flatten_level(values, 3)
    for row, column, anchor in ((0, 0, 0), (1, 2, 3), (4, 5, 1)):
        place = (row * 6 + column) * 4 + anchor
        assert torch.equal(flat[:, place], values[:, 3 * anchor : 3 * anchor + 3, row, column])


def test_roi_features_come_from_the_right_image_and_level() -> None:
    """Each box alone on its own level; sides under 112 pixels are read from the finest."""
    torch.manual_seed(0)
    strides = [4, 8, 16, 32]
    features = [torch.randn(3, 5, 512 // stride, 512 // stride) for stride in strides]
    sides = torch.tensor([3.0, 50, 111, 113, 200, 223, 225, 440, 449, 500, 0])
    corners = torch.rand(len(sides), 2) * (512 - sides[:, None])
    boxes = torch.cat([corners, corners + sides[:, None] * torch.tensor([1.0, 1.0])], dim=1)
    levels = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0]
    assert roi_levels(boxes, 4).tolist() == levels and roi_levels(boxes, 2).max() == 1
    images = torch.tensor([2, 0, 1, 2, 2, 1, 0, 0, 1, 2, 0])
    found = pyramid_roi_align(features, strides, images, boxes, 7)
    for row, (level, image) in enumerate(zip(levels, images.tolist(), strict=True)):
        alone = torchvision.ops.roi_align(
            features[level][image : image + 1], [boxes[row : row + 1]], 7, 1 / strides[level], 0, aligned=True
        )
        torch.testing.assert_close(found[row], alone[0])
    assert pyramid_roi_align(features, strides, images[:0], boxes[:0], 14).shape == (0, 5, 14, 14)
