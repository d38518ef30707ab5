"""Samples under every augmentation: boxes, masks and pixels stay together, and the same key gives the same sample."""

from collections import Counter
from collections.abc import Iterator
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from conftest import MakeCocoFolder
from pycocotools import mask as coco_mask

from direct_pt.batch import Objects, PackedMasks, Sample
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import Share, TableFeed, TrainingImages
from direct_pt.data.mixing import Mix, join_mosaic, mask_pixels, mosaic_parts, paste_objects
from direct_pt.images.colors import jitter_colors
from direct_pt.images.geometry import Geometry
from direct_pt.transforms import FLIPS, FinetunePreset, Preset, PretrainPreset, draw_flips, render

SIDE = 96
DISC = 255  # brightness of the objects; the background is darker than half of it


def picture(seed: int, outlines: str = "polygons", crowd: bool = False) -> tuple[np.ndarray, Objects]:
    """An image with three ellipses of their own colours on a dim ground, and their annotation; the last may be a crowd
    region."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(70, 160, 2))
    image = np.full((height, width, 3), 20, np.uint8)
    boxes, segmentations, shown = [], [], np.zeros((height, width), np.uint8)
    for number in range(3):
        centre = (int(width * (number + 0.5) / 3), int(height * rng.uniform(0.2, 0.8)))  # none over another
        axes = (int(rng.integers(5, width // 7)), int(rng.integers(6, 22)))
        polygon = cv2.ellipse2Poly(centre, axes, 0, 0, 360, 5).clip(0, (width - 1, height - 1))
        color = [0, 0, 0]
        color[number] = DISC
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [polygon], 1)
        image[mask > 0] = color
        shown[mask > 0] = number + 1
        ys, xs = np.nonzero(mask)
        boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        run_lengths = coco_mask.encode(np.asfortranarray(mask))
        segmentations.append([polygon + 0.5] if outlines == "polygons" else run_lengths)
    return image, Objects(
        boxes=np.array(boxes, np.float64),
        labels=np.arange(3),
        areas=np.ones(3),
        crowd=np.array([False, False, crowd]),
        segmentations=segmentations if outlines else None,
    )


def whole_mask(masks: PackedMasks | None, row: int, size: tuple[int, int]) -> np.ndarray:
    """[height, width] bool."""
    assert masks is not None
    whole = np.zeros(size, bool)
    (x1, y1, x2, y2), inside = mask_pixels(masks, row)
    whole[y1:y2, x1:x2] = inside.numpy()
    return whole


def assert_consistent(sample: Sample, cut_inside: bool = False) -> None:
    """Each mask lies on its object's own colour, and its box around it; what has no mask is a crowd region."""
    image, size = sample.image.permute(1, 2, 0).numpy(), (sample.image.shape[1], sample.image.shape[2])
    for row, (label, box) in enumerate(zip(sample.objects.labels, sample.objects.boxes, strict=True)):
        assert (box[:2] >= 0).all() and (box[2:] <= (size[1], size[0])).all() and (box[2:] > box[:2]).all()
        mask = whole_mask(sample.masks, row, size)
        if sample.objects.crowd[row]:
            assert not mask.any()
            continue
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0  # colours mix at the border
        others = [channel for channel in range(3) if channel != label]
        if inner.any():
            colors = image[inner].astype(int)
            assert (colors[:, label] - colors[:, others].max(axis=1) > 40).mean() > 0.9
        assert_tight(box, mask, cut_inside)


def assert_tight(box: np.ndarray, mask: np.ndarray, cut_inside: bool = False, tolerance: float = 2) -> None:
    """The box lies around the mask, and close, but where a border cuts the object: its box is cut there."""
    ys, xs = np.nonzero(mask)
    if len(xs) > 20:
        tight, limits = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]), mask.shape[::-1]
        assert (box[:2] <= tight[:2] + 2).all() and (box[2:] >= tight[2:] - 2).all()
        if not cut_inside and (box[:2] > 0).all() and (box[2:] < limits).all():
            assert np.abs(tight - box).max() <= tolerance


# Turns and flips


@pytest.mark.parametrize("outlines", ["polygons", "run lengths"])
@pytest.mark.parametrize(("flip", "flip_vertically", "transpose"), product([False, True], repeat=3))
def test_a_turn_of_everything(flip: bool, flip_vertically: bool, transpose: bool, outlines: str) -> None:
    """Image, boxes and masks are what NumPy makes of the unturned sample's."""
    image, objects = picture(4, outlines)
    plain = Geometry((image.shape[0], image.shape[1]), (90, 130), (7, 11), (70, 101))
    turned = Geometry(plain.original, plain.resized, plain.corner, plain.size, flip, flip_vertically, transpose)

    def turn(pixels: np.ndarray) -> np.ndarray:
        pixels = pixels.swapaxes(0, 1) if transpose else pixels
        pixels = pixels[:, ::-1] if flip else pixels
        return pixels[::-1] if flip_vertically else pixels

    before, after = (render(image, objects, geometry, geometry.frame) for geometry in (plain, turned))
    np.testing.assert_array_equal(after.image.permute(1, 2, 0).numpy(), turn(before.image.permute(1, 2, 0).numpy()))
    assert after.image.shape[1:] == turned.frame
    for row, box in enumerate(before.objects.boxes):
        canvas = np.zeros((*plain.size, 1), np.uint8)
        x1, y1, x2, y2 = box.round().astype(int)
        canvas[y1:y2, x1:x2] = 1
        ys, xs, _ = np.nonzero(turn(canvas))
        expected = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(after.objects.boxes[row] - expected).max() <= 1
        one, other = whole_mask(before.masks, row, plain.frame), whole_mask(after.masks, row, turned.frame)
        union = (turn(one) | other).sum()
        assert union and (turn(one) ^ other).sum() <= (0 if outlines == "run lengths" else 0.06 * union)
    points = np.array([[30.0, 30.0], [80.0, 41.5]])
    corners = turned.boxes(np.concatenate([points, points + 1e-9], axis=1))[:, :2]
    np.testing.assert_allclose(turned.points(points), corners, atol=1e-6)


@pytest.mark.parametrize("flips", FLIPS)
def test_which_turns_come(flips: str) -> None:
    """All that the word says, each about as often."""
    rng = np.random.default_rng(0)
    names = ("flip", "flip_vertically", "transpose")
    seen = Counter(tuple(draw_flips(flips, rng).get(name, False) for name in names) for _ in range(400))
    expected = {
        turn
        for turn in product([False, True], repeat=3)
        if all(a >= b for a, b in zip(FLIPS[flips], turn, strict=True))
    }
    assert set(seen) == expected
    assert min(seen.values()) > 0.6 * 400 / len(expected)


def presets() -> Iterator[tuple[str, Preset]]:
    """Each augmentation of one image alone, and all together."""
    yield "large-scale jitter", PretrainPreset(SIDE, (0.1, 2.0))
    for flips in FLIPS:
        yield f"stage 1, {flips}", PretrainPreset(SIDE, flips=flips)
        yield f"stage 2, {flips}", FinetunePreset(80, 120, flips)
    yield "colours", PretrainPreset(SIDE, color_jitter=0.2)
    yield "canvas", PretrainPreset(SIDE, canvas=(64, 160))
    yield "all", PretrainPreset(SIDE, (0.5, 1.5), "dihedral", 0.2, (64, 160))


@pytest.mark.parametrize("outlines", ["polygons", "run lengths"])
@pytest.mark.parametrize(("name", "preset"), presets(), ids=lambda value: value if isinstance(value, str) else "")
def test_objects_stay_on_their_pixels(name: str, preset: Preset, outlines: str) -> None:
    for seed in range(12):
        image, objects = picture(seed, outlines, crowd=seed % 3 == 0)
        sample = preset(image, objects, np.random.default_rng(seed))
        assert_consistent(sample)
        frame, padded = sample.image.shape[1:], sample.padded_size
        assert frame[0] <= padded[0] and frame[1] <= padded[1]
        if isinstance(preset, PretrainPreset):
            assert padded == preset.frame


def test_large_scale_jitter_reaches_both_ends() -> None:
    """Of its range: images of a tenth of the crop are padded, those of twice its size cut."""
    preset, image = PretrainPreset(SIDE, (0.1, 2.0)), np.zeros((100, 100, 3), np.uint8)
    sizes = [preset(image, Objects.none(), np.random.default_rng(seed)).image.shape[1] for seed in range(200)]
    assert min(sizes) < 0.2 * SIDE and max(sizes) == SIDE
    assert 0.35 < np.mean(np.array(sizes) < SIDE) < 0.6  # 0.9 of the range of 1.9


# Colours


def test_colours_change_within_the_strength() -> None:
    """Brightness by at most X, also of grey, which stays grey; the mean over many is the image."""
    grey = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    means = []
    for seed in range(200):
        changed = jitter_colors(grey, 0.3, np.random.default_rng(seed)).float()
        assert (changed.amax(dim=0) - changed.amin(dim=0)).max() <= 1
        means.append(float(changed.mean()))
    assert 69 <= min(means) < 80 and 120 < max(means) <= 131
    assert np.mean(means) == pytest.approx(100, abs=4)


def test_colours_lose_saturation_and_contrast_and_turn() -> None:
    image = torch.zeros((3, 16, 16), dtype=torch.uint8)
    image[0, :8], image[1, 8:] = 200, 120
    seen = torch.stack([jitter_colors(image, 0.5, np.random.default_rng(seed)).float() for seed in range(100)])
    differences = seen[:, :, 0, 0] - seen[:, :, 15, 0]
    assert differences.std(dim=0).min() > 5  # not the same colours each time
    assert seen[:, 2].max() > 10  # some blue, as hue and saturation change
    first, again = (jitter_colors(image, 0.5, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.uint8


# Mosaics


def samples_for_mosaic(seed: int, preset: PretrainPreset) -> Sample:
    rng = np.random.default_rng(seed)
    parts, samples = mosaic_parts(preset.frame, rng), []
    for number, part in enumerate(parts):
        image, objects = picture(10 * seed + number, crowd=number == 0)
        of_part = PretrainPreset(scale_range=(0.8, 2.4), flips="dihedral", canvas=part.size)
        samples.append(of_part(image, objects, rng))
    return join_mosaic(samples, parts, preset.frame)


@pytest.mark.parametrize("canvas", [(96, 96), (64, 160)])
def test_mosaics(canvas: tuple[int, int]) -> None:
    """Every part has its image, with its objects on its pixels."""
    counts = []
    for seed in range(15):
        sample = samples_for_mosaic(seed, PretrainPreset(canvas=canvas))
        assert tuple(sample.image.shape[1:]) == sample.padded_size == canvas
        assert sample.masks is not None and len(sample.masks) == len(sample.objects)
        assert_consistent(sample, cut_inside=True)
        counts.append(len(sample.objects))
    assert np.mean(counts) > 5  # of 12 in four images


def test_parts_of_a_mosaic_cover_the_canvas() -> None:
    places = set()
    for seed in range(20):
        parts = mosaic_parts((90, 120), np.random.default_rng(seed))
        covered = np.zeros((90, 120), int)
        for part in parts:
            (top, left), (height, width) = part.corner, part.size
            covered[top : top + height, left : left + width] += 1
            assert part.at_bottom == (top == 0) and part.at_right == (left == 0)
        assert (covered == 1).all()
        places.add(parts[0].corner == (0, 0))
    assert places == {False, True}


# Pasted objects


@pytest.mark.parametrize("outlines", ["polygons", "run lengths"])
def test_pasted_objects_hide_what_is_under_them(outlines: str) -> None:
    """The pixels of each mask are of its own image; no pixel belongs to a hidden object; boxes are tight."""
    dropped = pasted = 0
    for seed in range(40):
        rng, preset = np.random.default_rng(seed), PretrainPreset(SIDE)
        target = preset(*picture(seed, outlines, crowd=seed % 4 == 0), rng)
        source = preset(*picture(1000 + seed, outlines, crowd=seed % 5 == 0), rng)
        source.image //= 2  # so that its objects have no colour of the target's
        before = target.image.clone()
        mixed = paste_objects(target, source, rng)
        assert torch.equal(target.image, before)  # a copy
        size = (mixed.image.shape[1], mixed.image.shape[2])
        assert size == (target.image.shape[1], target.image.shape[2])
        assert mixed.masks is not None and len(mixed.masks) == len(mixed.objects)
        assert int(mixed.objects.crowd.sum()) == int(target.objects.crowd.sum())
        changed = (mixed.image != target.image).any(dim=0).numpy()
        covered = np.zeros(size, bool)
        for row, box in enumerate(mixed.objects.boxes):
            mask = whole_mask(mixed.masks, row, size)
            if not mixed.objects.crowd[row]:
                assert_tight(box, mask, tolerance=4)  # the rest of an object may have thin ends
            assert not (mask & changed).any() or not (mask & ~changed).any()  # it is pasted, or what is left of another
            covered |= mask & changed
            pasted += bool((mask & changed).any())
        np.testing.assert_array_equal(covered, changed)
        dropped += len(target.objects) + len(source.objects) - len(mixed.objects)
    assert pasted > 40 and dropped > 0


def square(x: float, y: float, side: float, label: int, brightness: int) -> Sample:
    """A sample with one square object."""
    image = torch.zeros((3, 64, 64), dtype=torch.uint8)
    image[:, int(y) : int(y + side), int(x) : int(x + side)] = brightness
    corners = np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]])
    objects = Objects(
        np.array([[x, y, x + side, y + side]]), np.array([label]), np.ones(1), np.zeros(1, bool), [[corners]]
    )
    return render(image.permute(1, 2, 0).numpy(), objects, Geometry((64, 64), (64, 64), (0, 0), (64, 64)), (64, 64))


@pytest.mark.parametrize(
    ("under", "expected"),
    [
        ((8, 8, 16), [8, 8, 24, 24]),  # beside it
        ((20, 20, 16), [20, 20, 36, 36]),  # a corner of it is hidden
        ((30, 32, 16), [40, 32, 46, 48]),  # its left part is
        ((26, 26, 8), None),  # all of it is
    ],
)
def test_a_hidden_object_keeps_the_rest(under: tuple[int, int, int], expected: list[int] | None) -> None:
    """A square of 24 pixels is pasted at (16, 16)... (40, 56): what is left of the other has a tight box."""
    target = square(*under, label=1, brightness=100)
    image = torch.zeros((3, 64, 64), dtype=torch.uint8)
    image[:, 24:56, 24:40] = 200
    corners = np.array([[24.0, 24.0], [40.0, 24.0], [40.0, 56.0], [24.0, 56.0]])
    over = Objects(np.array([[24.0, 24.0, 40.0, 56.0]]), np.array([0]), np.ones(1), np.zeros(1, bool), [[corners]])
    geometry = Geometry((64, 64), (64, 64), (0, 0), (64, 64))
    source = render(image.permute(1, 2, 0).numpy(), over, geometry, (64, 64))
    mixed = paste_objects(target, source, np.random.default_rng(0))
    boxes = dict(zip(mixed.objects.labels.tolist(), mixed.objects.boxes.tolist(), strict=True))
    assert boxes[0] == [24, 24, 40, 56]
    assert (mixed.image[:, 24:56, 24:40] == 200).all()
    if expected is None:
        assert set(boxes) == {0} and mixed.masks is not None and len(mixed.masks) == 1
    else:
        assert np.abs(np.array(boxes[1]) - expected).max() <= 0.5
        seen = whole_mask(mixed.masks, 0, (64, 64))
        assert not (seen[24:56, 24:40]).any() and seen.sum() == pytest.approx(
            whole_mask(target.masks, 0, (64, 64)).sum() - (mixed.image[0] == 200)[under[1] : under[1] + under[2],
            under[0] : under[0] + under[2]].sum().item(), abs=4
        )  # fmt: skip


# In the loader


@pytest.fixture
def table(coco_folder: MakeCocoFolder) -> AnnotationTable:
    """Eight images with outlines, the last one unreadable."""
    sizes = [(60 + 5 * number, 90 - 3 * number) for number in range(8)]
    annotations = [
        {"image_id": 10 * row + 10, "bbox": [x, x, 20, 14], "area": 280, "iscrowd": 0,
         "segmentation": [[x, x, x + 20, x, x + 20, x + 14, x, x + 14]]}
        for row in range(8) for x in (4, 25)
    ]  # fmt: skip
    folder = coco_folder(sizes, annotations)
    (folder.paths.images / "7.png").write_bytes(b"no image")
    return folder.load()


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("kind", ["mosaic", "copy-paste"])
def test_mixed_samples_of_the_loader(table: AnnotationTable, kind: str, with_masks: bool) -> None:
    """By key alone; unreadable images are named; box detectors get the boxes that mask detectors do."""
    preset = PretrainPreset(64, flips="dihedral", color_jitter=0.3)
    images, again = (TrainingImages(table, preset, 3, with_masks, mix=Mix(kind, 0.5)) for _ in range(2))
    plain = TrainingImages(table, preset, 3, with_masks)
    mixed = 0
    for epoch, image in product(range(12), range(7)):
        sample, same = images[epoch, image], again[epoch, image]
        assert torch.equal(sample.image, same.image) and sample.seed == same.seed
        assert (sample.masks is not None) == with_masks
        if with_masks:
            assert sample.masks is not None and len(sample.masks) == len(sample.objects)
        np.testing.assert_array_equal(sample.objects.boxes, same.objects.boxes)
        assert sample.index == image and set(sample.unreadable) <= {7}
        mixed += len(sample.objects) > len(plain[epoch, image].objects)
    assert 20 < mixed < 60
    if not with_masks:
        masked = TrainingImages(table, preset, 3, True, mix=Mix(kind, 0.5))
        for key in product(range(3), range(7)):
            np.testing.assert_array_equal(masked[key].objects.boxes, images[key].objects.boxes)
            assert torch.equal(masked[key].image, images[key].image)


def test_mixed_samples_do_not_depend_on_workers_and_processes(table: AnnotationTable) -> None:
    preset, mix = PretrainPreset(64, (0.5, 1.5), "both", 0.3), Mix("mosaic", 0.5)

    def pixels(workers: int, *shares: Share) -> dict[int, torch.Tensor]:
        found = {}
        for share in shares:
            feed = TableFeed(table, preset, 0, True, workers, mix=mix)
            for number, batch in enumerate(feed.batches(share)):
                found[share.rank + number * share.world] = batch.images
        return found

    alone = pixels(0, Share(2, 0, 6))
    for other in (pixels(2, Share(2, 0, 6)), pixels(0, Share(2, 0, 6, 0, 2), Share(2, 0, 6, 1, 2))):
        assert alone.keys() == other.keys() and all(torch.equal(alone[key], other[key]) for key in alone)


def test_unreadable_images_within_a_mosaic_are_named(table: AnnotationTable) -> None:
    images = TrainingImages(table, PretrainPreset(64), 0, False, mix=Mix("mosaic", 1.0))
    named = [images[epoch, 0].unreadable for epoch in range(20)]
    assert any(7 in rows for rows in named) and not all(named)
