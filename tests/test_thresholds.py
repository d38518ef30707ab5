"""A model's thresholds: measured in training, saved with the weights, used by predict.py and from Python."""

import json
from pathlib import Path

import pytest
import small_runs as runs
import torch
from PIL import Image

from direct_pt.batch import Detections
from direct_pt.checkpoint import from_pretrained, save_model
from direct_pt.errors import InputError
from direct_pt.models.api import SCORE_THRESHOLD


def with_thresholds(run: Path, folder: Path, thresholds: object) -> Path:
    """A copy of a run's model whose last evaluation found these thresholds."""
    save_model(folder, from_pretrained(run), [{"stage": "pretrain", "steps": 4, "AP": 0.5, "thresholds": thresholds}])
    return folder


def test_above(pretrained: Path, tmp_path: Path) -> None:
    """A number, the model's own, or its own of each class; a class without one has the model's."""
    names = from_pretrained(pretrained).config.class_names
    per_class = {names[0]: 0.7, names[1]: None}
    detector = from_pretrained(with_thresholds(pretrained, tmp_path, {"all": 0.5, "per_class": per_class}))
    assert detector.class_thresholds == (0.7, 0.5, *[0.5] * (len(names) - 2))
    scores, labels = torch.tensor([0.4, 0.5, 0.6, 0.8, 0.6]), torch.tensor([0, 1, 0, 0, 1])
    found = Detections(torch.zeros(5, dtype=torch.int64), torch.zeros(5, 4), scores, labels)
    for threshold, kept in ((0.45, [1, 2, 3, 4]), ("model", [2, 3, 4]), ("per-class", [3, 4]), (0.0, range(5))):
        assert detector.above(found, threshold).scores.tolist() == scores[list(kept)].tolist(), threshold
    # Scores are float32: a threshold between two of them is not rounded to one.
    close = torch.tensor([0.5, 0.5 + 2**-24])
    pair = Detections(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4), close, torch.zeros(2, dtype=torch.int64))
    assert len(detector.above(pair, 0.5 + 2**-26).scores) == 1
    with pytest.raises(ValueError, match="score_threshold"):
        detector.above(found, "best")


def test_without_one(pretrained: Path, tmp_path: Path) -> None:
    """Where nothing was measured."""
    detector = from_pretrained(runs.make_eager(pretrained, tmp_path))
    assert detector.score_threshold == SCORE_THRESHOLD and set(detector.class_thresholds) == {SCORE_THRESHOLD}


@pytest.fixture(scope="module")
def measured(pretrained: Path, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that has found objects, and its data: those are what its detector finds."""
    folder = tmp_path_factory.mktemp("thresholds")
    eager = runs.make_eager(pretrained, folder / "eager")
    test = ("--short-side", runs.SIZE, "--long-side", 128, *runs.MACHINE)
    flags = ("--checkpoint", eager, "--data", demo, *test, "--output-dir", folder / "found")
    runs.call_script("evaluate", *flags)
    data = runs.make_truth(demo, folder / "found/predictions.json", folder / "data")
    content = runs.read_json(demo / "annotations/instances_train.json")
    (data / "annotations/instances_train.json").write_text(json.dumps(content))
    flags = (*runs.FINETUNE, *runs.EIGHT, "--lr", "1e-9", "--max-steps", 2, "--eval-every", "0.1")
    runs.train("finetune", "--data", data, "--init", eager, *flags, "--output-dir", folder / "run")
    return folder / "run", data


def test_training_saves_them(measured: tuple[Path, Path], tmp_path: Path) -> None:
    """With best/ and model/; evaluate.py finds the same, and they give what it promises."""
    run, data = measured
    flags = ("--checkpoint", run, "--data", data, *runs.MACHINE, "--output-dir", tmp_path)
    for kind, folder in (("best", run / "best"), ("last", run / "model")):
        history = runs.read_json(folder / "config.json")["history"]
        saved = history[-1]["thresholds"]
        runs.call_script("evaluate", *flags, "--weights", kind)
        report = runs.read_json(tmp_path / "report.json")
        assert saved["all"] == report["thresholds"]["all"]["threshold"]
        expected = {name: at and at["threshold"] for name, at in report["thresholds"]["per_class"].items()}
        assert saved["per_class"] == expected and any(expected.values())
        shown = [row for row in runs.read_json(tmp_path / "predictions.json") if row["score"] > saved["all"]]
        counts = report["thresholds"]["all"]
        assert len(shown) == counts["true_positives"] + counts["false_positives"] > 0
        assert from_pretrained(run, weights=kind).score_threshold == saved["all"]


def test_predict(measured: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The model's own by default, by the program and from Python alike."""
    run, data = measured
    photo = sorted((data / "images").glob("val_*"))[0]
    detector = from_pretrained(run)
    counts = {}
    middle = sorted(detector.predict(photo, score_threshold=0.0)[0]["scores"].tolist())[40]
    for value in ("model", "per-class", middle):
        flags = () if value == "model" else ("--score-threshold", value)
        runs.call_script("predict", photo, "--checkpoint", run, *runs.MACHINE, "--output-dir", tmp_path, *flags)
        said = capfd.readouterr().out
        rows = runs.read_json(tmp_path / "predictions.json")
        (found,) = detector.predict(Image.open(photo), score_threshold=value)
        assert len(rows) == len(found["scores"])
        counts[value] = len(rows)
        assert f"score threshold: {detector.score_threshold:g}, the model's own" in said or value != "model"
    assert len(detector.predict(photo)[0]["scores"]) == counts["model"] != counts[middle]


@pytest.mark.parametrize("value", ["best", "1", "-0.1", "nan", ""])
def test_no_threshold(pretrained: Path, tmp_path: Path, value: str) -> None:
    flags = ("--checkpoint", pretrained, "--output-dir", tmp_path, f"--score-threshold={value}")
    with pytest.raises(InputError, match="--score-threshold"):
        runs.call_script("predict", tmp_path, *flags)


@pytest.mark.parametrize(
    ("thresholds", "field"),
    [({"all": 2, "per_class": {}}, "thresholds.all"), ({"all": 0.5}, "per_class"), ([], "thresholds"),
     ({"all": 0.5, "per_class": {"a": "b"}}, "thresholds.per_class.a")],
)  # fmt: skip
def test_wrong_ones_in_a_model(pretrained: Path, tmp_path: Path, thresholds: object, field: str) -> None:
    folder = with_thresholds(pretrained, tmp_path, thresholds)
    with pytest.raises(InputError, match=field):
        from_pretrained(folder)
