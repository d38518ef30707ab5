"""The detectors against figures that MMDetection gave for the same weights, images and ground truths.

The files (see `golden.FOLDER`) hold no weights: both sides make them from names and a seed. Differences are measured
against each array's largest value.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import golden
import numpy as np
import pytest
import torch
from golden import largest_error
from torch import Tensor

from direct_pt.batch import Batch, Detections
from direct_pt.mmdet_weights import from_mmdet, to_mmdet
from direct_pt.models import roi_heads, rpn
from direct_pt.models.anchors import Anchors
from direct_pt.models.backbone import batchnorms
from direct_pt.models.boxes import clip, decode, encode, grouped_nms, overlaps
from direct_pt.models.detector import STRIDES, Detector, build_detector
from direct_pt.models.matching import Matches, Matching, Sampling, match, sample
from direct_pt.models.roi_align import pyramid_roi_align, roi_levels
from direct_pt.models.roi_heads import best_detections
from direct_pt.models.rpn import ProposalCounts, Proposals

Arrays = Mapping[str, np.ndarray]

TOLERANCE = 1e-4  # of maps, features, logits, scores and losses
BOX_ERROR = 0.1  # pixels, in images of 320: decoding magnifies differences
GRADIENT_TOLERANCE = 5e-3  # of each gradient's norm: L1 and ReLU have kinks, where another rounding takes another side
FLIPPED_PROPOSALS = 0.01  # share that may differ, from pairs at the NMS threshold and scores at the cut
SURE_SCORE = 0.06  # detections nearer to the score threshold may come and go

MODELS = {"faster_rcnn": "faster_rcnn_r50_fpn"}  # golden_<key>.npz is of our model <value>
LOSSES = {
    "rpn_objectness": "loss_rpn_cls",
    "rpn_box": "loss_rpn_bbox",
    "roi_class": "loss_cls",
    "roi_box": "loss_bbox",
}
CHECKED = (
    r"param_names|jitter\d",
    r"i\d/(input|backbone\d|fpn\d|cls\d|reg\d|roi0_feat)_(stats|samples)|i\d/fpn\d_shape",
    r"i\d/(proposals|roi0_rois|roi0_(cls|reg)(_stats)?)",
    r"i\d/(rescaled_)?(boxes|scores|labels)",
    r"b\d+/(loss_(rpn_)?(cls|bbox)|total|sampled|proposals\d|grad_norms)",
    r"r\d+/(loss_cls|loss_bbox|sampled)",
)


@dataclass
class Case:
    """One golden file (its names without the seed) and our detector with the same weights, in eval mode."""

    name: str
    arrays: Arrays
    detector: Detector

    def require(self, prefix: str) -> None:
        """Skip the test where the file has nothing under `prefix`."""
        if not any(name.startswith(prefix) for name in self.arrays):
            pytest.skip(f"golden_{self.name}.npz has no {prefix}")


@dataclass
class Evaluation:
    """What our detector makes of one image."""

    batch: Batch
    backbone: list[Tensor]
    fpn: list[Tensor]
    logits: list[Tensor]
    deltas: list[Tensor]
    proposals: Proposals
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


def load_weights(detector: Detector, seed: int) -> None:
    """Fill every floating-point weight and buffer by the rule for its MMDetection name."""
    for name, tensor in detector.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(golden.weight(to_mmdet(name), tuple(tensor.shape), seed))


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    contents = read(f"golden_{request.param}.npz")
    seeds = {int(found[1]) for name in contents if (found := re.match(r"s(\d+)[ibr]\d", name))}
    assert len(seeds) == 1, f"one file, one seed: {seeds}"
    arrays = {re.sub(r"^s\d+(?=[ibr]\d)", "", name): values for name, values in contents.items()}
    detector = build_detector(MODELS[request.param], golden.NUM_CLASSES)
    load_weights(detector, seeds.pop())
    return Case(request.param, arrays, detector.eval())


@pytest.fixture(scope="module", params=(0, 1))
def image(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def evaluation(case: Case, image: int) -> Evaluation:
    case.require(f"i{image}/")
    detector, batch = case.detector, golden.batch(image)
    with torch.no_grad():
        backbone = detector.backbone(detector.normalize(batch))
        fpn = detector.fpn(backbone)
        logits, deltas = detector.rpn(fpn)
        proposals = detector.rpn.proposals(fpn, logits, deltas, batch)
    return Evaluation(batch, backbone, fpn, logits, deltas, proposals, detector.detect(batch))


@pytest.fixture(scope="module")
def trained(case: Case) -> Detector:
    """The detector as the losses were made: no randomness, so all candidates count and BatchNorm does not learn."""
    detector = copy.deepcopy(case.detector).train()
    for layer in batchnorms(detector):
        layer.eval()
    detector.rpn.sampling = replace(detector.rpn.sampling, per_image=None)
    detector.roi_head.sampling = replace(detector.roi_head.sampling, per_image=None)
    detector.rpn.train_counts = ProposalCounts(before_nms=2000, after_nms=200)
    return detector


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Filled with (positives, negatives) of every image, at every sampling."""
    counts: list[list[int]] = []

    def recorded(rule: Sampling, matches: Matches, seeds: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
        rows, positive, sampled = sample(rule, matches, seeds, salt)
        assert not (positive & ~sampled).any()
        counts.extend(torch.stack([positive.sum(dim=1), (sampled & ~positive).sum(dim=1)], dim=1).tolist())
        return rows, positive, sampled

    for module in (rpn, roi_heads):
        monkeypatch.setattr(module, "sample", recorded)
    return counts


def detections(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray | None = None) -> Detections:
    """Arrays as the detections of one image."""
    classes = np.zeros(len(scores), np.int64) if labels is None else labels
    rows = torch.zeros(len(scores), dtype=torch.int64)
    return Detections(rows, torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(classes))


def unmatched(some: Detections, others: Detections) -> Tensor:
    """[n] bool: which of `some` have no counterpart among `others`, whatever the order."""
    same = some.labels[:, None] == others.labels
    same &= (some.boxes[:, None] - others.boxes).abs().amax(dim=-1) <= BOX_ERROR
    same &= (some.scores[:, None] - others.scores).abs() <= TOLERANCE
    return ~same.any(dim=1)


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
        assert int(unmatched(one, other).sum()) <= FLIPPED_PROPOSALS * len(expected)


def assert_detections(found: Detections, arrays: Arrays, prefix: str) -> None:
    """What either side is sure of, the other has too."""
    expected = detections(*(arrays[prefix + part] for part in ("boxes", "scores", "labels")))
    assert (found.scores.diff() <= 0).all()
    for one, other in ((found, expected), (expected, found)):
        assert not (unmatched(one, other) & (one.scores > SURE_SCORE)).any()


def assert_losses(losses: dict[str, Tensor], arrays: Arrays, prefix: str) -> None:
    """Losses against the sums of the file's levels."""
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(arrays[prefix + LOSSES[name]].sum(), rel=TOLERANCE), name


def test_names_and_shapes_are_mmdetections() -> None:
    for name, our_name in MODELS.items():
        expected = read(f"keys_{name}.json")
        state = build_detector(our_name, golden.NUM_CLASSES).state_dict()
        assert {to_mmdet(key): list(value.shape) for key, value in state.items()} == expected
        assert {from_mmdet(key) for key in expected} == set(state)


def test_names_without_counterpart() -> None:
    for rename in (to_mmdet, from_mmdet):
        with pytest.raises(KeyError, match="no counterpart"):
            rename("classifier.weight")


def test_every_entry_is_checked(case: Case) -> None:
    assert [name for name in case.arrays if not any(re.fullmatch(known, name) for known in CHECKED)] == []


def test_features(case: Case, image: int, evaluation: Evaluation) -> None:
    assert_map(evaluation.batch.images, case.arrays, f"i{image}/input")
    for level, feature in enumerate(evaluation.backbone):
        assert_map(feature, case.arrays, f"i{image}/backbone{level}")
    for level, feature in enumerate(evaluation.fpn):
        assert list(feature.shape) == case.arrays[f"i{image}/fpn{level}_shape"].tolist()
        assert_map(feature, case.arrays, f"i{image}/fpn{level}")


def test_rpn_maps(case: Case, image: int, evaluation: Evaluation) -> None:
    for level, (logits, deltas) in enumerate(zip(evaluation.logits, evaluation.deltas, strict=True)):
        assert_map(logits, case.arrays, f"i{image}/cls{level}")
        assert_map(deltas, case.arrays, f"i{image}/reg{level}")


def test_proposals(case: Case, image: int, evaluation: Evaluation) -> None:
    assert_proposals(evaluation.proposals, 0, case.arrays[f"i{image}/proposals"])


@torch.no_grad()
def test_roi_outputs(case: Case, image: int, evaluation: Evaluation) -> None:
    # Of the file's own proposals, so that the order of tied scores does not matter.
    proposals = case.arrays[f"i{image}/proposals"]
    rois = torch.from_numpy(proposals[None, :, :4])
    head = case.detector.roi_head
    levels = evaluation.fpn[: len(head.strides)]
    assert_map(
        pyramid_roi_align(levels, head.strides, rois, head.box_head.output_size), case.arrays, f"i{image}/roi0_feat"
    )
    logits, deltas = head(evaluation.fpn, rois)
    assert_map(logits, case.arrays, f"i{image}/roi0_cls")
    assert_map(deltas, case.arrays, f"i{image}/roi0_reg")

    shown = np.arange(16) * len(proposals) // 16
    assert np.array_equal(case.arrays[f"i{image}/roi0_rois"][:, 1:], proposals[shown, :4])
    assert largest_error(logits[0, shown].numpy(), case.arrays[f"i{image}/roi0_cls"]) <= TOLERANCE
    assert largest_error(deltas[0, shown].flatten(1)[:, :16].numpy(), case.arrays[f"i{image}/roi0_reg"]) <= TOLERANCE


def test_detections(case: Case, image: int, evaluation: Evaluation) -> None:
    assert_detections(evaluation.detections, case.arrays, f"i{image}/")


def test_detections_in_the_original_frame(case: Case) -> None:
    case.require("i1/rescaled_")
    batch = golden.batch(1, scale=1.25, original_size=(160, 211))
    assert_detections(case.detector.detect(batch), case.arrays, "i1/rescaled_")


@pytest.mark.parametrize("images", [(0,), (1,), (0, 1)], ids=["b0", "b1", "b01"])
def test_training(case: Case, trained: Detector, draws: list[list[int]], images: tuple[int, ...]) -> None:
    prefix = f"b{''.join(map(str, images))}/"
    case.require(prefix)
    batch = golden.batch(*images)
    losses = trained(batch)
    assert set(losses) == set(LOSSES)
    assert_losses(losses, case.arrays, prefix)
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(case.arrays[f"{prefix}total"].item(), rel=TOLERANCE)
    assert draws == case.arrays[f"{prefix}sampled"].tolist()

    with torch.no_grad():
        features = trained.features(batch)
        logits, deltas = trained.rpn(features)
        proposals = trained.rpn.proposals(features, logits, deltas, batch)
    for position in range(len(images)):
        assert_proposals(proposals, position, case.arrays[f"{prefix}proposals{position}"])

    if f"{prefix}grad_norms" in case.arrays:
        trained.zero_grad()
        total.backward()
        norms = {
            to_mmdet(name): torch.linalg.vector_norm(weight.grad, dtype=torch.float64).item()
            for name, weight in trained.named_parameters()
            if weight.grad is not None
        }
        names, expected = case.arrays["param_names"].tolist(), case.arrays[f"{prefix}grad_norms"].tolist()
        assert norms == pytest.approx(dict(zip(names, expected, strict=True)), rel=GRADIENT_TOLERANCE)


@torch.no_grad()
def test_roi_losses_of_fixed_proposals(case: Case, trained: Detector, draws: list[list[int]]) -> None:
    case.require("r01/")
    batch = golden.batch(0, 1)
    boxes = torch.from_numpy(np.stack([case.arrays["jitter0"], case.arrays["jitter1"]]))
    proposals = Proposals(boxes, torch.ones(boxes.shape[:2]), torch.ones(boxes.shape[:2], dtype=torch.bool))
    losses = trained.roi_head.losses(trained.features(batch), proposals, batch)
    assert_losses(losses, case.arrays, "r01/")
    assert draws == case.arrays["r01/sampled"].tolist()


# The parts alone, against golden_ops.npz. Not here: `anchor_*_inside_count_border0` (only Cascade's RPN asks for
# anchors inside the image), `coder_decode_noclip_*` but for its clipping (our coder always clips), and, until there is
# a mask head, `masktgt_*` and `paste_*`.


@pytest.fixture(scope="module")
def ops() -> Arrays:
    return read("golden_ops.npz")


ANCHORS = {
    "rpn": (STRIDES, (8.0,)),
    "retina": ((8, 16, 32, 64, 128), tuple(4 * 2 ** (third / 3) for third in range(3))),
}


def anchors_of(kind: str) -> Anchors:
    strides, scales = ANCHORS[kind]
    return Anchors(strides, scales, ratios=(0.5, 1.0, 2.0))


@pytest.mark.parametrize("kind", ANCHORS)
def test_anchors(ops: Arrays, kind: str) -> None:
    anchors = anchors_of(kind)
    features = [torch.zeros(1, 1, *size) for size in ops[f"anchor_{kind}_featsizes"].tolist()]
    levels = anchors(features)
    base = torch.stack([level[: anchors.per_cell] for level in levels])  # of the cell at (0, 0)
    assert largest_error(base.numpy(), ops[f"anchor_{kind}_base"]) <= 1e-6
    assert largest_error(levels[3].numpy(), ops[f"anchor_{kind}_level3"]) <= 1e-6
    counts = [len(level) for level in levels]
    assert counts == ops[f"anchor_{kind}_counts"].tolist()

    inside = anchors.inside(features, torch.tensor([[224, 288]]))  # in a batch padded to 224 x 352
    assert [int(level.sum()) for level in inside[0].split(counts)] == ops[f"anchor_{kind}_valid_counts"].tolist()
    assert int(inside.sum()) == ops[f"anchor_{kind}_inside_count_border-1"].item()


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
    assert torch.allclose(decode(priors[None], encoded[None], stds, sizes)[0], targets, atol=1e-3)


def test_roi_align(ops: Arrays) -> None:
    rois = ops["roi_in_rois"]  # image, box; in two images of 448 x 512 pixels
    boxes, images = torch.from_numpy(rois[:, 1:]), rois[:, 0].astype(np.int64)
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
        pooled = pyramid_roi_align(maps, list(STRIDES[:4]), boxes.expand(2, -1, -1), cells).unflatten(0, (2, -1))
        actual = pooled.numpy()[images, np.arange(len(rois)), : expected.shape[1]]
        assert largest_error(actual, expected) <= 1e-5


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


def assignments() -> Iterator[tuple[str, Matching]]:
    yield "rpn", Matching(positive=0.7, negative=0.3, low_quality=0.3)
    yield "retina", Matching(positive=0.5, negative=0.4, low_quality=0.0)
    yield "rcnn", Matching(positive=0.5, negative=0.5)
    yield "rcnn_lowq", Matching(positive=0.5, negative=0.5, low_quality=0.5)


@pytest.mark.parametrize(("name", "rule"), assignments())
def test_assignment(ops: Arrays, name: str, rule: Matching) -> None:
    objects = torch.from_numpy(ops["assign_in_gt"])[None]
    if name in ANCHORS:
        anchors = anchors_of(name)
        sizes = [(-(-224 // stride), -(-320 // stride)) for stride in anchors.strides]
        references = torch.cat(anchors([torch.zeros(1, 1, *size) for size in sizes]))[None]
    else:
        references = torch.from_numpy(ops["assign_in_rcnn_priors"])[None]
        assert largest_error(overlaps(objects, references)[0][0].numpy(), ops["iou_rcnn"]) <= 1e-6

    # The same objects in a batch with a fuller image: the empty slots must not count.
    boxes = torch.cat([objects, torch.zeros(1, 2, 4)], dim=1)
    valid = boxes.any(dim=-1)
    usable = torch.ones(references.shape[:2], dtype=torch.bool)
    matches = match(rule, references, usable, boxes, valid, torch.zeros_like(valid))
    # MMDetection's numbers: an object's from 1, 0 for a negative, -1 for neither.
    numbers = torch.where(matches.positive, matches.target + 1, torch.where(matches.negative, 0, -1))
    assert numbers[0].tolist() == ops[f"assign_{name}_gt_inds"].tolist()
