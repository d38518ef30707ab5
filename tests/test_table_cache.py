"""The cache of annotation tables: when it is used, when not, and what happens where it cannot be."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CocoFolder, MakeCocoFolder
from pycocotools import mask as coco_mask
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from direct_pt.data import table_cache
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.loader import Share, TableFeed
from direct_pt.data.sources import load_split
from direct_pt.data.table_cache import ABOUT, OUTLINES, ROWS, CachedTable, cache_root
from direct_pt.errors import InputError
from direct_pt.transforms import PretrainPreset

SIZES = ((20, 30), (40, 25), (16, 16), (32, 32))
SQUARE = [[2.0, 3.0, 12.5, 3.0, 12.5, 9.0, 2.0, 9.0]]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own, for files of any size."""
    monkeypatch.setattr(table_cache, "MIN_BYTES", 0)
    monkeypatch.setenv("DIRECT_PT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(coco_folder: MakeCocoFolder) -> CocoFolder:
    """Polygons, run lengths, an object without an outline, one without an area, an image without objects."""
    filled = np.zeros((40, 25), np.uint8)
    filled[3:9, 5:12] = 1
    packed = coco_mask.encode(np.asfortranarray(filled))
    run_lengths = {"size": packed["size"], "counts": packed["counts"].decode()}
    made = coco_folder(
        SIZES,
        [
            {"image_id": 30, "bbox": [1, 2, 10, 5], "area": 33.5, "segmentation": SQUARE},
            {"image_id": 20, "bbox": [4, 4, 6, 6], "area": 20, "iscrowd": 1, "segmentation": run_lengths},
            {"image_id": 10, "bbox": [3, 3, 8, 8], "category_id": 2, "segmentation": SQUARE},
            {"image_id": 30, "bbox": [3, 3, 0, 8], "area": 1},
        ],
    )
    made.content["categories"][0]["name"] = 'sé"图\n'
    return made


def assert_equal(found: AnnotationTable, expected: AnnotationTable) -> None:
    for name in ROWS:
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype, name
        np.testing.assert_array_equal(mine, theirs, name)
    for name in OUTLINES:
        np.testing.assert_array_equal(getattr(found.segmentations, name), getattr(expected.segmentations, name), name)
    for name in ("source", "folder", "class_names", "category_ids", "repairs"):
        assert getattr(found, name) == getattr(expected, name), name


def uncached(paths: CocoSplit) -> AnnotationTable:
    """Read from the file, whatever the cache holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_cache, "MIN_BYTES", 2**60)
        table = load_split(paths)
    assert type(table) is AnnotationTable
    return table


def cached_file(root: Path) -> Path:
    """The one file of a table; nothing else lies beside it."""
    (file,) = (root / "annotations").iterdir()
    return file


def other_content(paths: CocoSplit) -> None:
    """Another area for annotation 100; size and time of the file stay."""
    status, text = paths.annotations.stat(), paths.annotations.read_text()
    assert text.count("33.5") == 1
    paths.annotations.write_text(text.replace("33.5", "44.5"))
    os.utime(paths.annotations, ns=(status.st_atime_ns, status.st_mtime_ns))


def area(table: AnnotationTable) -> float:
    """Of annotation 100."""
    return float(table.areas[table.annotation_ids == 100].item())


# When it is used


def test_the_table_is_the_same(folder: CocoFolder) -> None:
    paths = folder.write()
    expected = uncached(paths)
    for _ in range(2):  # as it is written, and as it is found
        table = load_split(paths)
        assert isinstance(table, CachedTable)
        assert_equal(table, expected)
        assert table.coco(with_masks=True) == expected.coco(with_masks=True)
        assert table.targets_per_image().tolist() == expected.targets_per_image().tolist()
        assert_equal(table.without_empty_images(), expected.without_empty_images())
        assert not any(getattr(table, name).flags.writeable for name in ROWS)
    assert set(expected.repairs) == {"area filled in from the box", "boxes under 1 pixel, not trained on"}


def test_a_set_without_objects(coco_folder: MakeCocoFolder) -> None:
    paths = coco_folder(SIZES).write()
    for _ in range(2):
        table = load_split(paths)
        assert isinstance(table, CachedTable)
        assert_equal(table, uncached(paths))


def test_the_file_is_not_read_again_until_it_changes(folder: CocoFolder) -> None:
    paths = folder.write()
    assert area(load_split(paths)) == 33.5
    other_content(paths)
    assert area(load_split(paths)) == 33.5
    later = paths.annotations.stat().st_mtime_ns + 1
    os.utime(paths.annotations, ns=(later, later))
    assert area(load_split(paths)) == 44.5
    other_content_again = paths.annotations.read_text().replace("44.5", "55.55")
    paths.annotations.write_text(other_content_again)
    os.utime(paths.annotations, ns=(later, later))  # another size at the same time
    assert area(load_split(paths)) == 55.55


def test_the_same_file_under_other_names(
    folder: CocoFolder, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cached table, and messages with the name that the user gave."""
    paths = folder.write()
    load_split(paths)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    other_content(paths)
    for name in ("link", "set"):
        table = load_split(CocoSplit(Path(name) / "pictures", Path(name) / "labels.json"))
        assert (table.source, table.folder) == (f"{name}/labels.json", Path(name) / "pictures")
        assert area(table) == 33.5 and table.path(0) == Path(f"{name}/pictures/0.png")
    cached_file(root)


def test_another_image_folder(folder: CocoFolder, root: Path, tmp_path: Path) -> None:
    """Its table is another one: sizes may come from the images."""
    paths = folder.write()
    load_split(paths)
    shutil.copytree(paths.images, tmp_path / "others")
    other_content(paths)
    assert area(load_split(CocoSplit(tmp_path / "others", paths.annotations))) == 44.5
    assert area(load_split(paths)) == 33.5
    assert len(list((root / "annotations").iterdir())) == 2


def test_a_file_in_place_of_another(folder: CocoFolder, root: Path) -> None:
    """Copied with its time, as rsync and tar do: only as long as path, size and time agree is it taken for the same."""
    paths = folder.write()
    load_split(paths)
    with safe_open(cached_file(root), "np") as file:
        about = json.loads(file.metadata()[ABOUT])
    status = paths.annotations.stat()
    assert about["made_from"] == {
        "annotations": str(paths.annotations.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "images": str(paths.images.resolve()),
    }


def test_images_are_checked_at_every_start(folder: CocoFolder) -> None:
    paths = folder.write()
    load_split(paths)
    (paths.images / "1.png").unlink()
    with pytest.raises(InputError) as error:
        load_split(paths)
    for word in (str(paths.images / "1.png"), str(paths.annotations), "1 of 4", "check the image folder"):
        assert word in str(error.value)


def test_rejected_files_are_not_cached(folder: CocoFolder, root: Path) -> None:
    folder.content["annotations"][0]["image_id"] = 77
    for _ in range(2):
        with pytest.raises(InputError, match="image_id 77"):
            folder.load()
    assert not root.exists()


def test_sizes_from_the_images_are_not_cached(folder: CocoFolder, root: Path) -> None:
    """They would stay when an image is replaced."""
    del folder.content["images"][1]["width"]
    for _ in range(2):
        table = folder.load()
        assert table.repairs["image sizes read from the image files"] == 1
        assert table.sizes.tolist() == [list(size) for size in SIZES]
    assert not root.exists()


def test_small_files_are_not_cached(folder: CocoFolder, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = folder.write()
    monkeypatch.setattr(table_cache, "MIN_BYTES", paths.annotations.stat().st_size + 1)
    assert type(load_split(paths)) is AnnotationTable
    assert not root.exists()
    monkeypatch.setattr(table_cache, "MIN_BYTES", paths.annotations.stat().st_size)
    assert isinstance(load_split(paths), CachedTable)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DIRECT_PT_CACHE", "~/fast")
    assert cache_root() == tmp_path / "home" / "fast"
    for nothing in (lambda name: monkeypatch.setenv(name, ""), monkeypatch.delenv):
        nothing("DIRECT_PT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_root() == tmp_path / "xdg" / "direct_pt"
        nothing("XDG_CACHE_HOME")
        assert cache_root() == tmp_path / "home" / ".cache" / "direct_pt"


# What is damaged


def cut(length: int) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(file.read_bytes()[:length])


def edit(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the arrays, or what the metadata says about them."""

    def edited(path: Path) -> None:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            about = json.loads(file.metadata()[ABOUT])
        change(arrays, about)
        save_file(arrays, path, {ABOUT: json.dumps(about)})

    return edited


def with_header(text: str) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(len(text).to_bytes(8, "little") + text.encode())


def alter_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_text(old: bytes, new: bytes) -> Callable[[Path], Any]:
    def swap(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) == 1 and len(old) == len(new)
        path.write_bytes(content.replace(old, new))

    return swap


def offsets(first: object, last: object) -> Callable[[Path], None]:
    """Of one array, in the header."""

    def change(path: Path) -> None:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header["labels"]["data_offsets"] = [first, last]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])

    return change


def name_of_first(name: bytes) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(arrays: dict[str, Any], about: dict[str, Any]) -> None:
        names = np.array([name] * len(arrays["file_names"]), "S20")
        arrays["file_names"] = names[:, None].view(np.uint8)

    return change


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (cut(0), "empty"),
    "header's length cut short": (cut(5), ""),
    "header cut short": (cut(200), ""),
    "arrays cut short": (lambda file: file.write_bytes(file.read_bytes()[:-8]), "lies outside of the file"),
    "no safetensors file": (lambda file: file.write_text("nonsense" * 100), ""),
    "a length beyond any file": (lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]), ""),
    "header a list": (with_header("[]"), "its header is damaged: TypeError"),
    "no metadata": (with_header("{}"), "its header is damaged: KeyError('__metadata__')"),
    "metadata no JSON": (with_header('{"__metadata__": {"about": "nonsense"}}'), "Expecting value"),
    "array missing": (edit(lambda arrays, _: arrays.pop("crowd")), "its header is damaged: KeyError('crowd')"),
    "array of an unknown type": (
        edit(lambda arrays, _: arrays.update(boxes=arrays["boxes"].astype(np.float16))),
        "its header is damaged: KeyError('F16')",
    ),
    "array of another shape": (
        edit(lambda arrays, _: arrays.update(boxes=np.zeros((5, 4)))),
        "boxes is float64 [5, 4] in place of float64 [4, 4]",
    ),
    "array of another type": (
        edit(lambda arrays, _: arrays.update(boxes=np.zeros((4, 4), np.int64))),
        "boxes is int64 [4, 4] in place of float64 [4, 4]",
    ),
    "names of one dimension": (edit(lambda arrays, _: arrays.update(file_names=np.zeros(4, np.uint8))), "IndexError"),
    "starts that fall": (
        edit(lambda arrays, _: arrays["starts"].__setitem__(1, 9)),
        "starts does not rise from 0 to 4",
    ),
    "starts beyond the end": (
        edit(lambda arrays, _: arrays["polygon_starts"].__setitem__(-1, 99)),
        "polygon_starts does not rise from 0 to 8",
    ),
    "labels beyond the classes": (
        edit(lambda arrays, _: arrays["labels"].__setitem__(0, 2)),
        "labels of other classes than the 2 named",
    ),
    "classes that are no list": (edit(lambda _, about: about.update(class_names=3)), "header is damaged: TypeError"),
    "another version": (edit(lambda _, about: about.update(version=99)), "of version 99, this program's is 5"),
    "areas altered": (edit(lambda arrays, _: arrays["areas"].__setitem__(0, 7)), "their checksum does not fit"),
    "a byte of an area": (alter_last_byte, "does not fit: the file was altered, or is damaged"),
    "a class's name": (swap_text(b"two", b"one"), "their checksum does not fit: the file was altered"),
    "offsets below nothing": (offsets(-16, 16), "lies outside of the file"),
    "offsets that fall": (offsets(48, 16), "lies outside of the file"),
    "offsets that are no numbers": (offsets("a", "b"), "its header is damaged: TypeError"),
    "brackets without end": (with_header("[" * 100_000), "levels deep"),
    "no pixels": (edit(lambda arrays, _: arrays["sizes"].__setitem__((0, 0), 0)), "sizes of images without pixels"),
    "boxes that are not finite": (edit(lambda arrays, _: arrays["boxes"].fill(np.nan)), "that are not finite"),
    "names elsewhere": (edit(name_of_first(b"/etc/passwd")), "file_names that leave the folder of the images"),
    "names above": (edit(name_of_first(b"../a.png")), "file_names that leave the folder of the images"),
    "more ids than classes": (edit(lambda _, about: about["category_ids"].append(9)), "other names than ids"),
    "no version": (edit(lambda _, about: about.pop("version")), "its header is damaged: KeyError('version')"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged(case: str, folder: CocoFolder, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line; the table comes from the file, and the cache is sound again."""
    paths = folder.write()
    load_split(paths)
    damage, words = DAMAGES[case]
    damage(cached_file(root))
    assert capsys.readouterr().err == ""
    table = load_split(paths)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {cached_file(root)}: the cached annotations cannot be used (")
    assert words in line and str(paths.annotations) in line
    assert_equal(table, uncached(paths))
    other_content(paths)
    assert area(load_split(paths)) == 33.5
    assert capsys.readouterr().err == ""


# Where others may write


def test_a_pipe_in_place_of_the_table(folder: CocoFolder, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replaced, as what is damaged is."""
    paths = folder.write()
    load_split(paths)
    place = cached_file(root)
    place.unlink()
    os.mkfifo(place)
    assert_equal(load_split(paths), uncached(paths))
    assert "it is a named pipe, not a file" in capsys.readouterr().err
    assert cached_file(root).is_file()


def test_a_link_in_place_of_the_table(
    folder: CocoFolder, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = folder.write()
    load_split(paths)
    place = cached_file(root)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    line = refused_to_write(paths, capsys)
    assert (
        f"the cached annotations are not used: {place} is a link; remove it" in line and str(paths.annotations) in line
    )
    assert place.is_symlink() and (tmp_path / "elsewhere").read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_table_of_another_user(folder: CocoFolder, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = folder.write()
    load_split(paths)
    place = cached_file(root)
    os.chown(place, 54_321, 54_321)
    before = place.read_bytes()
    assert "belongs to another user (number 54321)" in refused_to_write(paths, capsys)
    assert place.read_bytes() == before and place.stat().st_uid == 54_321


# Where it cannot be written


def refused_to_write(paths: CocoSplit, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that says so, at every start; the table is the file's."""
    lines = set()
    for _ in range(2):
        table = load_split(paths)
        assert_equal(table, uncached(paths))
        lines.add(capsys.readouterr().err)
    (text,) = lines
    (line,) = text.splitlines()
    assert line.startswith("warning: ")
    return line


@pytest.mark.parametrize("place", ["cache", "cache/annotations"])
def test_a_file_in_its_place(
    place: str, folder: CocoFolder, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    line = refused_to_write(folder.write(), capsys)
    assert f"warning: {root / 'annotations' / 'labels-'}" in line
    assert "the annotations cannot be cached (" in line and "every start will read" in line
    assert (tmp_path / place).is_file()


def test_a_folder_in_place_of_the_table(folder: CocoFolder, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be the user's, so it stays."""
    paths = folder.write()
    load_split(paths)
    place = cached_file(root)
    place.unlink()
    place.mkdir()
    assert "Is a directory" in refused_to_write(paths, capsys)
    assert list(place.iterdir()) == []


def test_no_home_directory(
    folder: CocoFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIRECT_PT_CACHE", "~nobody-of-this-name/cache")
    line = refused_to_write(folder.write(), capsys)
    assert "home directory" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(folder: CocoFolder, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root.mkdir()
    root.chmod(0o555)
    assert "Permission denied" in refused_to_write(folder.write(), capsys)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(
    small_disk: Path, folder: CocoFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIRECT_PT_CACHE", str(small_disk))
    folder.content["annotations"][0]["segmentation"] = [(np.arange(100_000.0) % 16).tolist()]
    line = refused_to_write(folder.write(), capsys)
    assert str(small_disk) in line and "cannot be cached" in line
    assert "is the disk full?" in line or "No space left" in line
    assert list((small_disk / "annotations").iterdir()) == []  # nothing half written stays


# Several processes


def _load_at(barrier: Any, paths: CocoSplit, sender: Any) -> None:
    barrier.wait()
    for _ in range(5):
        sender.send(load_split(paths).coco(with_masks=True))
        sender.send(load_split(paths).coco(with_masks=True))
        barrier.wait()
        shutil.rmtree(cache_root(), ignore_errors=True)
        barrier.wait()
    sender.send(load_split(paths).coco(with_masks=True))


def test_several_write_at_once(folder: CocoFolder, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths, context = folder.write(), multiprocessing.get_context("fork")
    expected = uncached(paths).coco(with_masks=True)
    receiver, sender = context.Pipe(duplex=False)
    barrier, lock = context.Barrier(4), context.Lock()

    class Locked:
        def send(self, value: Any) -> None:
            with lock:
                sender.send(value == expected)

    workers = [context.Process(target=_load_at, args=(barrier, paths, Locked())) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [receiver.recv() for _ in range(4 * 11) if receiver.poll(60)] == 44 * [True]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert capfd.readouterr().err == ""
    assert_equal(load_split(paths), uncached(paths))
    cached_file(root)


def test_a_table_outlives_its_cache(folder: CocoFolder, root: Path) -> None:
    """Another start may replace it while this one trains."""
    paths = folder.write()
    table = load_split(paths)
    expected = uncached(paths)
    other_content(paths)
    later = time.time_ns()
    os.utime(paths.annotations, ns=(later, later))
    assert area(load_split(paths)) == 44.5
    assert_equal(table, expected)
    assert_equal(pickle.loads(pickle.dumps(table)), expected)  # no longer by the file, which is another's
    shutil.rmtree(root)
    assert_equal(table, expected)
    assert_equal(pickle.loads(pickle.dumps(table)), expected)


def test_replaced_before_a_worker_opens_it(folder: CocoFolder, root: Path) -> None:
    """A worker never gets another table than its parent."""
    paths = folder.write()
    pickled = pickle.dumps(load_split(paths))
    assert_equal(pickle.loads(pickled), uncached(paths))
    edit(lambda arrays, about: about.update(repairs={}))(cached_file(root))
    with pytest.raises(OSError, match="another process replaced it"):
        pickle.loads(pickled)


def test_pickled_by_its_file(coco_folder: MakeCocoFolder) -> None:
    boxes = [{"image_id": 10, "bbox": [1, 1, 5, 5], "segmentation": SQUARE} for _ in range(1000)]
    paths = coco_folder(SIZES, boxes).write()
    table = load_split(paths)
    pickled = pickle.dumps(table)
    assert len(pickled) < 4096
    again = pickle.loads(pickled)
    assert_equal(again, table)
    assert not again.boxes.flags.writeable and len(pickle.dumps(again)) < 4096
    chosen = table.without_empty_images()  # no longer what the cache holds
    assert_equal(pickle.loads(pickle.dumps(chosen)), chosen)
    assert len(chosen) == 1 and len(pickle.dumps(chosen)) > 32_000


class Boxes(Dataset[list[Any]]):
    """What a worker sees of a table."""

    def __init__(self, table: AnnotationTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, image: int) -> list[Any]:
        objects = self.table.objects(image, with_masks=True)
        return [objects.boxes.tolist(), str(objects.segmentations), self.table.boxes.flags.writeable]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_however_they_start(method: str, folder: CocoFolder) -> None:
    images = Boxes(load_split(folder.write()))
    loader = DataLoader(images, batch_size=None, num_workers=1, multiprocessing_context=method)
    assert list(loader) == [images[row] for row in range(len(SIZES))]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_are_the_same(workers: int, folder: CocoFolder) -> None:
    """Nothing on the way writes into the mapped arrays."""
    paths = folder.write()
    load_split(paths)
    found, expected = (
        list(TableFeed(table, PretrainPreset(32), 0, True, workers).batches(Share(2, 0, 4)))
        for table in (load_split(paths), uncached(paths))
    )
    assert len(found) == 4
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.images.equal(theirs.images) and mine.boxes.equal(theirs.boxes)
        assert mine.masks is not None and theirs.masks is not None and mine.masks.bits.equal(theirs.masks.bits)
