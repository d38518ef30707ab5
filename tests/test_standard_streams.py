"""Output that nobody reads, terminals that are closed, descriptors that are not open: a run goes on, or saves."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import small_runs as runs

FLAGS = (*runs.TINY, "--global-batch-size", 4, "--micro-batch-size", 4, "--log-every", 1, *runs.NO_EVALUATION)


def command(demo: Path, run: Path, *flags: object) -> list[str]:
    """Of a short run."""
    return [sys.executable, str(runs.SCRIPTS / "pretrain.py"), "--data", str(demo), *map(str, (*FLAGS, *flags)),
            "--output-dir", str(run)]  # fmt: skip


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    """Until a file is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def is_whole(run: Path, steps: int) -> bool:
    """Whether a run has all its records and its model."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1)) and bool(runs.weights(run))


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param("{} 2>&1 | head -1", id="a pipe that ends"),
        pytest.param("{} > /dev/full 2>&1", id="a full disk"),
        pytest.param("{} >&- 2>&- <&-", id="closed"),
    ],
)
def test_a_run_ends_well_without_a_reader(shell: str, demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = " ".join(f"'{word}'" for word in command(demo, run, "--max-steps", 6))
    script = f"set -o pipefail; {shell.format(line)}"
    done = subprocess.run(["bash", "-c", script], env=runs.ENVIRONMENT, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert is_whole(run, 6)


def test_an_encoding_without_the_letters(demo: Path, tmp_path: Path) -> None:
    """What the terminal cannot show is escaped."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(demo / "images")
    (data / "annotations").mkdir()
    for split in ("train", "val"):
        content = runs.read_json(demo / f"annotations/instances_{split}.json")
        content["categories"][0]["name"] = "Küchenschabe 蟑螂"
        (data / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    environment = {**runs.ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command(data, tmp_path / "run", "--max-steps", 1),
        env=environment,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"K\\xfcchenschabe" in done.stdout


def test_a_terminal_that_is_closed(demo: Path, tmp_path: Path) -> None:
    """The system sends SIGHUP, and nothing can be printed any more: the state is saved."""
    run = tmp_path / "run"
    main, terminal = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command(demo, run, "--max-steps", 400), env=runs.ENVIRONMENT, stdin=terminal, stdout=terminal, stderr=terminal,
        preexec_fn=own_terminal,
    )  # fmt: skip
    os.close(terminal)
    try:
        os.set_blocking(main, False)
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline
            try:
                os.read(main, 4096)
            except BlockingIOError:
                time.sleep(0.02)
        os.close(main)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    (saved,) = runs.steps_saved(run)
    assert runs.records(run)[-1]["step"] == int(saved.removeprefix("step-"))


def test_nohup_is_respected(demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        ["nohup", *command(demo, run, "--max-steps", 40)], env=runs.ENVIRONMENT, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0 and is_whole(run, 40)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_after_the_work_does_not_change_the_exit_status(number: int) -> None:
    """As late as can be: the C library's exit calls raise(status), when Python has taken its handlers away."""
    program = f"""
from direct_pt.program.run import run_program
import ctypes
from direct_pt.errors import StopSignal
from direct_pt.program.signals import StopSignals

def main():
    StopSignals().catch()
    library = ctypes.CDLL(None)
    library.on_exit(getattr(library, "raise"), None)
    raise StopSignal("stopped", {number:d})

run_program(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False)
    assert done.returncode == number, done.stderr.decode()[-2000:]
