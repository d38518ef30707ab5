"""Tiny images, and images fifty times as long as wide, through every preset and into a batch."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from direct_pt.batch import Objects, collate
from direct_pt.transforms import FinetunePreset, PretrainPreset, TestPreset

SIZES = [(8, 8), (1, 1), (8, 400), (400, 8), (20, 1000), (1000, 20), (64, 3200), (3200, 64)]


def outline(box: np.ndarray, size: tuple[int, int], polygon: bool) -> object:
    """A box's own mask in an image of `size` (height, width)."""
    x1, y1, x2, y2 = box.tolist()
    if polygon:
        return [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])]
    mask = np.zeros(size, np.uint8)
    mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = 1
    return coco_mask.encode(np.asfortranarray(mask))


def objects_in(size: tuple[int, int], rng: np.random.Generator) -> Objects:
    """The whole image, a pixel in each of two corners, and five objects anywhere; every other one is a polygon."""
    height, width = size
    x, y = (np.sort(rng.uniform(0, length, size=(5, 2)), axis=1) for length in (width, height))
    corners = [[0, 0, width, height], [0, 0, 1, 1], [width - 1, height - 1, width, height]]
    boxes = np.concatenate([corners, np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    outlines = [outline(box, size, polygon=row % 2 == 0) for row, box in enumerate(boxes)]
    return Objects(boxes, np.arange(len(boxes)), areas, np.arange(len(boxes)) == 4, outlines)


PRESETS = {"pretrain": PretrainPreset(448), "finetune": FinetunePreset(), "test": TestPreset()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_extreme_sizes_become_batches(size: tuple[int, int], preset: str) -> None:
    image, rng = np.full((*size, 3), 200, np.uint8), np.random.default_rng(0)
    samples = [PRESETS[preset](image, objects_in(size, rng), rng) for _ in range(4)]
    for sample in samples:
        height, width = sample.image.shape[1:]
        assert 1 <= height <= sample.padded_size[0] and 1 <= width <= sample.padded_size[1]
        assert (sample.image == 200).all()
        boxes, masks = sample.objects.boxes.astype(np.float32), sample.masks
        assert len(boxes) and np.isfinite(boxes).all() and np.isfinite(sample.objects.areas).all()
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        whole = sample.objects.labels.tolist().index(0)  # of it, all that is cropped is seen
        np.testing.assert_allclose(boxes[whole], [0, 0, width, height], atol=1e-3)
        assert masks is not None and len(masks) == len(boxes)
        assert masks.dense(whole).all()
        assert (masks.windows[:, :2] >= 0).all() and (masks.windows[:, 2:] <= masks.frames.flip(1)).all()
    batch, count = collate(samples), sum(len(sample.objects) for sample in samples)
    assert batch.boxes.isfinite().all() and batch.valid.sum() + batch.crowd.sum() == count
    assert batch.images.shape[2] % 32 == 0 and batch.images.shape[3] % 32 == 0
    assert batch.masks is not None and len(batch.masks) == count
    assert (batch.sizes >= 1).all() and batch.scales.isfinite().all()
