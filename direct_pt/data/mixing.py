"""Samples out of several images, for stage 1: mosaics, and objects pasted from one image into another.

Sources: Bochkovskiy et al., "YOLOv4" (arXiv 2004.10934); Ghiasi et al., "Simple Copy-Paste" (arXiv 2012.07177).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from direct_pt.batch import Objects, PackedMasks, Sample
from direct_pt.images.decoding import Size
from direct_pt.images.geometry import has_extent
from direct_pt.transforms import Preset, PretrainPreset

MIXES = ("none", "mosaic", "copy-paste")
CENTRE = (0.3, 0.7)  # where the four images of a mosaic may meet, as a share of the canvas
ENLARGED = 1.5  # how much larger the images of a mosaic may be than what fits into their part of it
PASTE_SHARE = 0.5  # of an image's objects that are pasted, on average


@dataclass(frozen=True)
class Mix:
    """Which samples of stage 1 are made of several images.

    Attributes:
        kind: one of MIXES, but "none".
        share: of the samples.
    """

    kind: str
    share: float


@dataclass(frozen=True)
class Part:
    """A part of a mosaic's canvas.

    Attributes:
        corner: (top, left).
        size: (height, width).
        at_bottom: whether its image lies at its bottom, where that is lower than the part; else at its top.
        at_right: the same for right and left.
    """

    corner: Size
    size: Size
    at_bottom: bool
    at_right: bool


def mixed_sample(
    kind: str,
    image: int,
    images: int,
    preset: Preset,
    read: Callable[[int, Preset, np.random.Generator, bool], Sample],
    rng: np.random.Generator,
    with_masks: bool,
) -> Sample:
    """The sample of `image` and others.

    Args:
        kind: one of MIXES, but "none".
        image: row of the image.
        images: how many there are.
        preset: stage 1's.
        read: from row, preset, random numbers and whether with masks to a sample of a single image.
        rng: chooses the other images.
        with_masks: whether the sample has masks.
    """
    if kind == "copy-paste":
        target, source = (read(one, preset, rng, True) for one in (image, int(rng.integers(images))))
        sample = paste_objects(target, source, rng)
        return replace(sample, masks=sample.masks if with_masks else None)
    assert isinstance(preset, PretrainPreset)
    low, high = preset.scale_range
    parts, rows = mosaic_parts(preset.frame, rng), [image, *rng.integers(images, size=3).tolist()]
    presets = [replace(preset, canvas=part.size, scale_range=(low, ENLARGED * high)) for part in parts]
    samples = [read(row, of_part, rng, with_masks) for row, of_part in zip(rows, presets, strict=True)]
    return join_mosaic(samples, parts, preset.frame)


def mosaic_parts(canvas: Size, rng: np.random.Generator) -> list[Part]:
    """The four parts of a mosaic in a random order; the images in them touch the point where they meet."""
    y, x = (int(side * rng.uniform(*CENTRE)) for side in canvas)
    rows, columns = ((0, y), (y, canvas[0] - y)), ((0, x), (x, canvas[1] - x))
    parts = [
        Part((top, left), (height, width), at_bottom=top == 0, at_right=left == 0)
        for top, height in rows
        for left, width in columns
    ]
    return [parts[number] for number in rng.permutation(len(parts))]


def join_mosaic(samples: Sequence[Sample], parts: Sequence[Part], canvas: Size) -> Sample:
    """One sample of `canvas` (height, width): each of `samples` in its part, with its objects."""
    image = torch.zeros((3, *canvas), dtype=torch.uint8)
    moved = []
    for sample, part in zip(samples, parts, strict=True):
        height, width = sample.image.shape[1:]
        top = part.corner[0] + (part.size[0] - height) * part.at_bottom
        left = part.corner[1] + (part.size[1] - width) * part.at_right
        image[:, top : top + height, left : left + width] = sample.image
        moved.append(_in_canvas(sample, (top, left), canvas))
    return replace(
        samples[0],
        image=image,
        padded_size=canvas,
        original_size=canvas,
        scale=(1.0, 1.0),
        objects=_joined([sample.objects for sample in moved]),
        masks=_joined_masks([sample.masks for sample in moved]),
        unreadable=tuple(row for sample in samples for row in sample.unreadable),
    )


def paste_objects(target: Sample, source: Sample, rng: np.random.Generator) -> Sample:
    """`target` with some of the objects of `source` over it, at their places; what they hide of its own is taken away.

    An object of the target that is partly hidden gets the tight box of what is left of its mask; one that is wholly
    hidden is dropped. Crowd regions stay, and are not pasted. Both samples have masks.
    """
    assert target.masks is not None and source.masks is not None
    height, width = target.image.shape[1:]
    candidates = np.flatnonzero(~source.objects.crowd)
    drawn = candidates[rng.random(len(candidates)) < PASTE_SHARE]
    if not len(drawn) and len(candidates):
        drawn = rng.choice(candidates, 1)
    chosen = np.zeros(len(source.objects), bool)
    chosen[drawn] = True
    pasted = _cut(
        replace(source, objects=source.objects.keep(chosen), masks=_keep(source.masks, chosen)), (height, width)
    )
    assert pasted.masks is not None
    covered = torch.zeros((height, width), dtype=torch.bool)
    for row in range(len(pasted.objects)):
        (x1, y1, x2, y2), inside = mask_pixels(pasted.masks, row)
        covered[y1:y2, x1:x2] |= inside
    pixels = source.image[:, :height, :width]
    image = target.image.clone()
    over = covered[: pixels.shape[1], : pixels.shape[2]]  # a source may be smaller: nothing is pasted beyond it
    image[:, : over.shape[0], : over.shape[1]][:, over] = pixels[:, over]
    left = _without(target, covered)
    assert left.masks is not None
    return replace(
        target,
        image=image,
        objects=_joined([left.objects, pasted.objects]),
        masks=PackedMasks.concatenate([left.masks, pasted.masks]),
        unreadable=target.unreadable + source.unreadable,
    )


def mask_pixels(masks: PackedMasks, index: int) -> tuple[list[int], Tensor]:
    """Mask `index` in whole pixels of the image.

    Returns:
        a window (x1, y1, x2, y2), and [height, width] bool, the pixels of it that the mask covers by half or more.
    """
    zoom = int(masks.zooms[index])
    x1, y1, x2, y2 = masks.windows[index].tolist()
    left, top, right, bottom = x1 // zoom, y1 // zoom, -(-x2 // zoom), -(-y2 // zoom)
    padding = (x1 - left * zoom, right * zoom - x2, y1 - top * zoom, bottom * zoom - y2)
    whole = F.pad(masks.crop(index), padding).view(bottom - top, zoom, right - left, zoom)
    return [left, top, right, bottom], whole.float().mean(dim=(1, 3)) >= 0.5


def _keep(masks: PackedMasks, kept: np.ndarray) -> PackedMasks:
    """The masks where the bool `kept` [N] is true."""
    rows = np.flatnonzero(kept)
    crops = [masks.crop(row).numpy() for row in rows.tolist()]
    return PackedMasks.pack(crops, *(part[rows].numpy() for part in (masks.windows, masks.frames, masks.zooms)))


def _in_canvas(sample: Sample, corner: Size, canvas: Size) -> Sample:
    """A sample's boxes and masks at their place in a larger frame."""
    shift = np.array([corner[1], corner[0]] * 2)
    masks = sample.masks
    if masks is not None:
        by_zoom = masks.zooms[:, None]
        windows = torch.where(masks.windows.any(dim=1, keepdim=True), masks.windows + by_zoom * torch.tensor(shift), 0)
        masks = replace(masks, windows=windows, frames=by_zoom * torch.tensor(canvas))
    return replace(sample, objects=replace(sample.objects, boxes=sample.objects.boxes + shift), masks=masks)


def _cut(sample: Sample, frame: Size) -> Sample:
    """A sample's objects and masks, as far as they lie within the top left `frame`; the others are dropped."""
    assert sample.masks is not None
    windows, crops = [], []
    for row in range(len(sample.objects)):
        limit = torch.tensor([frame[1], frame[0]] * 2) * sample.masks.zooms[row]
        window = torch.minimum(sample.masks.windows[row], limit)
        crops.append(sample.masks.crop(row)[: window[3] - window[1], : window[2] - window[0]])
        windows.append(window)
    boxes = np.minimum(sample.objects.boxes, (frame[1], frame[0]) * 2)
    masks = PackedMasks.pack(
        [crop.numpy() for crop in crops],
        torch.stack(windows).numpy() if windows else np.zeros((0, 4)),
        (sample.masks.zooms[:, None] * torch.tensor(frame)).numpy(),
        sample.masks.zooms.numpy(),
    )
    kept = has_extent(boxes) & np.array([bool(crop.any()) for crop in crops], bool)
    return replace(sample, objects=replace(sample.objects, boxes=boxes).keep(kept), masks=_keep(masks, kept))


def _without(sample: Sample, covered: Tensor) -> Sample:
    """A sample's objects and masks without the pixels that are `covered` [h, w] bool."""
    assert sample.masks is not None
    masks, boxes = sample.masks, sample.objects.boxes.copy()
    windows, crops, kept = masks.windows.numpy().copy(), [], np.ones(len(boxes), bool)
    for row in range(len(boxes)):
        zoom, crop = int(masks.zooms[row]), masks.crop(row)
        x1, y1, x2, y2 = windows[row].tolist()
        hidden = covered[torch.arange(y1, y2) // zoom][:, torch.arange(x1, x2) // zoom]
        if bool((hidden & crop.bool()).any()):
            rest = (crop * ~hidden).numpy()
            rows, columns = (np.flatnonzero(rest.any(axis=axis)) for axis in (1, 0))
            kept[row] = len(rows) > 0
            if kept[row]:
                crop = torch.from_numpy(rest[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
                windows[row] = x1 + columns[0], y1 + rows[0], x1 + columns[-1] + 1, y1 + rows[-1] + 1
                boxes[row] = windows[row] / zoom
        crops.append(crop.numpy())
    packed = PackedMasks.pack(crops, windows, masks.frames.numpy(), masks.zooms.numpy())
    return replace(sample, objects=replace(sample.objects, boxes=boxes).keep(kept), masks=_keep(packed, kept))


def _joined(parts: Sequence[Objects]) -> Objects:
    """The objects of all parts, in order; outlines are left out, as they are masks already."""
    return Objects(
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        areas=np.concatenate([part.areas for part in parts]),
        crowd=np.concatenate([part.crowd for part in parts]),
    )


def _joined_masks(parts: Sequence[PackedMasks | None]) -> PackedMasks | None:
    masks = [part for part in parts if part is not None]
    return PackedMasks.concatenate(masks) if masks else None
