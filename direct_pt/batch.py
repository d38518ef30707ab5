"""The structures that all parts share: a sample (one image ready for the detector), a batch, and detections.

Boxes are (x1, y1, x2, y2) in pixels, continuous coordinates, origin at the image's top left corner: a box that covers
the whole image is (0, 0, width, height). Sizes are (height, width).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from direct_pt.onnx_detector import Found


@dataclass
class PackedMasks:
    """Binary masks of N objects, each stored only inside its own window, all in one flat array.

    A window is the mask's bounding box; outside it the mask is zero. Memory grows with the objects' areas, not with
    their number times the image size. Masks of small objects may be supersampled: windows and frames then count finer
    pixels, `zooms` of them per image pixel and side.

    Attributes:
        windows: [N, 4] int64, whole pixels (x1, y1, x2, y2), end exclusive.
        frames: [N, 2] int64 (height, width) of the image that each mask lies in, in the mask's pixels.
        zooms: [N] int64 supersampling factors, from 1.
        offsets: [N + 1] int64; mask n is `bits[offsets[n]:offsets[n + 1]]`, row by row.
        bits: [total] uint8, 0 or 1.
    """

    windows: Tensor
    frames: Tensor
    zooms: Tensor
    offsets: Tensor
    bits: Tensor

    def __len__(self) -> int:
        return len(self.windows)

    def dense(self, index: int) -> Tensor:
        """Mask `index` as uint8 in its whole frame [height, width]."""
        x1, y1, x2, y2 = self.windows[index].tolist()
        mask = torch.zeros(self.frames[index].tolist(), dtype=torch.uint8)
        mask[y1:y2, x1:x2] = self.crop(index)
        return mask

    def crop(self, index: int) -> Tensor:
        """Mask `index` [height, width] uint8 inside its window."""
        x1, y1, x2, y2 = self.windows[index].tolist()
        return self.bits[self.offsets[index] : self.offsets[index + 1]].view(y2 - y1, x2 - x1)

    @classmethod
    def pack(cls, crops: list[np.ndarray], windows: np.ndarray, frames: np.ndarray, zooms: np.ndarray) -> "PackedMasks":
        """From one [h, w] uint8 array per object, with windows [N, 4], frames [N, 2] and zooms [N]."""
        lengths = np.array([0] + [crop.size for crop in crops], dtype=np.int64)
        bits = np.concatenate([crop.ravel() for crop in crops]) if crops else np.zeros(0, np.uint8)
        return cls(
            torch.from_numpy(np.ascontiguousarray(windows, np.int64).reshape(-1, 4)),
            torch.from_numpy(np.ascontiguousarray(frames, np.int64).reshape(-1, 2)),
            torch.from_numpy(np.ascontiguousarray(zooms, np.int64)),
            torch.from_numpy(np.cumsum(lengths)),
            torch.from_numpy(np.ascontiguousarray(bits, np.uint8)),
        )

    @classmethod
    def concatenate(cls, parts: list["PackedMasks"]) -> "PackedMasks":
        """The masks of all parts, in order."""
        starts = np.cumsum([0] + [int(part.offsets[-1]) for part in parts])
        offsets = [part.offsets[:-1] + int(start) for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            torch.cat([part.windows for part in parts]),
            torch.cat([part.frames for part in parts]),
            torch.cat([part.zooms for part in parts]),
            torch.cat([*offsets, torch.tensor([int(starts[-1])])]),
            torch.cat([part.bits for part in parts]),
        )


@dataclass
class Objects:
    """The annotated objects of one image, in that image's current frame.

    Attributes:
        boxes: [G, 4] float64.
        labels: [G] int64, contiguous class indices from 0.
        areas: [G] float64 square pixels of the whole object, even if a crop cut it.
        crowd: [G] bool; a crowd region is neither a training target nor a negative.
        segmentations: one per object, or None if masks were not requested: a list of [P, 2] float64 polygons, or a COCO
            RLE dictionary in the original image's frame.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    segmentations: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def none(cls, with_masks: bool = False) -> "Objects":
        """No objects."""
        empty = np.zeros(0)
        return cls(empty.reshape(0, 4), empty.astype(np.int64), empty, empty.astype(bool), [] if with_masks else None)

    def keep(self, mask: np.ndarray) -> "Objects":
        """The objects where the bool `mask` [G] is true: boxes, labels, areas, crowd and segmentations together."""
        if mask.all():
            return self
        kept = {f.name: getattr(self, f.name)[mask] for f in fields(self) if f.name != "segmentations"}
        if self.segmentations is not None:
            kept["segmentations"] = [s for s, keep in zip(self.segmentations, mask, strict=True) if keep]
        return replace(self, **kept)


@dataclass
class Sample:
    """One image as the detector sees it, and its objects in that frame.

    Attributes:
        image: [3, h, w] uint8 RGB, not padded.
        padded_size: the size that this image alone is padded to.
        original_size: before any resizing.
        scale: (x, y) factors from the original to this frame.
        index: the image's row in the annotation table.
        seed: of the random choices about this sample's targets.
        objects: boxes, labels, areas, crowd in this frame.
        masks: of the objects, or None if masks were not requested.
        unreadable: rows of the unreadable images that this sample replaces.
    """

    image: Tensor
    padded_size: tuple[int, int]
    original_size: tuple[int, int]
    scale: tuple[float, float]
    objects: Objects
    masks: PackedMasks | None = None
    index: int = 0
    seed: int = 0
    unreadable: tuple[int, ...] = ()


@dataclass
class Batch:
    """B samples in tensors of one shape. G is the largest number of objects, at least 1.

    Attributes:
        images: [B, 3, H, W] uint8, zero outside each image (a floating-point tensor counts as normalised already).
        sizes: [B, 2] int64, each image without its padding.
        padded_sizes: [B, 2] int64, the size that each image alone is padded to: anchors beyond it are ignored.
        original_sizes: [B, 2] int64.
        scales: [B, 2] float32 (x, y) factors from the original image to this frame.
        indices: [B] int64 rows in the annotation table.
        seeds: [B] int64.
        boxes: [B, G, 4] float32; zero where there is no object.
        labels: [B, G] int64.
        valid: [B, G] bool, the training targets.
        crowd: [B, G] bool, the regions to ignore.
        masks: the masks of all objects and crowd regions, or None; their row for each object is in `mask_rows` [B, G]
            int64 (-1: none).
        unreadable: rows of the unreadable images, which were replaced.
    """

    images: Tensor
    sizes: Tensor
    padded_sizes: Tensor
    original_sizes: Tensor
    scales: Tensor
    indices: Tensor
    seeds: Tensor
    boxes: Tensor
    labels: Tensor
    valid: Tensor
    crowd: Tensor
    masks: PackedMasks | None = None
    mask_rows: Tensor | None = None
    unreadable: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; copies from pinned memory overlap with computation."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory; the data loader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {
            f.name: move(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        if self.masks is not None:
            moved["masks"] = PackedMasks(*(move(getattr(self.masks, f.name)) for f in fields(PackedMasks)))
        return replace(self, **moved)


def collate(samples: list[Sample]) -> Batch:
    """Pad the samples to one shape. Images are padded at the right and the bottom."""
    height = max(sample.padded_size[0] for sample in samples)
    width = max(sample.padded_size[1] for sample in samples)
    count, slots = len(samples), max(1, *(len(sample.objects) for sample in samples))
    images = np.zeros((count, height, width, 3), np.uint8)  # channels last, as decoded: a plain copy is faster
    boxes = np.zeros((count, slots, 4), np.float32)
    labels = np.zeros((count, slots), np.int64)
    valid, crowd = np.zeros((2, count, slots), bool)
    rows = np.full((count, slots), -1)
    first_row = 0
    for b, sample in enumerate(samples):
        objects, n = sample.objects, len(sample.objects)
        images[b, : sample.image.shape[1], : sample.image.shape[2]] = sample.image.permute(1, 2, 0).numpy()
        boxes[b, :n] = objects.boxes
        labels[b, :n] = objects.labels
        crowd[b, :n] = objects.crowd
        valid[b, :n] = ~objects.crowd
        rows[b, :n] = range(first_row, first_row + n)
        first_row += n
    masks = [sample.masks for sample in samples if sample.masks is not None]
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        sizes=torch.tensor([sample.image.shape[1:] for sample in samples]),
        padded_sizes=torch.tensor([sample.padded_size for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        scales=torch.tensor([sample.scale for sample in samples], dtype=torch.float32),
        indices=torch.tensor([sample.index for sample in samples]),
        seeds=torch.tensor([sample.seed for sample in samples]),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        valid=torch.from_numpy(valid),
        crowd=torch.from_numpy(crowd),
        masks=PackedMasks.concatenate(masks) if masks else None,
        mask_rows=torch.from_numpy(rows) if masks else None,
        unreadable=tuple(row for sample in samples for row in sample.unreadable),
    )


@dataclass
class Detections:
    """The detections in a batch, best first within each image, in the original images' frames.

    Attributes:
        image: [D] int64, position of the image in the batch.
        boxes: [D, 4] float32.
        scores: [D] float32.
        labels: [D] int64.
        masks: [D, m, m] float32 probabilities inside each box, for its own label; None from box detectors.
    """

    image: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device | str) -> "Detections":
        """The detections on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def keep(self, rows: Tensor) -> "Detections":
        """Some rows: a bool mask, or indices."""
        return self._map(lambda tensor: tensor[rows])

    def of_image(self, position: int) -> "Detections":
        """The detections in one image of the batch."""
        return self.keep(self.image == position)

    def arrays(self, num_images: int) -> list[Found]:
        """The detections in each image of the batch, as arrays; they must lie on the CPU."""
        parts = [self.of_image(position) for position in range(num_images)]
        masks = [None if part.masks is None else part.masks.numpy() for part in parts]
        columns = [(part.boxes.numpy(), part.scores.numpy(), part.labels.numpy()) for part in parts]
        return [Found(*values, own) for values, own in zip(columns, masks, strict=True)]

    def of_images(self, batch: Batch) -> list[Found | None]:
        """The same of each image of their batch; None where it is black in place of an unreadable one."""
        found, indices = self.arrays(len(batch)), batch.indices.tolist()
        return [None if row in batch.unreadable else part for row, part in zip(indices, found, strict=True)]

    def above(self, score: float | Tensor) -> "Detections":
        """The detections with higher scores than one for all, or [D] float64, one for each."""
        return self.keep(self.scores.double() > score)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Detections":
        changed = {f.name: change(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(self, **changed)
