"""What pages show over images: ground truth and detections, drawn on a part of an image."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from direct_pt.data.annotations import corners_of
from direct_pt.images.visualize import draw_detections
from direct_pt.reports.evaluation import Judged

PICTURE_SIDE = 300  # pixels of a picture's longer side
QUALITY = 70
CONTEXT = 3.0  # how many times the object's longer side is shown around it
MIN_WINDOW = 96  # pixels of the image that are shown at least


@dataclass
class Overlay:
    """What is drawn over an image: boxes [n, 4] (x1, y1, x2, y2), labels [n], captions and, if any, COCO's masks."""

    boxes: np.ndarray
    labels: np.ndarray
    captions: list[str]
    masks: list[Any] | None


def ground_truth(judged: Judged, row: int) -> Overlay:
    """The objects of an image, with their masks if the detector finds masks."""
    table, size = judged.table, judged.table.image_size(row)
    objects = slice(table.starts[row], table.starts[row + 1])
    labels = table.labels[objects]
    marked = zip(labels.tolist(), table.crowd[objects].tolist(), strict=True)
    captions = [table.class_names[label] + " (crowd)" * crowd for label, crowd in marked]
    masks = None
    if judged.predictions.masks is not None:
        outlines = (table.segmentations.of_object(one, size) for one in range(objects.start, objects.stop))
        masks = [_run_lengths(outline, size) for outline in outlines]
    return Overlay(corners_of(table.boxes[objects]), labels, captions, masks)


def _run_lengths(outline: Any, size: tuple[int, int]) -> Any:
    """COCO's run lengths of an outline; of none, an empty mask."""
    if isinstance(outline, dict):
        return outline
    polygons = [polygon.ravel().tolist() for polygon in outline]
    if not polygons:  # not run lengths without a run: pycocotools decodes those to whatever lay in memory
        return coco_mask.encode(np.zeros(size, np.uint8, order="F"))
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))


def detections(judged: Judged, row: int) -> Overlay:
    """The detections of an image above the threshold."""
    found = judged.predictions
    first, last = np.searchsorted(found.images, [row, row + 1])
    rows = np.arange(first, last)[found.scores[first:last] > judged.threshold]
    values = zip(found.labels[rows].tolist(), found.scores[rows].tolist(), strict=True)
    captions = [f"{judged.table.class_names[label]} {score:.2f}" for label, score in values]
    masks = None if found.masks is None else [found.masks[one] for one in rows]
    return Overlay(corners_of(found.boxes[rows]), found.labels[rows], captions, masks)


def window_around(box: Sequence[float] | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) around a box (x, y, width, height), inside an image (width, height)."""
    if box is None:
        return 0, 0, *size
    x, y, width, height = box
    side = max(CONTEXT * max(width, height), MIN_WINDOW)
    edges = []
    for middle, length in ((x + width / 2, size[0]), (y + height / 2, size[1])):
        extent = min(side, length)
        edges.append((start := min(max(middle - extent / 2, 0), length - extent), start + extent))
    (left, right), (top, bottom) = edges
    return int(left), int(top), max(round(right), int(left) + 1), max(round(bottom), int(top) + 1)


def draw_overlay(photo: Image.Image, window: tuple[int, int, int, int], overlay: Overlay) -> Image.Image:
    """A part (x1, y1, x2, y2) of an image, PICTURE_SIDE large, with what is drawn over it."""
    left, top, right, bottom = window
    scale = PICTURE_SIDE / max(right - left, bottom - top)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))

    def part(image: Image.Image, method: Image.Resampling) -> Image.Image:
        return image.resize(size, method, box=window)

    boxes = (overlay.boxes - [left, top, left, top]) * scale
    kept = np.flatnonzero((boxes[:, :2] < size).all(1) & (boxes[:, 2:] > 0).all(1))
    masks = None
    if overlay.masks is not None:
        decoded = (Image.fromarray(coco_mask.decode(overlay.masks[row])) for row in kept)
        masks = (np.asarray(part(mask, Image.Resampling.NEAREST)) > 0 for mask in decoded)
    captions = [overlay.captions[row] for row in kept]
    return draw_detections(part(photo, Image.Resampling.BILINEAR), boxes[kept], overlay.labels[kept], captions, masks)


def data_uri(image: Image.Image) -> str:
    """An image as an address that holds it."""
    content = io.BytesIO()
    image.save(content, "WEBP", quality=QUALITY)
    return file_uri(content.getvalue(), "webp")


def file_uri(content: bytes, kind: str) -> str:
    """The content of an image file, "webp" or "png", as an address that holds it."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()
