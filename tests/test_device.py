"""The settings of a process on the CPU: freed memory stays with it."""

import subprocess
import sys

import pytest

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
