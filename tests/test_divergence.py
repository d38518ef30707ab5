"""Runs that diverge: seen early, told apart from bad images, and resumed from before it."""

import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import small_runs as runs

from direct_pt.checkpoint import read_history
from direct_pt.errors import TrainingStopped
from direct_pt.training.checkpoints import (
    TrainingState,
    checkpoints,
    load_training_state,
    save_training_state,
    set_aside_checkpoints,
)
from direct_pt.training.progress import MAX_FAILED_STEPS, Progress

SAVED = ("--save-every", 2, "--log-every", 1, *runs.NO_EVALUATION)
# A hundredth at first, and 0.005 more at each step, which is too much after some steps.
DIVERGING = (*runs.TINY, *runs.EIGHT, *SAVED, "--max-steps", 60, "--lr", 1, "--warmup-steps", 200)


def succeed(progress: Progress, *losses: float) -> None:
    """Steps that succeed, with these losses."""
    for loss in losses:
        progress.succeed(loss, norm=1.0)


def fail(progress: Progress, mixed: bool, times: int = MAX_FAILED_STEPS) -> None:
    """Steps that fail."""
    for _ in range(times):
        progress.fail(mixed)


# The rules


def test_the_range_of_the_loss() -> None:
    progress = Progress()
    assert progress.max_loss == math.inf
    succeed(progress, 0.01, *[3.0] * 8)
    assert progress.max_loss == 100 and progress.calm_step == 1  # the first may be low by chance
    succeed(progress, 3.0)
    assert progress.lowest_loss == pytest.approx(2.701) and progress.max_loss == pytest.approx(270.1)
    succeed(progress, 250.0)  # a bad moment raises the average, not the range
    assert progress.average_loss == pytest.approx(27.43, abs=0.01) and progress.max_loss == pytest.approx(270.1)
    assert (progress.calm_step, progress.step) == (10, 11)
    succeed(progress, 5.0)
    assert progress.calm_step == 12
    succeed(progress, *[0.0] * 200)
    assert progress.max_loss == 10  # never below: 100 x 0.1
    succeed(progress, 0.19)
    assert progress.calm_step == progress.step


def test_a_rise_in_the_first_steps() -> None:
    """It is neither calm nor the range's measure: the first loss is."""
    progress = Progress()
    succeed(progress, 3.0, 93.0)
    assert progress.calm_step == 1 and progress.max_loss == 300  # the next one, of 36,803, fails
    succeed(progress, *[290.0] * 8)
    assert progress.average_loss > 200 and progress.max_loss == 3000 and progress.calm_step == 1


def test_the_rate_of_the_first_failed_step() -> None:
    """A run that resumes at another rate did not fail at that."""
    progress = Progress()
    succeed(progress, 2.0)
    progress.fail(False, lr=0.6)
    progress.fail(False, lr=0.001)
    assert progress.failed_lr == 0.6
    succeed(progress, 2.0)
    progress.fail(False, lr=0.1)
    assert progress.failed_lr == 0.1


@pytest.mark.parametrize("mixed", [True, False])
def test_what_ten_failed_steps_mean(mixed: bool) -> None:
    progress = Progress()
    succeed(progress, 2.0, 1.0, 1.0)
    fail(progress, mixed, MAX_FAILED_STEPS - 1)
    assert not progress.must_stop(100)
    progress.fail(mixed)
    assert progress.must_stop(100) and progress.has_diverged == (not mixed)
    assert (progress.step, progress.first_failed_step, progress.skipped) == (13, 4, 10)


def test_a_few_mixed_steps_at_the_start_are_still_divergence() -> None:
    """On the way out of range some micro-batches pass the limit before others."""
    progress = Progress()
    succeed(progress, 2.0)
    fail(progress, mixed=True, times=4)
    fail(progress, mixed=False, times=6)
    assert progress.must_stop(100) and progress.has_diverged


def test_a_good_step_ends_the_row() -> None:
    progress = Progress()
    for _ in range(2):
        succeed(progress, 2.0)
        fail(progress, mixed=False, times=9)
        assert not progress.must_stop(100)
    assert progress.skipped_in_a_row == 9 and progress.skipped == 18


def test_a_run_does_not_end_among_failed_steps() -> None:
    progress = Progress()
    succeed(progress, 2.0)
    fail(progress, mixed=False, times=1)
    assert not progress.must_stop(total_steps=2)  # one bad batch
    fail(progress, mixed=False, times=1)
    assert progress.must_stop(total_steps=3) and not progress.must_stop(total_steps=4)


def test_progress_in_a_checkpoint(tmp_path: Path) -> None:
    progress = Progress()
    succeed(progress, *[2.0] * 11)
    progress.fail(mixed=True)
    state = TrainingState(progress, {}, {})
    save_training_state(tmp_path, state, keep=1)
    loaded = load_training_state(tmp_path)
    assert loaded is not None and asdict(loaded.progress) == asdict(progress)
    # As a run of before the range was kept wrote it.
    assert Progress(step=3, skipped=1, skipped_in_a_row=1).max_loss == math.inf


@pytest.mark.parametrize(
    ("keep", "calm_steps", "left"),
    [
        (2, (1, 2, 3, 4, 5), (4, 5)),
        (2, (1, 2, 2, 2, 2), (1, 4, 5)),  # the loss was last near its lowest at step 2: 1 is from before that
        (1, (1, 2, 3, 4, 5), (4, 5)),
        (1, (1, 1, 1, 1, 1), (5,)),  # nothing is from before step 1
        (9, (1, 2, 2, 2, 2), (1, 2, 3, 4, 5)),
    ],
)
def test_checkpoints_that_stay(keep: int, calm_steps: tuple[int, ...], left: tuple[int, ...], tmp_path: Path) -> None:
    for step, calm in enumerate(calm_steps, start=1):
        save_training_state(tmp_path, TrainingState(Progress(step=step, calm_step=calm), {}, {}), keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step}" for step in left]
    calm = calm_steps[-1]
    aside = set_aside_checkpoints(tmp_path, calm)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step}" for step in left if step < calm]
    assert [path.name for path in aside] == [f"diverged-{step}" for step in left if step >= calm]
    assert all(path.is_dir() for path in aside)


# Real runs


def check_what_is_left(run: Path, message: str) -> int:
    """The message's figures; the newest checkpoint, from before the loss turned, and the model of it. Its step."""
    found = re.search(
        r"last near its lowest at step (\d+); from step (\d+) on it or its gradient was over ([\d.]+), or not finite; "
        r"the learning rate there was ([\d.]+), and the gradient norm in the step before (\d+(?:\.\d+)?(?:e\+\d+)?)",
        message,
    )
    assert found, message
    calm, first, limit, lr, norm = map(float, found.groups())
    records = [record for record in runs.records(run) if "loss" in record]
    losses = [record["loss"] for record in records]
    assert losses[int(first) - 1] is None and losses[int(first) - 2] is not None
    lowest = limit / 100
    assert losses[int(calm) - 1] <= 2 * lowest and all(loss > 2 * lowest for loss in losses[int(calm) : int(first) - 1])
    assert lr == pytest.approx(records[int(first) - 1]["lr"], rel=0.01)
    assert norm == pytest.approx(records[int(first) - 2]["gradient_norm"], rel=0.01)
    saved = [int(name.removeprefix("step-")) for name in runs.steps_saved(run) if name.startswith("step-")]
    aside = [name for name in runs.steps_saved(run) if name.startswith("diverged-")]
    newest = max(saved)
    assert newest < calm and all(int(name.removeprefix("diverged-")) >= calm for name in aside) and aside
    assert f"--resume takes {run / 'checkpoints' / f'step-{newest}'}, from before that" in message
    assert read_history(run)[-1]["steps"] == newest
    assert runs.largest_difference(runs.weights(run), runs.weights(run / f"checkpoints/step-{newest}")) == 0
    assert (
        f"a lower rate, such as --lr {min(lr / 4, 0.01):.2g}, or a longer warm-up, such as --warmup-steps 400"
        in message
    )
    assert "annotations" not in message
    return newest


def test_a_rate_that_is_far_too_high(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = ("--data", demo, *DIVERGING, "--output-dir", run)
    with pytest.raises(TrainingStopped, match="the run has diverged") as stop:
        runs.train("pretrain", *flags)
    saved = check_what_is_left(run, str(stop.value))
    assert str(stop.value).endswith(", or --clip-grad-norm 10 where single batches are the cause")
    # A lower rate goes on from there, and stays when the run is resumed once more without it.
    detector = (*runs.DETECTOR, *runs.COUNTS, *runs.MACHINE, "--image-size", runs.SIZE, *runs.TINY[-4:])
    start = ("--data", demo, *detector, *runs.EIGHT, *SAVED, "--max-steps", 60, "--output-dir", run, "--resume")
    runs.train("pretrain", *start, "--lr", 0.002, "--warmup-steps", 1)
    shutil.rmtree(run / "checkpoints/step-60")
    runs.train("pretrain", *start)
    losses = [record for record in runs.records(run) if "loss" in record]
    assert [record["step"] for record in losses] == list(range(1, 61))
    assert {record["lr"] for record in losses[saved:]} == {0.002}
    assert losses[-1]["loss"] < losses[0]["loss"] and "skipped" not in losses[-1]
    assert "resumed with --lr" not in capsys.readouterr().out.rpartition("Direct-PT pretrain")[2]


def test_two_processes_diverge_together(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--data", demo, *DIVERGING, "--micro-batch-size", 4, "--output-dir", run)
    process = runs.launch(2, runs.SCRIPTS / "pretrain.py", *flags)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    messages = {line for line in errors.splitlines() if line.startswith("stopped: the run has diverged")}
    assert len(messages) == 1, errors[-3000:]  # the same on both
    saved = check_what_is_left(run, messages.pop())
    lower = ("--resume", "--lr", 0.002, "--warmup-steps", 1, "--max-hours", 1e-9)  # a single step
    process = runs.launch(2, runs.SCRIPTS / "pretrain.py", *flags, *lower)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert f"the state of step {saved + 1} is saved" in errors
    assert f"from step {saved};" in out and "resumed with --lr 0.002, before 1" in out
    assert "resumed with --warmup-steps 1, before 200" in out


def test_from_the_first_steps(demo: Path, tmp_path: Path) -> None:
    """Weights of 1e27 after one step: nothing from before it is saved, and --resume begins anew."""
    run = tmp_path / "run"
    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, "--max-steps", 30, *SAVED, "--save-every", 1, "--output-dir", run)
    with pytest.raises(
        TrainingStopped, match=r"No checkpoint is from before that: --resume begins anew; the later weights are in div"
    ) as stop:
        runs.train("pretrain", *flags, "--lr", 1e29)
    message = str(stop.value)
    assert re.search(
        r"near its lowest at step 1; from step 2 on it or its gradient was over [\d.]+, or not finite", message
    )
    assert "annotations" not in message
    assert "such as --lr 0.01, or a longer warm-up, such as --warmup-steps 200" in message  # as the recipe has them
    assert not (run / "model").exists()
    assert runs.steps_saved(run) and all(name.startswith("diverged-") for name in runs.steps_saved(run))
    runs.train("pretrain", *flags, "--resume")
    assert json.loads((run / "config.json").read_text())["plan"]["lr"] == 0.002
    assert runs.records(run)[-1]["step"] == 30


def test_the_best_weights_of_a_run_that_diverged(demo: Path, tmp_path: Path) -> None:
    """Evaluated on the way out, they are put aside too; a resumed run finds its best anew."""
    run = tmp_path / "run"
    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, "--max-steps", 12, "--log-every", 1, "--output-dir", run)
    with pytest.raises(TrainingStopped, match=r"the later weights are in .*diverged-best, and may be deleted"):
        runs.train("pretrain", *flags, "--lr", 1e29, "--eval-every", 0.33)
    assert not (run / "best").exists() and (run / "checkpoints/diverged-best/model.safetensors").exists()
    runs.train("pretrain", *flags, "--eval-every", 0.33, "--resume")
    assert (run / "best/model.safetensors").exists()
