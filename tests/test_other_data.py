"""A run that goes on with data that lie elsewhere, or are no longer those that it was started with."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_runs as runs
from test_resume import Stopped, assert_same_run, train

from direct_pt.errors import InputError, StopSignal
from direct_pt.training.loop import Trainer

pytestmark = runs.cpu_only

STEPS = 6
FLAGS = ("--global-batch-size", 8, "--micro-batch-size", 2, "--epochs", 2, "--save-every", 2, "--eval-every", 2)


@pytest.fixture(scope="module")
def stopped(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal ended after five of six steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(StopSignal):
        train(run, demo, *FLAGS, trainer=Stopped)
    assert runs.steps_saved(run)[-1] == "step-5"
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def data(demo: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo, tmp_path / "moved")


def edit(data: Path, split: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = data / f"annotations/instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def both(data: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    for split in ("train", "val"):
        edit(data, split, change)


def resume(run: Path, data: Path, *flags: object, trainer: type[Trainer] = Trainer) -> None:
    train(run, data, *FLAGS, "--resume", *flags, trainer=trainer)


def test_the_same_data_elsewhere(
    run: Path,
    data: Path,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Moved, named from another folder, or by their files: to the bit, and nothing is said."""
    reference = tmp_path / "reference"
    train(reference, demo, *FLAGS)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    resume(run, Path(os.path.relpath(data, tmp_path)))
    assert "resumed with other data" not in capsys.readouterr().out
    assert_same_run(run, reference, STEPS)


def test_the_same_data_by_their_files(
    run: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = demo / "annotations"
    with pytest.raises(InputError, match="not both"):
        resume(run, demo, "--train-images", demo / "images")
    flags = ("--train-images", demo / "images", "--train-annotations", annotations / "instances_train.json")
    flags += ("--val-images", demo / "images", "--val-annotations", annotations / "instances_val.json")
    runs.train("pretrain", *runs.TINY, *FLAGS, *flags, "--output-dir", run, "--resume")
    assert "resumed with other data" not in capsys.readouterr().out
    assert runs.steps_saved(run)[-1] == f"step-{STEPS}"


def rename(content: dict[str, Any]) -> None:
    content["categories"][0]["name"], content["categories"][1]["name"] = "1", "0"


def add_class(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 110, "name": "ten"})


def drop_class(content: dict[str, Any]) -> None:
    number = content["categories"].pop()["id"]
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] != number]


@pytest.mark.parametrize("change", [rename, add_class, drop_class])
def test_other_classes_are_refused(run: Path, data: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Before anything is loaded or written: the old weights would mean other classes."""
    both(data, change)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    text = r"lists other classes than the run was started with: of \d+ classes \(id, name\), it (has|lacks) "
    with pytest.raises(InputError, match=text):
        resume(run, data)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_other_images_and_objects_are_said(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The schedule stays, also where its length is given in epochs, and what is said is said once."""

    def fewer(content: dict[str, Any]) -> None:
        gone = {image["id"] for image in content["images"][:8]}
        content["images"] = content["images"][8:]
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] not in gone]

    edit(data, "train", fewer)
    resume(run, data)
    out = capsys.readouterr().out
    assert "resumed with other data: train 16 images with" in out and "before 24 images with 85 objects" in out
    assert "the number of steps stays" in out and "other data: val" not in out
    assert runs.steps_saved(run)[-1] == f"step-{STEPS}"


def test_a_moved_box_is_said(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(data, "val", lambda content: content["annotations"][0]["bbox"].__setitem__(0, 1))
    resume(run, data)
    assert "resumed with other data: val 9 images with 31 objects, others than before" in capsys.readouterr().out


def test_a_moved_outline_is_said(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The box stays, but a mask detector learns something else."""

    def move(content: dict[str, Any]) -> None:
        outline = next(one["segmentation"] for one in content["annotations"] if isinstance(one["segmentation"], list))
        outline[0][0] += 0.5

    edit(data, "train", move)
    resume(run, data)
    assert "resumed with other data: train 24 images with 85 objects, others than before" in capsys.readouterr().out


def test_a_run_without_a_record(run: Path, data: Path) -> None:
    """Of an earlier version: it goes on."""
    config = json.loads((run / "config.json").read_text())
    assert config.pop("data")["train"]["images"] == 24
    (run / "config.json").write_text(json.dumps(config))
    resume(run, data)
    assert json.loads((run / "config.json").read_text())["data"]["train"]["objects"] == 85
