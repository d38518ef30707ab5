"""Whether a recipe trains, and how far: both stages, by the scripts themselves, on data sets of yours.

By default each run is stopped 150 steps after its warm-up, and the largest gradient norm and the loss are told; one
that diverges says so. With --whole it goes to its end, and the AP of each evaluation is told by the images seen.

An arm is a name and flags that are added to pretrain.py's, and after a slash between spaces to finetune.py's:

  --arm "default:"  --arm "64: --global-batch-size 64 --warmup-steps 500 / --global-batch-size 16"

Unless --size paper is given, the detector is a small one: ResNet-18 (for the Swin detector ConvNeXt-Atto), 64 channels,
64 RoIs of 256 proposals, 160 pixels in stage 1 and 256 in stage 2. Runs lie in --output-dir, what each prints in
its output.txt; those that are done there are not done again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, row
from direct_pt.errors import InputError
from direct_pt.flags import positive_integer
from direct_pt.models.detector import MODELS

STEPS_AFTER_WARMUP = 150
STOPPED = 143  # exit status after SIGTERM
SMALL_DETECTOR = ("--channels", "64", "--rois-per-image", "64", "--proposals", "256")
SMALL_IMAGES = {"pretrain": ("--image-size", "160"), "finetune": ("--short-side", "256", "--long-side", "256")}
SMALL_BACKBONES = {"mask_rcnn_swin_t_fpn": "convnext_atto"}  # normalises with LayerNorm too
SCRIPTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Trial:
    """One run of both stages.

    Attributes:
        name: of its arm, detector, data set and seed.
        folder: where its stages lie.
        flags: of each stage, by its name, without --output-dir and --init.
    """

    name: str
    folder: Path
    flags: dict[str, tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and how many at once."""
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR", help="one data set each")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the runs' folders")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME", help="(all)")
    parser.add_argument(
        "--arm", action="append", metavar="NAME:FLAGS", help="see above; several are compared (default:)"
    )
    parser.add_argument("--seeds", type=positive_integer, default=1, metavar="N", help="runs of each kind (1)")
    parser.add_argument("--stages", choices=["pretrain", "both"], default="both", help="(both)")
    parser.add_argument("--whole", action="store_true", help="to the end")
    parser.add_argument("--size", choices=["small", "paper"], default="small", help="of detector and images (small)")
    parser.add_argument("--jobs", type=positive_integer, default=1, metavar="N", help="runs at once (1)")


def measure(args: argparse.Namespace) -> list[Row]:
    """All runs. Raises InputError where an arm has no name or a run's flags are refused."""
    stages = ["pretrain", "finetune"] if args.stages == "both" else ["pretrain"]
    trials = [
        trial(arm, model, data, seed, args)
        for arm in args.arm or ["default:"]
        for data in args.data
        for model in args.model
        for seed in range(args.seeds)
    ]
    rows: list[Row] = []
    waiting, running = list(trials), dict[int, tuple[Trial, list[str], subprocess.Popen[bytes] | None]]()
    stopping: set[int] = set()  # process ids; a second signal would end them at once
    try:
        while waiting or running:
            for slot in range(args.jobs):
                if slot not in running and waiting:
                    running[slot] = (waiting.pop(0), list(stages), None)
            for slot, (one, left, process) in list(running.items()):
                if process is not None and process.poll() is None:
                    if not args.whole and process.pid not in stopping and has_gone_far_enough(one.folder / left[0]):
                        stopping.add(process.pid)
                        process.send_signal(signal.SIGTERM)
                    continue
                if process is not None:
                    rows += told(one, left.pop(0), process.returncode, args.whole)
                if left and (process is None or (one.folder / "pretrain" / "model").exists()):
                    running[slot] = (one, left, start(one, left[0], slot, args.whole))
                else:
                    del running[slot]
            time.sleep(0.5)
    finally:
        for *_, process in running.values():
            if process is not None and process.poll() is None:
                process.terminate()
    return rows


def trial(arm: str, model: str, data: Path, seed: int, args: argparse.Namespace) -> Trial:
    """Raises InputError where the arm has no name."""
    name, colon, flags = arm.partition(":")
    if not colon or not name.strip():
        raise InputError(f'--arm "{arm}": give it a name and a colon, such as "rate: --lr 0.02"')
    added = dict(zip(("pretrain", "finetune"), [*f"{flags} ".split(" / "), ""], strict=False))
    common = ("--data", str(data), "--seed", str(seed), "--num-workers", "0", "--log-every", "5")
    detector: tuple[str, ...] = ("--model", model)
    counts: tuple[str, ...] = ()
    images = {"pretrain": (), "finetune": ()} if args.size == "paper" else SMALL_IMAGES
    if args.size == "small":
        detector += ("--backbone", SMALL_BACKBONES.get(model, "resnet18"), *SMALL_DETECTOR[:2])
        counts = SMALL_DETECTOR[2:]
    both = {
        "pretrain": (*common, *detector, *counts, *images["pretrain"], "--cache", "raw", *added["pretrain"].split()),
        "finetune": (*common, *counts, *images["finetune"], *added["finetune"].split()),
    }
    label = f"{name.strip()} {model} {data.name} seed {seed}"
    return Trial(label, args.output_dir / label.replace(" ", "-"), both)


def start(one: Trial, stage: str, slot: int, whole: bool) -> subprocess.Popen[bytes]:
    """A stage's script as a process of its own, on a core of its own where there is no GPU to share."""
    folder = one.folder / stage
    folder.mkdir(parents=True, exist_ok=True)
    init = ("--init", str(one.folder / "pretrain")) if stage == "finetune" else ()
    command = [sys.executable, str(SCRIPTS / f"{stage}.py"), *one.flags[stage], *init]
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
    """The lines of a run's metrics.jsonl that are whole."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plan_of(folder: Path) -> dict[str, Any]:
    """A run's plan; empty before it has one."""
    path = folder / "config.json"
    return json.loads(path.read_text())["plan"] if path.exists() else {}


def has_gone_far_enough(folder: Path) -> bool:
    """Whether a run has passed its warm-up by the steps that count."""
    found, plan = records(folder), plan_of(folder)
    return bool(found and plan) and found[-1]["step"] >= plan["warmup_steps"] + STEPS_AFTER_WARMUP


def is_done(folder: Path) -> bool:
    """Whether a run has come to its end, of either kind: nothing is left to do."""
    found, plan = records(folder), plan_of(folder)
    return bool(found and plan) and found[-1]["step"] == plan["total_steps"] and (folder / "model").exists()


def told(one: Trial, stage: str, status: int, whole: bool) -> list[Row]:
    """The rows of a stage that has ended. Raises InputError where its flags or its data were refused."""
    folder = one.folder / stage
    text = (folder / "output.txt").read_text(errors="replace")
    last = next((line for line in reversed(text.replace("\r", "\n").splitlines()) if line.strip()), "")
    if last.startswith("error: "):
        raise InputError(f"{one.name}, {stage}: {last.removeprefix('error: ')}")
    found = records(folder)
    steps = [record for record in found if record.get("loss") is not None]
    norms = [record["gradient_norm"] for record in steps if record["gradient_norm"] is not None]
    failed = status not in (0, STOPPED)
    end = f", {last}" if failed else f", loss {steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}" if steps else ""
    unit = f"largest gradient norm in {found[-1]['step'] if found else 0} steps{end}"
    rows = [row("trials", f"{one.name} {stage}", max(norms, default=float("nan")), unit, target="no divergence")]
    batch = plan_of(folder).get("global_batch_size", 0)
    for record in found if whole else ():
        if "bbox" in record:
            setting = f"  after {record['step'] * batch:,} images"
            rows.append(row("trials", setting, record["bbox"]["AP"], f"AP, {record['bbox']['AP50']:.3f} AP50"))
    return rows
