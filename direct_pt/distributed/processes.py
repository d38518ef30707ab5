"""Values that processes exchange. Only the main process reads and writes the run's folder: the others may not see it.

Every process must call each of these functions.
"""

import json
import math
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from direct_pt.errors import InputError

Value = TypeVar("Value")
VALUES_COMPARED = 16  # of a tensor


def main_decides(decide: Callable[[], Value], processes: PartialState) -> Value:
    """What `decide` returns on the main process, on every process. Its InputError is raised on every process too."""
    shared: list[Any] = [None]
    if processes.is_main_process:
        try:
            shared = [decide()]
        except InputError as error:
            shared = [error]
    broadcast_object_list(shared)
    if isinstance(shared[0], InputError):
        raise shared[0]
    return shared[0]


def local_main_process_first(read: Callable[[], Value], processes: PartialState) -> Value:
    """What `read` returns, on every process. One process of each machine goes first and fills the caches there.

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


def check_same(facts: dict[str, Any], what: str, processes: PartialState) -> None:
    """Raise InputError, on every process, where one process's facts are not the main process's.

    Args:
        facts: by name, JSON values; floats may differ in their last digits, as other processors round differently.
        what: all of them are, for the message.
        processes: to compare.
    """
    if processes.num_processes == 1:
        return
    hosts = gather_object([socket.gethostname()])
    for rank, other in enumerate(gather_object([facts])):
        if rank == 0:
            expected = other
            continue
        for name in sorted(expected.keys() | other.keys()):  # the same first one on all
            found, wanted = other.get(name), expected.get(name)
            if not _is_same(found, wanted):
                raise InputError(
                    f"process {rank} on {hosts[rank]} has another {name} than process 0 on {hosts[0]} ({what}): "
                    f"{_short(found)} in place of {_short(wanted)}; start the same command with the same "
                    "files everywhere"
                )


def sampled(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Facts for `check_same`: each tensor's shape and some of its values, whose last digits may differ."""
    facts = {}
    for name, tensor in weights.items():
        flat = tensor.detach().reshape(-1)
        facts[f"tensor {name}"] = [list(tensor.shape), flat[:: len(flat) // VALUES_COMPARED + 1].double().tolist()]
    return facts


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    return bool(one == other)


def _short(value: Any) -> str:
    """A fact, for messages."""
    return f"{json.dumps(value):.120}"


def gather_to_main(value: Value, accelerator: Accelerator) -> list[Value]:
    """On the main process the values of all processes, in their order; on the others an empty list."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Value] = [value] * accelerator.num_processes
    torch.distributed.gather_object(value, gathered if accelerator.is_main_process else None, dst=0)
    return gathered if accelerator.is_main_process else []


def share_tensors(tensors: dict[str, Tensor] | None, accelerator: Accelerator) -> dict[str, Tensor]:
    """The main process's `tensors`, on every process, on the CPU; those of the other processes are ignored."""
    if accelerator.num_processes == 1:
        assert tensors is not None
        return tensors
    layout = [{name: (value.shape, value.dtype) for name, value in (tensors or {}).items()}]
    broadcast_object_list(layout)
    shared = {}
    for name, (shape, dtype) in layout[0].items():
        if accelerator.is_main_process and tensors is not None:
            value = tensors[name].to(accelerator.device).contiguous()
        else:
            value = torch.empty(shape, dtype=dtype, device=accelerator.device)
        torch.distributed.broadcast(value, 0)
        shared[name] = value.cpu()
    return shared
