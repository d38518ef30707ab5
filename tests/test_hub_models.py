"""The hub's conventions: saving and sharing a detector, its model card, and what it is called from Python."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
import torch
import yaml
from hub_server import running_hub
from PIL import Image
from small_detectors import small_detector

import direct_pt
from direct_pt.checkpoint import from_pretrained, save_model
from direct_pt.errors import InputError
from direct_pt.models.detector import DetectorConfig, build_detector

TRAINED = [
    {"stage": "pretrain", "steps": 100, "images": 300, "objects": 900, "global_batch_size": 8, "lr": 0.01,
     "init": "none"},
    {"stage": "finetune", "steps": 50, "images": 300, "objects": 900, "global_batch_size": 16, "lr": 0.02,
     "init": "runs/pretrain", "AP": 0.5, "AP50": 0.75, "mask_AP": 0.45,
     "thresholds": {"all": 0.42, "per_class": {"cat|dog": 0.25, "bird": None}}},
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of a small detector with odd class names."""
    config = replace(
        DetectorConfig.from_paper("mask_rcnn_r50_fpn", ("cat|dog", "bird"), (7, 2)),
        backbone="test_resnet", channels=16, proposals=16, rois_per_image=8, short_side=64, long_side=96,
    )  # fmt: skip
    save_model(tmp_path / "model", build_detector(config.name, config=config), TRAINED)
    return tmp_path / "model"


def card_parts(text: str) -> tuple[dict, str]:
    """The metadata of a model card, and its text."""
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_names_and_version(model: Path) -> None:
    detector = from_pretrained(model)
    assert detector.id2label == {0: "cat|dog", 1: "bird"} and detector.label2id == {"cat|dog": 0, "bird": 1}
    assert detector.history == TRAINED and build_detector("retinanet_r50_fpn", 3).history == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", direct_pt.__version__)


def test_a_saved_model_is_the_same(model: Path, tmp_path: Path) -> None:
    """Weights, history and thresholds; and a card of one's own is kept."""
    detector = from_pretrained(model)
    detector.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert runs.largest_difference(detector.state_dict(), again.state_dict()) == 0
    assert again.config == detector.config and again.history == TRAINED
    assert (again.score_threshold, again.class_thresholds) == (0.42, (0.25, 0.42))
    (tmp_path / "saved/README.md").write_text("my own words")
    detector.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_text() == "my own words"


def test_the_card(model: Path, tmp_path: Path) -> None:
    detector = from_pretrained(model)
    detector.save_pretrained(tmp_path / "saved", "user/boards", license="mit")
    about, text = card_parts((tmp_path / "saved/README.md").read_text())
    assert about["library_name"] == "direct-pt" and about["license"] == "mit"
    assert about["pipeline_tag"] == "image-segmentation" and "mask_rcnn_r50_fpn" in about["tags"]
    measured = {one["name"]: one["value"] for one in about["model-index"][0]["results"][0]["metrics"]}
    assert measured == {"box AP": 0.5, "box AP50": 0.75, "mask AP": 0.45}
    for line in (
        "box AP 0.500, box AP50 0.750, mask AP 0.450",
        "above a score of 0.42, which has the highest F1",
        "| 0 | 7 | cat&#124;dog | 0.25 |",
        "| 1 | 2 | bird | 0.42 |",
        "| pretrain | 300 | 900 | 100 | 8 | 0.01 | none |",
        "| finetune | 300 | 900 | 50 | 16 | 0.02 | other weights |",
    ):
        assert line in text, line

    build = small_detector()
    build.save_pretrained(tmp_path / "random")
    about, text = card_parts((tmp_path / "random/README.md").read_text())
    assert "license" not in about and "model-index" not in about
    assert "It was not evaluated." in text and "Not stated." in text and "Unknown." in text


def test_the_cards_snippet_runs(model: Path, tmp_path: Path) -> None:
    """As it stands there, beside an image of the name that it uses."""
    from_pretrained(model).save_pretrained(tmp_path / "saved")
    _, text = card_parts((tmp_path / "saved/README.md").read_text())
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "image.jpg")
    command = [sys.executable, "-c", snippet]
    result = subprocess.run(command, cwd=tmp_path, env=runs.ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("["), result.stderr


@pytest.mark.slow
def test_to_the_hub_and_back(model: Path, tmp_path: Path) -> None:
    """By the hub's own protocol: the same weights; a card that was edited there stays; the scripts take its id."""
    push = (
        "import sys, direct_pt; print(direct_pt.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2], license='mit'))"
    )
    with running_hub() as hub:
        environment = {
            **runs.ENVIRONMENT, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip

        def call(*command: object) -> str:
            result = subprocess.run(
                [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, cwd=tmp_path
            )
            assert result.returncode == 0, result.stderr
            return result.stdout

        assert "/user/boards/" in call("-c", push, model, "user/boards")
        files = hub.files["user/boards"]
        assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
        assert 'from_pretrained("user/boards")' in files["README.md"].decode()
        assert hub.messages == ["Upload a Direct-PT detector"]

        files["README.md"], files["notes.txt"] = b"my own words", b"others"
        call("-c", push, model, "user/boards")
        assert files["README.md"] == b"my own words" and files["notes.txt"] == b"others"

        back = (
            "import direct_pt, sys; direct_pt.from_pretrained('user/boards', revision='main').save_pretrained('back')"
        )
        call("-c", back)
        saved = from_pretrained(tmp_path / "back")
        assert runs.largest_difference(saved.state_dict(), from_pretrained(model).state_dict()) == 0
        assert saved.score_threshold == 0.42

        image = tmp_path / "images/image.jpg"
        image.parent.mkdir()
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(image)
        flags = ("--checkpoint", "user/boards", image, "--output-dir", tmp_path / "pictures", "--num-workers", 0)
        assert "score threshold: 0.42, the model's own" in call(runs.SCRIPTS / "predict.py", *flags)
    shutil.rmtree(tmp_path / "home")


def test_batches(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """As many at once as asked for, the same detections in the same order; and labels as numbers."""
    detector = from_pretrained(runs.make_eager(pretrained, tmp_path / "eager"))
    paths = sorted((demo / "images").glob("val_*"))
    alone = detector.predict(paths, score_threshold=0.05)
    for size in (2, 4, 100):
        together = detector.predict(iter(paths), score_threshold=0.05, batch_size=size)
        assert len(together) == len(paths)
        for one, other in zip(alone, together, strict=True):
            assert one["labels"] == other["labels"] == [detector.id2label[label] for label in other["class_ids"]]
            np.testing.assert_allclose(one["boxes"], other["boxes"], atol=1e-2)
            np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-4)
    assert sum(len(found["labels"]) for found in alone) > 20
    for wrong in (0, -1, 2.5, "4", True, 10**30):
        with pytest.raises(ValueError, match=r"batch_size is .*: give a whole number above 0"):
            detector.predict(paths, batch_size=wrong)  # type: ignore[arg-type]


def test_a_folder_that_holds_something_else(model: Path, pretrained: Path, tmp_path: Path) -> None:
    """A run, or another library's model, is not written over; a model may be."""
    detector = from_pretrained(model)
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError, match="run: is a run's folder; choose another folder for the model"):
        detector.save_pretrained(run)
    assert (run / "config.json").read_bytes() == before and not (run / "README.md").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(InputError, match=r"holds another config\.json"):
        detector.save_pretrained(other)
    (other / "config.json").unlink()
    (other / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(InputError, match=r"holds model\.safetensors of something else"):
        detector.save_pretrained(other)
    assert (other / "model.safetensors").read_bytes() == b"theirs"
    detector.save_pretrained(model)
    assert from_pretrained(model).history == TRAINED


def test_thresholds_that_were_set_are_saved(model: Path, tmp_path: Path) -> None:
    detector = from_pretrained(model)
    detector.score_threshold, detector.class_thresholds = 0.9, (0.8, 0.7)
    detector.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert (again.score_threshold, again.class_thresholds) == (0.9, (0.8, 0.7))
    assert [stage["stage"] for stage in again.history] == ["pretrain", "finetune"]
    card = (tmp_path / "saved/README.md").read_text()
    assert "above a score of 0.9, which was chosen by hand." in card and "highest F1" not in card

    built = small_detector()
    built.score_threshold = 0.6
    built.save_pretrained(tmp_path / "built")
    assert from_pretrained(tmp_path / "built").score_threshold == 0.6


def test_wrong_values_in_python(model: Path) -> None:
    """In one sentence, at once."""
    image = np.zeros((40, 50, 3), np.uint8)
    detector = from_pretrained(model)
    for wrong in (60, -0.1, 1, "best"):
        with pytest.raises(ValueError, match=r"score_threshold is .*: give a number from 0 to below 1"):
            detector.predict(image, score_threshold=wrong)  # type: ignore[arg-type]
    for name, value in (("score_threshold", 5), ("class_thresholds", (0.5,)), ("class_thresholds", (0.5, 2))):
        detector = from_pretrained(model)
        setattr(detector, name, value)
        with pytest.raises(ValueError, match="class_thresholds one for each class, in the order of id2label"):
            detector.predict(image)
    for wrong, message in (
        ({"a": 1}, "images: is a dict; give paths"),
        (b"content", "images: is a bytes; give paths"),
        ("https://example.org/a.jpg", r"images\[0\]: https://example.org/a.jpg is an address: download"),
    ):
        with pytest.raises(InputError, match=message):
            from_pretrained(model).predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="weights is 'first': give one of best, last"):
        from_pretrained(model, weights="first")
    with pytest.raises(InputError, match=r"^mask_rcnn: no such detector; choose one of"):
        build_detector("mask_rcnn", 3)
    assert {"from_pretrained", "build_detector", "__version__"} <= set(dir(direct_pt))


def test_nothing_is_written_before_all_is_checked(model: Path, tmp_path: Path) -> None:
    """What cannot be saved leaves a good model, and its card, as they are."""
    folder = tmp_path / "saved"
    from_pretrained(model).save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, value in (
        ("score_threshold", float("nan")), ("score_threshold", "x"), ("score_threshold", None),
        ("score_threshold", True), ("score_threshold", 1.0), ("score_threshold", 10**400), ("class_thresholds", (0.5,)),
        ("class_thresholds", (float("nan"), 0.5)),
    ):  # fmt: skip
        bad = from_pretrained(model)
        setattr(bad, name, value)
        with torch.no_grad():
            for parameter in bad.parameters():
                parameter.zero_()
        with pytest.raises(ValueError, match="score_threshold must be a number from 0 to below 1"):
            bad.save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, (name, value)
    twice = from_pretrained(model)
    twice.config = replace(twice.config, class_names=("one", "one"))
    with pytest.raises(InputError, match=r"save_pretrained: config\.class_names"):
        twice.save_pretrained(folder)
    with pytest.raises(InputError, match="the folder's name is empty"):
        twice.save_pretrained("")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError, match="is a folder here, which has no revision 'v1'"):
        from_pretrained(model, revision="v1")


def test_thresholds_of_numpy_and_of_zero(model: Path, tmp_path: Path) -> None:
    detector = from_pretrained(model)
    detector.score_threshold, detector.class_thresholds = np.float32(0.5), (0.0, torch.tensor(0.25))  # type: ignore[assignment]
    detector.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert (again.score_threshold, again.class_thresholds) == (0.5, (0.0, 0.25))


def test_a_card_follows_its_model(model: Path, tmp_path: Path) -> None:
    """One that this project wrote, and nobody edited, is written anew; in its cells nothing is markup."""
    folder, detector = tmp_path / "saved", from_pretrained(model)
    detector.save_pretrained(folder)
    detector.config = replace(detector.config, class_names=("a|b", "<b>`x`"))
    detector.score_threshold = 0.77
    detector.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "| 0 | 7 | a&#124;b |" in card and "| 1 | 2 | &lt;b&gt;&#96;x&#96; |" in card and "score of 0.77" in card
    (folder / "README.md").write_text(card.replace("## Use", "## How I use it"))
    detector.score_threshold = 0.5
    detector.save_pretrained(folder)
    assert "score of 0.77" in (folder / "README.md").read_text()


def test_batches_of_several_shapes(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """Upright and lying images share no batch: padding would change what is found."""
    detector = from_pretrained(runs.make_eager(pretrained, tmp_path / "eager"))
    photos = [Image.open(path).convert("RGB") for path in sorted((demo / "images").glob("val_*"))[:3]]
    images = [turned for photo in photos for turned in (photo.resize((96, 48)), photo.resize((48, 96)))]
    alone = detector.predict(images, score_threshold=0.05)
    together = detector.predict(images, score_threshold=0.05, batch_size=np.int64(6))  # type: ignore[arg-type]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=1e-3)
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)
    assert sum(len(found["labels"]) for found in alone) > 10
