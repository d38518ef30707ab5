"""`--micro-batch-size auto`: the most images that fit, found by real allocations that fail; the global batch stays."""

import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
import small_runs as runs
import torch
from conftest import MakeCocoFolder
from torch import nn

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.transforms import FinetunePreset, PretrainPreset
from direct_pt.errors import InputError
from direct_pt.micro_batch import fitting_micro_batch_size
from direct_pt.models.detector import Detector, build_detector
from direct_pt.plan import micro_batch_sizes

FLAGS = (*runs.PRETRAIN, "--global-batch-size", 8, "--micro-batch-size", "auto", "--max-steps", 2, "--save-every", 1)


@pytest.fixture
def table(coco_folder: MakeCocoFolder) -> AnnotationTable:
    """Two shapes of image, at most three objects on one."""
    objects = [{"image_id": 10, "bbox": [5 * n, 5, 20, 20]} for n in range(3)]
    return coco_folder([(64, 96), (96, 64)], objects).load()


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return build_detector("faster_rcnn_r50_fpn", 2, "resnet18")


def fitting(detector: Detector, table: AnnotationTable, sizes: list[int], size: int = 256) -> int:
    """On the CPU, in float32."""

    def optimizer(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    preset = PretrainPreset(size)
    return fitting_micro_batch_size(detector, optimizer, table, preset, sizes, 0, torch.device("cpu"), "no")


def test_largest_that_memory_has_room_for(
    detector: Detector, table: AnnotationTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less memory less fits; the detector, its random numbers and the process's limits are left as they were."""
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    limits, numbers = resource.getrlimit(resource.RLIMIT_DATA), torch.get_rng_state()
    memory = psutil.virtual_memory()
    found = []
    for gib in (8, 0.75):
        monkeypatch.setattr(psutil, "virtual_memory", lambda gib=gib: memory._replace(available=int(gib * 2**30)))
        found.append(fitting(detector, table, [8, 2, 1]))
    assert found[0] == 8 and found[1] < 8
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2**27))
    with pytest.raises(InputError, match=r"not even 1 image\(s\) of 256x256 fit; use --grad"):
        fitting(detector, table, [4, 1])
    assert runs.largest_difference(before, detector.state_dict()) == 0
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits and torch.equal(torch.get_rng_state(), numbers)


def test_sizes_that_keep_the_global_batch() -> None:
    assert micro_batch_sizes(64, 1) == [64, 32, 16, 8, 4, 2, 1]
    assert micro_batch_sizes(12, 2) == [6, 3, 2, 1]
    assert micro_batch_sizes(64, 3) == []


def test_the_largest_frame_holds_every_shape(table: AnnotationTable, detector: Detector) -> None:
    """A micro-batch of stage 2 may hold a wide image and a high one."""
    seen = []

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape))

    detector.backbone.register_forward_pre_hook(watch)
    preset = FinetunePreset(64, 96)
    sizes = [2]
    fitting_micro_batch_size(
        detector,
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1),
        table,
        preset,
        sizes,
        0,
        torch.device("cpu"),
        "no",
    )
    assert seen == [(2, 3, 96, 96)]
    assert np.diff(table.starts).max() == 3


def test_a_run_finds_its_size_and_keeps_it(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is room for all eight here. When it goes on it does not look again: the order of images depends on it."""
    run = tmp_path / "run"
    runs.train("pretrain", *runs.train_part(demo), *FLAGS, "--output-dir", run)
    assert "8 images a step = 1 process(es) x 8 micro-batch x 1 accumulated" in capsys.readouterr().out
    saved = runs.read_json(run / "config.json")
    assert saved["settings"]["micro_batch_size"] == "auto" and saved["plan"]["micro_batch_size"] == 8
    fixed = tmp_path / "fixed"
    runs.train("pretrain", *runs.train_part(demo), *FLAGS, "--micro-batch-size", 8, "--output-dir", fixed)
    assert runs.largest_difference(runs.weights(run), runs.weights(fixed)) == 0
    runs.train("pretrain", *runs.train_part(demo), *FLAGS, "--output-dir", run, "--resume")
    assert "from step 2" in capsys.readouterr().out


def test_a_small_size_is_warned_of(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under BatchNorm's minimum."""
    monkeypatch.setattr("direct_pt.stage.fitting_micro_batch_size", lambda *arguments: 2)
    runs.train("pretrain", *runs.train_part(demo), *FLAGS, "--output-dir", tmp_path / "run")
    assert "WARNING    BatchNorm trains on micro-batches of 2" in capsys.readouterr().out
