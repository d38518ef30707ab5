"""The benchmark of the evaluation as a real process, on small sets."""

from pathlib import Path
from typing import Any

import small_runs as runs


def measured(output: Path, *flags: object) -> list[dict[str, Any]]:
    """The rows that benchmark.py writes."""
    process = runs.start_script("benchmark", "evaluation", *flags, "--output", output)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return runs.read_json(output)


def test_boxes_and_masks_beside_the_peer(tmp_path: Path) -> None:
    rows = {row["setting"]: row for row in measured(tmp_path / "rows.json", "--images", 20, "--masks")}
    timed = [f"20 images, boxes and masks, from {how}" for how in ("files", "arrays")]
    difference = "20 images, boxes and masks: largest difference"
    assert list(rows) == [
        *(setting + ending for setting in timed for ending in ("", ": peak")),
        difference,
        "28x28 to run lengths in 640x480",
    ]
    assert rows.pop(difference)["value"] <= 1e-12
    assert all(row["value"] > 0 and row["peer_value"] > 0 and "pycocotools" in row["peer"] for row in rows.values())


def test_boxes_without_the_peer(tmp_path: Path) -> None:
    rows = measured(tmp_path / "rows.json", "--images", 20, "--no-peer")
    assert len(rows) == 5 and all(row["peer"] is None and row["ratio"] is None for row in rows)
