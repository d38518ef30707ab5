"""Each detector's whole way in small: pre-train, be interrupted, fine-tune, evaluate, predict. Masks of every kind, and
training from scratch without BatchNorm."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import Tensor, nn

from direct_pt import from_pretrained
from direct_pt.checkpoint import read_history
from direct_pt.coco_eval import METRICS
from direct_pt.models.detector import MODELS, DetectorConfig, RetinaNet, TwoStage, build_detector
from direct_pt.models.layers import batchnorms
from direct_pt.recipes import STAGES, make_optimizer, paper_optimizer

SHORT, LONG = 75, 110  # of stage 2: no multiples of Swin's windows, nor of any stride
RPN, ROI = {"rpn_objectness", "rpn_box"}, {"roi_class", "roi_box"}
CASCADE = {f"roi{number}_{kind}" for number in range(3) for kind in ("class", "box")}
SWIN = "swin_tiny_patch4_window7_224"
# Parameters by name: of the norm layers, and position tables.
RESNET_NORMS = r"\.(bn\d|downsample\.1)\."
SWIN_NORMS = r"\.norm\d?\.|^backbone\.norms\.|relative_position_bias_table$"
CONVNEXT_NORMS = r"\.stem_1\.|\.norm\.|\.downsample\.0\.|^backbone\.norms\."
RESNET_FIRST_STAGE = r"^backbone\.network\.(conv1|bn1|layer1)\."


@dataclass(frozen=True)
class Case:
    """A detector, its losses, a backbone (small, but for Swin), which parameters get no weight decay, how many."""

    model: str
    losses: set[str]
    backbone: str = "resnet18"
    exempt: str = RESNET_NORMS
    exempt_count: int = 2 * 20

    @property
    def has_layernorm(self) -> bool:
        return self.exempt != RESNET_NORMS

    @property
    def has_masks(self) -> bool:
        return "mask" in self.losses

    def flags(self, *more: object) -> tuple[object, ...]:
        """For two steps of either stage."""
        lr = 2e-4 if self.has_layernorm else 0.002
        return (*runs.COUNTS, *runs.MACHINE, "--lr", lr, "--warmup-steps", 1, "--max-steps", 2,
                "--log-every", 1, *more)  # fmt: skip

    def is_frozen(self, name: str) -> bool:
        """In stage 2: BatchNorm with its statistics, stem and first stage; where there is no BatchNorm, nothing."""
        return not self.has_layernorm and re.search(f"{RESNET_FIRST_STAGE}|{RESNET_NORMS}", name) is not None


CASES = {
    "retinanet": Case("retinanet_r50_fpn", {"class", "box"}),
    "faster_rcnn": Case("faster_rcnn_r50_fpn", RPN | ROI),
    "cascade_rcnn": Case("cascade_rcnn_r50_fpn", RPN | CASCADE),
    "mask_rcnn": Case("mask_rcnn_r50_fpn", RPN | ROI | {"mask"}),
    # 12 blocks with two norms and a table each; after the stem, before three stages, behind the four outputs.
    "mask_rcnn_swin": Case("mask_rcnn_swin_t_fpn", RPN | ROI | {"mask"}, SWIN, SWIN_NORMS, 2 * (24 + 1 + 3 + 4) + 12),
    # 12 blocks with one.
    "faster_rcnn_convnext": Case(
        "faster_rcnn_r50_fpn", RPN | ROI, "convnextv2_atto", CONVNEXT_NORMS, 2 * (12 + 1 + 3 + 4)
    ),
}
WITH_LAYERNORM = [name for name, case in CASES.items() if case.has_layernorm]


def stage_one_flags(case: Case, data: Path) -> tuple[object, ...]:
    """Without an evaluation; a state after each step."""
    body = () if case.model == "mask_rcnn_swin_t_fpn" else ("--backbone", case.backbone)  # Swin comes by the name
    sizes = ("--image-size", runs.SIZE, "--global-batch-size", 4, "--micro-batch-size", 4, "--channels", 32)
    return (*runs.train_part(data), *case.flags("--model", case.model, *body, *sizes, "--save-every", 1))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """One detector after another."""
    return CASES[request.param]


@pytest.fixture(scope="module")
def stage_one(case: Case, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Its pre-trained run, which tests must leave as it is. Swin's take a gigabyte: none outlives its tests."""
    run = tmp_path_factory.mktemp("stage_one") / "run"
    runs.train("pretrain", *stage_one_flags(case, demo), "--output-dir", run)
    yield run
    shutil.rmtree(run)


@pytest.fixture(scope="module")
def stage_two(case: Case, stage_one: Path, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The fine-tuned run that follows, with an evaluation at the end."""
    run = tmp_path_factory.mktemp("stage_two") / "run"
    sizes = ("--short-side", SHORT, "--long-side", LONG, "--global-batch-size", 2, "--micro-batch-size", 2)
    flags = ("--data", demo, *case.flags(*sizes, *runs.NO_EVALUATION))
    runs.train("finetune", *flags, "--init", stage_one, "--output-dir", run)
    yield run
    shutil.rmtree(run)


def optimizer_state(run: Path) -> dict[str, Tensor]:
    """By "parameter name/entry"."""
    return load_file(run / "checkpoints/step-2/optimizer.safetensors")


# Training


@runs.cpu_only
def test_resumed_is_uninterrupted(case: Case, stage_one: Path, demo: Path, tmp_path: Path) -> None:
    """To the bit; with drop path, also what it draws."""
    run = tmp_path / "run"
    shutil.copytree(stage_one, run, ignore=shutil.ignore_patterns("step-2", "model"))
    runs.train("pretrain", *stage_one_flags(case, demo), "--output-dir", run, "--resume")
    assert runs.largest_difference(runs.weights(run), runs.weights(stage_one)) == 0
    assert runs.largest_difference(*map(optimizer_state, (run, stage_one))) == 0
    assert runs.records(run) == runs.records(stage_one) and read_history(run) == read_history(stage_one)
    first = runs.weights(stage_one / "checkpoints/step-1")
    assert runs.largest_difference(runs.weights(run), first) > 0
    shutil.rmtree(run)


def test_optimizers_and_weight_decay(case: Case, stage_one: Path, stage_two: Path) -> None:
    """What it keeps of each parameter that trains, as saved; and which of them decay, as it was built."""
    parameters = dict(from_pretrained(stage_one).named_parameters())
    entries = ("exp_avg", "exp_avg_sq", "step") if case.has_layernorm else ("momentum_buffer",)
    for stage, run, trained in (
        ("pretrain", stage_one, list(parameters)),
        ("finetune", stage_two, [name for name in parameters if not case.is_frozen(name)]),
    ):
        saved = optimizer_state(run)
        assert saved.keys() == {f"{name}/{entry}" for name in trained for entry in entries}
        assert all(saved[f"{name}/{entries[0]}"].shape == parameters[name].shape for name in trained)

        detector = from_pretrained(run)
        if stage == "finetune":
            detector.freeze_for_finetuning()
        recipe = STAGES[stage].recipe(detector.config.name, paper_optimizer(detector.backbone.has_layernorm))
        optimizer = make_optimizer(detector, recipe, recipe.lr)
        names = {id(parameter): name for name, parameter in detector.named_parameters()}
        decayed, exempt, *_ = [*optimizer.param_groups, {"params": [], "weight_decay": 0}]
        assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05 if case.has_layernorm else 1e-4, 0)
        assert [names[id(p)] for p in decayed["params"]] == [n for n in trained if not re.search(case.exempt, n)]
        assert [names[id(p)] for p in exempt["params"]] == [n for n in trained if re.search(case.exempt, n)]
        assert len(exempt["params"]) == (0 if trained != list(parameters) else case.exempt_count)
        if case.has_layernorm:
            assert isinstance(optimizer, torch.optim.AdamW) and decayed["betas"] == (0.9, 0.999)
        else:
            assert isinstance(optimizer, torch.optim.SGD) and decayed["momentum"] == 0.9


def test_losses_and_frozen_parts(case: Case, stage_one: Path, stage_two: Path) -> None:
    for run in (stage_one, stage_two):
        losses = [record["losses"] for record in runs.records(run) if "losses" in record]
        assert len(losses) == 2 and all(set(of_step) == case.losses for of_step in losses)
        assert all(np.isfinite(value) and value > 0 for of_step in losses for value in of_step.values())
    before, after = runs.weights(stage_one), runs.weights(stage_two)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if case.is_frozen(name)}
    assert len(frozen) == (0 if case.has_layernorm else 20 * 5 + 5) and frozen <= unchanged  # BatchNorm, convolutions
    # In images so small no coarse anchor lies inside, where Cascade R-CNN's learn.
    idle = {f"fpn.output.{level}.bias" for level in (2, 3)} if "cascade" in case.model else set()
    assert unchanged - frozen <= idle
    assert [stage["stage"] for stage in read_history(stage_two)] == ["pretrain", "finetune"]
    config = from_pretrained(stage_two).config
    assert (config.name, config.backbone, config.short_side, config.long_side) == (
        case.model,
        case.backbone,
        SHORT,
        LONG,
    )


@pytest.mark.parametrize("name", WITH_LAYERNORM)
def test_drop_path(name: str) -> None:
    """In training, from nothing in the first block to 0.2 in the last; not when the detector is used."""
    config = DetectorConfig.from_paper(CASES[name].model, ("a", "b"), (1, 2))
    config = replace(config, backbone=CASES[name].backbone, channels=32, proposals=64, short_side=64, long_side=64)
    detector = build_detector(config.name, config=config)
    detector.freeze_for_finetuning()
    assert all(parameter.requires_grad for parameter in detector.parameters()) and detector.training
    rates = [layer.drop_prob for layer in detector.modules() if isinstance(layer, DropPath)]
    assert (
        len(rates) >= 11 and rates == sorted(rates) and 0 < rates[0] < 0.02 + 1e-9 and rates[-1] == pytest.approx(0.2)
    )
    images = torch.randn(2, 3, 64, 64)

    def coarsest(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return detector.backbone(images)[-1]

    assert torch.equal(coarsest(0), coarsest(0)) and not torch.allclose(coarsest(0), coarsest(1))
    photo = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    found = [detector.predict([photo], score_threshold=0.05)[0] for _ in range(2)]
    assert detector.training and all(np.array_equal(found[0][key], found[1][key]) for key in found[0])
    detector.eval()
    assert torch.equal(coarsest(0), coarsest(1))


# What is found


def test_evaluate_and_predict(case: Case, stage_two: Path, demo: Path, tmp_path: Path) -> None:
    kinds = {"bbox", "segm"} if case.has_masks else {"bbox"}

    # Its own figures of the last step.
    recorded = runs.records(stage_two)[-1]
    runs.call_script("evaluate", "--checkpoint", stage_two, "--data", demo, *runs.MACHINE, "--output-dir", tmp_path)
    metrics = runs.read_metrics(tmp_path / "metrics.json")
    assert metrics == {key: recorded[key] for key in (*kinds, "per_class")}

    # And of a detector that finds something, some of which is then the truth.
    eager = runs.make_eager(stage_two, tmp_path / "eager")
    evaluate = ("evaluate", "--checkpoint", eager, *runs.MACHINE, "--output-dir", tmp_path)
    runs.call_script(*evaluate, "--data", demo)
    data = runs.make_truth(demo, tmp_path / "predictions.json", tmp_path / "truth")
    runs.call_script(*evaluate, "--data", data)
    metrics = runs.read_metrics(tmp_path / "metrics.json")
    assert set(metrics) == {*kinds, "per_class"}
    for kind in kinds:
        assert set(metrics[kind]) == set(METRICS)
        assert 0.05 < metrics[kind]["AP"] <= metrics[kind]["AP50"] + 1e-12 <= 1 + 1e-12
    assert len(metrics["per_class"]) == 10
    for row in metrics["per_class"].values():
        assert set(row) == {*kinds, "objects"} and all(set(row[kind]) == {"AP", "AP50"} for kind in kinds)
    rows = runs.read_json(tmp_path / "predictions.json")
    assert len(rows) > 100 and all(("segmentation" in row) == case.has_masks for row in rows)

    # Pictures of two files, one of them wider than high, and the same in Python.
    photos = [demo / "images/val_000001.jpg", tmp_path / "wide.png"]
    Image.open(demo / "images/val_000002.jpg").crop((0, 10, 64, 50)).save(photos[1])
    flags = ("--score-threshold", 0.05, "--micro-batch-size", 1, *runs.MACHINE)
    runs.call_script("predict", *photos, "--checkpoint", eager, "--output-dir", tmp_path / "pictures", *flags)
    detector = from_pretrained(eager)
    for number, photo in enumerate(photos, start=1):
        pixels = np.array(Image.open(photo))
        with Image.open(tmp_path / "pictures" / f"{photo.stem}.jpg") as picture:
            assert picture.size == pixels.shape[1::-1]
            assert np.abs(np.array(picture).astype(int) - pixels).mean() > 5  # something is drawn
        rows = [row for row in runs.read_json(tmp_path / "pictures/predictions.json") if row["image_id"] == number]
        (found,) = detector.predict([pixels], score_threshold=0.05)
        assert len(rows) == len(found["scores"]) > 10
        assert [row["category_id"] for row in rows] == found["category_ids"]
        assert [row["category_name"] for row in rows] == found["labels"]
        assert np.array([row["score"] for row in rows]) == pytest.approx(found["scores"], abs=1e-6)
        boxes = np.array([row["bbox"] for row in rows])
        boxes[:, 2:] += boxes[:, :2]
        assert boxes == pytest.approx(found["boxes"], abs=1e-3)
        assert ("masks" in found) == case.has_masks
        if case.has_masks:
            assert_masks(rows, found["masks"], boxes, pixels.shape[:2])


def assert_masks(rows: list[dict[str, Any]], masks: np.ndarray, boxes: np.ndarray, size: tuple[int, ...]) -> None:
    """Run lengths of the image's size hold the same masks, each inside its box."""
    assert masks.dtype == bool and masks.shape == (len(rows), *size) and masks.any()
    for row, mask, (x1, y1, x2, y2) in zip(rows, masks, boxes, strict=True):
        assert row["segmentation"]["size"] == list(size)
        assert np.array_equal(coco_mask.decode(row["segmentation"]).astype(bool), mask)
        inside = np.zeros(size, bool)
        inside[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
        assert not mask[~inside].any()


# Masks in the data


def run_lengths(polygons: list[list[float]], size: int) -> dict[str, Any]:
    """COCO's compressed ones."""
    encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, size, size))
    return {"size": [size, size], "counts": encoded["counts"].decode()}


def mixed_outlines(content: dict[str, Any], size: int) -> dict[str, Any]:
    """An annotation file's first five images: a crowd region as COCO has them, an object of run lengths, objects of
    polygons, and two that nothing learns from, a crowd region and a sliver without any outline."""
    content["images"] = content["images"][:5]
    ids = {image["id"] for image in content["images"]}
    crowd, compressed, *others = [row for row in content["annotations"] if row["image_id"] in ids]
    half = [0, size * size // 2, size * size // 2]  # uncompressed, the left half
    crowd |= {"iscrowd": 1, "bbox": [0, 0, size / 2, size], "segmentation": {"size": [size, size], "counts": half}}
    compressed["segmentation"] = run_lengths(compressed["segmentation"], size)
    bare = {"image_id": max(ids), "category_id": 10, "area": 4}
    sliver = {**bare, "id": 9001, "iscrowd": 0, "bbox": [3, 3, 0.5, 8]}
    region = {**bare, "id": 9002, "iscrowd": 1, "bbox": [3, 3, 9, 9]}
    assert others and all(isinstance(row["segmentation"], list) for row in others)
    content["annotations"] = [crowd, compressed, *others, sliver, region]
    return content


def test_crowds_and_run_lengths_beside_polygons(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are trained on, and evaluated as pycocotools does it."""
    data, run = tmp_path / "data", tmp_path / "run"
    (data / "annotations").mkdir(parents=True)
    (data / "images").symlink_to(demo / "images")
    for split in ("train", "val"):
        content = runs.read_json(demo / f"annotations/instances_{split}.json")
        content = mixed_outlines(content, runs.FILE_SIZE)
        (data / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    flags = ("--model", "mask_rcnn_r50_fpn", "--global-batch-size", 5, "--micro-batch-size", 5, "--max-steps", 2)
    runs.train("pretrain", "--data", data, *runs.PRETRAIN, *flags, "--log-every", 1, "--output-dir", run)
    assert "(2 crowd regions)" in capsys.readouterr().out
    losses = [record["losses"] for record in runs.records(run) if "losses" in record]
    assert len(losses) == 2 and all(np.isfinite(of_step["mask"]) and of_step["mask"] > 0 for of_step in losses)

    # Of what is found, a part is the truth beside the annotated objects: figures that are not 0.
    found, eager = tmp_path / "found", runs.make_eager(run, tmp_path / "eager")
    evaluate = ("evaluate", "--checkpoint", eager, "--data", data, *runs.MACHINE, "--output-dir", found)
    runs.call_script(*evaluate)
    file = data / "annotations/instances_val.json"
    content = runs.read_json(file)
    for number, row in enumerate(runs.read_json(found / "predictions.json")[::9]):
        added = {key: row[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        added |= {"id": 10_000 + number, "iscrowd": 0, "area": float(coco_mask.area(row["segmentation"]))}
        content["annotations"].append(added)
    file.write_text(json.dumps(content))
    runs.call_script(*evaluate)
    metrics = runs.read_metrics(found / "metrics.json")

    for row in content["annotations"]:  # pycocotools cannot do without an outline
        x, y, width, height = row["bbox"]
        row.setdefault("segmentation", [[x, y, x + width, y, x + width, y + height, x, y + height]])
    completed = tmp_path / "completed.json"
    completed.write_text(json.dumps(content))
    for kind in ("bbox", "segm"):
        figures = runs.pycocotools_figures(completed, found / "predictions.json", kind)
        assert list(metrics[kind].values()) == pytest.approx(figures, abs=1e-12)
        assert metrics[kind]["AP"] > 0.05


# From scratch in stage 2, without BatchNorm

NORMED = {  # convolutions of pyramid and heads: laterals, outputs, box or class and box, mask
    "retinanet_r50_fpn": 3 + 5 + 8,
    "faster_rcnn_r50_fpn": 4 + 4 + 4,
    "cascade_rcnn_r50_fpn": 4 + 4,
    "mask_rcnn_r50_fpn": 4 + 4 + 4 + 4,
    "mask_rcnn_swin_t_fpn": 4 + 4 + 4 + 4,
}


@pytest.mark.parametrize("model", MODELS)
def test_groupnorm_everywhere(model: str) -> None:
    """In place of BatchNorm, and after every convolution of pyramid and heads that is no predictor."""
    config = DetectorConfig.from_paper(model, ("a", "b"), (1, 2))
    backbone = config.backbone if "swin" in model else "resnet18"
    detector = build_detector(model, config=replace(config, backbone=backbone, norm="group", channels=64))
    assert not batchnorms(detector) and all(parameter.requires_grad for parameter in detector.parameters())
    in_backbone = [layer for layer in detector.backbone.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(in_backbone) == (0 if "swin" in model else 20)
    lists = [*detector.fpn.lateral, *detector.fpn.output]
    if isinstance(detector, RetinaNet):
        lists += [*detector.head.class_convs, *detector.head.box_convs]
        predictors = [detector.head.logits, detector.head.deltas]
    else:
        assert isinstance(detector, TwoStage)
        heads = detector.roi_head
        lists += [conv for head in heads.box_heads for conv in head.convs]
        lists += list(heads.mask_head.convs) if heads.mask_head else []
        predictors = [detector.rpn.conv, detector.rpn.objectness, detector.rpn.deltas]
        predictors += [layer for head in heads.box_heads for layer in (head.class_logits, head.deltas)]
    assert len(lists) == NORMED[model]
    for entry in lists:
        conv, norm = entry
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.GroupNorm)
        assert norm.num_channels == conv.out_channels == 64
    everywhere = [layer for layer in detector.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(everywhere) == len(in_backbone) + NORMED[model]
    assert all(isinstance(layer, nn.Conv2d | nn.Linear) for layer in predictors)


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_from_scratch_with_groupnorm(name: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything trains, on micro-batches of one or two images, whose coarsest map is a single cell."""
    case, run = CASES[name], tmp_path / "run"
    flags = ("--model", case.model, "--backbone", case.backbone, "--channels", 32, "--norm", "group", "--init", "none")
    sizes = ("--short-side", 96, "--long-side", 128, "--global-batch-size", 4, "--micro-batch-size", 1)
    runs.train("finetune", "--data", demo, *case.flags(*flags, *sizes, *runs.NO_EVALUATION), "--output-dir", run)
    banner = capsys.readouterr().out
    tensors = len(list(from_pretrained(run).parameters()))
    assert f"weights    random: 0 of {tensors} tensors loaded (seed 0); nothing frozen" in banner
    assert f"trainable  {tensors} of {tensors} tensors" in banner and "WARNING" not in banner
    one, two = (runs.records(run)[step] for step in range(2))
    assert set(one["losses"]) == case.losses and np.isfinite([one["loss"], two["loss"]]).all()
    assert from_pretrained(run).config.norm == "group" and not batchnorms(from_pretrained(run))
    assert "AP" in runs.records(run)[-1]["bbox"]
