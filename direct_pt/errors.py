"""What ends a program, and its words."""

import re
from collections.abc import Mapping, Sequence


class InputError(Exception):
    """The input or the arguments are wrong. The message names the file or flag and the remedy."""


class TrainingStopped(Exception):
    """Training cannot continue; the work so far has been saved. The message says where, and what to do."""


class StopSignal(Exception):
    """A stop signal came (`exit_status` 128 + its number), or the time is up (0); the state is saved."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def first_names(names: Sequence[str], count: int = 3) -> str:
    """The first `count` names of a list, for messages: "a, b, ..."."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def class_differences(found: Mapping[int, str], expected: Mapping[int, str]) -> str:
    """How the classes {id: name} that are `found` differ from those that are `expected`, for messages."""
    parts = []
    for lead, classes in (("has", found.items() - expected.items()), ("lacks", expected.items() - found.items())):
        if classes:
            parts.append(f"{lead} {first_names([f'{number} {name!r}' for number, name in sorted(classes)])}")
    return f"of {len(found)} classes (id, name), it {' and '.join(parts)}"


def printable(text: str) -> str:
    """The text with escapes in place of control characters and lone surrogates, which names may contain.

    Controls of the writing direction and of lines count too: they could show a name as another one.
    """
    pattern = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(pattern, lambda match: ascii(match[0])[1:-1], text)


def printable_lines(text: str) -> str:
    """`printable` of each line."""
    return "\n".join(map(printable, text.split("\n")))
