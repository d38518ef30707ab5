"""What the launcher asks for and this machine can do: processes that find each other, device, precision, DeepSpeed.

accelerate's launcher passes its settings in environment variables. A setting that is not supported is refused with an
alternative; nothing is changed silently.
"""

import argparse
import ctypes
import datetime
import os
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, PartialState

from direct_pt.distributed.peers import watch_peers
from direct_pt.errors import InputError
from direct_pt.flags import CHANGEABLE, FREE, environment_number, flag, worker_count

PRECISIONS = ("auto", "no", "fp16", "bf16")
DEFAULT_JOIN_SECONDS = 300  # how long processes wait for each other at the start
PEER_SECONDS = 30  # that an answer of the store may take
COLLECTIVE_SECONDS = 3600  # how long they wait for each other later: the main one evaluates while the others wait
MAX_JOIN_SECONDS = 7 * 24 * 3600
MAX_PROCESSES = 100_000
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def device_name(text: str) -> str:
    """The check of --device: "auto", "cpu", "cuda" or "cuda:N", for which a number alone stands too."""
    if re.fullmatch(r"auto|cpu|cuda|(cuda:)?[0-9]{1,4}", text):
        return text
    several = "; for several GPUs, start it with accelerate launch --num_processes N" if "," in text else ""
    raise argparse.ArgumentTypeError(
        f"{text!r:.40} is none of auto, cpu, cuda, or one GPU, such as cuda:1 or 1{several}"
    )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """What computes, and how."""

    mixed_precision: str = flag(
        "auto",
        "auto: the launcher's fp16 or bf16; where it says no, as it does by default, fp16 on a GPU, and bf16 on a CPU "
        "that computes in it",
        choices=PRECISIONS, on_resume=CHANGEABLE,
    )  # fmt: skip
    device: str = flag(
        "auto", "auto: the launcher's choice, or a GPU if there is one; or cpu, cuda, or one GPU, such as cuda:1 or 1",
        device_name, metavar="NAME", on_resume=FREE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(ComputeOptions):
    """How the machine is used."""

    num_workers: int = flag(2, "processes that read images", worker_count, metavar="N", on_resume=FREE)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


_cpu_requested = _is_set("ACCELERATE_USE_CPU")  # read once: join_processes removes it


def is_deepspeed() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def on_gpu() -> bool:
    """Whether this program runs on a GPU: if there is one, unless the launcher asks for the CPU."""
    return torch.cuda.is_available() and not _cpu_requested


# Processes


def join_processes(device: str = "auto") -> PartialState:
    """Connect the processes that the launcher started, and choose this one's device.

    Args:
        device: the value of --device.

    Raises:
        InputError: the launcher, or --device, asks for something that this machine cannot do, or a process is missing.
    """
    _choose(device)
    world_size, local_world_size = (
        environment_number(name, 1, 1, MAX_PROCESSES) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    environment_number("LOCAL_RANK", 0, -1, MAX_PROCESSES)  # accelerate reads it
    _check_launch(world_size, local_world_size)
    options: dict[str, Any] = {}
    if world_size > 1 and not torch.distributed.is_initialized():
        rank = environment_number("RANK", None, 0, world_size - 1)
        environment_number("MASTER_PORT", None, 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise InputError(f"WORLD_SIZE={world_size}, but MASTER_ADDR is not set: start processes with a launcher")
        if not on_gpu():
            options["backend"] = "gloo"
            # gloo's own choice is the interface of the host's name, which often leads nowhere.
            if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_to(os.environ["MASTER_ADDR"])):
                os.environ["GLOO_SOCKET_IFNAME"] = interface
        torch.distributed.init_process_group(
            options.get("backend", "nccl"),
            store=_roll_call(rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate would not start DeepSpeed
    return PartialState(cpu=not on_gpu() and not is_deepspeed(), **options)


def _choose(device: str) -> None:
    """Do what --device says, for this process. Raises InputError."""
    global _cpu_requested
    device = f"cuda:{device}" if device.isdecimal() else device
    if device == "cpu":
        _cpu_requested = True
    if not device.startswith("cuda"):
        return
    count = torch.cuda.device_count()
    number = int(device.partition(":")[2] or 0)
    if not on_gpu():
        reason = "the launcher asks for the CPU" if count else "there is no GPU that PyTorch can use"
        raise InputError(f"--device {device}: {reason}; use --device cpu")
    if ":" not in device:
        return
    if number >= count:
        raise InputError(f"--device {device}: this machine has {count} GPU(s), numbered from 0")
    if environment_number("WORLD_SIZE", 1, 1, MAX_PROCESSES) > 1:
        raise InputError(f"--device {device}: each of several processes has its own GPU; leave it out, or start one")
    torch.cuda.set_device(number)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device  # accelerate takes it


def _check_launch(world_size: int, local_world_size: int) -> None:
    """Raises InputError where the launcher asks for something that is not supported here."""
    if _is_set("ACCELERATE_USE_FSDP") or _is_set("ACCELERATE_USE_MEGATRON_LM"):
        library = "FSDP" if _is_set("ACCELERATE_USE_FSDP") else "Megatron-LM"
        alternative = "deepspeed_zero3.yaml" if on_gpu() else "cpu_processes.yaml"
        raise InputError(f"{library} is not supported: use accelerate_configs/{alternative}")
    gpus = torch.cuda.device_count() if on_gpu() else 0
    if gpus and local_world_size > gpus:
        raise InputError(
            f"{local_world_size} processes were started on this machine, which has {gpus} GPU(s): "
            f"--num_processes {gpus}"
        )
    if world_size > 1 and not gpus and not _cpu_requested and not is_deepspeed():
        raise InputError(
            f"{world_size} processes were started for GPUs (NCCL), and this machine has none: for processes on the CPU "
            "(gloo) set ACCELERATE_USE_CPU=true, see accelerate_configs/cpu_processes.yaml"
        )
    if world_size == 1 and _cpu_requested and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise InputError(
            "several processes on the CPU were asked for, but accelerate's MULTI_CPU starts only one: use "
            "accelerate_configs/cpu_processes.yaml"
        )
    if is_deepspeed():
        if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") not in ("none", "None", ""):
            raise InputError(
                "deepspeed_config_file is not supported: give zero_stage and offload devices, see accelerate_configs/"
            )
        accumulation = os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if accumulation not in ("1", "auto", "None"):
            raise InputError(
                f"gradient_accumulation_steps {accumulation}: leave it out of the launcher's configuration; it follows "
                "from --global-batch-size and --micro-batch-size"
            )
        clipping = os.environ.pop("ACCELERATE_GRADIENT_CLIPPING", "None")
        if clipping not in ("None", "auto"):
            raise InputError(f"gradient_clipping {clipping}: use the scripts' --clip-grad-norm instead")


def join_seconds() -> int:
    """How long processes and machines wait for each other at the start. Raises InputError."""
    return environment_number("DIRECT_PT_JOIN_SECONDS", DEFAULT_JOIN_SECONDS, 1, MAX_JOIN_SECONDS)


def _roll_call(rank: int, world_size: int) -> torch.distributed.Store:
    """The store of the process group, once all processes have reported there: so that missing ones can be named.

    A launcher that restarts processes keeps its store, with the addresses of those that died; each start therefore has
    a prefix of its own in it.
    """
    seconds = join_seconds()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    interface = os.environ.get("NCCL_SOCKET_IFNAME" if on_gpu() else "GLOO_SOCKET_IFNAME") or interface_to(address)
    place = f"{address} port {port} over interface {interface or 'unknown'}"
    check = "start the same command there, and check the address, the port and the firewalls between"
    timeout = datetime.timedelta(seconds=seconds)
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # otherwise the launcher is
    try:  # torch's own rendezvous waits for the others, too, but cannot tell which are missing
        shared = torch.distributed.TCPStore(
            address, int(port), world_size, is_server, timeout, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {rank} of {world_size} did not reach the main process at {place} in {seconds} s: {check}"
        ) from error
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"direct_pt/{restart}", shared)
    keys = [f"here/{other}" for other in range(world_size)]
    store.set(keys[rank], socket.gethostname())
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        raise InputError(
            f"of {world_size} processes, number {', '.join(missing[:8])} did not reach {place} in {seconds} s: {check}"
        ) from error
    patience = datetime.timedelta(seconds=PEER_SECONDS)
    client = torch.distributed.TCPStore(address, int(port), world_size, False, patience, wait_for_workers=False)
    watch_peers(torch.distributed.PrefixStore(f"direct_pt/{restart}/peers", client), rank, world_size)
    return store


def interface_to(address: str) -> str | None:
    """The name of the network interface that leads to `address`, or None if it cannot be found."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # chooses a route, and sends nothing
            own_address = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if own_address in [entry.address for entry in addresses]:
                return name
    except OSError:
        pass
    return None


# Device and precision


def computes_bf16() -> bool:
    """Whether this machine's CPU computes in bf16, and does not imitate it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_precision(mixed_precision: str) -> str:
    """The precision that "auto" stands for: the launcher's, else fp16 on a GPU, bf16 on a CPU that computes in it.

    Raises:
        InputError: the device does not support the precision.
    """
    precision = mixed_precision
    if precision == "auto":
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision == "no":
            if on_gpu() and not is_deepspeed():
                precision = "fp16"
            elif on_gpu():
                precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
            else:
                precision = "bf16" if computes_bf16() else "no"
    if precision not in PRECISIONS:
        raise InputError(f"mixed_precision {precision} is not supported: use {', '.join(PRECISIONS[1:])}")
    if precision == "fp16" and not on_gpu():
        raise InputError("fp16 needs a GPU, and there is none: use --mixed-precision bf16 or no")
    if precision == "fp16" and is_deepspeed():
        raise InputError(
            "fp16 is not supported with DeepSpeed: use bf16, or accelerate_configs/multi_gpu.yaml without DeepSpeed"
        )
    return precision


def make_accelerator(
    mixed_precision: str,
    micro_batch_size: int = 1,
    accumulation: int = 1,
    clip_grad_norm: float | None = None,
    device: str = "auto",
) -> Accelerator:
    """An accelerator for the GPU if there is one, else for all cores of the CPU.

    Args:
        mixed_precision: one of PRECISIONS; see `resolve_precision`.
        micro_batch_size: images at once on a device.
        accumulation: micro-batches of an optimizer step on each process.
        clip_grad_norm: the largest gradient norm; larger gradients are scaled down to it.
        device: the value of --device.

    Raises:
        InputError: see `join_processes` and `resolve_precision`.
    """
    state = join_processes(device)
    precision = resolve_precision(mixed_precision)
    if not on_gpu():
        _configure_cpu()
    plugin = None
    if is_deepspeed():
        plugin = _deepspeed_plugin(precision, micro_batch_size, accumulation, state.num_processes, clip_grad_norm)
    # BatchNorm statistics are averaged over the processes, not copied from the first one before each forward.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(
        cpu=not on_gpu() and plugin is None,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )


def _configure_cpu() -> None:
    """Share the cores among this machine's processes, and let the C library keep freed memory."""
    local_world_size = environment_number("LOCAL_WORLD_SIZE", 1, 1, MAX_PROCESSES)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))  # the launcher sets one thread
    # By default the C library returns large blocks to the system at once, and the system clears each page of the next
    # block: for activations, that takes about a tenth of a step.
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # only glibc has these two options
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _deepspeed_plugin(
    precision: str, micro_batch_size: int, accumulation: int, processes: int, clip_grad_norm: float | None
) -> DeepSpeedPlugin:
    """ZeRO with float32 weights and gradients, and autocast as elsewhere: its own 16-bit modes cast BatchNorm too."""
    try:
        import deepspeed  # noqa: F401 - optional: large, and useful only for several processes
        import transformers  # noqa: F401 - accelerate needs it for DeepSpeed
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install deepspeed transformers") from error
    stage = environment_number("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2, 0, 99)
    devices = [os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none") for kind in ("OPTIMIZER", "PARAM")]
    optimizer, parameters = ("none" if device in ("None", "") else device for device in devices)
    if not 1 <= stage <= 3 or "nvme" in (optimizer, parameters):
        raise InputError(f"ZeRO stage {stage}, offload to {optimizer} and {parameters}: use stages 1 to 3, none or cpu")
    zero: dict[str, Any] = {"stage": stage}
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer}
    if stage == 3 and parameters != "none":
        zero["offload_param"] = {"device": parameters}
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # with it accelerate would refuse the configuration below
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch_size * accumulation * processes,
            "gradient_clipping": clip_grad_norm or 0.0,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # torch's own, also where the state is offloaded: no compiler needed
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {
                "enabled": precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # the gradients of modules listed here would be sent in 16 bits
            },
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
        },
        zero3_init_flag=False,
    )


def precision_of(accelerator: Accelerator) -> str:
    """The precision of training: "no", "fp16" or "bf16"."""
    if is_deepspeed():  # accelerate knows of DeepSpeed's own 16-bit modes only, and these are off
        return "bf16" if accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"
    return accelerator.mixed_precision


def autocast(accelerator: Accelerator) -> torch.autocast:
    """Mixed precision as in training, for computations outside the prepared model."""
    precision = precision_of(accelerator)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(accelerator.device.type, dtype, enabled=precision != "no")
