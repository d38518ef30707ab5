"""Programs whose machine is short of shared memory or open files, or kills a process that reads: one line ends them."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import small_runs as runs
from conftest import MakeCocoFolder

SHM = 'mount -t tmpfs -o size={} tmpfs /dev/shm && exec "$@"'
FILES = 'ulimit -n {} && exec "$@"'


def has_namespaces() -> bool:
    """Whether this user may mount something of its own."""
    command = ["unshare", "-m", "sh", "-c", SHM.format("1m"), "sh", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


namespaces = pytest.mark.skipif(not has_namespaces(), reason="a small /dev/shm takes a namespace of one's own")


def run(prefix: list[str], script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """A script behind a command that limits it. A program that waits for ever fails."""
    command = [*prefix, sys.executable, str(runs.SCRIPTS / f"{script}.py"), *map(str, flags)]
    return subprocess.run(command, env=runs.ENVIRONMENT, capture_output=True, text=True, timeout=120)


def in_small_memory(size: str) -> list[str]:
    """A command before another, which then has a /dev/shm of that size."""
    return ["unshare", "-m", "sh", "-c", SHM.format(size), "sh"]


def with_few_files(count: int) -> list[str]:
    """The same, which may have so many files open."""
    return ["sh", "-c", FILES.format(count), "sh"]


def arguments(script: str, demo: Path, pretrained: Path, folder: Path) -> tuple[object, ...]:
    """The flags of a script that reads the demo set with two processes, in few and large batches."""
    readers = ("--num-workers", 2, "--output-dir", folder)
    return {
        "evaluate": ("--checkpoint", pretrained, "--data", demo, "--mixed-precision", "no", *readers),
        "predict": (demo / "images", "--checkpoint", pretrained, "--mixed-precision", "no", *readers),
        "check_data": ("--data", demo, *readers),
        "pretrain": (*runs.TINY, *runs.EIGHT, "--data", demo, "--max-steps", 2, *readers),
        "finetune": (*runs.FINETUNE, *runs.EIGHT, "--init", pretrained, "--data", demo, "--max-steps", 2, *readers),
    }[script]


READING = ("check_data", "evaluate", "predict", "pretrain", "finetune")


@namespaces
@pytest.mark.parametrize("script", READING)
def test_little_shared_memory_is_enough(script: str, demo: Path, pretrained: Path, tmp_path: Path) -> None:
    """128 kB, where a batch of eight images takes 200 kB: what is read is the same."""
    flags = arguments(script, demo, pretrained, tmp_path / "small")
    end = run(in_small_memory("128k"), script, *flags)
    assert end.returncode == 0 and "Traceback" not in end.stderr, end.stderr
    if script == "evaluate":
        runs.call_script(script, *flags, "--num-workers", 0, "--output-dir", tmp_path / "main")
        assert len({(tmp_path / name / "predictions.json").read_text() for name in ("small", "main")}) == 1


@namespaces
@pytest.mark.parametrize("script", READING)
def test_no_shared_memory_at_all(script: str, demo: Path, pretrained: Path, tmp_path: Path) -> None:
    """Not even for a lock."""
    end = run(in_small_memory("4k"), script, *arguments(script, demo, pretrained, tmp_path / "run"))
    status = {"pretrain": 1, "finetune": 1}.get(script, 2)
    assert end.returncode == status and "Traceback" not in end.stderr, end.stderr
    line = end.stderr.strip().splitlines()[-1]
    assert line.startswith(("error: ", "stopped: step 1: ")) and "processes that read cannot be started" in line
    assert "/dev/shm is full" in line and "--shm-size" in line and "--num-workers 0" in line


@pytest.mark.parametrize("script", READING)
def test_few_open_files(script: str, demo: Path, pretrained: Path, tmp_path: Path) -> None:
    """As many as the program needs for itself, and no more."""
    end = run(with_few_files(40), script, *arguments(script, demo, pretrained, tmp_path / "run"))
    status = {"pretrain": 1, "finetune": 1}.get(script, 2)
    assert end.returncode == status and "Traceback" not in end.stderr, end.stderr
    line = end.stderr.strip().splitlines()[-1]
    assert "2 processes that read need up to" in line and "and 40 are allowed" in line and "ulimit -n" in line


def readers(process: psutil.Process) -> list[psutil.Process]:
    """A program's processes that read: they ignore SIGTERM, as what else it starts does not."""
    found = []
    for child in process.children():
        with contextlib.suppress(OSError, psutil.Error):
            (ignored,) = re.findall(r"SigIgn:\s+(\w+)", Path(f"/proc/{child.pid}/status").read_text())
            found += [child] * bool(int(ignored, 16) & 1 << (signal.SIGTERM - 1))
    return found


@pytest.mark.parametrize("script", ["check_data", "evaluate", "predict"])
def test_a_killed_process_ends_the_program(
    script: str, coco_folder: MakeCocoFolder, demo: Path, pretrained: Path, tmp_path: Path
) -> None:
    """As the system does where memory runs out."""
    large = coco_folder([(700, 700)] * 40, name="large")
    large.content["images"] = [dict(row, id=number) for number, row in enumerate(large.content["images"], start=1)]
    paths = large.write()
    flags = list(arguments(script, demo, pretrained, tmp_path / "out"))
    if script == "predict":
        flags[0] = paths.images
        flags += ["--micro-batch-size", 1]
    elif script == "check_data":
        flags[:2] = ["--train-images", paths.images, "--train-annotations", paths.annotations]
    else:
        flags += ["--micro-batch-size", 1, "--split", "train"]
    process = runs.start_script(script, *flags)
    end = time.monotonic() + 120
    while not (children := readers(psutil.Process(process.pid))):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    children[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("error: a process that reads images ended by SIGKILL, as where memory runs out: give fewer")
