"""Training steps of the five detectors on a GPU, beside torchvision's, with the process limited to 11 GB.

Stage 1: micro-batches of 8 and 64 images of 448x448, fp16 and bf16; stage 2: 2 images of 800x1344, fp16. Noise, and 100
objects on each image. Forward, backward, gradient scaler and update; the median of several steps after three warm-up
steps, ours and the peer's in turn. A setting that does not fit into the 11 GB is reported, and the rest measured.

Also: how often a step makes the processor wait for the GPU (reported by torch.cuda.set_sync_debug_mode), the peak of
allocated memory, and the operations of convolutions and linear layers, forward and backward, as a share of what the GPU
reaches in a product of two large bf16 matrices.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import (
    CLASSES,
    OBJECTS,
    PEERS,
    Case,
    make_peer_training,
    make_training,
    paper_config,
    peer_inputs,
)
from benchmarks.rows import Row, row, seconds
from direct_pt.errors import InputError
from direct_pt.flags import positive_integer
from direct_pt.models.detector import MODELS
from direct_pt.training.micro_batch import training_batch

MAX_BYTES = 11e9
WARMUP = 3
MATRIX_SIDE = 8192
Step = Callable[[], None]
# stage, micro-batch, (height, width), precision
SETTINGS = (
    ("pretrain", 8, (448, 448), "fp16"),
    ("pretrain", 8, (448, 448), "bf16"),
    ("pretrain", 64, (448, 448), "fp16"),
    ("pretrain", 64, (448, 448), "bf16"),
    ("finetune", 2, (800, 1344), "fp16"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The detector, and the number of steps."""
    parser.add_argument("--model", choices=list(MODELS), metavar="NAME", help="this detector alone")
    parser.add_argument("--repeats", type=positive_integer, default=10, metavar="N", help="steps that count (10)")


def measure(args: argparse.Namespace) -> list[Row]:
    """Every detector in every setting. Raises InputError without a GPU."""
    if not torch.cuda.is_available():
        raise InputError("gpu: there is none here, and this part measures nothing else; step measures on the CPU")
    card = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, MAX_BYTES / card))
    reached = matrix_flops()
    rows = [row("gpu", f"bf16 product of {MATRIX_SIDE}x{MATRIX_SIDE} matrices", reached / 1e12, "10^12 operations/s")]
    for name in [args.model] if args.model else MODELS:
        for stage, images, size, precision in SETTINGS:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                rows += measure_setting(name, stage, images, size, precision, args.repeats, reached)
            except torch.cuda.OutOfMemoryError:
                where = f"{name} {stage}, {images} images, {precision}"
                print(f"{where}: does not fit into {MAX_BYTES / 1e9:g} GB", flush=True)
    return rows


def measure_setting(
    name: str, stage: str, images: int, size: tuple[int, int], precision: str, repeats: int, reached: float
) -> list[Row]:
    """One detector in one setting; `reached`: operations a second of the matrix product."""
    setting = f"{name} {stage}, {images} x {size[0]}x{size[1]}, {precision}"
    ours = our_step(name, stage, images, size, precision)
    waits, operations = count_waits(ours), count_operations(ours)
    peak = torch.cuda.max_memory_allocated() / 2**30
    peer = peer_step(name, stage, images, size, precision) if name in PEERS else None
    spent, *theirs = seconds(*(step for step in (ours, peer) if step), repeats=repeats, warmup=WARMUP)
    peer_rate, target = (images / theirs[0], "ratio 1.5") if theirs else (None, None)
    return [
        row("gpu", setting, images / spent, "images/s", "torchvision" if theirs else None, peer_rate, target),
        row("gpu", "  waits for the GPU", waits, "a step", target="at most 8"),
        row("gpu", "  peak of allocated memory", peak, "GiB", target="under 9 GiB"),
        row("gpu", "  of the matrix product's speed", 100 * operations / spent / reached, "%"),
    ]


def our_step(name: str, stage: str, images: int, size: tuple[int, int], precision: str) -> Step:
    """A training step of our detector: one micro-batch and an update."""
    detector, optimizer = make_training(
        Case(paper_config(name, CLASSES), stage, size, OBJECTS, precision, recompute=False)
    )
    detector.cuda()
    batch = training_batch(images, size, OBJECTS, CLASSES, detector.has_masks).to(torch.device("cuda"))
    return partial(_step, lambda: detector(batch), optimizer, *_precision(precision))


def peer_step(name: str, stage: str, images: int, size: tuple[int, int], precision: str) -> Step:
    """A training step of torchvision's detector."""
    model, optimizer = make_peer_training(name, stage, size)
    model.cuda()
    pictures, targets = peer_inputs(training_batch(images, size, OBJECTS, CLASSES, "mask" in name))
    pictures = [picture.cuda() for picture in pictures]
    targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
    return partial(_step, lambda: model(pictures, targets), optimizer, *_precision(precision))


def _precision(precision: str) -> tuple[torch.dtype, torch.amp.GradScaler]:
    """The type for autocast, and the loss scaler, which does nothing in bf16."""
    fp16 = precision == "fp16"
    return torch.float16 if fp16 else torch.bfloat16, torch.amp.GradScaler("cuda", enabled=fp16)


def _step(
    losses: Callable[[], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    finish: bool = True,
) -> None:
    """One step. `finish`: wait until the GPU has finished, as timing requires."""
    with torch.autocast("cuda", dtype):
        loss = torch.stack(list(losses().values())).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if finish:
        torch.cuda.synchronize()


def count_waits(step: Step) -> int:
    """How often the processor waits for the GPU in a step."""
    for _ in range(WARMUP):
        step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(finish=False)  # type: ignore[call-arg]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def count_operations(step: Step) -> float:
    """The operations of a step; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def matrix_flops() -> float:
    """Operations a second of a product of two bf16 matrices."""
    one, two = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        torch.mm(one, two)
        torch.cuda.synchronize()

    return 2 * MATRIX_SIDE**3 / seconds(product, repeats=10, warmup=WARMUP)[0]
