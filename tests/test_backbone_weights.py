"""Weights for the backbone alone: what a file of them must look like, where they arrive, and training from there."""

from direct_pt.program.run import run_program
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from direct_pt.errors import InputError
from direct_pt.models.backbone import Backbone
from direct_pt.models.backbone_weights import load_backbone

SWIN = "swin_tiny_patch4_window7_224"
State = dict[str, Tensor]


def classifier(name: str) -> State:
    """timm's state dict of an untrained classifier, no two values alike: norms and their statistics are drawn too."""
    torch.manual_seed(7)
    state = timm.create_model(name, pretrained=False).state_dict()
    return {
        key: torch.rand_like(value) + 0.5 if value.is_floating_point() else value + 3 for key, value in state.items()
    }


@pytest.fixture(scope="module")
def resnet18() -> State:
    return classifier("resnet18")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a test puts its weights."""
    return tmp_path / "weights.pth"


def by_plain_name(state: State) -> State:
    """By names that do not tell a module inside another from one in a list: `layers_0.x` from `layers.0.x`."""
    return {key.replace(".", "_"): value for key, value in state.items()}


def assert_arrived(backbone: Backbone, state: State) -> None:
    """Every tensor of the network is the one of that name, to the bit."""
    mine, theirs = by_plain_name(backbone.network.state_dict()), by_plain_name(state)
    assert len(mine) > 90
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


# What is read


def as_state_dict_of_a_run(state: State) -> dict[str, Any]:
    """As training on several GPUs saves it, beside other things."""
    return {"epoch": 9, "state_dict": {f"module.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize("wrap", [dict, as_state_dict_of_a_run, lambda state: {"model": state}])
def test_pytorch_files(wrap: Callable[[State], Any], resnet18: State, file: Path) -> None:
    torch.save(wrap(resnet18), file)
    backbone = Backbone("resnet18")
    loaded = load_backbone(backbone, "resnet18", str(file))
    assert_arrived(backbone, resnet18)
    assert str(loaded) == f"120 tensors of the backbone loaded from {file}"


@pytest.mark.parametrize("head", [(), ("fc.0.weight", "fc.2.weight", "queue")])
def test_safetensors_without_a_classifier(head: tuple[str, ...], resnet18: State, tmp_path: Path) -> None:
    """Or with something else in its place."""
    state = {key: value for key, value in resnet18.items() if not key.startswith("fc.")}
    save_file(state | {key: torch.zeros(3, 3) for key in head}, tmp_path / "w.safetensors")
    backbone = Backbone("resnet18")
    assert load_backbone(backbone, "resnet18", str(tmp_path / "w.safetensors")).tensors == 120
    assert_arrived(backbone, resnet18)


def test_old_files_count_no_batches(resnet18: State, file: Path) -> None:
    torch.save({key: value for key, value in resnet18.items() if not key.endswith("num_batches_tracked")}, file)
    backbone = Backbone("resnet18")
    assert load_backbone(backbone, "resnet18", str(file)).tensors == 100
    counts = {key: torch.tensor(0) for key in resnet18 if key.endswith("num_batches_tracked")}
    assert_arrived(backbone, {**resnet18, **counts})


def test_half_precision_weights_are_widened(resnet18: State, file: Path) -> None:
    halves = {key: value.half() if value.is_floating_point() else value for key, value in resnet18.items()}
    torch.save(halves, file)
    backbone = Backbone("resnet18")
    load_backbone(backbone, "resnet18", str(file))
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    assert_arrived(
        backbone, {key: value.float() if value.is_floating_point() else value for key, value in halves.items()}
    )


@pytest.mark.parametrize("name", ["convnextv2_atto", "mobilenetv3_large_100"])
def test_other_networks(name: str, file: Path) -> None:
    state = classifier(name)
    torch.save(state, file)
    backbone = Backbone(name)
    before = {key: value.clone() for key, value in backbone.norms.state_dict().items()}
    assert load_backbone(backbone, name, str(file)).tensors == len(backbone.network.state_dict())
    assert_arrived(backbone, state)
    assert len(before) == (8 if name == "convnextv2_atto" else 0)
    assert all(torch.equal(value, before[key]) for key, value in backbone.norms.state_dict().items())


def as_the_authors_of_swin(state: State) -> dict[str, Any]:
    """Their names: the downsampling ends a stage, the head is one layer; and what can be computed is saved too."""

    def theirs(key: str) -> str:
        key = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        return key.replace("head.fc.", "head.")

    named = {theirs(key): value for key, value in state.items()}
    for key in [key for key in named if key.endswith("relative_position_bias_table")]:
        named[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    named |= {f"layers.{layer}.blocks.1.attn_mask": torch.zeros(64 // 4**layer, 49, 49) for layer in range(3)}
    return {"model": named}


@pytest.fixture(scope="module")
def swin() -> State:
    return classifier(SWIN)


@pytest.mark.parametrize("wrap", [dict, as_the_authors_of_swin])
def test_swin_by_timm_and_by_its_authors(wrap: Callable[[State], Any], swin: State, file: Path) -> None:
    torch.save(wrap(swin), file)
    backbone = Backbone(SWIN)
    before = {key: value.clone() for key, value in backbone.norms.state_dict().items()}
    assert load_backbone(backbone, SWIN, str(file)).tensors == 4 + 12 * 13 + 3 * 3  # stem, blocks, downsampling
    assert_arrived(backbone, swin)
    assert len(before) == 8
    assert all(torch.equal(value, before[key]) for key, value in backbone.norms.state_dict().items())


# What is refused


def refused(name: str, source: object) -> str:
    with pytest.raises(InputError) as error:
        load_backbone(Backbone(name), name, str(source))
    message = str(error.value)
    assert message.startswith(f"--init {source}: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("given", "wanted"), [("resnet34", "resnet18"), ("resnet18", "resnet34"), ("resnet18", "resnet50")]
)
def test_weights_of_another_network(given: str, wanted: str, file: Path) -> None:
    """Also of a deeper one, which has all names and shapes of the shallower, and more."""
    torch.save(classifier(given), file)
    message = refused(wanted, file)
    assert f"--backbone {wanted}" in message and "give weights of" in message


def test_weights_of_a_deeper_swin(swin: State, file: Path) -> None:
    """By its authors' names, whose buffers are nothing to mind."""
    deeper = {
        key.replace("blocks.5", f"blocks.{depth}"): value for depth in range(5, 18) for key, value in swin.items()
    }
    torch.save(as_the_authors_of_swin(deeper), file)
    assert SWIN in refused(SWIN, file)


def test_files_that_hold_no_weights(resnet18: State, file: Path, tmp_path: Path) -> None:
    torch.save(resnet18, file)
    content = file.read_bytes()
    for part in (content[: len(content) // 2], content[:-100], b"", b"some text\nand more of it\n", b"\x00" * 1000):
        file.write_bytes(part)
        refused("resnet18", file)
    tensors = tmp_path / "weights.safetensors"
    save_file(resnet18, tensors)
    content = tensors.read_bytes()
    for part in (content[: len(content) // 2], content[:4], b"", b"some text\nand more of it\n"):
        tensors.write_bytes(part)
        refused("resnet18", tensors)
    for thing in (
        [1, 2],
        torch.zeros(3),
        {"state_dict": None},
        {"epoch": 3},
        {"state_dict": {"conv1.weight": "x"}},
        {},
    ):
        torch.save(thing, file)
        refused("resnet18", file)


class Harmful:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_file_is_not_run(resnet18: State, file: Path, tmp_path: Path) -> None:
    content = {"state_dict": resnet18, "args": Harmful(tmp_path / "made")}
    torch.save(content, file)
    assert "weights_only" in refused("resnet18", file) or "code" in refused("resnet18", file)
    assert not (tmp_path / "made").exists()
    torch.load(file, weights_only=False)  # else it would be
    (tmp_path / "made").rmdir()
    file.write_bytes(pickle.dumps(content, protocol=2))
    refused("resnet18", file)
    assert not (tmp_path / "made").exists()


# In fine-tuning

FLAGS = (*runs.FINETUNE, *runs.DETECTOR, "--global-batch-size", "4", "--micro-batch-size", "4", "--max-steps", "2")


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where the run would go. Whatever is refused leaves nothing there."""
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()


def test_fine_tuning_from_a_file(
    resnet18: State, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's weights, of which BatchNorm, stem and first stage stay; everything else trains."""
    file, run = tmp_path / "weights.pth", tmp_path / "run"
    state = timm.create_model("resnet18", pretrained=False).state_dict()  # weights that a network can train from
    state |= {key: resnet18[key] for key in state if "running" in key}
    torch.save(as_state_dict_of_a_run(state), file)
    flags = ("--init", file, "--log-every", 1, *runs.NO_EVALUATION, "--output-dir", run)
    runs.train("finetune", "--data", demo, *FLAGS, *flags)
    banner = capsys.readouterr().out
    assert (
        f"  weights    120 tensors of the backbone loaded from {file}; the other 36 of 156 random (seed 0); BatchNorm, "
        "stem and first stage frozen\n"
    ) in banner
    assert "trainable  51 of 96 tensors" in banner
    losses = [record["loss"] for record in runs.records(run) if "loss" in record]
    assert len(losses) == 2 and np.isfinite(losses).all()
    trained = runs.weights(run)
    for name, value in trained.items():
        key = name.removeprefix("backbone.network.")
        if re.search(r"^(conv1|layer1\.)|(^|\.)bn\d\.|downsample\.1\.", key):
            assert torch.equal(value, state[key]), name
        elif name.startswith("backbone."):
            assert 0 < (value - state[key]).abs().max() < 0.05, name
    assert runs.read_json(run / "config.json")["settings"]["init"] == str(file)
    assert runs.read_json(run / "model/config.json")["history"][-1]["init"] == str(file)

    # What is added has the weights of that seed, whatever the backbone's are; they have trained since.
    runs.train("finetune", "--data", demo, *FLAGS, *flags[:1], "none", *flags[2:-1], tmp_path / "random")
    scratch = runs.weights(tmp_path / "random")
    for name, value in trained.items():
        if not name.startswith("backbone."):
            assert 0 < (value - scratch[name]).abs().max() < 0.05, name


def test_a_file_that_is_refused(demo: Path, output: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("no weights")
    absent = file.with_name("absent.pth")
    for given in (file, absent):
        flags = ("--data", demo, *FLAGS, "--init", given, "--output-dir", output)
        with pytest.raises(SystemExit) as end:
            run_program(lambda flags=flags: runs.train("finetune", *flags))  # type: ignore[misc]
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(given) in line


def test_imagenet_weights_without_network(demo: Path, output: Path, tmp_path: Path) -> None:
    """One line that says what to do, and no waiting."""
    flags = ("--data", demo, *FLAGS, "--init", "imagenet", "--output-dir", output)
    cache = {"HF_HOME": tmp_path / "home", "HF_HUB_CACHE": tmp_path / "home/hub"}
    printed, errors = (process := runs.start_script("finetune", *flags, **cache)).communicate(timeout=120)
    assert process.returncode == 2, errors
    assert printed == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: --init imagenet: timm's weights resnet18.tv_in1k cannot be had (")
    assert line.endswith("give the file: --init FILE")
