"""Problems of a data set: each one either ends the reading as an error, or is collected into a list."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from direct_pt.errors import InputError, printable

# The grades: training refuses errors, repairs are made and reported, notes may surprise.
ERROR, REPAIRED, NOTE = "error", "repaired", "note"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        grade: ERROR, REPAIRED or NOTE.
        kind: a few words that all problems of its kind share, such as "bbox"; they are counted by it.
        file: the file to correct, perhaps with a line ("labels/a.txt:3").
        message: what is wrong there, and the remedy.
        image: its file name or id, if the problem concerns one image.
        annotation: the source's own id, if the problem concerns one object.
    """

    grade: str
    kind: str
    file: str
    message: str
    image: str | int | None = None
    annotation: int | None = None

    def __str__(self) -> str:
        return printable(f"{self.file}: {self.message}")  # one line, whatever names are in it


class DataError(InputError):
    """A problem of grade ERROR, raised where it is found."""

    def __init__(self, kind: str, file: object, message: str, image: object = None, annotation: object = None) -> None:
        """`image` and `annotation` may be any JSON value; only text and whole numbers are kept."""
        self.problem = Problem(
            ERROR,
            kind,
            str(file),
            message,
            image if isinstance(image, str | int) else None,
            annotation if type(annotation) is int else None,
        )
        super().__init__(str(self.problem))


class Problems:
    """The problems of one split.

    Attributes:
        collects: whether reading continues after an error, without the faulty record, and every problem is listed;
            otherwise the first error ends the reading and other problems are only counted.
        listed: the problems, if they are collected.
    """

    def __init__(self, collects: bool = False) -> None:
        self.collects = collects
        self.listed: list[Problem] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[str, Problem] = {}  # of each kind of notes

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Around the reading of one record: its DataError ends here if problems are collected."""
        try:
            yield
        except DataError as error:
            if not self.collects:
                raise
            self.add(error.problem)

    def add(self, problem: Problem) -> None:
        """Count one problem, and list it if problems are collected."""
        self._counts[problem.grade, problem.kind] += 1
        if problem.grade == NOTE:
            self._first.setdefault(problem.kind, problem)
        if self.collects:
            self.listed.append(problem)

    def add_all(
        self, grade: str, kind: str, file: str, message: str, images: Sequence[str | int], annotations: Sequence[int]
    ) -> None:
        """The same problem of many objects, each given by its image and its annotation id."""
        self._counts[grade, kind] += len(annotations)
        if self.collects:
            rows = zip(images, annotations, strict=True)
            self.listed += [Problem(grade, kind, file, message, image, number) for image, number in rows]

    def summary(self) -> dict[str, int]:
        """The number of each kind of repairs and of notes, these with their first file."""
        notes = {}
        for kind, count in self.counts(NOTE).items():
            first = self._first.get(kind)
            notes[f"{kind}, such as {first.file}" if first else kind] = count
        return self.counts(REPAIRED) | notes

    def counts(self, grade: str) -> dict[str, int]:
        """The number of problems of each kind of one grade."""
        return {kind: count for (kind_grade, kind), count in self._counts.items() if kind_grade == grade and count}
