"""Losses and gradients that are not finite: agreed on by all processes, skipped, counted, and in the end refused."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import poisoned
import pytest
import small_runs as runs
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from direct_pt.errors import TrainingStopped
from direct_pt.training import start

SCRIPT = Path(__file__).with_name("poisoned.py")
CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
EVERY_STEP = ("--save-every", 1, "--keep-checkpoints", 20, "--log-every", 1, *runs.NO_EVALUATION)
FLAGS = (*runs.TINY, "--global-batch-size", 8, "--micro-batch-size", 2, *EVERY_STEP)


def saved(run: Path, step: int) -> dict[str, Tensor]:
    """Weights, BatchNorm's statistics and momentum of a step; not the count of its batches, which nothing reads."""
    folder = run / f"checkpoints/step-{step}"
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")
    return {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "launcher",
    [
        "plain",
        pytest.param("deepspeed_zero2", marks=pytest.mark.slow),
        pytest.param("deepspeed_zero3", marks=pytest.mark.slow),
    ],
)
def test_one_process_meets_it_and_both_skip(launcher: str, demo: Path, tmp_path: Path) -> None:
    """Step 2 of 3 changes nothing but the count; step 3 goes on from step 1."""
    run, flags = tmp_path / "run", ("2", "--data", demo, *FLAGS, "--max-steps", 3)
    if launcher == "plain":
        process = runs.launch(2, SCRIPT, *flags, "--output-dir", run)
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
        command += [str(CONFIGS / f"{launcher}.yaml"), "--num_processes", "2", str(SCRIPT), *map(str, flags)]
        command += ["--output-dir", str(run)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=runs.ENVIRONMENT, text=True, **pipes)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr[-5000:]
    assert re.search(r"step 2 skipped: the loss of images train_0000\d\d.jpg, train_0000\d\d.jpg is not finite", stderr)
    assert "; 1 of 3 steps were skipped" in stdout
    first, second, third = (saved(run, step) for step in (1, 2, 3))
    assert runs.largest_difference(first, second) == 0
    assert runs.largest_difference(second, third) > 0
    assert all(value.isfinite().all() for value in third.values())
    losses = [record for record in runs.records(run) if "loss" in record]
    assert [record["loss"] is None for record in losses] == [False, True, False]
    assert [record.get("skipped") for record in losses] == [None, 1, 1]


def test_ten_in_a_row_stop_the_run(demo: Path, tmp_path: Path) -> None:
    """With the weights from before them; where the cause is gone, --resume goes on."""
    run = tmp_path / "run"
    flags = ["--data", demo, *FLAGS, "--max-steps", 13, "--output-dir", run]
    flags = [str(flag) for flag in flags]
    with runs.fresh_process(), pytest.raises(TrainingStopped) as stop:
        poisoned.run("2,3,4,5,6,7,8,9,10,11,12,13", *flags)
    message = str(stop.value)
    assert "10 steps in a row were skipped, as the losses of some images among good ones" in message
    assert "in the last one of images train_0000" in message
    assert "the state of step 11, with the weights from before them, is saved" in message
    assert "diverged" not in message and message.endswith("continue with --resume")
    assert runs.largest_difference(saved(run, 1), saved(run, 11)) == 0

    shutil.copytree(run, tmp_path / "copy")
    runs.train("pretrain", *flags, "--resume", "--lr", 0.001)
    assert runs.largest_difference(saved(run, 11), saved(run, 13)) > 0
    assert runs.records(run)[-1]["step"] == 13 and runs.records(run)[-2]["skipped"] == 10
    assert runs.records(run)[-2]["lr"] == 0.001

    # Another one in a row stops it again only after ten more.
    flags[flags.index(str(run))] = str(tmp_path / "copy")
    with runs.fresh_process():
        poisoned.run("12,13", *flags, "--resume")
    assert runs.records(tmp_path / "copy")[-2]["skipped"] == 12


@pytest.fixture
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """fp16's loss scale around a float32 detector: what CPUs can show of it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=4)  # overflows at first
    make = start.make_accelerator

    def make_scaled(*args: Any, **options: Any) -> Accelerator:
        accelerator = make(*args, **options)
        accelerator.scaler = scaler
        return accelerator

    monkeypatch.setattr(start, "make_accelerator", make_scaled)
    return scaler


@pytest.mark.parametrize("clip", [(), ("--clip-grad-norm", 1000)])
def test_with_a_loss_scale(
    clip: tuple[object, ...], loss_scale: torch.amp.GradScaler, demo: Path, tmp_path: Path
) -> None:
    """While it looks for its scale, steps come to nothing without counting; a failed step leaves it as it is."""
    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, *EVERY_STEP, *clip, "--max-steps", 14, "--lr", 1e-5)
    with runs.fresh_process():
        poisoned.run("9,11", *map(str, flags), "--output-dir", str(tmp_path / "run"))
    assert runs.largest_difference(saved(tmp_path / "run", 8), saved(tmp_path / "run", 9)) == 0
    assert runs.largest_difference(saved(tmp_path / "run", 9), saved(tmp_path / "run", 10)) > 0
    records = [record for record in runs.records(tmp_path / "run") if "loss" in record]
    assert records[-1]["skipped"] == 2 and records[8]["loss"] is records[10]["loss"] is None
    assert records[0]["gradient_norm"] is None  # infinite, times 2^127
    norms = [norm for record in records if (norm := record["gradient_norm"]) is not None]
    assert len(norms) > 4 and all(0.1 < norm < 100 for norm in norms)  # without the scale
    assert 1 <= loss_scale.get_scale() < 2.0**127


def test_a_bad_batch_among_good_ones_is_named(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a step is one micro-batch: the steps around it are good."""
    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, *EVERY_STEP, "--max-steps", 6, "--output-dir", tmp_path / "run")
    with runs.fresh_process():
        poisoned.run("2,4,5", *map(str, flags))
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert re.search(r"step 2 skipped: the loss of images train_0000\d\d.jpg, .* is not finite, or over \d+$", lines[0])
    assert re.search(r"step 4 skipped: the loss of images train_0000\d\d.jpg", lines[1])
    assert "step 5 skipped: every loss is not finite" in lines[2]  # may be the weights by now
    assert runs.records(tmp_path / "run")[-2]["skipped"] == 3
