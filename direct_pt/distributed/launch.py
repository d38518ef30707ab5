"""What the launcher asks for, held against what this machine has: processes that find each other, device, precision.

accelerate's launcher speaks through environment variables. What cannot be served is refused with the alternative;
nothing is changed silently.
"""

import ctypes
import datetime
import fcntl
import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, PartialState

from direct_pt.errors import InputError
from direct_pt.flags import CHANGEABLE, FREE, flag, not_negative_integer

PRECISIONS = ("auto", "no", "fp16", "bf16")
JOIN_SECONDS = 300  # that the processes wait for each other at the start; DIRECT_PT_JOIN_SECONDS says otherwise
COLLECTIVE_SECONDS = 3600  # that they wait for each other later: the first one evaluates while the others wait
SIOCGIFADDR = 0x8915  # of ioctl(2): an interface's address
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """How the machine is used."""

    mixed_precision: str = flag(
        "auto", "auto: the launcher's, else fp16 on a GPU, and bf16 on a CPU that computes in it", choices=PRECISIONS,
        on_resume=CHANGEABLE,
    )  # fmt: skip
    num_workers: int = flag(2, "processes that read images", not_negative_integer, metavar="N", on_resume=FREE)


def is_deepspeed() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return _asked("ACCELERATE_USE_DEEPSPEED")


def on_gpu() -> bool:
    """Whether this program runs on a GPU: where there is one, unless the launcher asks for the CPU."""
    return torch.cuda.is_available() and not _cpu_asked


def join_processes() -> PartialState:
    """Find the processes that the launcher started, and the device of this one.

    Raises:
        InputError: the launcher asks for what this machine cannot serve, or not all processes come in time.
    """
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    _refuse_what_cannot_be(world, local)
    options: dict[str, Any] = {}
    if world > 1 and not torch.distributed.is_initialized():
        if not on_gpu():
            _choose_interface()
            options["backend"] = "gloo"
        rank = int(os.environ["RANK"])
        torch.distributed.init_process_group(
            options.get("backend", "nccl"),
            store=_call_the_roll(rank, world),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
        )
    os.environ.pop("ACCELERATE_USE_CPU", None)  # read already; with it accelerate would leave out DeepSpeed
    return PartialState(cpu=not on_gpu() and not is_deepspeed(), **options)


def resolve_precision(mixed_precision: str) -> str:
    """What "auto" means here: what the launcher says, else fp16 on a GPU, and bf16 on a CPU that computes in it.

    Raises:
        InputError: the device has no such precision.
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
                precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"
    if precision not in PRECISIONS:
        raise InputError(f"mixed_precision {precision} is not served: use {', '.join(PRECISIONS[1:])}")
    if precision == "fp16" and not on_gpu():
        raise InputError("fp16 needs a GPU, and there is none: use --mixed-precision bf16 or no")
    if precision == "fp16" and is_deepspeed():
        raise InputError(
            "fp16 is not served with DeepSpeed: use bf16, or accelerate_configs/multi_gpu.yaml, which goes without"
        )
    return precision


def make_accelerator(
    mixed_precision: str,
    micro_batch_size: int = 1,
    accumulation: int = 1,
    clip_grad_norm: float | None = None,
    **options: Any,
) -> Accelerator:
    """An accelerator for the GPU where there is one, else for all cores of the CPU.

    Args:
        mixed_precision: one of PRECISIONS; see `resolve_precision`.
        micro_batch_size: images at once on a device.
        accumulation: micro-batches a step on each process.
        clip_grad_norm: the most that a step's gradient may measure.
        options: for Accelerator.

    Raises:
        InputError: see `join_processes` and `resolve_precision`.
    """
    state = join_processes()
    precision = resolve_precision(mixed_precision)
    if not on_gpu():
        use_all_cores()
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
        **options,
    )


def precision_of(accelerator: Accelerator) -> str:
    """What training computes in: "no", "fp16" or "bf16"."""
    if is_deepspeed():  # whose own 16-bit modes, which accelerate looks at, are off
        return "bf16" if accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"
    return accelerator.mixed_precision


def autocast(accelerator: Accelerator) -> torch.autocast:
    """Mixed precision, as training has it, for what runs outside the prepared model."""
    precision = precision_of(accelerator)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(accelerator.device.type, dtype, enabled=precision != "no")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


_cpu_asked = _asked("ACCELERATE_USE_CPU")  # of accelerate's launcher, or a person


def _refuse_what_cannot_be(world: int, local: int) -> None:
    if _asked("ACCELERATE_USE_FSDP") or _asked("ACCELERATE_USE_MEGATRON_LM"):
        what = "FSDP" if _asked("ACCELERATE_USE_FSDP") else "Megatron-LM"
        instead = "deepspeed_zero3.yaml" if on_gpu() else "cpu_processes.yaml"
        raise InputError(f"{what} is not served: use accelerate_configs/{instead}")
    gpus = torch.cuda.device_count() if on_gpu() else 0
    if gpus and local > gpus:
        raise InputError(
            f"{local} processes were started on this machine, which has {gpus} GPU(s): --num_processes {gpus}"
        )
    if world > 1 and not gpus and not _cpu_asked and not is_deepspeed():
        raise InputError(
            f"{world} processes were started for GPUs (NCCL), and this machine has none: for processes on the CPU "
            "(gloo) set ACCELERATE_USE_CPU=true, see accelerate_configs/cpu_processes.yaml"
        )
    if world == 1 and _cpu_asked and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise InputError(
            "several processes on the CPU were asked for, of which accelerate's MULTI_CPU starts one: use "
            "accelerate_configs/cpu_processes.yaml"
        )
    if is_deepspeed():
        if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") not in ("none", "None", ""):
            raise InputError(
                "deepspeed_config_file is not read: give zero_stage and offload devices, see accelerate_configs/"
            )
        accumulation = os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        if accumulation not in ("1", "auto", "None"):
            raise InputError(
                f"gradient_accumulation_steps {accumulation}: leave it out of the launcher's configuration; it follows "
                "from --global-batch-size and --micro-batch-size"
            )
        clipping = os.environ.pop("ACCELERATE_GRADIENT_CLIPPING", "None")
        if clipping not in ("None", "auto"):
            raise InputError(f"gradient_clipping {clipping}: give the scripts --clip-grad-norm in its place")


def join_seconds() -> int:
    """How long processes and machines wait for each other at the start. Raises InputError."""
    given = os.environ.get("DIRECT_PT_JOIN_SECONDS", str(JOIN_SECONDS))
    if not given.isdecimal() or int(given) == 0:
        raise InputError(f"DIRECT_PT_JOIN_SECONDS={given}: give whole seconds from 1, such as {JOIN_SECONDS}")
    return int(given)


def _call_the_roll(rank: int, world: int) -> torch.distributed.Store:
    """Every process waits here until all have come, so that who is missing can be named.

    Returns:
        What they met in. A launcher that starts processes again keeps its store, with the addresses of those that died:
        this part of it is new each time.
    """
    seconds = join_seconds()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    interface = os.environ.get("NCCL_SOCKET_IFNAME" if on_gpu() else "GLOO_SOCKET_IFNAME") or interface_to(address)
    where = f"{address} port {port} over interface {interface or 'unknown'}"
    check = "start the same command there, and check the address, the port and the firewalls between"
    timeout = datetime.timedelta(seconds=seconds)
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # otherwise the launcher does
    try:  # torch's own rendezvous waits for the others, and cannot tell who is missing
        whole = torch.distributed.TCPStore(
            address, int(port), world, serves, timeout, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {rank} of {world} did not reach the main process at {where} in {seconds} s: {check}"
        ) from error
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"direct_pt/{start}", whole)
    names = [f"here/{other}" for other in range(world)]
    store.set(names[rank], socket.gethostname())
    try:
        store.wait(names, timeout)
    except RuntimeError as error:
        missing = [str(other) for other, name in enumerate(names) if not store.check([name])]
        raise InputError(
            f"of {world} processes number {', '.join(missing[:8])} did not come to {where} in {seconds} s: {check}"
        ) from error
    return store


def _choose_interface() -> None:
    """gloo takes the interface of the host's name, which often leads nowhere: the one to the main process is right."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_to(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def interface_to(address: str) -> str | None:
    """The network interface that leads to `address`, if it can be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:  # has no address
                    continue
                if socket.inet_ntoa(reply[20:24]) == mine:
                    return name
    except OSError:
        pass
    return None


def _deepspeed_plugin(
    precision: str, micro_batch_size: int, accumulation: int, processes: int, clip_grad_norm: float | None
) -> DeepSpeedPlugin:
    """ZeRO with float32 weights and gradients, and autocast as elsewhere: its own 16-bit modes cast BatchNorm too."""
    try:
        import deepspeed  # noqa: F401 - optional: large, and of use to several processes only
        import transformers  # noqa: F401 - which accelerate asks for beside it
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install deepspeed transformers") from error
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    devices = [os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none") for kind in ("OPTIMIZER", "PARAM")]
    optimizer, parameters = ("none" if device in ("None", "") else device for device in devices)
    if not 1 <= stage <= 3 or "nvme" in (optimizer, parameters):
        raise InputError(f"ZeRO stage {stage}, offload to {optimizer} and {parameters}: use stages 1 to 3, none or cpu")
    zero: dict[str, Any] = {"stage": stage}
    if optimizer != "none":
        zero["offload_optimizer"] = {"device": optimizer}
    if stage == 3 and parameters != "none":
        zero["offload_param"] = {"device": parameters}
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # by which accelerate would refuse what is put together here
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
                "lower_precision_safe_modules": [],  # whose gradients would travel in 16 bits
            },
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
        },
        zero3_init_flag=False,
    )


def use_all_cores() -> None:
    """On a CPU: the launcher allows a process one thread; here the processes of a machine share its cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is allocated next.

    By default it returns large blocks to the system at once, which then clears each page of the next one anew: for
    activations, every step, some tenth of its time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # glibc's alone takes these two
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
