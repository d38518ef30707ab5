"""What is set on the machine: memory that stays with the process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from direct_pt.distributed.launch import make_accelerator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB, let go of at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
make_accelerator("no")
faults(), faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux alone can be told")
def test_freed_memory_is_kept() -> None:
    """Pages that the system hands out are cleared at their first touch: each time anew, or once."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, ran.stdout.split())
    assert given_back > 1000 > 50 > kept
