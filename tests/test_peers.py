"""Two processes of which one differs, fails or is stuck: the other one says so, in its words, and nothing waits."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small_runs as runs

pytestmark = runs.cpu_only

SCRIPT = Path(__file__).with_name("ranks.py")
LENGTH = ("--global-batch-size", 8, "--micro-batch-size", 4, "--max-steps", 3, "--log-every", 1, *runs.NO_EVALUATION)
AT_ONCE = 60  # seconds, imports included; without a word, the collective would wait for an hour


def two(script: str, changes: dict[str, object], *flags: object, **environment: object) -> subprocess.Popen[str]:
    """The script in two processes, the second one changed."""
    return runs.launch(2, SCRIPT, script, json.dumps(changes), *flags, **environment)


def refused(process: subprocess.Popen[str]) -> list[str]:
    """The lines that both processes end with, once they have."""
    started = time.monotonic()
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        runs.end_group(process)
    assert process.returncode != 0 and time.monotonic() - started < AT_ONCE, errors
    return [line for line in errors.splitlines() if line.startswith(("error: ", "stopped: ", "failed: "))]


def may_mount() -> bool:
    """Whether a process may have mounts of its own."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and not subprocess.run(command, capture_output=True).returncode


needs_mounts = pytest.mark.skipif(not may_mount(), reason="mount namespaces are not permitted")


def test_another_seed(demo: Path, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ("--data", demo, *runs.TINY, *LENGTH)
    lines = refused(two("pretrain", {"flags": ("--seed", 1)}, *flags, "--output-dir", run))
    words = "has another --seed than process 0"
    assert lines and all(line.startswith("error: process 1 on ") and words in line for line in lines)
    assert "start the same command with the same files everywhere" in lines[0] and not run.exists()


@needs_mounts
def test_other_data(demo: Path, tmp_path: Path) -> None:
    """One process sees a set with an image fewer at the same place; another one sees nothing there."""
    data, other, run = tmp_path / "data", tmp_path / "other", tmp_path / "run"
    for folder in (data, other):
        shutil.copytree(demo, folder)
    path = other / "annotations/instances_train.json"
    content = runs.read_json(path)
    gone = content["images"].pop()["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != gone]
    path.write_text(json.dumps(content))
    flags = ("--data", data, *runs.TINY, *LENGTH, "--output-dir", run)
    lines = refused(two("pretrain", {"places": {str(data): str(other)}}, *flags))
    assert lines and all("process 1 on " in line and "has another training split" in line for line in lines)
    assert f'"images": {runs.TRAIN_IMAGES - 1}' in lines[0] and f'"images": {runs.TRAIN_IMAGES}' in lines[0]
    lines = refused(two("pretrain", {"places": {str(data): None}}, *flags))
    assert lines and str(data) in lines[0] and all(line.startswith("error: ") for line in lines)
    assert not (run / "model").exists()


@needs_mounts
def test_another_model_to_start_from(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    runs.make_eager(pretrained, other / "model")
    flags = ("--data", demo, *runs.FINETUNE, *LENGTH, "--init", pretrained, "--output-dir", run)
    lines = refused(two("finetune", {"places": {str(pretrained): str(other)}}, *flags))
    assert lines and all("has another tensor roi_head" in line for line in lines)


@needs_mounts
def test_another_model_to_measure(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """Else the figures would be those of neither."""
    other, output = tmp_path / "other", tmp_path / "out"
    runs.make_eager(pretrained, other / "model")
    flags = ("--data", demo, "--checkpoint", pretrained, "--weights", "last", "--num-workers", 0)
    lines = refused(two("evaluate", {"places": {str(pretrained): str(other)}}, *flags, "--output-dir", output))
    assert lines and all("has another tensor roi_head" in line and "(--checkpoint)" in line for line in lines)
    assert not output.exists()


def test_a_fault_of_one_process(demo: Path, tmp_path: Path) -> None:
    """Its traceback is its own; the other one says what has happened, and that the last checkpoint can be resumed."""
    run = tmp_path / "run"
    flags = ("--data", demo, *runs.TINY, *LENGTH, "--save-every", 1, "--output-dir", run)
    lines = refused(two("pretrain", {"fails": 2}, *flags))
    assert len(lines) <= 1  # the launcher may end it first, or tell it to stop before it has heard of the fault
    for line in lines:
        heard = "process 1 on " in line and "ArithmeticError: a fault of one process" in line
        assert heard or line == "stopped: SIGTERM: the state of step 2 is saved; continue with --resume"
    assert f"step-{2}" in runs.steps_saved(run)


def test_a_stuck_process_is_named(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = (*runs.TINY, *LENGTH, "--max-steps", 400, "--output-dir", run)
    process = runs.launch(2, runs.SCRIPTS / "pretrain.py", "--data", demo, *flags, DIRECT_PT_STUCK_SECONDS=2)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        stuck = runs.workers(process)[1]
        os.kill(stuck, signal.SIGSTOP)
        assert process.stderr is not None
        errors = b""
        while b"gives no sign of life" not in errors:
            read = os.read(process.stderr.fileno(), 4096)
            assert read and time.monotonic() < deadline + AT_ONCE, errors
            errors += read
        (line,) = [line for line in errors.decode().splitlines() if "no sign of life" in line]
        assert "process 0 waits in " in line and "process 1 gives no sign of life" in line
        os.kill(stuck, signal.SIGCONT)
        step = runs.records(run)[-1]["step"]
        while runs.records(run)[-1]["step"] <= step + 1:  # and it goes on
            assert process.poll() is None and time.monotonic() < deadline + AT_ONCE
            time.sleep(0.05)
    finally:
        runs.end_group(process)
