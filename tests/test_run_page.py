"""A run's own page: what it says before, during and after training."""

import html
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import small_runs as runs
from PIL import Image

from direct_pt.errors import TrainingStopped
from direct_pt.reports.run_page import MAX_IMAGES, MAX_SAMPLES, RunPage


def pictures(run: Path) -> set[str]:
    return {path.stem for path in (run / "run_pictures").iterdir()}


def test_after_training(pretrained: Path) -> None:
    """How far it has come, what was found, the banner; nothing is asked of anybody."""
    page = (pretrained / "run.html").read_text()
    evaluations = [record for record in runs.records(pretrained) if "bbox" in record]
    steps = [record["step"] for record in evaluations]
    assert re.search(r"<span>step</span><b>4</b><span>of 4</span>", page)
    assert re.findall(r"<th>step (\d+)</th>", page) == [str(step) for step in steps] == ["2", "4"]
    assert f"{evaluations[-1]['bbox']['AP']:.3f}" in page
    shown = range(min(runs.VAL_IMAGES, MAX_IMAGES))
    expected = {f"truth-{n}" for n in shown} | {f"step-{step}-{n}" for step in steps for n in shown}
    assert pictures(pretrained) == expected | {f"sample-{n}" for n in range(MAX_SAMPLES)}
    assert page.count("data:image/webp") == len(pictures(pretrained)) and page.count("data:image/png") == 1
    assert "Direct-PT pretrain: faster_rcnn_r50_fpn" in page
    assert html.escape(shlex.join(sys.argv)) in page
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_before_the_first_evaluation(demo: Path, tmp_path: Path) -> None:
    """There is a page already; without a validation split there never is one."""
    run = tmp_path / "run"
    runs.train("pretrain", *runs.train_part(demo), *runs.TINY, *runs.EIGHT, "--max-steps", 1, "--output-dir", run)
    page = (run / "run.html").read_text()
    assert "Nothing was evaluated yet" in page and page.count("data:image/webp") == MAX_SAMPLES


def test_resumed(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """It shows what was found before, too."""
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    shutil.rmtree(run / "checkpoints/step-4")
    for path in (run / "run_pictures").glob("step-4-*"):
        path.unlink()
    (run / "run.html").unlink()
    flags = (*runs.PRETRAIN, *runs.EIGHT, "--max-steps", 4, "--eval-every", "0.67", "--log-every", 1)
    runs.train("pretrain", "--data", demo, *flags, "--output-dir", run, "--resume")
    page = (run / "run.html").read_text()
    assert re.findall(r"<th>step (\d+)</th>", page) == ["2", "4"] and pictures(run) == pictures(pretrained)


@pytest.mark.parametrize("name", ["sample-3", "truth-2", "step-2-3"])
def test_killed_while_pictures_are_written(
    name: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes on has all of them, also where nothing else was left to do."""
    run, save = tmp_path / "run", RunPage._save

    def killed(self: RunPage, image: Image.Image, own: str) -> None:
        if own == name:  # a kill leaves what is half-written
            (self.folder / "run_pictures" / f".{own}.webp.partial").write_bytes(b"RIFF")
            raise MemoryError("killed")
        save(self, image, own)

    flags = ("--data", demo, *runs.TINY, *runs.EIGHT, "--max-steps", 2, *runs.NO_EVALUATION, "--output-dir", run)
    with monkeypatch.context() as patch:
        patch.setattr(RunPage, "_save", killed)
        with pytest.raises((MemoryError, TrainingStopped)):
            runs.train("pretrain", *flags)
    runs.train("pretrain", *flags, "--resume")
    shown = range(min(runs.VAL_IMAGES, MAX_IMAGES))
    expected = {f"{kind}-{n}" for kind in ("truth", "step-2") for n in shown}
    assert pictures(run) == expected | {f"sample-{n}" for n in range(MAX_SAMPLES)}
    assert (run / "run.html").read_text().count("data:image/webp") == len(pictures(run))


def test_class_names_are_escaped(demo: Path, tmp_path: Path) -> None:
    """They may come from a stranger."""
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    for split in ("train", "val"):
        path = data / f"annotations/instances_{split}.json"
        path.write_text(path.read_text().replace('"name": "0"', '"name": "<script>alert(1)</script>"'))
    assert "<script>alert" in path.read_text()
    run = tmp_path / "run"
    runs.train("pretrain", "--data", data, *runs.TINY, *runs.EIGHT, "--max-steps", 1, "--output-dir", run)
    page = (run / "run.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
