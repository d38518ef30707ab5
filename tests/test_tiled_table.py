"""Tables of tiles: pixels, boxes and outlines are those of the images; parts of large files; training on tiles."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
from accelerate import Accelerator
from conftest import MakeCocoFolder
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask

from direct_pt.checkpoint import from_pretrained
from direct_pt.coco_eval import evaluate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.evaluation_loader import EvaluationImages, evaluation_loader
from direct_pt.data.outlines import run_length_counts
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.data.tiled_table import MAX_EMPTY_SHARE, cut_run_lengths, tiled, training_tiles
from direct_pt.errors import InputError, StopSignal
from direct_pt.images import windows
from direct_pt.images.decoding import Decoding, UnreadableImage, read_image
from direct_pt.images.tiles import Tiling, trained_tiling
from direct_pt.images.windows import Window, read_window
from direct_pt.transforms import TestPreset

SIZES = [(150, 230), (90, 70), (64, 300)]
TILING = Tiling(64, 0.25)


def objects_of(size: tuple[int, int], image: int, seed: int, count: int = 8) -> list[dict[str, Any]]:
    """Random objects, some beyond the image's edge: with polygons, run lengths, and as crowd regions."""
    rng, found = np.random.default_rng(seed), []
    height, width = size
    for number in range(count):
        x, y = rng.uniform(-5, width - 8), rng.uniform(-5, height - 8)
        w, h = rng.uniform(6, 60, 2)
        polygon = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
        value: Any = [polygon]
        if number % 2:
            drawn = coco_mask.decode(coco_mask.frPyObjects([polygon], height, width))[:, :, 0]
            runs_of_it = coco_mask.encode(np.asfortranarray(drawn))
            value = {"size": [height, width], "counts": runs_of_it["counts"].decode()}
            if not drawn.any():
                continue
        found.append(
            {
                "image_id": image,
                "bbox": [x, y, w, h],
                "area": w * h / 2,
                "iscrowd": int(number == 7),
                "segmentation": value,
                "category_id": (7, 2)[number % 2],
            }
        )
    return found


@pytest.fixture
def table(coco_folder: MakeCocoFolder) -> AnnotationTable:
    """Three images, larger than a tile in one side or both."""
    annotations = [one for row, size in enumerate(SIZES) for one in objects_of(size, 10 * row + 10, row)]
    return coco_folder(SIZES, annotations).load()


def test_pixels_boxes_and_masks(table: AnnotationTable) -> None:
    """Of each tile: those of its part of the image, whatever the objects' outlines."""
    tiles, origins = tiled(table, TILING)
    assert origins.tolist() == sorted(origins.tolist()) and set(origins.tolist()) == {0, 1, 2}
    assert len(tiles) == sum(len(TILING.windows(size)) for size in SIZES)
    assert tiles.places is not None
    seen = set()
    for row, image in enumerate(origins.tolist()):
        x, y, *full = tiles.places[row].tolist()
        assert tuple(full) == SIZES[image]
        height, width = tiles.image_size(row)
        np.testing.assert_array_equal(tiles.read_image(row), table.read_image(image)[y : y + height, x : x + width])
        ours, whole = tiles.objects(row, True), table.objects(image, True)
        low, high = np.array([x, y]), np.array([x + width, y + height])
        cut = np.hstack([np.maximum(whole.boxes[:, :2], low), np.minimum(whole.boxes[:, 2:], high)])
        kept = (cut[:, 2:] - cut[:, :2] >= 1).all(axis=1)
        np.testing.assert_allclose(ours.boxes, cut[kept] - np.tile(low, 2), atol=1e-9)
        for name in ("labels", "areas", "crowd"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(whole, name)[kept])
        samples = [
            EvaluationImages(one, TestPreset(*sorted(one.image_size(place))), "masks")[0, place]
            for one, place in ((tiles, row), (table, image))
        ]
        assert samples[0].masks is not None and samples[1].masks is not None
        for place, other in enumerate(np.flatnonzero(kept).tolist()):
            ours_zoom, zoom = (
                sample.masks.zooms[at].item() for sample, at in zip(samples, (place, other), strict=True)
            )
            if ours_zoom != zoom:
                continue  # of a small part it is finer
            expected = samples[1].masks.dense(other)[y * zoom : (y + height) * zoom, x * zoom : (x + width) * zoom]
            differ = (samples[0].masks.dense(place) != expected).float().mean()
            assert differ < 0.001
            seen.add(type(ours.segmentations[place]))
    assert seen == {list, dict}
    assert tiles.select(np.array([3])).places is not None
    assert len(tiles.select(np.array([3, 1])).objects(1, True)) == len(tiles.objects(1, True))


def test_run_lengths() -> None:
    """Cut as pixels are, byte for byte what pycocotools writes."""
    rng = np.random.default_rng(0)
    for turn in range(300):
        height, width = rng.integers(1, 50, 2).tolist()
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8) if turn % 4 else np.zeros((height, width))
        if turn % 4 == 1:
            mask = np.zeros((height, width), np.uint8)
            mask[height // 3 :, width // 3 : width // 2 + 1] = 1
        if turn % 8 == 2:
            mask[:] = 1
        mask = np.asfortranarray(mask.astype(np.uint8))
        compressed = np.frombuffer(coco_mask.encode(mask)["counts"], np.uint8)
        assert run_length_counts(compressed, np.array([0, len(compressed)]))[0].sum() == height * width
        x1, y1 = int(rng.integers(width)), int(rng.integers(height))
        window = Window(x1, y1, int(rng.integers(x1 + 1, width + 1)), int(rng.integers(y1 + 1, height + 1)))
        part = np.asfortranarray(mask[window.y1 : window.y2, window.x1 : window.x2])
        assert cut_run_lengths(compressed, (height, width), window) == coco_mask.encode(part)["counts"]
    assert cut_run_lengths(np.zeros(0, np.uint8), (5, 5), Window(0, 0, 2, 2)) == b""


def test_most_empty_tiles_are_left_out(coco_folder: MakeCocoFolder) -> None:
    """They are a fifth of what is trained on; whole images and all tiles with objects stay. The table says so."""
    sizes = [(640, 640)] * 3
    annotations = [{"image_id": 10, "bbox": [300, 300, 20, 20], "area": 400, "iscrowd": 0}]
    table = coco_folder(sizes, annotations).load()
    tiles = training_tiles(table, TILING)
    everything, _ = tiled(table, TILING)
    with_objects = int((everything.targets_per_image() > 0).sum())
    assert int((tiles.targets_per_image() > 0).sum()) == with_objects >= 2
    whole = (tiles.sizes == 640).all(axis=1)
    assert whole.sum() == 3
    empty = (tiles.targets_per_image() == 0) & ~whole
    assert 0 < empty.sum() <= MAX_EMPTY_SHARE * len(tiles)
    text = tiles.describe()
    assert f"tiles without objects left out: {len(everything) - len(tiles)}" in text
    assert "in tiles of 64, overlap 0.25: 3" in text
    again = training_tiles(table, TILING)
    np.testing.assert_array_equal(tiles.places, again.places)


# Parts of files


def pictures(folder: Path) -> dict[str, Path]:
    """Files of many kinds, by name."""
    rng = np.random.default_rng(0)
    pixels = np.clip(np.cumsum(rng.normal(0, 3, (170, 230, 3)), axis=1) + 128, 0, 255).astype(np.uint8)
    photo, exif = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2)), Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "a.jpg": (photo, {}), "progressive.jpg": (photo, {"progressive": True}), "turned.jpg": (photo, {"exif": exif}),
        "a.png": (photo, {}), "grey.png": (photo.convert("L"), {}), "grey.jpg": (photo.convert("L"), {}),
        "palette.png": (photo.convert("P"), {}), "clear.png": (photo.convert("RGBA"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}), "lab.tif": (photo.convert("LAB"), {}),
        "bits.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 200), {}), "one.tif": (photo.convert("1"), {}),
        "deflate.tif": (photo, {"compression": "tiff_deflate"}), "lzw.tif": (photo, {"compression": "tiff_lzw"}),
        "jpeg.tif": (photo, {"compression": "jpeg"}), "a.webp": (photo, {"quality": 80}), "a.bmp": (photo, {}),
    }  # fmt: skip
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in kinds}


@pytest.mark.parametrize("large", [False, True])
def test_parts_are_parts_of_the_image(large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixel for pixel, of whatever kind of file, for large files and small ones; a reduced one within two values."""
    monkeypatch.setattr(windows, "LARGE_PIXELS", 1 if large else 10**9)
    piecewise = []
    for name, path in pictures(tmp_path).items():
        whole = read_image(path)
        size = whole.shape[0], whole.shape[1]
        for window in (Window(50, 31, 122, 99), Window.whole(size)):
            part = read_window(path, name, size, window)
            np.testing.assert_array_equal(part, whole[window.y1 : window.y2, window.x1 : window.x2], name)
        if large and windows._read_piecewise(path, name, size, Window(0, 0, 5, 5), (5, 5)) is not None:
            piecewise.append(name)
        reduced = read_window(path, name, size, Window.whole(size), (50, 50))
        assert min(reduced.shape[:2]) >= 50
        factor = round(size[0] / reduced.shape[0])
        mean = np.asarray(Image.fromarray(whole).reduce(factor)).astype(int)
        assert mean.shape == reduced.shape and np.abs(mean - reduced).mean() < 2, name
    assert not large or {"a.jpg", "a.png", "deflate.tif", "lzw.tif", "jpeg.tif", "a.webp", "grey.png"} <= {*piecewise}
    assert not {"turned.jpg", "clear.png", "cmyk.jpg", "lab.tif", "bits.png", "a.bmp"} & {*piecewise}


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are unreadable in parts as they are as a whole, with the usual decoder's reason."""
    for large in (1, 10**9):
        monkeypatch.setattr(windows, "LARGE_PIXELS", large)
        for name in ("a.jpg", "a.png", "deflate.tif"):
            path = pictures(tmp_path)[name]
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            with pytest.raises(UnreadableImage) as whole:
                read_image(path)
            for window in (Window(50, 100, 122, 169), Window.whole((170, 230))):
                with pytest.raises(UnreadableImage) as part:
                    read_window(path, str(path), (170, 230), window)
                assert str(part.value) == str(whole.value)
        with pytest.raises(UnreadableImage, match="annotation says"):
            read_window(pictures(tmp_path)["a.png"], "a.png", (171, 230), Window(0, 0, 5, 5))


def test_alpha_and_exif_count(tmp_path: Path) -> None:
    """The choices of decoding hold for parts."""
    path = pictures(tmp_path)["turned.jpg"]
    for decoding, size in ((Decoding(), (230, 170)), (Decoding(exif=False), (170, 230))):
        whole = read_image(path, decoding=decoding)
        part = read_window(path, "turned.jpg", size, Window(3, 5, 90, 77), decoding=decoding)
        np.testing.assert_array_equal(part, whole[5:77, 3:90])


def read_in_a_fork(path: Path, queue: Any) -> None:
    window = Window(10, 10, 50, 60)
    queue.put((windows._libvips() is None, read_window(path, "a.png", (170, 230), window).tolist()))


def test_forked_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process forked after libvips was in use does without it, rather than wait for threads that it does not have."""
    monkeypatch.setattr(windows, "LARGE_PIXELS", 1)
    path, context = pictures(tmp_path)["a.png"], multiprocessing.get_context("fork")
    expected = read_window(path, "a.png", (170, 230), Window(10, 10, 50, 60)).tolist()
    assert windows._libvips() is not None
    queue = context.SimpleQueue()
    process = context.Process(target=read_in_a_fork, args=(path, queue))
    process.start()
    is_without, pixels = queue.get()
    process.join()
    assert is_without and pixels == expected


WITHOUT_PYVIPS = """
import sys
{}
from pathlib import Path
from direct_pt.images import windows
windows.LARGE_PIXELS = 1
for x in (0, 9):
    windows.read_window(Path(sys.argv[1]), "a.png", (170, 230), windows.Window(x, 0, x + 5, 5))
print(windows._decoded.cache_info().misses)
"""


def test_without_pyvips(tmp_path: Path) -> None:
    """It is said once, with the remedy, that large files are decoded whole. A program may import it itself."""
    path = pictures(tmp_path)["a.png"]
    for first, decoded_whole in (("import pyvips", 0), ("sys.modules['pyvips'] = None", 1)):
        command = [sys.executable, "-c", WITHOUT_PYVIPS.format(first), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) == decoded_whole
        assert done.stderr.count("\n") == decoded_whole
        for text in ("decoded whole, as there is no pyvips", "pip install pyvips pyvips-binary"):
            assert (text in done.stderr) == bool(decoded_whole)


MEASURED = """
import resource, sys
from pathlib import Path
from direct_pt.images.windows import Window, read_window
path, side = Path(sys.argv[1]), int(sys.argv[2])
read_window(path, "x", (side, side), Window(0, 0, 64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, side - 640, side // 4):
    read_window(path, "x", (side, side), Window(start, start, start + 640, start + 640))
read_window(path, "x", (side, side), Window(0, 0, side, side), (800, 800))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
"""


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Parts of a TIFF of 6,400 x 6,400 pixels, and the whole reduced, take far less memory than its 123 MB."""
    side = 6400
    path = tmp_path / "large.tif"
    pixels = np.tile(np.arange(256, dtype=np.uint8), (side, side // 256 + 1))[:, :side]
    import pyvips

    image = pyvips.Image.new_from_array(np.dstack([pixels] * 3))
    image.write_to_file(str(path), tile=True, compression="deflate")
    del image, pixels
    command = [sys.executable, "-c", MEASURED, str(path), str(side)]
    megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert megabytes < 40


# Training and testing


@pytest.fixture(scope="module")
def large_set(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images, four to an image of 128 pixels, with their objects and outlines."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        content = runs.read_json(demo / f"annotations/instances_{split}.json")
        images = []
        for start in range(0, len(content["images"]) - 3, 4):
            canvas = Image.new("RGB", (128, 128))
            for place, record in enumerate(content["images"][start : start + 4]):
                x, y = 64 * (place % 2), 64 * (place // 2)
                canvas.paste(Image.open(demo / "images" / record["file_name"]), (x, y))
                for one in content["annotations"]:
                    if one["image_id"] == record["id"] and "moved" not in one:
                        left, top, *sides = one["bbox"]
                        one |= {"moved": True, "image_id": -1 - start, "bbox": [left + x, top + y, *sides]}
                        one["segmentation"] = [
                            (np.array(polygon).reshape(-1, 2) + np.array([x, y])).ravel().tolist()
                            for polygon in one["segmentation"]
                        ]
            name = f"{split}_{start}.png"
            canvas.save(folder / "images" / name)
            images.append({"id": -1 - start, "file_name": name, "height": 128, "width": 128})
        known = {image["id"] for image in images}
        for image in images:
            image["id"] += 1000
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in known]
        for one in content["annotations"]:
            one["image_id"] += 1000
        content["images"] = images
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return folder


TILES = ("--train-tiles", 64, "--overlap", 0)
STEPS = ("--max-steps", 4, *runs.EIGHT)


def test_both_stages_and_what_follows(large_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 1 learns from tiles and tests on them; stage 2, evaluate.py, predict.py and Python do so by themselves."""
    data = ("--data", large_set)
    first = (*data, *runs.TINY, *TILES, *STEPS)
    runs.train("pretrain", *first, "--output-dir", tmp_path / "one")
    with pytest.raises(StopSignal):
        runs.train("pretrain", *first, "--output-dir", tmp_path / "two", "--max-hours", "1e-9")
    runs.train("pretrain", *first, "--output-dir", tmp_path / "two", "--resume")
    ours, theirs = (runs.weights(tmp_path / name / "model") for name in ("one", "two"))
    assert runs.largest_difference(ours, theirs) == 0
    said = capsys.readouterr().out
    assert "files, whole and in tiles of 64, overlap 0: 6" in said
    assert "--cache none: each tile decodes its whole image; jpeg and raw keep copies of the tiles" in said
    runs.train("finetune", *data, *runs.FINETUNE, *STEPS, "--init", tmp_path / "one", "--output-dir", tmp_path / "fine")
    history = runs.read_json(tmp_path / "fine/model/config.json")["history"]
    assert [stage["tiles"] for stage in history] == [{"size": 64, "overlap": 0}] * 2
    last = runs.records(tmp_path / "fine")[-1]
    runs.call_script("evaluate", *data, "--checkpoint", tmp_path / "fine", "--weights", "last", *runs.MACHINE,
                     "--batch-size", 8, "--output-dir", tmp_path / "measured")  # fmt: skip
    metrics = runs.read_json(tmp_path / "measured/metrics.json")
    assert metrics["tiles"] == {"size": 64, "overlap": 0} and metrics["bbox"] == last["bbox"]
    detector = from_pretrained(tmp_path / "fine")
    assert detector.tiling == Tiling(64, 0) == trained_tiling(history)
    image = next((large_set / "images").iterdir())
    own, same, whole = (
        detector.predict(image, 0.0, tiles=tiles, overlap=overlap)[0]["boxes"]
        for tiles, overlap in ((None, None), (64, 0), (0, None))
    )
    np.testing.assert_array_equal(own, same)
    assert len(whole) != len(own)
    with pytest.raises(InputError, match="tiles"):
        detector.predict(image, tiles=3)
    with pytest.raises(InputError, match="overlap"):
        detector.predict(image, tiles=0, overlap=0.5)
    flags = ("--checkpoint", tmp_path / "fine", image, *runs.MACHINE)
    runs.call_script("predict", *flags, "--output-dir", tmp_path / "found")
    assert "whole and in tiles of 64, overlap 0" in capsys.readouterr().out
    flags = (*data, *runs.FINETUNE, *STEPS, "--init", tmp_path / "one", "--train-tiles", 0)
    runs.train("finetune", *flags, "--output-dir", tmp_path / "whole")
    assert "tiles" not in runs.read_json(tmp_path / "whole/model/config.json")["history"][-1]


def test_copies_of_tiles(large_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cache of stage 1 has copies of the tiles, apart from those of the images."""
    for name, tiles in (("tiles", TILES), ("whole", ())):
        flags = (*runs.train_part(large_set), *runs.TINY, *tiles, *STEPS, "--cache", "raw", "--cache-dir", tmp_path)
        runs.train("pretrain", *flags, "--output-dir", tmp_path / "runs" / name)
    folders = [path for path in tmp_path.iterdir() if path.name.startswith("images-raw") and path.is_dir()]
    assert sorted(runs.read_json(folder / "manifest.json")["images"] for folder in folders) == [6, 30]
    assert "decodes its whole image" not in capsys.readouterr().out


def test_processes_share_the_images(table: AnnotationTable) -> None:
    """One process gets all tiles of an image, in batches of one shape that are the same for any number of processes."""
    tiles, origins = tiled(table, TILING)

    def batches(rank: int, world: int) -> list[list[int]]:
        loader = evaluation_loader(tiles, TestPreset(64, 64), 4, rank, world, 0, origins=origins)
        return [batch.indices.tolist() for batch in loader]

    alone = batches(0, 1)
    assert sorted(row for rows in alone for row in rows) == list(range(len(tiles)))
    for rows in alone:
        assert len(set(origins[rows].tolist())) == 1 and len(np.unique(tiles.sizes[rows], axis=0)) == 1
    shares = [batches(rank, 2) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    owners = [{int(origins[rows[0]]) for rows in share} for share in shares]
    assert not owners[0] & owners[1]


def test_losses_of_the_tiles(large_set: Path, pretrained: Path, accelerator: Accelerator, tmp_path: Path) -> None:
    """The validation loss is that of what is looked at; detections lie in all of the image."""
    detector = from_pretrained(runs.make_eager(pretrained, tmp_path / "eager")).eval()
    val = load_tables(DataOptions(data=large_set))["val"]
    tiling = Tiling(64, 0)
    metrics, found = evaluate(detector, val, TestPreset(64, 64, tiling), 3, accelerator, 0, with_losses=True)
    tiles, _ = tiled(val, tiling)
    of_tiles, _ = evaluate(detector, tiles, TestPreset(64, 64), 3, accelerator, 0, with_losses=True)
    assert metrics["val_loss"] == pytest.approx(of_tiles["val_loss"], rel=1e-5)
    assert set(found.images.tolist()) == {0, 1}
    assert (found.boxes[:, :2].max(axis=0) > 70).all()


def test_bad_flags(large_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, that names the flag."""
    for flags, word in (
        (("--train-tiles", 10), "--train-tiles"), (("--overlap", 0.3), "--train-tiles"),
        (("--train-tiles", 64, "--overlap", 2), "--overlap"), (("--train-tiles", 64, "--streaming"), "--train-tiles"),
    ):  # fmt: skip
        with pytest.raises((SystemExit, InputError)) as error:
            runs.train("pretrain", "--data", large_set, *runs.TINY, *flags, "--output-dir", tmp_path / "run")
        assert word in (capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value))
    assert not (tmp_path / "run").exists()
