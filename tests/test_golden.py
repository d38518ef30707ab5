"""The detectors against figures that MMDetection gave for the same weights, images and ground truths.

The files (see `golden.FOLDER`) hold no weights: both sides make them from names and a seed. Differences are measured
against each array's largest value.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import golden
import numpy as np
import pytest
import torch
from golden import largest_error
from small_detectors import without_drop_path
from torch import Tensor

from direct_pt.batch import Batch, Detections
from direct_pt.models import retinanet, roi_heads, rpn
from direct_pt.models.anchors import Anchors, inside_images
from direct_pt.models.boxes import best_detections, clip, decode, encode, grouped_nms, overlaps
from direct_pt.models.detector import STRIDES, Detector, RetinaNet, TwoStage
from direct_pt.models.layers import batchnorms
from direct_pt.models.masks import mask_targets
from direct_pt.models.matching import Matches, Matching, Sampling, match, sample
from direct_pt.models.mmdet_weights import detector_from_mmdet, from_mmdet, mmdet_state_dict, to_mmdet
from direct_pt.models.roi_align import pyramid_roi_align, roi_levels
from direct_pt.models.roi_heads import BoxHead, RoIHead
from direct_pt.models.rpn import ProposalCounts, Proposals
from direct_pt.onnx_detector import paste_masks, paste_windows

Arrays = Mapping[str, np.ndarray]

TOLERANCE = 1e-4  # of maps, features, logits, scores, probabilities and losses
BOX_ERROR = 0.1  # pixels, in images of 320: decoding magnifies differences
GRADIENT_TOLERANCE = 5e-3  # of each gradient's norm: L1 and ReLU have kinks, where another rounding takes another side
FLIPPED_PROPOSALS = 0.01  # share that may differ, from pairs at the NMS threshold and scores at the cut
SURE_SCORE = 0.06  # detections nearer to the score threshold may come and go
SCORE_ERROR = 5e-4  # of detections in our own proposals: a proposal that is off by 1e-3 pixels changes scores by 1e-4
DOUBTFUL = 1e-3  # pasted pixels whose probability is so near to one half may be on either side,
FLIPPED_PIXELS = 0.1  # and in all masks of an image this share of them, as probabilities agree to a tenth of that

MODELS = {  # golden_<key>.npz is of our model <value>
    "retinanet": "retinanet_r50_fpn",
    "faster_rcnn": "faster_rcnn_r50_fpn",
    "cascade_rcnn": "cascade_rcnn_r50_fpn",
    "mask_rcnn": "mask_rcnn_r50_fpn",
    "mask_rcnn_swin": "mask_rcnn_swin_t_fpn",
}
LOSSES = {
    "class": "loss_cls",
    "box": "loss_bbox",
    "rpn_objectness": "loss_rpn_cls",
    "rpn_box": "loss_rpn_bbox",
    "roi_class": "loss_cls",
    "roi_box": "loss_bbox",
    **{f"roi{number}_class": f"s{number}.loss_cls" for number in range(3)},
    **{f"roi{number}_box": f"s{number}.loss_bbox" for number in range(3)},
    "mask": "loss_mask",
}
CHECKED = (
    r"param_names|jitter\d",
    r"i\d/(input|backbone\d|fpn\d|cls\d|reg\d|roi\d_feat)_(stats|samples)|i\d/fpn\d_shape",
    r"i\d/(proposals|roi\d_rois|roi\d_(cls|reg)(_stats)?)",
    r"i\d/(rescaled_)?(boxes|scores|labels|mask_areas)",
    r"i\d/mask_(probs_top5|shape|packed_top2)",
    r"i\d/equals_2x_decode",  # a note: whether MMDetection 2.x would detect the same
    r"b\d+/(loss_(rpn_)?(cls|bbox)|s\d\.loss_(cls|bbox)|loss_mask|total|sampled|proposals\d|grad_norms)",
    r"r\d+/((s\d\.)?loss_(cls|bbox)|loss_mask|sampled)",
)


@dataclass
class Case:
    """One golden file (its names without the seed) and our detector with the same weights, in eval mode."""

    name: str
    arrays: Arrays
    shapes: Mapping[str, list[int]]
    detector: Detector

    def require(self, *prefixes: str) -> None:
        """Skip the test where the file has nothing under one of `prefixes`."""
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in self.arrays):
                pytest.skip(f"golden_{self.name}.npz has no {prefix}")


@dataclass
class BoxHeadPass:
    """What one box head was given, and what it made of it: `rois` [n, 4], `features` [n, C, s, s], `logits` and
    `deltas` [n, ...]."""

    rois: Tensor
    features: Tensor
    logits: Tensor
    deltas: Tensor


@dataclass
class Evaluation:
    """What our detector makes of one image. Box heads and detections are of the file's own proposals, so that the order
    of tied scores does not matter."""

    batch: Batch
    backbone: list[Tensor]
    fpn: list[Tensor]
    logits: list[Tensor]
    deltas: list[Tensor]
    proposals: Proposals | None
    box_heads: list[BoxHeadPass]
    detections: Detections


def read(name: str) -> Any:
    """A golden file's contents, or the test is skipped."""
    path = golden.FOLDER / name
    if not path.is_file():
        pytest.skip(f"no {name} in {golden.FOLDER} (DIRECT_PT_GOLDEN names another folder)")
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    contents, shapes = read(f"golden_{request.param}.npz"), read(f"keys_{request.param}.json")
    seeds = {int(found[1]) for name in contents if (found := re.match(r"s(\d+)[ibr]\d", name))}
    assert len(seeds) == 1, f"one file, one seed: {seeds}"
    arrays = {re.sub(r"^s\d+(?=[ibr]\d)", "", name): values for name, values in contents.items()}
    detector = detector_from_mmdet(golden.state_dict(shapes, seeds.pop()), MODELS[request.param])
    return Case(request.param, arrays, shapes, detector.eval())


@pytest.fixture(params=(0, 1))
def image(request: pytest.FixtureRequest) -> int:
    return request.param


@contextmanager
def watched(roi_head: RoIHead) -> Iterator[list[BoxHeadPass]]:
    """Filled with every pass through a box head, image 0's part."""
    features: list[Tensor] = []
    passes: list[BoxHeadPass] = []

    def pooled(head: BoxHead, arguments: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        features.append(arguments[0])

    def passed(head: RoIHead, arguments: tuple[list[Tensor], Tensor, int], outputs: tuple[Tensor, Tensor]) -> None:
        passes.append(BoxHeadPass(arguments[1][0], features.pop(), outputs[0][0], outputs[1][0]))

    hooks = [head.register_forward_hook(pooled) for head in roi_head.box_heads]
    hooks.append(roi_head.register_forward_hook(passed))
    yield passes
    for hook in hooks:
        hook.remove()


def fixed_proposals(boxes: np.ndarray) -> Proposals:
    """Boxes [B, P, 4] as proposals."""
    shape = boxes.shape[:2]
    return Proposals(torch.from_numpy(boxes), torch.ones(shape), torch.ones(shape, dtype=torch.bool))


@pytest.fixture(scope="module")
def evaluations(case: Case) -> dict[int, Evaluation]:
    """Filled image by image: were images module-wide parameters too, pytest would build some detectors twice."""
    return {}


@pytest.fixture
def evaluation(case: Case, image: int, evaluations: dict[int, Evaluation]) -> Evaluation:
    case.require(f"i{image}/")
    if image not in evaluations:
        evaluations[image] = evaluate(case, image)
    return evaluations[image]


@torch.no_grad()
def evaluate(case: Case, image: int) -> Evaluation:
    """Everything that our detector makes of image `image`."""
    detector, batch = case.detector, golden.batch(image)
    backbone = detector.backbone(detector.normalize(batch))
    fpn = detector.fpn(backbone)
    if isinstance(detector, RetinaNet):
        logits, deltas = detector.head(fpn)
        return Evaluation(batch, backbone, fpn, logits, deltas, None, [], detector.detections(fpn, batch))
    assert isinstance(detector, TwoStage)
    logits, deltas = detector.rpn(fpn)
    proposals = detector.rpn.proposals(fpn, logits, deltas, batch)
    given = fixed_proposals(case.arrays[f"i{image}/proposals"][None, :, :4])
    with watched(detector.roi_head) as passes:
        detections = detector.roi_head.detect(fpn, given, batch)
    return Evaluation(batch, backbone, fpn, logits, deltas, proposals, passes, detections)


@pytest.fixture(scope="module")
def trained(case: Case) -> Detector:
    """The detector as the losses were made: no randomness, so all candidates count and BatchNorm does not learn."""
    detector = copy.deepcopy(case.detector).train()
    for layer in batchnorms(detector):
        layer.eval()
    without_drop_path(detector)
    if isinstance(detector, TwoStage):
        detector.rpn.sampling = replace(detector.rpn.sampling, per_image=None)
        detector.roi_head.sampling = replace(detector.roi_head.sampling, per_image=None)
        detector.rpn.train_counts = ProposalCounts(before_nms=2000, after_nms=200)
    return detector


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Filled with (positives, negatives) of every image, at every sampling; RetinaNet's anchors all count."""
    counts: list[list[int]] = []

    def recorded(rule: Sampling, matches: Matches, seeds: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, positive, sampled = sample(rule, matches, seeds, salt)
        assert not (positive & ~sampled).any()
        counts.extend(torch.stack([positive.sum(dim=1), (sampled & ~positive).sum(dim=1)], dim=1).tolist())
        return rows, positive, sampled

    def matched(*arguments: Any) -> Matches:
        matches = match(*arguments)
        counts.extend(torch.stack([matches.positive.sum(dim=1), matches.negative.sum(dim=1)], dim=1).tolist())
        return matches

    for module in (rpn, roi_heads):
        monkeypatch.setattr(module, "sample", recorded)
    monkeypatch.setattr(retinanet, "match", matched)
    return counts


def detections(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray | None = None) -> Detections:
    """Arrays as the detections of one image."""
    classes = np.zeros(len(scores), np.int64) if labels is None else labels
    rows = torch.zeros(len(scores), dtype=torch.int64)
    return Detections(rows, torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(classes))


def detections_of_file(arrays: Arrays, prefix: str) -> Detections:
    """The detections that the file expects."""
    return detections(*(arrays[prefix + part] for part in ("boxes", "scores", "labels")))


def counterparts(some: Detections, others: Detections, score_error: float = TOLERANCE) -> Tensor:
    """[n] int64: for each of `some` the row of its counterpart among `others`, whatever the order, or -1."""
    same = some.labels[:, None] == others.labels
    same &= (some.boxes[:, None] - others.boxes).abs().amax(dim=-1) <= BOX_ERROR
    same &= (some.scores[:, None] - others.scores).abs() <= score_error
    return torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)


def assert_map(actual: Tensor, arrays: Arrays, name: str) -> None:
    """A whole array against its `_stats`, and against its `_samples` where the file has them."""
    expected = arrays[f"{name}_stats"]
    assert np.abs(golden.stats(actual) - expected).max() <= TOLERANCE * expected[2], name
    if f"{name}_samples" in arrays:
        assert largest_error(golden.samples(actual), arrays[f"{name}_samples"]) <= TOLERANCE, name


def assert_proposals(proposals: Proposals, position: int, expected: np.ndarray) -> None:
    """Proposals of one image of the batch against boxes and scores [n, 5]. Many scores tie near 1, so in any order."""
    valid = proposals.valid[position]
    mine = detections(proposals.boxes[position, valid].numpy(), proposals.scores[position, valid].numpy())
    theirs = detections(expected[:, :4], expected[:, 4])
    assert (mine.scores.diff() <= 0).all()
    assert largest_error(mine.scores.numpy(), expected[:, 4]) <= TOLERANCE
    for one, other in ((mine, theirs), (theirs, mine)):
        assert int((counterparts(one, other) < 0).sum()) <= FLIPPED_PROPOSALS * len(expected)


def assert_detections(found: Detections, expected: Detections, score_error: float = TOLERANCE) -> None:
    """What either side is sure of, the other has too."""
    assert (found.scores.diff() <= 0).all()
    for one, other in ((found, expected), (expected, found)):
        assert not ((counterparts(one, other, score_error) < 0) & (one.scores > SURE_SCORE)).any()


def assert_mask_areas(found: Detections, rows: Tensor, areas: np.ndarray, size: tuple[int, int]) -> None:
    """Pasted masks of `found` against the file's `areas` [n] in pixels; `rows` [n] says whose each is, -1 of none."""
    assert found.masks is not None and len(areas) == len(rows)
    kept = rows[rows >= 0]
    sizes = np.tile(size, (len(kept), 1))
    pasted = [mask for _, mask in paste_windows(found.masks[kept].numpy(), found.boxes[kept].numpy(), sizes)]
    mine = np.array([np.count_nonzero(inside >= 0.5) for inside in pasted])
    doubtful = np.array([np.count_nonzero(np.abs(inside - 0.5) <= DOUBTFUL) for inside in pasted])
    errors = np.abs(mine - areas[(rows >= 0).numpy()])
    assert (errors <= doubtful).all()
    assert errors.sum() <= FLIPPED_PIXELS * doubtful.sum()


def assert_losses(losses: dict[str, Tensor], arrays: Arrays, prefix: str) -> None:
    """Losses against the sums of the file's levels."""
    names = {LOSSES[name] for name in losses}
    assert {prefix + name for name in names} == {name for name in arrays if re.match(f"{prefix}(s\\d\\.)?loss_", name)}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(arrays[prefix + LOSSES[name]].sum(), rel=TOLERANCE), name


def test_names_and_shapes_are_mmdetections(case: Case) -> None:
    state = mmdet_state_dict(case.detector)
    assert {name: list(value.shape) for name, value in state.items()} == case.shapes
    assert {to_mmdet(from_mmdet(name, MODELS[case.name]), MODELS[case.name]) for name in state} == set(state)


@pytest.mark.parametrize("model", MODELS.values())
def test_names_without_counterpart(model: str) -> None:
    for rename in (to_mmdet, from_mmdet):
        with pytest.raises(KeyError, match="no counterpart"):
            rename("classifier.weight", model)


def test_every_entry_is_checked(case: Case) -> None:
    assert [name for name in case.arrays if not any(re.fullmatch(known, name) for known in CHECKED)] == []


def test_features(case: Case, image: int, evaluation: Evaluation) -> None:
    assert_map(evaluation.batch.images, case.arrays, f"i{image}/input")
    assert len(evaluation.backbone) == 4 and len(evaluation.fpn) == 5
    for level, feature in enumerate(evaluation.backbone):
        assert_map(feature, case.arrays, f"i{image}/backbone{level}")
    for level, feature in enumerate(evaluation.fpn):
        assert list(feature.shape) == case.arrays[f"i{image}/fpn{level}_shape"].tolist()
        assert_map(feature, case.arrays, f"i{image}/fpn{level}")


def test_maps_of_the_dense_head(case: Case, image: int, evaluation: Evaluation) -> None:
    for level, (logits, deltas) in enumerate(zip(evaluation.logits, evaluation.deltas, strict=True)):
        assert_map(logits, case.arrays, f"i{image}/cls{level}")
        assert_map(deltas, case.arrays, f"i{image}/reg{level}")


def test_proposals(case: Case, image: int, evaluation: Evaluation) -> None:
    case.require(f"i{image}/proposals")
    assert evaluation.proposals is not None
    assert_proposals(evaluation.proposals, 0, case.arrays[f"i{image}/proposals"])


@torch.no_grad()
def test_box_heads(case: Case, image: int, evaluation: Evaluation) -> None:
    case.require(f"i{image}/roi0")
    assert isinstance(case.detector, TwoStage)
    assert f"i{image}/roi{len(evaluation.box_heads)}_rois" not in case.arrays
    for number, seen in enumerate(evaluation.box_heads):
        name = f"i{image}/roi{number}"
        assert_map(seen.features, case.arrays, f"{name}_feat")
        assert_map(seen.logits, case.arrays, f"{name}_cls")
        assert_map(seen.deltas, case.arrays, f"{name}_reg")

        shown = case.arrays[f"{name}_rois"][:, 1:]
        refined = seen.rois[torch.arange(len(shown)) * len(seen.rois) // len(shown)].numpy()
        assert np.abs(refined - shown).max() <= BOX_ERROR
        # Of the file's own boxes, so that an earlier head's rounding does not count.
        logits, deltas = case.detector.roi_head(evaluation.fpn, torch.from_numpy(shown[None]), number)
        expected = case.arrays[f"{name}_reg"]  # the first values of each
        assert largest_error(logits[0].numpy(), case.arrays[f"{name}_cls"]) <= TOLERANCE
        assert largest_error(deltas[0].flatten(1)[:, : expected.shape[1]].numpy(), expected) <= TOLERANCE


def test_detections(case: Case, image: int, evaluation: Evaluation) -> None:
    assert_detections(evaluation.detections, detections_of_file(case.arrays, f"i{image}/"))


def test_masks(case: Case, image: int, evaluation: Evaluation) -> None:
    case.require(f"i{image}/mask_")
    found, expected = evaluation.detections, detections_of_file(case.arrays, f"i{image}/")
    assert found.masks is not None
    areas, shape, probabilities, packed = (
        case.arrays[f"i{image}/mask_{part}"] for part in ("areas", "shape", "probs_top5", "packed_top2")
    )
    assert shape.tolist() == [len(expected), *golden.SIZES[image]]
    rows = counterparts(expected, found)
    assert_mask_areas(found, rows, areas, golden.SIZES[image])

    rows = rows[: len(probabilities)]
    assert (rows >= 0).all()
    assert largest_error(found.masks[rows].numpy(), probabilities) <= TOLERANCE

    theirs = np.unpackbits(packed).reshape(-1, *shape[1:]).astype(bool)
    best = found.keep(rows[: len(theirs)])
    pasted = paste_masks(best.masks.numpy(), best.boxes.numpy(), golden.SIZES[image])
    for mine, other, probability, box in zip(pasted, theirs, best.masks, best.boxes, strict=True):
        sizes = np.array([golden.SIZES[image]])
        (top, left), inside = next(paste_windows(probability.numpy()[None], box.numpy()[None], sizes))
        sure = np.ones(mine.shape, bool)
        sure[top : top + inside.shape[0], left : left + inside.shape[1]] = np.abs(inside - 0.5) > DOUBTFUL
        assert np.array_equal(mine & sure, other & sure)


def test_detections_in_the_original_frame(case: Case) -> None:
    case.require("i1/rescaled_")
    size = (160, 211)
    found = case.detector.detect(golden.batch(1, scale=1.25, original_size=size))
    expected = detections_of_file(case.arrays, "i1/rescaled_")
    assert_detections(found, expected, SCORE_ERROR)
    if case.detector.has_masks:
        rows = counterparts(expected, found, SCORE_ERROR)
        assert_mask_areas(found, rows, case.arrays["i1/rescaled_mask_areas"], size)


@pytest.mark.parametrize("images", [(0,), (1,), (0, 1)], ids=["b0", "b1", "b01"])
def test_training(case: Case, trained: Detector, draws: list[list[int]], images: tuple[int, ...]) -> None:
    prefix = f"b{''.join(map(str, images))}/"
    case.require(prefix)
    batch, with_gradients = golden.batch(*images), f"{prefix}grad_norms" in case.arrays
    with torch.set_grad_enabled(with_gradients):
        features = trained.features(batch)
        losses = trained.losses(features, batch)
    assert_losses(losses, case.arrays, prefix)
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(case.arrays[f"{prefix}total"].item(), rel=TOLERANCE)
    assert draws == case.arrays[f"{prefix}sampled"].tolist()

    if isinstance(trained, TwoStage):
        with torch.no_grad():
            proposals = trained.rpn.proposals(features, *trained.rpn(features), batch)
        for position in range(len(images)):
            assert_proposals(proposals, position, case.arrays[f"{prefix}proposals{position}"])

    if with_gradients:
        total.backward()
        norms = {
            to_mmdet(name, MODELS[case.name]): torch.linalg.vector_norm(weight.grad, dtype=torch.float64).item()
            for name, weight in trained.named_parameters()
            if weight.grad is not None
        }
        trained.zero_grad()
        names, expected = case.arrays["param_names"].tolist(), case.arrays[f"{prefix}grad_norms"].tolist()
        assert norms == pytest.approx(dict(zip(names, expected, strict=True)), rel=GRADIENT_TOLERANCE)


@torch.no_grad()
def test_roi_losses_of_fixed_proposals(case: Case, trained: Detector, draws: list[list[int]]) -> None:
    case.require("r01/")
    assert isinstance(trained, TwoStage)
    batch = golden.batch(0, 1)
    proposals = fixed_proposals(np.stack([case.arrays["jitter0"], case.arrays["jitter1"]]))
    losses = trained.roi_head.losses(trained.features(batch), proposals, batch)
    assert_losses(losses, case.arrays, "r01/")
    assert draws == case.arrays["r01/sampled"].tolist()


# The parts alone, against golden_ops.npz.

OPS_CHECKED = (
    r"anchor_(rpn|retina)_(base|featsizes|level3|counts|valid_counts|inside_count_border(-1|0))",
    r"coder_in_(priors|targets|deltas)|coder_(encode|decode|decode_noclip)_(1\.0|0\.1|0\.05|0\.033)",
    r"roi_(in_rois|out7|out14|levels)",
    r"nms_(in_(boxes|scores|labels)|keep_0\.[57])|mcnms_(in_boxes|in_scores|dets|labels)",
    r"assign_in_(gt|labels|rcnn_priors)|assign_(rpn|retina|rcnn|rcnn_lowq)_gt_inds|iou_rcnn",  # labels do not count
    r"masktgt_(in_boxes|out)",
    r"paste_(in_masks|in_boxes|out|prob0)",
)


@pytest.fixture(scope="module")
def ops() -> Arrays:
    return read("golden_ops.npz")


def test_every_entry_of_ops_is_checked(ops: Arrays) -> None:
    assert [name for name in ops if not any(re.fullmatch(known, name) for known in OPS_CHECKED)] == []


def dense_head(detector: Detector) -> tuple[str, Anchors, Matching]:
    """The file's name of the head that covers every cell, its anchors, and which of them learn which object."""
    if isinstance(detector, RetinaNet):
        return "retina", detector.head.anchors, detector.head.matching
    assert isinstance(detector, TwoStage)
    return "rpn", detector.rpn.anchors, detector.rpn.matching


def test_anchors(case: Case, ops: Arrays) -> None:
    kind, anchors, _ = dense_head(case.detector)
    features = [torch.zeros(1, 1, *size) for size in ops[f"anchor_{kind}_featsizes"].tolist()]
    levels = anchors(features)
    base = torch.stack([level[: anchors.per_cell] for level in levels])  # of the cell at (0, 0)
    assert largest_error(base.numpy(), ops[f"anchor_{kind}_base"]) <= 1e-6
    assert largest_error(levels[3].numpy(), ops[f"anchor_{kind}_level3"]) <= 1e-6
    counts = [len(level) for level in levels]
    assert counts == ops[f"anchor_{kind}_counts"].tolist()

    usable = anchors.inside_padding(features, torch.tensor([[224, 288]]))  # in a batch padded to 224 x 352
    assert [int(level.sum()) for level in usable[0].split(counts)] == ops[f"anchor_{kind}_valid_counts"].tolist()
    assert int(usable.sum()) == ops[f"anchor_{kind}_inside_count_border-1"].item()
    usable &= inside_images(torch.cat(levels), torch.tensor([[200, 264]]))  # the image itself
    assert int(usable.sum()) == ops[f"anchor_{kind}_inside_count_border0"].item()


@pytest.mark.parametrize(
    ("name", "stds"),
    [
        ("1.0", (1.0, 1.0, 1.0, 1.0)),
        ("0.1", (0.1, 0.1, 0.2, 0.2)),
        ("0.05", (0.05, 0.05, 0.1, 0.1)),
        ("0.033", (0.033, 0.033, 0.067, 0.067)),
    ],
)
def test_coder(ops: Arrays, name: str, stds: tuple[float, float, float, float]) -> None:
    priors, targets, deltas = (torch.from_numpy(ops[f"coder_in_{part}"]) for part in ("priors", "targets", "deltas"))
    sizes = torch.tensor([[224, 320]])
    encoded = encode(priors, targets, stds)
    assert largest_error(encoded.numpy(), ops[f"coder_encode_{name}"]) <= 1e-6
    assert (
        largest_error(decode(priors[None], deltas[None], stds, sizes)[0].numpy(), ops[f"coder_decode_{name}"]) <= 1e-6
    )
    free = torch.from_numpy(ops[f"coder_decode_noclip_{name}"])
    assert np.array_equal(clip(free[None], sizes)[0].numpy(), ops[f"coder_decode_{name}"])
    away = 2.0**13  # from every border, so that nothing is clipped
    moved = decode((priors + away)[None], deltas[None], stds, torch.full((1, 2), 2 * away))[0] - away
    assert largest_error(moved.numpy(), free.numpy()) <= 1e-5
    assert torch.allclose(decode(priors[None], encoded[None], stds, sizes)[0], targets, atol=1e-3)


def test_roi_align(ops: Arrays) -> None:
    rois = ops["roi_in_rois"]  # image, box; in two images of 448 x 512 pixels
    boxes, images = torch.from_numpy(rois[:, 1:]), torch.from_numpy(rois[:, 0]).long()
    assert roi_levels(boxes, 4).tolist() == ops["roi_levels"].tolist()
    # The maps are not in the file: level l is the standard normal stream of seed 70 + l.
    maps = [
        torch.from_numpy(
            np.random.RandomState(70 + level).standard_normal((2, 4, 448 // stride, 512 // stride))
        ).float()
        for level, stride in enumerate(STRIDES[:4])
    ]
    for cells in (7, 14):
        expected = ops[f"roi_out{cells}"]  # its first channels only
        pooled = pyramid_roi_align(maps, list(STRIDES[:4]), images, boxes, cells)
        assert largest_error(pooled[:, : expected.shape[1]].numpy(), expected) <= 1e-5


@pytest.mark.parametrize("threshold", ["0.5", "0.7"])
def test_nms(ops: Arrays, threshold: str) -> None:
    boxes, scores, labels = (torch.from_numpy(ops[f"nms_in_{part}"]) for part in ("boxes", "scores", "labels"))
    kept = grouped_nms(boxes, scores, labels, float(threshold))
    assert kept.tolist() == ops[f"nms_keep_{threshold}"].tolist()


def test_class_wise_nms(ops: Arrays) -> None:
    scores = torch.from_numpy(ops["mcnms_in_scores"])[:, :-1]  # without the background
    boxes = torch.from_numpy(ops["mcnms_in_boxes"]).view(*scores.shape, 4)
    roi, label = torch.nonzero(scores > 0.05, as_tuple=True)
    candidates = Detections(torch.zeros_like(roi), boxes[roi, label], scores[roi, label], label)
    found = best_detections(candidates, 1, scores.shape[1], nms_threshold=0.5, max_detections=50)
    assert found.labels.tolist() == ops["mcnms_labels"].tolist()
    assert np.array_equal(torch.cat([found.boxes, found.scores[:, None]], dim=1).numpy(), ops["mcnms_dets"])


def test_assignment(case: Case, ops: Arrays) -> None:
    kind, anchors, matching = dense_head(case.detector)
    sizes = [(-(-224 // stride), -(-320 // stride)) for stride in anchors.strides]
    references = torch.cat(anchors([torch.zeros(1, 1, *size) for size in sizes]))
    assert assigned(matching, references, ops) == ops[f"assign_{kind}_gt_inds"].tolist()
    if isinstance(case.detector, TwoStage):
        matching = case.detector.roi_head.refinements[0].matching
        assert matching.low_quality == (0.5 if case.detector.has_masks else None)  # the file's boxes do not tell
        kind = "rcnn_lowq" if case.detector.has_masks else "rcnn"
        references = torch.from_numpy(ops["assign_in_rcnn_priors"])
        assert assigned(matching, references, ops) == ops[f"assign_{kind}_gt_inds"].tolist()


def assigned(rule: Matching, references: Tensor, ops: Arrays) -> list[int]:
    """MMDetection's numbers for `references` [N, 4]: an object's from 1, 0 for a negative, -1 for neither."""
    # The file's objects in a batch with a fuller image: the empty slots must not count.
    boxes = torch.cat([torch.from_numpy(ops["assign_in_gt"]), torch.zeros(2, 4)])[None]
    valid = boxes.any(dim=-1)
    usable = torch.ones(1, len(references), dtype=torch.bool)
    matches = match(rule, references[None], usable, boxes, valid, torch.zeros_like(valid))
    return torch.where(matches.positive, matches.target + 1, torch.where(matches.negative, 0, -1))[0].tolist()


def test_overlaps(ops: Arrays) -> None:
    objects, references = torch.from_numpy(ops["assign_in_gt"]), torch.from_numpy(ops["assign_in_rcnn_priors"])
    assert largest_error(overlaps(objects[None], references[None])[0][0].numpy(), ops["iou_rcnn"]) <= 1e-6


def test_mask_targets(ops: Arrays) -> None:
    # Of the masks of image 0, each in turn, whose boxes were moved a little.
    boxes, masks = torch.from_numpy(ops["masktgt_in_boxes"]), golden.masks(0)
    targets = mask_targets(masks, torch.arange(len(boxes)) % len(masks), boxes, 28)
    assert np.array_equal(targets.numpy(), ops["masktgt_out"])


def test_paste(ops: Arrays) -> None:
    probabilities, boxes, expected = ops["paste_in_masks"][:, 0], ops["paste_in_boxes"], ops["paste_out"]
    size = expected.shape[1:]
    assert np.array_equal(paste_masks(probabilities, boxes, size), expected)

    dense = ops["paste_prob0"].copy()
    (top, left), inside = next(paste_windows(probabilities[:1], boxes[:1], np.array([size])))
    window = dense[top : top + inside.shape[0], left : left + inside.shape[1]]
    assert largest_error(inside, window) <= 1e-5
    window[:] = 0
    assert dense.max() < 0.5
