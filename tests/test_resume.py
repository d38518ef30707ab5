"""Runs that are interrupted and go on: as if nothing had happened, or, where something else is wanted, saying so.

Kills at random moments are in faults/, several processes in test_training.py and test_launch.py.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_runs as runs
import torch
from safetensors.torch import load_file

from direct_pt.batch import Batch
from direct_pt.checkpoint import read_history
from direct_pt.coco_eval import evaluate
from direct_pt.errors import InputError, StopSignal, TrainingStopped
from direct_pt.program.signals import ECHO_SECONDS
from direct_pt.training import start
from direct_pt.training.loop import StepOutcome, Trainer
from direct_pt.training.resume import launcher_id

pytestmark = runs.cpu_only

STEPS = 12  # 24 images are 3 steps an epoch
# Logged between the checkpoints, so that sums are under way when a run stops; a step is four micro-batches.
LENGTH = ("--global-batch-size", 8, "--micro-batch-size", 2, "--max-steps", STEPS, "--log-every", 5, "--save-every", 4)
SETTINGS = {
    "paper's": (*LENGTH, "--eval-every", 2),
    "options, two workers": (
        *LENGTH, "--eval-every", 2, "--num-workers", 2, "--clip-grad-norm", 2, "--ema", 0.9, "--lr-schedule", "cosine",
    ),
    "drop path, AdamW": (*LENGTH, "--eval-every", 2, "--backbone", "test_convnext"),
}  # fmt: skip


class Stopped(Trainer):
    """Gets a stop signal in step 5, while its second micro-batch is read."""

    number = signal.SIGTERM

    def _batches(self) -> Iterator[Batch]:
        for count, batch in enumerate(super()._batches(), start=self.progress.step * self.plan.accumulation):
            if count == 4 * self.plan.accumulation + 1:
                os.kill(os.getpid(), self.number)
            yield batch


def train(run: Path, demo: Path, *flags: object, trainer: type[Trainer] = Trainer) -> None:
    """Pre-train with `trainer` as the loop."""
    start.Trainer = trainer  # type: ignore[misc]
    try:
        runs.train("pretrain", "--data", demo, *runs.TINY, *flags, "--output-dir", run)
    finally:
        start.Trainer = Trainer  # type: ignore[misc]


def assert_same_run(run: Path, other: Path, steps: int = STEPS) -> None:
    """To the last bit: weights, optimizer, moving average, every record but its timings, the best model."""
    one, two = (folder / f"checkpoints/step-{steps}" for folder in (run, other))
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    for name in files:
        if name == "config.json":
            assert runs.read_json(one / name) == runs.read_json(two / name)
        else:
            assert runs.largest_difference(load_file(one / name), load_file(two / name)) == 0
    for folder in ("model", "best"):
        assert runs.largest_difference(runs.weights(run / folder), runs.weights(other / folder)) == 0
        assert read_history(run / folder) == read_history(other / folder)
    assert runs.records(run) == runs.records(other)


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def uninterrupted(
    request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[object, ...], Path]:
    """Flags, and a run with them."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(run, demo, *request.param)
    return request.param, run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stopped_in_the_middle_of_a_step(
    uninterrupted: tuple[tuple[object, ...], Path], demo: Path, number: signal.Signals, tmp_path: Path
) -> None:
    """It is finished, saved, and the run goes on from it."""
    flags, reference = uninterrupted
    if flags != SETTINGS["paper's"] and number != signal.SIGTERM:
        pytest.skip("the signals do not depend on the settings")
    run = tmp_path / "run"
    Stopped.number = number
    with pytest.raises(
        StopSignal, match=f"{number.name}: the state of step 5 is saved; continue with --resume"
    ) as stop:
        train(run, demo, *flags, trainer=Stopped)
    assert stop.value.exit_status == (130 if number == signal.SIGINT else 143)
    assert runs.steps_saved(run) == ["step-4", "step-5"]
    train(run, demo, *flags, "--resume")
    assert_same_run(run, reference)


def test_killed_while_the_last_curves_were_drawn(demo: Path, tmp_path: Path) -> None:
    """The run has ended: all that is left is the unfinished picture, and it is drawn again."""
    run = tmp_path / "run"
    flags = (*runs.EIGHT, "--max-steps", 2, *runs.NO_EVALUATION)
    train(run, demo, *flags)
    picture = (run / "curves.png").read_bytes()
    (run / "curves.png").unlink()
    (run / ".curves.png.partial").write_bytes(picture[:100])
    train(run, demo, *flags, "--resume")
    assert (run / "curves.png").read_bytes() == picture and not list(run.rglob(".*"))


def test_stopped_in_an_evaluation(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once: the state was saved before, and the evaluation is done anew."""
    flags, run, reference = SETTINGS["paper's"], tmp_path / "run", tmp_path / "reference"
    train(reference, demo, *flags)

    def interrupted(*arguments: object, **more: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(*arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(StopSignal, match="the state of step 6 is saved"):
        patched.setattr("direct_pt.training.loop.evaluate", interrupted)
        train(run, demo, *flags)
    assert not [record for record in runs.records(run) if "bbox" in record] and not (run / "best").exists()
    train(run, demo, *flags, "--resume")
    assert_same_run(run, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run(number: signal.Signals, demo: Path, tmp_path: Path) -> None:
    """Also to those that read images, as Slurm does: the step under way needs what they read."""
    flags = (*runs.TINY, *LENGTH, "--max-steps", 400, "--num-workers", 2, "--log-every", 1, *runs.NO_EVALUATION)
    process = runs.start_script(
        "pretrain", "--data", demo, *flags, "--output-dir", tmp_path / "run", new_session=True
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors[-2000:]
    assert errors.splitlines()[-1].startswith(f"stopped: {number.name}: the state of step")


def test_a_second_signal_ends_at_once(demo: Path, tmp_path: Path) -> None:
    """But not the launcher's echo of the first one."""
    process = runs.start_script(
        "pretrain", "--data", demo, *runs.TINY, *LENGTH, "--global-batch-size", 2**12, *runs.NO_EVALUATION,
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert process.stderr is not None
    errors = b""
    while b"0/12" not in errors:  # the progress bar as it begins, which ends with no new line: signals are caught
        read = os.read(process.stderr.fileno(), 4096)
        assert read, errors
        errors += read
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(ECHO_SECONDS + 1)
    assert process.poll() is None  # in its first step of 2,048 micro-batches, a minute on any machine
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM


# Damage


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:-1000]
    elif how == "altered":
        content[-1000] ^= 1
    path.write_bytes(content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("model", "cut", "cannot be read as tensors"),
        ("model", "altered", "its checksum does not fit its content"),
        ("optimizer", "altered", "its checksum does not fit its content"),
        ("optimizer", "missing", "cannot be read as tensors"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    uninterrupted: tuple[tuple[object, ...], Path], demo: Path, name: str, how: str, reason: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags, reference = uninterrupted
    if flags != SETTINGS["paper's"]:
        pytest.skip("the files do not depend on the settings")
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    file = run / f"checkpoints/step-{STEPS}/{name}.safetensors"
    damage(file, how)
    train(run, demo, *flags, "--resume")
    captured = capsys.readouterr()
    assert f"warning: {file}: {reason}" in captured.err and "the checkpoint before it is used" in captured.err
    assert "from step 8" in captured.out
    assert_same_run(run, reference)


# Another way to go on


@pytest.fixture(scope="module")
def without_batchnorm(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps in one process, a checkpoint after each."""
    run = tmp_path_factory.mktemp("group") / "run"
    train(run, demo, *runs.THREE_STEPS, "--micro-batch-size", 2, "--save-every", 1, "--keep-checkpoints", 9)
    return run


def copy_at(run: Path, folder: Path, step: int) -> Path:
    """As it is when it dies soon after a step."""
    later = [f"step-{number}" for number in range(step + 1, 10)]
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*later))
    return folder


def test_with_two_processes_in_place_of_one(without_batchnorm: Path, demo: Path, tmp_path: Path) -> None:
    run = copy_at(without_batchnorm, tmp_path / "run", 2)
    flags = (*runs.TINY, *runs.THREE_STEPS, "--micro-batch-size", 2, "--save-every", 1, "--keep-checkpoints", 9)
    process = runs.launch(
        2, runs.SCRIPTS / "pretrain.py", "--data", demo, *flags, "--output-dir", run, "--resume"
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-5000:]
    assert "resumed on 2 process(es) with 2 images at once, before 1 with 2: the same global batch" in stdout
    assert "8 images a step = 2 process(es) x 2 micro-batch x 2 accumulated" in stdout
    assert runs.largest_difference(runs.weights(run), runs.weights(without_batchnorm)) < 1e-6


def test_with_another_micro_batch_and_learning_rate(
    without_batchnorm: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a message may advise; other flags stay refused (test_bad_input.py)."""
    run = copy_at(without_batchnorm, tmp_path / "run", 2)
    train(run, demo, *runs.THREE_STEPS, "--micro-batch-size", 8, "--resume")
    assert "resumed on 1 process(es) with 8 images at once, before 1 with 2" in capsys.readouterr().out
    assert runs.largest_difference(runs.weights(run), runs.weights(without_batchnorm)) < 1e-6

    run = copy_at(without_batchnorm, tmp_path / "other", 2)
    train(run, demo, *runs.THREE_STEPS, "--micro-batch-size", 2, "--lr", 0.0001, "--clip-grad-norm", 5, "--resume")
    output = capsys.readouterr().out
    assert "resumed with --lr 0.0001, before 0.002" in output and "--clip-grad-norm 5.0, not given before" in output
    assert runs.records(run)[-2]["lr"] == 0.0001


def test_a_run_of_before_there_was_a_small_recipe(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """24 images in the paper's batch of 64: it keeps batch, length, rate and warm-up."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = (*runs.DETECTOR, *runs.COUNTS, *runs.MACHINE, "--image-size", runs.SIZE, "--backbone", "test_resnet")
    flags = ("--data", demo, *flags, "--channels", 16, *runs.NO_EVALUATION, "--epochs", 8, "--save-every", 2)
    runs.train("pretrain", *flags, "--recipe", "paper", "--keep-checkpoints", 9, "--output-dir", whole)
    assert runs.steps_saved(whole) == ["step-2", "step-3"]
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/step-3")
    config = runs.read_json(run / "config.json")
    del config["settings"]["recipe"]
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    runs.train("pretrain", *flags, "--output-dir", run, "--resume")
    output = capsys.readouterr().out
    assert (
        "batch      64 images a step" in output and "3 steps = 8.0 epochs, from step 2; lr 0.08, warm-up 500" in output
    )
    assert_same_run(run, whole, 3)


def test_a_restart_by_the_launcher_goes_on(
    without_batchnorm: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody said --resume. Only what this launcher began: another's run may be older, with other flags."""
    run = copy_at(without_batchnorm, tmp_path / "run", 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    flags = (*runs.THREE_STEPS, "--micro-batch-size", 2, "--save-every", 1, "--keep-checkpoints", 9)
    config = runs.read_json(run / "config.json")
    (run / "config.json").write_text(json.dumps(config | {"launcher": "elsewhere 1 2.00"}))
    with pytest.raises(InputError, match="holds a run already; continue with --resume"):
        train(run, demo, *flags)
    (run / "config.json").write_text(json.dumps(config))
    train(run, demo, *flags)
    assert_same_run(run, without_batchnorm, 3)


def test_a_parent_outside_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a container has the parent 0, which is no process there."""
    own = launcher_id()
    assert own == launcher_id() and not own.endswith("unknown")
    monkeypatch.setattr(os, "getppid", lambda: 0)
    assert launcher_id().endswith(" 0 unknown")


# Options


def test_moving_average(demo: Path, tmp_path: Path) -> None:
    """Of the weights after each step, with a decay that rises: 1 - (1 + n)^(-2/3), at most as asked for."""
    run = tmp_path / "run"
    length = ("--global-batch-size", 8, "--micro-batch-size", 8, "--max-steps", 4)
    train(run, demo, *length, "--ema", 0.5, "--save-every", 1, "--keep-checkpoints", 9, *runs.NO_EVALUATION)
    name = "roi_head.box_heads.0.class_logits.weight"
    expected = torch.zeros(())
    for step in range(1, 5):
        weights = load_file(run / f"checkpoints/step-{step}/model.safetensors")[name]
        decay = min(0.5, 1 - step ** (-2 / 3))
        expected = decay * expected + (1 - decay) * weights
        average = load_file(run / f"checkpoints/step-{step}/average.safetensors")[name]
        assert torch.allclose(average, expected, atol=1e-7)
    assert torch.equal(runs.weights(run)[name], average) and not torch.equal(average, weights)
    assert torch.equal(runs.weights(run / "best")[name], average)


def test_gradient_clipping(demo: Path, tmp_path: Path) -> None:
    """The first update is lr times a gradient of that norm (weight decay is small)."""
    weights = []
    for name, clip in (("clipped", ("--clip-grad-norm", 0.5)), ("free", ())):
        run = tmp_path / name
        flags = (*runs.EIGHT, "--warmup-steps", 0, "--max-steps", 1, *runs.NO_EVALUATION)
        train(run, demo, *flags, *clip)
        momentum = load_file(run / "checkpoints/step-1/optimizer.safetensors")
        weights.append(torch.cat([value.flatten() for value in momentum.values()]).norm())
    clipped, free = weights
    assert free > 2 and clipped == pytest.approx(0.5, rel=0.02)


# Memory


def test_out_of_memory_later(demo: Path, tmp_path: Path) -> None:
    """A real allocation that fails: the state is saved, and the message has the flag to go on with."""
    run = tmp_path / "run"
    flags = ("--global-batch-size", 8, "--micro-batch-size", 4, "--max-steps", 6, *runs.NO_EVALUATION)

    class Hungry(Trainer):
        """In step 3 it asks for more than there is."""

        def _agree(self, good: torch.Tensor, loss: torch.Tensor, norm: torch.Tensor | None) -> StepOutcome:
            if self.progress.step == 2:
                torch.empty(2**60, dtype=torch.uint8)
            return super()._agree(good, loss, norm)

    with pytest.raises(TrainingStopped) as stop:
        train(run, demo, *flags, trainer=Hungry)
    message = str(stop.value)
    assert "step 3: out of memory with 4 images at once" in message and "\n" not in message
    assert f"the newest checkpoint is {run / 'checkpoints/step-2'}" in message
    assert "--resume and --micro-batch-size 2, which keeps the global batch" in message
    train(run, demo, *flags, "--micro-batch-size", 2, "--resume")
    assert runs.records(run)[-1]["step"] == 6

    reference = tmp_path / "reference"  # what was saved is the state of step 2 to the bit
    train(reference, demo, *flags, "--save-every", 2, "--keep-checkpoints", 9)
    train(tmp_path / "again", demo, *flags, "--save-every", 2, "--keep-checkpoints", 9)
    states = [load_file(r / "checkpoints/step-2/model.safetensors") for r in (reference, tmp_path / "again")]
    assert runs.largest_difference(*states) == 0
