"""Whether a recipe trains, and how well: both stages, by the scripts themselves, on your own data sets.

By default each run is stopped 150 steps after its warm-up, and the rows have the largest gradient norm and the loss, or
that the run diverged. With --whole it runs to its end, and the rows also have the AP of each evaluation.

An arm is a name, and flags for pretrain.py, and after a slash between spaces for finetune.py:

  --arm "default:"  --arm "64: --global-batch-size 64 --warmup-steps 500 / --global-batch-size 16"

Unless --size paper is given, the detector is a small one: ResNet-18 (for the Swin detector ConvNeXt-Atto), 64 channels,
64 RoIs of 256 proposals, 160 pixels in stage 1 and 256 in stage 2. Runs are in --output-dir, the output of each in its
output.txt; finished runs there are not repeated.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, row
from direct_pt.errors import InputError
from direct_pt.flags import any_path, positive_integer
from direct_pt.models.detector import MODELS
from direct_pt.training.saved_values import read_plan, read_records

STEPS_AFTER_WARMUP = 150
STOPPED = 143  # exit status after SIGTERM
SMALL_CHANNELS = ("--channels", "64")
SMALL_COUNTS = ("--rois-per-image", "64", "--proposals", "256")
SMALL_IMAGES = {"pretrain": ("--image-size", "160"), "finetune": ("--short-side", "256", "--long-side", "256")}
SMALL_BACKBONES = {"mask_rcnn_swin_t_fpn": "convnext_atto"}  # uses LayerNorm too
SCRIPTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Trial:
    """One run of both stages.

    Attributes:
        name: names its arm, detector, data set and seed.
        folder: contains the folders of its stages.
        flags: by stage, without --output-dir and --init.
    """

    name: str
    folder: Path
    flags: dict[str, tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and how many at once."""
    parser.add_argument("--data", type=any_path, nargs="+", required=True, metavar="DIR", help="one data set each")
    parser.add_argument("--output-dir", type=any_path, required=True, metavar="DIR", help="the runs' folders")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME", help="(all)")
    parser.add_argument(
        "--arm", action="append", metavar="NAME:FLAGS", help="see above; several are compared (default:)"
    )
    parser.add_argument("--seeds", type=positive_integer, default=1, metavar="N", help="runs of each kind (1)")
    parser.add_argument("--stages", choices=["pretrain", "both"], default="both", help="(both)")
    parser.add_argument("--whole", action="store_true", help="train to the end")
    parser.add_argument("--size", choices=["small", "paper"], default="small", help="of detector and images (small)")
    parser.add_argument("--jobs", type=positive_integer, default=1, metavar="N", help="runs at once (1)")


def measure(args: argparse.Namespace) -> list[Row]:
    """The rows of all runs. Raises InputError if an arm has no name or a run's flags are refused."""
    stages = ["pretrain", "finetune"] if args.stages == "both" else ["pretrain"]
    waiting = [
        make_trial(arm, model, data, seed, args)
        for arm in args.arm or ["default:"]
        for data in args.data
        for model in args.model
        for seed in range(args.seeds)
    ]
    rows: list[Row] = []
    # By slot: the trial, its stages that are not done, and the process of the first of these.
    running = dict[int, tuple[Trial, list[str], subprocess.Popen[bytes] | None]]()
    stopping: set[int] = set()  # process ids; a second signal would end them at once
    try:
        while waiting or running:
            for slot in range(args.jobs):
                if slot not in running and waiting:
                    running[slot] = (waiting.pop(0), list(stages), None)
            for slot, (trial, left, process) in list(running.items()):
                if process is not None and process.poll() is None:
                    is_over = not args.whole and has_gone_far_enough(trial.folder / left[0])
                    if is_over and process.pid not in stopping:
                        stopping.add(process.pid)
                        process.send_signal(signal.SIGTERM)
                    continue
                if process is not None:
                    rows += stage_rows(trial, left.pop(0), process.returncode, args.whole)
                if left and (process is None or (trial.folder / "pretrain" / "model").exists()):
                    running[slot] = (trial, left, start(trial, left[0], slot, args.whole))
                else:
                    del running[slot]
            time.sleep(0.5)
    finally:
        for *_, process in running.values():
            if process is not None and process.poll() is None:
                process.terminate()
    return rows


def make_trial(arm: str, model: str, data: Path, seed: int, args: argparse.Namespace) -> Trial:
    """The run of an arm with a detector, a data set and a seed. Raises InputError if the arm has no name."""
    name, colon, flags = arm.partition(":")
    if not colon or not name.strip():
        raise InputError(f'--arm "{arm}": give it a name and a colon, such as "rate: --lr 0.02"')
    added = dict(zip(("pretrain", "finetune"), [*f"{flags} ".split(" / "), ""], strict=False))
    common = ("--data", str(data), "--seed", str(seed), "--num-workers", "0", "--log-every", "5")
    flags_of = {"pretrain": [*common, "--model", model], "finetune": [*common]}
    if args.size == "small":
        flags_of["pretrain"] += ["--backbone", SMALL_BACKBONES.get(model, "resnet18"), *SMALL_CHANNELS]
        for stage, images in SMALL_IMAGES.items():
            flags_of[stage] += [*SMALL_COUNTS, *images]
    flags_of["pretrain"] += ["--cache", "raw"]
    by_stage = {stage: (*flags_of[stage], *added[stage].split()) for stage in flags_of}
    label = f"{name.strip()} {model} {data.name} seed {seed}"
    return Trial(label, args.output_dir / label.replace(" ", "-"), by_stage)


def start(trial: Trial, stage: str, slot: int, whole: bool) -> subprocess.Popen[bytes]:
    """The process of a stage's script, on one core. A stage that is done gets a process that ends at once."""
    folder = trial.folder / stage
    folder.mkdir(parents=True, exist_ok=True)
    init = ("--init", str(trial.folder / "pretrain")) if stage == "finetune" else ()
    command = [sys.executable, str(SCRIPTS / f"{stage}.py"), *trial.flags[stage], *init]
    if is_done(folder) or (not whole and has_gone_far_enough(folder)):
        command = [sys.executable, "-c", ""]
    else:
        command += ["--output-dir", str(folder), "--resume"]
    cores = sorted(os.sched_getaffinity(0))
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
        )
    os.sched_setaffinity(process.pid, {cores[slot % len(cores)]})
    return process


def records(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl."""
    return read_records(folder / "metrics.jsonl")[0]


def plan_of(folder: Path) -> dict[str, Any]:
    """A run's plan; empty until it has one."""
    path = folder / "config.json"
    return asdict(read_plan(path)) if path.exists() else {}


def has_gone_far_enough(folder: Path) -> bool:
    """Whether a run is STEPS_AFTER_WARMUP steps past its warm-up."""
    found, plan = records(folder), plan_of(folder)
    return bool(found and plan) and found[-1]["step"] >= plan["warmup_steps"] + STEPS_AFTER_WARMUP


def is_done(folder: Path) -> bool:
    """Whether a run has reached its end and saved its model."""
    found, plan = records(folder), plan_of(folder)
    return bool(found and plan) and found[-1]["step"] == plan["total_steps"] and (folder / "model").exists()


def stage_rows(trial: Trial, stage: str, status: int, whole: bool) -> list[Row]:
    """The rows of a stage that has ended. Raises InputError if its flags or its data were refused."""
    folder = trial.folder / stage
    text = (folder / "output.txt").read_text(errors="replace")
    last = next((line for line in reversed(text.replace("\r", "\n").splitlines()) if line.strip()), "")
    if last.startswith("error: "):
        raise InputError(f"{trial.name}, {stage}: {last.removeprefix('error: ')}")
    found = records(folder)
    steps = [record for record in found if record.get("loss") is not None]
    norms = [record["gradient_norm"] for record in steps if record["gradient_norm"] is not None]
    failed = status not in (0, STOPPED)
    end = f", {last}" if failed else f", loss {steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}" if steps else ""
    unit = f"largest gradient norm in {found[-1]['step'] if found else 0} steps{end}"
    rows = [row("trials", f"{trial.name} {stage}", max(norms, default=float("nan")), unit, target="no divergence")]
    batch = plan_of(folder).get("global_batch_size", 0)
    for record in found if whole else ():
        if "bbox" in record:
            setting = f"  after {record['step'] * batch:,} images"
            rows.append(row("trials", setting, record["bbox"]["AP"], f"AP, {record['bbox']['AP50']:.3f} AP50"))
    return rows
