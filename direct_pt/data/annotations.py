"""The table that every source of annotations ends in: flat arrays, nothing per object in Python.

Worker processes share the arrays' memory with their parent; Python objects would be copied into each of them, page by
page, as their reference counts change.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from direct_pt.batch import Objects
from direct_pt.data.images import DEFAULT, Decoding, Size, UnreadableImage, decode_image
from direct_pt.errors import InputError

MIN_SIDE = 1.0  # pixels; a box that is smaller after clipping is no training target
SIZES_FROM_FILES = "image sizes read from the image files"  # among `repairs`


class EncodedImages(Protocol):
    """Images that are no files of their own, such as those in Arrow files, by row."""

    @property
    def fingerprint(self) -> str:
        """Another one where any image is another."""

    def content(self, row: int) -> bytes:
        """What a file of the image would hold. Raises OSError."""

    def select(self, rows: np.ndarray) -> "EncodedImages":
        """Only those of some rows [n] int64."""


@dataclass
class Segmentations:
    """The objects' outlines: polygons, or run lengths, or nothing.

    Attributes:
        coordinates: [K, 2] float64 polygon corners (x, y) in pixels.
        polygon_starts: [P + 1] int64; polygon p is `coordinates[polygon_starts[p]:polygon_starts[p + 1]]`.
        object_polygons: [M + 1] int64; object m has the polygons `object_polygons[m]:object_polygons[m + 1]`.
        run_lengths: [R] uint8, COCO's compressed counts.
        run_length_starts: [M + 1] int64, the same for `run_lengths`.
    """

    coordinates: np.ndarray
    polygon_starts: np.ndarray
    object_polygons: np.ndarray
    run_lengths: np.ndarray
    run_length_starts: np.ndarray

    def present(self) -> np.ndarray:
        """[M] bool, whether an object has an outline at all."""
        return (np.diff(self.object_polygons) > 0) | (np.diff(self.run_length_starts) > 0)

    def of_object(self, row: int, size: tuple[int, int]) -> list[np.ndarray] | dict[str, Any]:
        """Object `row`'s polygons ([P, 2] arrays; none without an outline), or its COCO RLE for an image of `size`."""
        start, end = self.run_length_starts[row : row + 2]
        if end > start:
            return {"size": list(size), "counts": self.run_lengths[start:end].tobytes()}
        polygons = range(self.object_polygons[row], self.object_polygons[row + 1])
        return [self.coordinates[self.polygon_starts[p] : self.polygon_starts[p + 1]] for p in polygons]

    def select(self, rows: np.ndarray) -> "Segmentations":
        """Only the objects `rows` [m] int64, in that order."""
        polygons = _ranges(self.object_polygons, rows)
        return Segmentations(
            coordinates=self.coordinates[_ranges(self.polygon_starts, polygons)],
            polygon_starts=starts_of(np.diff(self.polygon_starts)[polygons]),
            object_polygons=starts_of(np.diff(self.object_polygons)[rows]),
            run_lengths=self.run_lengths[_ranges(self.run_length_starts, rows)],
            run_length_starts=starts_of(np.diff(self.run_length_starts)[rows]),
        )


@dataclass
class AnnotationTable:
    """The annotations of one split: N images, M objects sorted by image.

    Boxes and areas stand here as the source gave them; clipping and dropping happen on the way out (`objects`), so that
    evaluation sees what any other COCO tool sees.

    Attributes:
        source: where they come from, for messages.
        folder: that `file_names` are relative to.
        file_names: [N] bytes.
        image_ids: [N] int64, the source's own.
        sizes: [N, 2] int32 (height, width) in pixels.
        starts: [N + 1] int64; image i has the objects `starts[i]:starts[i + 1]`.
        boxes: [M, 4] float64 (x, y, width, height) in pixels, as in COCO files.
        labels: [M] int64, rows of `class_names`.
        areas: [M] float64 square pixels.
        crowd: [M] bool.
        annotation_ids: [M] int64, the source's own.
        segmentations: of the objects.
        class_names: in the order of the category ids.
        category_ids: the source's own id of each class.
        repairs: what was mended while reading, and how often.
        encoded: the images, where they are no files; `file_names` are then what messages call them.
        decoding: how they become pixels.
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
    decoding: Decoding = DEFAULT

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, image: int) -> Path:
        """The image file."""
        return self.folder / decode_name(self.file_names[image])

    def image_name(self, image: int) -> str:
        """For messages: its file, or what stands for that."""
        name = decode_name(self.file_names[image])
        return str(self.folder / name) if self.encoded is None else f"{self.source}: {name}"

    def image_content(self, image: int) -> bytes:
        """The encoded image. Raises OSError."""
        return self.path(image).read_bytes() if self.encoded is None else self.encoded.content(image)

    def image_size(self, image: int) -> Size:
        """(height, width)."""
        height, width = self.sizes[image].tolist()
        return height, width

    def read_image(self, image: int, least: Size | None = None) -> np.ndarray:
        """Pixels [h, w, 3] uint8 RGB of one image, or of a smaller copy: see decode_image. Raises UnreadableImage."""
        name = self.image_name(image)
        try:
            content = self.image_content(image)
        except OSError as error:
            raise UnreadableImage(f"{name}: cannot be read ({error})") from error
        return decode_image(content, name, self.image_size(image), least, self.decoding)

    def corner_boxes(self) -> np.ndarray:
        """[M, 4] float64 (x1, y1, x2, y2), clipped to the images."""
        limits = np.repeat(self.sizes[:, [1, 0, 1, 0]], np.diff(self.starts), axis=0).astype(np.float64)
        corners = np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)
        return np.clip(corners, 0, limits)

    def usable(self) -> np.ndarray:
        """[M] bool, whether at least a pixel of each side is left of an object inside its image."""
        corners = self.corner_boxes()
        return ((corners[:, 2:] - corners[:, :2]) >= MIN_SIDE).all(axis=1)

    def targets_per_image(self) -> np.ndarray:
        """[N] int64, how many objects of each image are learnt: usable and no crowd."""
        target = np.concatenate([[0], np.cumsum(self.usable() & ~self.crowd)])
        return target[self.starts[1:]] - target[self.starts[:-1]]

    def objects(self, image: int, with_masks: bool) -> Objects:
        """The usable objects of one image, boxes clipped to it."""
        rows = slice(self.starts[image], self.starts[image + 1])
        height, width = self.sizes[image].tolist()
        boxes = self.boxes[rows]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        corners = np.minimum(np.maximum(corners, 0), (width, height, width, height))
        outlines = None
        if with_masks:
            outlines = [self.segmentations.of_object(row, (height, width)) for row in range(rows.start, rows.stop)]
        found = Objects(corners, self.labels[rows], self.areas[rows], self.crowd[rows], outlines)
        return found.keep(((corners[:, 2:] - corners[:, :2]) >= MIN_SIDE).all(axis=1))

    def without_mask(self) -> np.ndarray:
        """[M] bool, whether an object that is learnt has no outline."""
        return ~self.segmentations.present() & ~self.crowd & self.usable()

    def require_masks(self) -> None:
        """Raise InputError unless every object that is learnt has an outline."""
        missing = np.flatnonzero(self.without_mask())
        if len(missing):
            raise InputError(
                f"{self.source}: {len(missing)} annotation(s), first {self.annotation_ids[missing[0]]}, have no "
                "'segmentation', which a mask detector needs; use a box detector such as faster_rcnn_r50_fpn"
            )

    def without_empty_images(self) -> "AnnotationTable":
        """Only the images that have something to learn."""
        return self.select(np.flatnonzero(self.targets_per_image() > 0))

    def select(self, images: np.ndarray) -> "AnnotationTable":
        """Only some images: rows [n] int64, in that order."""
        objects = _ranges(self.starts, images)
        chosen: dict[str, Any] = {name: getattr(self, name)[images] for name in ("file_names", "image_ids", "sizes")}
        chosen |= self._objects_at(objects)
        chosen["starts"] = starts_of(np.diff(self.starts)[images])
        chosen["encoded"] = None if self.encoded is None else self.encoded.select(images)
        return replace(self, **chosen)

    def with_classes(self, names: tuple[str, ...], category_ids: tuple[int, ...]) -> "AnnotationTable":
        """In terms of other classes, by name; objects of classes that are not among them are left out."""
        rows = {name: row for row, name in enumerate(names)}
        new = np.array([rows.get(name, -1) for name in self.class_names])[self.labels]
        kept = np.flatnonzero(new >= 0)
        starts = starts_of(new >= 0)[self.starts]
        labels = {"labels": new[kept], "starts": starts, "class_names": names, "category_ids": category_ids}
        return replace(self, **self._objects_at(kept) | labels)

    def _objects_at(self, rows: np.ndarray) -> dict[str, Any]:
        """What the table says of some objects."""
        values = {name: getattr(self, name)[rows] for name in ("boxes", "labels", "areas", "crowd", "annotation_ids")}
        return {**values, "segmentations": self.segmentations.select(rows)}

    def describe(self) -> str:
        """Counts, and what was mended."""
        repairs = "".join(f"; {what}: {count}" for what, count in self.repairs.items())
        return (
            f"{len(self)} images ({int((self.targets_per_image() == 0).sum())} without objects), {len(self.boxes)} "
            f"objects ({int(self.crowd.sum())} crowd regions) from {self.source}{repairs}"
        )

    def coco(self, with_masks: bool = False) -> dict[str, Any]:
        """The annotations as a COCO dictionary, values as the source gave them, for the metrics."""
        images = np.repeat(np.arange(len(self)), np.diff(self.starts))
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
                height, width = (int(side) for side in self.sizes[images[row]])
                outline = self.segmentations.of_object(row, (height, width))
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


def encode_name(name: str) -> bytes:
    """A file name as the table holds it; whatever JSON can say survives."""
    return name.encode(errors="surrogatepass")


def decode_name(name: bytes) -> str:
    """The file name again."""
    return name.decode(errors="surrogatepass")


def starts_of(counts: np.ndarray) -> np.ndarray:
    """[n + 1] int64: where stretches of `counts` [n] things begin, one after another, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _ranges(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """All positions of the stretches `starts[row]:starts[row + 1]`, one after another."""
    begins = starts[rows]
    counts = starts[rows + 1] - begins
    behind = np.cumsum(counts)
    return np.repeat(begins - (behind - counts), counts) + np.arange(behind[-1] if len(behind) else 0)
