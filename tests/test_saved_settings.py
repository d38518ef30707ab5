"""Values of --config FILE, and of a run's config.json, pass the same checks as flags."""

import json
import math
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest

from direct_pt.errors import InputError
from direct_pt.recipes import STAGES
from direct_pt.training.settings import FinetuneFlags, Flags, PretrainFlags, option_groups, parse_flags

KINDS: dict[str, type[Flags]] = {"pretrain": PretrainFlags, "finetune": FinetuneFlags}
REQUIRED = {
    "pretrain": ["--model", "faster_rcnn_r50_fpn", "--output-dir", "run"],
    "finetune": ["--init", "pretrained", "--output-dir", "run"],
}
VALUES = (
    *("-2", "0", "NaN", "1e400", "-1e400", '"text"', '""', "null", "[]", "[8]", "[8, 8]", '{"a": 8}', "true", "false"),
    *("[null]", "[[8]]", "8.5", "1" + "0" * 400, '"8"', '"-2"', '"nan"'),
)
SWITCHES = {"true", "false", "null"}


def flags_of(stage: str) -> list[Field[Any]]:
    """All flags of a stage."""
    return [one for options in option_groups(KINDS[stage]).values() for one in fields(options)]


NAMES = [(stage, one.name) for stage in STAGES for one in flags_of(stage) if one.name != "resume"]


def read(stage: str, path: Path, *flags: str) -> dict[str, Any]:
    """All values, where a file says some of them."""
    return parse_flags(KINDS[stage], "", ["--config", str(path), *flags]).to_dict()


@pytest.mark.parametrize(("stage", "name"), NAMES)
def test_each_flag(stage: str, name: str, tmp_path: Path) -> None:
    """What is taken is what the flag itself takes; else one line names the file and the flag."""
    path = tmp_path / "config.json"
    one = next(one for one in flags_of(stage) if one.name == name)
    required = list(REQUIRED[stage])
    place = f"--{name.replace('_', '-')}"
    if place in required:
        del required[required.index(place) : required.index(place) + 2]
    for text in VALUES:
        path.write_text(f'{{"settings": {{"{name}": {text}}}}}')
        value = 8 if text == '"8"' else json.loads(text)  # text that says a number is one
        try:
            found = read(stage, path, *required)[name]
        except InputError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 1000
            assert one.default is not False or text not in SWITCHES or name == "streaming", line  # which needs --data
            assert str(path) in line or place in line or "cannot be read" in line, (text, line)
            continue
        assert not (isinstance(found, float) and not math.isfinite(found)), text
        if one.default is False:
            assert text in SWITCHES and found is (text == "true")
        elif value is None or (value == [] and found is None):
            assert found == (None if one.default is MISSING else one.default) or text == "null"
        else:
            assert not isinstance(value, bool | dict), text
            items, found_items = (one if isinstance(one, list) else [one] for one in (value, found))
            same = found_items == items or set(map(str, found_items)) == set(map(str, items))  # names count once
            assert same, (text, found)


@pytest.mark.parametrize(
    ("stage", "name"), [pair for pair in NAMES if pair[1] in (
        "global_batch_size", "micro_batch_size", "lr", "max_steps", "epochs", "channels", "save_every", "log_every",
        "image_size", "short_side", "keep_checkpoints", "eval_every", "clip_grad_norm", "ema", "num_workers",
    )]
)  # fmt: skip
def test_numbers_below_zero(stage: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("-2", "NaN", "1e400", '"text"', "[-2]", '{"a": 1}', "true", "false"):
        path.write_text(f'{{"settings": {{"{name}": {text}}}}}')
        with pytest.raises(InputError) as error:
            read(stage, path, *REQUIRED[stage])
        assert str(path) in str(error.value) and name.replace("_", "-") in str(error.value).replace("_", "-")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"settings": ' + '{"a":' * 300 + "1" + "}" * 301, "5", "null"])
def test_files_that_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"cannot be read as a run's config\.json") as error:
        read("pretrain", path, *REQUIRED["pretrain"])
    assert str(path) in str(error.value)


def test_kinds_of_lists(tmp_path: Path) -> None:
    """A list where a flag takes several, and nowhere else."""
    path = tmp_path / "config.json"
    path.write_text('{"settings": {"scale_jitter": [0.5, 1.5], "classes": ["a", "b"]}}')
    values = read("pretrain", path, *REQUIRED["pretrain"])
    assert (values["scale_jitter"], values["classes"]) == ([0.5, 1.5], ["a", "b"])
    for text, reason in (
        ('{"lr": [0.1]}', r"lr is \[0.1\]: write one value, not a list"),
        ('{"scale_jitter": [-1, 1]}', "scale-jitter: -1 must be above 0"),
        ('{"scale_jitter": [0.5]}', "expected 2 arguments"),
        ('{"streaming": 1}', "streaming is 1: write true or false"),
        ('{"lr": true}', "lr is True: write a number or text"),
        ('{"classes": [null]}', "write one value, or a list of values"),
    ):
        path.write_text(f'{{"settings": {text}}}')
        with pytest.raises(InputError, match=reason):
            read("pretrain", path, *REQUIRED["pretrain"])
