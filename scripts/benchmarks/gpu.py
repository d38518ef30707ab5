"""Training steps of the five detectors on a GPU, beside torchvision's, with the process held to 11 GB.

Stage 1: micro-batches of 8 and 64 images of 448x448, fp16 and bf16; stage 2: 2 images of 800x1344, fp16. Noise, and 100
objects on each image. Forward, backward, gradient scaler and update; the median of some steps after three that do not
count, ours and the peer's in turn. What does not fit into the 11 GB is said so, and the rest measured.

Also: how often a step makes the processor wait for the GPU (as torch.cuda.set_sync_debug_mode tells), the peak of
allocated memory, and the multiply-adds of convolutions and linear layers, forward and backward, as a share of what the
GPU reaches in a product of two large bf16 matrices.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import CLASSES, OBJECTS, PEERS, Case, made, made_peer, paper_config, peer_inputs
from benchmarks.rows import Row, row, seconds
from direct_pt.errors import InputError
from direct_pt.flags import positive_integer
from direct_pt.models.detector import MODELS
from direct_pt.training.micro_batch import training_batch

CARD_BYTES = 11e9
WARMUP = 3
SIDE = 8192  # of the matrices
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
    """What is measured, and how often."""
    parser.add_argument("--model", choices=list(MODELS), metavar="NAME", help="this detector alone")
    parser.add_argument("--repeats", type=positive_integer, default=10, metavar="N", help="steps that count (10)")


def measure(args: argparse.Namespace) -> list[Row]:
    """Every detector in every setting. Raises InputError where there is no GPU."""
    if not torch.cuda.is_available():
        raise InputError("gpu: there is none here, and this part measures nothing else; step measures on the CPU")
    card = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / card))
    reached = matrix_flops()
    rows = [row("gpu", f"bf16 product of {SIDE}x{SIDE} matrices", reached / 1e12, "10^12 operations/s")]
    for name in [args.model] if args.model else MODELS:
        for stage, images, size, precision in SETTINGS:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                rows += of_setting(name, stage, images, size, precision, args.repeats, reached)
            except torch.cuda.OutOfMemoryError:
                where = f"{name} {stage}, {images} images, {precision}"
                print(f"{where}: does not fit into {CARD_BYTES / 1e9:g} GB", flush=True)
    return rows


def of_setting(
    name: str, stage: str, images: int, size: tuple[int, int], precision: str, repeats: int, reached: float
) -> list[Row]:
    """One detector in one setting; `reached` are the operations a second of the matrix product."""
    setting = f"{name} {stage}, {images} x {size[0]}x{size[1]}, {precision}"
    ours = our_step(name, stage, images, size, precision)
    waits, operations = waits_of(ours), flops_of(ours)
    peak = torch.cuda.max_memory_allocated() / 2**30
    peer = peer_step(name, stage, images, size, precision) if name in PEERS else None
    spent, *theirs = seconds(*(one for one in (ours, peer) if one), repeats=repeats, warmup=WARMUP)
    peer_rate, target = (images / theirs[0], "ratio 1.5") if theirs else (None, None)
    return [
        row("gpu", setting, images / spent, "images/s", "torchvision" if theirs else None, peer_rate, target),
        row("gpu", "  waits for the GPU", waits, "a step", target="at most 8"),
        row("gpu", "  peak of allocated memory", peak, "GiB", target="under 9 GiB"),
        row("gpu", "  of the matrix product's speed", 100 * operations / spent / reached, "%"),
    ]


def our_step(name: str, stage: str, images: int, size: tuple[int, int], precision: str) -> Step:
    """One micro-batch and an update."""
    detector, optimizer = made(Case(paper_config(name, CLASSES), stage, size, OBJECTS, precision, recompute=False))
    detector.cuda()
    batch = training_batch(images, size, OBJECTS, CLASSES, detector.has_masks).to(torch.device("cuda"))
    return partial(_step, lambda: detector(batch), optimizer, *_precision(precision))


def peer_step(name: str, stage: str, images: int, size: tuple[int, int], precision: str) -> Step:
    """The same of torchvision's."""
    model, optimizer = made_peer(name, stage, size)
    model.cuda()
    pictures, targets = peer_inputs(training_batch(images, size, OBJECTS, CLASSES, "mask" in name))
    pictures = [picture.cuda() for picture in pictures]
    targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
    return partial(_step, lambda: model(pictures, targets), optimizer, *_precision(precision))


def _precision(precision: str) -> tuple[torch.dtype, torch.amp.GradScaler]:
    fp16 = precision == "fp16"
    return torch.float16 if fp16 else torch.bfloat16, torch.amp.GradScaler("cuda", enabled=fp16)


def _step(
    losses: Callable[[], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    finish: bool = True,
) -> None:
    """`finish`: wait until the GPU is done, as a time must."""
    with torch.autocast("cuda", dtype):
        loss = torch.stack(list(losses().values())).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if finish:
        torch.cuda.synchronize()


def waits_of(step: Step) -> int:
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


def flops_of(step: Step) -> float:
    """Operations of a step, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def matrix_flops() -> float:
    """Operations a second of a product of two bf16 matrices."""
    one, two = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        torch.mm(one, two)
        torch.cuda.synchronize()

    return 2 * SIDE**3 / seconds(product, repeats=10, warmup=WARMUP)[0]
