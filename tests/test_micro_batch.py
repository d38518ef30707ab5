"""`--micro-batch-size auto`: the most images that fit, found by real allocations that fail; the global batch stays."""

import multiprocessing
import resource
import time
from dataclasses import replace
from multiprocessing import spawn
from pathlib import Path

import psutil
import pytest
import small_runs as runs
import torch
from conftest import MakeCocoFolder

from direct_pt.data.annotations import AnnotationTable
from direct_pt.errors import InputError
from direct_pt.models.detector import DetectorConfig
from direct_pt.recipes import PRETRAIN
from direct_pt.training import micro_batch
from direct_pt.training.micro_batch import Trial, fitting_micro_batch_size
from direct_pt.training.plan import micro_batch_sizes
from direct_pt.transforms import FinetunePreset, Preset, PretrainPreset

FLAGS = (*runs.PRETRAIN, "--global-batch-size", 8, "--micro-batch-size", "auto", "--max-steps", 2, "--save-every", 1)


@pytest.fixture
def table(coco_folder: MakeCocoFolder) -> AnnotationTable:
    """Two shapes of image, at most three objects on one."""
    objects = [{"image_id": 10, "bbox": [5 * n, 5, 20, 20]} for n in range(3)]
    return coco_folder([(64, 96), (96, 64)], objects).load()


def fitting(table: AnnotationTable, preset: Preset, sizes: list[int], frozen: str = "none") -> int:
    """On the CPU, in float32."""
    recipe = PRETRAIN.recipe("faster_rcnn_r50_fpn", "sgd")
    config = replace(DetectorConfig.from_paper("faster_rcnn_r50_fpn", ("a", "b"), (1, 2)), backbone="resnet18")
    trial = Trial(config, frozen, False, recipe, 0, torch.device("cpu"), "no")
    return fitting_micro_batch_size(trial, table, preset, sizes)


def test_largest_that_memory_has_room_for(table: AnnotationTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less memory less fits; this process's random numbers and limits are left as they were."""
    numbers, limits = torch.get_rng_state(), resource.getrlimit(resource.RLIMIT_DATA)
    memory = psutil.virtual_memory()

    def found(gib: float, *sizes: int) -> int:
        with monkeypatch.context() as patched:
            patched.setattr(psutil, "virtual_memory", lambda: memory._replace(available=int(gib * 2**30)))
            return fitting(table, PretrainPreset(256), list(sizes))

    assert found(8, 4, 1) == 4
    assert found(0.9, 16, 1) == 1
    with pytest.raises(InputError, match=r"not even 1 image\(s\) of 256x256 fit \(.*\); use --grad"):
        found(0.2, 1)
    assert torch.equal(torch.get_rng_state(), numbers) and resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_sizes_that_keep_the_global_batch() -> None:
    assert micro_batch_sizes(64, 1) == [64, 32, 16, 8, 4, 2, 1]
    assert micro_batch_sizes(12, 2) == [6, 3, 2, 1]
    assert micro_batch_sizes(64, 3) == []


def test_a_trial_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, and memory blamed: a library whose allocation failed may wait for ever."""
    monkeypatch.setattr(micro_batch, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(micro_batch, "MAX_IDLE_SECONDS", 1.0)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    answer = micro_batch._answer(receiver, process)
    sender.close()
    assert "made no progress" in answer and not process.is_alive()


def test_a_trial_that_ends_for_another_reason(table: AnnotationTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not blamed for an interpreter that does not start."""
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/false")
    with pytest.raises(InputError, match=r"fit \(the process that tried it ended with status 1\)"):
        fitting(table, PretrainPreset(64), [1])


def test_what_is_tried_is_the_heaviest(table: AnnotationTable) -> None:
    """A micro-batch of stage 2 may hold a wide image and a high one: the message names the frame that holds both."""
    memory = psutil.virtual_memory()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2**20))
        with pytest.raises(InputError, match=r"2 image\(s\) of 96x96"):
            fitting(table, FinetunePreset(64, 96), [2], frozen="paper")


def test_a_run_finds_its_size_and_keeps_it(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is room for all eight here. When it goes on it does not look again: the order of images depends on it."""
    run = tmp_path / "run"
    checkpointing = ("--gradient-checkpointing",)  # gives the same weights
    runs.train("pretrain", *runs.train_part(demo), *FLAGS, *checkpointing, "--output-dir", run)
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
    monkeypatch.setattr("direct_pt.training.start.fitting_micro_batch_size", lambda *arguments: 2)
    runs.train("pretrain", *runs.train_part(demo), *FLAGS, "--output-dir", tmp_path / "run")
    assert "WARNING    BatchNorm trains on micro-batches of 2" in capsys.readouterr().out
