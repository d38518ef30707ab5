"""What a user gets wrong: one line that names it and the remedy, exit status 2, and nothing started."""

from direct_pt.program.run import run_program
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_runs as runs

from direct_pt.checkpoint import save_model
from direct_pt.errors import InputError, StopSignal, TrainingStopped
from direct_pt.models.detector import DetectorConfig, build_detector

ASKING = "asking the Hugging Face hub"
FLAGS = {
    "pretrain": (*runs.PRETRAIN, *runs.EIGHT, "--max-steps", "4", *runs.NO_EVALUATION),
    "finetune": (*runs.FINETUNE, *runs.EIGHT, "--max-steps", "4", *runs.NO_EVALUATION),
}


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where the run would go. Whatever is refused leaves nothing there."""
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()


def refused(script: str, *flags: object) -> str:
    """The same, of the same program in this process."""

    def main() -> None:
        if script in FLAGS:
            runs.train(script, *FLAGS[script], *flags)
        else:
            runs.call_script(script, *runs.MACHINE, *flags)

    with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == 2
    *before, line = errors.getvalue().splitlines()  # before it: a progress bar, where something was under way
    assert line.startswith("error: ") and not any("error" in earlier for earlier in before)
    return line.removeprefix("error: ")


def refused_in_a_process(script: str, *flags: object) -> str:
    """The one line on stderr of a process of its own, after that it asks the hub."""
    process = runs.start_script(script, *FLAGS.get(script, runs.MACHINE), *flags)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert printed == ""
    (line,) = [line for line in errors.splitlines() if not line.endswith(ASKING)]
    return line


# As a user sees it


def test_missing_folder(output: Path, tmp_path: Path) -> None:
    line = refused_in_a_process("pretrain", "--data", tmp_path / "absent", "--output-dir", output)
    assert line == f"error: --data {tmp_path / 'absent'}: no such folder"


def test_init_that_the_hub_does_not_have(output: Path, demo: Path) -> None:
    """Offline: what looks like a hub id, and may be a mistyped path."""
    line = refused_in_a_process("finetune", "--data", demo, "--init", "nobody/nothing", "--output-dir", output)
    assert line.startswith("error: nobody/nothing: no such folder, and the hub gives no such model")


def test_checkpoint_that_is_none(demo: Path, output: Path) -> None:
    line = refused_in_a_process("evaluate", "--data", demo, "--checkpoint", demo, "--output-dir", output)
    assert line.startswith(f"error: {demo}: holds no model (model.safetensors and config.json); give a run's folder")


def test_predict_a_missing_file(pretrained: Path, output: Path, tmp_path: Path) -> None:
    flags = (tmp_path / "absent.jpg", "--checkpoint", pretrained, "--output-dir", output)
    assert refused_in_a_process("predict", *flags) == f"error: {tmp_path / 'absent.jpg'}: no such image or folder"


def test_fp16_without_a_gpu(output: Path, demo: Path) -> None:
    """The last thing that is found out before training."""
    line = refused_in_a_process("pretrain", "--data", demo, "--mixed-precision", "fp16", "--output-dir", output)
    assert line == "error: fp16 needs a GPU, and there is none: use --mixed-precision bf16 or no"


# In this process


def test_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for raised, status, text in (
        (None, 0, ""),
        (InputError("no such file"), 2, "error: no such file\n"),
        (InputError("the hub says:\n\n404"), 2, "error: the hub says: 404\n"),
        (InputError("no \x1b[1m, \udcff.jpg"), 2, "error: no \\x1b[1m, \\udcff.jpg\n"),
        (TrainingStopped("not finite"), 1, "stopped: not finite\n"),
        (StopSignal("SIGTERM", 143), 143, "stopped: SIGTERM\n"),
        (KeyboardInterrupt(), 130, ""),
    ):

        def main(raised: BaseException | None = raised) -> None:
            if raised is not None:
                raise raised

        with pytest.raises(SystemExit) as end:
            run_program(main)
        assert (end.value.code, capsys.readouterr().err) == (status, text)


def test_init_that_is_missing(output: Path, demo: Path, tmp_path: Path) -> None:
    line = refused("finetune", "--data", demo, "--init", tmp_path / "absent", "--output-dir", output)
    assert line.startswith(f"{tmp_path / 'absent'}: no such folder; give a run's folder")


def test_output_folder_of_another_run(pretrained: Path, demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    line = refused("pretrain", "--data", demo, "--output-dir", pretrained)
    remedy = "holds a run already; continue with --resume, or choose another folder"
    assert line == f"--output-dir {pretrained}: {remedy}"
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


def test_a_flag_that_does_not_exist() -> None:
    line = refused("finetune", "--learning-rate", "1")
    assert line == "unrecognized arguments: --learning-rate 1 (see --help)"


@pytest.fixture
def copy(demo: Path, tmp_path: Path) -> Path:
    """The demo data, to be damaged."""
    shutil.copytree(demo, tmp_path / "data")
    return tmp_path / "data"


def annotations(data: Path, split: str = "train") -> Path:
    return data / f"annotations/instances_{split}.json"


def change(data: Path, split: str = "train", **values: Any) -> None:
    """Other contents under some keys of an annotation file."""
    path = annotations(data, split)
    path.write_text(json.dumps({**runs.read_json(path), **values}))


@pytest.fixture
def mask_model(tmp_path: Path) -> Path:
    """A mask detector of the demo's classes, untrained."""
    config = DetectorConfig.from_paper("mask_rcnn_r50_fpn", tuple(map(str, range(10))), tuple(range(10, 101, 10)))
    config = replace(config, backbone="resnet18", channels=32, short_side=runs.SIZE, long_side=runs.SIZE)
    save_model(tmp_path / "mask_model", build_detector(config.name, config=config), [])
    return tmp_path / "mask_model"


@pytest.mark.parametrize("outline", [None, [], [[1, 1, 9, 9]]])
def test_masks_to_learn_without_outlines(
    copy: Path, output: Path, mask_model: Path, outline: Any, pretrained: Path
) -> None:
    """An object whose outline is missing, empty or a line: refused before anything starts, but by box detectors."""

    def without_outlines(split: str, *numbers: int) -> None:
        records = runs.read_json(annotations(copy, split))["annotations"]
        for record in records:
            if record["id"] in numbers:
                record["segmentation"] = outline
                if outline is None:
                    del record["segmentation"]
        change(copy, split, annotations=records)

    model = ("--model", "mask_rcnn_r50_fpn")
    scripts = {
        "pretrain": model,
        "finetune": ("--init", mask_model),
        "evaluate": ("--checkpoint", mask_model),
    }
    without_outlines("val", 8)
    for script, flags in scripts.items():
        message = refused(script, "--data", copy, *flags, "--output-dir", output)
        assert message.startswith(f"{annotations(copy, 'val')}: 1 object(s) without 'segmentation'")
        assert "(id 8)" in message and "box detector" in message and not output.exists()
    without_outlines("train", 5, 6, 30)
    message = refused("pretrain", "--data", copy, *model, "--output-dir", output)
    assert message.startswith(f"{annotations(copy)}: 3 object(s) without 'segmentation'")
    elsewhere = output.with_name("boxes")
    runs.call_script("evaluate", "--checkpoint", pretrained, "--data", copy, *runs.MACHINE, "--output-dir", elsewhere)
    assert set(runs.read_metrics(elsewhere / "metrics.json")) == {"bbox", "per_class"}


@pytest.mark.parametrize("script", ["pretrain", "finetune", "evaluate"])
def test_unreadable_annotations(script: str, copy: Path, output: Path, pretrained: Path) -> None:
    annotations(copy, "train").write_text('{"images": [')
    annotations(copy, "val").write_text("")
    more = {"pretrain": (), "finetune": ("--init", pretrained), "evaluate": ("--checkpoint", pretrained)}[script]
    message = refused(script, "--data", copy, *more, "--output-dir", output)
    split = "val" if script == "evaluate" else "train"
    assert message.startswith(f"{annotations(copy, split)}: cannot be read as JSON")


def test_data_folders(copy: Path, output: Path) -> None:
    arguments = ("--output-dir", output)
    shutil.rmtree(copy / "images")
    assert f"{copy / 'images'}: no such image folder" in refused("pretrain", "--data", copy, *arguments)
    annotations(copy).unlink()
    assert "the data have no split 'train', only val: add it" in refused("pretrain", "--data", copy, *arguments)
    annotations(copy, "val").unlink()
    message = refused("pretrain", "--data", copy, *arguments)
    assert f"--data {copy}: holds none of: COCO's annotations/instances_train2017.json" in message
    assert "no data given: use --data DIR" in refused("pretrain", *arguments)


def test_images_that_are_not_there(copy: Path, output: Path) -> None:
    (copy / "images/train_000005.jpg").unlink()
    message = refused("pretrain", "--data", copy, "--output-dir", output)
    assert str(copy / "images/train_000005.jpg") in message and "1 of 24" in message and "check" in message


def test_splits_with_other_classes(copy: Path, output: Path) -> None:
    categories = runs.read_json(annotations(copy))["categories"]
    change(copy, "val", categories=[*categories, {"id": 200, "name": "ten"}])
    message = refused("pretrain", "--data", copy, "--output-dir", output)
    assert message.startswith(f"{annotations(copy, 'val')}: its categories") and "differ" in message


def test_nothing_to_learn(copy: Path, output: Path) -> None:
    change(copy, "train", annotations=[])
    message = refused("pretrain", "--data", copy, "--drop-empty", "--output-dir", output)
    assert str(annotations(copy)) in message and "no image has an object to learn" in message


def test_unknown_detector(demo: Path, output: Path) -> None:
    flags = ("--data", demo, "--output-dir", output)
    assert "--model yolo: no such detector; choose one of" in refused("pretrain", *flags, "--model", "yolo")
    message = refused("pretrain", *flags, "--backbone", "resnet19")
    assert message.startswith("--backbone resnet19: timm has no model of this name; try resnet")
    message = refused("pretrain", *flags, "--backbone", "vit_tiny_patch16_224")
    assert "has no feature maps at strides 4, 8, 16 and 32; use a hierarchical network" in message


def test_classes_that_name_none(demo: Path, output: Path) -> None:
    message = refused("pretrain", "--data", demo, "--output-dir", output, "--classes", ",")
    assert message == "argument --classes: names no class: give some, such as person,car (see --help)"


def test_sizes_and_batches(demo: Path, output: Path) -> None:
    flags = ("--data", demo, "--output-dir", output)
    assert refused("pretrain", *flags, "--image-size", 90) == "--image-size 90 is no multiple of 32: use 64 or 96"
    message = refused("pretrain", *flags, "--micro-batch-size", 3)
    assert "--global-batch-size 8 does not divide" in message and "use --global-batch-size 6 or 9" in message


def test_output_that_is_a_file(demo: Path, pretrained: Path, tmp_path: Path) -> None:
    output = tmp_path / "file"
    output.write_text("mine")
    photo = next((demo / "images").iterdir())
    for script, flags in (
        ("pretrain", ("--data", demo)),
        ("evaluate", ("--data", demo, "--checkpoint", pretrained)),
        ("predict", (photo, "--checkpoint", pretrained)),
    ):
        assert f"--output-dir {output}: is a file" in refused(script, *flags, "--output-dir", output)
        assert output.read_text() == "mine"


def test_resume_with_other_settings(demo: Path, pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pretrained, run, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ("--data", demo, "--max-steps", 4, "--eval-every", 0.67, "--output-dir", run, "--resume")
    message = refused("pretrain", *flags, "--channels", 64)
    assert "--channels is 64" in message and "was started with 32" in message
    assert f"--config {run / 'config.json'}" in message
    assert "--seed is 1 but" in refused("pretrain", *flags, "--seed", 1)
    assert "the stage is 'finetune'" in refused("finetune", *flags, "--init", pretrained)
    assert "--val-share is 0.2 but" in refused("pretrain", *flags, "--val-share", 0.2)
    for content in ("{", "[]", "{}"):
        (run / "config.json").write_text(content)
        message = refused("pretrain", *flags)
        assert message.startswith(f"{run / 'config.json'}: cannot be read as a run's config.json")


def test_damaged_checkpoints(demo: Path, pretrained: Path, tmp_path: Path) -> None:
    """All of them; with a good one, see test_resume.py."""
    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    for state in (run / "checkpoints").iterdir():
        (state / "optimizer.safetensors").write_bytes((state / "optimizer.safetensors").read_bytes()[:1000])
    flags = ("--data", demo, "--max-steps", 4, "--eval-every", 0.67, "--output-dir", run, "--resume")
    message = refused("pretrain", *flags)
    assert f"{run / 'checkpoints'}: none of its 2 checkpoints is whole; remove" in message


def test_evaluation_of_other_classes(copy: Path, pretrained: Path, output: Path) -> None:
    for split in ("train", "val"):
        categories = runs.read_json(annotations(copy, split))["categories"]
        change(copy, split, categories=[{**category, "name": f"n{category['name']}"} for category in categories])
    message = refused("evaluate", "--data", copy, "--checkpoint", pretrained, "--output-dir", output)
    source = annotations(copy, "val")
    assert message.startswith(f"{source} lists other classes than --checkpoint {pretrained} was trained for: of 10")
    assert "it has 10 'n0', 20 'n1', 30 'n2', ... and lacks 10 '0', 20 '1', 30 '2', ..." in message


def test_flags_that_contradict_init(demo: Path, pretrained: Path, output: Path) -> None:
    flags = ("--data", demo, "--init", pretrained, "--output-dir", output)
    for flag, value in (
        ("--model", "mask_rcnn_r50_fpn"),
        ("--backbone", "resnet50"),
        ("--norm", "group"),
        ("--box-head", "2fc"),
        ("--channels", 64),
    ):
        for script in ("pretrain", "finetune"):
            message = refused(script, *flags, flag, value)
            assert message.startswith(f"{flag} {value}: --init {pretrained} has ") and "leave the flag out" in message


def test_init_that_is_no_model(demo: Path, output: Path) -> None:
    flags = ("--data", demo, "--output-dir", output)
    assert f"{demo}: holds no model" in refused("finetune", *flags, "--init", demo)
    assert "--init is missing" in refused("finetune", *flags)


def test_evaluate_arguments(demo: Path, copy: Path, pretrained: Path, output: Path) -> None:
    flags = ("--checkpoint", pretrained, "--output-dir", output)
    annotations(copy, "val").unlink()
    message = refused("evaluate", "--data", copy, *flags, "--val-share", 0)
    assert message.startswith("the data have no split 'val', only train: add it")
    message = refused("evaluate", "--data", demo, *flags, "--short-side", 100, "--long-side", 50)
    assert message == "--short-side 100 is above --long-side 50: give a larger --long-side"
    assert "--micro-batch-size" in refused("evaluate", "--data", demo, *flags, "--micro-batch-size", 0)
    assert "--checkpoint" in refused("evaluate", "--data", demo)
    message = refused("evaluate", "--data", demo, "--checkpoint", "somebody/model")
    assert message.startswith(
        "--checkpoint somebody/model: no such folder; for a model from the hub, say with --output"
    )
    message = refused("evaluate", "--data", demo, *flags, "--streaming")
    assert message.startswith(f"--data {demo}: --streaming reads Hugging Face data sets alone")


def test_predict_arguments(demo: Path, pretrained: Path, output: Path, tmp_path: Path) -> None:
    photo = next((demo / "images").iterdir())
    (tmp_path / "empty").mkdir()
    flags = ("--checkpoint", pretrained, "--output-dir", output)
    assert "no image files there (.jpg" in refused("predict", tmp_path / "empty", *flags)
    assert "IMAGE_OR_FOLDER" in refused("predict", *flags)
    assert "--score-threshold" in refused("predict", photo, *flags, "--score-threshold", 5)
    assert "--checkpoint" in refused("predict", photo, "--output-dir", output)
    assert "no such folder" in refused("predict", photo, "--checkpoint", tmp_path / "no", "--output-dir", output)
    assert f"{demo}: holds no model" in refused("predict", photo, "--checkpoint", demo, "--output-dir", output)


def test_predict_nothing_but_broken_files(pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    message = refused(
        "predict", tmp_path / "notes.txt", "--checkpoint", pretrained, "--output-dir", tmp_path / "pictures"
    )
    assert "none of the 1 files could be read as an image" in message


def test_nothing_but_crowd_regions(
    copy: Path, pretrained: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training says why there is nothing to learn, evaluation why there are no figures."""
    for split in ("train", "val"):
        objects = runs.read_json(annotations(copy, split))["annotations"]
        change(copy, split, annotations=[{**one, "iscrowd": 1} for one in objects])
    message = refused("pretrain", "--data", copy, "--output-dir", output)
    assert "no image has an object to learn" in message and "all of them are crowd regions (iscrowd 1" in message
    elsewhere = output.with_name("metrics")
    runs.call_script("evaluate", "--checkpoint", pretrained, "--data", copy, *runs.MACHINE, "--output-dir", elsewhere)
    assert "there is no object to find in these images, but for crowd regions" in capsys.readouterr().out
