"""What is wrong with a data set: found where it is read, and either the end of it or collected into a list."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from direct_pt.errors import InputError

ERROR, REPAIRED, NOTE = "error", "repaired", "note"  # the grades: training refuses; mends, and says so; may surprise


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        grade: ERROR, REPAIRED or NOTE.
        kind: a few words that all problems of its kind share, such as "bbox"; they are counted by it.
        file: that is to be mended, perhaps with a line ("labels/a.txt:3").
        message: what is wrong there and the remedy.
        image: its file name or id, where the problem is one image's.
        annotation: the source's own id, where the problem is one object's.
    """

    grade: str
    kind: str
    file: str
    message: str
    image: str | int | None = None
    annotation: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


class DataError(InputError):
    """A problem of grade ERROR, on its way to whoever collects them, or to the user."""

    def __init__(
        self,
        kind: str,
        file: object,
        message: str,
        image: str | int | None = None,
        annotation: int | None = None,
    ) -> None:
        self.problem = Problem(ERROR, kind, str(file), message, image, annotation)
        super().__init__(str(self.problem))


class Problems:
    """What was found in one split.

    Attributes:
        collects: whether reading goes on after an error, without what is wrong, and every problem is listed; otherwise
            the first error ends it and the others are counted only.
        listed: the problems, where they are collected.
    """

    def __init__(self, collects: bool = False) -> None:
        self.collects = collects
        self.listed: list[Problem] = []
        self._counts: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Around what may raise DataError for one record: it ends here where problems are collected."""
        try:
            yield
        except DataError as error:
            if not self.collects:
                raise
            self.add(error.problem)

    def add(self, problem: Problem) -> None:
        """One problem; an error among them is for those who collect."""
        self._counts[problem.grade, problem.kind] += 1
        if self.collects:
            self.listed.append(problem)

    def add_all(
        self, grade: str, kind: str, file: str, message: str, images: Sequence[str | int], annotations: Sequence[int]
    ) -> None:
        """The same problem of many objects: of each the image and the annotation's id."""
        self._counts[grade, kind] += len(annotations)
        if self.collects:
            rows = zip(images, annotations, strict=True)
            self.listed += [Problem(grade, kind, file, message, image, number) for image, number in rows]

    def counts(self, grade: str) -> dict[str, int]:
        """How many there are of each kind of one grade."""
        return {kind: count for (of, kind), count in self._counts.items() if of == grade and count}
