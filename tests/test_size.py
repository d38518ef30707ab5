"""The source code stays small: the files to read first, and each file."""

from pathlib import Path

from benchmarks.code_size import MAX_EVENING_LINES, ROOT, count_lines, evening_path, python_files

MAX_FILE_LINES, MAX_TEST_LINES = 450, 800


def longer(files: list[Path], limit: int) -> dict[str, int]:
    """The lines of each file that has more than `limit`."""
    return {str(path.relative_to(ROOT)): count_lines(path) for path in files if count_lines(path) > limit}


def test_the_evening_path_is_short() -> None:
    path = evening_path()
    assert len(path) >= 20 and len(set(path)) == len(path)
    lines = {str(file.relative_to(ROOT)): count_lines(file) for file in path}
    assert sum(lines.values()) < MAX_EVENING_LINES, lines


def test_no_source_file_is_long() -> None:
    assert longer(python_files("direct_pt", "scripts"), MAX_FILE_LINES) == {}


def test_no_test_file_is_long() -> None:
    assert longer(python_files("tests"), MAX_TEST_LINES) == {}
