"""The short form of faults.py: kills at random moments, in saves, of one of two processes; disks that fail."""

import shutil
from pathlib import Path

import faults
import pytest
import small_runs as runs
import surroundings

pytestmark = runs.cpu_only
KILLS, SEED = 3, 0
KILLS_OF_TWO = 2  # their starts take long


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo set, with objects that a detector finds."""
    return faults.demo_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> faults.Reference:
    """The run that nothing happens to, in one process."""
    return faults.make_reference(faults.Setup(data, 1, faults.SHORT), tmp_path_factory.mktemp("one") / "run")


@pytest.mark.parametrize("kind", ["anywhere", "saves"])
def test_killed_is_uninterrupted(kind: str, one: faults.Reference, tmp_path: Path) -> None:
    report = faults.kill_runs(kind, one, tmp_path, KILLS, SEED)
    assert not report.problems
    assert report.faults == len(report.restarts) == KILLS


def test_two_processes_killed_are_uninterrupted(data: Path, tmp_path: Path) -> None:
    reference = faults.make_reference(faults.Setup(data, 2, faults.SHORT), tmp_path / "uninterrupted")
    assert not faults.kill_runs("anywhere", reference, tmp_path / "killed", KILLS_OF_TWO, SEED).problems


@pytest.mark.parametrize("kind", surroundings.TROUBLES)
def test_what_a_run_meets(kind: str, one: faults.Reference, tmp_path: Path) -> None:
    try:
        report = surroundings.meet(kind, one, tmp_path, 1, SEED)
    except faults.NotPermitted as reason:
        pytest.skip(f"not permitted here: {reason}")
    assert not report.problems and report.faults == 1


# The small disk has room for the first evaluation's checkpoint, not for its best model.
@pytest.mark.parametrize(("kind", "amount"), [("small", 0.1), ("read-only", 0.0)])
def test_failing_disk(kind: str, amount: float, one: faults.Reference, tmp_path: Path) -> None:
    report = faults.Report(kind)
    try:
        faults.disk_trial(one, tmp_path / "disk", kind, amount, report)
    except faults.NotPermitted as reason:
        pytest.skip(f"nothing can be mounted here: {reason}")
    assert not report.problems and report.faults == 1


def test_disk_that_is_read_only_from_the_start(one: faults.Reference, tmp_path: Path) -> None:
    report = faults.Report("read-only from the start")
    try:
        faults.read_only_trial(one, tmp_path / "disk", report)
    except faults.NotPermitted as reason:
        pytest.skip(f"nothing can be mounted here: {reason}")
    assert not report.problems


def test_differences_are_found(one: faults.Reference, tmp_path: Path) -> None:
    """What the others rest on: a run is itself, and nothing escapes that was changed by a bit or left behind."""
    assert faults.differences(one.run, one) == [] == faults.damage(one.run)
    run = tmp_path / "run"
    shutil.copytree(one.run, run)
    path = run / f"checkpoints/step-{faults.SHORT}/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    (run / ".config.json.partial").touch()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], '{"step"\n', *lines[3:]]))
    assert len(faults.damage(run)) == 2
    (run / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    found = faults.differences(run, one)
    assert [text.split(":")[0] for text in found] == [str(path), "metrics.jsonl", ".config.json.partial"]
