"""The parts that docs/scaling.md calculates with: see scaling.py."""

import argparse
import os
import pickle
import resource
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.evaluation import DETECTIONS, HEIGHT, PASTED, WIDTH, network_masks
from benchmarks.memory import CLASSES, Case, make_training, paper_config
from benchmarks.rows import Row, row, seconds
from benchmarks.synthetic import COCO_IMAGES, write_coco_annotations
from direct_pt.checkpoint import save_model
from direct_pt.coco_eval import Predictions
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.order import SampleOrder
from direct_pt.data.sources import load_split
from direct_pt.distributed.launch import make_accelerator
from direct_pt.files import write_tensors
from direct_pt.models.detector import MODELS, Detector
from direct_pt.models.layers import running_statistics
from direct_pt.models.mask_encoding import mask_run_lengths
from direct_pt.recipes import STAGES
from direct_pt.training.checkpoints import TrainingState, load_training_state, save_training_state
from direct_pt.training.micro_batch import training_batch
from direct_pt.training.prepared import STATE_NAMES, PreparedModel
from direct_pt.training.progress import Progress

PART = "scaling"
MB = 1e6
# One that trains with SGD, one with AdamW. The others' checkpoints are only counted.
WRITTEN = ("faster_rcnn_r50_fpn", "mask_rcnn_swin_t_fpn")


def measure_parts(args: argparse.Namespace) -> list[Row]:
    """Tensors, checkpoints, sampler, annotations, detections, roll call."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        os.environ["DIRECT_PT_CACHE"] = str(folder / "cache")
        for model in [args.model] if args.model else MODELS:
            written = folder / model if args.model or model in WRITTEN else None
            rows += measure_detector(model, written, args.repeats)
        rows += measure_sampler(args.order) + measure_table(folder, args.table)
    return [*rows, *measure_gathered(args.evaluated), measure_roll_call(args.roll_call)]


def nbytes(tensors: Any) -> int:
    """The bytes of all tensors or arrays."""
    return sum(tensor.nbytes for tensor in tensors)


def measure_detector(name: str, written: Path | None, repeats: int) -> list[Row]:
    """Parameters, what a step sends, what a checkpoint holds. With `written`, a folder, checkpoints are saved there."""
    # Few RoIs: the parameters are the same, and the losses' names.
    config = replace(paper_config(name, CLASSES), rois_per_image=16, proposals=64)
    rows: list[Row] = []
    last: list[Row] = []
    for stage in STAGES:
        model, optimizer = make_training(Case(config, stage, (64, 64), 0, "no", False))
        if stage == "pretrain":
            rows.append(row(PART, f"{name}: parameters", sum(p.numel() for p in model.parameters()), "parameters"))
            last.append(row(PART, "  a process's own state in it", own_state_bytes(model), "bytes"))
            last += [] if written is None else measure_checkpoint(model, optimizer, written, repeats)
        rows.append(row(PART, f"  {stage}: gradients", nbytes(trained(model)) / MB, "MB"))
        if running := nbytes(running_statistics(model)):
            rows.append(row(PART, f"  {stage}: BatchNorm statistics", running / MB, "MB"))
        rows.append(row(PART, f"  {stage}: a save by formula", sum(saved_bytes(model, optimizer)) / MB, "MB"))
    return [*rows, *last]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def saved_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the tensors in `model/`, and in the training state: the weights again and the optimizer's."""
    weights, parameters = nbytes(model.state_dict().values()), trained(model)
    steps = 4 * len(parameters) if isinstance(optimizer, torch.optim.AdamW) else 0  # a count for each tensor
    return weights, weights + len(STATE_NAMES[type(optimizer)]) * nbytes(parameters) + steps


def own_state_bytes(model: Detector) -> float:
    """The bytes that each process adds to a checkpoint: its losses since the last log line, by name."""
    losses = model(training_batch(2, (64, 64), 2, CLASSES, model.has_masks))
    own = {"losses": {key: float(value.detach()) for key, value in losses.items()}, "updates": 20, "steps": 20}
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for count in (1, 101):
            path = Path(folder, f"{count}.safetensors")
            write_tensors(path, {"none": torch.zeros(1)}, {"of_processes": [own] * count})
            sizes.append(path.stat().st_size)
    return (sizes[1] - sizes[0]) / 100


def measure_checkpoint(model: Detector, optimizer: torch.optim.Optimizer, folder: Path, repeats: int) -> list[Row]:
    """One checkpoint of stage 1, written as the main process does, and read."""
    accelerator = make_accelerator("no")
    by_formula = saved_bytes(model, optimizer)
    sharded = PreparedModel(accelerator, model.to(accelerator.device), optimizer)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    sharded.update(None, None)
    state = TrainingState(Progress(step=1), model.state_dict(), sharded.optimizer_state(), micro_batch_size=8)
    state.of_processes = [{"losses": {}, "updates": 0, "steps": 0}]

    def write() -> None:
        save_model(folder / "model", model, [])
        save_training_state(folder / "checkpoints", state, keep=1)

    wrote, read = seconds(write, partial(load_training_state, folder / "checkpoints"), repeats=repeats)
    sizes = [
        sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        for name in ("model", "checkpoints")
    ]
    figure = partial(row, PART)
    return [
        figure("  model/ on disk", sizes[0] / MB, "MB", "by formula", by_formula[0] / MB),
        figure("  training state on disk", sizes[1] / MB, "MB", "by formula", by_formula[1] / MB),
        figure("  to write both", wrote, "s"),
        figure("  to read the training state", read, "s"),
    ]


def measure_sampler(large: int) -> list[Row]:
    """A permutation of COCO train2017's size and of a large set, and one grouped by aspect ratio."""
    rows = []
    groups = np.random.default_rng(0).integers(2, size=COCO_IMAGES)
    for setting, order in (
        (f"sampler, {COCO_IMAGES:,} images", SampleOrder(COCO_IMAGES, 0, 8)),
        ("  the same in stage 2, grouped", SampleOrder(COCO_IMAGES, 0, 2, groups)),
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
    """Bytes of what a function returns, and the most that it had allocated."""
    tracemalloc.start()
    result = function()
    found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return found


def measure_table(folder: Path, images: int) -> list[Row]:
    """The annotation table's bytes an image, with and without outlines."""
    write_coco_annotations(folder, images)
    found = load_split(CocoSplit(folder / "pictures", folder / "labels.json"))
    arrays = [getattr(found, field.name) for field in fields(AnnotationTable)]
    plain = nbytes(array for array in arrays if isinstance(array, np.ndarray))
    outlines = nbytes(vars(found.segmentations).values())
    setting = f"annotation table, {len(found.boxes) / images:.1f} objects an image"
    return [
        row(PART, f"{setting}: boxes", plain / images, "bytes an image"),
        row(PART, f"{setting}: outlines", outlines / images, "bytes an image"),
    ]


def measure_gathered(images: int) -> list[Row]:
    """Detections of a whole split: as they are sent between processes, and in memory."""
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
    for kind in ("boxes", "boxes and masks"):
        if kind != "boxes":  # a separate string for each mask, as in real processes
            found.masks = [
                {"size": [HEIGHT, WIDTH], "counts": "".join(list(counts[number % PASTED]))} for number in range(count)
            ]
        message = pickle.dumps(found)
        held = allocated(partial(pickle.loads, message))[0]
        rows.append(row(PART, f"{images:,} images' {kind}: gathered", len(message) / MB, "MB"))
        rows.append(row(PART, f"{images:,} images' {kind}: in memory", held / MB, "MB"))
    return rows


def measure_roll_call(processes: int) -> Row:
    """Seconds in which connected processes set one key each and wait for all keys."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # two files for each connection
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
