"""Command-line flags as fields of dataclasses: the name, default, help text and check of each are written once."""

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from direct_pt.errors import InputError

# Whether a flag may differ when a run is resumed: no; yes, as it says where and how the run works, not what it
# computes; yes, as a run that failed may need it to continue, and the banner says so.
FIXED, FREE, CHANGEABLE, LENGTH = "fixed", "free", "changeable", "length"
MAX_EPOCHS = 1_000_000
MAX_SHOWN = 80  # characters of a path, in messages
QUOTED_NAME = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?=,|$)')
PLAIN_NAME = re.compile(r'(?!\s*")([^,]*)')
Options = TypeVar("Options")
Number = TypeVar("Number", int, float)


def flag(
    default: Any,
    text: str,
    check: Callable[[str], Any] | None = None,
    *,
    choices: Sequence[str] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    many: bool | int = False,
    excludes: str = "",
    on_resume: str = FIXED,
    alias: str = "",
) -> Any:
    """A field of an options class that is a flag of the command line.

    Args:
        default: what the field holds without the flag; MISSING where the user must give it; False for a switch.
        text: help; the default is added to it. {names} are filled in by `add_flags`.
        check: from the flag's text to the field's value; raises argparse.ArgumentTypeError. Text stays text without it.
            Path stands for `any_path`.
        choices: the texts that are accepted.
        metavar: what the help calls the value.
        many: True if it takes one value or more, a number if it takes so many; `metavar` then names each.
        excludes: flags with the same word here exclude each other.
        on_resume: FIXED, FREE, CHANGEABLE, or LENGTH (a run may be made longer).
        alias: another flag for the same.
    """
    check = any_path if check is Path else check
    metadata = {
        "text": text, "check": check, "choices": choices, "metavar": metavar, "many": many, "excludes": excludes,
        "on_resume": on_resume, "alias": alias,
    }  # fmt: skip
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


class _OneLineParser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        near = [close for word in flags for close in get_close_matches(word, self._option_string_actions, 1)]
        raise InputError(f"{message}{(near and f'; did you mean {near[0]}?') or ''} (see --help)")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line and exit status 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    return _OneLineParser(description=description, formatter_class=formatter, allow_abbrev=False)


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
            default = " ".join(map(str, one.default)) if isinstance(one.default, tuple) else one.default
            text += f" ({default})"
        target = group
        if word := spec["excludes"]:
            if word not in exclusive:
                exclusive[word] = group.add_mutually_exclusive_group()
            target = exclusive[word]
        aliases = [spec["alias"]] if spec["alias"] else []
        target.add_argument(
            flag_name(one.name), *aliases, default=None if one.default is MISSING else one.default, type=spec["check"],
            choices=spec["choices"], metavar=spec["metavar"], nargs=_nargs(spec["many"]), help=text,
        )  # fmt: skip


def _nargs(many: bool | int) -> str | int | None:
    """What argparse calls `flag`'s `many`."""
    return "+" if many is True else many or None


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
        name, value, is_switch = flag_name(one.name), values.get(one.name), one.default is False
        if value is None:
            continue
        if is_switch != isinstance(value, bool):
            need = "true or false" if is_switch else "a number or text"
            raise InputError(f"{one.name} is {value!r:.60}: write {need}")
        if value is False or value == to_json(one.default):
            continue
        if value is True:
            arguments.append(name)
            continue
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list | bool) or item is None for item in items):
            raise InputError(f"{one.name} is {value!r:.60}: write one value, or a list of values")
        if one.metadata["many"]:
            texts = (f"./{item}" if isinstance(item, str) and item.startswith("-") else str(item) for item in items)
            arguments += [name, *texts]
        elif isinstance(value, list) and one.metadata["check"] is not names:
            raise InputError(f"{one.name} is {value!r:.60}: write one value, not a list")
        elif isinstance(value, list):  # in one word, as --classes a,b
            arguments.append(f"{name}={','.join(map(quoted_name, map(str, items)))}")
        else:
            arguments.append(f"{name}={value}")
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
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a {'whole ' if kind is int else ''}number") from None


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """The check of a whole number from `low` to `high`."""

    def check(text: str) -> int:
        value = _number(int, text)
        if value < low:
            limit = {0: "not be below 0", 1: "be above 0"}.get(low, f"be at least {low}")
            raise argparse.ArgumentTypeError(f"{text:.30} must {limit}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text:.30} must be at most {high}")
        return value

    return check


positive_integer = whole_number(1, 10**9)
not_negative_integer = whole_number(0, 10**9)
pixels = whole_number(1, 20_000)  # a side of images
batch_size = whole_number(1, 10**6)
worker_count = whole_number(0, 1000)
random_seed = whole_number(0, 2**32 - 1)


def positive_number(high: float) -> Callable[[str], float]:
    """The check of a number above 0, and up to `high`."""

    def check(text: str) -> float:
        value = _number(float, text)
        if not 0 < value <= high:
            limit = f"at most {high:,.15g}" if math.isfinite(value) else "a finite number"
            limit = "above 0" if value <= 0 else limit
            raise argparse.ArgumentTypeError(f"{text:.30} must be {limit}")
        return value

    return check


positive_float = positive_number(1e9)
epoch_count = positive_number(MAX_EPOCHS)  # passes over the data


def number_up_to(limit: float) -> Callable[[str], float]:
    """The check of a number from 0 to `limit`."""

    def check(text: str) -> float:
        value = _number(float, text)
        if not 0 <= value <= limit:
            raise argparse.ArgumentTypeError(f"{text:.30} must be from 0 to {limit:g}")
        return value

    return check


def share(text: str) -> float:
    """A number from 0 to below 1."""
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text:.30} must be from 0 to below 1")
    return value


def decay(text: str) -> float:
    """A number between 0 and 1."""
    value = _number(float, text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text:.30} must be between 0 and 1, such as 0.999")
    return value


def names(text: str) -> tuple[str, ...]:
    """Words between commas, each once. One with a comma or outer spaces stands in double quotes, its own doubled."""
    found: list[str] = []
    position = 0
    while position <= len(text):
        item = QUOTED_NAME.match(text, position) or PLAIN_NAME.match(text, position)
        if item is None:
            raise argparse.ArgumentTypeError(f'{text[position:]:.60}: has a quote that does not end; write "A, B",C')
        found.append(item[1].replace('""', '"') if item.re is QUOTED_NAME else item[1].strip())
        position = item.end() + 1  # behind the comma
    if not any(found):
        raise argparse.ArgumentTypeError("names no class: give some, such as person,car")
    return tuple(dict.fromkeys(filter(None, found)))


def quoted_name(name: str) -> str:
    """A name as `names` reads it."""
    if "," in name or name != name.strip() or name.startswith('"'):
        return '"' + name.replace('"', '""') + '"'
    return name


def number_or_auto(text: str) -> float | str:
    """A finite number above 0, or "auto"."""
    return text if text == "auto" else positive_float(text)


def integer_or_auto(text: str) -> int | str:
    """A whole number above 0, or "auto"."""
    return text if text == "auto" else batch_size(text)


def environment_number(name: str, default: int | None, low: int, high: int) -> int:
    """The whole number in an environment variable. Raises InputError."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,18}", text) or not low <= int(text) <= high:
        what = f"{name}={text:.40}" if text else f"{name} is not set"
        raise InputError(f"{what}: it must be a whole number from {low} to {high}")
    return int(text)
