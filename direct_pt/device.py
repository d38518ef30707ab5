"""How this machine computes: threads, memory, and the ways that a GPU takes."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
_gpu_everywhere = ContextVar("_gpu_everywhere", default=False)


def use_all_cores() -> None:
    """On a CPU: the launcher allows a process one thread; here the processes of a machine share its cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    keep_freed_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the CPU's libraries."""
    text = str(error).lower()
    words = (
        "out of memory",
        "can't allocate memory",
        "bad_alloc",
        "could not create a",
        "cannot allocate memory",
    )
    return isinstance(error, MemoryError) or any(word in text for word in words)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is allocated next.

    By default it returns large blocks to the system at once, which then clears each page of the next one anew: for
    activations, every step, some tenth of its time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # glibc's alone takes these two
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def takes_gpu_path(tensor: Tensor) -> bool:
    """Which way to compute where a GPU and a CPU have one each."""
    return tensor.is_cuda or _gpu_everywhere.get()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside it a CPU takes the GPU's ways too: slower there, but they need the GPU's memory."""
    token = _gpu_everywhere.set(True)
    try:
        yield
    finally:
        _gpu_everywhere.reset(token)
