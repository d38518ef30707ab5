"""Every number that a program takes, from a flag or the launcher's environment, has limits, and says them in a line."""

import argparse
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_runs as runs
import torch

from direct_pt import flags
from direct_pt.distributed.launch import join_processes, join_seconds
from direct_pt.errors import InputError
from direct_pt.models.detector import DetectorConfig, build_detector
from direct_pt.recipes import STAGES
from direct_pt.training.limits import check_channels, check_images_at_once, check_run
from direct_pt.training.plan import make_plan
from direct_pt.training.settings import FinetuneFlags, PretrainFlags, ScheduleOptions, is_restart, parse_flags
from direct_pt.transforms import FinetunePreset, Preset, PretrainPreset, TestPreset

SCRIPTS = sorted(path.stem for path in runs.SCRIPTS.glob("*.py"))
NO_NUMBERS = ("nan", "inf", "-inf", "-2", "1e308", "-1e308", str(10**30), "9" * 5000, "x", "", " ", "1e", "0x10", "1,5")
LARGE = ("--image-size", 19968, "--global-batch-size", 64)
SHORT = 300  # characters of a message


class ParserMade(Exception):
    """With the parser of a script, in place of its work."""


def parser_of(script: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script makes."""

    def stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise ParserMade(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module = runs.load_script(script)
        with pytest.raises(ParserMade) as made:
            module.main()
    parser = made.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All flags of a parser, and of those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)
        else:
            yield action


def value_of(check: Any, text: str) -> Any:
    """What a check of argparse makes of a text; None where it refuses it as it should."""
    try:
        return check(text)
    except argparse.ArgumentTypeError as error:
        message = str(error)
        assert message.strip() and "\n" not in message and len(message) < SHORT, message
        return None


def takes_numbers(action: argparse.Action) -> bool:
    """Whether a flag is one of numbers."""
    if action.type is None or action.choices is not None:
        return False
    found = [value_of(action.type, text) for text in ("1", "64", "0.5")]
    return any(isinstance(value, int | float) for value in found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_every_script_has_limits(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that will be added is found here, too: by what its check makes of a number."""
    numbers = [action for action in actions(parser_of(script, monkeypatch)) if takes_numbers(action)]
    if script in ("pretrain", "finetune", "evaluate", "predict", "check_data", "make_demo_data", "benchmark"):
        assert len(numbers) >= 1
    for action, text in itertools.product(numbers, NO_NUMBERS):
        assert value_of(action.type, text) is None, f"{action.option_strings} takes {text!r:.20}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_line_names_the_flag(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"pretrain": PretrainFlags, "finetune": FinetuneFlags}[stage]
    required = {"pretrain": ["--model", "faster_rcnn_r50_fpn"], "finetune": ["--init", "run"]}[stage]
    parser = parser_of(stage, monkeypatch)
    numbers = [action for action in actions(parser) if takes_numbers(action)]
    assert len(numbers) > 15
    for action, text in itertools.product(numbers, ("nan", "inf", "-2", "1e308", str(10**30), "x")):
        name, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
        with pytest.raises(InputError, match=name) as error:
            parse_flags(kind, "", [*required, "--output-dir", "run", f"{name}={text}", *[text] * (count - 1)])
        assert "\n" not in str(error.value) and len(str(error.value)) < SHORT


def test_numbers_that_are_taken() -> None:
    """The limits themselves."""
    taken: list[tuple[Any, str, str, str]] = [
        (flags.random_seed, "0", str(2**32 - 1), str(2**32)),
        (flags.worker_count, "0", "1000", "1001"),
        (flags.batch_size, "1", "1000000", "1000001"),
        (flags.pixels, "1", "20000", "20001"),
        (flags.positive_float, "1e-300", "1e9", "1.1e9"),
        (flags.epoch_count, "0.01", "1000000", "1000001"),
        (flags.share, "0", "0.999", "1"),
        (flags.number_up_to(1), "0", "1", "1.01"),
    ]
    for check, low, high, beyond in taken:
        assert check(low) == float(low) and check(high) == float(high)
        assert value_of(check, beyond) is None


# Products, which no flag alone shows to be absurd


def plan_of(micro_batch: int, accumulation: int = 1) -> Any:
    options = ScheduleOptions(global_batch_size=micro_batch * accumulation, micro_batch_size=micro_batch)
    recipe = STAGES["pretrain"].recipe("faster_rcnn_r50_fpn", "sgd", "paper")
    return make_plan(options, recipe, 1000, 1)


def detector_of(**fields: Any) -> Any:
    config = replace(DetectorConfig("faster_rcnn_r50_fpn", ("a",), (1,), "test_resnet", channels=16), **fields)
    return build_detector(config.name, config=config).train()


def refusal(preset: Preset, plan: Any, detector: Any) -> str:
    """Of a run, in one line; "" if it is not refused."""
    try:
        check_run(plan, detector, preset)
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def test_products_beyond_the_memory() -> None:
    detector, gigabytes = detector_of(), psutil.virtual_memory().total / 1e9
    assert refusal(PretrainPreset(448), plan_of(8, 8), detector) == ""
    assert refusal(FinetunePreset(800, 1333), plan_of(2, 8), detector) == ""
    message = refusal(PretrainPreset(19_968), plan_of(1000), detector)
    assert message.startswith("--micro-batch-size 1000: so many images of 19968x19968 pixels take 5.98e+03 GB, and")
    assert f"{gigabytes:.3g} GB: use at most {int(gigabytes * 1e9 / (19_968**2 * 15))}" in message
    message = refusal(PretrainPreset(448), plan_of(8, 125_000), detector)
    assert message.startswith("--global-batch-size 1000000: the images of a step, of 448x448 pixels, take 602 GB, and")
    most = int(message.rpartition(" ")[2])
    assert most % 8 == 0 and refusal(PretrainPreset(448), plan_of(8, most // 8), detector) == ""
    message = refusal(PretrainPreset(448), plan_of(8), detector_of(rois_per_image=100_000_000))
    assert message.startswith("--rois-per-image 100000000: their features would take over ")
    with pytest.raises(
        InputError, match=r"--micro-batch-size 1000000: so many images of 1344x800 pixels .*use at most"
    ):
        check_images_at_once(10**6, TestPreset())


def test_channels_beyond_the_memory() -> None:
    config = DetectorConfig("faster_rcnn_r50_fpn", ("a",), (1,), "resnet50")
    assert check_channels(config) is config
    with pytest.raises(
        InputError, match=r"--channels 1000000: their weights would take over .*use at most \d+"
    ) as error:
        check_channels(DetectorConfig("faster_rcnn_r50_fpn", ("a",), (1,), "resnet50", channels=10**6))
    most = int(str(error.value).rpartition(" ")[2])
    check_channels(DetectorConfig("faster_rcnn_r50_fpn", ("a",), (1,), "resnet50", channels=most))


@pytest.mark.parametrize(
    ("preset", "micro_batch", "norm", "is_refused"),
    [
        (PretrainPreset(32), 1, "batch", True),
        (PretrainPreset(32), 2, "batch", False),
        (PretrainPreset(64), 1, "batch", False),
        (PretrainPreset(32, canvas=(32, 64)), 1, "batch", False),
        (PretrainPreset(32), 1, "group", False),
        (FinetunePreset(32, 64), 1, "batch", True),
        (FinetunePreset(33, 64), 1, "batch", False),
    ],
)
def test_batchnorm_on_one_value(preset: Preset, micro_batch: int, norm: str, is_refused: bool) -> None:
    """What is refused fails in a step, and what is not does not."""
    detector, plan = detector_of(norm=norm), plan_of(micro_batch)
    message = refusal(preset, plan, detector)
    assert (
        message.startswith("--micro-batch-size 1 with images of 32x32 pixels: BatchNorm") if is_refused else not message
    )
    size = preset.padded_size((32, 33) if isinstance(preset, FinetunePreset) and preset.short_side == 33 else (32, 32))
    images = torch.zeros(micro_batch, 3, *size)
    if is_refused:
        with pytest.raises(ValueError, match="more than 1 value"):
            detector.backbone(images)
        detector.freeze_for_finetuning("norm")
        assert refusal(preset, plan, detector) == ""
    detector.backbone(images)


# The launcher's environment


@pytest.mark.parametrize("text", ["abc", "-2", "1.5", str(10**30), "9" * 5000, "nan", "1 2", "٣"])
def test_numbers_in_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, read in (
        ("DIRECT_PT_JOIN_SECONDS", join_seconds),
        ("WORLD_SIZE", join_processes),
        ("LOCAL_WORLD_SIZE", join_processes),
        ("LOCAL_RANK", join_processes),
        ("TORCHELASTIC_RESTART_COUNT", is_restart),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, text)
            with pytest.raises(InputError, match=rf"^{name}=.*must be a whole number from -?\d+ to \d+$") as error:
                read()
            assert len(str(error.value)) < SHORT


def test_a_launcher_that_says_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes, each needs a number, and a place to meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("direct_pt.distributed.launch._cpu_requested", True)
    for name, value, message in (
        ("RANK", "0", "RANK is not set: it must be a whole number from 0 to 1"),
        ("MASTER_PORT", "29500", "MASTER_PORT is not set: it must be a whole number from 1 to 65535"),
        ("MASTER_ADDR", "", "WORLD_SIZE=2, but MASTER_ADDR is not set: start processes with a launcher"),
    ):
        monkeypatch.delenv(name, raising=False)
        with pytest.raises(InputError, match=message):
            join_processes()
        if value:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match="RANK=2: it must be a whole number from 0 to 1"):
        join_processes()


def test_absurd_runs_end_at_once(demo: Path, tmp_path: Path) -> None:
    """As programs: one line, status 2, nothing written."""
    for flags_given, words in (
        (("--channels", 16384), "--channels 16384: their weights"),
        ((*LARGE, "--micro-batch-size", 64), "--micro-batch-size 64: so many images of 19968x19968"),
        (("--image-size", 32, "--global-batch-size", 1, "--micro-batch-size", 1), "BatchNorm would see one value"),
    ):
        output = tmp_path / "run"
        with pytest.raises(InputError, match=words):
            runs.train("pretrain", *runs.TINY, "--data", demo, "--output-dir", output, *flags_given)
        assert not output.exists()
    assert "WORLD_SIZE" not in os.environ
