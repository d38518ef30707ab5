"""Detections as files that annotation tools, trainers and COCO's evaluation read.

Each kind is a context that gives a function, which is called once for every image, in order.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import XMLGenerator
from xml.sax.xmlreader import AttributesImpl

import cv2
import numpy as np
import yaml
from pycocotools import mask as coco_mask
from tqdm import tqdm

from direct_pt.errors import InputError, printable
from direct_pt.files import replacing, valid_unicode, write_text
from direct_pt.images.decoding import Size
from direct_pt.onnx_detector import MASK_THRESHOLD, Found, paste_windows
from direct_pt.prediction.seen import Add, Classes, Seen, relative

LABEL_STUDIO_SETUP = "label_studio.xml"  # beside its predictions
MIN_CORNERS = 3  # of a polygon
SIMPLER = 0.7  # pixels that outlines may be off: less than a step of a slanted edge


@contextmanager
def coco_results(path: Path, classes: Classes) -> Iterator[Add]:
    """COCO results, each with the file's name."""
    names = dict(zip(classes.ids, classes.names, strict=True))
    with replacing(path) as temporary, temporary.open("w") as file:
        write, end = json_rows(file.write, "[\n", "]\n")

        def add(seen: Seen) -> None:
            for result in seen.coco(classes):
                image_id, category_id = result["image_id"], result["category_id"]
                name = valid_unicode(str(seen.path))
                row = {"image_id": image_id, "file_name": name, "category_id": category_id,
                       "category_name": names[category_id]}  # fmt: skip
                write({**row, **result})

        yield add
        end()


@contextmanager
def coco_annotations(path: Path, classes: Classes, base: Path) -> Iterator[Add]:
    """A COCO annotation file: images, also those without objects, and annotations with their scores."""
    images: list[dict[str, Any]] = []
    with replacing(path) as temporary, temporary.open("w") as file:
        write, end = json_rows(file.write, '{"annotations": [\n', "]")
        count = 0

        def add(seen: Seen) -> None:
            nonlocal count
            name, (height, width) = valid_unicode(relative(seen.path, base)), seen.size
            images.append({"id": seen.number, "file_name": name, "height": height, "width": width})
            for result in seen.coco(classes):
                count += 1
                width, height = result["bbox"][2:]
                pixels = int(coco_mask.area(result["segmentation"])) if "segmentation" in result else 0
                write({"id": count, **result, "area": pixels or width * height, "iscrowd": 0})

        yield add
        end()
        categories = [{"id": number, "name": name} for number, name in zip(classes.ids, classes.names, strict=True)]
        file.write(f',\n"images": {json.dumps(images)},\n"categories": {json.dumps(categories)}}}\n')


def json_rows(write: Callable[[str], Any], start: str, stop: str) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """What writes one row of a JSON list, and what ends the list: it need not be in memory."""
    begun = False

    def row(value: Any) -> None:
        nonlocal begun
        write((",\n" if begun else start) + json.dumps(value))
        begun = True

    return row, lambda: write(("\n" if begun else start.rstrip("\n")) + stop)


@contextmanager
def yolo_set(folder: Path, classes: Classes) -> Iterator[Add]:
    """A data set of YOLO's: data.yaml, links to the images, and a label file for each, boxes in shares of its sides."""

    def add(seen: Seen) -> None:
        parents = (f"{part}_" if part.casefold() == "images" else part for part in seen.name.parent.parts)
        parent = Path(*parents)  # readers look for labels in place of the last folder of the name images
        image = folder / "images" / parent / seen.named(seen.path.suffix).name
        labels = folder / "labels" / parent / seen.named(".txt").name
        for place in (image, labels):
            place.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.symlink_to(seen.path.absolute())
        except FileExistsError as error:
            raise InputError(f"{seen.path}: another image is {image} already; rename one of them") from error
        except OSError:  # not every file system has links
            shutil.copyfile(seen.path, image)
        sides = np.tile(np.array(seen.size[::-1], np.float64), 2)
        low, high = np.split(seen.found.boxes.astype(np.float64), 2, axis=1)
        boxes = np.hstack([(low + high) / 2, high - low]) / sides
        lines = [
            " ".join([str(label), *(f"{side:.12g}" for side in box)])
            for label, box in zip(seen.found.labels.tolist(), boxes.tolist(), strict=True)
        ]
        write_text(labels, "".join(f"{line}\n" for line in lines))

    yield add
    folder.mkdir(parents=True, exist_ok=True)
    content = {"train": "images", "names": dict(enumerate(classes.names))}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_text(folder / "data.yaml", f"{text}# val: images of another set; Ultralytics asks for it\n")


@contextmanager
def label_studio_tasks(path: Path, classes: Classes, base: Path) -> Iterator[Add]:
    """Tasks with predictions, and the labelling set-up that they belong to, beside them.

    Images are named as Label Studio serves local files, with the folder that `base` lies in as its document root. A
    region is one polygon: of a mask of several pieces it is the largest one's, and how many have such masks is said.
    """
    incomplete = 0
    with replacing(path) as temporary, temporary.open("w") as file:
        write, end = json_rows(file.write, "[\n", "]\n")

        def add(seen: Seen) -> None:
            nonlocal incomplete
            scores = seen.found.scores.tolist()
            regions = [label_studio_region(seen, row) for row in range(len(scores))]
            incomplete += sum(not is_whole for _, _, is_whole in regions)
            shapes = [
                {
                    "id": f"{seen.number}-{row}",
                    "type": f"{kind}labels",
                    "from_name": kind,
                    "to_name": "image",
                    "original_width": seen.size[1],
                    "original_height": seen.size[0],
                    "image_rotation": 0,
                    "score": scores[row],
                    "value": {**value, f"{kind}labels": [printable(classes.names[seen.found.labels[row]])]},
                }
                for row, (kind, value, _) in enumerate(regions)
            ]
            prediction = {"model_version": "Direct-PT", "score": min(scores, default=0.0), "result": shapes}
            place = os.fsencode(f"{base.name}/{relative(seen.path, base)}".lstrip("/"))
            address = f"/data/local-files/?d={quote(place)}"
            write({"data": {"image": address}, "predictions": [prediction]})

        yield add
        end()
    if incomplete:
        text = f"{path.name}: of {incomplete} masks with holes or of several pieces it has the largest piece's outline"
        tqdm.write(text)
    with replacing(path.with_name(LABEL_STUDIO_SETUP)) as temporary, temporary.open("w", encoding="utf-8") as file:
        xml = XMLGenerator(file, "utf-8", short_empty_elements=True)
        with element(xml, "View"):
            leaf(xml, "Image", {"name": "image", "value": "$image"})
            for kind in ("rectangle", "polygon"):
                with element(xml, f"{kind.capitalize()}Labels", {"name": kind, "toName": "image"}):
                    for name in classes.names:
                        leaf(xml, "Label", {"value": printable(name)})


def label_studio_region(seen: Seen, row: int) -> tuple[str, dict[str, Any], bool]:
    """Kind and value of a detection, in per cent of the sides: its outline, or its box; and whether that is all of
    it."""
    shares = 100 / np.array(seen.size[::-1], np.float64)
    outline = outline_of(seen.found, row, seen.size)
    if outline.corners is not None:
        return "polygon", {"points": (outline.corners * shares).tolist(), "closed": True}, outline.is_whole
    box = seen.found.boxes[row].astype(np.float64)
    x, y, width, height = (np.hstack([box[:2], box[2:] - box[:2]]) * np.tile(shares, 2)).tolist()
    return "rectangle", {"x": x, "y": y, "width": width, "height": height, "rotation": 0}, True


@contextmanager
def cvat_images(path: Path, classes: Classes, base: Path) -> Iterator[Add]:
    """CVAT's format for images, version 1.1: of each detection the box or the outline; a mask where that is not all."""
    numbers = itertools.count()
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        xml = XMLGenerator(file, "utf-8", short_empty_elements=True)
        xml.startDocument()
        with element(xml, "annotations"):
            with element(xml, "version"):
                xml.characters("1.1")
            with element(xml, "meta"), element(xml, "task"):  # datumaro asks for it
                text_leaf(xml, "mode", "annotation")
                with element(xml, "labels"):
                    for name in classes.names:
                        with element(xml, "label"):
                            text_leaf(xml, "name", printable(name))

            def add(seen: Seen) -> None:
                height, width = map(str, seen.size)
                about = {"id": str(next(numbers)), "name": printable(relative(seen.path, base))}
                with element(xml, "image", {**about, "width": width, "height": height}):
                    for row in range(len(seen.found.scores)):
                        cvat_shape(xml, seen, row, printable(classes.names[seen.found.labels[row]]))

            yield add
        xml.endDocument()


def cvat_shape(xml: XMLGenerator, seen: Seen, row: int, label: str) -> None:
    """A detection: one element."""
    about = {"label": label, "source": "auto", "occluded": "0", "z_order": "0"}
    outline = outline_of(seen.found, row, seen.size)
    if outline.corners is None:
        sides = (f"{side:.4f}" for side in seen.found.boxes[row].tolist())
        leaf(xml, "box", {**about, **dict(zip(("xtl", "ytl", "xbr", "ybr"), sides, strict=True))})
    elif outline.is_whole:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in outline.corners.tolist())
        leaf(xml, "polygon", {**about, "points": points})
    else:  # its run lengths go along the rows, and begin with zeros
        height, width = outline.mask.shape
        edges = np.flatnonzero(np.diff(outline.mask.ravel(), prepend=0)).tolist()
        counts = np.diff([0, *edges, outline.mask.size]).tolist()
        place = {"left": outline.left, "top": outline.top, "width": width, "height": height}
        run_lengths = {"rle": ", ".join(map(str, counts)), **{key: str(value) for key, value in place.items()}}
        leaf(xml, "mask", {**about, **run_lengths})


@contextmanager
def element(xml: XMLGenerator, name: str, attributes: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """An element, around what is written inside the context."""
    xml.startElement(name, AttributesImpl(attributes))
    yield
    xml.endElement(name)


def leaf(xml: XMLGenerator, name: str, attributes: Mapping[str, str]) -> None:
    """An element without content."""
    with element(xml, name, attributes):
        pass


def text_leaf(xml: XMLGenerator, name: str, text: str) -> None:
    """An element that holds text alone."""
    with element(xml, name):
        xml.characters(text)


@dataclass(frozen=True)
class Outline:
    """The outline of a detection's mask.

    Attributes:
        mask: [h, w] uint8, 0 or 1, in a window of the image.
        left, top: where that begins, in pixels.
        corners: [k, 2] (x, y), of the largest piece, along the edges of its pixels, simplified by up to SIMPLER pixels;
            None where there is no mask, or no pixel in it.
        is_whole: whether that piece is all, and has no holes.
    """

    mask: np.ndarray
    left: int
    top: int
    corners: np.ndarray | None
    is_whole: bool


def outline_of(found: Found, row: int, size: Size) -> Outline:
    """The outline of a detection in an image of `size`."""
    nothing = Outline(np.zeros((0, 0), np.uint8), 0, 0, None, True)
    if found.masks is None:
        return nothing
    own = found.keep(np.array([row]))
    assert own.masks is not None
    ((top, left), inside), = paste_windows(own.masks, own.boxes, np.array([size]))  # fmt: skip
    mask = (inside >= MASK_THRESHOLD).astype(np.uint8)
    # Contours go through the centres of pixels: of a mask twice as large, through places that tell the edges.
    contours, tree = cv2.findContours(mask.repeat(2, 0).repeat(2, 1), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return nothing
    pieces = [contour for contour, (*_, parent) in zip(contours, tree[0].tolist(), strict=True) if parent < 0]
    largest = (max(pieces, key=cv2.contourArea) + 1) // 2
    simpler = cv2.approxPolyDP(largest, SIMPLER, closed=True)
    corners = simpler if len(simpler) >= MIN_CORNERS else largest
    return Outline(mask, left, top, corners.reshape(-1, 2) + np.array([left, top], np.float64), len(contours) == 1)
