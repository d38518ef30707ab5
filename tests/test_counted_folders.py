"""Folders that programs choose where none is named."""

from pathlib import Path

import pytest
import small_runs as runs

from direct_pt.files import counted_folder


def test_numbers(tmp_path: Path) -> None:
    """One more than the largest, whatever else lies there; the latest is the one that exists."""
    first = tmp_path / "runs/pretrain"
    assert counted_folder(first) == counted_folder(first, latest=True) == first
    for name in ("pretrained", "pretrain-", "pretrain-two", "pretrain-99999999999999999999"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert counted_folder(first) == counted_folder(first, latest=True) == first
    first.mkdir()
    assert counted_folder(first) == tmp_path / "runs/pretrain-2" and counted_folder(first, latest=True) == first
    (tmp_path / "runs/pretrain-9").mkdir()
    assert counted_folder(first).name == "pretrain-10" and counted_folder(first, latest=True).name == "pretrain-9"


def test_programs(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A second run gets a folder of its own, --resume goes on with the latest, and both are printed."""
    monkeypatch.chdir(tmp_path)
    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, "--max-steps", 1)
    for number in ("", "-2"):
        runs.train("pretrain", *flags)
        assert f"done: runs/pretrain{number}/model" in capfd.readouterr().out
    runs.train("pretrain", *flags, "--resume")
    assert "the run has ended" in capfd.readouterr().out
    assert sorted(path.name for path in Path("runs").iterdir()) == ["pretrain", "pretrain-2"]
    photo = min((demo / "images").iterdir())
    for number in ("", "-2"):
        runs.call_script("predict", photo, "--checkpoint", "runs/pretrain-2", *runs.MACHINE)
        assert f"detections: runs/predict{number}\n" in capfd.readouterr().out
