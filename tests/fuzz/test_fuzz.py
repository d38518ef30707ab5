"""The short form of fuzz.py: some inputs of each target; and what breaks a rule is found."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import fuzz
import numpy as np
import odd_data
import pytest
import rules
from hypothesis import strategies as st

from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.errors import InputError

SCRIPT = Path(__file__).with_name("fuzz.py")
INPUTS = 1000
Check = Callable[[Path, odd_data.Files], object]


def test_all_targets(tmp_path: Path) -> None:
    """In a fresh interpreter: what hypothesis makes depends on what is loaded."""
    command = [sys.executable, str(SCRIPT), "--inputs", str(INPUTS), "--output-dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and not any(tmp_path.iterdir()), run.stdout + run.stderr
    rows = run.stdout.splitlines()[1:]
    names = [target.name for target in fuzz.targets()]
    for name, row in zip([*names, "all"], rows, strict=True):
        inputs, accepted, refused = map(int, row.removeprefix(name).split()[:3])
        assert accepted and refused and inputs == accepted + refused, row
    assert inputs == pytest.approx(INPUTS, rel=0.05)


BAD: dict[str, tuple[Check, str]] = {
    "exception": (lambda folder, files: int("x"), "ValueError"),
    "hangs": (lambda folder, files: time.sleep(60), "took more than 1 seconds"),
    "hangs in C": (lambda folder, files: pow(3, 3**20), "took more than 1 seconds"),
    "crash": (lambda folder, files: ctypes.string_at(0), "ended with -11"),
    "exit": (lambda folder, files: os._exit(0), "ended with 0"),
    "memory": (lambda folder, files: bytearray(2**33), "MemoryError"),
    "numpy": (lambda folder, files: np.zeros(1) / 0, "RuntimeWarning"),
    "lists": (lambda folder, files: list(Path("/etc").iterdir()), "os.listdir '/etc'"),
    "opens": (lambda folder, files: (folder / "../stderr").read_bytes(), "open '"),
    "writes": (lambda folder, files: (folder / "file").write_text(""), "open '"),
    "removes": (lambda folder, files: (folder / "file").unlink(), "os.remove '"),
    "starts": (lambda folder, files: subprocess.run(["true"]), "subprocess.Popen"),
}


@pytest.fixture(scope="module")
def young() -> Iterator[ProcessPoolExecutor]:
    """A process that has done nothing yet: what other tests have freed in this one would be room beyond the limit."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def hunted(case: str, by: str) -> fuzz.Report:
    """What is found of a kind."""
    check, _ = BAD[case]
    marks = {"bytes": lambda rng: {"file": rng.choice((b"good", b"bad"))}}
    marks["documents"] = st.sampled_from((b"good", b"good", b"bad")).map(lambda content: {"file": content})

    def read(folder: Path, files: odd_data.Files) -> bool:
        if files["file"] == b"bad":
            check(folder, files)
        return True

    return fuzz.hunt(fuzz.Target("bad", {}, marks[by], read), 5, seed=1, limit=1.0)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("by", ["bytes", "documents"])
def test_what_breaks_a_rule_is_found(case: str, by: str, young: ProcessPoolExecutor) -> None:
    """At the input that does it, and the others are read nevertheless."""
    report, words = young.submit(hunted, case, by).result(), BAD[case][1]
    assert report.failures and report.inputs >= 5
    for failure in report.failures.values():
        assert words in failure.text and failure.files == {"file": b"bad"}


def test_smallest_document_of_each_kind() -> None:
    def read(folder: Path, files: odd_data.Files) -> bool:
        number = int(files["file"] or b"")
        if number > 1000:
            raise ValueError
        if number < -50:
            raise TypeError
        return True

    numbers = st.integers(-(10**6), 10**6).map(lambda number: {"file": str(number).encode()})
    report = fuzz.hunt(fuzz.Target("bad", {}, numbers, read), 300, seed=0)
    assert sorted(int(failure.files["file"] or b"") for failure in report.failures.values()) == [-51, 1001]


def test_saved_input_is_read_again(tmp_path: Path) -> None:
    targets = fuzz.targets()
    target = targets[0]
    files: odd_data.Files = {"file.json": b'{"\xff": \x00'}
    path = fuzz.save(fuzz.Failure("key", "text", files), target, tmp_path)
    again = fuzz.saved_input(path, targets)
    report = fuzz.hunt(again, 1, seed=0)
    assert (report.inputs, report.accepted, report.failures) == (1, 0, {})
    report = fuzz.hunt(replace(again, check=lambda folder, found: found != files), 1, seed=0)
    assert report.inputs == 1 and report.accepted == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in odd_data.usual_coco().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content or b"")
    return tmp_path


def test_unsound_tables_are_found(folder: Path) -> None:
    table = load_tables(DataOptions(data=folder))["train"]
    rules.check_table(table)
    assert not rules.different(table, load_tables(DataOptions(data=folder))["train"])
    shifted = table.starts.copy()
    shifted[1] += 1
    for changed in (
        {"boxes": table.boxes * np.nan},
        {"labels": table.labels + 2},
        {"sizes": table.sizes * 0},
        {"starts": table.starts[:-1]},
        {"starts": table.starts + 1},
        {"areas": table.areas[1:]},
        {"image_ids": table.image_ids * 0},
        {"class_names": ("cat", "cat")},
        {"segmentations": replace(table.segmentations, coordinates=table.segmentations.coordinates[1:])},
    ):
        with pytest.raises(rules.Broken):
            rules.check_table(replace(table, **changed))
    for changed in ({"starts": shifted}, {"areas": table.areas + 1}, {"class_names": ("a", "b")}, {"repairs": {}}):
        assert rules.different(table, replace(table, **changed))


def test_poor_messages_are_found(folder: Path) -> None:
    rules.refusal(InputError(f"{folder}: is wrong"), folder)
    out_of_memory = InputError(f"{folder}: cannot be read")
    out_of_memory.__cause__ = MemoryError()
    for error in (InputError("wrong"), InputError(f"{folder}: {'x' * 10**5}"), out_of_memory):
        with pytest.raises(rules.Broken):
            rules.refusal(error, folder)
