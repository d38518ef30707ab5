"""Checks of values that were read from JSON: types and ranges. A fault names the field and what it must be.

A check is a function of a value and its field's name, which raises WrongValue; `table` and `list_of` make checks out of
those of their parts.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from direct_pt.errors import first_names

Check = Callable[[Any, str], None]
LARGEST = sys.float_info.max
MAX_COUNT = 2**53  # whole numbers up to this are the same in every program that reads JSON
MAX_SHOWN = 60  # characters of a wrong value
MAX_TEXT = 100_000  # characters


class WrongValue(ValueError):
    """A field has a value that it must not have. The message names the field."""


def fail(name: str, value: Any, need: str) -> NoReturn:
    """Raise WrongValue."""
    shown = repr(value[:MAX_SHOWN] if isinstance(value, str | list) else value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    raise WrongValue(f"{name} is {shown}: it must be {need}")


def whole(low: int = 0, high: int = MAX_COUNT) -> Check:
    """A whole number from `low` to `high`."""

    def check(value: Any, name: str) -> None:
        if type(value) is not int or not low <= value <= high:
            fail(name, value, f"a whole number from {low} to {high}")

    return check


def number(low: float = -LARGEST, high: float = LARGEST, above: float | None = None) -> Check:
    """A finite number from `low` to `high`, and above `above`."""
    limits = [f"from {low:g}"] if low > -LARGEST else [f"above {above:g}"] if above is not None else []
    limits += [f"to {high:g}"] if high < LARGEST else []

    def check(value: Any, name: str) -> None:
        is_number = type(value) in (int, float)  # not bool
        if not is_number or not low <= value <= high or (above is not None and value <= above):
            fail(name, value, " ".join(["a finite number", *limits]))

    return check


def text(most: int = MAX_TEXT) -> Check:
    """Text of 1 to `most` characters that UTF-8 can say."""

    def check(value: Any, name: str) -> None:
        if (
            not isinstance(value, str)
            or not 0 < len(value) <= most
            or any(0xD800 <= ord(one) < 0xE000 for one in value)
        ):
            fail(name, value, f"text of 1 to {most} characters")

    return check


def one_of(choices: Collection[str]) -> Check:
    """One of some texts."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, str) or value not in choices:
            fail(name, value, f"one of {', '.join(choices)}")

    return check


def boolean(value: Any, name: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        fail(name, value, "true or false")


def anything(value: Any, name: str) -> None:
    """Any value."""


def optional(inner: Check) -> Check:
    """Null, or what `inner` takes."""

    def check(value: Any, name: str) -> None:
        if value is not None:
            inner(value, name)

    return check


def list_of(inner: Check, low: int = 0, high: int = MAX_COUNT) -> Check:
    """A list of `low` to `high` items, each of which `inner` takes."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, list) or not low <= len(value) <= high:
            count = f"{low}" if low == high else f"{low} or more" if high == MAX_COUNT else f"{low} to {high}"
            fail(name, value, "a list" + f" of {count} items" * bool(low or high < MAX_COUNT))
        for place, item in enumerate(value):
            inner(item, f"{name}[{place}]")

    return check


def mapping(inner: Check) -> Check:
    """An object with any names, each of whose values `inner` takes."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            fail(name, value, "an object")
        for key, item in value.items():
            inner(item, _inside(name, key))

    return check


def table(required: Mapping[str, Check], others: Mapping[str, Check] | None = None, is_open: bool = False) -> Check:
    """An object with some fields.

    Args:
        required: the check of each that must be there.
        others: the check of each that may be there.
        is_open: whether more fields may be there, with any value.
    """
    known = {**required, **(others or {})}

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            fail(name, value, "an object")
        if missing := [key for key in required if key not in value]:
            raise WrongValue(f"{name} lacks {first_names(missing)}")
        if not is_open and (unknown := [key[:MAX_SHOWN] for key in value if key not in known]):
            raise WrongValue(f"{name} has the unknown fields {first_names(unknown)}")
        for key, inner in known.items():
            if key in value:
                inner(value[key], _inside(name, key))

    return check


def _inside(name: str, key: str) -> str:
    """The name of a field of the object that `name` is."""
    return f"{name}.{key[:MAX_SHOWN]}"
