"""Real runs of both stages on real images: what they write, and that neither accumulation, nor a second process, nor an
interruption changes what is learnt."""

from direct_pt.program.run import run_program
import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import torch
from PIL import Image
from safetensors.torch import load_file

from direct_pt.checkpoint import from_pretrained, model_folder, read_history, save_model
from direct_pt.coco_eval import METRICS
from direct_pt.errors import InputError, StopSignal, TrainingStopped
from direct_pt.recipes import PRETRAIN
from direct_pt.training import run_folder
from direct_pt.training.plan import make_plan
from direct_pt.training.settings import PretrainFlags, parse_flags

ALIKE = 1e-6  # between weights that differ by the order of sums only, after one step in float32
ALIKE_FLOAT64 = 1e-12  # the same after three steps in float64
STEPS = 12  # of the run that is interrupted: 24 images are 3 steps an epoch
PERIOD = ("--max-steps", str(STEPS), *runs.NO_EVALUATION, "--log-every", "1")


# From files to metrics and pictures


def test_drawing_takes_a_small_share_of_the_time(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The charts are drawn at the first save, at times, and at the end, when they show all records."""
    drawn: list[int] = []
    monkeypatch.setattr(run_folder, "plot_curves", lambda records, path: drawn.append(len(records)))
    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, "--max-steps", 12, "--save-every", 1, "--log-every", 1)
    for share, drawings in ((1e-9, 2), (1e9, 13)):
        drawn.clear()
        monkeypatch.setattr(run_folder, "DRAWING_SHARE", share)
        runs.train("pretrain", *flags, *runs.NO_EVALUATION, "--output-dir", tmp_path / str(drawings))
        assert len(drawn) == drawings and drawn == sorted(set(drawn)) and drawn[0] == 1
        assert drawn[-1] == len(runs.records(tmp_path / str(drawings)))


def test_files_of_a_run(pretrained: Path, demo: Path) -> None:
    names = sorted(path.name for path in pretrained.iterdir())
    files = ["config.json", "curves.png", "metrics.jsonl", "run.html"]
    assert names == sorted(["best", "checkpoints", "model", "run_pictures", *files])
    assert runs.steps_saved(pretrained) == ["step-2", "step-4"]
    for folder in ("model", "best"):
        assert sorted(path.name for path in (pretrained / folder).iterdir()) == ["config.json", "model.safetensors"]
    with Image.open(pretrained / "curves.png") as picture:
        assert picture.format == "PNG"

    config = runs.read_json(pretrained / "config.json")
    assert set(config) == {"settings", "choices", "plan", "data", "git", "launcher"}
    flags = parse_flags(PretrainFlags, "", ["--config", str(pretrained / "config.json")])
    plan = make_plan(flags.schedule, PRETRAIN.recipe(runs.MODEL, "sgd", "small"), runs.TRAIN_IMAGES, 1)
    assert config["settings"] == flags.to_dict() and flags.data.data == demo
    assert config["plan"] == json.loads(json.dumps(asdict(plan))) and (plan.total_steps, plan.eval_steps) == (4, 2)

    lines = runs.records(pretrained)
    assert [(record["step"], "loss" in record) for record in lines] == [
        (1, True), (2, True), (2, False), (3, True), (4, True), (4, False),
    ]  # fmt: skip
    for record in lines:
        assert record["epoch"] == pytest.approx(record["step"] * 8 / runs.TRAIN_IMAGES)
        if "loss" in record:
            assert set(record["losses"]) == {"rpn_objectness", "rpn_box", "roi_class", "roi_box"}
            assert record["loss"] == pytest.approx(sum(record["losses"].values())) and np.isfinite(record["loss"])
            assert record["lr"] == plan.learning_rate(record["step"] - 1)
        else:
            assert set(record["bbox"]) == set(METRICS)
            assert set(record["per_class"]) == {str(digit) for digit in range(10)}
    # The model is that of the last step; the best is the first evaluation's, as nothing was better.
    assert [stage["steps"] for stage in read_history(pretrained, "last")] == [4]
    assert [stage["steps"] for stage in read_history(pretrained / "best")] == [2]
    for folder, state in (("model", "step-4"), ("best", "step-2")):
        saved = runs.weights(pretrained / "checkpoints" / state)
        assert runs.largest_difference(runs.weights(pretrained / folder), saved) == 0


def test_finetune_evaluate_predict(
    pretrained: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, found, pictures = tmp_path / "finetuned", tmp_path / "found", tmp_path / "pictures"
    flags = ("--global-batch-size", 4, "--micro-batch-size", 2, "--max-steps", 2, *runs.NO_EVALUATION)
    runs.train("finetune", "--data", demo, *runs.FINETUNE, *flags, "--init", pretrained, "--output-dir", run)
    banner = capsys.readouterr().out
    ap = runs.records(pretrained)[-1]["bbox"]["AP"]
    source = f"{pretrained / 'model'} (step 4, AP {ap:.3f} on its validation split)"
    assert f"156 of 156 tensors loaded from {source}; BatchNorm, stem and first stage frozen" in banner
    assert "trainable  51 of 96 tensors" in banner
    assert "recipe     small (under 5,000 training images): batch 4, lr 0.002, warm-up 1 steps; the paper's" in banner
    before, after = runs.weights(pretrained), runs.weights(run)
    same = {name for name in before if torch.equal(before[name], after[name])}
    first_stage = ("backbone.network.conv1", "backbone.network.bn1", "backbone.network.layer1.")
    assert {name for name in before if name.startswith(first_stage) or "running" in name} <= same
    assert not {name for name in before if name.startswith(("fpn.", "roi_head."))} & same
    assert [stage["stage"] for stage in read_history(run)] == ["pretrain", "finetune"]
    assert (from_pretrained(run).config.short_side, from_pretrained(run).config.long_side) == (runs.SIZE, 128)

    # Its own figures of the last step, read from the checkpoint.
    runs.call_script("evaluate", "--checkpoint", run, "--weights", "last", "--data", demo, *runs.MACHINE)
    assert runs.read_metrics(run / "metrics.json") == {key: runs.records(run)[-1][key] for key in ("bbox", "per_class")}

    # And of a detector that finds something, in pycocotools' hands.
    eager = runs.make_eager(run, tmp_path / "eager")
    runs.call_script("evaluate", "--checkpoint", eager, "--data", demo, *runs.MACHINE, "--output-dir", found)
    truth_data = runs.make_truth(demo, found / "predictions.json", tmp_path / "truth")
    runs.call_script("evaluate", "--checkpoint", eager, "--data", truth_data, *runs.MACHINE, "--output-dir", found)
    metrics = runs.read_metrics(found / "metrics.json")
    assert set(metrics) == {"bbox", "per_class"} and metrics["bbox"]["AP"] > 0.05
    objects = runs.read_json(truth_data / "annotations/instances_val.json")["annotations"]
    assert sum(row["objects"] for row in metrics["per_class"].values()) == len(objects) > 100
    figures = runs.pycocotools_figures(truth_data / "annotations/instances_val.json", found / "predictions.json")
    assert list(metrics["bbox"].values()) == pytest.approx(figures, abs=1e-12)
    rows = runs.read_json(found / "predictions.json")
    assert {row["image_id"] for row in rows} == set(range(1, runs.VAL_IMAGES + 1))
    assert {row["category_id"] for row in rows} <= set(range(10, 101, 10))

    photos = sorted((demo / "images").glob("val_*"))[:3]
    (tmp_path / "inputs").mkdir()
    for photo in photos[1:]:
        shutil.copy(photo, tmp_path / "inputs")
    (tmp_path / "inputs" / "torn.png").write_bytes(b"no picture")
    capsys.readouterr()
    inputs = (photos[0], tmp_path / "inputs")
    flags = (*inputs, "--output-dir", pictures, "--score-threshold", 0.08, *runs.MACHINE)
    runs.call_script("predict", "--checkpoint", eager, *flags)
    assert f"unreadable, skipped: {tmp_path / 'inputs' / 'torn.png'}" in capsys.readouterr().out
    assert sorted(path.name for path in pictures.iterdir()) == sorted(
        ["predictions.json", *(photo.name for photo in photos)]
    )
    rows = runs.read_json(pictures / "predictions.json")
    assert {row["image_id"] for row in rows} == {1, 3, 4}  # the torn one, the second by its name, has none
    assert {Path(row["file_name"]).name for row in rows} == {photo.name for photo in photos}
    assert all(row["category_id"] == 10 * int(row["category_name"]) + 10 for row in rows)
    # The same detections as in the evaluation of these images, of those that score enough.
    numbers = {1: 1, 3: 2, 4: 3}  # from ours to the data set's
    scores = sorted((numbers[row["image_id"]], row["score"]) for row in rows)
    evaluated = [(row["image_id"], row["score"]) for row in runs.read_json(found / "predictions.json")]
    evaluated = sorted((image, score) for image, score in evaluated if image <= 3 and score > 0.08)
    assert np.array(scores) == pytest.approx(np.array(evaluated), abs=1e-5)


def test_from_random_weights_in_stage_two(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--global-batch-size", 2, "--max-steps", 1, "--drop-empty")
    runs.train(
        "finetune", "--data", demo, *runs.FINETUNE, *runs.DETECTOR, *flags, "--init", "none", "--output-dir", tmp_path
    )
    banner = capsys.readouterr().out
    assert (
        "random: 0 of 156 tensors loaded (seed 0); nothing frozen" in banner and "trainable  96 of 96 tensors" in banner
    )
    assert "BatchNorm trains on micro-batches of 2" in banner
    assert "23 images (0 without objects)" in banner  # one of the 24 has none


def test_the_time_that_a_run_will_take(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told once, after twelve steps."""
    flags = (
        *runs.TINY,
        *runs.EIGHT,
        "--max-steps",
        28,
        "--eval-every",
        7,
        "--save-every",
        14,
        "--output-dir",
        tmp_path,
    )
    line = (
        r"time       [\d.e-]+ s a step: \d+ s for the other 16 steps, until about \w{3} \d\d:\d\d; evaluation every 21"
    )
    runs.train("pretrain", "--data", demo, *flags)
    output = capsys.readouterr().out
    assert len(re.findall(line + r" steps, which comes on top, the next one after step 21 in \d+ s", output)) == 1
    assert re.search(r"step 21 \(validation loss \d+\.\d+, \d+ s\): AP", output)


# Accumulation and processes


def train_without_batchnorm(demo: Path, run: Path, model: str, micro_batch_size: int, *flags: object) -> Path:
    """Steps of eight images in this process."""
    flags = (*runs.PRETRAIN, *runs.THREE_STEPS, "--model", model, "--micro-batch-size", micro_batch_size, *flags)
    runs.train("pretrain", *runs.train_part(demo), *flags, "--output-dir", run)
    return run


@pytest.fixture(scope="module", params=runs.COMPARED)
def at_once(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A detector, and its run in one process with eight images at once."""
    with runs.float64():
        run = train_without_batchnorm(demo, tmp_path_factory.mktemp("at_once") / "run", request.param, 8)
    return request.param, run


@pytest.fixture(scope="module")
def eager(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds something in every image."""
    return runs.make_eager(pretrained, tmp_path_factory.mktemp("eager"))


@pytest.fixture(scope="module")
def truth_data(eager: Path, demo: Path) -> Path:
    """The demo data, with some of what `eager` finds as the validation images' objects."""
    runs.call_script("evaluate", "--checkpoint", eager, "--data", demo, *runs.MACHINE)
    return runs.make_truth(demo, eager / "predictions.json", eager / "truth")


@pytest.fixture(scope="module")
def two(demo: Path, truth_data: Path, eager: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes do; see two_processes.py."""
    output = tmp_path_factory.mktemp("two")
    process = runs.launch(2, Path(__file__).with_name("two_processes.py"), output, demo, truth_data, eager)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-5000:]
    (output / "stdout.txt").write_text(stdout)
    return output


def assert_alike(run: Path, other: Path, alike: float) -> None:
    """The same weights and the same losses, but for rounding."""
    difference = runs.largest_difference(runs.weights(run), runs.weights(other))
    print(f"largest difference {difference:.2e}")
    assert difference <= alike
    for mine, theirs in zip(runs.records(run), runs.records(other), strict=True):
        assert mine["step"] == theirs["step"] and mine["lr"] == theirs["lr"]
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5, abs=1e-6)


def test_accumulated_is_one_large_batch(at_once: tuple[str, Path], demo: Path, tmp_path: Path) -> None:
    model, run = at_once
    with runs.float64():
        train_without_batchnorm(demo, tmp_path, model, 2)
    assert_alike(tmp_path, run, ALIKE_FLOAT64)


@pytest.mark.parametrize("model", runs.COMPARED)
def test_accumulated_is_one_large_batch_in_float32(model: str, demo: Path, tmp_path: Path) -> None:
    """One step at the full learning rate: later ones part at ReLU's kinks and NMS's threshold, see `float64`."""
    flags = ("--max-steps", 1, "--warmup-steps", 0)
    runs_made = [train_without_batchnorm(demo, tmp_path / str(size), model, size, *flags) for size in (8, 2)]
    assert_alike(*runs_made, ALIKE)


def test_two_processes_train_as_one(at_once: tuple[str, Path], two: Path) -> None:
    model, run = at_once
    assert_alike(two / model, run, ALIKE_FLOAT64)
    text = (two / "stdout.txt").read_text()
    assert "2 x CPU" in text and "8 images a step = 2 process(es) x 4 micro-batch x 1 accumulated" in text
    assert text.count("Direct-PT pretrain") == 6  # as many runs, each with one banner


def test_two_processes_evaluate_as_one(eager: Path, two: Path, truth_data: Path, tmp_path: Path) -> None:
    """Nine images over two processes: each counted once."""
    flags = ("--checkpoint", eager, "--data", truth_data, "--output-dir", tmp_path, *runs.MACHINE)
    runs.call_script("evaluate", *flags)
    one, both = (runs.read_json(folder / "predictions.json") for folder in (tmp_path, two / "evaluation"))
    assert one == both and len(one) > 9 * 50
    one, both = (runs.read_metrics(folder / "metrics.json") for folder in (tmp_path, two / "evaluation"))
    assert one == both and one["bbox"]["AP"] > 0.05


def test_batchnorm_statistics_are_the_mean_of_the_processes(two: Path) -> None:
    (before0, after0, frozen), (before1, after1, _) = (torch.load(two / f"statistics{rank}.pt") for rank in (0, 1))
    running = [name for name in before0 if name.endswith(("running_mean", "running_var"))]
    assert len(running) == 40
    for name in running:
        assert torch.equal(after0[name], after1[name]) or name.startswith(frozen)
        if name.startswith(frozen):  # does not train: left alone
            assert torch.equal(after0[name], before0[name]) and torch.equal(after1[name], before1[name])
        else:
            assert not torch.equal(before0[name], before1[name])
            assert torch.allclose(after0[name], (before0[name] + before1[name]) / 2, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(before0[name], after0[name]) for name in before0 if name not in running)


def test_processes_end_with_the_same_detector(two: Path) -> None:
    """Weights and BatchNorm statistics, after a run of either kind; what is saved is theirs."""
    for run in ("whole", "stopped"):
        mine, theirs = (torch.load(two / run / f"rank{rank}.pt") for rank in (0, 1))
        assert runs.largest_difference(mine, theirs) == 0
        assert runs.largest_difference(mine, runs.weights(two / run)) == 0


def test_a_signal_to_one_process_stops_both_at_the_same_step(two: Path) -> None:
    messages, saved = runs.read_json(two / "stop.json")
    expected = ["SIGTERM: the state of step 2 is saved; continue with --resume", 128 + signal.SIGTERM]
    assert messages == [expected, expected]
    assert saved == ["step-2"]
    assert runs.largest_difference(runs.weights(two / "stopped"), runs.weights(two / "whole")) == 0
    assert runs.records(two / "stopped") == runs.records(two / "whole")


# Interruptions


@pytest.fixture(scope="module")
def uninterrupted(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With BatchNorm, so that its statistics are in question too."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = (*runs.PRETRAIN, *runs.EIGHT, *PERIOD, "--save-every", 5, "--keep-checkpoints", 9)
    runs.train("pretrain", "--data", demo, *flags, "--output-dir", run)
    assert runs.steps_saved(run) == ["step-10", "step-12", "step-5"]
    return run


def assert_same_run(run: Path, other: Path) -> None:
    """To the last bit: weights, optimizer, and every record but its timings."""
    assert runs.largest_difference(runs.weights(run), runs.weights(other)) == 0
    states = [load_file(folder / f"checkpoints/step-{STEPS}/optimizer.safetensors") for folder in (run, other)]
    assert len(states[0]) == 96 and all(name.endswith("/momentum_buffer") for name in states[0])
    assert runs.largest_difference(*states) == 0
    assert runs.records(run) == runs.records(other)
    assert read_history(run) == read_history(other)


@runs.cpu_only
def test_resumed_is_uninterrupted(uninterrupted: Path, demo: Path, tmp_path: Path) -> None:
    """From the middle of an epoch. What a killed run leaves: an older state than its records and its model."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, ignore=shutil.ignore_patterns("step-1?"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    flags = (*runs.PRETRAIN, *runs.EIGHT, *PERIOD, "--save-every", 4, "--resume")
    runs.train("pretrain", "--data", demo, *flags, "--output-dir", run)
    assert_same_run(run, uninterrupted)


def test_resuming_what_is_done_changes_nothing(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, ignore=shutil.ignore_patterns("step-5", "step-10"))
    contents = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    flags = ("--config", run / "config.json", "--output-dir", run, "--resume")
    config = (run / "config.json").read_text()
    runs.train("pretrain", *flags, "--lr", 7)  # the model did not come out of it
    output = capsys.readouterr().out
    assert f"done: {run / 'model'}" in output and "the run has ended: nothing is trained" in output
    assert (run / "config.json").read_text() == config
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == contents
    assert runs.records(run) == runs.records(uninterrupted)


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Until a file of that name has something in it."""
    deadline = time.monotonic() + 120
    while not any(path.is_dir() or path.stat().st_size for path in folder.glob(pattern)):
        if time.monotonic() > deadline:
            process.kill()
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@runs.cpu_only
def test_signals_to_a_process(uninterrupted: Path, demo: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL in the middle of a save: what is visible is whole, and the end is the same."""
    run = tmp_path / "run"
    flags = ("--data", demo, *runs.PRETRAIN, *runs.EIGHT, *PERIOD, "--output-dir", run)
    first = runs.start_script("pretrain", *flags, "--save-every", 1000)
    wait_for(first, run, "metrics.jsonl")
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM, errors
    (saved,) = runs.steps_saved(run)
    step = int(saved.removeprefix("step-"))
    assert 1 <= step < STEPS and runs.records(run)[-1]["step"] == step
    assert errors.splitlines()[-1] == f"stopped: SIGTERM: the state of step {step} is saved; continue with --resume"
    assert "Traceback" not in errors
    assert runs.largest_difference(runs.weights(run), runs.weights(run / "checkpoints" / saved)) == 0

    second = runs.start_script("pretrain", *flags, "--save-every", 1, "--resume", "--keep-checkpoints", 1)
    wait_for(second, run / "checkpoints", ".step-*.partial")
    second.kill()
    _, errors = second.communicate(timeout=120)
    assert second.returncode == -signal.SIGKILL, errors
    visible = list((run / "checkpoints").glob("step-*"))
    assert visible
    for folder in visible:
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "optimizer.safetensors"}
        assert runs.weights(folder) and load_file(folder / "optimizer.safetensors")
    # The model is at least as new as any state, lest a run that was killed at its end have none.
    assert from_pretrained(run) and read_history(run)[-1]["steps"] >= max(int(path.name[5:]) for path in visible)

    runs.train("pretrain", *flags, "--resume")
    assert_same_run(run, uninterrupted)


def test_control_c(demo: Path, tmp_path: Path) -> None:
    """To this process, while a worker reads images for it."""
    flags = (*runs.PRETRAIN, *runs.EIGHT, "--max-steps", 400, "--num-workers", 1, "--log-every", 1, *runs.NO_EVALUATION)
    pid = os.fork()
    if pid == 0:  # sends Ctrl-C to its parent when the first step is logged
        while not (tmp_path / "run/metrics.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getppid(), signal.SIGINT)
        os._exit(0)
    with pytest.raises(StopSignal, match="SIGINT: the state of step") as stop:
        runs.train("pretrain", "--data", demo, *flags, "--output-dir", tmp_path / "run")
    os.waitpid(pid, 0)
    assert stop.value.exit_status == 130 and len(runs.steps_saved(tmp_path / "run")) == 1


# Things that go wrong on the way


def damaged(demo: Path, folder: Path, images: list[int]) -> Path:
    """A copy of the demo set with some training images cut short."""
    shutil.copytree(demo, folder)
    for image in images:
        path = folder / f"images/train_{image:06d}.jpg"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])  # its header is whole
    return folder


def test_one_unreadable_image_is_named_and_replaced(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = damaged(demo, tmp_path / "data", [7])
    (data / "images/val_000003.jpg").write_bytes(b"")
    flags = (*runs.PRETRAIN, *runs.EIGHT, "--max-steps", 4, *runs.NO_EVALUATION, "--log-every", 1)
    runs.train("pretrain", "--data", data, *flags, "--output-dir", tmp_path / "run")
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "unreadable image, replaced by another" in line]
    assert "train_000007.jpg" in line
    (line,) = [line for line in text.splitlines() if "unreadable image, no detections" in line]
    assert "val_000003.jpg" in line
    assert runs.steps_saved(tmp_path / "run") == ["step-4"]
    assert runs.records(tmp_path / "run")[-1]["bbox"]["AP"] >= 0


def test_many_unreadable_images_stop_the_run(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = damaged(demo, tmp_path / "data", [3, 7, 9, 20]), tmp_path / "run"
    flags = (*runs.PRETRAIN, *runs.EIGHT, "--max-steps", 4, *runs.NO_EVALUATION, "--log-every", 1)
    flags = ("--data", data, *flags, "--output-dir", run)
    with pytest.raises(SystemExit) as end:
        run_program(lambda: runs.train("pretrain", *flags))
    message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1
    assert message.startswith("stopped: ") and "of 24 training images cannot be read" in message
    assert "images/train_0000" in message and "--resume" in message
    (saved,) = runs.steps_saved(run)
    assert f"the state of step {saved.removeprefix('step-')} is saved" in message
    assert from_pretrained(run)

    for image in (3, 7, 9, 20):  # mended
        name = f"images/train_{image:06d}.jpg"
        shutil.copy(demo / name, data / name)
    runs.train("pretrain", *flags, "--resume")
    assert "step-4" in runs.steps_saved(run)


def test_no_image_can_be_read(demo: Path, tmp_path: Path) -> None:
    data = damaged(demo, tmp_path / "data", list(range(1, runs.TRAIN_IMAGES + 1)))
    flags = (*runs.PRETRAIN, *runs.EIGHT, "--max-steps", 2, *runs.NO_EVALUATION, "--log-every", 1)
    with pytest.raises(TrainingStopped, match="24 training images cannot be read"):
        runs.train("pretrain", "--data", data, *flags, "--output-dir", tmp_path / "run")


# The model folder


def test_model_folder_round_trip(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    detector = from_pretrained(pretrained, weights="last")
    save_model(tmp_path / "model", detector, [{"stage": "by hand"}])
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    again = from_pretrained(tmp_path / "model")
    assert runs.largest_difference(detector.state_dict(), again.state_dict()) == 0
    assert runs.largest_difference(runs.weights(tmp_path), runs.weights(pretrained)) == 0
    assert again.config == detector.config and read_history(tmp_path / "model") == [{"stage": "by hand"}]
    assert again.config.category_ids == tuple(range(10, 101, 10)) and not again.training
    for folder in (tmp_path, str(tmp_path), tmp_path / "model", pretrained / "best"):
        assert from_pretrained(folder).config == detector.config
    photo = np.array(Image.open(sorted((demo / "images").glob("val_*"))[0]))
    eager, copied = (from_pretrained(runs.make_eager(run, tmp_path / "eager")) for run in (pretrained, tmp_path))
    mine, theirs = eager.predict([photo], score_threshold=0.05)[0], copied.predict([photo], score_threshold=0.05)[0]
    assert len(mine["scores"]) > 0 and all(np.array_equal(mine[key], theirs[key]) for key in mine)


def test_the_best_weights_of_a_run_or_its_last(
    pretrained: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's AP is that of its step; best are those with the highest, where anything was found."""
    for name in ("model", "best"):
        stage, found = read_history(pretrained / name)[-1], runs.records(pretrained)
        assert [stage["AP"]] == [one["bbox"]["AP"] for one in found if one["step"] == stage["steps"] and "bbox" in one]
    run = Path(shutil.copytree(pretrained, tmp_path / "run"))
    for ap, folder in ((0, "model"), (0.25, "best")):
        facts = runs.read_json(run / "best/config.json")
        facts["history"][-1]["AP"] = ap
        (run / "best/config.json").write_text(json.dumps(facts))
        assert model_folder(run) == run / folder
    last = runs.records(run)[-1]["bbox"]["AP"]
    for kind, folder in (("best", run / "best"), ("last", run / "model")):
        assert model_folder(run, kind) == folder
        expected = runs.weights(folder)
        assert runs.largest_difference(from_pretrained(run, weights=kind).state_dict(), expected) == 0
        runs.call_script("evaluate", "--checkpoint", run, "--weights", kind, "--data", demo, *runs.MACHINE)
        assert runs.read_json(run / "metrics.json")["weights"] == str(folder)
        figures = "step 2, AP 0.250" if kind == "best" else f"step 4, AP {last:.3f}"
        printed = capsys.readouterr().out
        assert f"weights: {folder} ({figures} on its validation split)" in printed
        assert ("chosen by their AP on this split" in printed) == (kind == "best")
        second = tmp_path / kind
        flags = (*runs.train_part(demo), *runs.FINETUNE, *runs.EIGHT, "--max-steps", 1, "--lr", 1e-12)
        runs.train("finetune", *flags, "--init", run, "--weights", kind, "--output-dir", second)
        assert runs.largest_difference(runs.weights(second), expected) < 1e-6
    shutil.rmtree(run / "best")
    assert model_folder(run) == run / "model"
    flags = (
        "--data",
        demo,
        "--model",
        runs.MODEL,
        "--init",
        "none",
        "--weights",
        "best",
        "--output-dir",
        tmp_path / "new",
    )
    with pytest.raises(InputError, match="--weights best: --init none is no run; leave the flag out"):
        runs.call_script("finetune", *flags)


def test_damaged_model_folders(pretrained: Path, tmp_path: Path) -> None:
    weights, config = "model.safetensors", "config.json"
    content = (pretrained / "model" / weights).read_bytes()
    detector = runs.read_json(pretrained / "model" / config)

    def refused(name: str, message: str, *, weight_bytes: bytes | None = content, text: Any = detector) -> None:
        folder = tmp_path / name
        folder.mkdir()
        if weight_bytes is not None:
            (folder / weights).write_bytes(weight_bytes)
        if text is not None:
            (folder / config).write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(InputError, match=message) as error:
            from_pretrained(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)

    def changed(**values: Any) -> dict[str, Any]:
        return {**detector, "detector": {**detector["detector"], **values}}

    refused("cut", "cannot be read as tensors", weight_bytes=content[:-1000])
    refused("empty", "cannot be read as tensors", weight_bytes=b"")
    refused("noise", "cannot be read as tensors", weight_bytes=bytes(range(256)) * 10)
    refused("altered", "checksum does not fit", weight_bytes=content[:-1000] + b"\1" + content[-999:])
    refused("wide", r"tensors do not fit .*expected \[64.*found \[32", text=changed(channels=64))
    refused("norm", "tensors do not fit", text=changed(norm="group"))
    classes = changed(class_names=["a", "b"], category_ids=[1, 2])
    refused("classes", r"4 tensors do not fit.*class_logits", text=classes)
    refused("no_config", "holds no model", text=None)
    refused("no_weights", "holds no model", weight_bytes=None)
    refused("nothing", "holds no model", weight_bytes=None, text=None)
    refused("text", "cannot be read as a detector's configuration", text="{")
    refused("list", "cannot be read as a detector's configuration", text="[]")
    refused("unknown_key", "cannot be read as a detector's configuration", text=changed(depth=3))
    refused("run_config", "cannot be read as a detector's configuration", text={"settings": {}})
    with pytest.raises(InputError, match="no such folder"):
        from_pretrained(tmp_path / "absent")
