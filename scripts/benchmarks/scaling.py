"""A training step in one process and in several, and the parts that docs/scaling.md calculates with.

Steps: real processes through `accelerate launch` on the CPU (gloo, DistributedDataParallel), one core and one thread
each, pinned. The detector is Faster R-CNN with ResNet-18, 80 classes and 128 RoIs, BatchNorm training, the recipe's
optimizer at lr 0; the images are noise with 7 boxes each, in memory. A step is that of training: forward, backward,
check for finite gradients, all-reduce of flags, update, all-reduce of BatchNorm statistics. The peer is one process on
one core; both are launched in turn, --rounds times. Within a launch these take turns: a step, the same without the
exchange of gradients (`no_sync`), ten of each other all-reduce, and an all-reduce of as many bytes as the gradients
have, which no computation hides. A launch gives the medians of --repeats turns after two warm-up turns, a figure is the
median of the launches. Beside the seconds stands the processor time of a process, all its threads together ("at work"):
other programs slow it less, and it leaves out waiting.

Parts: the tensors of the five detectors with 80 classes as each stage trains them, counted. A checkpoint is written and
read as in training, with the state after one step: `model/` and the training state, until the disk has confirmed them,
with checksums both ways; reading is from the page cache. Medians of --repeats; the peer is the tensors' bytes. Memory
of the sampler and of gathered detections is what Python allocates, by tracemalloc. The annotation table is of a
synthetic file like COCO's. The roll call is the start's: connections of one process to one store on the same machine, a
thread each.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluation import DETECTIONS
from benchmarks.rows import Row, row, run_python
from benchmarks.scaling_parts import MB, PART, measure_parts, nbytes
from benchmarks.step import detector
from benchmarks.synthetic import noise_batch
from direct_pt.distributed.launch import make_accelerator
from direct_pt.files import write_json
from direct_pt.flags import any_path, positive_integer
from direct_pt.models.detector import MODELS
from direct_pt.models.layers import running_statistics
from direct_pt.recipes import PRETRAIN, make_optimizer
from direct_pt.training.norm_statistics import average_running_statistics
from direct_pt.training.prepared import PreparedModel

SMALL_REPEATS = 10  # small all-reduces that are timed at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how much of it."""

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
    parser.add_argument("--folder", type=any_path, metavar="DIR", help="on the disk to write checkpoints to")


def measure(args: argparse.Namespace) -> list[Row]:
    """Steps, then the parts."""
    steps = [] if args.only == "parts" else measure_steps(args)
    return steps if args.only == "steps" else [*steps, *measure_parts(args)]


def measure_steps(args: argparse.Namespace) -> list[Row]:
    """Launches of one process and of several, in turn."""
    cores = len(os.sched_getaffinity(0))
    if cores < args.processes:
        print(f"warning: {args.processes} processes share {cores} core(s): their ratio to one process says nothing")
    one, several = [], []
    for _ in range(args.rounds):
        one.append(launch_steps(1, args))
        several.append(launch_steps(args.processes, args))
    alone, alone_at_work = (statistics.median(found[name] for found in one) for name in ("step", "step at work"))
    median = {name: statistics.median(found[name] for found in several) for name in several[0] if name != "precision"}
    share, share_at_work = (
        statistics.median(1 - found[f"unsynced{end}"] / found[f"step{end}"] for found in several)
        for end in ("", " at work")
    )
    count = args.processes * args.images
    setting = f"{args.processes} x {args.images} images of {args.side}x{args.side}, {several[0]['precision']}"
    figure, peer = partial(row, PART), ("one process", args.images / alone)
    return [
        figure(setting, count / median["step"], "images/s", *peer),
        figure("  without the exchange of gradients", count / median["unsynced"], "images/s", *peer),
        figure("  a step", median["step"], "s", "one process", alone),
        figure("  its processor time, each process", median["step at work"], "s", "one process", alone_at_work),
        figure("  exchange of gradients", 100 * share, "% of a step"),
        figure("  exchange of gradients, at work", 100 * share_at_work, "% of a step's processor time"),
        figure("  gradients", median["gradient_bytes"] / MB, "MB"),
        figure("  all-reduce of as many bytes alone", median["gradients"], "s"),
        figure("  flags' all-reduce, 8 bytes", 1000 * median["flags"] / SMALL_REPEATS, "ms"),
        figure("  statistics' all-reduce", 1000 * median["statistics"] / SMALL_REPEATS, "ms"),
        figure("  statistics", median["statistics_bytes"] / MB, "MB"),
    ]


def launch_steps(processes: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `timed_steps` finds in this number of processes."""
    launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", "1", "--multi_gpu" if processes > 1 else "--cpu"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "found.json")
        numbers = map(str, (args.images, args.side, args.repeats))
        program = ["--module", "benchmarks.scaling", args.precision, *numbers, str(output)]
        run_python(*launcher, *program, CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true")
        return json.loads(output.read_text())


def timed_steps(precision: str, images: int, side: int, repeats: int, output: Path) -> None:
    """What each process of a launch runs; the main one writes the median seconds, and bytes."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})
    accelerator = make_accelerator(precision, images)
    model: Any = detector("resnet18", "2fc", 128)
    # At lr 0 every step does the same work, also those without exchange, whose gradients differ between processes.
    sharded = PreparedModel(accelerator, model, make_optimizer(model, PRETRAIN.paper, lr=0.0))
    batch = noise_batch(images, side)
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

    def repeat(function: Callable[[], Any]) -> None:
        for _ in range(SMALL_REPEATS):
            function()

    tasks: dict[str, Callable[[], Any]] = {"step": partial(step, True)}
    if accelerator.num_processes > 1:
        tasks |= {
            "unsynced": partial(step, False),
            "flags": partial(repeat, partial(flags, torch.tensor(True))),
            "statistics": partial(repeat, partial(average_running_statistics, sharded.detector, accelerator)),
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
    """The median seconds of each task, and the median processor time ("NAME at work"). The tasks take turns."""
    spent: dict[str, list[float]] = {}
    for turn in range(-2, repeats):
        for name, task in tasks.items():
            start, start_at_work = time.perf_counter(), time.process_time()
            task()
            if turn >= 0:
                spent.setdefault(name, []).append(time.perf_counter() - start)
                spent.setdefault(f"{name} at work", []).append(time.process_time() - start_at_work)
    return {name: statistics.median(times) for name, times in spent.items()}


if __name__ == "__main__":
    of_images, of_side, turns = map(int, sys.argv[2:5])
    timed_steps(sys.argv[1], of_images, of_side, turns, Path(sys.argv[5]))
