"""The cache of low-resolution copies: what training sees out of it, and that no end of a process, no damage and no full
disk makes it wrong."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import torch
from conftest import MakeCocoFolder
from PIL import Image

from direct_pt.batch import Batch, Sample
from direct_pt.data import image_cache
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import find_coco
from direct_pt.data.image_cache import KINDS, RECORD, ImageCache, open_image_cache
from direct_pt.data.loader import Share, TableFeed, TrainingImages
from direct_pt.data.sources import load_split
from direct_pt.data.table_cache import cache_root
from direct_pt.transforms import PretrainPreset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core is enough here
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SIDE = 96  # of the crops: copies are at most 100 (raw) or 115 (jpeg) pixels wide and high
SQUARE = [[4.0, 5.0, 24.0, 5.0, 24.0, 20.0, 4.0, 20.0]]
FORK = multiprocessing.get_context("fork")


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Without detail that another resolution would lose."""
    few = np.random.default_rng(seed).integers(80, 176, size=(3, 3, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def turned() -> Image.Exif:
    """A quarter: what is stored 150 high and 220 wide stands upright 220 high and 150 wide."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


IMAGES: dict[str, tuple[Image.Image, tuple[int, int], dict[str, Any]]] = {  # image, annotated size, how it is saved
    "large jpeg": (smooth(480, 640), (480, 640), {"format": "JPEG", "quality": 95}),
    "odd png": (smooth(333, 501), (333, 501), {"format": "PNG"}),
    "smaller than a copy": (smooth(40, 31), (40, 31), {"format": "JPEG", "quality": 95}),
    "grey png": (smooth(200, 300).convert("L"), (200, 300), {"format": "PNG"}),
    "turned, as EXIF says": (smooth(150, 220), (220, 150), {"format": "JPEG", "exif": turned()}),
    "turned, EXIF ignored": (smooth(150, 220), (150, 220), {"format": "JPEG", "exif": turned()}),
    "narrow": (smooth(301, 75), (301, 75), {"format": "WEBP", "quality": 95}),
}
ROWS = range(len(IMAGES))


@pytest.fixture
def table(coco_folder: MakeCocoFolder) -> AnnotationTable:
    """One of each kind, each with two objects."""
    objects = [
        {"image_id": 10 * row + 10, "bbox": [4 + shift, 5, 20, 15], "segmentation": SQUARE}
        for row in ROWS
        for shift in (0, 3)
    ]
    folder = coco_folder([size for _, size, _ in IMAGES.values()], objects)
    for row, (image, _, options) in enumerate(IMAGES.values()):
        image.save(folder.paths.images / f"{row}.png", **options)
    return folder.load()


def build(table: AnnotationTable, root: Path, kind: str = "raw", workers: int = 0) -> ImageCache:
    cache = open_image_cache(table, kind, SIDE, root, workers)
    assert cache is not None
    return cache


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(captured: str) -> str:
    """The only one on stderr that is no progress bar."""
    (line,) = [line for line in captured.replace("\r", "\n").splitlines() if line.startswith("image cache: ")]
    return line


def make_unreadable(path: Path) -> None:
    """Other contents, of the same length and time."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def assert_same_but_pixels(one: Sample, other: Sample) -> None:
    assert one.image.shape == other.image.shape
    for name in ("padded_size", "original_size", "scale", "index", "seed", "unreadable"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("boxes", "labels", "areas", "crowd"):
        np.testing.assert_array_equal(getattr(one.objects, name), getattr(other.objects, name))
    if one.masks is not None:
        assert_equal(vars(one.masks), vars(other.masks))


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Tensors and what else the fields hold."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif hasattr(value, "__dict__"):
            assert_equal(vars(value), vars(other[name]))
        else:
            assert value == other[name], name


def difference(one: Sample, other: Sample) -> float:
    """Mean absolute, of values up to 255."""
    return float((one.image.float() - other.image.float()).abs().mean())


# What training sees


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS, ids=IMAGES)
def test_samples_are_those_of_the_files(table: AnnotationTable, tmp_path: Path, kind: str, row: int) -> None:
    """The recipe's resize, crop and mirror, draw for draw; pixels to within 2.5 of 255 where nothing is sharp."""
    preset, cache = PretrainPreset(SIDE), build(table, tmp_path / "cache", kind)
    from_files, from_cache = (TrainingImages(table, preset, 0, True, there) for there in (None, cache))
    height, width = cache.index[row][["height", "width"]].tolist()
    original = list(IMAGES.values())[row][1]
    assert max(height, width) == min(max(original), int(KINDS[kind] * SIDE))
    assert height / width == pytest.approx(original[0] / original[1], rel=0.05)
    scales = set()
    for epoch in range(20):
        expected, found = from_files[epoch, row], from_cache[epoch, row]
        assert_same_but_pixels(found, expected)
        assert difference(found, expected) < 2.5
        scales.add(found.scale[0] * original[1] / SIDE)
    assert len(scales) > 5 or max(original) < 50


@pytest.mark.parametrize("kind", KINDS)
def test_photographs(tmp_path: Path, kind: str) -> None:
    """COCO images at the paper's size: the means of 64x64 areas stay; pixels to within 5 of 255, 12 in the sharpest."""
    if not DATA.is_dir():
        pytest.skip("the real data sets do not lie beside the project")
    table, preset = load_split(find_coco(DATA / "coco_permissive")["train"]), PretrainPreset()
    cache = open_image_cache(table, kind, preset.image_size, tmp_path, 0)
    from_files, from_cache = (TrainingImages(table, preset, 0, True, there) for there in (None, cache))
    found = []
    for row in range(len(table)):
        expected, sample = from_files[0, row], from_cache[0, row]
        assert_same_but_pixels(sample, expected)
        areas = [torch.nn.functional.avg_pool2d(image.image.float(), 64) for image in (expected, sample)]
        found.append((difference(sample, expected), float((areas[0] - areas[1]).abs().mean())))
    pixels, means = np.array(found).T
    assert pixels.max() < 12 and pixels.mean() < 5 and means.max() < 1


def batches_of(table: AnnotationTable, cache: ImageCache | None, workers: int = 0, count: int = 14) -> Iterator[Batch]:
    """Single images, for two epochs."""
    return TableFeed(table, PretrainPreset(SIDE), 0, True, workers, cache=cache).batches(Share(1, 0, count))


@pytest.mark.parametrize("kind", KINDS)
def test_workers_make_no_difference(table: AnnotationTable, tmp_path: Path, kind: str) -> None:
    """Neither those that build it nor those that read from it."""
    cache, again = build(table, tmp_path / "alone", kind), build(table, tmp_path / "workers", kind, workers=2)
    assert contents(cache.folder) == contents(again.folder)
    for one, other in zip(batches_of(table, cache), batches_of(table, again, workers=2), strict=True):
        assert_equal(vars(one), vars(other))


def test_spawned_processes_open_it_themselves(table: AnnotationTable, tmp_path: Path) -> None:
    cache = build(table, tmp_path)
    images = TrainingImages(table, PretrainPreset(SIDE), 0, True, cache)
    alone = TrainingImages(table, PretrainPreset(SIDE), 0, True)
    pickled = pickle.dumps(images)
    assert len(pickled) < len(pickle.dumps(alone)) + 1000
    assert torch.equal(pickle.loads(pickled)[0, 0].image, images[0, 0].image)
    shutil.rmtree(cache.folder)
    assert torch.equal(pickle.loads(pickled)[0, 0].image, alone[0, 0].image)


def test_unreadable_images(table: AnnotationTable, tmp_path: Path) -> None:
    """Nothing is stored of them; training replaces and names them as it does without a cache."""
    table.path(0).write_bytes(table.path(0).read_bytes()[:2000])
    table.path(3).write_bytes(b"")
    table.path(6).unlink()
    cache = build(table, tmp_path / "cache")
    assert (cache.index["length"] == 0).nonzero()[0].tolist() == [0, 3, 6]
    assert cache.read(3, (50, 50)) is None
    with_cache, without = batches_of(table, cache), batches_of(table, None)
    named = set()
    for one, other in zip(with_cache, without, strict=True):
        assert (one.unreadable, one.indices.tolist()) == (other.unreadable, other.indices.tolist())
        named.update(one.unreadable)
    assert named == {0, 3, 6}


# Building that is cut off, and what was damaged


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A set of 200 images, and what a cache of it holds that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    images = []
    for row in range(200):
        smooth(100 + row % 7, 130, row).save(folder / f"images/{row}.jpg")
        images.append({"id": row + 1, "file_name": f"{row}.jpg", "height": 100 + row % 7, "width": 130})
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "one"}]}
    (folder / "annotations/instances_train.json").write_text(json.dumps(content))
    return folder, contents(build(load(folder), folder / "cache").folder)


def load(folder: Path) -> AnnotationTable:
    return load_split(find_coco(folder)["train"])


@pytest.fixture
def copy(many: tuple[Path, dict[str, bytes]], tmp_path: Path) -> AnnotationTable:
    """The same set, for changes. Files keep their times."""
    shutil.copytree(many[0], tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    return load(tmp_path / "copy")


def is_running(process: str) -> bool:
    """And not only waiting to be buried."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_build_continues(
    many: tuple[Path, dict[str, bytes]],
    copy: AnnotationTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    """After SIGKILL, to the same bytes; what is stored is not read again: by then those files hold zeros.

    Its worker processes end too: they hold chunks that no process fetches.
    """
    monkeypatch.setattr(image_cache, "CHUNK", 4)
    builder = FORK.Process(target=open_image_cache, args=(copy, "raw", SIDE, tmp_path / "cache", workers))
    builder.start()
    assert builder.pid is not None
    while not [path for path in tmp_path.glob("cache/*/index") if path.stat().st_size >= 20 * RECORD.itemsize]:
        assert builder.is_alive()
        time.sleep(0.001)
    readers = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert builder.exitcode == -signal.SIGKILL and len(readers) == workers
    stored = next(tmp_path.glob("cache/*/index")).stat().st_size // RECORD.itemsize
    assert 20 <= stored < 200
    for row in range(stored):
        make_unreadable(copy.path(row))
    assert contents(build(copy, tmp_path / "cache").folder) == many[1]
    assert "image cache: " not in capfd.readouterr().err
    deadline = time.monotonic() + 30
    while any(map(is_running, readers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_processes_at_once(
    many: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One builds, the other one waits for it; both have it then."""
    monkeypatch.setattr(image_cache, "CHUNK", 10)
    table, together, answers = load(many[0]), FORK.Barrier(2), FORK.SimpleQueue()

    def start() -> None:
        together.wait(30)
        cache = build(table, tmp_path)
        answers.put([cache.read(row, (60, 70)).sum() for row in range(0, 200, 40)])

    processes = [FORK.Process(target=start) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert answers.get() == answers.get()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert contents(folder) == many[1]


def cut(name: str, by: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


def no_record_at_the_end(folder: Path) -> None:
    """As some file systems leave a file after a power failure."""
    content = (folder / "index").read_bytes()
    (folder / "index").write_bytes(content[: -RECORD.itemsize] + bytes(RECORD.itemsize))


def another_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))


def swap_pixels_for_a_folder(folder: Path) -> None:
    (folder / "pixels").unlink()
    (folder / "pixels").mkdir()


def swap(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def link_to(target: object) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(str(target))


def with_record(field: str, value: int) -> Callable[[Path], None]:
    """Another value in the fifth record."""

    def change(folder: Path) -> None:
        index = np.fromfile(folder / "index", RECORD)
        index[field][4] = value
        index.tofile(folder / "index")

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {  # what is done to the folder, what stderr says
    "half a record": (cut("index", 5), ""),
    "no record": (no_record_at_the_end, ""),
    "pixels without a record": (cut("index", RECORD.itemsize), ""),
    "too few pixels": (cut("pixels", 100), ""),
    "empty index": (lambda folder: os.truncate(folder / "index", 0), ""),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is damaged; it is built anew"),
    "half a manifest": (cut("manifest.json", 5), "is damaged; it is built anew"),
    "another manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "made from other images or by"),
    "another version": (another_version, "made from other images or by another version; it is built anew"),
    "no pixels": (lambda folder: (folder / "pixels").unlink(), "is damaged; it is built anew"),
    "a folder of pixels": (swap_pixels_for_a_folder, "is damaged; it is built anew"),
    "no index": (lambda folder: (folder / "index").unlink(), "is damaged; it is built anew"),
    "manifest a pipe": (lambda folder: swap(folder / "manifest.json", os.mkfifo), "is damaged; it is built anew"),
    "pixels a pipe": (lambda folder: swap(folder / "pixels", os.mkfifo), "is damaged; it is built anew"),
    "index a device": (lambda folder: swap(folder / "index", link_to("/dev/null")), "is damaged; it is built anew"),
    "brackets without end": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        "is damaged; it is built anew",
    ),
    "a side beyond the largest": (with_record("width", 10**6), ""),
    "a side below nothing": (with_record("height", -1), ""),
    "no side": (with_record("height", 0), ""),
    "a length beyond the file": (with_record("length", 2**62), ""),
    "a length below nothing": (with_record("length", -5), ""),
    "an offset elsewhere": (with_record("offset", -(2**40)), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_repaired(
    table: AnnotationTable, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = build(table, tmp_path / "cache").folder
    before = contents(folder)
    change, message = DAMAGES[damage]
    change(folder)
    capfd.readouterr()
    assert build(table, tmp_path / "cache").folder == folder
    assert contents(folder) == before
    errors = capfd.readouterr().err
    if message:
        assert one_line(errors).startswith(f"image cache: {folder}: ") and message in one_line(errors)
    else:
        assert "image cache: " not in errors
    build(table, tmp_path / "cache")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["pixels", "record", "size"])
def test_altered_copies_are_not_trained_on(
    table: AnnotationTable, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, what: str
) -> None:
    """Their files are read in their place; one line says so."""
    folder = build(table, tmp_path / "cache", kind).folder
    index, pixels = np.fromfile(folder / "index", RECORD), bytearray((folder / "pixels").read_bytes())
    if what == "pixels":
        pixels[index["offset"][1] + index["length"][1] // 2] ^= 1
    elif what == "record":
        index["checksum"][1] ^= 1
    else:
        index["height"][1] -= 2
    (folder / "pixels").write_bytes(pixels)
    index.tofile(folder / "index")
    capfd.readouterr()
    cache = build(table, tmp_path / "cache", kind)
    for _ in range(2):
        assert cache.read(1, (50, 60)) is None
        assert all(cache.read(row, (50, 60)) is not None for row in ROWS if row != 1)
    line = (
        f"image cache: {folder}: the copy of image 2 is damaged or was altered; such images are read from their files. "
    )
    assert one_line(capfd.readouterr().err) == line + "Remove the folder, and it is built anew"
    assert len(list(batches_of(table, cache))) == 14


def test_copies_that_changed_places(table: AnnotationTable, tmp_path: Path) -> None:
    """Each has a checksum of its own."""
    noise = np.random.default_rng(0).integers(256, size=(2, 40, 31, 3), dtype=np.uint8)
    for row in (2, 3):
        table.sizes[row] = 40, 31
        Image.fromarray(noise[row - 2]).save(table.path(row), format="PNG")
    cache = build(table, tmp_path / "cache")
    (first, length), (second, same) = cache.index[["offset", "length"]][2:4].tolist()
    assert length == same
    pixels = bytearray((cache.folder / "pixels").read_bytes())
    pixels[first : first + length], pixels[second : second + length] = (
        pixels[second : second + length],
        pixels[first : first + length],
    )
    (cache.folder / "pixels").write_bytes(pixels)
    assert [row for row in ROWS if build(table, tmp_path / "cache").read(row, (40, 31)) is None] == [2, 3]


# Folders that others may write into


@pytest.mark.parametrize("kind", [os.mkfifo, "link", "link to nothing"], ids=["pipe", "link", "link to nothing"])
def test_a_lock_that_leads_elsewhere(
    table: AnnotationTable, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: Any
) -> None:
    """What it leads to stays as it is."""
    folder = build(table, tmp_path / "cache").folder
    lock, target = tmp_path / f"cache/{folder.name}.lock", tmp_path / "target"
    shutil.rmtree(folder)
    if kind != "link to nothing":
        target.write_text("mine")
    swap(lock, link_to(target) if isinstance(kind, str) else kind)
    reason = refused(table, tmp_path / "cache", capfd)
    assert reason == ("it is a named pipe, not a file" if kind == os.mkfifo else f"{lock} is a link; remove it")
    assert not target.exists() if kind == "link to nothing" else target.read_text() == "mine"


@pytest.mark.parametrize("name", ["index", "pixels", "manifest.json"])
def test_files_that_lead_elsewhere(
    table: AnnotationTable, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """A link to a file of the user's is neither read nor cut off; the cache is built anew."""
    folder = build(table, tmp_path / "cache").folder
    before, target = contents(folder), tmp_path / "target"
    target.write_bytes((folder / name).read_bytes() + b"and more")
    mine = target.read_bytes()
    swap(folder / name, link_to(target))
    cut("index" if name == "pixels" else "pixels", 5)(folder)
    capfd.readouterr()
    build(table, tmp_path / "cache")
    assert "is damaged; it is built anew" in one_line(capfd.readouterr().err)
    assert contents(folder) == before and target.read_bytes() == mine


def test_a_folder_that_leads_elsewhere(
    table: AnnotationTable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = build(table, tmp_path / "cache").folder
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    assert refused(table, tmp_path / "cache", capfd) == f"{folder} is a link; remove it"
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("name", [".", "index", "pixels", "manifest.json", "lock"])
def test_files_of_another_user(
    table: AnnotationTable, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """Not used. Their folder is left alone; in one's own, they are replaced."""
    folder = build(table, tmp_path / "cache").folder
    before, lock = contents(folder), folder.with_name(f"{folder.name}.lock")
    path = lock if name == "lock" else folder / name
    os.chown(path, 54_321, 54_321)
    if name == "lock":
        shutil.rmtree(folder)
    capfd.readouterr()
    if name in (".", "lock"):
        words = f"{path} belongs to another user (number 54321); name a folder of your own"
        assert refused(table, tmp_path / "cache", capfd) == words
        assert name == "lock" or contents(folder) == before
        return
    build(table, tmp_path / "cache")
    assert "is damaged; it is built anew" in one_line(capfd.readouterr().err)
    assert contents(folder) == before


def test_more_pixels_than_the_index_says(table: AnnotationTable, tmp_path: Path) -> None:
    cache = build(table, tmp_path / "cache")
    with (cache.folder / "pixels").open("ab") as pixels:
        pixels.write(b"more")
    again = build(table, tmp_path / "cache")
    for row in ROWS:
        np.testing.assert_array_equal(cache.read(row, (70, 71)), again.read(row, (70, 71)))


def later(table: AnnotationTable) -> None:
    status = table.path(1).stat()
    os.utime(table.path(1), ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def longer(table: AnnotationTable) -> None:
    status = table.path(1).stat()
    table.path(1).write_bytes(table.path(1).read_bytes() + b"\0")
    os.utime(table.path(1), ns=(status.st_atime_ns, status.st_mtime_ns))


def turned_otherwise(table: AnnotationTable) -> None:
    table.sizes[4] = table.sizes[4][::-1]


@pytest.mark.parametrize("change", [later, longer, turned_otherwise])
def test_other_images(
    table: AnnotationTable,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[AnnotationTable], None],
) -> None:
    folder = build(table, tmp_path / "cache").folder
    change(table)
    capfd.readouterr()
    assert build(table, tmp_path / "cache").folder == folder
    line = f"image cache: {folder}: was made from other images or by another version; it is built anew"
    assert one_line(capfd.readouterr().err) == line
    assert contents(folder) == contents(build(table, tmp_path / "anew").folder)


def test_sizes_and_kinds_have_separate_folders(table: AnnotationTable, tmp_path: Path) -> None:
    caches = [open_image_cache(table, kind, size, tmp_path, 0) for kind in KINDS for size in (64, 96)]
    assert len({cache.folder for cache in caches if cache is not None}) == 4
    assert [max(cache.index["height"]) for cache in caches if cache is not None] == [76, 115, 67, 100]


# The disk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_cut_off_while_they_are_read(table: AnnotationTable, tmp_path: Path, kind: str, workers: int) -> None:
    """From then on, images come from their files."""
    cache = build(table, tmp_path / "cache", kind)
    batches = batches_of(table, cache, workers)
    found = [next(batches)]
    os.truncate(cache.folder / "pixels", 10)
    found += batches
    expected = list(batches_of(table, None))
    assert [batch.indices.tolist() for batch in found] == [batch.indices.tolist() for batch in expected]
    for one, other in zip(found[-5:], expected[-5:], strict=True):  # workers were a few batches ahead
        assert_equal(vars(one), vars(other))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_that_cannot_be_decoded(table: AnnotationTable, tmp_path: Path, kind: str) -> None:
    cache = build(table, tmp_path / "cache", kind)
    (cache.folder / "pixels").write_bytes(bytes(int(cache.index["length"].sum())))
    cache.index["height"] += 2
    for one, other in zip(batches_of(table, cache), batches_of(table, None), strict=True):
        assert_equal(vars(one), vars(other))


def test_folder_removed_while_it_is_read(table: AnnotationTable, tmp_path: Path) -> None:
    """Whoever has opened it keeps it."""
    expected = list(batches_of(table, build(table, tmp_path / "cache")))
    cache = build(table, tmp_path / "cache")
    shutil.rmtree(cache.folder)
    for one, other in zip(batches_of(table, cache, workers=2), expected, strict=True):
        assert_equal(vars(one), vars(other))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip(f"mounting is not permitted: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


REMEDY = "so that the image files are read each time; --cache-dir takes a folder elsewhere"


def refused(table: AnnotationTable, root: Path, capfd: pytest.CaptureFixture[str], kind: str = "raw") -> str:
    """Why there is no cache."""
    capfd.readouterr()
    assert open_image_cache(table, kind, SIDE, root, 0) is None
    line = one_line(capfd.readouterr().err)
    assert line.startswith(f"image cache: {root}/images-{kind}-96-") and REMEDY in line
    assert line.endswith(", --cache jpeg needs a quarter of the space") == (kind == "raw")
    return line.split("cannot be written (")[1].split("), so that")[0]


def test_full_disk(
    coco_folder: MakeCocoFolder, small_disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise takes more than JPEGs are thought to. The partial cache is removed."""
    monkeypatch.setattr(image_cache, "CHUNK", 16)
    table = coco_folder([(100, 115)] * 160).load()
    assert refused(table, small_disk, capfd, "jpeg") == "No space left on device"
    assert [path.suffix for path in small_disk.iterdir()] == [".lock"]
    assert shutil.disk_usage(small_disk).used < 10_000


def test_too_little_space(copy: AnnotationTable, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Found before anything is read."""
    for row in range(200):
        make_unreadable(copy.path(row))
    assert refused(copy, small_disk, capfd) == "it needs 0.00238 GB, and 0.00104 are free"
    assert [path.suffix for path in small_disk.iterdir()] == [".lock"]


def test_a_read_only_disk(table: AnnotationTable, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A whole cache is used there, none is begun."""
    folder = build(table, small_disk).folder
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    capfd.readouterr()
    cache = build(table, small_disk)
    assert cache.folder == folder and cache.read(0, (60, 80)) is not None
    assert capfd.readouterr().err == ""
    later(table)
    assert refused(table, small_disk, capfd) == "Read-only file system"
    assert refused(table, small_disk / "deeper", capfd) == "Read-only file system"
    assert cache.read(1, (60, 80)) is not None


def test_a_file_in_place_of_the_folder(
    table: AnnotationTable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert refused(table, tmp_path / "file", capfd) == "Not a directory"
    assert refused(table, tmp_path / "file/deeper", capfd) == "Not a directory"
    assert (tmp_path / "file").read_text() == "mine"


def test_the_usual_folder(table: AnnotationTable) -> None:
    cache = open_image_cache(table, "raw", SIDE, None, 0)
    assert cache is not None and cache.folder.parent == cache_root()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a home")
def test_no_home_directory(table: AnnotationTable, capfd: pytest.CaptureFixture[str]) -> None:
    def start() -> None:
        for name in ("HOME", "XDG_CACHE_HOME", "DIRECT_PT_CACHE"):
            os.environ.pop(name, None)
        os.setuid(54_321)
        sys.exit(open_image_cache(table, "raw", SIDE, None, 0) is not None)

    process = FORK.Process(target=start)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "home directory" in one_line(capfd.readouterr().err)


# Whole runs


@runs.cpu_only
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_run_is_uninterrupted(
    demo: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the bit, and without a look at the images: by then they hold zeros."""
    shutil.copytree(demo, tmp_path / "data")
    flags = (*runs.PRETRAIN, *runs.EIGHT, *runs.train_part(tmp_path / "data"), "--max-steps", 2, "--save-every", 1)
    flags += ("--log-every", 1, "--cache", kind, "--cache-dir", tmp_path / "cache")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    runs.train("pretrain", *flags, "--output-dir", whole)
    assert f"image cache ({kind})" in capfd.readouterr().err
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step-2"))
    pictures = sorted((tmp_path / "data/images").glob("train_*"))
    assert len(pictures) == runs.TRAIN_IMAGES
    for path in pictures:
        make_unreadable(path)
    runs.train("pretrain", *flags, "--output-dir", resumed, "--resume")
    captured = capfd.readouterr()
    assert "image cache" not in captured.err and "unreadable" not in captured.out + captured.err
    assert runs.records(resumed) == runs.records(whole)
    assert runs.largest_difference(runs.weights(resumed), runs.weights(whole)) == 0


def test_run_on_a_full_disk(demo: Path, small_disk: Path, tmp_path: Path) -> None:
    """It goes on from the files, to the end."""
    (small_disk / "others").write_bytes(bytes(1_000_000))
    flags = (*runs.PRETRAIN, *runs.EIGHT, *runs.train_part(demo), "--max-steps", 1)
    flags += ("--cache", "raw", "--cache-dir", small_disk, "--output-dir", tmp_path / "run")
    process = runs.start_script("pretrain", *flags)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "done: " in printed
    assert REMEDY in one_line(errors) and str(small_disk) in one_line(errors)
    assert sorted(path.suffix for path in small_disk.iterdir()) == ["", ".lock"]
