"""How many images a device takes at once, found by training steps on the heaviest micro-batch that can come."""

import copy
import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from direct_pt.batch import Objects
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.transforms import Preset
from direct_pt.device import is_out_of_memory
from direct_pt.errors import InputError
from direct_pt.memory import training_batch
from direct_pt.models.detector import Detector

SPARE = 0.05  # of the memory, left free: batches of other shapes leave gaps


def fitting_micro_batch_size(
    detector: Detector,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    table: AnnotationTable,
    preset: Preset,
    sizes: list[int],
    copies: int,
    device: torch.device,
    precision: str,
) -> int:
    """The first of `sizes` that a whole training step fits with. The detector and its random numbers stay as they are.

    Args:
        detector: as it will be trained.
        make_optimizer: for a copy of it.
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
    random_numbers = torch.get_rng_state()
    trial = copy.deepcopy(detector).to(device).to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer(trial)
    kept = [torch.empty_like(parameter) for parameter in trial.parameters() for _ in range(copies)]
    kept.append(torch.empty(sizes[0] * frame[0] * frame[1] * 3, dtype=torch.uint8, device=device))  # images that wait
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    try:
        with _memory_limited(device) as spare:
            kept.append(torch.empty(spare, dtype=torch.uint8, device=device))
            for size in sizes:
                batch = training_batch(size, frame, objects, len(table.class_names), detector.has_masks)
                try:
                    with torch.autocast(device.type, dtype, enabled=precision != "no"):
                        losses: dict[str, Tensor] = trial(batch.to(device))
                    torch.stack(list(losses.values())).sum().backward()
                    optimizer.step()
                    return size
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    del error
                losses = {}
                optimizer.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
    finally:
        torch.set_rng_state(random_numbers)
        del trial, optimizer, kept
        gc.collect()
        torch.cuda.empty_cache()
    raise InputError(
        f"--micro-batch-size auto: not even {sizes[-1]} image(s) of {frame[1]}x{frame[0]} fit; use "
        "--gradient-checkpointing, a smaller --backbone or smaller images"
    )


def _largest_frame(table: AnnotationTable, preset: Preset) -> tuple[int, int]:
    """(height, width) that holds every training image as the preset makes it: a micro-batch may mix their shapes."""
    rng = np.random.default_rng(0)
    shapes = {(height, width) for height, width in table.sizes.tolist()}
    frames = [preset.padded_size(preset.geometry(shape, Objects.none(), rng).size) for shape in shapes]
    return max(height for height, _ in frames), max(width for _, width in frames)


@contextmanager
def _memory_limited(device: torch.device) -> Iterator[int]:
    """Inside it too large an allocation raises, on the CPU too. Gives the bytes that are to stay free."""
    if device.type == "cuda":
        yield int(SPARE * torch.cuda.get_device_properties(device).total_memory)
        return
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    share = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limit = psutil.Process().memory_info().data + share
    given = [value for value in limits if value != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *given]), limits[1]))
    try:
        yield int(SPARE * share)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
