"""--report-to: what experiment trackers get is what stands in metrics.jsonl; and validation losses."""

import json
import re
import shutil
import signal
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_detectors as small
import small_runs as runs
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from direct_pt.coco_eval import evaluate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.evaluation_loader import evaluation_loader
from direct_pt.data.formats.coco import find_coco
from direct_pt.data.sources import load_split
from direct_pt.errors import InputError
from direct_pt.models.mean_losses import MeanLosses
from direct_pt.training.tracker_flags import TRACKERS, check_trackers
from direct_pt.training.trackers import _mlflow_names, numbers_in, open_trackers
from direct_pt.transforms import TestPreset

FLAGS = (*runs.TINY, *runs.EIGHT, "--log-every", 1, "--save-every", 2, "--max-steps", 6, "--eval-every", "0.67")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
WANDB_HEADER, WANDB_BLOCK, CHUNK_HEADER = 7, 32768, struct.Struct("<IHB")  # LevelDB's log format


def test_the_names_are_accelerates() -> None:
    assert set(TRACKERS) == {str(name) for name in LOGGER_TYPE_TO_CLASS}


def test_a_package_that_is_missing_is_asked_for() -> None:
    with pytest.raises(
        InputError, match="--report-to aim: its package is not installed: pip install aim, or --report-to none"
    ):
        check_trackers(("tensorboard", "aim"))
    with pytest.raises(InputError, match="--report-to none tensorboard: none excludes the others"):
        check_trackers(("none", "tensorboard"))
    assert check_trackers(("tensorboard", "tensorboard")) == ("tensorboard",)


def test_names_of_figures() -> None:
    """They say where a number stands, and no two become one."""
    record = {"step": 4, "bbox": {"AP": 0.5}, "loss": None, "losses": {"box": 1.5}, "note": "text", "flag": True}
    assert numbers_in(record) == {"step": 4, "bbox/AP": 0.5, "losses/box": 1.5}
    assert _mlflow_names({"per_class/a+b/AP": 1, "per_class/a*b/AP": 2}) == {
        "per_class/a_b/AP": 1,
        "per_class/a_b/AP_": 2,
    }


def test_one_that_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named once, and the other ones go on."""
    pytest.importorskip("mlflow")
    store = tmp_path / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with runs.fresh_process():
        trackers = open_trackers(("mlflow", "tensorboard"), tmp_path / "run", {"lr": 0.1}, 0, PartialState())
        trackers.log({"step": 1, "loss": 2.0})
        shutil.rmtree(store)
        store.write_text("a file where the folder was")
        trackers.log({"step": 2, "loss": 1.5})
        trackers.log({"step": 3, "loss": 1.0})
        trackers.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --report-to mlflow: ") and line.endswith("; training continues without it")
    assert [point["loss"] for point in tensorboard_records(tmp_path / "run")] == [2.0, 1.5, 1.0]


@pytest.mark.slow
def test_their_records_are_those_of_the_run(demo: Path, tmp_path: Path) -> None:
    """All of them, several at once, in a run that was stopped and resumed: no step twice, none missing."""
    for name in ("mlflow", "trackio", "wandb"):
        pytest.importorskip(name)
    run, environment = tmp_path / "run", {
        **OFFLINE, "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "TRACKIO_DIR": tmp_path / "trackio",
    }  # fmt: skip
    names = ("tensorboard", "mlflow", "trackio", "wandb")
    flags = ("--data", demo, *FLAGS, "--report-to", *names, "--output-dir", run)
    process = runs.start_script("pretrain", *flags, **environment)
    while not (run / "metrics.jsonl").exists() or len(runs.records(run)) < 3:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, out + err
    process = runs.start_script("pretrain", *flags, "--resume", **environment)
    out, err = process.communicate()
    assert process.returncode == 0 and "continues without it" not in err, out + err

    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [numbers_in(json.loads(line)) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert all("val_loss" in record for record in records if "bbox/AP" in record)
    expected = merged(records)
    ids = runs.read_json(run / "trackers.json")
    found = {
        "tensorboard": tensorboard_records(run),
        "mlflow": mlflow_records(environment["MLFLOW_TRACKING_URI"], ids["mlflow"]),
        "trackio": trackio_records(tmp_path / "trackio", ids["trackio"]),
        "wandb": wandb_records(run),
    }
    for name in names:
        assert len(found[name]) == len(expected), name
        for point, wanted in zip(found[name], expected, strict=True):
            assert point == pytest.approx(wanted, rel=1e-6), name  # TensorBoard's are float32
    pictures = {path.name for path in (run / "run_pictures").glob("step-*")}
    assert pictures and pictures <= {path.name for path in tmp_path.glob("mlruns/*/*/artifacts/pictures/*")}
    assert len(list(run.glob("wandb/*/files/media/images/**/*.png"))) >= len(pictures)


def test_validation_losses(training_table: AnnotationTable, accelerator: Accelerator) -> None:
    """The mean over the split, whatever shares a batch; of any order of the classes; AP as without them."""
    preset = TestPreset(small.SIDE, small.SIDE)
    for name in (small.FASTER, small.CASCADE, small.MASK, small.RETINANET):
        detector = small.small_detector(name).eval()
        table = renamed(training_table, detector.config.category_ids)
        one, _ = evaluate(detector, table, preset, 1, accelerator, 0, with_losses=True)
        three, _ = evaluate(detector, table, preset, 3, accelerator, 0, with_losses=True)
        alone, _ = evaluate(detector, table, preset, 3, accelerator, 0)
        assert one["val_losses"].keys() == small.LOSSES[name]
        assert three["val_losses"] == pytest.approx(one["val_losses"], rel=1e-4), name
        assert one["val_loss"] == pytest.approx(sum(one["val_losses"].values()))
        assert {key: value for key, value in three.items() if not key.startswith("val_")} == alone

        # As one batch: what training would see of these images, without its random choices.
        targets = "masks" if detector.has_masks else "boxes"
        (batch,) = evaluation_loader(table, preset, len(table), 0, 1, 0, targets)
        with torch.no_grad():
            whole = {loss: value.item() for loss, value in detector(batch).items()}
        assert one["val_losses"] == pytest.approx(whole, rel=1e-4), name


def test_unreadable_images_have_no_loss(
    training_table: AnnotationTable, tmp_path: Path, accelerator: Accelerator
) -> None:
    """The mean is that of the others."""
    detector, preset = small.small_detector().eval(), TestPreset(small.SIDE, small.SIDE)
    table = renamed(training_table, detector.config.category_ids)
    shutil.copytree(table.folder, tmp_path / "images")
    table = replace(table, folder=tmp_path / "images")
    others, _ = evaluate(detector, table.select(np.arange(5)), preset, 3, accelerator, 0, with_losses=True)
    table.path(5).write_bytes(b"no image")
    found, predictions = evaluate(detector, table, preset, 3, accelerator, 0, with_losses=True)
    assert predictions.unreadable == (5,)
    assert found["val_losses"] == pytest.approx(others["val_losses"], rel=1e-4)


def test_one_that_cannot_begin_leaves_the_folder_free(demo: Path, tmp_path: Path) -> None:
    """A file where TensorBoard's folder would be: one line, and the same command works once that is gone."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("a file")
    flags = ("--data", demo, *FLAGS, "--max-steps", 1, "--report-to", "tensorboard", "--output-dir", run)
    with pytest.raises(InputError, match=r"--report-to tensorboard: .*leave it out, or see its documentation"):
        runs.train("pretrain", *flags)
    (run / "tensorboard").unlink()
    runs.train("pretrain", *flags)
    assert [point["step"] for point in tensorboard_records(run)] == [1]


def test_labels_follow_the_detector(training_table: AnnotationTable, accelerator: Accelerator) -> None:
    """A detector and a table with the same ids in another order have the same losses."""
    detector = small.small_detector().eval()
    preset, ids = TestPreset(small.SIDE, small.SIDE), detector.config.category_ids
    table = renamed(training_table, ids)
    turned = replace(
        table, category_ids=ids[::-1], class_names=table.class_names[::-1], labels=len(ids) - 1 - table.labels
    )
    expected, _ = evaluate(detector, table, preset, 3, accelerator, 0, with_losses=True)
    found, _ = evaluate(detector, turned, preset, 3, accelerator, 0, with_losses=True)
    assert found["val_losses"] == expected["val_losses"]


def test_of_several_processes() -> None:
    """Sums of a process without images count nothing; a loss that is not finite is none."""
    merged_losses = MeanLosses({"box": 6.0}, 3.0).merged([MeanLosses({"box": 2.0}, 1.0), MeanLosses()])
    assert merged_losses.record() == {"val_loss": 2.0, "val_losses": {"box": 2.0}}
    assert MeanLosses().record() == {}
    assert MeanLosses({"box": float("nan"), "class": 1.0}, 1.0).record() == {
        "val_loss": None,
        "val_losses": {"box": None, "class": 1.0},
    }


@pytest.fixture
def training_table(demo: Path) -> AnnotationTable:
    """Six images of the demo set."""
    return load_split(find_coco(demo)["train"]).select(np.arange(6))


def renamed(table: AnnotationTable, category_ids: tuple[int, ...]) -> AnnotationTable:
    """With a detector's category ids in place of its own, class by class."""
    return replace(table, category_ids=category_ids)


def merged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a step: trackers know a step once."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        by_step.setdefault(record["step"], {}).update(record)
    return [by_step[step] for step in sorted(by_step)]


def tensorboard_records(run: Path) -> list[dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    points = [
        {"step": event.step, name: event.value}
        for name in reader.Tags()["scalars"]
        if not name.startswith("hparams")
        for event in reader.Scalars(name)
    ]
    return merged(points)


def mlflow_records(uri: str, run_id: str) -> list[dict[str, Any]]:
    from mlflow.tracking import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = MlflowClient(uri)
        assert client.get_run(run_id).data.params["max_steps"] == "6"
        names = client.get_run(run_id).data.metrics
        points = [
            {"step": point.step, name: point.value}
            for name in names
            for point in client.get_metric_history(run_id, name)
        ]
    return merged(points)


def trackio_records(folder: Path, run_name: str) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        from trackio import sqlite_storage

        patch.setattr(sqlite_storage, "TRACKIO_DIR", folder)
        points = sqlite_storage.SQLiteStorage.get_logs("direct_pt", run_name)
    own = [{name: value for name, value in point.items() if isinstance(value, int | float)} for point in points]
    return [point for point in merged(own) if point["step"]]


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """Out of the files of its offline runs."""
    points = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_file(path):
            if record.WhichOneof("record_type") == "history":
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
                own = {name: value for name, value in numbers.items() if not re.match(r"_|sample/|validation/", name)}
                points.append({"step": record.history.step.num, **own})
    return [point for point in merged(points) if point["step"]]


def wandb_file(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), WANDB_HEADER, b""
    while position + CHUNK_HEADER.size <= len(data):
        left = WANDB_BLOCK - position % WANDB_BLOCK
        if left < CHUNK_HEADER.size:
            position += left
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield Record.FromString(parts)
            parts = b""
