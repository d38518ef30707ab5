"""Ctrl-C in the first seconds of the scripts, while they load their libraries: they end silently."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs as runs

SCRIPTS = sorted(path.stem for path in runs.SCRIPTS.glob("*.py"))
MAX_SECONDS = 60.0


def is_caught(process: subprocess.Popen[str]) -> bool | None:
    """Whether a process has a handler for SIGINT, as Python installs one; None once it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return None
    masks = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")]
    return bool(masks[0] >> (signal.SIGINT - 1) & 1) if process.poll() is None and masks else None


def wait_until(process: subprocess.Popen[str], caught: bool) -> None:
    """Wait until a process has a handler for SIGINT, or has none."""
    end = time.monotonic() + MAX_SECONDS
    while is_caught(process) is not caught:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.001)


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and stderr of a process that gets Ctrl-C now."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=MAX_SECONDS)
    return process.returncode, errors


@pytest.mark.parametrize("seconds", [0.0, 1.0])
@pytest.mark.parametrize("script", SCRIPTS)
def test_libraries_are_being_loaded(script: str, seconds: float) -> None:
    """From the first line of the script on, which Python itself takes a moment to come to."""
    process = runs.start_script(script, "--help")
    wait_until(process, caught=True)
    wait_until(process, caught=False)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        status, errors = interrupt(process)
        assert errors == "" and status in (-signal.SIGINT, 130, 0)
        assert status == -signal.SIGINT or seconds
    assert seconds or process.returncode == -signal.SIGINT


@pytest.mark.parametrize("script", ["check_data", "evaluate", "predict", "pretrain", "finetune"])
def test_a_program_is_under_way(script: str, demo: Path, pretrained: Path, tmp_path: Path) -> None:
    """Once it runs, Ctrl-C is an exception as ever: what is open is closed, and the status is 130."""
    small = ("--data", demo, "--output-dir", tmp_path / "out")
    flags: dict[str, tuple[object, ...]] = {
        "check_data": small,
        "evaluate": (*small, "--checkpoint", pretrained),
        "predict": (demo / "images", "--checkpoint", pretrained, "--output-dir", tmp_path / "out"),
        "pretrain": (*runs.PRETRAIN, *small, "--image-size", 448),
        "finetune": (*runs.FINETUNE, *small, "--init", pretrained),
    }
    process = runs.start_script(script, *flags[script])
    for caught in (True, False, True):
        wait_until(process, caught)
    status, errors = interrupt(process)
    assert status == 130 and "Traceback" not in errors


def test_a_program_of_ones_own_keeps_its_handlers(tmp_path: Path) -> None:
    """Also where it loads a script as a module, as the tests do."""
    path = tmp_path / "own.py"
    path.write_text(
        f"""
import gc, signal, sys
signal.signal(signal.SIGINT, print)
import direct_pt, direct_pt.checkpoint
assert signal.getsignal(signal.SIGINT) is print and gc.isenabled()
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(runs.SCRIPTS)!r})
import check_data, pretrain
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and gc.isenabled()
"""
    )
    subprocess.run([sys.executable, path], env=runs.ENVIRONMENT, check=True, timeout=MAX_SECONDS)


def test_garbage_is_collected_once_a_program_runs(tmp_path: Path) -> None:
    """Not while it loads its libraries, which are left alone from then on."""
    path = tmp_path / "program.py"
    path.write_text(
        """
from direct_pt.program.run import run_program
import gc
loading = gc.isenabled()
run_program(lambda: print(loading, gc.isenabled(), gc.get_freeze_count() > 1000))
"""
    )
    command = [sys.executable, path]
    done = subprocess.run(
        command, env=runs.ENVIRONMENT, check=True, timeout=MAX_SECONDS, capture_output=True, text=True
    )
    assert done.stdout == "False True True\n"
