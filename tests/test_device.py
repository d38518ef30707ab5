"""--device, and the settings of a process on the CPU: freed memory stays with it."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs as runs

from direct_pt.distributed.launch import device_name

FAULTS = """
import resource, sys, torch
from direct_pt.distributed.launch import make_accelerator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
make_accelerator("no")
faults(), faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only the C library of Linux has this setting")
def test_freed_memory_is_kept() -> None:
    """The system clears each page at its first use: again in every round, or once."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, ran.stdout.split())
    assert returned > 1000 > 50 > kept


def test_names_of_devices() -> None:
    for text in ("auto", "cpu", "cuda", "cuda:1", "0", "12"):
        assert device_name(text) == text
    for text in ("gpu", "cuda:", "cuda:x", "0,1", "-1", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            device_name(text)


@pytest.mark.slow
def test_a_device_that_is_not_there(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """One line from every program; and the CPU by its name."""
    photos = (demo / "images", "--output-dir", tmp_path / "pictures")
    started = {
        "pretrain": ("--data", demo, *runs.PRETRAIN),
        "finetune": ("--data", demo, "--init", pretrained, *runs.FINETUNE),
        "evaluate": ("--data", demo, "--checkpoint", pretrained, "--output-dir", tmp_path / "figures"),
        "predict": ("--checkpoint", pretrained, *photos),
    }
    for name, flags in started.items():
        device, number = ("1", "cuda:1") if name == "predict" else ("cuda", "cuda")
        process = runs.start_script(name, *flags, "--device", device)
        _, err = process.communicate()
        expected = f"error: --device {number}: there is no GPU that PyTorch can use; use --device cpu"
        assert process.returncode == 2 and err.splitlines()[-1] == expected, (name, err)
    process = runs.start_script("predict", *started["predict"], "--device", "cpu")
    assert process.wait() == 0 and (tmp_path / "pictures/predictions.json").exists()
