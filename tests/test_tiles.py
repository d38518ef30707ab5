"""Large images in tiles: where they lie, and that each object is found once, wherever the seams run."""

import tracemalloc
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
from PIL import Image

from direct_pt.errors import InputError
from direct_pt.images.tiles import Tiling, Window, merged, tile_starts
from direct_pt.onnx_detector import Found, paste_masks

SIZE = (1000, 1400)  # height, width
TILES = Tiling(400, 0.2)  # neighbours share 80 pixels and more
VISIBLE = 0.3  # the share of an object that a window must show for it to be found there


def test_windows() -> None:
    """They cover the image, share enough, and stay inside; a small image is one window."""
    for side, tile, overlap in ((1000, 400, 0.2), (401, 400, 0.2), (400, 400, 0.2), (77, 400, 0.5), (5000, 64, 0.9)):
        starts = tile_starts(side, tile, overlap)
        assert starts[0] == 0 and starts[-1] == max(0, side - tile)
        assert all(after - before <= tile * (1 - overlap) for before, after in pairwise(starts))
    windows = TILES.windows(SIZE)
    assert windows[-1] == (0, 0, 1400, 1000) and len(windows) == 3 * 5 + 1
    covered = np.zeros(SIZE, int)
    for x1, y1, x2, y2 in windows[:-1]:
        assert (x2 - x1, y2 - y1) == (400, 400)
        covered[y1:y2, x1:x2] += 1
    assert covered.min() == 1
    assert Tiling(1400).windows(SIZE) == [(0, 0, 1400, 1000)]
    assert [window[3] for window in TILES.windows((300, 900))] == [300] * 4  # one row of tiles, and the whole


def seen(
    windows: list[Window],
    boxes: np.ndarray,
    labels: np.ndarray,
    least_side: Callable[[Window], float],
    visible: float = VISIBLE,
) -> list[Found]:
    """What a detector that sees all but what is too small finds in each window: the visible parts, and ellipses."""
    rng, parts = np.random.default_rng(0), []
    for window in windows:
        low, high = np.array(window[:2]), np.array(window[2:])
        inside = np.hstack([np.maximum(boxes[:, :2], low), np.minimum(boxes[:, 2:], high)])
        sides = np.maximum(inside[:, 2:] - inside[:, :2], 0)
        whole = boxes[:, 2:] - boxes[:, :2]
        rows = np.flatnonzero(
            (sides.prod(axis=1) > visible * whole.prod(axis=1)) & (sides.min(axis=1) >= least_side(window))
        )
        noise = rng.uniform(-1, 1, (len(rows), 4))
        found = np.clip(inside[rows] + noise, np.tile(low, 2), np.tile(high, 2)) - np.tile(low, 2)
        scores = rng.uniform(0.3, 1, len(rows)).astype(np.float32)
        order = np.argsort(-scores)
        masks = np.array([ellipse(boxes[row], inside[row]) for row in rows], np.float32).reshape(-1, 28, 28)
        parts.append(Found(found[order].astype(np.float32), scores[order], labels[rows][order], masks[order]))
    return parts


def ellipse(box: np.ndarray, part: np.ndarray) -> np.ndarray:
    """[28, 28] of the ellipse in a box, as a part of the box shows it."""
    places = (np.arange(28) + 0.5) / 28
    x, y = (part[axis] + places * (part[axis + 2] - part[axis]) for axis in (0, 1))
    (middle_x, middle_y), (half_x, half_y) = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return (((y - middle_y) / half_y) ** 2)[:, None] + ((x - middle_x) / half_x) ** 2 <= 1


def assert_found_once(found: Found, boxes: np.ndarray, labels: np.ndarray, tolerance: float) -> None:
    """Each box once, within some pixels."""
    assert len(found.scores) == len(boxes)
    assert (np.diff(found.scores) <= 0).all()
    distance = np.abs(found.boxes[:, None] - boxes[None]).max(axis=2) + 1000 * (found.labels[:, None] != labels[None])
    assert sorted(distance.argmin(axis=1).tolist()) == list(range(len(boxes)))
    assert distance.min(axis=1).max() <= tolerance


def objects_on_seams(side: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes centred on every edge and corner of every tile, and between, that do not overlap much; and their labels."""
    edges = [
        sorted({place for start in tile_starts(length, 400, 0.2) for place in (start, start + 400)}) for length in SIZE
    ]
    centres = [(x, y) for y in [*edges[0], 555] for x in [*edges[1], 601]]
    chosen: list[tuple[float, float]] = []
    for x, y in centres:
        inside = side / 2 <= x <= SIZE[1] - side / 2 and side / 2 <= y <= SIZE[0] - side / 2
        if inside and all(max(abs(x - a), abs(y - b)) >= side for a, b in chosen):
            chosen.append((x, y))
    middle = np.array(chosen)
    return np.hstack([middle - side / 2, middle + side / 2]), np.arange(len(chosen)) % 3


@pytest.mark.parametrize("side", [12, 30, 60, 76])
def test_small_objects_on_every_seam(side: int) -> None:
    """What is smaller than the overlap is whole in some tile: that box is kept, also where the whole image shows it."""
    boxes, labels = objects_on_seams(side)
    assert len(boxes) > 15
    windows = TILES.windows(SIZE)
    for least in (0.0, 1e9):
        parts = seen(windows, boxes, labels, lambda window, least=least: least if window == windows[-1] else 3)
        assert sum(len(part.scores) for part in parts) > 1.5 * len(boxes)
        assert_found_once(merged(windows, parts), boxes, labels, tolerance=1.5)


@pytest.mark.parametrize("side", [150, 250, 350])
def test_large_objects_on_every_seam(side: int) -> None:
    """What is larger is in pieces: the whole image's box is kept, or, without one, the box around the pieces."""
    boxes, labels = objects_on_seams(side)
    windows = TILES.windows(SIZE)
    parts = seen(windows, boxes, labels, lambda window: 5)
    found = merged(windows, parts)
    assert_found_once(found, boxes, labels, tolerance=1.5)
    blind = seen(windows, boxes, labels, lambda window: 1e9 if window == windows[-1] else 5)
    found = merged(windows, blind)
    shown = found.scores > 0
    assert_found_once(found.keep(shown), boxes, labels, tolerance=0.75 * side)


def test_an_object_over_many_tiles() -> None:
    """Longer than three tiles, which only pieces show: one box around them, and their masks joined."""
    boxes, labels = np.array([[50.0, 450.0, 1350.0, 530.0]]), np.array([1])
    windows = TILES.windows(SIZE)[:-1]
    parts = seen(windows, boxes, labels, lambda window: 40, visible=0.0)
    for part in parts:
        part.masks = np.ones_like(part.masks)
    assert sum(len(part.scores) for part in parts) >= 5
    found = merged(windows, parts)
    assert_found_once(found, boxes, labels, tolerance=1.5)
    assert found.masks is not None
    assert paste_masks(found.masks, found.boxes, SIZE).sum() == pytest.approx(1300 * 80, rel=0.02)


def test_masks() -> None:
    """The mask of an object is its own, from whichever window it comes."""
    boxes, labels = objects_on_seams(250)
    windows = TILES.windows(SIZE)
    found = merged(windows, seen(windows, boxes, labels, lambda window: 5))
    assert found.masks is not None
    areas = paste_masks(found.masks, found.boxes, SIZE).sum(axis=(1, 2))
    np.testing.assert_allclose(areas, np.pi / 4 * 250**2, rtol=0.05)


def test_neighbours_stay_apart() -> None:
    """Objects side by side, of one class, in the overlap of two tiles: as many as there are."""
    x = np.arange(300, 700, 26.0)
    boxes = np.stack([x, np.full_like(x, 500), x + 24, np.full_like(x, 524)], axis=1)
    labels = np.zeros(len(boxes), np.int64)
    windows = TILES.windows(SIZE)
    assert_found_once(merged(windows, seen(windows, boxes, labels, lambda window: 3)), boxes, labels, tolerance=1.5)


def test_many_tiles_take_little_memory() -> None:
    """Not a table of all pairs of them: of 18,000 it would take hundreds of megabytes."""
    windows = Tiling(64).windows((7000, 7000))
    empty = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), None)
    parts = [empty] * len(windows)
    one = Found(np.array([[10, 10, 30, 30]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), None)
    parts[0] = parts[9999] = one
    tracemalloc.start()
    found = merged(windows, parts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(windows) > 18_000 and len(found.scores) == 2 and peak < 20e6


def test_nothing_and_box_detectors() -> None:
    """No detection at all; and none with masks."""
    empty = Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    windows = TILES.windows(SIZE)
    found = merged(windows, [empty] * len(windows))
    assert found.boxes.shape == (0, 4) and found.masks is None
    one = Found(np.array([[1, 2, 30, 40]], np.float32), np.array([0.5], np.float32), np.array([2]))
    found = merged(windows, [one, *[empty] * (len(windows) - 1)])
    assert found.boxes.tolist() == [[1, 2, 30, 40]] and found.masks is None and found.labels.tolist() == [2]


# The scripts


def test_scripts(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """Tiles as large as the image change nothing; smaller ones find objects in all of it. The results name them."""
    eager = runs.make_eager(pretrained, tmp_path / "eager")
    sizes = ("--short-side", runs.SIZE, "--long-side", 128, *runs.MACHINE, "--batch-size", 1)
    for name, tiles in (("whole", ()), ("large", ("--tiles", 100)), ("small", ("--tiles", 64, "--overlap", 0.5))):
        flags = ("--checkpoint", eager, "--data", demo, *sizes, *tiles)
        runs.call_script("evaluate", *flags, "--output-dir", tmp_path / name)
        flags = ("--checkpoint", eager, demo / "images", *runs.MACHINE, "--score-threshold", 0.1, *tiles)
        runs.call_script("predict", *flags, "--output-dir", tmp_path / f"found-{name}")
    whole, large = (runs.read_json(tmp_path / name / "metrics.json") for name in ("whole", "large"))
    assert whole["bbox"] == large["bbox"] and "tiles" not in whole
    assert large["tiles"] == {"size": 100, "overlap": 0.2}
    for kind in ("", "found-"):
        ours, theirs = (runs.read_json(tmp_path / f"{kind}{name}/predictions.json") for name in ("whole", "large"))
        assert len(ours) == len(theirs) > 100
        key = partial(sorted, key=lambda row: (row["image_id"], row["category_id"], -row["score"], row["bbox"]))
        assert all(
            one["bbox"] == pytest.approx(other["bbox"], abs=1e-3)
            for one, other in zip(key(ours), key(theirs), strict=True)
        )
    big = tmp_path / "big.png"
    picture = Image.open(next((demo / "images").iterdir())).convert("RGB")
    Image.fromarray(np.tile(np.asarray(picture), (4, 5, 1))).save(big)
    flags = ("--checkpoint", eager, big, *runs.MACHINE, "--score-threshold", 0.1, "--tiles", 64)
    runs.call_script("predict", *flags, "--output-dir", tmp_path / "big")
    boxes = np.array([row["bbox"] for row in runs.read_json(tmp_path / "big/predictions.json")])
    width, height = Image.open(big).size
    assert len(boxes) > 100 and boxes[:, :2].min() >= 0
    assert (boxes[:, 0] + boxes[:, 2]).max() <= width + 1e-3 and (boxes[:, 1] + boxes[:, 3]).max() <= height + 1e-3
    assert boxes[:, 0].max() > 0.7 * width and boxes[:, 1].max() > 0.7 * height


@pytest.mark.parametrize(
    "flags", [("--tiles", "10"), ("--tiles", "x"), ("--tiles", "64", "--overlap", "1"), ("--overlap", "0.3")]
)
def test_bad_flags(flags: tuple[str, ...], pretrained: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the flag."""
    for name, rest in (("predict", (demo / "images",)), ("evaluate", ("--data", demo))):
        with pytest.raises((SystemExit, InputError)) as error:
            runs.call_script(name, "--checkpoint", pretrained, *rest, *flags)
        said = capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)
        assert flags[-2] in said
