"""Masks from outlines to targets against exact areas, and from probabilities to run lengths against the whole image."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align

from direct_pt.batch import Objects, PackedMasks, Sample, collate
from direct_pt.images import rasterize
from direct_pt.images.geometry import Geometry
from direct_pt.models import masks
from direct_pt.models.mask_encoding import encode_masks
from direct_pt.models.masks import MaskHead, mask_targets
from direct_pt.onnx_detector import paste_masks, paste_windows
from direct_pt.transforms import render

HEIGHT, WIDTH = 480, 640  # of the original images
SIDE = 448  # of the samples
CELLS, POINTS = 28, 16  # of a target, and of a cell, a side
Outline = list[np.ndarray]  # closed curves [P, 2], of which an object is the union

# Shapes: outlines of 240 points, about the origin. Sizes and places come later.

ROUND = np.arange(240) * 2 * np.pi / 240


def polar(radius: np.ndarray | float, angle: np.ndarray = ROUND) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def turned(outline: Outline, rng: np.random.Generator) -> Outline:
    cosine, sine = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
    return [curve @ np.array([[cosine, sine], [-sine, cosine]]) for curve in outline]


def rotated(rng: np.random.Generator) -> Outline:
    """A rectangle or an ellipse."""
    aspect = [1, rng.uniform(0.25, 1)]
    square = polar(1 / np.maximum(abs(np.cos(ROUND)), abs(np.sin(ROUND))))
    return turned([square * aspect if rng.random() < 0.5 else polar(1) * aspect], rng)


def concave(rng: np.random.Generator) -> Outline:
    """A star or a crescent."""
    arc = np.linspace(-0.8, 0.8, 120) * np.pi
    crescent = np.concatenate([polar(1, arc), polar(0.6, arc[::-1])])
    star = polar(1 + 0.5 * np.sin(rng.integers(3, 7) * ROUND))
    return turned([star if rng.random() < 0.5 else crescent], rng)


def mixed(rng: np.random.Generator) -> Outline:
    return rotated(rng) if rng.random() < 0.5 else concave(rng)


def several(rng: np.random.Generator) -> Outline:
    """Three ellipses, which touch or not."""
    places = ((-0.6, -0.3), (0.5, -0.4), (0.1, 0.6))
    return [polar(1) * rng.uniform(0.25, 0.6, 2) + place for place in places]


def thin(rng: np.random.Generator) -> Outline:
    """An upright or a lying ellipse."""
    ellipse = polar(1) * [1, rng.uniform(0.03, 0.1)]
    return [ellipse[:, :: 1 if rng.random() < 0.5 else -1]]


@dataclass(frozen=True)
class Kind:
    """A kind of object, and how well its targets are met: means and worst of the IoU of cells.

    Attributes:
        shape: its outline.
        sides: its longer side in the sample, least and most.
        mean: at least, over all.
        worst: at least, of each.
        ideal: at least, the mean against the shape that polygons or pixels stand for.
        bitmap: annotated by run lengths, not polygons.
        cut: by the crop.
    """

    shape: Callable[[np.random.Generator], Outline]
    sides: tuple[float, float]
    mean: float
    worst: float
    ideal: float
    bitmap: bool = False
    cut: bool = False


KINDS = {
    "rotated": Kind(rotated, (20, 200), 0.995, 0.97, 0.993),
    "tiny": Kind(mixed, (3, 16), 0.985, 0.93, 0.975),
    "small": Kind(mixed, (16, 40), 0.99, 0.95, 0.98),
    "large": Kind(rotated, (350, 440), 0.998, 0.985, 0.996),
    "cut": Kind(mixed, (40, 250), 0.993, 0.96, 0.978, cut=True),
    "concave": Kind(concave, (20, 200), 0.99, 0.965, 0.965),
    "several": Kind(several, (20, 200), 0.99, 0.95, 0.99),
    "thin": Kind(thin, (30, 250), 0.98, 0.9, 0.98),
    "bitmap": Kind(mixed, (20, 200), 0.987, 0.93, 0.975, bitmap=True),
    "bitmap, tiny": Kind(mixed, (3, 16), 0.97, 0.79, 0.81, bitmap=True),
    "bitmap, cut": Kind(mixed, (40, 250), 0.988, 0.94, 0.978, bitmap=True, cut=True),
}


def covered(outline: Outline, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[len(y), len(x)] bool, which points of a grid lie inside some curve, by counting crossings from the left."""
    inside = np.zeros((len(y), len(x)), bool)
    for start in outline:
        end = np.roll(start, -1, axis=0)
        low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
        row, edge = np.nonzero((y[:, None] > low) & (y[:, None] <= high))
        share = (y[row] - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
        crossing = start[edge, 0] + share * (end[edge, 0] - start[edge, 0])
        changes = np.zeros((len(y), len(x) + 1), np.int64)
        np.add.at(changes, (row, np.searchsorted(x, crossing)), 1)
        inside |= changes.cumsum(axis=1)[:, :-1] % 2 == 1
    return inside


def points_of(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of 16 x 16 points in every cell of a box."""
    shares = (np.arange(CELLS * POINTS) + 0.5) / (CELLS * POINTS)
    return box[0] + shares * (box[2] - box[0]), box[1] + shares * (box[3] - box[1])


def cells_of(inside: np.ndarray) -> np.ndarray:
    """The cells that are covered by half or more."""
    return inside.reshape(CELLS, POINTS, CELLS, POINTS).mean(axis=(1, 3)) >= 0.5


@dataclass
class Scene:
    """A sample, and what its objects really are.

    Attributes:
        sample: what `render` made of it.
        geometry: that it went through.
        annotated: exact outlines in the sample's frame, or bitmaps in the original one, in the order of the labels.
        ideal: the shapes in the sample's frame.
    """

    sample: Sample
    geometry: Geometry
    annotated: list[Outline] | list[np.ndarray]
    ideal: list[Outline]

    def exact(self, label: int, box: np.ndarray) -> np.ndarray:
        """The cells of `box` that the object as annotated covers by half or more."""
        x, y = points_of(box)
        annotated = self.annotated[label]
        if isinstance(annotated, list):
            return cells_of(covered(annotated, x, y))
        geometry = self.geometry
        x = geometry.size[1] - x if geometry.flip else x
        column = ((x + geometry.corner[1]) / geometry.scale[0]).astype(int)
        row = ((y + geometry.corner[0]) / geometry.scale[1]).astype(int)
        return cells_of(annotated[np.ix_(row.clip(0, HEIGHT - 1), column.clip(0, WIDTH - 1))] > 0)


def scenes(kind: Kind, count: int, seed: int = 0, objects: int = 7) -> Iterator[Scene]:
    """Images with objects of one kind, at the scales and crops of pre-training."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        side = SIDE * rng.uniform(0.8, 1.2) * (2 if kind.cut else 1)
        resized = (round(side * HEIGHT / WIDTH), round(side))
        size = (min(SIDE, resized[0]), min(SIDE, resized[1]))
        corner = (int(rng.integers(resized[0] - size[0] + 1)), int(rng.integers(resized[1] - size[1] + 1)))
        geometry = Geometry((HEIGHT, WIDTH), resized, corner, size, flip=bool(rng.random() < 0.5))
        shapes = [placed(kind, geometry, rng) for _ in range(objects)]
        polygons = [[curve[::4].round(2) for curve in shape] for shape in shapes]
        x, y = np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5
        bitmaps = [covered(shape, x, y).astype(np.uint8) for shape in shapes] if kind.bitmap else []
        corners = [np.concatenate(shape).clip(0, [WIDTH, HEIGHT]) for shape in (shapes if kind.bitmap else polygons)]
        there = Objects(
            boxes=np.stack([np.concatenate([xy.min(axis=0), xy.max(axis=0)]) for xy in corners]),
            labels=np.arange(objects),
            areas=np.ones(objects),
            crowd=np.zeros(objects, bool),
            segmentations=[coco_mask.encode(np.asfortranarray(b)) for b in bitmaps] if kind.bitmap else polygons,
        )
        sample = render(np.zeros((HEIGHT, WIDTH, 3), np.uint8), there, geometry, (SIDE, SIDE))
        ideal = [[geometry.points(curve) for curve in shape] for shape in shapes]
        exact = [[geometry.points(curve) for curve in polygon] for polygon in polygons]
        yield Scene(sample, geometry, bitmaps if kind.bitmap else exact, ideal)


def placed(kind: Kind, geometry: Geometry, rng: np.random.Generator) -> Outline:
    """A shape at its size and place in the original image: inside it, or on the crop's border."""
    outline = kind.shape(rng)
    corners = np.concatenate(outline)
    extent = corners.max(axis=0) - corners.min(axis=0)
    first, window = (np.array(pair[::-1]) / geometry.scale for pair in (geometry.corner, geometry.size))
    side = np.exp(rng.uniform(*np.log(kind.sides))) / max(geometry.scale)
    scale = min(side / extent.max(), *(0.98 * window / extent))
    half = extent * scale / 2
    place = rng.uniform(first + half, first + window - half)
    if kind.cut:
        axis = rng.integers(2)
        place[axis] = first[axis] + rng.integers(2) * window[axis] + rng.uniform(-0.5, 0.5) * half[axis]
        place = place.clip(half, [WIDTH, HEIGHT] - half)
    return [(curve - (corners.max(axis=0) + corners.min(axis=0)) / 2) * scale + place for curve in outline]


def shaken(box: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A box near another one, as proposals are: IoU at least 0.5."""
    while True:
        moved = box + rng.uniform(-0.25, 0.25, 4) * np.tile(box[2:] - box[:2], 2)
        moved = moved.clip(0, [size[1], size[0], size[1], size[0]])
        shared = np.minimum(moved[2:], box[2:]) - np.maximum(moved[:2], box[:2])
        area, total = shared.clip(0).prod(), (box[2:] - box[:2]).prod() + (moved[2:] - moved[:2]).prod()
        if area / (total - area) >= 0.5:
            return moved


def iou(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


@dataclass
class Quality:
    """IoU of target and truth, a figure an RoI, and by how much of it targets are too large."""

    exact: np.ndarray
    ideal: np.ndarray
    excess: float


def quality(kind: Kind, count: int = 5, seed: int = 0) -> Quality:
    """Of the targets in the objects' own boxes and in others near them."""
    rng = np.random.default_rng(seed)
    exact, ideal, areas = [], [], []
    for scene in scenes(kind, count, seed):
        found, size = scene.sample.objects, scene.geometry.size
        assert len(found) == 7
        rows = np.arange(14) % 7
        boxes = np.concatenate([found.boxes, [shaken(box, size, rng) for box in found.boxes]]).astype(np.float32)
        batch = collate([scene.sample])
        assert batch.masks is not None
        targets = mask_targets(batch.masks, torch.from_numpy(rows), torch.from_numpy(boxes), CELLS).numpy() > 0
        for target, label, box in zip(targets, found.labels[rows], boxes.astype(np.float64), strict=True):
            truth = scene.exact(label, box)
            exact.append(iou(target, truth))
            ideal.append(iou(target, cells_of(covered(scene.ideal[label], *points_of(box)))))
            areas.append((target.sum(), truth.sum()))
    drawn, true = np.array(areas).sum(axis=0)
    return Quality(np.array(exact), np.array(ideal), float(drawn / true - 1))


@pytest.mark.parametrize("name", KINDS)
def test_targets_are_the_covered_cells(name: str) -> None:
    kind, found = KINDS[name], quality(KINDS[name])
    assert len(found.exact) == 70
    assert found.exact.mean() > kind.mean and found.exact.min() > kind.worst
    assert found.ideal.mean() > kind.ideal
    assert abs(found.excess) < 0.01


@pytest.mark.parametrize(("name", "gain"), [("tiny", 0.15), ("small", 0.03), ("thin", 0.05)])
def test_supersampling_improves_targets(name: str, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    finer = quality(KINDS[name], 2).exact.mean()
    monkeypatch.setattr(rasterize, "MAX_ZOOM", 1)
    assert finer - quality(KINDS[name], 2).exact.mean() > gain


# Drawing

HALVED = Geometry((HEIGHT, WIDTH), (240, 320), (0, 0), (240, 320), flip=False)


def drawn(outline: Outline | dict[str, object], box: list[float], geometry: Geometry = HALVED) -> PackedMasks:
    """The masks of one object."""
    corners = np.array([box])
    one = Objects(corners, np.zeros(1, np.int64), np.ones(1), np.zeros(1, bool), [outline])
    mask = render(np.zeros((HEIGHT, WIDTH, 3), np.uint8), one, geometry, geometry.size).masks
    assert mask is not None and len(mask) == 1
    return mask


def rectangle(x1: float, y1: float, x2: float, y2: float) -> Outline:
    return [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])]


@pytest.mark.parametrize(
    ("sides", "zoom"),  # in the original image, twice as large as in the sample
    [((2, 2), 16), ((20, 20), 12), ((40, 20), 8), ((220, 200), 2), ((230, 230), 1), ((8, 300), 2), ((4, 460), 1)],
)
def test_small_objects_are_supersampled(sides: tuple[int, int], zoom: int) -> None:
    """So that areas come to about 112 x 112, but none of the long ones grows beyond 448."""
    corners = (10, 8, 10 + sides[0], 8 + sides[1])
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8)
    bitmap[8 : corners[3], 10 : corners[2]] = 1
    for outline in (rectangle(*corners), coco_mask.encode(np.asfortranarray(bitmap))):
        found = drawn(outline, list(map(float, corners)))
        assert found.zooms.tolist() == [zoom] and found.frames.tolist() == [[240 * zoom, 320 * zoom]]
        assert found.windows[0].tolist() == [corner * zoom / 2 for corner in corners]
        assert found.dense(0).sum() == sides[0] * sides[1] * zoom**2 / 4


def test_zoom_follows_the_outline_not_a_wrong_box() -> None:
    """A large outline in a tiny box would need a huge array."""
    outline = rectangle(0, 0, WIDTH, HEIGHT)
    assert drawn(outline, [5, 5, 8, 8]).zooms.tolist() == [1]
    seen = Geometry((HEIGHT, WIDTH), (HEIGHT, WIDTH), (100, 100), (14, 14), flip=False)
    assert drawn(outline, [0, 0, WIDTH, HEIGHT], seen).zooms.tolist() == [8]  # what the crop leaves of it is small


LIFE_SIZE = Geometry((40, 40), (40, 40), (0, 0), (40, 40), flip=False)


def test_filling_neither_widens_nor_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Area and centre of gravity of many small polygons."""
    rng = np.random.default_rng(0)
    excess, shifts = [], []
    monkeypatch.setattr(rasterize, "MAX_ZOOM", 1)
    for _ in range(100):
        outline = [polar(rng.uniform(0.5, 1, 12), ROUND[::20]) * rng.uniform(4, 18) + 20 + rng.uniform(0, 1, 2)]
        (mask,), (window,), _ = rasterize._fill_polygons([outline], LIFE_SIZE)
        fine = np.arange(0.05, 40, 0.1)
        truth = covered(outline, fine, fine)
        length = np.linalg.norm(outline[0] - np.roll(outline[0], 1, axis=0), axis=1).sum()
        excess.append((mask.sum() - truth.sum() / 100) / length)
        centre = np.argwhere(mask).mean(axis=0)[::-1] + 0.5 + window[:2]
        shifts.append(centre - (np.argwhere(truth).mean(axis=0)[::-1] / 10 + 0.05))
    assert abs(np.mean(excess)) < 0.01  # pixels, along the whole outline
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.07  # run lengths lie 0.05 pixels too high


def random_blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = rng.random((height // 8 + 2, width // 8 + 2)).astype(np.float32)
    smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
    mask = (np.asarray(smooth) > 0.6).astype(np.uint8)
    mask[:, : rng.integers(width // 2)] = 0
    return mask


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resized", [(90, 140), (37, 61), (64, 100), (271, 423)])
def test_bitmaps_are_resized_as_by_pillow(resized: tuple[int, int], flip: bool) -> None:
    """Nearest neighbour of the whole, then cut and mirrored. Where a pixel's centre falls between two of the bitmap's,
    Pillow's rounding errors decide."""
    rng = np.random.default_rng(resized[0])
    for zoom in (1, 1, 1, 1, 1, 3):
        bitmap = random_blobs(rng, 90, 140)
        size = (int(rng.integers(20, resized[0] + 1)), int(rng.integers(20, resized[1] + 1)))
        corner = (int(rng.integers(resized[0] - size[0] + 1)), int(rng.integers(resized[1] - size[1] + 1)))
        geometry = Geometry((90, 140), resized, corner, size, flip).zoomed(zoom)
        (top, left), (height, width) = geometry.corner, geometry.size
        clear = [(2 * np.arange(n) + 1) * old % (2 * n) > 0 for n, old in zip(geometry.resized, (90, 140), strict=True)]
        whole = np.asarray(Image.fromarray(bitmap).resize(geometry.resized[::-1], Image.Resampling.NEAREST))
        expected, comparable = (
            cut[:, ::-1] if flip else cut
            for cut in (all[top : top + height, left : left + width] for all in (whole, np.logical_and.outer(*clear)))
        )
        (x1, y1, x2, y2), crop = geometry.mask(bitmap)
        found = np.zeros((height, width), np.uint8)
        found[y1:y2, x1:x2] = crop
        assert comparable.mean() > 0.9
        np.testing.assert_array_equal(found[comparable], expected[comparable])


def test_bitmap_outside_the_crop() -> None:
    bitmap = np.zeros((90, 140), np.uint8)
    geometry = Geometry((90, 140), (90, 140), (40, 0), (50, 140), flip=True)
    for _ in range(2):  # empty, then above the crop
        window, crop = geometry.mask(bitmap)
        assert window == [0, 0, 0, 0] and crop.shape == (0, 0)
        bitmap[5:20, 30:60] = 1


# Targets by definition: RoIAlign of dense masks

BOXES_A_MASK = 5


def packed(height: int, width: int, count: int, seed: int, zooms: tuple[int, ...] = (1, 2, 3)) -> PackedMasks:
    """Objects of one image: in its interior, on each border, over all of it, and one with nothing to see."""
    rng = np.random.default_rng(seed)
    crops, windows, frames, factors = [], [], [], []
    for row in range(count):
        zoom = zooms[row % len(zooms)]
        limits = np.array([width, height]) * zoom
        first = rng.integers(1, limits - 8)
        last = np.minimum(first + rng.integers(3, 40, 2), limits - 1)
        if row % 6 < 4:  # left, top, right, bottom
            axis, far = row % 2, row % 6 // 2
            first[axis], last[axis] = (first[axis], limits[axis]) if far else (0, last[axis])
        elif row % 6 == 4:
            first, last = np.zeros(2, np.int64), limits
        if row == 7:
            first, last = np.zeros(2, np.int64), np.zeros(2, np.int64)
        crop = random_blobs(rng, 3 * (last[1] - first[1] + 2), 2 * (last[0] - first[0] + 2))
        crops.append(crop[-(last[1] - first[1]) :, -(last[0] - first[0]) :] if len(crop) and last[0] else crop[:0, :0])
        windows.append([*first, *last])
        frames.append([height * zoom, width * zoom])
        factors.append(zoom)
    return PackedMasks.pack(crops, np.array(windows), np.array(frames), np.array(factors))


def rois_of(found: PackedMasks, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rows and boxes: each mask's own window, parts of it, larger ones, and the whole image."""
    rows, boxes = [], []
    for row in range(len(found)):
        zoom = int(found.zooms[row])
        height, width = (found.frames[row] / zoom).tolist()
        window = found.windows[row].numpy() / zoom
        extent = np.tile(window[2:] - window[:2] + 2, 2)
        near = [window + rng.uniform(-0.6, 0.6, 4) * extent for _ in range(BOXES_A_MASK - 2)]
        for box in [window, *near, np.array([0, 0, width, height])]:
            low, high = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:]) + 0.01
            boxes.append(np.concatenate([low, high]).clip(0, [width, height, width, height]))
            rows.append(row)
    return torch.tensor(rows), torch.from_numpy(np.array(boxes)).float()


def by_definition(found: PackedMasks, rows: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """[R, cells, cells]: the covered share of every cell."""
    shares = []
    for row, box in zip(rows.tolist(), boxes, strict=True):
        dense = found.dense(row).float()[None, None]
        roi = torch.cat([torch.zeros(1), box * found.zooms[row]])[None]
        shares.append(roi_align(dense, roi, cells, 1.0, sampling_ratio=0, aligned=True)[0, 0])
    return torch.stack(shares)


def assert_targets(found: PackedMasks, rows: Tensor, boxes: Tensor, cells: int = CELLS) -> Tensor:
    """Equal to those by definition, but where rounding decides which side of one half a cell falls."""
    targets, shares = mask_targets(found, rows, boxes, cells), by_definition(found, rows, boxes, cells)
    assert targets.dtype == torch.float32 and targets.shape == (len(rows), cells, cells)
    clear = (shares - 0.5).abs() > 1e-4
    assert clear.float().mean() > 0.97
    assert torch.equal(targets[clear], (shares >= 0.5).float()[clear])
    return targets


@pytest.mark.parametrize("canvas_pixels", [masks.MAX_CANVAS_PIXELS, 3 * 64**2, 1])
def test_targets_are_roi_align_of_dense_masks(canvas_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images and sizes of objects, in one canvas and in parts of few."""
    monkeypatch.setattr(masks, "MAX_CANVAS_PIXELS", canvas_pixels)
    found = PackedMasks.concatenate([packed(70, 90, 13, 0), packed(50, 120, 0, 1), packed(50, 120, 9, 2)])
    assert {int(found.windows[row, side] == 0) for row in range(5) for side in range(2)} == {0, 1}
    rng = np.random.default_rng(0)
    rows, boxes = rois_of(found, rng)
    order = torch.from_numpy(rng.permutation(len(rows)))
    targets = assert_targets(found, rows[order], boxes[order])
    assert 0.1 < targets.mean() < 0.6 and not targets[rows[order] == 7].any()
    assert_targets(found, rows[order][:20], boxes[order][:20], cells=7)
    assert mask_targets(found, rows[:0], boxes[:0], CELLS).shape == (0, CELLS, CELLS)


def test_targets_of_masks_that_fill_their_image() -> None:
    """The border's pixels go on beyond it, so that no cell on it gets less."""
    whole = PackedMasks.pack(
        [np.ones((30, 40), np.uint8)], np.array([[0, 0, 40, 30]]), np.array([[30, 40]]), np.ones(1)
    )
    boxes = torch.tensor([[0.0, 0, 40, 30], [0, 0, 1, 1], [39.2, 29.1, 40, 30], [-0.5, -0.5, 3, 3]])
    assert mask_targets(whole, torch.zeros(4, dtype=torch.int64), boxes, CELLS).all()


def test_no_masks_no_targets() -> None:
    """A batch without objects."""
    none = PackedMasks.pack([], np.zeros((0, 4)), np.zeros((0, 2)), np.zeros(0))
    assert mask_targets(none, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), CELLS).shape == (0, CELLS, CELLS)


class PeakMemory(TorchDispatchMode):
    """The most bytes that new tensors held at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Tensor]] = []
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """See torch."""
        results = func(*args, **(kwargs or {}))
        new = results if isinstance(results, tuple | list) else (results,)
        self.alive += [weakref.ref(result) for result in new if isinstance(result, Tensor)]
        storages = [tensor.untyped_storage() for tensor in (ref() for ref in self.alive) if tensor is not None]
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.bytes = max(self.bytes, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return results


@pytest.mark.parametrize(("radii", "count", "most"), [((14, 16), 100, 40e6), ((100, 390), 40, 100e6)])
def test_targets_do_not_need_dense_masks(radii: tuple[float, float], count: int, most: float) -> None:
    """Of objects in an image of 800 x 1333 pixels, where a hundred dense float32 masks take 427 MB. Large ones come to
    a limit, however many they are."""
    rng = np.random.default_rng(0)
    geometry = Geometry((800, 1333), (800, 1333), (0, 0), (800, 1333), flip=False)
    outlines = [
        [polar(radius)[::4] + rng.uniform(radius, np.array([1333, 800]) - radius)]
        for radius in rng.uniform(*radii, count)
    ]
    boxes = np.stack([np.concatenate([xy.min(axis=0), xy.max(axis=0)]) for (xy,) in outlines])
    there = Objects(boxes, np.zeros(count, np.int64), np.ones(count), np.zeros(count, bool), outlines)
    found = rasterize.rasterize(there, geometry)
    with PeakMemory() as peak:
        targets = mask_targets(found, torch.arange(count), torch.from_numpy(boxes).float(), CELLS)
    assert targets.mean(dim=(1, 2)) == pytest.approx(np.full(count, np.pi / 4), abs=0.02)
    assert peak.bytes < most


# Into the image

SIZES = [(60, 80), (33, 21), (1, 50), (90, 7)]


def boxes_in(size: tuple[int, int], rng: np.random.Generator, count: int = 25) -> np.ndarray:
    """Boxes of all sizes, some of them on the borders, some thinner than a pixel."""
    limits = np.array([size[1], size[0]])
    first = rng.uniform(0, limits, (count, 2))
    sides = np.exp(rng.uniform(np.log(0.2), np.log(limits.max() + 1), (count, 2)))
    boxes = np.concatenate([first, first + sides], axis=1)
    boxes[:6] -= np.tile(sides[:6] / 2, 2)
    boxes[:2] = [[0, 0, *limits], [0.3, 0.3, 0.4, 0.9]]
    return boxes.clip(0, np.tile(limits, 2)).astype(np.float32)


def on_whole_image(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[height, width], sampled at every pixel's centre."""
    x1, y1, x2, y2 = torch.from_numpy(box).double()
    y = (torch.arange(size[0], dtype=torch.float64) + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(size[1], dtype=torch.float64) + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack([x[None, :].expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    maps = torch.from_numpy(probabilities).double()[None, None]
    return F.grid_sample(maps, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0, 0].numpy()


@pytest.mark.parametrize("size", SIZES)
def test_pasting_is_bilinear_sampling(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size[0])
    boxes = boxes_in(size, rng)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) > 0.1]
    assert len(boxes) > 12
    for box in boxes:
        probabilities = rng.random((CELLS, CELLS)).astype(np.float32) ** 0.3
        (top, left), found = next(paste_windows(probabilities[None], box[None], np.array([size])))
        expected = on_whole_image(probabilities, box, size)
        window = expected[top : top + found.shape[0], left : left + found.shape[1]]
        assert found.dtype == np.float32 and found.shape == window.shape
        np.testing.assert_allclose(found, window, atol=1e-5)
        expected[top : top + found.shape[0], left : left + found.shape[1]] = 0
        assert expected.max() < 0.5
        assert found.size <= (box[2] - box[0] + 2) * (box[3] - box[1] + 2)


def test_masks_of_several_boxes() -> None:
    rng = np.random.default_rng(0)
    size, boxes = (60, 80), boxes_in((60, 80), rng)
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) > 0.1]
    probabilities = rng.random((len(boxes), CELLS, CELLS)).astype(np.float32)
    found = paste_masks(probabilities, boxes, size)
    assert found.dtype == bool and found.shape == (len(boxes), *size) and found[0].any()
    for mask, probability, box in zip(found, probabilities, boxes, strict=True):
        expected = on_whole_image(probability, box, size)
        np.testing.assert_array_equal(mask[abs(expected - 0.5) > 1e-5], expected[abs(expected - 0.5) > 1e-5] >= 0.5)
    assert paste_masks(probabilities[:0], boxes[:0], size).shape == (0, 60, 80)


def test_boxes_without_extent_paste_nothing() -> None:
    for box in ([5.0, 5, 5, 9], [5, 5, 5, 5], [80, 3, 80, 9], [0, 60, 9, 60], [4.5, 4.5, 4.5, 8.5]):
        ones, sizes = np.ones((1, CELLS, CELLS), np.float32), np.array([[60, 80]])
        _, found = next(paste_windows(ones, np.array([box], np.float32), sizes))
        assert np.isfinite(found).all() and found.size <= 5
        assert paste_masks(np.ones((1, CELLS, CELLS), np.float32), np.array([box], np.float32), (60, 80)).sum() <= 5


# Run lengths


def corner_masks(height: int, width: int) -> Iterator[np.ndarray]:
    """Whole masks: nothing, everything, single pixels, full columns, frames, and noise of all densities."""
    rng = np.random.default_rng(height)
    none = np.zeros((height, width), bool)
    yield none
    yield ~none
    for row, column in ((0, 0), (height - 1, 0), (0, width - 1), (height - 1, width - 1), (height // 2, width // 2)):
        one = none.copy()
        one[row, column] = True
        yield one
        yield ~one
    for first, last in ((0, 1), (0, width), (width // 2, width), (width // 3, width // 2 + 1)):
        columns = none.copy()
        columns[:, first:last] = True
        yield columns
        columns[0, first:last] = False
        yield columns
    frame = ~none
    frame[1:-1, 1:-1] = False
    yield frame
    for density in (0.02, 0.3, 0.7, 0.98):
        for _ in range(3):
            yield rng.random((height, width)) < density


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (7, 5), (64, 48), (300, 401)])
def test_run_lengths_are_cocos(height: int, width: int) -> None:
    for mask in corner_masks(height, width):
        expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        expected["counts"] = expected["counts"].decode()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        windows = [(0, 0, height, width)]
        if len(rows):  # the closest window, and one that leaves room
            top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
            roomy = (max(top - 2, 0), max(left - 1, 0), min(bottom + 1, height), min(right + 3, width))
            windows += [(top, left, bottom, right), roomy]
        else:
            windows += [(height, width, height, width), (0, 0, 0, 0), (0, 0, height, 0)]
        for top, left, bottom, right in windows:
            found = encode_masks([(int(top), int(left))], [mask[top:bottom, left:right]], np.array([[height, width]]))[
                0
            ]
            assert found == expected
        np.testing.assert_array_equal(coco_mask.decode(found), mask)


# The head


def test_mask_head_doubles_the_size() -> None:
    torch.manual_seed(0)
    head = MaskHead(16, num_classes=3)
    assert head(torch.randn(5, 16, 14, 14)).shape == (5, 3, 28, 28)
    assert head(torch.randn(0, 16, 14, 14)).shape == (0, 3, 28, 28)
    assert sum(parameter.numel() for parameter in head.parameters()) == 4 * (9 * 16 * 16 + 16) + 4 * 256 + 16 + 3 * 17
    assert not any(parameter.any() for name, parameter in head.named_parameters() if name.endswith("bias"))
