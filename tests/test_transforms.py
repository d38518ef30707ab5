"""The presets against the recipe, and boxes and masks against the pixels that they belong to."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from direct_pt.batch import Objects, PackedMasks, Sample, collate
from direct_pt.images.geometry import Geometry, fit
from direct_pt.models.detector import PIXEL_MEAN, PIXEL_STD, build_detector
from direct_pt.transforms import FinetunePreset, PretrainPreset, TestPreset, render

Preset = Callable[[np.ndarray, Objects, np.random.Generator], Sample]


def blank(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def objects_of(boxes: list[list[float]], segmentations: list[Any] | None = None) -> Objects:
    """Objects whose label is their position, with their boxes' areas."""
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    return Objects(corners, np.arange(len(corners)), areas, np.zeros(len(corners), bool), segmentations)


def samples_of(preset: Preset, image: np.ndarray, objects: Objects, count: int) -> list[Sample]:
    return [preset(image, objects, np.random.default_rng(seed)) for seed in range(count)]


# The recipe's numbers


def test_pretraining_scale_crop_and_padding() -> None:
    samples = samples_of(PretrainPreset(), blank(40, 120), Objects.none(), 150)
    sides = np.array([sample.scale[0] * 120 for sample in samples])  # of the square that the image fits in
    assert sides.min() >= 358 and sides.max() <= 537  # 448 x U(0.8, 1.2), whole pixels
    assert sides.min() < 375 and sides.max() > 520
    assert 430 < sides.mean() < 466
    for sample, side in zip(samples, sides, strict=True):
        assert side == pytest.approx(round(side))
        height = round(40 * round(side) / 120)
        assert sample.image.shape == (3, height, min(448, round(side)))
        assert sample.scale[1] == pytest.approx(height / 40)
        assert sample.padded_size == (448, 448)
        assert sample.original_size == (40, 120)
        assert sample.image.dtype == torch.uint8


def test_pretraining_crops_anywhere() -> None:
    """The colours say where in the image a sample was cut, and whether it was mirrored."""
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0] = np.arange(200)
    ramp[..., 1] = np.arange(200)[:, None]
    preset = PretrainPreset(image_size=60, scale_range=(2, 2))
    samples = samples_of(preset, ramp, Objects.none(), 120)
    flips = [bool(sample.image[0, 0, 0] > sample.image[0, 0, -1]) for sample in samples]
    assert 40 <= sum(flips) <= 80  # half of them
    lefts = [int(sample.image[0].min()) for sample in samples]
    tops = [int(sample.image[1].min()) for sample in samples]
    for offsets in (lefts, tops):  # 0 to 100 in the image's pixels
        assert min(offsets) < 12 and max(offsets) > 88 and max(offsets) <= 101
    assert {tuple(sample.image.shape) for sample in samples} == {(3, 60, 60)}
    unflipped = samples_of(replace(preset, flips="none"), ramp, Objects.none(), 20)
    assert not any(sample.image[0, 0, 0] > sample.image[0, 0, -1] for sample in unflipped)


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("size", [(40, 2000), (2000, 40), (300, 300)])
@pytest.mark.parametrize("scale_range", [(0.8, 1.2), (20.0, 20.0)])
def test_crop_keeps_an_object(corner: tuple[int, int], size: tuple[int, int], scale_range: tuple[float, float]) -> None:
    """One tiny object in a corner: also where a random crop practically never meets it."""
    x, y = corner[1] * (size[1] - 2), corner[0] * (size[0] - 2)
    objects = objects_of([[x, y, x + 2, y + 2]])
    preset = PretrainPreset(image_size=64, scale_range=scale_range)
    for sample in samples_of(preset, blank(*size), objects, 5):
        assert len(sample.objects) == 1
        x1, y1, x2, y2 = sample.objects.boxes[0].astype(np.float32)
        assert 0 <= x1 < x2 <= sample.image.shape[2] and 0 <= y1 < y2 <= sample.image.shape[1]


def test_crops_need_not_contain_crowd_regions() -> None:
    objects = replace(objects_of([[0, 0, 2, 2]]), crowd=np.array([True]))
    samples = samples_of(PretrainPreset(64, (20.0, 20.0)), blank(300, 300), objects, 20)
    assert any(len(sample.objects) == 0 for sample in samples)


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((480, 640), (800, 1067), (800, 1088)),
        ((427, 640), (800, 1199), (800, 1216)),
        ((640, 427), (1199, 800), (1216, 800)),
        ((333, 500), (800, 1201), (800, 1216)),
        ((375, 500), (800, 1067), (800, 1088)),
        ((240, 640), (500, 1333), (512, 1344)),
        ((1200, 1600), (800, 1067), (800, 1088)),
        ((500, 500), (800, 800), (800, 800)),
    ],
)
def test_finetuning_sizes(size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]) -> None:
    sample = TestPreset()(blank(*size), Objects.none(), np.random.default_rng(0))
    assert tuple(sample.image.shape[1:]) == resized
    assert sample.padded_size == padded
    assert sample.scale == pytest.approx((resized[1] / size[1], resized[0] / size[0]), abs=1e-12)
    assert fit(size, 800, 1333) == resized


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (3, 5000)])
def test_extremely_elongated_images(size: tuple[int, int]) -> None:
    objects = objects_of([[0, 0, size[1], size[0]]])
    for preset in (PretrainPreset(64), FinetunePreset(64, 100), TestPreset(64, 100)):
        sample = preset(blank(*size), objects, np.random.default_rng(0))
        assert min(sample.image.shape) >= 1
        height, width = sample.image.shape[1:]
        assert height <= sample.padded_size[0] and width <= sample.padded_size[1]
        if not isinstance(preset, PretrainPreset):
            assert sample.objects.boxes.tolist() == [[0, 0, width, height]]


def test_finetuning_flips_half_and_testing_none() -> None:
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0] = np.arange(60) * 4
    for preset, fewest, most in ((FinetunePreset(40, 60), 35, 65), (TestPreset(40, 60), 0, 0)):
        samples = samples_of(preset, ramp, Objects.none(), 100)
        assert fewest <= sum(bool(sample.image[0, 0, 0] > 100) for sample in samples) <= most


def test_same_random_numbers_same_sample() -> None:
    image, objects = scene(masks="polygons")
    for preset in (PretrainPreset(48), FinetunePreset(48, 64)):
        first, second = (preset(image, objects, np.random.default_rng(3)) for _ in range(2))
        assert torch.equal(first.image, second.image)
        np.testing.assert_array_equal(first.objects.boxes, second.objects.boxes)


# Boxes and masks follow the pixels

HEIGHT, WIDTH = 90, 140
PARTS = ([[20, 15], [60, 15], [60, 75], [20, 75]], [[60, 45], [95, 45], [95, 75], [60, 75]])  # an L of two polygons
BOX = [20.0, 15.0, 95.0, 75.0]


def scene(masks: str | None = None) -> tuple[np.ndarray, Objects]:
    """A bright L on black, and its annotation."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for (x1, y1), _, (x2, y2), _ in PARTS:
        pixels[y1:y2, x1:x2] = 255
    segmentation = {
        None: None,
        "polygons": [[np.array(part, np.float64) for part in PARTS]],
        "run lengths": [coco_mask.encode(np.asfortranarray(pixels // 255))],
    }[masks]
    return np.repeat(pixels[:, :, None], 3, axis=2), objects_of([BOX], segmentation)


PRESETS = {
    "pretrain": PretrainPreset(160),
    "pretrain, enlarged": PretrainPreset(128, (2.0, 3.0)),
    "finetune": FinetunePreset(200, 260),
    "finetune, reduced": FinetunePreset(64, 99),
    "test": TestPreset(200, 260),
}


def bright(sample: Sample) -> np.ndarray:
    return sample.image[0].numpy() > 127


def in_pixels(masks: PackedMasks | None, row: int) -> np.ndarray:
    """Mask `row` as uint8 at the sample's own resolution, also where it was drawn at a finer one."""
    assert masks is not None
    zoom, (height, width) = int(masks.zooms[row]), masks.frames[row].tolist()
    fine = masks.dense(row).numpy().reshape(height // zoom, zoom, width // zoom, zoom)
    return (fine.mean(axis=(1, 3)) >= 0.5).astype(np.uint8)


@pytest.mark.parametrize("preset", PRESETS)
def test_boxes_follow_the_pixels(preset: str) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[15:75, 20:95, 0] = 255
    pixels[..., 2] = np.arange(WIDTH)  # tells what is mirrored
    mirrored = []
    for sample in samples_of(PRESETS[preset], pixels, objects_of([BOX]), 24):
        assert len(sample.objects) == 1
        height, width = sample.image.shape[1:]
        x1, y1, x2, y2 = sample.objects.boxes[0]
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        if min(x2 - x1, y2 - y1) >= 3:
            rows, columns = bright(sample).any(axis=1).nonzero()[0], bright(sample).any(axis=0).nonzero()[0]
            np.testing.assert_allclose([x1, y1, x2, y2], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1)
            mirrored.append(bool(sample.image[2, 0, 0] > sample.image[2, 0, -1]))
    assert len(mirrored) >= 20
    assert not any(mirrored) if preset == "test" else 4 <= sum(mirrored) <= len(mirrored) - 4


@pytest.mark.parametrize("masks", ["polygons", "run lengths"])
@pytest.mark.parametrize("preset", PRESETS)
def test_masks_follow_the_pixels(preset: str, masks: str) -> None:
    image, objects = scene(masks)
    for sample in samples_of(PRESETS[preset], image, objects, 16):
        assert sample.masks is not None and len(sample.masks) == len(sample.objects) == 1
        mask = in_pixels(sample.masks, 0).astype(bool)
        assert mask.shape == sample.image.shape[1:]
        if bright(sample).sum() > 200:  # cropped to less, an edge's pixel counts for too much
            assert (mask & bright(sample)).sum() / (mask | bright(sample)).sum() > 0.9


def test_pixels_are_bilinear_between_centres() -> None:
    """The definition in float64, within the rounding of OpenCV's fixed-point weights; then crop, then mirror."""
    image = np.random.default_rng(0).integers(256, size=(80, 100, 3), dtype=np.uint8)
    rows, columns = (interpolation(105, 80), interpolation(131, 100))
    expected = np.einsum("yi,ijc,xj->yxc", rows, image.astype(np.float64), columns)[13:73, 24:94]
    geometry = Geometry((80, 100), (105, 131), (13, 24), (60, 70), flip=False)
    assert np.abs(geometry.image(image) - expected).max() <= 1
    assert np.abs(replace(geometry, flip=True).image(image) - expected[:, ::-1]).max() <= 1


def interpolation(count: int, cells: int) -> np.ndarray:
    """[count, cells] weights."""
    centres = ((np.arange(count) + 0.5) * cells / count - 0.5).clip(0, cells - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(cells)))


def test_a_smaller_copy_of_the_image_goes_to_the_same_place() -> None:
    y, x = np.mgrid[:160, :200]
    image = np.stack([x, y, 0.5 * (x + y)], axis=-1)
    half = image.reshape(80, 2, 100, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    geometry = Geometry((160, 200), (60, 75), (10, 5), (40, 60), flip=True)
    whole = geometry.image(image.round().astype(np.uint8)).astype(int)
    assert np.abs(geometry.image(half) - whole).max() <= 1


def test_everything_of_an_object_is_filtered_together() -> None:
    """A row of squares of different sizes: a crop keeps some, each with what belongs to it."""
    sides = np.array([10, 12, 14, 16, 18, 20])
    lefts = np.arange(6) * 40 + 5.0
    boxes = np.stack([lefts, np.full(6, 8.0), lefts + sides, 8.0 + sides], axis=1)
    outlines: list[Any] = []
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        mask = np.zeros((40, 240), np.uint8)
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
        polygon = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        outlines.append([polygon] if row % 2 else coco_mask.encode(np.asfortranarray(mask)))
    objects = replace(objects_of(boxes.tolist(), outlines), crowd=np.array([False, False, True, False, False, True]))
    kept = set()
    for sample in samples_of(PretrainPreset(80, (3.0, 3.0)), blank(40, 240), objects, 20):
        found, (height, width) = sample.objects, sample.image.shape[1:]
        kept.add(len(found))
        assert len(found) == len(found.labels) == len(found.areas) == len(found.crowd) == len(sample.masks or ())
        for row, label in enumerate(found.labels):
            assert found.areas[row] == pytest.approx(sides[label] ** 2)  # of the whole object, at scale 1
            assert found.crowd[row] == (label in (2, 5))
            x1, y1, x2, y2 = found.boxes[row]
            assert y2 - y1 == pytest.approx(sides[label]) and 0 < x2 - x1 <= sides[label] + 1e-9
            mask = in_pixels(sample.masks, row)
            assert mask.shape == (height, width)
            if found.crowd[row]:
                assert not mask.any()
            elif x2 - x1 > 4:
                expected = np.zeros_like(mask)
                expected[round(y1) : round(y2), round(x1) : round(x2)] = 1
                assert (mask & expected).sum() / (mask | expected).sum() > 0.75
                assert not mask[:, : max(0, int(x1) - 1)].any() and not mask[:, int(x2) + 2 :].any()
    assert len(kept) > 1 and max(kept) < 6 and min(kept) > 0


def test_areas_follow_the_scale() -> None:
    image, objects = scene()
    sample = TestPreset(180, 1000)(image, objects, np.random.default_rng(0))
    assert sample.objects.areas[0] == pytest.approx(4 * 75 * 60)


def triangle() -> np.ndarray:
    return np.array([[5.0, 4.0], [45.0, 18.0], [22.0, 37.0]])


def rasterized(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects([polygon.ravel().tolist()], height, width))[..., 0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("corner", [(0, 0), (10, 12), (14, 25), (1, 30)])
def test_polygon_cut_by_the_crop(corner: tuple[int, int], flip: bool) -> None:
    image, size = blank(40, 60), (20, 24)
    geometry = Geometry((40, 60), (40, 60), corner, size, flip)
    sample = render(image, objects_of([[5, 4, 45, 37]], [[triangle()]]), geometry, size)
    top, left = corner
    expected = rasterized(triangle(), 40, 60)[top : top + 20, left : left + 24]
    expected = expected[:, ::-1] if flip else expected
    mask = in_pixels(sample.masks, 0)
    assert (mask & expected).sum() / (mask | expected).sum() > 0.9
    assert sample.masks is not None
    x1, y1, x2, y2 = (sample.masks.windows[0] / sample.masks.zooms[0]).tolist()
    assert 0 <= x1 < x2 <= 24 and 0 <= y1 < y2 <= 20


def test_polygon_outside_the_crop() -> None:
    """The box reaches into the crop, the outline does not: an empty mask, and no slip in whose mask is whose."""
    objects = objects_of([[5, 4, 60, 37], [46, 2, 58, 12]], [[triangle()], [triangle() / 4 + [46, 1]]])
    sample = render(blank(40, 60), objects, Geometry((40, 60), (40, 60), (0, 46), (16, 14), False), (16, 14))
    assert sample.masks is not None and len(sample.masks) == len(sample.objects) == 2
    assert not sample.masks.dense(0).any()
    expected = rasterized(triangle() / 4 + [0, 1], 16, 14)
    assert (in_pixels(sample.masks, 1) != expected).sum() <= 0.15 * expected.sum()


def test_overlapping_polygons_are_united() -> None:
    parts = [np.array(part, np.float64) for part in PARTS]
    parts[1] = parts[1] - [20, 0]  # now they overlap
    sample = TestPreset(HEIGHT, WIDTH)(blank(HEIGHT, WIDTH), objects_of([BOX], [parts]), np.random.default_rng(0))
    area = int(in_pixels(sample.masks, 0).sum())
    assert area == pytest.approx(40 * 60 + 15 * 30, rel=0.05)


# Packed masks


def random_masks(count: int, seed: int) -> tuple[PackedMasks, list[np.ndarray]]:
    """Masks of frames of several sizes, the second one empty."""
    rng = np.random.default_rng(seed)
    masks, crops, windows = [], [], []
    frames, zooms = rng.integers(15, 40, (count, 2)), rng.integers(1, 9, count)
    for row, (height, width) in enumerate(frames):
        x1, x2 = np.sort(rng.choice(width + 1, 2, replace=False))
        y1, y2 = np.sort(rng.choice(height + 1, 2, replace=False))
        if row == 1:
            x1 = x2 = y1 = y2 = 0
        crop = rng.integers(2, size=(y2 - y1, x2 - x1), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[y1:y2, x1:x2] = crop
        masks.append(mask)
        crops.append(crop)
        windows.append([x1, y1, x2, y2])
    packed = PackedMasks.pack(crops, np.array(windows).reshape(-1, 4), frames, zooms)
    assert packed.zooms.tolist() == zooms.tolist()
    return packed, masks


def assert_unpacks(packed: PackedMasks, masks: list[np.ndarray]) -> None:
    count = len(masks)
    assert len(packed) == count and packed.windows.shape == (count, 4)
    assert packed.frames.shape == (count, 2) and packed.zooms.shape == (count,) and len(packed.offsets) == count + 1
    assert packed.bits.dtype == torch.uint8 and len(packed.bits) == int(packed.offsets[-1])
    for row, mask in enumerate(masks):
        np.testing.assert_array_equal(packed.dense(row), mask, strict=True)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_pack_and_unpack(count: int) -> None:
    assert_unpacks(*random_masks(count, seed=count))


def test_concatenate() -> None:
    parts = [random_masks(count, seed=count) for count in (3, 0, 1, 5, 0)]
    packed = PackedMasks.concatenate([part for part, _ in parts])
    assert_unpacks(packed, [mask for _, part in parts for mask in part])
    assert packed.zooms.tolist() == [zoom for part, _ in parts for zoom in part.zooms.tolist()]


# What the detector sees


def test_padding_is_zero_after_normalisation() -> None:
    torch.manual_seed(0)
    detector = build_detector("faster_rcnn_r50_fpn", num_classes=2, backbone="resnet18")
    images = [np.full((*size, 3), (250, 100, 3), np.uint8) for size in ((40, 60), (50, 30))]
    batch = collate([TestPreset(40, 60)(image, Objects.none(), np.random.default_rng(0)) for image in images])
    assert batch.sizes.tolist() == [[40, 60], [60, 36]]
    normalized = detector.normalize(batch)
    assert normalized.shape == (2, 3, 64, 64)
    values = (torch.tensor([250.0, 100, 3]) - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    for image, (height, width) in zip(normalized, batch.sizes.tolist(), strict=True):
        torch.testing.assert_close(image[:, :height, :width], values[:, None, None].expand(3, height, width))
        assert not image[:, height:].any() and not image[:, :, width:].any()
    assert PIXEL_MEAN == (123.675, 116.28, 103.53) and PIXEL_STD == (58.395, 57.12, 57.375)
