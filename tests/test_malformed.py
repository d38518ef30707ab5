"""Malformed data sets: each is refused in words that help, or read as is said, and nothing outside of it is read."""

from direct_pt.program.run import run_program
import io
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import datasets
import malformed_coco
import malformed_hub
import malformed_labels
import numpy as np
import pytest
import small_runs as runs
from malformed import CASES, Case
from malformed_sets import AREA, COCO, FINE, SIZES, UNREADABLE, Object, Tree

from direct_pt.data.annotations import AnnotationTable, decode_name
from direct_pt.data.problems import ERROR, NOTE, REPAIRED, Problem, Problems
from direct_pt.data.sources import SPLITS, DataOptions, load_tables
from direct_pt.errors import InputError, printable
from direct_pt.images.decoding import UnreadableImage

FOLLOWING = (  # what follows from an image or a class that is left out
    "all splits must list the same",
    "'images' is empty; there is nothing to read",
    "none of its images can be read; the errors before this one say why",
)
CASE_FILES = (malformed_coco, malformed_hub, malformed_labels)  # each adds its cases to CASES when it is imported
IN_PROCESSES = ("plain box negative width", "voc billion laughs", "metadata name outside")


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The datasets library shows no progress, and keeps what it makes in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def named(text: str, tree: Tree) -> str:
    """A message with the names that cases use in place of paths."""
    for name, path in sorted(tree.paths().items(), key=lambda pair: -len(str(pair[1]))):
        text = text.replace(str(path), name)
    return text


def is_meant(text: str, expected: str) -> bool:
    """Whether a message is the expected one, as far as that goes."""
    return text.startswith(expected[:-3]) if expected.endswith("...") else text == expected


def read(options: DataOptions) -> tuple[int, str, dict[str, AnnotationTable]]:
    """Exit status, stderr and what is read, as a training program begins."""
    tables: dict[str, AnnotationTable] = {}
    with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
        run_program(lambda: tables.update(load_tables(options)))
    assert isinstance(end.value.code, int)
    return end.value.code, errors.getvalue(), tables


def collect(options: DataOptions) -> tuple[dict[str, list[Problem]], dict[str, AnnotationTable], str]:
    """All problems of each split, what is read in spite of them, and what ended it."""
    problems = {split: Problems(collects=True) for split in SPLITS}
    tables, ending = {}, ""
    try:
        tables = load_tables(options, SPLITS, problems)
    except InputError as error:
        ending = str(error)
    return {split: found.listed for split, found in problems.items()}, tables, ending


def objects_of(table: AnnotationTable) -> list[Object]:
    """Its objects."""
    images = np.repeat(np.arange(len(table)), np.diff(table.starts))
    stems = [Path(decode_name(name).split(", ")[-1]).stem for name in table.file_names.tolist()]
    rows = zip(images.tolist(), table.labels.tolist(), table.boxes.tolist(), strict=True)
    return [(stems[image], table.class_names[label], pytest.approx(box)) for image, label, box in rows]


def read_all_images(table: AnnotationTable) -> list[str]:
    """What is wrong with its images; those that can be read must have the size that the table says."""
    wrong = []
    for row in range(len(table)):
        try:
            assert table.read_image(row).shape == (*table.image_size(row), 3)
        except UnreadableImage as error:
            wrong.append(str(error))
    return wrong


class Watch:
    """The names of all files that this process opens while it is on."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.on = False
        sys.addaudithook(self.see)  # which stays for good

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        """One event of the interpreter."""
        if self.on and event == "open":
            self.opened.append(str(arguments[0]))


watch = Watch()


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """What is opened from `watch.on = True` on."""
    watch.opened = []
    yield watch.opened
    watch.on = False


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path, opened: list[str]) -> None:
    case = CASES[name]
    tree, options = case.make(tmp_path)
    watch.on = True
    status, errors, tables = read(options)
    problems, left, ending = collect(options)
    assert not [path for path in opened if path.endswith(("secret.jpg", "rows.arrow", "/etc/hostname", "/etc/passwd"))]
    if case.grade == ERROR:
        assert status == 2
        (line,) = errors.splitlines()
        assert is_meant(named(line, tree), f"error: {printable(case.message)}"), line
        check_collected(case, tree, problems, left, ending)
        return
    assert (status, errors) == (0, "")
    assert objects_of(tables["train"]) == case.left
    wrong = read_all_images(tables["train"])
    check_listed(case, tables["train"], problems["train"])
    if case.grade == UNREADABLE:
        assert wrong and is_meant(named(wrong[0], tree), case.message), wrong
    else:
        assert not wrong and not case.message


def check_collected(
    case: Case, tree: Tree, problems: dict[str, list[Problem]], left: dict[str, AnnotationTable], ending: str
) -> None:
    """Where problems are collected: the same error, with its file and its object, and no more than follows from it."""
    if ending:
        assert is_meant(named(ending, tree), case.message) and case.left is None
        return
    first, *others = [problem for of in problems.values() for problem in of if problem.grade == ERROR]
    others = [problem for problem in others if not problem.message.endswith(FOLLOWING)]
    assert len(others) == len(case.also), others
    for problem, expected in zip((first, *others), (case.message, *case.also), strict=True):
        assert is_meant(named(str(problem), tree), printable(expected)), problem
    assert first in problems[case.split] and first.annotation == case.annotation
    assert is_meant(f"{named(first.file, tree)}: {named(first.message, tree)}", case.message)
    assert ("train" in left) == (case.left is not None)
    if case.left is not None:
        assert objects_of(left["train"]) == case.left
        assert not read_all_images(left["train"])


def check_listed(case: Case, table: AnnotationTable, problems: list[Problem]) -> None:
    """What is mended and noted: nothing but what the case says. Other files than COCO's state no areas, or no sizes."""
    usual = set() if case.kind in COCO else {AREA} if case.kind in ("yolo", "voc") else {AREA, SIZES}
    told = {kind.partition(", such as ")[0]: count for kind, count in table.repairs.items() if kind not in usual}
    assert told == (case.counts if case.grade in (REPAIRED, NOTE) else {})
    listed = Counter((problem.grade, problem.kind) for problem in problems if problem.kind not in usual)
    assert listed == {(case.grade, kind): count for kind, count in case.counts.items()}
    if case.annotation is not None:
        assert case.annotation in {problem.annotation for problem in problems if problem.grade == case.grade}


def test_cases_cover_all_kinds_and_grades() -> None:
    kinds = Counter(case.kind for case in CASES.values())
    assert set(kinds) == {*COCO, "yolo", "voc", "metadata", "parquet", "saved"} and min(kinds.values()) >= 4
    assert {case.grade for case in CASES.values()} == {ERROR, REPAIRED, NOTE, UNREADABLE, FINE}


def test_as_a_user_sees_it(tmp_path: Path) -> None:
    started = []
    for name in IN_PROCESSES:
        tree, options = CASES[name].make(tmp_path / name)
        flags = ("--data", options.data, *runs.PRETRAIN, *runs.EIGHT, "--output-dir", tmp_path / name / "run")
        cache = {"HF_DATASETS_CACHE": tmp_path / "cache", "HF_DATASETS_DISABLE_PROGRESS_BARS": 1}
        started.append((name, tree, runs.start_script("pretrain", *flags, **cache)))
    for name, tree, process in started:
        printed, errors = process.communicate(timeout=120)
        assert (process.returncode, printed) == (2, ""), errors
        (line,) = errors.splitlines()
        assert is_meant(named(line, tree), f"error: {CASES[name].message}")
        assert not (tmp_path / name / "run").exists()
