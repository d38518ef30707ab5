"""Command-line flags as fields of dataclasses: the name, default, help text and check of each are written once."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from direct_pt.errors import InputError

# Whether a flag may differ when a run is resumed: no; yes, as it says where and how the run works, not what it
# computes; yes, as a run that failed may need it to continue, and the banner says so.
FIXED, FREE, CHANGEABLE = "fixed", "free", "changeable"
MAX_EPOCHS = 1_000_000
MAX_SHOWN = 80  # characters of a path, in messages
Options = TypeVar("Options")
Number = TypeVar("Number", int, float)


def flag(
    default: Any,
    text: str,
    check: Callable[[str], Any] | None = None,
    *,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    many: bool = False,
    excludes: str = "",
    on_resume: str = FIXED,
) -> Any:
    """A field of an options class that is a flag of the command line.

    Args:
        default: what the field holds without the flag; MISSING where the user must give it; False for a switch.
        text: help; the default is added to it. {names} are filled in by `add_flags`.
        check: from the flag's text to the field's value; raises argparse.ArgumentTypeError. Text stays text without it.
            Path stands for `any_path`.
        choices: the texts that are accepted.
        metavar: what the help calls the value.
        many: whether it takes one value or more.
        excludes: flags with the same word here exclude each other.
        on_resume: FIXED, FREE or CHANGEABLE.
    """
    check = any_path if check is Path else check
    metadata = {
        "text": text, "check": check, "choices": choices, "metavar": metavar, "many": many, "excludes": excludes,
        "on_resume": on_resume,
    }  # fmt: skip
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


class _OneLineParser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line and exit status 2."""
    return _OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_flags(parser: argparse.ArgumentParser, options: type, title: str = "", **facts: Any) -> None:
    """Add the flags of an options class to a parser, in a group of that title; `facts` fill in the help texts."""
    group: Any = parser.add_argument_group(title) if title else parser
    exclusive: dict[str, Any] = {}
    for one in fields(options):
        spec, text = one.metadata, one.metadata["text"].format(**facts)
        if one.default is False:
            group.add_argument(flag_name(one.name), action="store_true", help=text)
            continue
        if one.default is not None and one.default is not MISSING:
            text += f" ({one.default})"
        target = group
        if word := spec["excludes"]:
            if word not in exclusive:
                exclusive[word] = group.add_mutually_exclusive_group()
            target = exclusive[word]
        target.add_argument(
            flag_name(one.name), default=None if one.default is MISSING else one.default, type=spec["check"],
            choices=spec["choices"], metavar=spec["metavar"], nargs="+" if spec["many"] else None, help=text,
        )  # fmt: skip


def read_flags(args: argparse.Namespace, options: type[Options]) -> Options:
    """The options that the parsed flags of `add_flags` say. Raises InputError where one is missing or impossible."""
    values: dict[str, Any] = {}
    for one in fields(options):  # type: ignore[arg-type]
        value = getattr(args, one.name)
        if value is None and one.default is MISSING:
            raise InputError(f"{flag_name(one.name)} is missing: {one.metadata['text']}")
        values[one.name] = tuple(value) if isinstance(value, list) else value
    return options(**values)


def paths_of(options: Any) -> list[Path]:
    """The paths that an options object holds."""
    values = [getattr(options, one.name) for one in fields(options)]
    listed = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return [item for item in listed if isinstance(item, Path)]


def flag_name(field_name: str) -> str:
    """The flag of a field."""
    return "--" + field_name.replace("_", "-")


def to_json(value: Any) -> Any:
    """A field's value as JSON holds it."""
    if isinstance(value, tuple):
        return [to_json(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def to_arguments(values: dict[str, Any], options: type) -> list[str]:
    """The command line that says what JSON `values` say of an options class, but for what the defaults say.

    Raises:
        InputError: a value that no flag can say.
    """
    arguments: list[str] = []
    for one in fields(options):
        name, value = flag_name(one.name), values.get(one.name)
        if value is None or value is False or value == to_json(one.default):
            continue
        items = value if isinstance(value, list) else [value]
        if one.default is False and value is not True:
            raise InputError(f"{one.name} is {value!r:.60}: write true or false")
        if any(isinstance(item, dict | list) for item in items):
            raise InputError(f"{one.name} is {value!r:.60}: write one value, or a list of values")
        if value is True:
            arguments.append(name)
        elif one.metadata["many"]:
            arguments += [name, *(f"./{item}" if str(item).startswith("-") else str(item) for item in items)]
        elif isinstance(value, list) and any("," in str(item) for item in items):
            raise InputError(f"{one.name} has a name with a comma, which {name} cannot say: rename it in the data")
        else:  # a list that is one word, as --classes a,b
            arguments.append(f"{name}={','.join(map(str, items))}")
    return arguments


# Checks of values, for `flag` and argparse


def any_path(text: str) -> Path:
    """A path that may lead to something, or not yet."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a file or folder")
    try:
        os.stat(text)  # noqa: PTH116 - Path.exists would raise some errors and hide others
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name too long, a loop of links, no permission, a null character
        short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
        raise argparse.ArgumentTypeError(f"{short}: {getattr(error, 'strerror', None) or error}") from None
    return Path(text)


def path_or_name(text: str) -> str:
    """A path, or the name of something on the hub."""
    any_path(text)
    return text


def _number(kind: type[Number], text: str) -> Number:
    """argparse's own message would name the function that was to read it."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """The check of a whole number from `low` to `high`."""

    def check(text: str) -> int:
        value = _number(int, text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} must {'be above 0' if low == 1 else 'not be below 0'}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text:.30} must be at most {high}")
        return value

    return check


positive_integer = whole_number(1, 10**9)
not_negative_integer = whole_number(0, 10**9)
pixels = whole_number(1, 20_000)  # a side of images
batch_size = whole_number(1, 10**6)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _number(float, text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be {'above 0' if value <= 0 else 'a finite number'}")
    return value


def epoch_count(text: str) -> float:
    """A number of passes over the data, above 0."""
    value = positive_float(text)
    if value > MAX_EPOCHS:
        raise argparse.ArgumentTypeError(f"{text} must be at most {MAX_EPOCHS:,}")
    return value


def share(text: str) -> float:
    """A number from 0 to below 1."""
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to below 1")
    return value


def decay(text: str) -> float:
    """A number between 0 and 1."""
    value = _number(float, text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1, such as 0.999")
    return value


def names(text: str) -> tuple[str, ...]:
    """Words between commas, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("names no class: give some, such as person,car")
    return found


def integer_or_auto(text: str) -> int | str:
    """A whole number above 0, or "auto"."""
    return text if text == "auto" else batch_size(text)
