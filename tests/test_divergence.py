"""Runs that diverge: seen early, told apart from bad images, and resumed from before it."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import small_runs as runs

from direct_pt.checkpoint import (
    TrainingState,
    checkpoints,
    load_training_state,
    read_history,
    save_training_state,
    set_aside_checkpoints,
)
from direct_pt.errors import TrainingStopped
from direct_pt.progress import MAX_FAILED_STEPS, Progress

SAVED = ("--save-every", 2, "--keep-checkpoints", 9, "--log-every", 1, *runs.NO_EVALUATION)
# A hundredth at first, and a hundredth more at each step, which is too much after some steps.
DIVERGING = (*runs.TINY, *runs.EIGHT, *SAVED, "--max-steps", 60, "--lr", 1, "--warmup-steps", 100)


def advance(progress: Progress, *losses: float) -> None:
    """Steps that succeed, with these losses."""
    for loss in losses:
        progress.succeeded(loss, norm=1.0)
        progress.step += 1


def fail(progress: Progress, mixed: bool, times: int = MAX_FAILED_STEPS) -> None:
    """Steps that fail; the last one is still under way."""
    for time in range(times):
        progress.step += time > 0
        progress.failed(mixed)


# The rules


def test_the_range_of_the_loss() -> None:
    progress = Progress()
    assert progress.max_loss == math.inf  # nothing is known before the first step
    advance(progress, 4.0)
    assert progress.max_loss == 400
    advance(progress, 2.0)
    assert progress.smoothed_loss == pytest.approx(3.8) and progress.max_loss == pytest.approx(380)
    advance(progress, 300.0)  # a bad moment raises the average, not the range
    assert progress.smoothed_loss == pytest.approx(33.42) and progress.max_loss == pytest.approx(380)
    assert (progress.calm_step, progress.step) == (2, 3)
    advance(progress, *[0.0] * 200)
    assert progress.max_loss == 10  # never below: 100 x 0.1


@pytest.mark.parametrize("mixed", [True, False])
def test_what_ten_failed_steps_mean(mixed: bool) -> None:
    progress = Progress()
    advance(progress, 2.0, 1.0, 1.0)
    fail(progress, mixed, MAX_FAILED_STEPS - 1)
    assert not progress.must_stop
    progress.step += 1
    progress.failed(mixed)
    assert progress.must_stop and progress.has_diverged == (not mixed)
    assert (progress.step + 1, progress.first_failed_step) == (13, 4)
    assert progress.skipped == 10


def test_a_few_mixed_steps_at_the_start_are_still_divergence() -> None:
    """On the way out of range some micro-batches pass the limit before others."""
    progress = Progress()
    advance(progress, 2.0)
    fail(progress, mixed=True, times=2)
    for _ in range(8):
        progress.step += 1
        progress.failed(mixed=False)
    assert progress.must_stop and progress.has_diverged


def test_a_good_step_ends_the_row() -> None:
    progress = Progress()
    advance(progress, 2.0)
    fail(progress, mixed=False, times=9)
    progress.step += 1
    advance(progress, 2.0)
    assert progress.skipped_in_a_row == 0 and progress.skipped == 9
    fail(progress, mixed=False, times=9)
    assert not progress.must_stop


def test_progress_in_a_checkpoint(tmp_path: Path) -> None:
    progress = Progress()
    advance(progress, 2.0, 1.9, 1.7)
    progress.failed(mixed=True)
    state = TrainingState(progress, {}, {})
    save_training_state(tmp_path, state, keep=1)
    loaded = load_training_state(tmp_path)
    assert loaded is not None and asdict(loaded.progress) == asdict(progress)
    # As a run of before the range was kept wrote it.
    assert Progress(step=3, skipped=1, skipped_in_a_row=1).max_loss == math.inf


@pytest.mark.parametrize(
    ("saved", "calm", "failed", "left"),
    [
        ((10, 20, 30), 25, 32, (10, 20)),  # 30 was saved on the way out
        ((10, 20, 30), 31, 32, (10, 20, 30)),
        ((10, 20, 30), 30, 32, (10, 20)),  # the loss of step 30 tells of the weights before it
        ((20, 31), 5, 32, (20,)),  # nothing is older than the last calm step
        ((31,), 31, 32, ()),
        ((), 31, 32, ()),
    ],
)
def test_which_checkpoints_are_set_aside(
    saved: tuple[int, ...], calm: int, failed: int, left: tuple[int, ...], tmp_path: Path
) -> None:
    for step in saved:
        save_training_state(tmp_path, TrainingState(Progress(step=step), {}, {}), keep=9)
    aside = set_aside_checkpoints(tmp_path, calm, failed)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step}" for step in left]
    gone = sorted(set(saved) - set(left))
    assert [path.name for path in aside] == [f"diverged-{step}" for step in gone] and all(map(Path.exists, aside))


# Real runs


def message_parts(message: str) -> dict[str, float]:
    """The figures of the message that names a divergence."""
    found = re.search(
        r"last near its lowest, (?P<loss>[\d.]+), at step (?P<calm>\d+), and from step (?P<first>\d+) on over "
        r"100 times that, or not finite; the learning rate there was (?P<lr>[\d.]+), and the gradient norm in the step "
        r"before (?P<norm>\d+(\.\d+)?(e\+\d+)?)",
        message,
    )
    assert found, message
    return {name: float(value) for name, value in found.groupdict().items()}


def check_what_is_left(run: Path, message: str) -> int:
    """The newest checkpoint, from before the first failed step, and the model of it; its step."""
    parts = message_parts(message)
    first, calm = int(parts["first"]), int(parts["calm"])
    records = [record for record in runs.records(run) if "loss" in record]
    assert parts["lr"] == pytest.approx(records[first - 1]["lr"], rel=0.01)
    assert parts["norm"] == pytest.approx(records[first - 2]["gradient_norm"], rel=0.01)
    assert records[first - 1]["loss"] is None and records[first - 2]["loss"] is not None
    saved = [int(name.removeprefix("step-")) for name in runs.steps_saved(run) if name.startswith("step-")]
    assert saved and max(saved) < calm < first and records[calm - 1]["loss"] < 2 * records[0]["loss"]
    assert f"the newest checkpoint is {run / 'checkpoints' / f'step-{max(saved)}'}" in message
    aside = [name for name in runs.steps_saved(run) if name.startswith("diverged-")]
    assert all(int(name.removeprefix("diverged-")) >= calm for name in aside) and aside
    assert read_history(run)[-1]["steps"] == max(saved)
    assert runs.largest_difference(runs.weights(run), runs.weights(run / f"checkpoints/step-{max(saved)}")) == 0
    assert "Go on with --resume and a lower rate" in message and "annotations" not in message
    return max(saved)


def test_a_rate_that_is_far_too_high(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--data", demo, *DIVERGING, "--output-dir", run)
    with pytest.raises(TrainingStopped, match="the run has diverged") as stop:
        runs.train("pretrain", *flags)
    saved = check_what_is_left(run, str(stop.value))
    # A lower rate and clipping go on from there.
    runs.train("pretrain", *flags, "--resume", "--lr", 0.002, "--clip-grad-norm", 10, "--warmup-steps", 1)
    losses = [record for record in runs.records(run) if "loss" in record]
    assert [record["step"] for record in losses] == list(range(1, 61))
    assert losses[saved]["lr"] == 0.002 and losses[-1]["loss"] < losses[0]["loss"]
    assert "skipped" not in losses[-1]


def test_two_processes_diverge_together(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--data", demo, *DIVERGING, "--micro-batch-size", 4, "--output-dir", run)
    process = runs.launch(2, runs.SCRIPTS / "pretrain.py", *flags)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    messages = {line for line in errors.splitlines() if line.startswith("stopped: the run has diverged")}
    assert len(messages) == 1, errors[-3000:]  # the same on both
    saved = check_what_is_left(run, messages.pop())
    process = runs.launch(2, runs.SCRIPTS / "pretrain.py", *flags, "--resume", "--lr", 0.002, "--warmup-steps", 1)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert f"from step {saved};" in out and "resumed with --lr 0.002, before 1" in out
    assert "resumed with --warmup-steps 1, before 100" in out


def test_from_the_first_steps(demo: Path, tmp_path: Path) -> None:
    """Weights of 1e28 after one step: nothing from before it is saved, and --resume begins anew."""
    run = tmp_path / "run"
    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, "--max-steps", 30, *SAVED, "--save-every", 1, "--output-dir", run)
    with pytest.raises(TrainingStopped, match=r"from step 2 on.*there is no checkpoint yet \(later ones") as stop:
        runs.train("pretrain", *flags, "--lr", 1e30)
    assert not (run / "model").exists() and "annotations" not in str(stop.value)
    assert runs.steps_saved(run) and all(name.startswith("diverged-") for name in runs.steps_saved(run))
    runs.train("pretrain", *flags, "--resume", "--max-steps", 30)
    assert json.loads((run / "config.json").read_text())["plan"]["lr"] == 0.002
    assert runs.records(run)[-1]["step"] == 30
