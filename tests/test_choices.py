"""Flags that change a detector or its images: what "auto" chooses, what is kept on resume, what is refused."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import torch
from conftest import MakeCocoFolder
from small_detectors import small_detector
from test_settings import parse

from direct_pt.batch import Batch
from direct_pt.checkpoint import from_pretrained
from direct_pt.data.formats.coco import find_coco
from direct_pt.data.sources import load_split
from direct_pt.errors import InputError
from direct_pt.models.detector import DetectorConfig, TwoStage, anchors_of, build_detector
from direct_pt.models.layers import batchnorms
from direct_pt.models.roi_align import roi_levels
from direct_pt.recipes import FINETUNE, PRETRAIN, Augmentation
from direct_pt.reports.survey import anchor_recall, whole_image
from direct_pt.training.choices import Choices, choose, fitting_anchor_scale, usual_canvas

pytestmark = runs.cpu_only

EVERYTHING = (
    "--flips", "dihedral", "--color-jitter", 0.4, "--scale-jitter", 0.5, 1.5, "--mix", "mosaic", "--mix-share", 0.6,
    "--canvas", "auto", "--anchor-scale", "auto", "--recompute-norm", "--optimizer", "adamw", "--weight-decay", 0.01,
)  # fmt: skip
LENGTH = (*runs.EIGHT, "--max-steps", 4, "--save-every", 2, "--log-every", 1, *runs.NO_EVALUATION)


def train(stage: str, data: Path, run: Path, *flags: object) -> None:
    own = {"pretrain": runs.TINY, "finetune": runs.FINETUNE}[stage]
    runs.train(stage, "--data", data, *own, *LENGTH, *flags, "--output-dir", run)


def choices_of(run: Path) -> dict[str, Any]:
    return runs.read_json(run / "config.json")["choices"]


# What auto chooses


@pytest.mark.parametrize(
    ("sizes", "image_size", "expected"),
    [
        ([(480, 640)] * 3 + [(2000, 500)], 448, (384, 512)),
        ([(640, 480)], 448, (512, 384)),
        ([(500, 500), (300, 310)], 448, (448, 448)),
        ([(100, 1000)], 160, (64, 512)),
        ([(10, 1000)], 64, (32, 640)),
    ],
)
def test_the_usual_canvas(sizes: list[tuple[int, int]], image_size: int, expected: tuple[int, int]) -> None:
    assert usual_canvas(np.array(sizes), image_size) == expected


@pytest.mark.parametrize("model", ["faster_rcnn_r50_fpn", "retinanet_r50_fpn"])
def test_the_largest_anchors_that_fit(coco_folder: MakeCocoFolder, model: str) -> None:
    """With objects of the paper's size its own; with smaller ones as large as 90 % of them allow, by definition."""
    for side, is_paper in ((60, True), (18, False)):
        boxes = [{"image_id": 10, "bbox": [x, 40, side, side], "area": side**2, "iscrowd": 0} for x in range(0, 200, 9)]
        table = coco_folder([(300, 300)], boxes, name=f"{model}-{side}").load()
        preset = whole_image(300 // 32 * 32)
        scale, share = fitting_anchor_scale(table, model, preset)
        paper = 4.0 if model.startswith("retinanet") else 8.0
        assert (scale == paper) == is_paper
        for one in (scale, scale * 2 ** (1 / 4)):
            config = DetectorConfig.from_paper(model, ("any",), (1,))
            anchors = anchors_of(DetectorConfig(**{**config.to_dict(), "anchor_scale": one}))
            recall = anchor_recall(table, preset, anchors)["all"]["recall"]
            assert (recall >= 0.9) == (one == scale or one > paper)
        assert share >= 0.9


def test_anchors_and_roi_levels_follow_the_scale() -> None:
    """A detector with half the scale is that of an image twice as large, but for its features' strides."""
    paper, half = (build_detector("faster_rcnn_r50_fpn", config=config_with(scale)) for scale in (None, 4.0))
    assert isinstance(paper, TwoStage) and isinstance(half, TwoStage)
    torch.testing.assert_close(half.rpn.anchors.cell_anchors * 2, paper.rpn.anchors.cell_anchors)
    assert (half.roi_head.finest_scale, paper.roi_head.finest_scale) == (28, 56)
    sides = torch.tensor([20.0, 50, 60, 100, 120, 230, 500])
    boxes = torch.stack([torch.zeros(7), torch.zeros(7), sides, sides], dim=1)
    assert roi_levels(boxes, 4, 28).tolist() == roi_levels(boxes * 2, 4, 56).tolist() == [0, 0, 1, 1, 2, 3, 3]
    eight = build_detector("faster_rcnn_r50_fpn", config=config_with(8.0))
    assert isinstance(eight, TwoStage)
    assert torch.equal(eight.rpn.anchors.cell_anchors, paper.rpn.anchors.cell_anchors)


def config_with(anchor_scale: float | None) -> DetectorConfig:
    config = DetectorConfig.from_paper("faster_rcnn_r50_fpn", ("any",), (1,))
    return DetectorConfig(**{**config.to_dict(), "backbone": "resnet18", "channels": 16, "anchor_scale": anchor_scale})


def test_small_sets_and_large_ones_begin_with_the_papers_images(demo: Path) -> None:
    """Until measurements say otherwise: nothing differs without a flag."""
    table = load_split(find_coco(demo)["train"])
    for stage in (PRETRAIN, FINETUNE):
        for recipe in ("small", "paper"):
            given = parse(stage.name, "--data", demo, "--recipe", recipe).to_dict()
            assert choose(stage, given, None, 96, table, None) == Choices(Augmentation())


# A run with everything


def test_everything_at_once_and_to_the_bit_after_a_stop(demo: Path, tmp_path: Path) -> None:
    """The banner and config.json name it; resumed, even with other data that auto would choose otherwise for."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train("pretrain", demo, whole, *EVERYTHING)
    train("pretrain", demo, stopped, *EVERYTHING, "--max-steps", 4)
    shutil.rmtree(stopped / "checkpoints/step-4")
    train("pretrain", demo, stopped, *EVERYTHING, "--resume")
    assert runs.largest_difference(runs.weights(whole), runs.weights(stopped)) == 0
    found = choices_of(whole)
    assert found["flips"] == "dihedral" and found["scale_jitter"] == [0.5, 1.5] and found["mix_share"] == 0.6
    assert found["canvas"] == [96, 96] and isinstance(found["anchor_scale"], float)
    assert choices_of(stopped) == found
    assert from_pretrained(whole).config.anchor_scale == found["anchor_scale"]


def test_banner_names_what_differs(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train("pretrain", demo, run, *EVERYTHING)
    out = capsys.readouterr().out
    for text in (
        "images vary by --scale-jitter 0.5 1.5, --mix mosaic, --mix-share 0.6, --flips dihedral, --color-jitter 0.4",
        "--canvas auto: crops of 96x96, the images' usual shape",
        "--anchor-scale auto: ",
        "AdamW, weight decay 0.01",
        "--recompute-norm: BatchNorm's statistics are computed anew at the end",
        "--flips dihedral turns images upside down, and the classes look like characters",
    ):
        assert text in out
    train("pretrain", demo, run, *EVERYTHING, "--resume")
    assert "images vary by --scale-jitter 0.5 1.5" in capsys.readouterr().out
    train("finetune", demo, tmp_path / "second", "--init", run, "--flips", "none", "--freeze", "norm")
    out = capsys.readouterr().out
    assert "images vary by --flips none" in out and "; BatchNorm frozen" in out
    assert from_pretrained(tmp_path / "second").config.anchor_scale == choices_of(run)["anchor_scale"]


def test_runs_from_before_go_on_as_they_began(demo: Path, tmp_path: Path) -> None:
    """Their config.json has no choices: the paper's, whatever a recipe says by now."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        train("pretrain", demo, folder)
        shutil.rmtree(folder / "checkpoints/step-4")
    config = runs.read_json(run / "config.json")
    del config["choices"]
    config["settings"] = {
        name: value
        for name, value in config["settings"].items()
        if name not in {one.name for one in fields(Augmentation)}
    }
    (run / "config.json").write_text(json.dumps(config))
    for folder in (run, other):
        train("pretrain", demo, folder, "--resume")
    assert runs.largest_difference(runs.weights(run), runs.weights(other)) == 0


def test_other_flags_are_refused_on_resume(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("pretrain", demo, tmp_path / "run", "--flips", "both", "--anchor-scale", 6)
    assert "note       --anchor-scale 6.0" in capsys.readouterr().out
    config = tmp_path / "run/config.json"
    content = config.read_text()
    for old, new in (('"mix_share"', '"mixed"'), ('"choices": {', '"choices": "none", "other": {')):
        assert old in content
        config.write_text(content.replace(old, new))
        with pytest.raises(InputError, match=r"config.json: its choices cannot be read"):
            train("pretrain", demo, tmp_path / "run", "--flips", "both", "--anchor-scale", 6, "--resume")
    config.write_text(content)
    with pytest.raises(InputError, match=r"--flips is 'horizontal' but the run in .* was started with 'both'"):
        train("pretrain", demo, tmp_path / "run", "--flips", "horizontal", "--anchor-scale", 6, "--resume")


# Parts of a run


def test_freezing(batch: Batch) -> None:
    """All, BatchNorm alone, or nothing, which then keeps its running statistics in step."""
    for kind, frozen_stem, frozen_norm in (("paper", True, True), ("norm", False, True), ("none", False, False)):
        detector = small_detector().train()
        detector.freeze_for_finetuning(kind)
        norms = batchnorms(detector)
        assert all(layer.training != frozen_norm for layer in norms)
        assert all(layer.weight.requires_grad != frozen_norm for layer in norms)
        assert detector.backbone.network.conv1.weight.requires_grad != frozen_stem


def test_recomputed_statistics_are_those_of_the_training_images(demo: Path, tmp_path: Path) -> None:
    """The means over all images, not the last batches': other than without, the weights the same."""
    for name, flags in (("plain", ()), ("anew", ("--recompute-norm",))):
        train("pretrain", demo, tmp_path / name, *flags)
    plain, anew = (runs.weights(tmp_path / name) for name in ("plain", "anew"))
    changed = {name for name in plain if not torch.equal(plain[name], anew[name])}
    assert changed and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in changed)
    first = next(name for name in sorted(anew) if name.endswith("num_batches_tracked"))
    assert int(anew[first]) == runs.TRAIN_IMAGES // 8


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_preview(stage: str, demo: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture, and no run: the folder can be trained into afterwards."""
    flags = ("--init", pretrained) if stage == "finetune" else EVERYTHING
    train(stage, demo, tmp_path / "run", *flags, "--preview", 5)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["samples.jpg"]
    assert "5 samples" in capsys.readouterr().out
    train(stage, demo, tmp_path / "run", *flags, "--preview", 2)  # over its own picture
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/samples.jpg").write_bytes(b"a photograph")
    with pytest.raises(InputError, match=r"samples.jpg: is no picture that --preview made"):
        train(stage, demo, tmp_path / "photos", *flags, "--preview", 2)
    assert (tmp_path / "photos/samples.jpg").read_bytes() == b"a photograph"
    train(stage, demo, tmp_path / "run", *flags, "--max-steps", 1)


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scale-jitter", 1.2, 0.8), "--scale-jitter 1.2 0.8 is upside down: give 0.8 1.2"),
        (("--scale-jitter", 1), "--scale-jitter: expected 2 arguments"),
        (("--scale-jitter", 0, 1), "0 must be above 0"),
        (("--scale-jitter", 0.5, 100), "100 must be from 0.05 to 10"),
        (("--anchor-scale", 0), "0 must be above 0"),
        (("--anchor-scale", 1000), "1000 must be from 0.25 to 64, or auto"),
        (("--anchor-scale", "automatic"), "'automatic' is not a number"),
        (("--canvas", "500x400"), "500x400: 500 is no multiple of 32: use 480 or 512"),
        (("--canvas", "wide"), "'wide' is neither square, auto nor a size such as 512x384"),
        (("--canvas", "0x64"), "0x64: must be above 0"),
        (("--color-jitter", 1.5), "1.5 must be from 0 to 0.9"),
        (("--flips", "diagonal"), "invalid choice: 'diagonal'"),
        (("--mix", "cutmix"), "invalid choice: 'cutmix'"),
        (("--mix-share", 0.5), "--mix-share 0.5 needs --mix: give --mix mosaic or --mix copy-paste"),
        (("--mix", "mosaic", "--mix-share", 1.5), "1.5 must be from 0 to 1"),
        (("--preview", 0), "0 must be above 0"),
        (("--optimizer", "lion"), "invalid choice: 'lion'"),
        (("--weight-decay", -1), "-1 must be from 0 to 1"),
        (("--data", "x", "--streaming", "--mix", "mosaic"), "--streaming excludes --mix, which looks at all images"),
        (("--data", "x", "--streaming", "--canvas", "auto"), "--streaming excludes --canvas auto"),
        (("--data", "x", "--streaming", "--anchor-scale", "auto"), "--streaming excludes --anchor-scale auto"),
        (("--data", "x", "--patience", 2, "--recompute-norm"), "--patience excludes --recompute-norm"),
        (("--data", "x", "--streaming", "--recompute-norm"), "--streaming excludes --recompute-norm"),
    ],
)
def test_flags_that_are_refused(flags: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        parse("pretrain", *flags)


def test_pasting_without_outlines_is_refused(demo: Path, coco_folder: MakeCocoFolder, tmp_path: Path) -> None:
    folder = coco_folder([(64, 64)] * 9, [{"image_id": 10, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}])
    paths = folder.write()
    with pytest.raises(
        InputError, match=r"--mix copy-paste: 1 objects of .* have no 'segmentation' .* use --mix mosaic"
    ):
        runs.train(
            "pretrain", "--train-images", paths.images, "--train-annotations", paths.annotations, *runs.TINY, *LENGTH,
            "--mix", "copy-paste", "--output-dir", tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_anchors_of_a_pretrained_detector_stay(demo: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--anchor-scale: --init .* has its own; leave the flag out"):
        train("finetune", demo, tmp_path / "run", "--init", pretrained, "--anchor-scale", "auto")
