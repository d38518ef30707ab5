"""Pipes, sockets and devices where files are expected: nobody waits for them, and messages say what they are."""

import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import small_runs as runs
from conftest import MakeCocoFolder
from malformed_sets import KINDS, Tree
from small_detectors import small_detector

from direct_pt.checkpoint import save_model
from direct_pt.data.loader import Share, TableFeed
from direct_pt.data.problems import ERROR, Problems
from direct_pt.data.sources import load_tables
from direct_pt.errors import InputError
from direct_pt.files import DamagedFile, open_regular, read_regular, read_tensors, what_is_there
from direct_pt.images.decoding import UnreadableImage, header_sizes, read_image
from direct_pt.reports import samples
from direct_pt.transforms import PretrainPreset

SECONDS = 60  # a test that waits for a pipe would never end
MAKERS: dict[str, Callable[[Path], None]] = {  # by what messages call it
    "a named pipe": lambda path: os.mkfifo(path),
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a device": lambda path: path.symlink_to("/dev/null"),  # not one without end, in case that it is read
}
PIPE = "it is a named pipe, not a file"


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Ends a test that waits."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    """In place of a file."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("kind", MAKERS)
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path / "a.jpg")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    for path in (tmp_path / "a.jpg", tmp_path / "link.jpg"):
        assert what_is_there(path) == kind
        for read in (open_regular, read_regular):
            with pytest.raises(OSError, match="not a file") as error:
                read(path)
            assert str(error.value) == f"it is {kind}, not a file"
        for reader in (read_image, lambda path: header_sizes(path, str(path))):
            with pytest.raises(UnreadableImage) as unreadable:
                reader(path)
            reason = f"cannot be read as an image (it is {kind}, not a file); replace the file or leave it out"
            assert str(unreadable.value) == f"{path}: {reason}"
        with pytest.raises(DamagedFile, match=r"cannot be read as tensors .it is a"):
            read_tensors(path)


def test_regular_files_folders_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "link"):
        assert read_regular(path) == b"content" and what_is_there(path) == "a file"
        with open_regular(path) as file:
            assert file.read(3) == b"con"
    assert what_is_there(tmp_path) == "a folder" and what_is_there(tmp_path / "b") == ""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path, error in ((tmp_path, IsADirectoryError), (tmp_path / "b", FileNotFoundError)):
        for read in (open_regular, read_regular):
            with pytest.raises(error):
                read(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before  # nothing stays open


FILES = {  # of each kind of set, those that are read
    "plain": ("annotations/instances_train.json", "images/a.png"),
    "roboflow": ("train/_annotations.coco.json", "train/a.png"),
    "explicit": ("labels.json",),
    "yolo": ("data.yaml", "labels/train/a.txt", "images/train/a.png", "train.txt"),
    "voc": ("Annotations/a.xml", "ImageSets/Main/train.txt", "JPEGImages/a.png"),
    "metadata": ("train/metadata.jsonl", "README.md"),
    "parquet": ("train-00000-of-00001.parquet",),
    "saved": ("train/state.json", "train/data-00000-of-00001.arrow"),
}


def listed(tree: Tree) -> None:
    """A YOLO set whose images are listed."""
    tree.put("data.yaml", "names: [cat, dog]\ntrain: train.txt\nval: images/val\n")
    tree.put("train.txt", "images/train/a.png\nimages/train/b.png\n")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_data_sets(kind: str, name: str, tmp_path: Path) -> None:
    """An error that names it, or what lacks it; those that list all errors go on."""
    tree = KINDS[kind](tmp_path / "set")
    if name == "train.txt":
        listed(tree)
    options, path = tree.write(), tree.folder / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(InputError) as error:
        load_tables(options, ["train"], required="train")
    assert ("'train' 'train.txt'" if name == "train.txt" else f"{path}: ") in str(error.value)
    assert "a named pipe" in str(error.value) or name == "train.txt"
    problems = {split: Problems(collects=True) for split in ("train", "val", "test")}
    try:
        load_tables(options, ["train"], problems)
    except InputError:
        return
    assert problems["train"].counts(ERROR)


def test_images_that_become_pipes(coco_folder: MakeCocoFolder) -> None:
    """While training runs: replaced and named, as other bad images are."""
    table = coco_folder([(64, 64)] * 3).load()
    pipe(table.path(1))
    feed = TableFeed(table, PretrainPreset(96), 0, False, 0)
    unreadable = {image for batch in feed.batches(Share(1, 0, 6)) for image in batch.unreadable}
    assert unreadable == {1}
    assert feed.unreadable_reason(1) == f"{table.path(1)}: cannot be read ({PIPE})"


def test_predict(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", small_detector(), [])
    (tmp_path / "photos").mkdir()
    shutil.copy(min((demo / "images").glob("val_*.jpg")), tmp_path / "photos/a.jpg")
    for name, kind in {"b.jpg": "a named pipe", "c.png": "a socket", "d.png": "a device"}.items():
        MAKERS[kind](tmp_path / "photos" / name)
    flags = ("--checkpoint", tmp_path, "--output-dir", tmp_path / "found", *runs.MACHINE)
    runs.call_script("predict", tmp_path / "photos", *flags)
    printed = capsys.readouterr().out
    assert "1 images, 3 unreadable" in printed
    for name, kind in {"b.jpg": "a named pipe", "c.png": "a socket", "d.png": "a device"}.items():
        reason = f"cannot be read as an image (it is {kind}, not a file)"
        assert f"unreadable, skipped: {tmp_path / 'photos' / name}: {reason}" in printed
    with pytest.raises(InputError, match=r"b\.jpg: no such image or folder .a named pipe"):
        runs.call_script("predict", tmp_path / "photos/b.jpg", *flags)


def test_files_that_programs_may_have_written(demo: Path, tmp_path: Path) -> None:
    """A pipe of such a name is not theirs."""
    os.mkfifo(tmp_path / "report.json")
    os.mkfifo(tmp_path / samples.FILE)
    with pytest.raises(InputError, match=r"report\.json was not made by check_data"):
        runs.call_script("check_data", "--data", demo, "--output-dir", tmp_path, "--num-workers", 0)
    assert not samples._is_own(tmp_path / samples.FILE)


def test_weights_to_import(tmp_path: Path) -> None:
    script = runs.load_script("import_mmdet")
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: no such file .a named pipe"):
        script.read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"--categories .*a\.pth: cannot be read .*it is a named pipe"):
        script.read_categories(tmp_path / "a.pth", None)
    with pytest.raises(InputError, match=r"a\.pth: cannot be read as TOML .it is a named pipe"):
        runs.call_script("experiments", "plan", "--file", tmp_path / "a.pth")


def test_initial_weights_of_the_backbone(demo: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors"):
        runs.train(
            "finetune", "--data", demo, "--init", tmp_path / "a.safetensors", "--model", runs.MODEL, *runs.FINETUNE,
            *runs.EIGHT, "--max-steps", 1, "--output-dir", tmp_path / "run",
        )  # fmt: skip
