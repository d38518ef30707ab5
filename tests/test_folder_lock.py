"""Two programs on one folder, as real processes: one writes, the other one is told who does."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import small_runs as runs

from direct_pt.errors import InputError
from direct_pt.program.folder_lock import folder_held, hold_folder, release_folder

LONG = ("--max-steps", 400, "--log-every", 1, "--global-batch-size", 4, "--micro-batch-size", 4, *runs.NO_EVALUATION)


def started(demo: Path, run: Path, *flags: object) -> subprocess.Popen[str]:
    """A long run that has begun to train."""
    process = runs.start_script("pretrain", "--data", demo, *runs.TINY, *LONG, *flags, "--output-dir", run)
    deadline = time.monotonic() + 120
    while not steps(run) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def steps(run: Path) -> list[int]:
    """Those that are logged."""
    return [record["step"] for record in runs.records(run)] if (run / "metrics.jsonl").exists() else []


def test_a_second_run_is_told_of_the_first(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = started(demo, run)
    before = (run / "config.json").read_bytes()
    second = runs.start_script("pretrain", "--data", demo, *runs.TINY, *LONG, "--output-dir", run, "--resume")
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2 and errors.count("\n") == 1
    assert f"error: --output-dir {run}: process {first.pid} on {socket.gethostname()} (since " in errors
    assert (run / "config.json").read_bytes() == before
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 143, errors
    assert not list(run.glob(".*"))  # the lock's file is gone


def test_the_lock_ends_with_a_killed_process(demo: Path, tmp_path: Path) -> None:
    """At once, though the processes that read images for it live a little longer."""
    run = tmp_path / "run"
    first = started(demo, run, "--num-workers", 2, "--save-every", 1)
    first.kill()
    first.communicate(timeout=60)
    before = steps(run)[-1]
    second = runs.start_script(
        "pretrain", "--data", demo, *runs.TINY, *LONG, "--output-dir", run, "--resume", "--num-workers", 2
    )
    deadline = time.monotonic() + 120
    while max(steps(run), default=0) <= before and time.monotonic() < deadline:
        assert second.poll() is None, second.communicate()
        time.sleep(0.05)
    second.kill()
    second.communicate(timeout=60)


def test_two_new_runs_at_once(demo: Path, tmp_path: Path) -> None:
    """Neither sees the other one's config.json when it starts: one trains, the other one is refused before a step."""
    run = tmp_path / "run"
    flags = ("--data", demo, *runs.TINY, *LONG, "--max-steps", 8, "--output-dir", run)
    both = [runs.start_script("pretrain", *flags) for _ in range(2)]
    outcomes = sorted((process.communicate(timeout=240)[1], process.returncode) for process in both)
    assert sorted(status for _, status in outcomes) == [0, 2], outcomes
    (message,) = [errors.splitlines()[-1] for errors, status in outcomes if status == 2]
    assert message.startswith(f"error: --output-dir {run}: ")
    assert [record["step"] for record in runs.records(run) if "loss" in record] == list(range(1, 9))


def test_predictions_in_one_folder(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    picture = next((demo / "images").glob("val_*.jpg"))
    with folder_held(tmp_path, "predict"):
        process = runs.start_script("predict", picture, "--checkpoint", pretrained, "--output-dir", tmp_path)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(f"error: --output-dir {tmp_path}: process {os.getpid()} on ")
    assert not (tmp_path / "predictions.json").exists()


@pytest.mark.parametrize("script", ["evaluate", "check_data"])
def test_figures_in_one_folder(script: str, pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """Those of one program stay together; of another split they are other files."""
    flags = {"evaluate": ("--checkpoint", pretrained, *runs.MACHINE), "check_data": ()}[script]
    with folder_held(tmp_path, script):
        process = runs.start_script(script, "--data", demo, *flags, "--output-dir", tmp_path)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and not list(tmp_path.glob("*.json"))
        assert errors.splitlines()[-1].startswith(f"error: --output-dir {tmp_path}: process {os.getpid()} on ")
        if script == "evaluate":
            runs.call_script(script, "--data", demo, *flags, "--split", "train", "--output-dir", tmp_path)
            names = {f"{name}_train.json" for name in ("metrics", "predictions", "report")}
            assert {path.name for path in tmp_path.glob("*.json")} == names
    assert not list(tmp_path.glob(".*"))


def test_what_lies_in_the_locks_place(tmp_path: Path) -> None:
    """A link is not followed, a pipe not waited for, a folder no lock; what they lead to stays."""
    target = tmp_path / "precious"
    target.write_text("content")
    for number, make in enumerate((lambda path: path.symlink_to(target), os.mkfifo, Path.mkdir)):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / ".train.lock")
        with pytest.raises((InputError, OSError)):
            hold_folder(folder)
    assert target.read_text() == "content"


def test_the_same_process_again(tmp_path: Path) -> None:
    folder = tmp_path / "new/run"
    assert hold_folder(folder) and not hold_folder(folder)
    release_folder(folder)
    assert not list(folder.iterdir())
    release_folder(folder)  # does nothing
