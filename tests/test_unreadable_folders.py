"""Folders without permission: an error that names them, whatever the format. None of their images is a negative."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_runs as runs
from malformed_sets import KINDS
from small_detectors import small_detector

from direct_pt.checkpoint import save_model
from direct_pt.data.problems import ERROR, Problems
from direct_pt.data.sources import load_tables
from direct_pt.errors import InputError

NOBODY = 65534
CLOSED, LISTED, ENTERED = 0o000, 0o444, 0o111  # folders: nothing is allowed; only names; only what one knows by name


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that anyone may enter: pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    for place, _, _ in os.walk(path):
        Path(place).chmod(0o755)
    shutil.rmtree(path)


PLACES = {  # of each kind of set, folders that are needed
    "plain": (".", "annotations", "images"),
    "roboflow": (".", "train"),
    "yolo": (".", "images", "images/train", "labels", "labels/train"),
    "voc": (".", "Annotations", "JPEGImages", "ImageSets", "ImageSets/Main"),
    "metadata": (".", "train"),
    "saved": (".", "train"),
}


@pytest.mark.parametrize("mode", [CLOSED, LISTED, ENTERED], ids=["closed", "listed", "entered"])
@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in PLACES.items() for place in places])
def test_data_sets(kind: str, place: str, mode: int, folder: Path) -> None:
    """Refused, or read in whole where what is allowed suffices."""
    tree = KINDS[kind](folder / "set")
    options = tree.write()
    whole = load_tables(options, ["train"])["train"]
    for path in [tree.folder, *tree.folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tree.folder / place).chmod(mode)
    collected = {split: Problems(collects=True) for split in ("train", "val", "test")}
    with unprivileged():
        try:
            table = load_tables(options, ["train"], required="train")["train"]
            assert (len(table), len(table.boxes)) == (len(whole), len(whole.boxes))
            assert mode == ENTERED
        except InputError as error:
            named = str(tree.folder / place) in str(error) or place == "."
            assert named or (f"'{place}/train'" in str(error) and "(Permission denied)" in str(error)), error
        try:
            found = load_tables(options, ["train"], collected).get("train")
        except InputError:
            return
        complete = found is not None and (len(found), len(found.boxes)) == (len(whole), len(whole.boxes))
        assert complete or collected["train"].counts(ERROR)


@pytest.mark.parametrize("mode", [CLOSED, LISTED, ENTERED], ids=["closed", "listed", "entered"])
def test_predict(mode: int, demo: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(folder / "model", small_detector(), [])
    (folder / "photos/more").mkdir(parents=True)
    shutil.copy(min((demo / "images").glob("val_*.jpg")), folder / "photos/more/a.jpg")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "found").mkdir()
    (folder / "found").chmod(0o777)
    (folder / "photos/more").chmod(mode)
    flags = ("--checkpoint", folder, "--output-dir", folder / "found", *runs.MACHINE)
    with unprivileged(), pytest.raises(InputError) as error:
        runs.call_script("predict", folder / "photos", *flags)
    assert str(folder / "photos/more") in str(error.value) and "Permission denied" in str(error.value)


@pytest.mark.parametrize("what", ["a link that leads nowhere", "a file"])
def test_no_folder_of_labels(what: str, folder: Path) -> None:
    """As where a disk is not mounted: the images are no negatives."""
    tree = KINDS["yolo"](folder / "set")
    options = tree.write()
    shutil.rmtree(tree.folder / "labels")
    if what == "a file":
        (tree.folder / "labels").touch()
    else:
        (tree.folder / "labels").symlink_to("/mnt/not-mounted")
    with pytest.raises(InputError, match=str(tree.folder / "labels")):
        load_tables(options, ["train"])
