"""The size of the source code: lines by folder, the files to read first, functions, docstrings, tests."""

import ast
import re
from pathlib import Path

from benchmarks.rows import Row, row

ROOT = Path(__file__).parents[2]
HEADING = "Read it in an evening"
MAX_EVENING_LINES = 3_900


def measure_code() -> list[Row]:
    """Lines by folder and of the evening path, and what the functions look like."""
    rows: list[Row] = []
    sources = python_files("direct_pt", "scripts")
    for folder in sorted({path.parent for path in sources}):
        counts = [count_lines(path) for path in sources if path.parent == folder]
        rows.append(row("size", str(folder.relative_to(ROOT)), sum(counts), f"lines in {len(counts)} files"))
    rows.append(row("size", "direct_pt and scripts", sum(map(count_lines, sources)), f"lines in {len(sources)} files"))
    path = evening_path()
    target = f"under {MAX_EVENING_LINES:,}"
    rows.append(row("size", HEADING, sum(map(count_lines, path)), f"lines in {len(path)} files", target=target))
    rows += [row("size", f"  {file.relative_to(ROOT)}", count_lines(file), "lines") for file in path]

    trees = [ast.parse(file.read_text()) for file in sources]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    private = [function for function in functions if re.match(r"_(?!_)", function.name)]
    docstrings = sum(map(docstring_lines, nodes))
    tests = python_files("tests")
    return [
        *rows,
        row("size", "mean function", sum(map(node_lines, functions)) / len(functions), "lines"),
        row("size", "private functions", 100 * len(private) / len(functions), "% of the functions"),
        row("size", "docstrings", 100 * docstrings / sum(map(count_lines, sources)), "% of the lines"),
        row("size", "tests", sum(map(count_lines, tests)), f"lines in {len(tests)} files"),
    ]


def python_files(*folders: str) -> list[Path]:
    """The Python files of folders of the repository, with those of their subfolders, by name."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def evening_path() -> list[Path]:
    """The files that the README names, in its order, for reading the way from the images to the metrics."""
    text = (ROOT / "README.md").read_text().partition(f" {HEADING}\n")[2]
    section = re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]
    named = re.findall(r"\b(?:direct_pt|scripts)/[\w/]+\.py\b", section)
    return [ROOT / name for name in dict.fromkeys(named)]


def count_lines(path: Path) -> int:
    """Of a file, blank ones and comments included."""
    return len(path.read_text().splitlines())


def node_lines(node: ast.stmt) -> int:
    """From the first line of a statement to its last."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def docstring_lines(node: ast.AST) -> int:
    """The lines of the docstring of a module, class or function; 0 without one."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return node_lines(node.body[0]) if ast.get_docstring(node) is not None else 0
    return 0
