"""Which git revision the start banner names: that of this project's own checkout, or the installed version."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from direct_pt.training.banner import git_revision


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit and a tag, which nothing of this project has."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/main.py").write_text("import direct_pt\n")
    git(tmp_path / "repository", "init", "-q")
    commit(tmp_path / "repository", "theirs-1")
    return tmp_path / "repository"


def commit(folder: Path, tag: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    git(folder, "tag", "-a", "-m", tag, tag)


def package(parent: Path) -> Path:
    (parent / "direct_pt").mkdir(parents=True)
    (parent / "direct_pt/__init__.py").write_text("")
    return parent / "direct_pt"


@pytest.fixture
def version() -> str:
    try:
        return f"version {importlib.metadata.version('direct-pt')}"
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def test_own_checkout(repository: Path, tmp_path: Path) -> None:
    folder = package(repository)
    commit(repository, "ours-2")
    assert git_revision(folder) == "ours-2"
    (tmp_path / "link").symlink_to(repository)  # as an editable installation may lead there
    assert git_revision(tmp_path / "link/direct_pt") == "ours-2"
    (folder / "__init__.py").write_text("changed = True\n")
    assert git_revision(folder) == "ours-2-dirty"


@pytest.mark.parametrize("is_tracked", [False, True])
def test_installed_inside_a_repository(repository: Path, version: str, is_tracked: bool) -> None:
    """The user's environment, or a copy in a folder of their repository."""
    folder = package(repository / "venv/lib/site-packages")
    if is_tracked:
        commit(repository, "theirs-2")
    assert git_revision(folder) == version


def test_untracked_at_the_top(repository: Path, version: str) -> None:
    assert git_revision(package(repository)) == version


def test_no_repository_at_all(tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_revision(package(tmp_path / "site-packages")) == version
    monkeypatch.setenv("PATH", str(tmp_path))  # and no git
    assert git_revision(tmp_path / "site-packages/direct_pt") == version


def test_started_by_a_hook(repository: Path, tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """git names its hooks the repository that they belong to."""
    folder = package(tmp_path / "site-packages")
    for name, place in (("GIT_DIR", repository / ".git"), ("GIT_WORK_TREE", tmp_path / "site-packages")):
        monkeypatch.setenv(name, str(place))
    git(tmp_path, "add", "-A")
    assert git_revision(folder) == version
