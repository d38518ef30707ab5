"""Detections as files that annotation tools, trainers and COCO's evaluation read.

Each kind is a context that gives a function, which is called once for every image, in order.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import XMLGenerator
from xml.sax.xmlreader import AttributesImpl

import cv2
import numpy as np
import yaml

from direct_pt.errors import printable
from direct_pt.files import replacing, valid_unicode, write_text
from direct_pt.images.decoding import Size
from direct_pt.onnx_detector import MASK_THRESHOLD, Found, paste_windows
from direct_pt.prediction.seen import Add, Classes, Seen, relative

LABEL_STUDIO_SETUP = "label_studio.xml"  # beside its predictions
MIN_CORNERS = 3  # of a polygon


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
                write({"id": count, **result, "area": width * height, "iscrowd": 0})

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
        image = folder / "images" / seen.named(seen.path.suffix)
        labels = folder / "labels" / seen.named(".txt")
        for place in (image, labels):
            place.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.symlink_to(seen.path.absolute())
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
    write_text(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


@contextmanager
def label_studio_tasks(path: Path, classes: Classes, base: Path) -> Iterator[Add]:
    """Tasks with predictions, and the labelling set-up that they belong to, beside them.

    Images are named as Label Studio serves local files, with the folder that `base` lies in as its document root.
    """
    with replacing(path) as temporary, temporary.open("w") as file:
        write, end = json_rows(file.write, "[\n", "]\n")

        def add(seen: Seen) -> None:
            scores = seen.found.scores.tolist()
            shapes = [
                {
                    "type": f"{kind}labels",
                    "from_name": kind,
                    "to_name": "image",
                    "original_width": seen.size[1],
                    "original_height": seen.size[0],
                    "image_rotation": 0,
                    "score": scores[row],
                    "value": {**value, f"{kind}labels": [printable(classes.names[seen.found.labels[row]])]},
                }
                for row, kind, value in label_studio_shapes(seen)
            ]
            prediction = {"model_version": "Direct-PT", "score": min(scores, default=0.0), "result": shapes}
            address = "/data/local-files/?d=" + quote(f"{base.name}/{relative(seen.path, base)}".lstrip("/"))
            write({"data": {"image": address}, "predictions": [prediction]})

        yield add
        end()
    with replacing(path.with_name(LABEL_STUDIO_SETUP)) as temporary, temporary.open("w", encoding="utf-8") as file:
        xml = XMLGenerator(file, "utf-8", short_empty_elements=True)
        with element(xml, "View"):
            leaf(xml, "Image", {"name": "image", "value": "$image"})
            for kind in ("rectangle", "polygon"):
                with element(xml, f"{kind.capitalize()}Labels", {"name": kind, "toName": "image"}):
                    for name in classes.names:
                        leaf(xml, "Label", {"value": printable(name)})


def label_studio_shapes(seen: Seen) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Of each shape row of the detection, kind and value, in per cent of the sides: outlines, or the box."""
    shares = 100 / np.array(seen.size[::-1], np.float64)
    for row, box in enumerate(seen.found.boxes.astype(np.float64)):
        outlines = [] if seen.found.masks is None else polygons(seen.found, row, seen.size)
        for outline in outlines:
            yield row, "polygon", {"points": (outline * shares).tolist(), "closed": True}
        if not outlines:
            x, y, width, height = (np.hstack([box[:2], box[2:] - box[:2]]) * np.tile(shares, 2)).tolist()
            yield row, "rectangle", {"x": x, "y": y, "width": width, "height": height, "rotation": 0}


@contextmanager
def cvat_images(path: Path, classes: Classes, base: Path) -> Iterator[Add]:
    """CVAT's format for images, version 1.1: a box, or the outlines, of each detection."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        xml = XMLGenerator(file, "utf-8", short_empty_elements=True)
        xml.startDocument()
        with element(xml, "annotations"):
            with element(xml, "version"):
                xml.characters("1.1")

            def add(seen: Seen) -> None:
                height, width = map(str, seen.size)
                about = {"id": str(seen.number - 1), "name": printable(relative(seen.path, base))}
                with element(xml, "image", {**about, "width": width, "height": height}):
                    for row in range(len(seen.found.scores)):
                        cvat_shapes(xml, seen, row, printable(classes.names[seen.found.labels[row]]))

            yield add
        xml.endDocument()


def cvat_shapes(xml: XMLGenerator, seen: Seen, row: int, label: str) -> None:
    """A detection's outlines, or its box."""
    about = {"label": label, "source": "auto", "occluded": "0", "z_order": "0"}
    outlines = [] if seen.found.masks is None else polygons(seen.found, row, seen.size)
    for outline in outlines:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in outline.tolist())
        leaf(xml, "polygon", {**about, "points": points})
    if not outlines:
        sides = (f"{side:.4f}" for side in seen.found.boxes[row].tolist())
        leaf(xml, "box", {**about, **dict(zip(("xtl", "ytl", "xbr", "ybr"), sides, strict=True))})


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


def polygons(found: Found, row: int, size: Size) -> list[np.ndarray]:
    """The outlines [k, 2] (x, y) of a detection's mask, in pixels of its image of `size`; none of under a pixel."""
    assert found.masks is not None
    own = found.keep(np.array([row]))
    assert own.masks is not None
    ((top, left), inside), = paste_windows(own.masks, own.boxes, np.array([size]))  # fmt: skip
    mask = (inside >= MASK_THRESHOLD).astype(np.uint8)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners = [outline.reshape(-1, 2) + np.array([left + 0.5, top + 0.5]) for outline in outlines]
    return [outline for outline in corners if len(outline) >= MIN_CORNERS]
