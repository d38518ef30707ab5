"""An experiment for real: calibrated, killed, gone on with, and not repeated."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_runs as runs

from direct_pt.checkpoint import read_history
from small_sets.costs import Costs
from small_sets.runs import Row, read_results

pytestmark = runs.cpu_only

FILE = f"""
[flags]
pretrain = "{" ".join(runs.TINY)} --global-batch-size 8 --micro-batch-size 8 --save-every 10 --eval-every 1000"
finetune = "{" ".join(runs.FINETUNE)} --global-batch-size 8 --micro-batch-size 8 --save-every 10 --eval-every 1000"
[sets.demo]
folds = 3
[[experiments]]
name = "pays"
sets = ["demo"]
[experiments.arms.direct]
pretrain = "--max-steps 40"
finetune = "--max-steps 10"
[experiments.arms.scratch]
equal_cost = "direct"
finetune = "--init none {" ".join(runs.DETECTOR)} --backbone test_resnet --channels 16 --max-steps {{steps}}"
[[experiments]]
name = "length"
sets = ["demo"]
[experiments.arms.early]
pretrain = "--max-steps 40"
finetune = "--init {{pretrain@30}} --max-steps 10"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with a git history of its own, as the working tree may have changes."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("direct_pt", "scripts"):
        shutil.copytree(runs.SCRIPTS.parent / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".gitignore").write_text("__pycache__/\n")
    (folder / "experiments.toml").write_text(FILE)
    git = ("git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    return folder


def start(checkout: Path, demo: Path, folder: Path, what: str, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(checkout / "scripts/experiments.py"), what, *flags, "--runs", str(folder)]
    command += ["--file", str(checkout / "experiments.toml"), "--data-root", str(demo.parent)]
    command += ["--cores", str(min(os.sched_getaffinity(0)))]  # this worker's, as another works on the first
    environment = {**runs.ENVIRONMENT, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(checkout: Path, demo: Path, folder: Path, what: str, *flags: str) -> str:
    process = start(checkout, demo, folder, what, *flags)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return out


def test_an_experiment_from_the_plan_to_the_report(
    checkout: Path, demo: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "demo").symlink_to(demo)
    data, folder = root / "demo", tmp_path / "runs"
    assert "pays: 2 runs, 0 done" in finish(checkout, data, folder, "plan")
    finish(checkout, data, folder, "calibrate", "--only", "pays", "--calibration-steps", "2", "20")
    costs = Costs.read(checkout / "experiments.costs.json")
    assert len(costs.stages) == 3 and all(per_step > 0 for _, per_step in costs.stages.values())

    process = start(checkout, data, folder, "run")  # stopped once its first stage is on the way
    deadline = time.monotonic() + 300
    while not list(folder.glob("demo/fold-0/seed-0/pretrain-*/checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and err.strip().endswith("SIGTERM: start again to go on")
    (stage,) = folder.glob("demo/fold-0/seed-0/pretrain-*")
    before = float((stage / "processor_seconds.json").read_text())
    assert before > 0 and read_results(checkout / "experiments.csv") == []

    out = finish(checkout, data, folder, "run")
    assert "pays, demo fold 0, seed 0, direct: AP" in out
    rows = read_results(checkout / "experiments.csv")
    assert [row.arm for row in rows] == ["direct", "scratch", "early"]
    direct, scratch, early = rows
    (second,) = folder.glob("demo/fold-0/seed-0/early-finetune-*")
    seconds = [float((path / "processor_seconds.json").read_text()) for path in (stage, second)]
    assert early.images == "240 / 80" and early.seconds == pytest.approx(0.75 * seconds[0] + seconds[1], abs=0.06)
    assert [past["steps"] for past in read_history(second)] == [30, 10]
    assert direct.images == "320 / 80" and direct.stage1_AP and not scratch.stage1_AP
    assert direct.seconds > before  # the time of both attempts
    assert_row(direct, checkout)
    assert "3 runs, 3 are done" in finish(checkout, data, folder, "run")
    assert read_results(checkout / "experiments.csv") == rows
    out = finish(checkout, data, folder, "report")
    assert "| AP (AP50) | direct | scratch |" in out and "direct against scratch" in out

    (checkout / "scripts/pretrain.py").open("a").write("# changed\n")
    process = start(checkout, data, folder, "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.strip().splitlines() == [
        f"error: {checkout}: scripts/pretrain.py is not committed: commit first, so that the results name their code"
    ]


def test_another_trainer(demo: Path, tmp_path: Path) -> None:
    """It takes about the time that it is given, and its result is COCO's figures."""
    annotations = {split: demo / f"annotations/instances_{split}.json" for split in ("train", "val")}
    flags: list[object] = ["torchvision", "--seconds", 22, "--image-size", 64, "--output-dir", tmp_path / "run"]
    for split, path in annotations.items():
        flags += [f"--{split}-images", demo / "images", f"--{split}-annotations", path]
    command = [sys.executable, runs.SCRIPTS / "small_sets/peers.py", *flags, "--resume"]
    end = subprocess.run(list(map(str, command)), env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    result = runs.read_json(tmp_path / "run/peer.json")
    assert result["images"] % 8 == 0 and -1 <= result["bbox"]["AP"] <= result["bbox"]["AP50"] <= 1
    command[2] = "ultralytics"
    end = subprocess.run(list(map(str, command)), env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert end.stderr == "error: --python is missing: the interpreter of an environment that has ultralytics\n"
    assert end.returncode == 2


def assert_row(row: Row, checkout: Path) -> None:
    """It names the code, and its figures are those of the run's last evaluation."""
    head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    assert row.commit == head.stdout.strip() and "torch" in row.versions and row.device
    assert -1 <= row.AP <= row.AP50 <= 1
