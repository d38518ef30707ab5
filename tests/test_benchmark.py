"""benchmark.py as a real process, its parts on small sets."""

from pathlib import Path
from typing import Any

import pytest
import small_runs as runs
import torch


def measured(output: Path, part: str, *flags: object) -> list[dict[str, Any]]:
    """The rows that benchmark.py writes."""
    process = runs.start_script("benchmark", part, *flags, "--output", output)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return runs.read_json(output)


def test_boxes_and_masks_beside_the_peer(tmp_path: Path) -> None:
    rows = {row["setting"]: row for row in measured(tmp_path / "rows.json", "evaluation", "--images", 20, "--masks")}
    timed = [f"20 images, boxes and masks, from {how}" for how in ("files", "arrays")]
    difference = "20 images, boxes and masks: largest difference"
    report = [f"20 images, boxes and masks: {what}" for what in ("report", "report.html", "report, peak")]
    assert list(rows) == [
        *(setting + ending for setting in timed for ending in ("", ": peak")),
        *report,
        difference,
        "28x28 to run lengths in 640x480",
    ]
    assert rows.pop(difference)["value"] <= 1e-12
    assert all(rows.pop(setting)["value"] > 0 for setting in report)
    assert all(row["value"] > 0 and row["peer_value"] > 0 and "pycocotools" in row["peer"] for row in rows.values())


def test_boxes_without_the_peer(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.json", "evaluation", "--images", 20, "--no-peer")
    assert len(rows) == 8 and all(row["peer"] is None and row["ratio"] is None for row in rows)


def test_input_beside_its_peers(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.json", "input", "--images", 8, "--repeats", 1)
    assert len(rows) == 16 and all(row["value"] > 0 and row["unit"] in ("images/s", "GB") for row in rows)
    assert {row["peer"] for row in rows} == {"MMDetection's steps", "torchvision", "from the files", "without", None}
    for row in rows:
        assert row["ratio"] is None or row["ratio"] == row["value"] / row["peer_value"]
        assert row["part"] == "input" and row["device"] and {"torch", "pillow"} <= set(row["versions"])


def test_steps_in_two_processes_and_the_parts_of_scaling(tmp_path: Path) -> None:
    small = {
        "images": 1, "side": 64, "repeats": 1, "rounds": 1, "order": 1000, "table": 20, "evaluated": 3, "roll-call": 5,
        "model": "retinanet_r50_fpn", "folder": tmp_path,
    }  # fmt: skip
    flags = [part for name, value in small.items() for part in (f"--{name}", value)]
    rows = measured(tmp_path / "rows.json", "scaling", *flags)
    by_setting = {row["setting"].strip(): row for row in rows}
    assert len(by_setting) == len(rows) and all(row["part"] == "scaling" and row["unit"] for row in rows)
    assert [row["peer"] for row in rows[:5]] == ["one process"] * 4 + [None]
    shares = [row for row in rows if row["unit"].startswith("% of a step")]  # differences: of a step this small, noise
    assert len(shares) == 2 and all(row["value"] < 100 for row in shares)
    assert all(row["value"] > 0 for row in rows if row not in shares)
    for name in ("model/ on disk", "training state on disk"):  # tensors, and some kilobytes of names
        assert by_setting[name]["peer"] == "by formula" and 1 < by_setting[name]["ratio"] < 1.01
    parameters = by_setting["retinanet_r50_fpn: parameters"]["value"]
    assert by_setting["pretrain: gradients"]["value"] == 4 * parameters / 1e6
    assert by_setting["sampler, 1,000 images: kept"]["value"] == 8 * 1000 / 1e6


def test_trials_of_two_arms(demo: Path, tmp_path: Path) -> None:
    """One trains both stages, the other diverges in the first; finished runs are not repeated."""
    tiny = " ".join((*runs.TINY, *runs.EIGHT, *runs.NO_EVALUATION))
    second = "--max-steps 3 --short-side 64 --long-side 64 --eval-every 9"
    arms = (f"sound: {tiny} --max-steps 4 / {second}", f"far: {tiny} --lr 1e29")
    flags = [part for arm in arms for part in ("--arm", arm)]
    flags += ["--data", demo, "--model", runs.MODEL, "--whole", "--jobs", 2, "--output-dir", tmp_path / "trials"]
    rows = measured(tmp_path / "rows.json", "trials", *flags)
    by_setting = {row["setting"]: row for row in rows}
    ends = [f"{arm} {runs.MODEL} {demo.name} seed 0" for arm in ("sound", "far")]
    assert set(by_setting) == {
        f"{ends[0]} pretrain", "  after 32 images", f"{ends[0]} finetune", "  after 48 images", f"{ends[1]} pretrain",
    }  # fmt: skip
    assert "stopped: the run has diverged" in by_setting[f"{ends[1]} pretrain"]["unit"]
    assert by_setting[f"{ends[0]} finetune"]["unit"].startswith("largest gradient norm in 3 steps, loss")
    folder = tmp_path / "trials" / ends[0].replace(" ", "-")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/model/*")}
    assert len(before) == 4
    again = measured(tmp_path / "again.json", "trials", *flags, "--arm", arms[0])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all(row["value"] == by_setting[row["setting"]]["value"] for row in again if "sound" in row["setting"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_part_for_a_gpu_says_that_there_is_none() -> None:
    process = runs.start_script("benchmark", "gpu")
    _, errors = process.communicate()
    assert process.returncode == 2 and "there is none here" in errors


def test_prediction_beside_its_peers(tmp_path: Path) -> None:
    flags = ("--backbone", "resnet18", "--side", 64, "--repeats", 1)
    rows = measured(tmp_path / "rows.json", "predict", *flags)
    assert [row["peer"] for row in rows] == 2 * ["torchvision", "torchvision", "fp32", "PyTorch", "the detector alone"]
    assert all(row["value"] > 0 and row["peer_value"] > 0 and row["unit"] == "images/s" for row in rows)


def test_a_script_that_refuses_its_flags(tmp_path: Path) -> None:
    """Its own line, and one that says which script it was."""
    process = runs.start_script("benchmark", "export", "--data", tmp_path / "none", "--output-dir", tmp_path / "out")
    _, err = process.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "Traceback" not in err and len(lines) == 2
    assert str(tmp_path / "none") in lines[0] and lines[1] == "error: pretrain.py ended with status 2; why stands above"
