"""Detections as pictures: drawn on their images, and cut out of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from direct_pt.errors import printable
from direct_pt.files import replacing, shortened
from direct_pt.images.visualize import draw_detections, drawable_name
from direct_pt.images.windows import Window
from direct_pt.onnx_detector import Found, paste_masks
from direct_pt.prediction.inputs import COMMENT
from direct_pt.prediction.seen import Add, Classes, Seen, drawn_share

QUALITY = 92  # of JPEG files
MAX_NAME = 100  # bytes of a class's folder


@contextmanager
def pictures(folder: Path, classes: Classes) -> Iterator[Add]:
    """A JPEG of each image with its detections drawn; large ones are drawn smaller."""
    names = drawable_names(classes)

    def add(seen: Seen) -> None:
        target = folder / seen.named(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        drawn = picture(seen, names)
        with replacing(target, to_disk=False) as temporary:
            drawn.save(temporary, "JPEG", quality=QUALITY, comment=COMMENT)

    yield add


def drawable_names(classes: Classes) -> list[str]:
    """The classes' names as they can be drawn."""
    return [drawable_name(name, number) for name, number in zip(classes.names, classes.ids, strict=True)]


def picture(seen: Seen, names: Sequence[str]) -> Image.Image:
    """The image with its detections; `names` are those of the classes, as they can be drawn."""
    share, whole = drawn_share(seen.size), Window.whole(seen.size)
    if share == 1:
        photo = Image.fromarray(seen.pixels(whole))
    else:
        height, width = (max(1, round(side * share)) for side in seen.size)
        photo = Image.fromarray(seen.pixels(whole, (height, width)))
        photo.thumbnail((width, height))
    scale = np.tile(np.array(photo.size) / seen.size[::-1], 2).astype(np.float32)
    return with_detections(photo, replace(seen.found, boxes=seen.found.boxes * scale), names)


def with_detections(photo: Image.Image, found: Found, names: Sequence[str]) -> Image.Image:
    """A copy of an image with detections in its pixels; `names` are those of the classes, as they can be drawn."""
    boxes = found.boxes
    values = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    captions = [f"{names[label]} {score:.2f}" for label, score in values]
    masks = None
    if found.masks is not None:
        size, pairs = (photo.height, photo.width), zip(found.masks, boxes, strict=True)
        masks = (paste_masks(probabilities[None], box[None], size)[0] for probabilities, box in pairs)  # one at a time
    return draw_detections(photo, boxes, found.labels, captions, masks)


@contextmanager
def crops(folder: Path, classes: Classes) -> Iterator[Add]:
    """A JPEG of each object, in a folder of its class."""
    folders = class_folders(classes)

    def add(seen: Seen) -> None:
        height, width = seen.size
        for row, (box, label) in enumerate(zip(seen.found.boxes.tolist(), seen.found.labels.tolist(), strict=True)):
            x1, y1 = max(0, int(box[0])), max(0, int(box[1]))
            x2, y2 = min(width, max(x1 + 1, int(np.ceil(box[2])))), min(height, max(y1 + 1, int(np.ceil(box[3]))))
            target = folder / folders[label] / seen.named(f"_{row + 1}.jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(seen.pixels(Window(x1, y1, x2, y2))).save(target, "JPEG", quality=QUALITY)

    yield add


def class_folders(classes: Classes) -> list[str]:
    """A folder's name for each class, no two the same, also where case does not count."""
    found: list[str] = []
    for name, number in zip(classes.names, classes.ids, strict=True):
        kept = "".join(c if c.isalnum() or c in "-_ ()" else "_" for c in printable(name)).strip() or "_"
        kept = shortened(kept, MAX_NAME)
        taken = {other.casefold() for other in found}
        found.append(f"{kept}_{number}" if kept.casefold() in taken else kept)
    return found
