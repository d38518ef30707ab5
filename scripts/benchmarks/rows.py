"""What all parts of the benchmark share: how a figure is taken, and how it is written down."""

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
    """One figure, and its peer's from the same run. `target` is what it is meant to reach, in words."""
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
    """The processor, or the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} thread(s)"
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on, where they are installed."""
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
    """The median seconds of each function. They take turns, so that a busy machine slows them alike."""
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
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def peak_gib() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
