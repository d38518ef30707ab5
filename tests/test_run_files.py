"""What the files of a run's folder may say when it is resumed: one line for what is wrong, and nothing lost."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_runs as runs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from direct_pt.checkpoint import from_pretrained, read_history
from direct_pt.errors import InputError
from direct_pt.files import check_output, read_tensors, write_tensors

pytestmark = runs.cpu_only

LENGTH = ("--max-steps", 4, "--eval-every", 0.67, "--save-every", 2, "--log-every", 1)
FLAGS = (*runs.TINY, *runs.EIGHT, *LENGTH, "--ema", 0.9)
FILES = ("model", "optimizer", "average")
NAN, LARGE = float("nan"), 10**400


@pytest.fixture(scope="module")
def finished(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with checkpoints of the second and the last."""
    run = tmp_path_factory.mktemp("finished") / "run"
    runs.train("pretrain", "--data", demo, *FLAGS, "--output-dir", run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it after two steps, to be damaged."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    return tmp_path / "run"


def refused(run: Path, demo: Path, *flags: object) -> str:
    """The one line that says why a run is not resumed. Nothing is deleted or written."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        runs.train("pretrain", "--data", demo, *(flags or FLAGS), "--output-dir", run, "--resume")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    line = str(error.value)
    assert str(run) in line and "\n" not in line and len(line) < 1500
    return line


def resume(run: Path, demo: Path) -> None:
    """To its end."""
    runs.train("pretrain", "--data", demo, *FLAGS, "--output-dir", run, "--resume")


def change(run: Path, part: str, **values: Any) -> None:
    """Other values in a part of config.json."""
    path = run / "config.json"
    content = runs.read_json(path)
    content[part] = {**content[part], **values}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["model", "best", "checkpoints"])
def test_files_in_place_of_folders(name: str, run: Path, demo: Path) -> None:
    """Else the run would begin anew, or train to its end without being saved."""
    shutil.move(run / name, run / "elsewhere")
    (run / name).write_text("")
    assert refused(run, demo) == f"{run / name}: is no folder, and the run writes one there; move it away"
    (run / name).unlink()
    (run / name).symlink_to(run / "nowhere")
    assert f"{run / name}: is no folder" in refused(run, demo)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "curves.png", "run.html", ".metrics.jsonl.partial", ".config.json.partial"]
)
def test_folders_in_place_of_files(name: str, run: Path, demo: Path) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    (run / name / "content").write_text("")
    assert f"{run / name}: is no file, and the run writes one there; move it away" in refused(run, demo)


def test_a_checkpoint_is_a_model_folder(run: Path, demo: Path, tmp_path: Path) -> None:
    """With the weights that were evaluated, here their average; nothing is written there, as it goes later."""
    folder = run / "checkpoints/step-2"
    average, _ = read_tensors(folder / "average.safetensors")
    weights, _ = read_tensors(folder / "model.safetensors")
    found = from_pretrained(folder).state_dict()
    assert runs.largest_difference(found, average) == 0 < runs.largest_difference(weights, average)
    assert [stage["steps"] for stage in read_history(folder)] == [2]
    for place in (folder, folder / "new", run / "checkpoints/.step-9.partial", run / "checkpoints"):
        with pytest.raises(InputError, match=r": a run removes what lies in its .*checkpoints; name another place"):
            check_output(place)
    check_output(tmp_path / "checkpoints/step-2")  # nobody's


# config.json


@pytest.mark.parametrize(
    ("part", "field", "values"),
    [
        *(("plan", field, (0, -2, 1.5, NAN, LARGE, "8", True, None, [8], {"a": 8}))
          for field in ("images", "processes", "global_batch_size", "micro_batch_size", "accumulation", "total_steps",
                        "eval_steps")),
        ("plan", "warmup_steps", (-1, 1.5, NAN, "8", True, None, [])),
        ("plan", "lr", (0, -0.1, NAN, float("inf"), LARGE, "0.1", True, None, [0.1])),
        ("plan", "warmup_factor", (-0.1, 1.1, NAN, "0.1", None)),
        ("plan", "decay_steps", ([-1], [1.5], ["2"], 5, None, {})),
        ("plan", "cosine", (0, "no", None)),
        ("plan", "notes", ([5], "text", None, [[[]]])),
        ("choices", "canvas", (64, [64], [64, -32], [65, 64], ["64", "64"], [64, 10**8], [0, 0])),
        ("choices", "scale_jitter", (1, [1], [1.2, 0.8], [-1, 1], [NAN, 1], ["1", "1"], None)),
        ("choices", "mix", ("blend", 5, None, [])),
        ("choices", "mix_share", (-1, 2, NAN, "0.5", None)),
        ("choices", "flips", ("sideways", True, None)),
        ("choices", "color_jitter", (-0.1, 5, NAN, "1")),
        ("choices", "anchor_scale", (0, -8, NAN, 1e9, "auto", True)),
        ("data", "classes", (5, [], None, {"x": "cat"}, {"1": 5}, {"1" * 5000: "cat"})),
        ("data", "train", (5, {}, {"images": -1, "objects": 1, "digest": "0"}, {"images": "1"})),
    ],
)  # fmt: skip
def test_values_of_a_config(part: str, field: str, values: tuple[Any, ...], run: Path, demo: Path) -> None:
    original = (run / "config.json").read_text()
    for value in values:
        change(run, part, **{field: value})
        line = refused(run, demo)
        assert f"{part}.{field}" in line and str(run / "config.json") in line, (value, line)
        (run / "config.json").write_text(original)


@pytest.mark.parametrize("part", ["plan", "choices", "data"])
@pytest.mark.parametrize("value", [5, "text", [], True, {"more": 1}])
def test_parts_of_a_config(part: str, value: Any, run: Path, demo: Path) -> None:
    content = runs.read_json(run / "config.json")
    (run / "config.json").write_text(json.dumps({**content, part: value}))
    assert str(run / "config.json") in refused(run, demo)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lr": NAN}, "lr"),
        ({"lr": -1}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"lr": [0.1]}, "lr"),
        ({"clip_grad_norm": -1}, "clip-grad-norm"),
        ({"clip_grad_norm": {"a": 1}}, "clip_grad_norm"),
        ({"warmup_steps": 1.5}, "warmup-steps"),
        ({"warmup_steps": True}, "warmup_steps"),
        ({"seed": [[0]]}, "--seed is 0"),
        ({"global_batch_size": -2}, "--global-batch-size is 8"),
    ],
)
def test_settings_of_a_config(settings: dict[str, Any], reason: str, run: Path, demo: Path) -> None:
    """What is kept where a flag is not given now, and what it is compared with."""
    change(run, "settings", **settings)
    flags = [flag for flag in FLAGS if flag not in runs.RATE]
    assert "--lr" not in flags
    assert reason in refused(run, demo, *flags)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "null", "[" * 100_000, '{"settings": []}', "\0" * 100])
def test_a_config_that_is_none(content: str, run: Path, demo: Path) -> None:
    (run / "config.json").write_text(content)
    assert refused(run, demo).startswith(f"{run / 'config.json'}: ")


def test_a_config_that_is_gone(run: Path, demo: Path) -> None:
    """The first save of a new run would delete the checkpoints."""
    (run / "config.json").unlink()
    assert "but no config.json of the run that wrote that" in refused(run, demo)


# Checkpoints


def rewrite(
    file: Path, tensors: Callable[[dict[str, Tensor]], None] | None = None, facts: Callable[[Any], Any] | None = None
) -> None:
    """Other tensors or facts, with the checksum that is right for them."""
    found, said = read_tensors(file)
    if tensors is not None:
        tensors(found)
    write_tensors(file, found, said if facts is None else facts(said) or said)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        *((f"progress.{name}", (-1, 1.5, NAN, "2", True, None, [2], 2**60)) for name in (
            "skipped", "skipped_in_a_row", "mixed_in_a_row", "good_steps", "calm_step")),
        ("progress.step", (-1, 0, 3, 1.5, "2", True, None, [2], 2**60)),
        *((f"progress.{name}", ("1", True, [1])) for name in (
            "average_loss", "lowest_loss", "lowest_early", "last_norm", "failed_lr")),
        ("progress", (None, 5, [], {})),
        ("progress.more", (1,)),
        ("scaler", (5, [], {}, {"scale": 1})),
        ("of_processes", (None, 5, {}, [5], [{}], [{"losses": 5}], [{"losses": {"a": "1"}}],
                          [{"losses": {}, "updates": -1}], [{"losses": {}, "feed": 5}])),
        ("micro_batch_size", (-1, 1.5, "8", None)),
        ("more", (1,)),
    ],
)  # fmt: skip
def test_facts_of_a_checkpoint(
    place: str, values: tuple[Any, ...], finished: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint whose facts cannot be is as a damaged one: it is named, and the one before it used."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(finished / "checkpoints/step-2", folder / "checkpoints/step-2")
    file = folder / "checkpoints/step-2/optimizer.safetensors"
    original = file.read_bytes()
    shutil.copy(finished / "config.json", folder)

    for value in values:

        def forge(facts: Any, value: Any = value) -> None:
            *around, last = place.split(".")
            for key in around:
                facts = facts[key]
            facts[last] = value

        file.write_bytes(original)
        try:
            rewrite(file, facts=forge)
        except ValueError:  # NaN, which the program does not write
            continue
        line = refused(folder, demo)
        assert line.startswith(f"{folder / 'checkpoints'}: none of its 1 checkpoints is whole")
        (warning,) = capsys.readouterr().err.splitlines()
        assert f"warning: {file}: holds no training state: " in warning and place.split(".")[-1] in warning, value


def test_facts_nested_deeply(run: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forge(facts: Any) -> None:
        facts["scaler"] = json.loads("[" * 500 + "]" * 500)

    rewrite(run / "checkpoints/step-2/optimizer.safetensors", facts=forge)
    assert "none of its 1 checkpoints is whole" in refused(run, demo)
    assert "nested more than 100 levels" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_checksum(
    name: str, finished: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another program would write it: a checkpoint has one, so it is damaged."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    file = folder / f"checkpoints/step-4/{name}.safetensors"
    save_file(load_file(file), file)
    resume(folder, demo)
    assert f"warning: {file}: has no checksum" in capsys.readouterr().err
    assert runs.steps_saved(folder) == ["step-2", "step-4"]


def test_a_missing_average(run: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints/step-2/average.safetensors").unlink()
    assert "none of its 1 checkpoints is whole" in refused(run, demo)
    assert "average.safetensors: cannot be read" in capsys.readouterr().err


def first_of(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor of a convolution."""
    return next(name for name, tensor in tensors.items() if tensor.ndim == 4 and "fpn" in name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("found nothing", lambda tensors, name: tensors.pop(name)),
        ("expected nothing", lambda tensors, name: tensors.update({"another": torch.zeros(3)})),
        ("found [", lambda tensors, name: tensors.update({name: tensors[name][:1]})),
        ("found [16, 16, 3, 3] int64", lambda tensors, name: tensors.update({name: tensors[name].long()})),
    ],
)
def test_tensors_of_another_detector(
    name: str, what: str, change: Callable[[dict[str, Tensor], str], Any], run: Path, demo: Path
) -> None:
    file = run / f"checkpoints/step-2/{name}.safetensors"
    if (name, what) == ("optimizer", "found nothing"):
        pytest.skip("a parameter that has had no gradient has no state")

    def forge(tensors: dict[str, Tensor]) -> None:
        first = next(key for key in tensors if "fpn.output.0.weight" in key)
        change(tensors, first)

    rewrite(file, tensors=forge)
    line = refused(run, demo)
    assert line.startswith(f"{file}: 1 tensors do not fit the") and what in line and "move it away" in line


def test_a_longer_run(run: Path, demo: Path) -> None:
    def forge(facts: Any) -> None:
        facts["progress"]["step"] = 10**9

    rewrite(run / "checkpoints/step-2/optimizer.safetensors", facts=forge)
    (run / "checkpoints/step-2").rename(run / "checkpoints/step-1000000000")
    assert "step-1000000000: is of a longer run than the 4 steps" in refused(run, demo)


def test_folders_that_are_no_checkpoints(run: Path, demo: Path) -> None:
    """Their names look like some; digits of other scripts are no numbers of steps."""
    for name in ("step-²", "step-٣", "step-", "step-5x", "step-" + "9" * 200):
        (run / f"checkpoints/{name}").mkdir()
    resume(run, demo)
    assert {"step-2", "step-4", "step-²"} <= set(runs.steps_saved(run))


# metrics.jsonl

ODD_LINES = (
    b"\xff\xfe\x00",
    b"5",
    b"[]",
    b"null",
    b'"text"',
    b"{}",
    b'{"step": "2"}',
    b'{"step": 1.5}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": 1, "bbox": 5}',
    b'{"step": 1, "bbox": {}}',
    b'{"step": 1, "bbox": {"AP": "0.5", "AP50": 0.5, "AP75": 0.5}}',
    b'{"step": 1, "bbox": {"AP": NaN, "AP50": 0.5, "AP75": 0.5}}',
    b'{"step": 1, "bbox": {"AP": 1e400, "AP50": 0.5, "AP75": 0.5}}',
    b'{"step": 1, "bbox": {"AP": 7, "AP50": 0.5, "AP75": 0.5}}',
    b'{"step": 1, "loss": "low", "losses": {}, "lr": 1}',
    b'{"step": 1, "loss": 5}',
    b'{"step": 1, "loss": 5, "losses": [], "lr": 1}',
    b'{"step": 1, "loss": 5, "losses": {"a": null}, "lr": 1}',
    b'{"step": 1, "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[" * 100_000,
)


def test_odd_lines_of_metrics(run: Path, finished: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are counted and kept, and the good ones beside them stay."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    content = b"\n".join([lines[0], *ODD_LINES, *lines[1:]]) + b'\n{"step": 3, "lo'
    path.write_bytes(content)
    capsys.readouterr()
    resume(run, demo)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    found = re.fullmatch(
        rf"warning: {path}: {len(ODD_LINES)} lines hold no record of a run, first line 2; left out, and kept in (.*)",
        line,
    )
    assert found and Path(found[1]).read_bytes() == content and Path(found[1]).parent == run
    assert runs.records(run) == runs.records(finished)


def test_a_last_line_that_a_kill_cut(run: Path, finished: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    resume(run, demo)
    assert "warning" not in capsys.readouterr().err and not list(run.glob("metrics.damaged*"))
    assert runs.records(run) == runs.records(finished)
