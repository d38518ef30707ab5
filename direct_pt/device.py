"""What this machine offers: device, precision, threads, processes."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from direct_pt.errors import InputError

PRECISIONS = ("auto", "no", "fp16", "bf16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
_gpu_everywhere = ContextVar("_gpu_everywhere", default=False)


def count_processes() -> int:
    """Over how many processes the launcher spread this program; joins them."""
    return PartialState(cpu=not torch.cuda.is_available()).num_processes


def make_accelerator(mixed_precision: str, **options: Any) -> Accelerator:
    """An accelerator for the GPU where there is one, else for all cores of the CPU.

    Args:
        mixed_precision: one of PRECISIONS. "auto" is what the launcher says, else fp16 on a GPU, and bf16 on a CPU that
            computes in it.
        options: for Accelerator.

    Raises:
        InputError: the device has no such precision.
    """
    on_gpu = torch.cuda.is_available()
    precision = mixed_precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision == "no":
            native_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
            precision = "fp16" if on_gpu else ("bf16" if native_bf16 else "no")
    if precision == "fp16" and not on_gpu:
        raise InputError("fp16 needs a GPU, and there is none: use --mixed-precision bf16 or no")
    if not on_gpu:  # the launcher allows a process one thread; here the processes of a machine share its cores
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
        keep_freed_memory()
    return Accelerator(cpu=not on_gpu, mixed_precision=precision, **options)


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
