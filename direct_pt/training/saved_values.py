"""What the files of a run's folder may say: the one place with the type and range of each value in them."""

import json
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from direct_pt.data.mixing import MIXES
from direct_pt.errors import InputError, printable
from direct_pt.files import DamagedFile, parse_json, read_json, read_regular
from direct_pt.images.colors import MAX_COLOR_JITTER
from direct_pt.models.saved_config import ANCHOR_SCALES
from direct_pt.schema import (
    Check,
    WrongValue,
    anything,
    boolean,
    fail,
    list_of,
    mapping,
    number,
    one_of,
    optional,
    table,
    text,
    whole,
)
from direct_pt.training.image_flags import MAX_SCALE, MIN_SCALE
from direct_pt.training.plan import Plan
from direct_pt.training.progress import AVERAGED_STEPS, Progress
from direct_pt.transforms import FLIPS, SIZE_DIVISOR

SHARE = number(0, 1)
MAX_BATCH = 10**7  # all sizes that divide one are listed
MAX_SCALE_OF_LOSS = 1e38  # float32's

# config.json

PLAN: dict[str, Check] = {
    "images": whole(1),
    "processes": whole(1, MAX_BATCH),
    "global_batch_size": whole(1, MAX_BATCH),
    "micro_batch_size": whole(1, MAX_BATCH),
    "accumulation": whole(1, MAX_BATCH),
    "total_steps": whole(1),
    "lr": number(above=0),
    "warmup_steps": whole(),
    "warmup_factor": SHARE,
    "decay_steps": list_of(whole()),
    "cosine": boolean,
    "eval_steps": whole(1),
    "notes": list_of(text()),
}
CHOICES = table(
    {
        "canvas": optional(list_of(whole(SIZE_DIVISOR, 100_000), 2, 2)),
        "scale_jitter": list_of(number(MIN_SCALE, MAX_SCALE), 2, 2),
        "anchor_scale": optional(number(*ANCHOR_SCALES)),
    },
    {
        "mix": one_of(MIXES),
        "mix_share": SHARE,
        "flips": one_of(FLIPS),
        "color_jitter": number(0, MAX_COLOR_JITTER),
    },
)
SPLIT = optional(table({"images": whole(), "objects": whole(), "digest": text()}))
DATA = optional(table({"classes": mapping(text()), "train": SPLIT, "val": SPLIT}))


def read_plan(path: Path) -> Plan:
    """The plan in a run's config.json. Raises InputError."""
    try:
        values = _part_of(path, "plan")
        table(PLAN)(values, "plan")
        parts = [values[name] for name in ("micro_batch_size", "accumulation", "processes")]
        if values["global_batch_size"] != math.prod(parts):
            raise WrongValue(f"plan.global_batch_size is {values['global_batch_size']}, and its parts are {parts}")
    except (DamagedFile, WrongValue) as error:
        raise InputError(f"{path}: its plan cannot be read ({error}); choose another --output-dir") from error
    return Plan(**{**values, "decay_steps": tuple(values["decay_steps"]), "notes": tuple(values["notes"])})


def read_data_record(path: Path) -> dict[str, Any] | None:
    """The `data_record` in a run's config.json; None where there is none. Raises InputError."""
    try:
        values = _part_of(path, "data")
        DATA(values, "data")
        for key in values["classes"] if values else ():
            if not re.fullmatch(r"-?[0-9]{1,19}", key):
                raise WrongValue(f"data.classes has {key[:40]!r}, which is no category id")
    except (DamagedFile, WrongValue) as error:
        text = f"{path}: what it says of the data cannot be read ({error}); choose another --output-dir"
        raise InputError(text) from error
    return values


def read_choices(path: Path) -> dict[str, Any] | None:
    """The choices in a run's config.json, see `Choices.to_json`; None where there are none. Raises InputError."""
    try:
        if (values := _part_of(path, "choices")) is not None:
            check_choices(values)
    except (DamagedFile, WrongValue) as error:
        raise InputError(f"{path}: its choices cannot be read ({error}); choose another --output-dir") from error
    return values


def _part_of(path: Path, key: str) -> Any:
    """A part of a run's config.json; None where it is missing. Raises DamagedFile or WrongValue."""
    content = read_json(path)
    mapping(anything)(content, "its content")
    return content.get(key)


def check_choices(values: Any) -> None:
    """Raise WrongValue where a run's choices, see `Choices.to_json`, are none."""
    CHOICES(values, "choices")
    if values["scale_jitter"][0] > values["scale_jitter"][1]:
        fail("choices.scale_jitter", values["scale_jitter"], "the lower factor, then the higher one")
    if any(side % SIZE_DIVISOR for side in values["canvas"] or ()):
        fail("choices.canvas", values["canvas"], f"of multiples of {SIZE_DIVISOR}")


# checkpoints/

PROGRESS: dict[str, Check] = {
    "step": whole(),
    "skipped": whole(),
    "skipped_in_a_row": whole(),
    "mixed_in_a_row": whole(),
    "good_steps": whole(0, AVERAGED_STEPS),
    "average_loss": number(),
    "lowest_loss": optional(number()),
    "lowest_early": optional(number()),
    "calm_step": whole(),
    "last_norm": optional(number(0)),
    "failed_lr": optional(number(0)),
}
PLACE = table({"epoch": whole(), "shard": whole(), "row": whole()})
FEED = table({"place": PLACE, "skipped": whole(), "rank": whole(), "world": whole(1)})
LOG = table(
    {"losses": mapping(number())},
    {"updates": whole(), "largest_norm": optional(number(0)), "steps": whole(), "feed": optional(FEED)},
)
SCALER = table(
    {
        "scale": number(high=MAX_SCALE_OF_LOSS, above=0),
        "growth_factor": number(above=1),
        "backoff_factor": number(0, 1, above=0),
        "growth_interval": whole(1),
        "_growth_tracker": whole(),
    }
)
STATE = table(
    {
        "progress": table({"step": whole()}, PROGRESS),  # earlier runs counted less
        "scaler": optional(SCALER),
        "of_processes": list_of(LOG),
        "micro_batch_size": whole(),
    }
)


def check_state(facts: Any, step: int) -> None:
    """Raise WrongValue where the facts of a checkpoint of this step, by its folder's name, are none."""
    STATE(facts, "its facts")
    values: dict[str, Any] = {one.name: one.default for one in fields(Progress)} | facts["progress"]
    if values["step"] != step:
        raise WrongValue(f"progress.step is {values['step']}, and its folder's name says {step}")
    for low, high in (
        ("calm_step", "step"), ("skipped", "step"), ("skipped_in_a_row", "skipped"),
        ("mixed_in_a_row", "skipped_in_a_row"),
    ):  # fmt: skip
        if values[low] > values[high]:
            raise WrongValue(f"progress.{low} is {values[low]}, more than progress.{high}, {values[high]}")


# metrics.jsonl

AP = number(-1, 1)
FIGURES = table({"AP": AP, "AP50": AP, "AP75": AP}, is_open=True)
RECORD = table({"step": whole()}, {"bbox": FIGURES, "segm": FIGURES, "loss": optional(number())}, is_open=True)
LOGGED = table({"losses": mapping(number()), "lr": number(0)}, is_open=True)


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records in a run's metrics.jsonl, if there is one, and the numbers of the lines that hold none.

    A last line that a killed run did not finish is neither.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        lines = read_regular(path).split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); move it away") from error
    records, wrong = [], []
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            RECORD(record, "a record")
            if record.get("loss") is not None:
                LOGGED(record, "a record")
            json.dumps(record, allow_nan=False)
            records.append(record)
        except ValueError:
            if line_number < len(lines):
                wrong.append(line_number)
    return records, wrong


def warn_of_lines(path: Path, wrong: list[int], kept: Path) -> None:
    """Name on stderr the lines that hold no record, and where the whole file is kept."""
    count = f"{len(wrong)} line{'s' * (len(wrong) > 1)}"
    text = f"warning: {path}: {count} hold no record of a run, first line {wrong[0]}; left out, and kept in {kept}"
    print(printable(text), file=sys.stderr, flush=True)
