"""How many images a device takes at once, found by training steps on the heaviest micro-batch that can come."""

import multiprocessing
import resource
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import psutil
import torch

from direct_pt.batch import Batch, Objects, PackedMasks, Sample, collate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.distributed.launch import MAX_PROCESSES
from direct_pt.errors import InputError
from direct_pt.flags import environment_number
from direct_pt.models.detector import DetectorConfig, build_detector
from direct_pt.models.layers import recompute_blocks
from direct_pt.recipes import Recipe, make_optimizer
from direct_pt.transforms import FLIPS, Preset

SPARE_MEMORY = 0.05  # share of the memory that is left free: batches of other shapes leave gaps
POLL_SECONDS, MAX_IDLE_SECONDS = 1.0, 60.0  # how often a trial is looked at, and how long it may do nothing
MIN_OBJECT_SIDE = 16  # pixels, of the sides of the objects in `training_batch`


@dataclass(frozen=True)
class Trial:
    """The training step that is tried.

    Attributes:
        config: of the detector.
        frozen: what does not train, see `Detector.freeze_for_finetuning`.
        gradient_checkpointing: whether the backbone's activations are computed twice.
        recipe: of the optimizer.
        copies: of the weights that training keeps besides: gradient buckets of several processes, a moving average.
        device: on which it is tried.
        precision: "no", "fp16" or "bf16".
    """

    config: DetectorConfig
    frozen: str
    gradient_checkpointing: bool
    recipe: Recipe
    copies: int
    device: torch.device
    precision: str


def fitting_micro_batch_size(trial: Trial, table: AnnotationTable, preset: Preset, sizes: list[int]) -> int:
    """The first of `sizes` at which a whole training step fits into the device's memory.

    Each is tried in a process of its own: one that ran out of memory cannot be used any further, and on the CPU the
    system may kill it.

    Args:
        trial: the step.
        table: of the training images; the step gets the largest image and the most objects of one.
        preset: of the stage.
        sizes: images at once, largest first.

    Raises:
        InputError: none fits.
    """
    frame = _largest_frame(table, preset)
    objects = max(1, int(np.diff(table.starts).max()))
    waiting = sizes[0] * frame[0] * frame[1] * 3  # bytes: a step's images lie on the device too
    context = multiprocessing.get_context("spawn")  # a fork has no GPU, and no threads of the CPU's libraries
    answer = ""
    for size in sizes:
        receiver, sender = context.Pipe(duplex=False)
        arguments = sender, trial, (size, frame, objects), waiting, _memory(trial.device), torch.get_num_threads()
        process = context.Process(target=_try, args=arguments, daemon=True)
        process.start()
        sender.close()
        answer = _answer(receiver, process)
        if answer == "fits":
            return size
    raise InputError(
        f"--micro-batch-size auto: not even {sizes[-1]} image(s) of {frame[1]}x{frame[0]} fit ({answer}); use "
        "--gradient-checkpointing, a smaller --backbone or smaller images"
    )


def _answer(receiver: Connection, process: multiprocessing.process.BaseProcess) -> str:
    """What the process of a trial sends; or why it cannot, once it has ended. It is killed if it hangs.

    Where memory runs out between two steps of a library, a lock may stay closed for ever.
    """
    seconds, since = -1.0, time.monotonic()
    while not receiver.poll(POLL_SECONDS):  # true at the end, too
        times = psutil.Process(process.pid).cpu_times()
        if (now := times.user + times.system) > seconds:
            seconds, since = now, time.monotonic()
        elif time.monotonic() - since > MAX_IDLE_SECONDS:
            process.kill()
            process.join()
            return f"made no progress for {MAX_IDLE_SECONDS:g} s, probably out of memory"
    try:
        answer = str(receiver.recv())
    except EOFError:
        process.join()
        answer = "was killed, probably out of memory"
        if process.exitcode != -signal.SIGKILL:
            answer = f"the process that tried it ended with status {process.exitcode}"
    process.join()
    return answer


def _try(
    sender: Connection, trial: Trial, batch: tuple[int, tuple[int, int], int], waiting: int, memory: int, threads: int
) -> None:
    """One training step; sends "fits", or why not."""
    torch.set_num_threads(threads)
    if trial.device.type == "cpu":  # so that too large an allocation fails in place of waking the system's killer
        limit = psutil.Process().memory_info().data + memory
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        detector = build_detector(trial.config.name, config=trial.config).train()
        detector.freeze_for_finetuning(trial.frozen)
        if trial.gradient_checkpointing:
            recompute_blocks(detector.backbone.network)
        detector.to(trial.device).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(detector, trial.recipe, lr=0.0)
        kept = [torch.empty_like(parameter) for parameter in detector.parameters() for _ in range(trial.copies)]
        kept.append(torch.empty(waiting + int(SPARE_MEMORY * memory), dtype=torch.uint8, device=trial.device))
        images = training_batch(*batch, len(trial.config.class_names), detector.has_masks).to(trial.device)
        dtype = torch.float16 if trial.precision == "fp16" else torch.bfloat16
        with torch.autocast(trial.device.type, dtype, enabled=trial.precision != "no"):
            losses = detector(images)
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
    sizes = {preset.geometry(shape, Objects.none(), rng).size for shape in shapes}
    if FLIPS[preset.flips][2]:
        sizes |= {size[::-1] for size in sizes}
    frames = [preset.padded_size(size) for size in sizes]
    return max(height for height, _ in frames), max(width for _, width in frames)


def _memory(device: torch.device) -> int:
    """Bytes that a process on this device may have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available // environment_number("LOCAL_WORLD_SIZE", 1, 1, MAX_PROCESSES)


def training_batch(
    images: int, size: tuple[int, int], objects: int, num_classes: int, with_masks: bool = False, seed: int = 0
) -> Batch:
    """A micro-batch as heavy as real ones get: noise that fills the whole frame, and as many objects on each image.

    Args:
        images: how many.
        size: (height, width) of each, multiples of 32.
        objects: on each image, 16 pixels to half the frame a side.
        num_classes: that they are of.
        with_masks: each object is given a mask, its whole box.
        seed: of all random numbers.
    """
    rng = np.random.default_rng(seed)
    limit = np.array([size[1], size[0]])
    samples = []
    for number in range(images):
        sides = np.exp(rng.uniform(np.log(MIN_OBJECT_SIDE), np.log(limit / 2), (objects, 2))).astype(np.int64)
        corners = (rng.random((objects, 2)) * (limit - sides)).astype(np.int64)
        windows = np.concatenate([corners, corners + sides], axis=1)
        crops = [np.ones((height, width), np.uint8) for width, height in sides]
        masks = PackedMasks.pack(crops, windows, np.tile(size, (objects, 1)), np.ones(objects))
        labels = rng.integers(num_classes, size=objects)
        area = sides.prod(axis=1).astype(np.float64)
        samples.append(
            Sample(
                image=torch.from_numpy(rng.integers(256, size=(3, *size), dtype=np.uint8)),
                padded_size=size,
                original_size=size,
                scale=(1.0, 1.0),
                objects=Objects(windows.astype(np.float64), labels, area, np.zeros(objects, bool)),
                masks=masks if with_masks else None,
                seed=number,
            )
        )
    return collate(samples)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the CPU's libraries."""
    text = str(error).lower()
    words = (
        "out of memory",
        "can't allocate memory",
        "bad_alloc",
        "could not create a",
        "cannot allocate memory",
    )
    return isinstance(error, MemoryError) or any(word in text for word in words)
