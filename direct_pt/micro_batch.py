"""How many images a device takes at once, found by training steps on the heaviest micro-batch that can come."""

import copy
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import torch

from direct_pt.batch import Objects
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.transforms import Preset
from direct_pt.device import is_out_of_memory
from direct_pt.errors import InputError
from direct_pt.memory import training_batch
from direct_pt.models.detector import Detector
from direct_pt.optimizers import make_optimizer
from direct_pt.recipes import Recipe

SPARE = 0.05  # of the memory, left free: batches of other shapes leave gaps


def fitting_micro_batch_size(
    detector: Detector,
    recipe: Recipe,
    table: AnnotationTable,
    preset: Preset,
    sizes: list[int],
    copies: int,
    device: torch.device,
    precision: str,
) -> int:
    """The first of `sizes` that a whole training step fits with.

    Each is tried in a process of its own: one that ran out of memory is good for nothing more, and on the CPU the
    system may kill it.

    Args:
        detector: as it will be trained; it stays as it is.
        recipe: whose optimizer keeps its state on the device.
        table: of the training images; the largest image and the most objects of one are what is tried.
        preset: of the stage.
        sizes: images at once, largest first.
        copies: of the weights that training keeps besides: gradients in several processes' buckets, a moving average.
        device: to try on.
        precision: "no", "fp16" or "bf16".

    Raises:
        InputError: none fits.
    """
    frame = _largest_frame(table, preset)
    objects = max(1, int(np.diff(table.starts).max()))
    on_cpu = copy.deepcopy(detector).cpu()
    context = multiprocessing.get_context("spawn")  # a fork has no GPU, and no threads of the CPU's libraries
    answer = ""
    for size in sizes:
        batch = (size, frame, objects, len(table.class_names), detector.has_masks)
        receiver, sender = context.Pipe(duplex=False)
        others = copies, sizes[0] * frame[0] * frame[1] * 3  # and the images that wait
        arguments = sender, on_cpu, recipe, batch, others, device, precision, _memory(device), torch.get_num_threads()
        process = context.Process(target=_try, args=arguments, daemon=True)
        process.start()
        sender.close()
        try:
            answer = receiver.recv()
        except EOFError:
            answer = "was killed, for want of memory as it seems"
        process.join()
        if answer == "fits":
            return size
    raise InputError(
        f"--micro-batch-size auto: not even {sizes[-1]} image(s) of {frame[1]}x{frame[0]} fit ({answer}); use "
        "--gradient-checkpointing, a smaller --backbone or smaller images"
    )


def _try(
    sender: Connection,
    detector: Detector,
    recipe: Recipe,
    batch: tuple[Any, ...],
    others: tuple[int, int],
    device: torch.device,
    precision: str,
    memory: int,
    threads: int,
) -> None:
    """One training step; sends "fits", or why not."""
    torch.set_num_threads(threads)
    if device.type == "cpu":  # so that too large an allocation fails in place of waking the system's killer
        limit = psutil.Process().memory_info().data + memory
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        detector.to(device).to(memory_format=torch.channels_last).train()
        optimizer = make_optimizer(detector, recipe, lr=0.0)
        copies, waiting = others
        kept = [torch.empty_like(parameter) for parameter in detector.parameters() for _ in range(copies)]
        kept.append(torch.empty(waiting + int(SPARE * memory), dtype=torch.uint8, device=device))
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            losses = detector(training_batch(*batch).to(device))
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        sender.send("fits")
    except (RuntimeError, MemoryError) as error:
        sender.send(f"{type(error).__name__}: {error}".splitlines()[0])
        if not is_out_of_memory(error):
            raise


def _largest_frame(table: AnnotationTable, preset: Preset) -> tuple[int, int]:
    """(height, width) that holds every training image as the preset makes it: a micro-batch may mix their shapes."""
    rng = np.random.default_rng(0)
    shapes = {(height, width) for height, width in table.sizes.tolist()}
    frames = [preset.padded_size(preset.geometry(shape, Objects.none(), rng).size) for shape in shapes]
    return max(height for height, _ in frames), max(width for _, width in frames)


def _memory(device: torch.device) -> int:
    """Bytes that a process on this device may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
