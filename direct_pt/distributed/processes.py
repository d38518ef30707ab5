"""What processes tell each other: the main one alone reads and writes the run's folder, which others may not see."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from direct_pt.errors import InputError

Value = TypeVar("Value")


def main_decides(decide: Callable[[], Value], processes: PartialState) -> Value:
    """What `decide` returns on the main process, on every process. All must call it.

    Raises:
        InputError: of `decide`, on every process.
    """
    told: list[Any] = [None]
    if processes.is_main_process:
        try:
            told = [decide()]
        except InputError as error:
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], InputError):
        raise told[0]
    return told[0]


def one_a_machine_first(read: Callable[[], Value], processes: PartialState) -> Value:
    """What `read` returns, on every process: the others find it quickly, in a cache of this machine. All must call it.

    Raises:
        InputError: of `read`, on every process.
    """
    first: list[Value] = []
    failure: InputError | None = None
    if processes.is_local_main_process:
        try:
            first.append(read())
        except InputError as error:
            failure = error
    processes.wait_for_everyone()
    if failure is not None:
        raise failure
    return first[0] if first else read()


def gather_to_main(value: Value, accelerator: Accelerator) -> list[Value]:
    """Every process's value, in their order, on the main process; nothing elsewhere. Every process must call it."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Value] = [value] * accelerator.num_processes
    torch.distributed.gather_object(value, gathered if accelerator.is_main_process else None, dst=0)
    return gathered if accelerator.is_main_process else []


def share_tensors(tensors: dict[str, Tensor] | None, accelerator: Accelerator) -> dict[str, Tensor]:
    """The main process's tensors, on every process: it alone reads the run's folder, which others may not see.

    Args:
        tensors: of the main process; the others' are not looked at.
        accelerator: of the processes; every one must call it.
    """
    if accelerator.num_processes == 1:
        assert tensors is not None
        return tensors
    plan = [{name: (value.shape, value.dtype) for name, value in (tensors or {}).items()}]
    broadcast_object_list(plan)
    shared = {}
    for name, (shape, dtype) in plan[0].items():
        if accelerator.is_main_process and tensors is not None:
            value = tensors[name].to(accelerator.device).contiguous()
        else:
            value = torch.empty(shape, dtype=dtype, device=accelerator.device)
        torch.distributed.broadcast(value, 0)
        shared[name] = value.cpu()
    return shared
