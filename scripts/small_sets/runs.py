"""Runs of the two training scripts as processes, one folder a stage, their cost, and their rows in the results."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from direct_pt.errors import InputError
from direct_pt.files import DamagedFile, read_json, read_regular, write_json
from direct_pt.schema import WrongValue, number
from direct_pt.training.saved_values import read_plan, read_records
from small_sets.costs import Costs
from small_sets.folds import fold_flags
from small_sets.plan import CHECKPOINT, PEERS, SECONDS, STEPS, Plan, RunId

SCRIPTS = Path(__file__).parents[1]
FIGURES = ("AP", "AP50", "AP75", "AR100")
POLL_SECONDS = 0.5
PEER_RESULT = "peer.json"


@dataclass
class Row:
    """The result of a run, as the CSV holds it.

    Attributes:
        experiment, set, fold, seed, arm: see RunId.
        images: seen in each stage, between slashes.
        seconds: of a processor, in all stages, evaluation included; of a stage 1 that goes on, its share.
        AP, AP50, AP75, AR100: of the last weights, on the fold's validation images.
        stage1_AP: of the weights that the second stage starts from; empty where there is one stage.
        per_class: {name: AP}, as JSON.
        commit, versions, device: what ran where.
    """

    experiment: str
    set: str
    fold: int
    seed: int
    arm: str
    images: str
    seconds: float
    AP: float
    AP50: float
    AP75: float
    AR100: float
    stage1_AP: str
    per_class: str
    commit: str
    versions: str
    device: str

    @property
    def run(self) -> RunId:
        """Its key."""
        return RunId(self.experiment, self.set, self.fold, self.seed, self.arm)


def read_results(path: Path) -> list[Row]:
    """The rows of a CSV; none where there is no such file. Raises InputError."""
    if not path.exists():
        return []
    types = {one.name: one.type for one in dataclasses.fields(Row)}
    try:
        lines = csv.DictReader(io.StringIO(read_regular(path).decode(), newline=""))
        return [Row(**{name: types[name](text) for name, text in line.items()}) for line in lines]  # type: ignore[operator]
    except (KeyError, OSError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as results ({error!r})") from error


def append_result(path: Path, row: Row) -> None:
    """Add a row to a CSV."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in dataclasses.fields(Row)], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(row))


@dataclass
class Place:
    """Where data are, and runs are written.

    Attributes:
        data_root: the folder of the sets.
        folder: of runs and folds.
        costs: of a step, for arms that are to cost what others do.
    """

    data_root: Path
    folder: Path
    costs: Costs


@dataclass
class Job:
    """A run under way, one stage after another.

    Attributes:
        run: what it is.
        core: that its processes are pinned to.
        stages: (name, folder, arguments) of those that are not done, the next one first.
        process: of the first of these.
        started: seconds on the clock.
    """

    run: RunId
    core: int
    stages: list[tuple[str, Path, list[str]]]
    process: "subprocess.Popen[bytes] | None" = None
    started: float = field(default_factory=time.monotonic)

    def step(self) -> str:
        """Start the next stage when the one before has ended. Returns "" while it runs, "done", or why it failed."""
        if self.process is not None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if not pid:
                return ""
            self.process.returncode = os.waitstatus_to_exitcode(status)
            stage, folder, _ = self.stages[0]
            add_seconds(folder, usage.ru_utime + usage.ru_stime)
            if self.process.returncode:
                return f"{stage} ended with status {self.process.returncode}: {last_line(folder)}"
            self.stages.pop(0)
            self.process = None
        if not self.stages:
            return "done"
        _, folder, arguments = self.stages[0]
        self.process = start_stage(arguments, folder, self.core)
        return ""


def stages_of(plan: Plan, run: RunId, place: Place) -> list[tuple[str, Path, list[str]]]:
    """(name, folder, arguments) of each stage of a run. A stage with the same flags and data is shared by its arms."""
    arm = plan.arm(run)
    data = fold_flags(plan.sets[run.set], place.data_root, run.fold, place.folder / "folds")
    around = place.folder / run.set / f"fold-{run.fold}" / f"seed-{run.seed}"
    stages: list[tuple[str, Path, list[str]]] = []
    for name, flags in resolved_stages(plan, run, place.costs).items():
        if stages and "--init" not in flags:
            flags = (*flags, "--init", str(stages[-1][1]))
        elif stages:
            flags = tuple(CHECKPOINT.sub(rf"{stages[-1][1]}/checkpoints/step-\1", part) for part in flags)
        digest = hashlib.blake2b("\0".join(flags).encode(), digest_size=5).hexdigest()
        folder = around / f"{arm.name}-{name}-{digest}" if name == "finetune" else around / f"{name}-{digest}"
        script = SCRIPTS / ("small_sets/peers.py" if name == PEERS else f"{name}.py")
        command = [str(script), *data, *flags, "--seed", str(run.seed), "--output-dir", str(folder)]
        stages.append((name, folder, command))
    return stages


def resolved_stages(plan: Plan, run: RunId, costs: Costs) -> dict[str, tuple[str, ...]]:
    """The flags of each stage, with numbers in place of {steps} and {seconds}."""
    arm = plan.arm(run)
    if not arm.equal_cost:
        return arm.stages
    other = plan.arm_named(run.experiment, arm.equal_cost)
    if PEERS in arm.stages:
        place, length = SECONDS, f"{costs.of_arm(run.set, other):.0f}"
    else:
        place, length = STEPS, str(costs.equal_steps(run.set, other, arm))
    return {name: tuple(part.replace(place, length) for part in flags) for name, flags in arm.stages.items()}


def start_stage(arguments: list[str], folder: Path, core: int) -> "subprocess.Popen[bytes]":
    """Start a stage, or go on with it, on one core; its output goes to output.txt in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--resume"], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, {core})
    return process


def is_done(folder: Path) -> bool:
    """Whether a stage has ended well."""
    if (folder / PEER_RESULT).exists():
        return True
    config = folder / "config.json"
    if not config.exists() or not (folder / "model").exists():
        return False
    found = evaluations(folder)
    return bool(found) and found[-1]["step"] == read_plan(config).total_steps


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's metrics.jsonl, in order."""
    return [record for record in read_records(folder / "metrics.jsonl")[0] if "bbox" in record]


def add_seconds(folder: Path, seconds: float) -> None:
    """Add to the processor time that a stage has taken, over all its attempts."""
    write_json(folder / "processor_seconds.json", seconds + stage_seconds(folder))


def stage_seconds(folder: Path) -> float:
    """The processor time that a stage has taken."""
    path = folder / "processor_seconds.json"
    if not path.exists():
        return 0.0
    try:
        seconds = read_json(path)
        number(0)(seconds, "its content")
    except (DamagedFile, WrongValue) as error:
        raise InputError(f"{path}: cannot be read as seconds ({error}); remove the run, to measure it anew") from error
    return float(seconds)


def last_line(folder: Path) -> str:
    """The last line of a stage's output."""
    lines = (folder / "output.txt").read_text(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def result_of(plan: Plan, run: RunId, place: Place, commit: str) -> Row:
    """The row of a run that is done."""
    folders = [folder for _, folder, _ in stages_of(plan, run, place)]
    if (folders[0] / PEER_RESULT).exists():
        result = read_json(folders[0] / PEER_RESULT)
        return row_of(run, str(result["images"]), stage_seconds(folders[0]), result, "", commit)
    images, seconds, stage1_ap = [], 0.0, ""
    for folder in folders:
        training = read_plan(folder / "config.json")
        steps = training.total_steps
        if folder != folders[-1]:
            steps = plan.arm(run).first_steps or steps
            reached = [record for record in evaluations(folder) if record["step"] == steps]
            stage1_ap = f"{reached[-1]['bbox']['AP']:.4f}" if reached else ""
        images.append(steps * training.global_batch_size)
        seconds += stage_seconds(folder) * steps / training.total_steps
    return row_of(run, " / ".join(map(str, images)), seconds, evaluations(folders[-1])[-1], stage1_ap, commit)


def row_of(run: RunId, images: str, seconds: float, metrics: dict[str, Any], stage1_ap: str, commit: str) -> Row:
    """A row with an evaluation's metrics."""
    per_class = {name: round(figures["bbox"]["AP"], 4) for name, figures in metrics["per_class"].items()}
    return Row(
        **dataclasses.asdict(run),
        images=images,
        seconds=round(seconds, 1),
        **{name: round(metrics["bbox"][name], 4) for name in FIGURES},
        stage1_AP=stage1_ap,
        per_class=json.dumps(per_class),
        commit=commit,
        versions=f"Python {platform.python_version()}, torch {torch.__version__}",
        device=processor_name(),
    )


def processor_name() -> str:
    """Of this machine."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def clean_commit(root: Path, *own: Path) -> str:
    """The commit of the code that runs. Raises InputError where files but `own` are not as committed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"{root}: is no git checkout, so that results could not name their code ({error})"
            ) from error

    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=all").splitlines()]
    changed = [name for name in changed if (root / name).resolve() not in {path.resolve() for path in own}]
    if changed:
        raise InputError(f"{root}: {changed[0]} is not committed: commit first, so that the results name their code")
    return git("rev-parse", "--short", "HEAD").strip()
