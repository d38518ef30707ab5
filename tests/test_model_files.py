"""What a model's files may say: each odd value is refused in one line that names it, before anything is built."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import torch
from safetensors.torch import load_file, save_file

from direct_pt.checkpoint import from_pretrained, read_history, save_model
from direct_pt.errors import InputError
from direct_pt.files import parse_json, read_json
from direct_pt.models.backbone import Backbone
from direct_pt.models.backbone_weights import load_backbone
from direct_pt.models.detector import MODELS, DetectorConfig, build_detector
from direct_pt.models.weights import layouts, outline_of

NAMES, IDS = ["cat", "dog"], [10, 20]
DEEP = "[" * 100_000 + "]" * 100_000
NOT_WHOLE = (0, -3, 1.5, 10**9, 10**400, float("nan"), "8", True, None, [8], {"a": 8})
WRONG: dict[str, tuple[Any, ...]] = {
    "channels": NOT_WHOLE,
    "proposals": NOT_WHOLE,
    "rois_per_image": NOT_WHOLE,
    "short_side": NOT_WHOLE,
    "long_side": NOT_WHOLE,
    "anchor_scale": (0, -1, 0.1, 65, 1e20, float("inf"), "auto", True, [8]),
    "name": ("yolo", "", 5, None, ["retinanet_r50_fpn"]),
    "norm": ("layer", "", 1, None, True),
    "box_head": ("3conv", "", {}, None),
    "backbone": ("", "x" * 300, 50, None, ["resnet18"]),
    "class_names": ([], ["cat", "cat"], ["cat"], ["cat", ""], ["cat", 5], ["cat", "\ud800"], "cat", None, {}),
    "category_ids": ([], [10, 10], [10, 20, 30], [10, "20"], [10, 20.0], [10, True], [10, 2**63], 10, None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    config = DetectorConfig.from_paper("retinanet_r50_fpn", tuple(NAMES), tuple(IDS))
    config = replace(config, backbone="test_resnet", channels=8, short_side=64, long_side=64)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, build_detector(config.name, config=config), [{"stage": "pretrain", "steps": 4}])
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path) -> str:
    """The one line that says why a model is not taken."""
    with pytest.raises(InputError) as error:
        from_pretrained(folder)
    line = str(error.value)
    assert str(folder) in line and "\n" not in line and len(line) < 1000
    return line


def write(folder: Path, content: Any) -> None:
    """Another config.json."""
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("field", WRONG)
def test_values_of_a_configuration(field: str, copy: Path) -> None:
    content = read_json(copy / "config.json")
    for value in WRONG[field]:
        write(copy, {**content, "detector": {**content["detector"], field: value}})
        assert f"detector.{field}" in (line := refused(copy)) or "class_names but" in line, (value, line)
    del content["detector"][field]
    write(copy, content)
    if field in ("name", "class_names", "category_ids", "backbone"):
        assert f"detector lacks {field}" in refused(copy)


def test_every_field_is_tried() -> None:
    assert set(WRONG) == set(asdict(DetectorConfig.from_paper("retinanet_r50_fpn", ("a",), (1,))))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot be read as JSON"),
        ("null", "its content is None: it must be an object"),
        ('{"detector": 5, "history": []}', "detector is 5: it must be an object"),
        ('{"detector": {}}', "lacks history"),
        ('{"history": []}', "lacks detector"),
        (DEEP, "nested more than 100 levels"),
        ('{"a":' * 100_000, "nested more than 100 levels"),
        ('{"detector": ' + "[" * 200 + "]" * 200 + ', "history": []}', "nested more than 100 levels"),
    ],
)
def test_configurations_that_are_none(content: str, reason: str, copy: Path) -> None:
    write(copy, content)
    line = refused(copy)
    assert reason in line and "cannot be read as a detector's configuration" in line
    (copy / "config.json").write_bytes(b"\xff\xfe\x00{")
    assert "cannot be read as JSON" in refused(copy)
    with (copy / "config.json").open("wb") as file:
        file.truncate(2**27)
    assert "more than 67,108,864 bytes" in refused(copy)


@pytest.mark.parametrize(
    ("history", "field"),
    [
        ({}, "history is {}"),
        ("long", "history is 'long'"),
        ([5], "history[0] is 5"),
        ([{"steps": "4"}], "history[0].steps is '4'"),
        ([{"steps": 4}, {"steps": -1}], "history[1].steps is -1"),
        ([{"stage": 5}], "history[0].stage is 5"),
        ([{"lr": float("nan")}], "history is 'NaN or Infinity'"),
    ],
)
def test_history(history: Any, field: str, copy: Path) -> None:
    """Before a run that goes on from it writes it."""
    write(copy, {**read_json(copy / "config.json"), "history": history})
    assert field in refused(copy)
    with pytest.raises(InputError):
        read_history(copy)


def test_unknown_backbones_name_the_file(copy: Path) -> None:
    content = read_json(copy / "config.json")
    for backbone, reason in (
        ("resnet19", "has no model of this name"),
        ("vit_tiny_patch16_224", "has no feature maps"),
    ):
        write(copy, {**content, "detector": {**content["detector"], "backbone": backbone}})
        line = refused(copy)
        assert reason in line and line.startswith(str(copy / "config.json"))


def test_unknown_fields(copy: Path) -> None:
    content = read_json(copy / "config.json")
    write(copy, {**content, "version": 3})
    assert "unknown fields version" in refused(copy)
    write(copy, {**content, "detector": {**content["detector"], "depth": 3}})
    assert "detector has the unknown fields depth" in refused(copy)


def test_a_model_of_before_fields_were_added(copy: Path) -> None:
    content = read_json(copy / "config.json")
    del content["detector"]["anchor_scale"], content["detector"]["norm"]
    write(copy, content)
    assert from_pretrained(copy).config.norm == "batch"


# What is built from it

HUGE = {"channels": 16_384}, {"backbone": "regnety_2560"}, {"class_names": NAMES, "name": "cascade_rcnn_r50_fpn"}


def test_nothing_large_is_built(copy: Path) -> None:
    """A configuration that its weights do not fit costs neither memory nor time."""
    content = read_json(copy / "config.json")
    many = {"class_names": [str(number) for number in range(300_000)], "category_ids": list(range(300_000))}
    for changes in (*HUGE, many):
        write(copy, {**content, "detector": {**content["detector"], **changes}})
        program = (
            "import sys, resource, torch\n"
            "from direct_pt.checkpoint import from_pretrained\n"
            "from direct_pt.errors import InputError\n"
            "used = int(next(line for line in open('/proc/self/status') if 'VmData' in line).split()[1]) * 1024\n"
            "resource.setrlimit(resource.RLIMIT_DATA, (used + 2**30,) * 2)\n"
            "try:\n"
            "    from_pretrained(sys.argv[1])\n"
            "except InputError as error:\n"
            "    print(error)\n"
        )
        process = subprocess.run(
            [sys.executable, "-c", program, str(copy)], capture_output=True, text=True, timeout=120,
            env=runs.ENVIRONMENT,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-2000:]
        assert "tensors do not fit the detector of its config.json" in process.stdout


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", MODELS)
def test_the_outline_is_the_detector(name: str, norm: str) -> None:
    """The same tensors, no memory, and the random numbers after it are the same."""
    config = replace(DetectorConfig.from_paper(name, ("a", "b"), (1, 2)), norm=norm, channels=16)
    torch.manual_seed(3)
    outline = outline_of(config)
    assert all(value.is_meta for value in (*outline.state_dict().values(), *outline.buffers()))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert layouts(outline.state_dict()) == layouts(build_detector(name, config=config).state_dict())


@pytest.mark.parametrize(
    "backbone",
    ["convnext_atto", "efficientnet_lite0", "regnety_002", "test_convnext", "hgnetv2_b0", "swinv2_tiny_window8_256"],
)
def test_outlines_of_other_backbones(backbone: str) -> None:
    config = replace(DetectorConfig.from_paper("retinanet_r50_fpn", ("a",), (1,)), backbone=backbone, channels=8)
    outline = outline_of(config).state_dict()
    assert all(value.is_meta for value in outline.values())
    assert layouts(outline) == layouts(build_detector(config.name, config=config).state_dict())


# The weights


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """As another program would: without a checksum."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


FIRST = "backbone.network.conv1.0.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.deltas.bias"][1] = value

    change_weights(copy, change)
    assert "head.deltas.bias has 1 of 36 values that are not finite" in refused(copy)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_of_another_kind(kind: torch.dtype, copy: Path) -> None:
    change_weights(copy, lambda tensors: tensors.update({"head.deltas.bias": torch.zeros(36, dtype=kind)}))
    assert "1 tensors do not fit" in (line := refused(copy)) and "first head.deltas.bias: expected [36] float32" in line
    name = next(name for name in load_file(copy / "model.safetensors") if name.endswith("num_batches_tracked"))
    change_weights(copy, lambda tensors: tensors.update({"head.deltas.bias": torch.zeros(36), name: torch.zeros(())}))
    assert f"first {name}: expected [] int64, found [] float32" in refused(copy)


def test_weights_of_other_programs(copy: Path) -> None:
    """Without a checksum, and of half the precision."""
    before = from_pretrained(copy).state_dict()
    change_weights(
        copy, lambda tensors: tensors.update({key: t.half() for key, t in tensors.items() if t.is_floating_point()})
    )
    after = from_pretrained(copy).state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-2) for name in before)


def test_tensors_missing_and_more(copy: Path) -> None:
    change_weights(copy, lambda tensors: tensors.update({"more": torch.zeros(1)}))
    assert "1 tensors do not fit" in (line := refused(copy)) and "first more: expected nothing, found [1]" in line

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["more"], tensors["head.deltas.bias"]

    change_weights(copy, change)
    assert "first head.deltas.bias: expected [36], found nothing" in refused(copy)


def test_as_a_user_sees_it(copy: Path, demo: Path, tmp_path: Path) -> None:
    """All that read a model say the same line."""
    content = read_json(copy / "config.json")
    write(copy, {**content, "detector": {**content["detector"], "channels": -3}})
    photo, output = next((demo / "images").iterdir()), tmp_path / "output"
    said = []
    for script, flags in (
        ("predict", (photo, "--checkpoint", copy)),
        ("evaluate", ("--data", demo, "--checkpoint", copy, *runs.MACHINE)),
        ("import_mmdet", (copy, "--export", tmp_path / "file.pth")),
    ):
        where = () if script == "import_mmdet" else ("--output-dir", output)
        with pytest.raises(InputError) as error:
            runs.call_script(script, *flags, *where)
        said.append(str(error.value))
    with pytest.raises(InputError) as error:
        runs.train("finetune", "--data", demo, *runs.FINETUNE, "--init", copy, "--output-dir", output)
    assert {*said, str(error.value)} == {said[0]} and "detector.channels is -3" in said[0]
    assert not output.exists()


# A backbone's weights


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: tensor * np.nan, "values that are not finite"),
        (lambda tensor: tensor.to(torch.int32), "is of type int32, and must be floating-point"),
        (lambda tensor: torch.zeros(1).expand(tensor.shape), "and fewer values than that"),
    ],
)
def test_weights_of_a_backbone(change: Callable[[torch.Tensor], torch.Tensor], reason: str, tmp_path: Path) -> None:
    backbone = Backbone("resnet18")
    state = dict(backbone.network.state_dict())
    state["layer1.0.conv1.weight"] = change(state["layer1.0.conv1.weight"])
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError) as error:
        load_backbone(backbone, "resnet18", str(tmp_path / "weights.pth"))
    line = str(error.value)
    assert reason in line and "layer1.0.conv1.weight" in line and str(tmp_path / "weights.pth") in line


# JSON


def test_depth() -> None:
    assert parse_json("[" * 100 + "]" * 100) == json.loads("[" * 100 + "]" * 100)
    for text in ("[" * 101 + "]" * 101, DEEP, "[" * 100_000, '{"a":' * 101 + "1" + "}" * 101):
        with pytest.raises(ValueError, match="nested more than 100 levels"):
            parse_json(text)
