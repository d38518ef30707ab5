"""The detector on whole batches: order, padding, nothing to learn, sampling, freezing; and its parts by brute force."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
import torch
import torchvision
from torch import Tensor, nn

from direct_pt.batch import Batch, Detections, collate
from direct_pt.data.images import read_image
from direct_pt.data.loader import TrainingImages
from direct_pt.data.sources import find_splits, load_split
from direct_pt.data.transforms import PretrainPreset, has_extent
from direct_pt.errors import InputError
from direct_pt.models.backbone import batchnorms, replace_batchnorm
from direct_pt.models.boxes import grouped_nms
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.models.matching import Matches, Matching, Sampling, match, random_keys, sample
from direct_pt.models.rpn import Proposals
from direct_pt.stage import parameter_groups

CLASSES = 10
ROIS = 16
SIDE = 128  # pixels; smaller ones have no object that an anchor fits


def small_detector(norm: str = "batch", proposals: int = 64) -> Detector:
    """ResNet-18, narrow, with weights that are the same each time."""
    torch.manual_seed(0)
    config = DetectorConfig(
        name=runs.MODEL,
        class_names=tuple(str(digit) for digit in range(CLASSES)),
        category_ids=tuple(range(10, 10 * CLASSES + 1, 10)),
        backbone="resnet18",
        norm=norm,
        channels=32,
        proposals=proposals,
        rois_per_image=ROIS,
        short_side=SIDE,
        long_side=SIDE,
    )
    detector = build_detector(config.name, config=config)
    nn.init.normal_(detector.rpn.objectness.weight, std=1.0)  # scores apart, so that rounding swaps no two of them
    return detector


@pytest.fixture(scope="session")
def images(demo: Path) -> TrainingImages:
    return TrainingImages(load_split(find_splits(demo)["train"]), PretrainPreset(SIDE), seed=0, with_masks=False)


@pytest.fixture
def batch(images: TrainingImages) -> Batch:
    """Four real images, with unequal numbers of objects."""
    batch = collate([images[0, image] for image in range(4)])
    assert len(set(batch.valid.sum(dim=1).tolist())) > 1
    return batch


@pytest.fixture(scope="module")
def group_detector() -> Detector:
    """With GroupNorm: each image on its own, in training too."""
    return small_detector("group").train()


def total(detector: Detector, batch: Batch) -> Tensor:
    losses = detector(batch)
    assert set(losses) == {"rpn_objectness", "rpn_box", "roi_class", "roi_box"}
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values()), losses
    return torch.stack(list(losses.values())).sum()


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some images of a batch, in another order, without masks."""
    tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def with_slots(batch: Batch, more: int) -> Batch:
    """The same batch with `more` empty slots for objects."""
    count = len(batch)
    return replace(
        batch,
        boxes=torch.cat([batch.boxes, torch.zeros(count, more, 4)], dim=1),
        labels=torch.cat([batch.labels, torch.zeros(count, more, dtype=torch.int64)], dim=1),
        valid=torch.cat([batch.valid, torch.zeros(count, more, dtype=torch.bool)], dim=1),
        crowd=torch.cat([batch.crowd, torch.zeros(count, more, dtype=torch.bool)], dim=1),
    )


@torch.no_grad()
def test_loss_does_not_depend_on_the_order_of_images(group_detector: Detector, batch: Batch) -> None:
    expected = total(group_detector, batch).item()
    assert total(group_detector, rows_of(batch, [2, 0, 3, 1])).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_loss_does_not_depend_on_padding_slots(group_detector: Detector, batch: Batch) -> None:
    expected = {name: loss.item() for name, loss in group_detector(batch).items()}
    padded = {name: loss.item() for name, loss in group_detector(with_slots(batch, 5)).items()}
    assert padded == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_loss_is_the_mean_over_micro_batches(group_detector: Detector, batch: Batch) -> None:
    """Each image's loss is its own, whatever stands beside it: what accumulation rests on."""
    alone = [total(group_detector, rows_of(batch, [row])).item() for row in range(len(batch))]
    assert total(group_detector, batch).item() == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("content", ["objects", "nothing", "crowd only", "one image of four empty"])
def test_every_parameter_gets_a_finite_gradient(batch: Batch, norm: str, content: str) -> None:
    if content == "nothing":
        batch = replace(batch, valid=torch.zeros_like(batch.valid), boxes=torch.zeros_like(batch.boxes))
    elif content == "crowd only":
        batch = replace(batch, crowd=batch.valid, valid=torch.zeros_like(batch.valid))
    elif content == "one image of four empty":
        batch.valid[1] = False
    detector = small_detector(norm).train()
    total(detector, batch).backward()
    without = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters() if parameter.grad is not None)
    if content == "objects":
        zero = [name for name, p in detector.named_parameters() if p.grad is not None and not p.grad.any()]
        assert zero == []


def test_slivers_give_no_nan(group_detector: Detector, batch: Batch) -> None:
    """The narrowest box that survives the crop: one step of float32."""
    edge = torch.tensor(float(SIDE))
    batch.boxes[0, 0] = torch.stack([torch.nextafter(edge, edge - 1), torch.tensor(3.0), edge, torch.tensor(30.0)])
    batch.valid[0, 0] = True
    assert total(group_detector, batch).isfinite()


def test_boxes_that_float32_makes_empty_are_dropped() -> None:
    """A crop's edge on an object's edge leaves rounding noise of float64 as its width."""
    boxes = np.array([[448 - 1e-10, 3, 448, 30], [3, 10, 30, 10 + 1e-13], [3, 3, 30, 30.5]])
    assert has_extent(boxes).tolist() == [False, False, True]


def shove_proposals_out(detector: Detector) -> Detector:
    """Every proposal lies beyond the right edge, and has no width left when it is clipped."""
    moved = copy.deepcopy(detector)
    nn.init.zeros_(moved.rpn.deltas.weight)
    with torch.no_grad():
        moved.rpn.deltas.bias.view(-1, 4).copy_(torch.tensor([1000.0, 0.0, 0.0, 0.0]))
    return moved


def test_no_valid_proposal(group_detector: Detector, batch: Batch) -> None:
    detector = shove_proposals_out(group_detector)
    features = detector.features(batch)
    assert not detector.rpn.proposals(features, *detector.rpn(features), batch).valid.any()
    total(detector, batch).backward()  # the objects themselves are RoIs still
    total(detector, replace(batch, valid=torch.zeros_like(batch.valid))).backward()  # and now there are none
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    found = detector.eval().detect(batch)
    assert len(found) == 0 and found.boxes.shape == (0, 4)


def test_empty_proposals_are_not_valid_and_give_no_nan(group_detector: Detector, batch: Batch) -> None:
    """Some proposals without width or height, some NaN-free corner boxes, beside real ones."""
    detector = copy.deepcopy(group_detector)
    with torch.no_grad():  # two of the three anchors of a cell go out of the image or shrink to the limit
        detector.rpn.deltas.bias.view(-1, 4)[0] = torch.tensor([0.0, -1000.0, 0.0, 0.0])
        detector.rpn.deltas.bias.view(-1, 4)[1] = torch.tensor([0.0, 0.0, -1000.0, -1000.0])
        features = detector.features(batch)
        proposals = detector.rpn.proposals(features, *detector.rpn(features), batch)
    sides = proposals.boxes[..., 2:] - proposals.boxes[..., :2]
    assert proposals.boxes.isfinite().all() and (sides[proposals.valid] > 0).all()
    assert 0 < proposals.valid.sum() <= proposals.valid.numel()
    assert total(detector, batch).isfinite()
    found = detector.eval().detect(batch)
    assert found.boxes.isfinite().all() and found.scores.isfinite().all()


def test_invalid_proposals_are_never_sampled(group_detector: Detector, batch: Batch) -> None:
    nowhere = torch.full((len(batch), 8, 4), float("nan"))
    proposals = Proposals(nowhere, torch.full(nowhere.shape[:2], -1.0), torch.zeros(nowhere.shape[:2]).bool())
    rois, _, positive, sampled = group_detector.roi_head.sample(proposals, batch)
    assert torch.equal(sampled, positive) and rois.isfinite().all()
    assert sampled.sum(dim=1).tolist() == batch.valid.sum(dim=1).clamp(max=ROIS // 4).tolist()


def test_detect_on_an_untrained_detector(batch: Batch) -> None:
    detector = small_detector().eval()
    found = detector.detect(batch)
    assert_sound(found, len(batch), batch.original_sizes)
    alone = [detector.detect(rows_of(batch, [row])) for row in range(len(batch))]
    for row, single in enumerate(alone):
        assert torch.allclose(found.of_image(row).boxes, single.boxes, atol=1e-3)
        assert torch.equal(found.of_image(row).labels, single.labels)


def assert_sound(found: Detections, count: int, sizes: Tensor) -> None:
    """Ordered, within the images, at most a hundred each."""
    assert len(found) > 0
    assert (found.image.diff() >= 0).all() and int(found.image.max()) < count
    assert found.image.bincount().max() <= 100
    for row in range(count):
        assert (found.of_image(row).scores.diff() <= 0).all()
    limits = sizes[found.image][:, [1, 0, 1, 0]]
    assert (found.boxes >= 0).all() and (found.boxes <= limits + 1e-3).all()
    assert ((found.scores > 0.05) & (found.scores <= 1)).all()
    assert ((found.labels >= 0) & (found.labels < CLASSES)).all()


def test_predict_images_of_several_sizes(demo: Path) -> None:
    detector = small_detector().train()
    photo = np.array(read_image(sorted((demo / "images").glob("val_*.jpg"))[0]))
    pictures = [photo, photo[:40], photo[:, :7], np.tile(photo, (3, 5, 1)), np.zeros((1, 1, 3), np.uint8)]
    results = detector.predict(pictures)
    assert len(results) == len(pictures) and detector.training
    for picture, result in zip(pictures, results, strict=True):
        count = len(result["scores"])
        assert set(result) == {"boxes", "scores", "labels", "category_ids"}
        assert result["boxes"].shape == (count, 4) and len(result["labels"]) == len(result["category_ids"]) == count
        assert (np.diff(result["scores"]) <= 0).all()
        height, width = picture.shape[:2]
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= np.array([width, height] * 2) + 1e-3).all()
        assert [10 * int(name) + 10 for name in result["labels"]] == result["category_ids"]
    assert all(len(result["scores"]) > 0 for result in results[:2])
    assert all((r["scores"] > 0.999).all() for r in detector.predict(pictures, score_threshold=0.999))
    assert detector.predict([]) == []


# Matching and sampling


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


# What trains


def test_nothing_is_frozen_from_scratch() -> None:
    detector = small_detector().train()
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert all(layer.training for layer in batchnorms(detector)) and len(batchnorms(detector)) == 20
    assert not any(layer.training for layer in batchnorms(detector.eval()))


def test_freeze_for_finetuning() -> None:
    detector = small_detector().train()
    detector.freeze_for_finetuning()
    frozen = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    norms = {
        f"{name}.{part}"
        for name, module in detector.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    first = {name for name, _ in detector.named_parameters() if name.startswith("backbone.network.layer1.")}
    assert frozen == norms | first | {"backbone.network.conv1.weight"}
    for mode in (detector.train(), detector.eval().train()):
        assert mode.training and not any(layer.training for layer in batchnorms(mode))


def test_frozen_batchnorm_keeps_its_statistics(batch: Batch) -> None:
    detector = small_detector().train()
    detector.freeze_for_finetuning()
    before = copy.deepcopy(detector.state_dict())
    optimizer = torch.optim.SGD(parameter_groups(detector, 1e-4), lr=0.01)
    total(detector, batch).backward()
    optimizer.step()
    changed = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, parameter in detector.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameter_groups(norm: str, frozen: bool) -> None:
    detector = small_detector(norm)
    if frozen:
        detector.freeze_for_finetuning()
    decayed, exempt = parameter_groups(detector, 1e-4)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (1e-4, 0.0)
    listed = [id(parameter) for parameter in decayed["params"] + exempt["params"]]
    trained = {id(parameter) for parameter in detector.parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trained
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    norms = {id(p) for m in detector.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for p in m.parameters()}
    assert {names[id(p)] for p in exempt["params"]} == {names[i] for i in norms & trained}
    assert any(names[id(p)].endswith("bias") for p in decayed["params"])  # biases of convolutions decay
    assert bool(exempt["params"]) == (not frozen or norm == "group")


# Building


@pytest.mark.parametrize("backbone", ["resnet18", "regnetx_002"])
def test_replace_batchnorm_leaves_none(backbone: str) -> None:
    """Also where channels are no multiple of 32, and where a norm carries its activation."""
    detector = build_detector(runs.MODEL, 3, backbone)
    count = len(batchnorms(detector))
    image = torch.rand(1, 3, 64, 64)
    shapes = [level.shape for level in detector.eval().backbone(image)]
    replace_batchnorm(detector)
    assert count > 0 and batchnorms(detector) == []
    assert sum(isinstance(module, nn.GroupNorm) for module in detector.modules()) == count
    assert [level.shape for level in detector.backbone(image)] == shapes


def test_residual_branches_start_at_one() -> None:
    assert all((layer.weight == 1).all() for layer in batchnorms(small_detector()))


def test_unknown_model() -> None:
    with pytest.raises(InputError, match=r"--model yolo.*choose one of faster_rcnn_r50_fpn"):
        build_detector("yolo", 3)
    with pytest.raises(InputError, match="num_classes or config"):
        build_detector(runs.MODEL)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet8", "no model of this name; try .*resnet"),
        ("vit_tiny_patch16_224", "no feature maps at strides 4, 8, 16 and 32"),
    ],
)
def test_unfit_backbone(backbone: str, message: str) -> None:
    with pytest.raises(InputError, match=f"--backbone {backbone}: .*{message}"):
        build_detector(runs.MODEL, 3, backbone)
