"""A way in which a data set can be malformed, and what comes of it; the cases stand in malformed_*.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from malformed_sets import GOOD, KINDS, CocoTree, Json, Object, Tree

from direct_pt.data.problems import ERROR
from direct_pt.data.sources import DataOptions

# Cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is spoilt, and what comes of it.

    Attributes:
        kind: of KINDS.
        spoil: makes the good set one that is not.
        after: the same, once all files are written.
        grade: ERROR, REPAIRED, NOTE, UNREADABLE or FINE.
        message: of ERROR and UNREADABLE: all of it, or how it begins where it ends in "...". FILE, SET and the like
            stand for paths: see Tree.paths.
        annotation: id that the problem names.
        counts: of repairs or notes, by kind.
        left: the objects that are read; of ERROR those that are where problems are collected, None where the split
            cannot be read, or nothing can.
        also: messages of further errors that are collected.
        split: that the problem belongs to.
        flags: makes other fields of DataOptions.
    """

    kind: str
    spoil: Callable[[Any], object]
    after: Callable[[Any], object]
    grade: str
    message: str
    annotation: int | None
    counts: dict[str, int]
    left: list[Object] | None
    also: tuple[str, ...]
    split: str
    flags: Callable[[Any], Json]

    def make(self, root: Path) -> tuple[Tree, DataOptions]:
        """The spoilt set in `root`, and how it is named."""
        tree = KINDS[self.kind](root / "set")
        self.spoil(tree)
        options = tree.write()
        self.after(tree)
        return tree, replace(options, **self.flags(tree))


CASES: dict[str, Case] = {}


def nothing(tree: Tree) -> None:
    """Spoil nothing."""


def add(name: str, grade: str, spoil: Callable[[Any], object] = nothing, message: str = "", **more: Any) -> None:
    """One case; its kind is the first word of its name."""
    assert name not in CASES, name
    values: Json = {"after": nothing, "annotation": None, "counts": {}, "also": (), "split": "train"}
    values |= {"left": None if grade == ERROR else GOOD, "flags": lambda tree: {}, **more}
    CASES[name] = Case(kind=name.split()[0], spoil=spoil, grade=grade, message=message, **values)


def put(key: str, row: int, name: str, value: Any) -> Callable[[CocoTree], None]:
    """Another value in one field of one COCO record."""
    return lambda tree: tree.train[key][row].__setitem__(name, value)


def cut(key: str, row: int, name: str) -> Callable[[CocoTree], object]:
    """A field less."""
    return lambda tree: tree.train[key][row].pop(name)


def text(change: Callable[[str], str | bytes]) -> Callable[[Any], None]:
    """Another text in the file of JSON."""

    def encode(content: str) -> bytes:
        changed = change(content)
        return changed if isinstance(changed, bytes) else changed.encode()

    return lambda tree: setattr(tree, "encode", encode)


def swap(old: str, new: str) -> Callable[[Any], None]:
    """Another piece of text in it."""
    return text(lambda content: content.replace(old, new, 1))


def file(name: str, content: str | bytes) -> Callable[[Tree], None]:
    """Another file."""
    return lambda tree: tree.put(name, content)


def loop(name: str) -> Callable[[Tree], None]:
    """A link to itself in place of a file."""

    def make(tree: Tree) -> None:
        path = tree.drop(name)
        path.symlink_to(path.name)

    return make


def folder(name: str) -> Callable[[Tree], None]:
    """A folder in place of a file."""
    return lambda tree: tree.drop(name).mkdir()


def all_of(*changes: Callable[[Any], object]) -> Callable[[Any], None]:
    """Several changes."""

    def change(tree: Any) -> None:
        for one in changes:
            one(tree)

    return change
