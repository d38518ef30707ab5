"""A detector that starts from one of other classes: what is kept, and what is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_runs as runs
import torch
from small_detectors import small_detector
from torch.testing import assert_close

from direct_pt.checkpoint import from_pretrained
from direct_pt.models.detector import MODELS, RetinaNet, TwoStage, build_detector
from direct_pt.models.transfer import class_rows, transfer

OLD, NEW = ("cat", "dog", "fox"), ("fox", "newt", "cat", "owl")


def detectors(model: str) -> tuple[Any, Any]:
    """Of the old and the new classes, with random weights everywhere."""
    found = []
    for number, names in enumerate((OLD, NEW)):
        config = replace(small_detector(model).config, class_names=names, category_ids=tuple(range(len(names))))
        torch.manual_seed(number)
        detector = build_detector(model, config=config).eval()
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter.normal_(std=0.05)
        found.append(detector)
    return found[0], found[1]


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_of_the_classes_is_known(model: str) -> None:
    """Those whose shape depends on the number of classes, and no others."""
    old, new = (one.state_dict() for one in detectors(model))
    differing = {name for name in old if old[name].shape != new[name].shape}
    assert differing and differing == {name for name in old if class_rows(name, model)}


@pytest.mark.parametrize("model", MODELS)
def test_classes_are_taken_over_by_name(model: str) -> None:
    """They are found as before, and so is the background; the new ones have their random rows."""
    old, new = detectors(model)
    random = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    taken = transfer(old, new)
    assert taken.classes == ["fox", "cat"] and taken.whole + taken.by_class == len(random)
    assert taken.by_class == sum(class_rows(name, model) is not None for name in random)
    for name, tensor in new.state_dict().items():
        assert class_rows(name, model) or torch.equal(tensor, old.state_dict()[name])
    channels = new.config.channels
    with torch.no_grad():
        if isinstance(new, RetinaNet):
            features = [torch.randn(1, channels, 8, 8)]
            (before,), (after,) = (one.head(features)[0] for one in (old, new))
            before, after = (maps.unflatten(1, (9, -1)) for maps in (before, after))
            assert_close(after[:, :, [0, 2]], before[:, :, [2, 0]])
            fresh = random["head.logits.bias"].view(9, 4)[:, [1, 3]]
            assert torch.equal(new.head.logits.bias.view(9, 4)[:, [1, 3]], fresh)
            return
        assert isinstance(new, TwoStage)
        for one, two in zip(old.roi_head.box_heads, new.roi_head.box_heads, strict=True):
            features = torch.randn(5, channels, one.input_size, one.input_size)
            (before, boxes_before), (after, boxes_after) = one(features), two(features)
            assert_close(after[:, [0, 2, 4]], before[:, [2, 0, 3]])  # sums of another width round differently
            if boxes_after.shape[1] == 1:
                assert_close(boxes_after, boxes_before)
            else:
                assert_close(boxes_after[:, [0, 2]], boxes_before[:, [2, 0]])
        if new.has_masks:
            features = torch.randn(5, channels, 14, 14)
            before, after = (one.roi_head.mask_head(features) for one in (old, new))
            assert_close(after[:, [0, 2]], before[:, [2, 0]])


def other_classes(demo: Path, folder: Path, names: dict[str, str], first_id: int) -> Path:
    """The demo's data with other names of some classes, and other ids."""
    shutil.copytree(demo, folder)
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        shift = {one["id"]: one["id"] + first_id for one in content["categories"]}
        for one in content["categories"]:
            one["id"], one["name"] = shift[one["id"]], names.get(one["name"], one["name"])
        for one in content["annotations"]:
            one["category_id"] = shift[one["category_id"]]
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_other_classes(
    stage: str, pretrained: Path, demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both stages take the run; the banner counts what was kept; it resumes, and the model has the new classes."""
    data = other_classes(demo, tmp_path / "data", {"3": "three", "9": "nine"}, 100)
    run = tmp_path / "run"
    size = ("--image-size", runs.SIZE) if stage == "pretrain" else ("--short-side", runs.SIZE, "--long-side", 128)
    flags = ("--data", data, "--init", pretrained, *runs.COUNTS, *runs.MACHINE, *size, *runs.RATE, *runs.EIGHT)
    flags = (*flags, "--max-steps", 2, *runs.NO_EVALUATION, "--output-dir", run)
    runs.train(stage, *flags)
    out = capfd.readouterr().out
    assert (
        "a detector of other classes; of the 4 with rows of classes: 8 of 10 classes by name (0, 1, 2, 4, 5, ...)"
        in out
    )
    assert "random (seed 0): three, nine" in out
    config = from_pretrained(run).config
    assert config.category_ids == tuple(range(100, 110)) or min(config.category_ids) >= 100
    assert "three" in config.class_names and "3" not in config.class_names
    history = runs.read_json(run / "model/config.json")["history"]
    assert [one["stage"] for one in history] == ["pretrain", stage]
    runs.train(stage, *flags, "--resume")
    runs.call_script("evaluate", "--checkpoint", run, "--data", data, *runs.MACHINE)


def test_other_ids_alone(pretrained: Path, demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All classes are known by name: it starts with the very weights."""
    data = other_classes(demo, tmp_path / "data", {}, 7)
    flags = ("--data", data, "--init", pretrained, *runs.FINETUNE, *runs.EIGHT, "--lr", "1e-30", "--weight-decay", 0)
    runs.train("finetune", *flags, "--max-steps", 1, *runs.NO_EVALUATION, "--output-dir", tmp_path / "run")
    assert "10 of 10 classes by name" in capfd.readouterr().out
    assert runs.largest_difference(runs.weights(tmp_path / "run"), runs.weights(pretrained)) < 1e-30


def test_no_class_in_common(pretrained: Path, demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = other_classes(demo, tmp_path / "data", {str(n): f"digit {n}" for n in range(10)}, 0)
    flags = ("--data", data, "--init", pretrained, *runs.FINETUNE, *runs.EIGHT, "--max-steps", 1, *runs.NO_EVALUATION)
    runs.train("finetune", *flags, "--output-dir", tmp_path / "run")
    assert "with rows of classes: none is the same by name, random (seed 0): digit 0, digit 1" in capfd.readouterr().out
