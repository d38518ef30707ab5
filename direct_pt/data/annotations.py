"""The table that every annotation source is read into: flat arrays, no Python object per annotation.

Worker processes share the arrays' memory with their parent; Python objects would be copied into each worker, page by
page, as their reference counts change.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from direct_pt.batch import Objects
from direct_pt.data.outlines import Segmentations, positions_of, starts_of
from direct_pt.errors import InputError
from direct_pt.files import read_regular
from direct_pt.images.decoding import DEFAULT_DECODING, Decoding, Size, UnreadableImage, blamed
from direct_pt.images.windows import Window, read_window

MIN_SIDE = 1.0  # pixels; a box that is smaller after clipping is no training target
SIZES_FROM_FILES = "image sizes read from the image files"  # a key of `AnnotationTable.repairs`


class EncodedImages(Protocol):
    """Images that are not separate files, such as those in Arrow files, by row."""

    @property
    def fingerprint(self) -> str:
        """A text that differs if any image differs."""

    def content(self, row: int) -> bytes:
        """The encoded image, as its file would hold it. Raises OSError."""

    def select(self, rows: np.ndarray) -> "EncodedImages":
        """The images of some rows [n] int64."""


@dataclass
class AnnotationTable:
    """The annotations of one split: N images, M objects sorted by image.

    Boxes and areas are kept as the source states them; `objects` clips and drops, so that evaluation sees what any
    other COCO tool sees.

    Attributes:
        source: where they come from, for messages.
        folder: the folder that `file_names` are relative to.
        file_names: [N] bytes.
        image_ids: [N] int64, the source's own.
        sizes: [N, 2] int32 (height, width) in pixels.
        starts: [N + 1] int64; image i has the objects `starts[i]:starts[i + 1]`.
        boxes: [M, 4] float64 (x, y, width, height) in pixels, as in COCO files.
        labels: [M] int64 indices into `class_names`.
        areas: [M] float64 square pixels.
        crowd: [M] bool.
        annotation_ids: [M] int64, the source's own.
        segmentations: the objects' outlines.
        class_names: in the order of the category ids.
        category_ids: the source's own id of each class.
        repairs: kinds of repairs and of notes from reading, and how often each was.
        encoded: the images, if they are not files; `file_names` are then their names in messages.
        decoding: how image files become pixels.
        places: [N, 4] int64 (x, y, height, width) of images that are parts of files: the corner of each, and the size
            of what the file holds. None where they are whole.
    """

    source: str
    folder: Path
    file_names: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    annotation_ids: np.ndarray
    segmentations: Segmentations
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    repairs: dict[str, int]
    encoded: EncodedImages | None = None
    decoding: Decoding = DEFAULT_DECODING
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, image: int) -> Path:
        """The image file."""
        return self.folder / decode_name(self.file_names[image])

    def image_name(self, image: int) -> str:
        """The image's file, or its name in the source, for messages."""
        name = decode_name(self.file_names[image])
        return str(self.folder / name) if self.encoded is None else f"{self.source}: {name}"

    def image_content(self, image: int) -> bytes:
        """The encoded image. Raises OSError."""
        return read_regular(self.path(image)) if self.encoded is None else self.encoded.content(image)

    def image_size(self, image: int) -> Size:
        """(height, width) in pixels."""
        height, width = self.sizes[image].tolist()
        return height, width

    def read_image(self, image: int, least: Size | None = None) -> np.ndarray:
        """[h, w, 3] uint8 RGB of one image, reduced if `least` allows: see decode_image. Raises UnreadableImage."""
        name, (rows, columns) = self.image_name(image), self.image_size(image)
        is_part_of_file = self.places is not None and self.encoded is None
        try:
            source = self.path(image) if is_part_of_file else self.image_content(image)
        except OSError as error:
            raise UnreadableImage(f"{name}: cannot be read ({blamed(error)})") from error
        x, y, *full = (0, 0, rows, columns) if self.places is None else self.places[image].tolist()
        window = Window(x, y, x + columns, y + rows)
        return read_window(source, name, (full[0], full[1]), window, least, self.decoding)

    def image_of_object(self) -> np.ndarray:
        """[M] int64, the row of each object's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def corner_boxes(self) -> np.ndarray:
        """[M, 4] float64 (x1, y1, x2, y2), clipped to the images."""
        limits = self.sizes[:, [1, 0, 1, 0]].astype(np.float64)[self.image_of_object()]
        return np.clip(corners_of(self.boxes), 0, limits)

    def usable(self) -> np.ndarray:
        """[M] bool, whether an object's clipped box is at least MIN_SIDE wide and high."""
        return _at_least_min_side(self.corner_boxes())

    def targets_per_image(self) -> np.ndarray:
        """[N] int64, how many objects of each image are training targets: usable and no crowd."""
        target = np.concatenate([[0], np.cumsum(self.usable() & ~self.crowd)])
        return target[self.starts[1:]] - target[self.starts[:-1]]

    def objects(self, image: int, with_masks: bool) -> Objects:
        """The usable objects of one image, boxes clipped to it."""
        rows = slice(self.starts[image], self.starts[image + 1])
        height, width = self.sizes[image].tolist()
        corners = np.minimum(np.maximum(corners_of(self.boxes[rows]), 0), (width, height, width, height))
        outlines = None
        if with_masks:
            outlines = [self.segmentations.of_object(row, (height, width)) for row in range(rows.start, rows.stop)]
        found = Objects(corners, self.labels[rows], self.areas[rows], self.crowd[rows], outlines)
        return found.keep(_at_least_min_side(corners))

    def without_mask(self) -> np.ndarray:
        """[M] bool, whether an object is a training target without an outline."""
        return ~self.segmentations.present() & ~self.crowd & self.usable()

    def require_masks(self) -> None:
        """Raises InputError unless every training target has an outline."""
        missing = np.flatnonzero(self.without_mask())
        if len(missing):
            row, image = missing[0], int(self.image_of_object()[missing[0]])
            first = f"object {row - self.starts[image] + 1} of {self.image_name(image)} (id {self.annotation_ids[row]})"
            raise InputError(
                f"{self.source}: {len(missing)} object(s) without 'segmentation', which a mask detector needs, first "
                f"{first}; use a box detector such as faster_rcnn_r50_fpn"
            )

    def without_empty_images(self) -> "AnnotationTable":
        """The images that have training targets."""
        return self.select(np.flatnonzero(self.targets_per_image() > 0))

    def select(self, images: np.ndarray) -> "AnnotationTable":
        """Some images: rows [n] int64, in that order."""
        objects = positions_of(self.starts, images)
        chosen: dict[str, Any] = {name: getattr(self, name)[images] for name in ("file_names", "image_ids", "sizes")}
        chosen |= self._object_columns(objects)
        chosen["starts"] = starts_of(np.diff(self.starts)[images])
        chosen["places"] = None if self.places is None else self.places[images]
        chosen["encoded"] = None if self.encoded is None else self.encoded.select(images)
        return replace(self, **chosen)

    def with_classes(self, names: tuple[str, ...], category_ids: tuple[int, ...]) -> "AnnotationTable":
        """The table with other classes, matched by name; objects of classes that are not among them are dropped."""
        rows = {name: row for row, name in enumerate(names)}
        new = np.array([rows.get(name, -1) for name in self.class_names])[self.labels]
        kept = np.flatnonzero(new >= 0)
        starts = starts_of(new >= 0)[self.starts]
        labels = {"labels": new[kept], "starts": starts, "class_names": names, "category_ids": category_ids}
        return replace(self, **self._object_columns(kept) | labels)

    def _object_columns(self, rows: np.ndarray) -> dict[str, Any]:
        """The table's columns of some objects."""
        values = {name: getattr(self, name)[rows] for name in ("boxes", "labels", "areas", "crowd", "annotation_ids")}
        return {**values, "segmentations": self.segmentations.select(rows)}

    def describe(self) -> str:
        """Counts of images and objects, and the repairs."""
        repairs = "".join(f"; {what}: {count}" for what, count in self.repairs.items())
        return (
            f"{len(self)} images ({int((self.targets_per_image() == 0).sum())} without objects), {len(self.boxes)} "
            f"objects ({int(self.crowd.sum())} crowd regions) from {self.source}{repairs}"
        )

    def coco(self, with_masks: bool = False) -> dict[str, Any]:
        """The annotations as a COCO dictionary, values as the source states them, for the metrics."""
        images = self.image_of_object()
        values = zip(
            self.image_ids[images].tolist(),
            np.array(self.category_ids)[self.labels].tolist(),
            self.boxes.tolist(),
            self.areas.tolist(),
            self.crowd.astype(int).tolist(),
            strict=True,
        )
        annotations: list[dict[str, Any]] = [
            {"id": row, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for row, (image, category, box, area, crowd) in enumerate(values, start=1)
        ]
        if with_masks:
            for row, annotation in enumerate(annotations):
                outline = self.segmentations.of_object(row, self.image_size(int(images[row])))
                polygons = [polygon.ravel().tolist() for polygon in outline] if isinstance(outline, list) else outline
                annotation["segmentation"] = polygons
        return {
            "images": [
                {"id": int(i), "height": int(h), "width": int(w)}
                for i, (h, w) in zip(self.image_ids, self.sizes, strict=True)
            ],
            "annotations": annotations,
            "categories": [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names, strict=True)],
        }


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """[n, 4] (x1, y1, x2, y2) of boxes [n, 4] (x, y, width, height)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _at_least_min_side(corners: np.ndarray) -> np.ndarray:
    return ((corners[:, 2:] - corners[:, :2]) >= MIN_SIDE).all(axis=1)


def encode_name(name: str) -> bytes:
    """A file name as the table stores it; lone surrogates, which JSON can express, survive."""
    return name.encode(errors="surrogatepass")


def decode_name(name: bytes) -> str:
    """The file name of `encode_name`'s bytes."""
    return name.decode(errors="surrogatepass")
