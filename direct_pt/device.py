"""What this machine offers: device, precision, threads, processes."""

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from direct_pt.errors import InputError

PRECISIONS = ("auto", "no", "fp16", "bf16")


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
    return Accelerator(cpu=not on_gpu, mixed_precision=precision, **options)
