"""A training step in one process and in several, and the parts that docs/scaling.md reckons with.

Steps: real processes through `accelerate launch` on the CPU (gloo, DistributedDataParallel), one core and one thread
each, pinned. The detector is Faster R-CNN with ResNet-18, 80 classes and 128 RoIs, BatchNorm training, the recipe's
optimizer at lr 0; images are noise with 7 boxes each and lie in memory. A step is what training does: forward,
backward, whether the gradients are finite, the flags' all-reduce, update, BatchNorm statistics' all-reduce. The peer is
one process on one core; both kinds are launched in turn, --rounds times. Within a launch these take turns: a step, the
same without the exchange of gradients (`no_sync`), ten of each other all-reduce, and an all-reduce of as many bytes as
the gradients have, with nothing to hide behind. A launch gives the medians of --repeats turns after two that do not
count, a figure is the median of the launches. Beside the seconds stands a process's own processor time, all its threads
together ("at work"), which others on the same machine slow less; it leaves out what a process waits.

Parts: the tensors of the five detectors with 80 classes as each stage trains them, counted. A checkpoint is written and
read as in training, with the state after one step: `model/` and the training state, to the disk's confirmation, with
checksums both ways; what is read lies in the page cache. Medians of --repeats; the peer is the tensors' bytes. Memory
of the sampler and of gathered detections is what Python allocates, by tracemalloc. The annotation table is of a made-up
file like COCO's. The roll call is the start's: connections of one process to one store on the same machine, a thread
each.
"""

import argparse
import json
import os
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import annotations
from benchmarks.evaluation import DETECTIONS, HEIGHT, PASTED, WIDTH, network_masks
from benchmarks.memory import CLASSES, Case, made, paper_config
from benchmarks.rows import Row, row, seconds
from benchmarks.step import detector, made_up
from direct_pt.checkpoint import save_model
from direct_pt.coco_eval import Predictions, mask_run_lengths
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.loader import SampleOrder
from direct_pt.data.sources import load_split
from direct_pt.distributed.launch import make_accelerator
from direct_pt.files import write_json, write_tensors
from direct_pt.models.detector import MODELS, Detector
from direct_pt.models.layers import running_statistics
from direct_pt.recipes import PRETRAIN, STAGES, make_optimizer
from direct_pt.training.checkpoints import TrainingState, load_training_state, save_training_state
from direct_pt.training.loop import average_running_statistics
from direct_pt.training.micro_batch import training_batch
from direct_pt.training.prepared import STATE, Sharded
from direct_pt.training.progress import Progress
from direct_pt.training.settings import positive_integer

PART = "scaling"
SMALL = 10  # of the small all-reduces, timed at once
MB = 1e6
# One that trains with SGD, one with AdamW. The others' checkpoints are counted alone.
WRITTEN = ("faster_rcnn_r50_fpn", "mask_rcnn_swin_t_fpn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is measured."""

    def number(name: str, default: int, about: str) -> None:
        parser.add_argument(name, type=positive_integer, default=default, metavar="N", help=f"{about} ({default})")

    number("--processes", 2, "beside one; a core each")
    number("--images", 8, "a process and step")
    number("--side", 160, "of the images, pixels")
    number("--repeats", 5, "turns that count in a launch, and of a checkpoint")
    number("--rounds", 2, "launches of each number of processes")
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto", help="of the steps (auto)")
    parser.add_argument("--model", choices=list(MODELS), metavar="NAME", help="the parts of this detector alone")
    number("--order", 100_000_000, "images of the sampler's large set")
    number("--table", 11_829, "images of the annotation table")
    number("--evaluated", 5000, f"images of an evaluation, {DETECTIONS} detections each")
    number("--roll-call", 1000, "processes that call at the start")
    parser.add_argument("--only", choices=("steps", "parts"), help="of these two")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to write checkpoints to")


def measure(args: argparse.Namespace) -> list[Row]:
    """Steps, then the parts."""
    return [*([] if args.only == "parts" else steps(args)), *([] if args.only == "steps" else parts(args))]


# Steps in several processes


def steps(args: argparse.Namespace) -> list[Row]:
    """Launches of one process and of several, in turn."""
    cores = len(os.sched_getaffinity(0))
    if cores < args.processes:
        print(f"warning: {args.processes} processes share {cores} core(s): their ratio to one process says nothing")
    one, several = [], []
    for _ in range(args.rounds):
        one.append(launched(1, args))
        several.append(launched(args.processes, args))
    alone, alone_at_work = (statistics.median(found[name] for found in one) for name in ("step", "step at work"))
    median = {name: statistics.median(found[name] for found in several) for name in several[0] if name != "precision"}
    share, share_at_work = (
        statistics.median(1 - found[f"unsynced{end}"] / found[f"step{end}"] for found in several)
        for end in ("", " at work")
    )
    count = args.processes * args.images
    setting = f"{args.processes} x {args.images} images of {args.side}x{args.side}, {several[0]['precision']}"
    figure, beside = partial(row, PART), ("one process", args.images / alone)
    return [
        figure(setting, count / median["step"], "images/s", *beside),
        figure("  without the exchange of gradients", count / median["unsynced"], "images/s", *beside),
        figure("  a step", median["step"], "s", "one process", alone),
        figure("  its processor time, each process", median["step at work"], "s", "one process", alone_at_work),
        figure("  exchange of gradients", 100 * share, "% of a step"),
        figure("  exchange of gradients, at work", 100 * share_at_work, "% of a step's processor time"),
        figure("  gradients", median["gradient_bytes"] / MB, "MB"),
        figure("  all-reduce of as many bytes alone", median["gradients"], "s"),
        figure("  flags' all-reduce, 8 bytes", 1000 * median["flags"] / SMALL, "ms"),
        figure("  statistics' all-reduce", 1000 * median["statistics"] / SMALL, "ms"),
        figure("  statistics", median["statistics_bytes"] / MB, "MB"),
    ]


def launched(processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `timed_steps` finds in so many processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--multi_gpu" if processes > 1 else "--cpu"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "found.json")
        numbers = map(str, (args.images, args.side, args.repeats))
        command += ["--module", "benchmarks.scaling", args.precision, *numbers, str(output)]
        scripts = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=scripts, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
        return json.loads(output.read_text())


def timed_steps(precision: str, images: int, side: int, repeats: int, output: Path) -> None:
    """What each process of a launch does; the main one writes the median seconds, and bytes."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})
    accelerator = make_accelerator(precision, images)
    model: Any = detector("resnet18", "2fc", 128)
    # At lr 0 every step does the same work, also those whose gradients differ between the processes.
    sharded = Sharded(accelerator, model, make_optimizer(model, PRETRAIN, lr=0.0))
    batch = made_up(images, side)
    gradients = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad))

    def flags(finite: Tensor) -> bool:
        both = torch.stack([~finite, torch.tensor(False)]).int()
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return bool(both.tolist()[0])

    def step(exchange: bool) -> None:
        torch.manual_seed(accelerator.process_index)
        with nullcontext() if exchange else accelerator.no_sync(sharded.model):
            loss = torch.stack(list(sharded.model(batch).values())).sum()
            sharded.backward(loss, loss.detach().isfinite())
        norm = sharded.gradient_norm()
        skip = flags((loss.detach() if norm is None else norm).isfinite())
        if skip or sharded.update(None, norm):
            raise RuntimeError("a loss or a gradient is not finite")
        sharded.optimizer.zero_grad()
        average_running_statistics(sharded.detector, accelerator)

    def often(function: Callable[[], Any]) -> None:
        for _ in range(SMALL):
            function()

    tasks: dict[str, Callable[[], Any]] = {"step": partial(step, True)}
    if accelerator.num_processes > 1:
        tasks |= {
            "unsynced": partial(step, False),
            "flags": partial(often, partial(flags, torch.tensor(True))),
            "statistics": partial(often, partial(average_running_statistics, sharded.detector, accelerator)),
            "gradients": partial(torch.distributed.all_reduce, gradients),
        }
    found: dict[str, Any] = medians(tasks, repeats)
    found["gradient_bytes"] = gradients.nbytes
    found["statistics_bytes"] = nbytes(running_statistics(sharded.detector))
    found["precision"] = accelerator.mixed_precision.replace("no", "fp32")
    if accelerator.is_main_process:
        write_json(output, found)
    accelerator.end_training()


def medians(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each task, and of this process's processors' time ("NAME at work"). They take turns."""
    spent: dict[str, list[float]] = {}
    for turn in range(-2, repeats):
        for name, task in tasks.items():
            start, start_at_work = time.perf_counter(), time.process_time()
            task()
            if turn >= 0:
                spent.setdefault(name, []).append(time.perf_counter() - start)
                spent.setdefault(f"{name} at work", []).append(time.process_time() - start_at_work)
    return {name: statistics.median(times) for name, times in spent.items()}


# The parts


def parts(args: argparse.Namespace) -> list[Row]:
    """Tensors, checkpoints, sampler, annotations, detections, roll call."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["DIRECT_PT_CACHE"] = str(folder / "cache")
        for model in [args.model] if args.model else MODELS:
            written = folder / model if args.model or model in WRITTEN else None
            rows += of_detector(model, written, args.repeats)
        rows += sampler(args.order) + table(folder, args.table)
    return [*rows, *gathered(args.evaluated), roll_call(args.roll_call)]


def nbytes(tensors: Any) -> int:
    """Of all tensors or arrays."""
    return sum(tensor.nbytes for tensor in tensors)


def of_detector(name: str, written: Path | None, repeats: int) -> list[Row]:
    """Parameters, what travels in a step, what a save holds; saves in the folder `written`, where there is one."""
    # Few RoIs: the parameters are the same, and the losses' names.
    config = replace(paper_config(name, CLASSES), rois_per_image=16, proposals=64)
    rows: list[Row] = []
    last: list[Row] = []
    for stage in STAGES:
        model, optimizer = made(Case(config, stage, (64, 64), 0, "no", False))
        if stage == "pretrain":
            rows.append(row(PART, f"{name}: parameters", sum(p.numel() for p in model.parameters()), "parameters"))
            last.append(row(PART, "  a process's own state in it", own_state_bytes(model), "bytes"))
            last += [] if written is None else checkpoint(model, optimizer, written, repeats)
        rows.append(row(PART, f"  {stage}: gradients", nbytes(trained(model)) / MB, "MB"))
        if running := nbytes(running_statistics(model)):
            rows.append(row(PART, f"  {stage}: BatchNorm statistics", running / MB, "MB"))
        rows.append(row(PART, f"  {stage}: a save by formula", sum(saved_bytes(model, optimizer)) / MB, "MB"))
    return [*rows, *last]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that have gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def saved_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """The tensors of `model/`, and of the training state: the weights again and the optimizer's."""
    weights, parameters = nbytes(model.state_dict().values()), trained(model)
    counts = 4 * len(parameters) if isinstance(optimizer, torch.optim.AdamW) else 0  # its steps, for each tensor
    return weights, weights + len(STATE[type(optimizer)]) * nbytes(parameters) + counts


def own_state_bytes(model: Detector) -> float:
    """What each process adds to a checkpoint: its losses since the last log, by name."""
    losses = model(training_batch(2, (64, 64), 2, CLASSES, model.has_masks))
    own = {"losses": {key: float(value.detach()) for key, value in losses.items()}, "updates": 20, "steps": 20}
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for count in (1, 101):
            path = Path(folder, f"{count}.safetensors")
            write_tensors(path, {"none": torch.zeros(1)}, {"of_processes": [own] * count})
            sizes.append(path.stat().st_size)
    return (sizes[1] - sizes[0]) / 100


def checkpoint(model: Detector, optimizer: torch.optim.Optimizer, folder: Path, repeats: int) -> list[Row]:
    """One save of stage 1 as the main process does it, and one read."""
    accelerator = make_accelerator("no")
    by_formula = saved_bytes(model, optimizer)
    sharded = Sharded(accelerator, model.to(accelerator.device), optimizer)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    sharded.update(None, None)
    state = TrainingState(Progress(step=1), model.state_dict(), sharded.optimizer_state(), micro_batch_size=8)
    state.of_processes = [{"losses": {}, "updates": 0, "steps": 0}]

    def write() -> None:
        save_model(folder / "model", model, [])
        save_training_state(folder / "checkpoints", state, keep=1)

    wrote, read = seconds(write, partial(load_training_state, folder / "checkpoints"), repeats=repeats)
    sizes = [folder_bytes(folder / "model"), folder_bytes(folder / "checkpoints")]
    figure = partial(row, PART)
    return [
        figure("  model/ on disk", sizes[0] / MB, "MB", "by formula", by_formula[0] / MB),
        figure("  training state on disk", sizes[1] / MB, "MB", "by formula", by_formula[1] / MB),
        figure("  to write both", wrote, "s"),
        figure("  to read the training state", read, "s"),
    ]


def folder_bytes(folder: Path) -> int:
    """Of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sampler(large: int) -> list[Row]:
    """A permutation of COCO train2017's size and of a large set, and one grouped by aspect ratio."""
    rows = []
    groups = np.random.default_rng(0).integers(2, size=annotations.IMAGES)
    for setting, order in (
        (f"sampler, {annotations.IMAGES:,} images", SampleOrder(annotations.IMAGES, 0, 8)),
        ("  the same in stage 2, grouped", SampleOrder(annotations.IMAGES, 0, 2, groups)),
        (f"sampler, {large:,} images", SampleOrder(large, 0, 8)),
    ):
        start = time.perf_counter()
        permutation = order.epoch(0)
        spent = time.perf_counter() - start
        rows.append(row(PART, f"{setting}: kept", permutation.nbytes / MB, "MB"))
        del permutation
        rows.append(row(PART, f"{setting}: at most", allocated(partial(order.epoch, 0))[1] / MB, "MB"))
        rows.append(row(PART, f"{setting}: time", spent, "s"))
    return rows


def allocated(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of what a function returns, and the most that it had."""
    tracemalloc.start()
    result = function()
    found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return found


def table(folder: Path, images: int) -> list[Row]:
    """The annotation table's bytes an image, with and without outlines."""
    annotations.make_data(folder, images)
    found = load_split(CocoSplit(folder / "pictures", folder / "labels.json"))
    arrays = [getattr(found, field.name) for field in fields(AnnotationTable)]
    plain = nbytes(array for array in arrays if isinstance(array, np.ndarray))
    outlines = nbytes(vars(found.segmentations).values())
    setting = f"annotation table, {len(found.boxes) / images:.1f} objects an image"
    return [
        row(PART, f"{setting}: boxes", plain / images, "bytes an image"),
        row(PART, f"{setting}: outlines", outlines / images, "bytes an image"),
    ]


def gathered(images: int) -> list[Row]:
    """Detections of a whole split: as they travel between processes, and as they lie in memory."""
    rng = np.random.default_rng(0)
    count = images * DETECTIONS
    probabilities, boxes = network_masks(rng)
    encoded = mask_run_lengths(probabilities, boxes, np.tile([HEIGHT, WIDTH], (PASTED, 1)))
    found = Predictions(
        np.repeat(np.arange(images), DETECTIONS),
        rng.random((count, 4)),
        rng.random(count),
        rng.integers(80, size=count),
    )
    counts = [mask["counts"] for mask in encoded]
    rows = [row(PART, "a mask's run lengths, mean", statistics.mean(map(len, counts)), "bytes")]
    for what in ("boxes", "boxes and masks"):
        if what != "boxes":  # each with a text of its own, as processes have it
            found.masks = [
                {"size": [HEIGHT, WIDTH], "counts": "".join(list(counts[number % PASTED]))} for number in range(count)
            ]
        travels = pickle.dumps(found)
        held = allocated(partial(pickle.loads, travels))[0]
        rows.append(row(PART, f"{images:,} images' {what}: gathered", len(travels) / MB, "MB"))
        rows.append(row(PART, f"{images:,} images' {what}: in memory", held / MB, "MB"))
    return rows


def roll_call(processes: int) -> Row:
    """Seconds in which so many set a key each and wait for all keys, connected already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # two for each connection
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 3 * processes + 1000)), hard))
    limit = timedelta(seconds=300)
    server = torch.distributed.TCPStore("localhost", 0, None, True, limit, wait_for_workers=False)
    clients = [
        torch.distributed.TCPStore("localhost", server.port, None, False, limit, wait_for_workers=False)
        for _ in range(processes)
    ]
    names = [f"direct_pt/0/{number}" for number in range(processes)]

    def call(number: int) -> None:
        clients[number].set(names[number], "host")
        clients[number].wait(names, limit)

    with ThreadPoolExecutor(processes) as pool:
        start = time.perf_counter()
        list(pool.map(call, range(processes)))
        spent = time.perf_counter() - start
    return row(PART, f"roll call of {processes:,}", spent, "s")


if __name__ == "__main__":
    of_images, of_side, turns = map(int, sys.argv[2:5])
    timed_steps(sys.argv[1], of_images, of_side, turns, Path(sys.argv[5]))
