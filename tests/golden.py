"""The inputs behind the golden files, made anew from names, shapes and a seed, and the files' way of summing arrays up.

The rule (zlib's CRC-32 of the name, NumPy's legacy Mersenne Twister) is that of the reference: weights, images and
ground truths must be equal to the last digit of float32, so the order in which random numbers are drawn matters.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from direct_pt.batch import Batch, PackedMasks

FOLDER = Path(os.environ.get("DIRECT_PT_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "reference")
SIZES = ((224, 320), (200, 264))  # of the two images, (height, width)
NUM_CLASSES = 80

# Deviation of a weight times the root of its fan-in (else the root of 2), by how the name ends; the first hit counts.
WEIGHT_GAINS = (
    ("retina_cls.weight", 6.0),
    ("retina_reg.weight", 1.5),
    ("rpn_cls.weight", 5.0),
    ("rpn_reg.weight", 1.0),
    ("bbox_head.fc_cls.weight", 10.0),
    ("bbox_head.fc_reg.weight", 3.0),
    (".fc_cls.weight", 5.0),
    (".fc_reg.weight", 2.0),
    ("conv_logits.weight", 6.0),
    ("lateral_convs.0.conv.weight", 0.3),
    ("lateral_convs.1.conv.weight", 0.36),
    ("lateral_convs.2.conv.weight", 0.48),
    ("lateral_convs.3.conv.weight", 0.72),
)
BIAS_OFFSETS = (("retina_cls.bias", -8.8),)
BACKGROUND_OFFSETS = (("bbox_head.fc_cls.bias", 11.5), (".fc_cls.bias", 7.2))


def _by_ending(name: str, table: tuple[tuple[str, float], ...], otherwise: float) -> float:
    return next((figure for ending, figure in table if name.endswith(ending)), otherwise)


def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The float32 weight or buffer of MMDetection's state-dict name `name`."""
    noise = np.random.RandomState((crc32(name.encode()) + 7919 * seed) & 0xFFFFFFFF).standard_normal(shape)
    if name.endswith("running_mean"):
        values = 0.1 * noise
    elif name.endswith("running_var"):
        values = 1 + 0.1 * np.abs(noise)
    elif "relative_position_bias_table" in name:
        values = 0.5 * noise
    elif name.endswith(".bias"):
        values = 0.05 * noise + _by_ending(name, BIAS_OFFSETS, 0.0)
        values[-1] += _by_ending(name, BACKGROUND_OFFSETS, 0.0)
    elif len(shape) == 1:  # a norm's gain; residual branches end in a small one
        size = 0.3 if ".bn3." in name else 0.66 if name.startswith("backbone.norm") else 1.0
        values = size * (1 + 0.1 * noise)
    else:
        per_output = tuple(range(1, len(shape)))
        centred = noise - noise.mean(axis=per_output, keepdims=True)
        values = centred * _by_ending(name, WEIGHT_GAINS, math.sqrt(2)) / math.sqrt(math.prod(shape[1:]))
        if name.endswith("fc_cls.weight"):
            values[-1] *= 0.2  # the background
    return torch.from_numpy(values.astype(np.float32))


def relative_positions(window: int) -> Tensor:
    """[n, n] int64, n = window ** 2: the row of Swin's bias table for each pair of a window's cells, row by row."""
    cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    down, across = (cells[:, None] - cells + window - 1).unbind(dim=-1)
    return down * (2 * window - 1) + across


def state_dict(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """MMDetection's state dict with entries of these names and shapes."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(tuple(shape), dtype=torch.int64)
        elif name.endswith("relative_position_index"):
            state[name] = relative_positions(math.isqrt(shape[0]))
        else:
            state[name] = weight(name, tuple(shape), seed)
    return state


def image(index: int) -> Tensor:
    """Image `index` [3, h, w], float32, as if normalised: 24 plane waves and 8 flat patches, deviation 1.1."""
    height, width = SIZES[index]
    draw = np.random.RandomState(1000 + index)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    canvas = np.zeros((3, height, width))
    for _ in range(24):
        across, down, phase = draw.uniform(-24, 24), draw.uniform(-24, 24), draw.uniform(0, 2 * math.pi)
        wave = np.sin(2 * math.pi * (across * columns / width + down * rows / height) + phase)
        canvas += draw.uniform(-0.35, 0.35, size=(3, 1, 1)) * wave
    for _ in range(8):
        left, top = draw.randint(0, width - 40), draw.randint(0, height - 40)
        patch_width, patch_height = draw.randint(24, 120), draw.randint(24, 120)
        canvas[:, top : top + patch_height, left : left + patch_width] += draw.uniform(-1.5, 1.5, size=(3, 1, 1))
    return torch.from_numpy((canvas * (1.1 / canvas.std())).astype(np.float32))


def objects(index: int, count: int = 5) -> tuple[Tensor, Tensor]:
    """Ground truth of image `index`: boxes [count, 4] float32 inside the image, labels [count] int64."""
    height, width = SIZES[index]
    draw = np.random.RandomState(2000 + index)
    left, top = draw.uniform(0, 0.6 * width, count), draw.uniform(0, 0.6 * height, count)
    right = np.minimum(left + draw.uniform(16, 0.4 * width, count), width)
    bottom = np.minimum(top + draw.uniform(16, 0.4 * height, count), height)
    boxes = np.stack([left, top, right, bottom], axis=1).astype(np.float32)
    return torch.from_numpy(boxes), torch.from_numpy(draw.randint(0, NUM_CLASSES, count).astype(np.int64))


def masks(index: int) -> PackedMasks:
    """The masks of those objects: every pixel whose centre lies in the ellipse that the box encloses."""
    boxes = objects(index)[0].double().numpy()
    windows = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1).astype(np.int64)
    crops = []
    for (x1, y1, x2, y2), (left, top, right, bottom) in zip(boxes, windows, strict=True):
        across = (np.arange(left, right) + 0.5 - (x1 + x2) / 2) / ((x2 - x1) / 2)
        down = (np.arange(top, bottom) + 0.5 - (y1 + y2) / 2) / ((y2 - y1) / 2)
        crops.append((across**2 + down[:, None] ** 2 <= 1).astype(np.uint8))
    return PackedMasks.pack(crops, windows, np.tile(SIZES[index], (len(boxes), 1)), np.ones(len(boxes), np.int64))


def batch(*indices: int, scale: float = 1.0, original_size: tuple[int, int] | None = None) -> Batch:
    """The images `indices` with their ground truths, padded to one multiple of 32, each knowing its own padded size.

    Args:
        indices: 0 and 1, in any combination.
        scale: the factor that the images are said to have been resized by.
        original_size: before that; where left out, the images' own.
    """
    sizes = torch.tensor([SIZES[index] for index in indices])
    padded_sizes = (sizes + 31) // 32 * 32
    height, width = padded_sizes.amax(dim=0).tolist()
    images = torch.zeros(len(indices), 3, height, width)
    for canvas, index in zip(images, indices, strict=True):
        pixels = image(index)
        canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    boxes, labels = (torch.stack(parts) for parts in zip(*map(objects, indices), strict=True))
    return Batch(
        images=images,
        sizes=sizes,
        padded_sizes=padded_sizes,
        original_sizes=sizes if original_size is None else torch.tensor([original_size] * len(indices)),
        scales=torch.full((len(indices), 2), scale),
        indices=torch.tensor(indices),
        seeds=torch.tensor(indices),
        boxes=boxes,
        labels=labels,
        valid=torch.ones_like(labels, dtype=torch.bool),
        crowd=torch.zeros_like(labels, dtype=torch.bool),
        masks=PackedMasks.concatenate([masks(index) for index in indices]),
        mask_rows=torch.arange(labels.numel()).view_as(labels),
    )


def stats(array: Tensor) -> np.ndarray:
    """[3] float64: mean, population deviation, largest magnitude."""
    values = array.detach().double()
    return np.array([values.mean(), values.std(correction=0), values.abs().max()])


def samples(array: Tensor) -> np.ndarray:
    """[64]: values at evenly spaced places of the flattened array."""
    flat = array.detach().flatten()
    return flat[torch.arange(64) * len(flat) // 64].numpy()


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest magnitude expected."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-12))
