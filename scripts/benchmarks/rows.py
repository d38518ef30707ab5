"""What all parts of the benchmark share: how a figure is measured, and the row that states it."""

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from direct_pt.errors import InputError

Row = dict[str, Any]
PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "opencv-python-headless", "pycocotools",
    "hotcoco",
)  # fmt: skip


def row(
    part: str,
    setting: str,
    value: float,
    unit: str,
    peer: str | None = None,
    peer_value: float | None = None,
    target: str | None = None,
) -> Row:
    """One figure, and the peer's from the same run. `target` says in words what the figure should reach."""
    return {
        "part": part,
        "setting": setting,
        "value": value,
        "unit": unit,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": None if not peer_value else value / peer_value,
        "target": target,
        "device": device(),
        "versions": versions(),
    }


def device() -> str:
    """The name of the GPU if there is one, else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} thread(s)"
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of the installed packages that the figures depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def seconds(
    *functions: Callable[[], Any], repeats: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The median seconds of each function. They take turns, so that a busy machine slows all of them alike."""
    for function in functions:
        for _ in range(warmup):
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, spent in zip(functions, times, strict=True):
            start = clock()
            function()
            spent.append(clock() - start)
    return [statistics.median(spent) for spent in times]


def in_process(module: str, *arguments: str) -> str:
    """What `python -m benchmarks.MODULE ARGUMENTS` prints: a measurement that needs a process of its own."""
    return run_python("-m", f"benchmarks.{module}", *arguments)


def run_python(*arguments: str, **environment: str) -> str:
    """What `python ARGUMENTS` prints, in scripts/, with more variables in its environment. Raises RuntimeError."""
    command, folder = [sys.executable, *arguments], Path(__file__).parents[1]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def run_script(name: str, *flags: object) -> None:
    """Run one of the scripts, whose output is shown on stderr. Raises InputError where it fails."""
    script = Path(__file__).parents[1] / f"{name}.py"
    done = subprocess.run([sys.executable, str(script), *map(str, flags)], check=False, stdout=sys.stderr)
    if done.returncode:
        raise InputError(f"{name}.py ended with status {done.returncode}; why stands above")


def peak_gib() -> float:
    """The peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
