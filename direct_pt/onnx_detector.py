"""Detect objects with an exported detector, without PyTorch: onnxruntime, numpy, OpenCV. This file may be copied alone.

  from direct_pt.onnx_detector import OnnxDetector    # or, of a copy: from onnx_detector import OnnxDetector
  detector = OnnxDetector("model.onnx")
  result = detector.predict("photo.jpg")[0]           # boxes, scores, labels, and of mask detectors masks

  python onnx_detector.py model.onnx photo.jpg ...    prints a line of JSON for each image, without masks

`scripts/export.py` writes the model. Its inputs are "images" [batch, height, width, 3] uint8 RGB, and "sizes"
[batch, 2] int64, the (height, width) of each image, beyond which it is zero. Its outputs are, for each detection,
"image", the place in the batch, "boxes" (x1, y1, x2, y2) in that image's pixels, "scores", "labels", and of mask
detectors "masks". Normalisation and NMS are inside. Resizing is done here, by OpenCV as in training.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

METADATA = "direct_pt"  # the name of what the file says about itself
FORMAT = 1  # of that
CONTENT = {
    "detector": ("class_names", "category_ids", "short_side", "long_side"),
    "thresholds": ("all", "per_class"),
    "history": (),
}
MASK_THRESHOLD = 0.5
MAX_BATCH = 10**6
PROVIDERS = ("CPUExecutionProvider",)
AnyImage = str | os.PathLike[str] | np.ndarray


@dataclass
class Found:
    """The detections in one image, best first.

    Attributes:
        boxes: [D, 4] float32 (x1, y1, x2, y2) in the image's pixels.
        scores: [D] float32.
        labels: [D] int64 indices of the classes.
        masks: [D, m, m] float32 probabilities inside each box; None from box detectors.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None

    def keep(self, rows: np.ndarray) -> "Found":
        """Some rows: a bool mask, or indices."""
        masks = None if self.masks is None else self.masks[rows]
        return Found(self.boxes[rows], self.scores[rows], self.labels[rows], masks)

    def above(self, thresholds: np.ndarray) -> "Found":
        """The detections that score above `thresholds` [C] float64, those of their classes."""
        return self.keep(self.scores.astype(np.float64) > thresholds[self.labels])


@dataclass
class FoundInBatch:
    """The detections in a batch, by image: `image` [D] int64, the place of each in the batch."""

    image: np.ndarray
    found: Found


class OnnxDetector:
    """An exported detector.

    Args:
        path: of the file that `scripts/export.py` wrote.
        providers: of onnxruntime, the preferred one first, such as "CUDAExecutionProvider" (package onnxruntime-gpu).
        threads: of the processor; None for onnxruntime's choice.

    Attributes:
        facts: what the file says about itself: the detector's configuration, its thresholds and its training.
        class_names: of the labels, in their order.
        category_ids: of the labels, the data set's own.
        has_masks: whether it predicts masks.
        short_side: images are resized to fit into (long_side, short_side), in pixels.
        long_side: see above.
        score_threshold: above it, detections are shown.
        class_thresholds: [C] the same for each class.

    Raises:
        ValueError: the file is no export of this project, or this onnxruntime cannot run it.
    """

    def __init__(
        self, path: str | os.PathLike[str], providers: Sequence[str] = PROVIDERS, threads: int | None = None
    ) -> None:
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise ValueError(f"{path}: needs onnxruntime: pip install onnxruntime") from error
        available = onnxruntime.get_available_providers()
        if missing := [provider for provider in providers if provider not in available]:
            remedy = "onnxruntime-gpu has CUDAExecutionProvider"
            raise ValueError(f"provider {missing[0]}: this onnxruntime has {', '.join(available)}; {remedy}")
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give a model.onnx that scripts/export.py wrote")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors: what else it says does not concern the user
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime's exceptions have no common class
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: onnxruntime {onnxruntime.__version__} cannot run it ({reason:.300})") from error
        self.facts = read_facts(path, self.session.get_modelmeta().custom_metadata_map)
        config = self.facts["detector"]
        self.class_names: list[str] = config["class_names"]
        self.category_ids: list[int] = config["category_ids"]
        self.short_side: int = config["short_side"]
        self.long_side: int = config["long_side"]
        self.score_threshold: float = self.facts["thresholds"]["all"]
        self.class_thresholds: list[float] = self.facts["thresholds"]["per_class"]
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.has_masks = "masks" in self.outputs

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.class_names))

    def predict(
        self, images: AnyImage | Iterable[AnyImage], score_threshold: float | str = "model", batch_size: int = 1
    ) -> list[dict[str, Any]]:
        """Detections in whole images.

        Args:
            images: one or several, of any sizes: paths, or RGB arrays [h, w, 3] uint8.
            score_threshold: of what is returned: a number, the model's own ("model"), or its own of each class
                ("per-class").
            batch_size: images at once, of which those of one shape, once resized, are computed together.

        Returns:
            For each image, also a single one, a dictionary: "boxes" [n, 4] in its pixels, "scores" [n], "labels" (class
            names), "class_ids" (their indices) and "category_ids" (the data set's own), best first, and of mask
            detectors "masks" [n, h, w] bool.

        Raises:
            ValueError: an image cannot be read, or a threshold or `batch_size` is none.
        """
        if self.facts["history"] and (tiles := self.facts["history"][-1].get("tiles")):
            text = f"the detector was trained on tiles of {tiles['size']} pixels, and looks at whole images here: "
            warnings.warn(f"{text}cut large ones, or use scripts/predict.py, which does", stacklevel=2)
        count, results, waiting = batch_count(batch_size), [], pixels_of(images)
        thresholds = chosen_thresholds(score_threshold, self.score_threshold, self.class_thresholds)
        while arrays := list(islice(waiting, count)):
            for image, found in zip(arrays, self.detect(arrays), strict=True):
                shown = found.above(thresholds)
                results.append(as_result(shown, image.shape[:2], self.class_names, self.category_ids))
        return results

    def detect(self, images: Sequence[np.ndarray]) -> list[Found]:
        """All detections in RGB arrays [h, w, 3] uint8, with scores down to those that the detector was built for."""
        resized = [resize(image, self.short_side, self.long_side) for image in images]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for place, pixels in enumerate(resized):  # padding changes what is found: batches are of one shape
            shapes.setdefault(pixels.shape, []).append(place)
        results: dict[int, Found] = {}
        for (height, width, _), places in shapes.items():
            batch = np.stack([resized[place] for place in places])
            everything = self.run(batch, np.tile([height, width], (len(batch), 1)))
            for position, place in enumerate(places):
                original_height, original_width = images[place].shape[:2]
                scale = np.array([original_width / width, original_height / height] * 2, np.float32)
                found = everything.found.keep(everything.image == position)
                found.boxes = found.boxes * scale
                results[place] = found
        return [results[place] for place in range(len(images))]

    def run(self, images: np.ndarray, sizes: np.ndarray) -> "FoundInBatch":
        """The detections in a batch [B, H, W, 3] uint8 RGB, zero beyond the `sizes` [B, 2] (h, w) of its images."""
        values = self.session.run(None, {"images": images, "sizes": sizes.astype(np.int64)})
        outputs = dict(zip(self.outputs, values, strict=True))
        found = Found(outputs["boxes"], outputs["scores"], outputs["labels"], outputs.get("masks"))
        return FoundInBatch(outputs["image"], found)


def as_result(
    found: Found, size: tuple[int, int], class_names: Sequence[str], category_ids: Sequence[int]
) -> dict[str, Any]:
    """What `predict` returns for an image of `size` (height, width)."""
    labels = found.labels.tolist()
    result: dict[str, Any] = {"boxes": found.boxes, "scores": found.scores}
    result["labels"] = [class_names[label] for label in labels]
    result["class_ids"] = labels
    result["category_ids"] = [category_ids[label] for label in labels]
    if found.masks is not None:
        result["masks"] = paste_masks(found.masks, found.boxes, size)
    return result


def batch_count(value: Any) -> int:
    """The argument `batch_size`. Raises ValueError where it is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 1 <= value <= MAX_BATCH:
        raise ValueError(f"batch_size is {value!r:.40}: give a whole number above 0")
    return int(value)


def is_threshold(score: Any) -> bool:
    """Whether it is a number from 0 to below 1."""
    try:
        return not isinstance(score, bool | str) and 0 <= float(score) < 1
    except (TypeError, ValueError, OverflowError):
        return False


def chosen_thresholds(threshold: float | str, own: float, own_by_class: Sequence[float]) -> np.ndarray:
    """[C] float64, the score of each class above which detections are shown.

    Args:
        threshold: a number for all; or the detector's own: "model", or "per-class" for each class's.
        own: the detector's.
        own_by_class: [C] its own of each class.

    Raises:
        ValueError: it is none.
    """
    if isinstance(threshold, str) and threshold == "per-class":
        return np.array(own_by_class, np.float64)
    score = own if isinstance(threshold, str) and threshold == "model" else threshold
    if not is_threshold(score):
        raise ValueError(f"score_threshold is {threshold!r}: give a number from 0 to below 1, 'model' or 'per-class'")
    return np.full(len(own_by_class), float(score))


def read_facts(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Any]:
    """What an exported file says about itself. Raises ValueError where it is none of ours."""
    try:
        facts = json.loads(metadata[METADATA])
        if facts["format"] <= FORMAT:
            for part, names in CONTENT.items():
                for name in names:
                    facts[part][name]  # raises KeyError
            return facts
        reason = f"was exported by Direct-PT {facts['version']}, and this one is older: pip install -U direct-pt"
    except (KeyError, TypeError, json.JSONDecodeError):
        reason = "is no detector that scripts/export.py wrote: export a run with it"
    raise ValueError(f"{path}: {reason}")


def pixels_of(images: AnyImage | Iterable[AnyImage]) -> Iterator[np.ndarray]:
    """Each image as [h, w, 3] uint8 RGB. Raises ValueError."""
    is_one = isinstance(images, str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim == 3)
    listed: Any = [images] if is_one else images
    for place, image in enumerate(listed):
        if isinstance(image, str | os.PathLike):
            yield read_rgb(image)
        elif not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f"{image.dtype} array {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"images[{place}]: is a {what}; give a path, or an RGB array [h, w, 3] of uint8")
        elif not image.size:
            raise ValueError(f"images[{place}]: has no pixels; leave it out")
        else:
            yield image


def read_rgb(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file as [h, w, 3] uint8 RGB, turned upright; transparent pixels are blended with black.

    Raises:
        ValueError: it cannot be read, or not without a choice: of values that are no 8 or 16 bits.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        colors = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    except cv2.error as error:  # too many pixels
        raise ValueError(f"{path}: OpenCV cannot read it ({error.err})") from error
    if colors is None:
        raise ValueError(f"{path}: is no image that OpenCV reads; convert it to JPEG or PNG, or give an RGB array")
    rgb = cv2.cvtColor(colors, cv2.COLOR_BGR2RGB)
    if content[:2].tobytes() == b"\xff\xd8":  # a JPEG has neither transparency nor more bits
        return rgb
    stored: Any = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if stored.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: has values of {stored.dtype}; give an RGB array [h, w, 3] of uint8")
    if (
        stored.ndim == 3
        and stored.shape[2] == 4
        and (opacity := stored[..., 3:] / np.iinfo(stored.dtype).max).min() < 1
    ):
        if stored.dtype != np.uint8 or stored.shape[:2] != rgb.shape[:2] or (stored[..., :3] != colors).any():
            raise ValueError(f"{path}: is transparent, and has 16 bits or an EXIF orientation; give an RGB array")
        rgb = (rgb * opacity + 0.5).astype(np.uint8)
    return rgb


def resize(image: np.ndarray, short_side: int, long_side: int) -> np.ndarray:
    """The image [h, w, 3] at the largest size of its aspect ratio within (long_side, short_side).

    Bilinear, as in training; area means where bilinear would skip pixels.
    """
    height, width = image.shape[:2]
    scale = min(long_side / max(height, width), short_side / min(height, width))
    new_height, new_width = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    halved = height >= 2 * new_height and width >= 2 * new_width
    return cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_AREA if halved else cv2.INTER_LINEAR)


def paste_windows(
    probabilities: np.ndarray, boxes: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Masks in their images: at every pixel's centre, bilinear between the cells' centres.

    Args:
        probabilities: [D, m, m].
        boxes: [D, 4] in the images' pixels.
        sizes: [D, 2] (height, width) of the images.

    Yields:
        (top, left) of the pixels that a box touches, and [h, w] float32 probabilities there; elsewhere they are under
        one half.
    """
    limits, cells = sizes[:, [1, 0]], probabilities.shape[-1]
    first = np.clip(np.floor(boxes[:, :2]), 0, limits).astype(np.int64)
    last = np.clip(np.ceil(boxes[:, 2:]), first, np.maximum(first, limits)).astype(np.int64)
    x1, y1, x2, y2 = boxes.astype(np.float64).T
    column_weights = _interpolation(first[:, 0], last[:, 0], x1, x2, cells)
    row_weights = _interpolation(first[:, 1], last[:, 1], y1, y2, cells)
    for (left, top), mask, across, down in zip(
        first.tolist(), probabilities.astype(np.float32, copy=False), column_weights, row_weights, strict=True
    ):
        yield (top, left), (across @ (down @ mask).T).T  # columns are contiguous, as run lengths need them


def paste_masks(probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[D, height, width] bool: the masks [D, m, m] of `boxes` [D, 4] in a whole image of `size`."""
    masks = np.zeros((len(boxes), *size), bool)
    windows = paste_windows(probabilities, boxes, np.tile(size, (len(boxes), 1)))
    for mask, ((top, left), inside) in zip(masks, windows, strict=True):
        mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside >= MASK_THRESHOLD
    return masks


def _interpolation(
    first: np.ndarray, last: np.ndarray, low: np.ndarray, high: np.ndarray, cells: int
) -> list[np.ndarray]:
    """Along one axis, the weights [last - first, cells] of each of D boxes' cells at its pixels.

    Args:
        first: [D] the first pixel.
        last: [D] the pixel after the last.
        low: [D] where the box begins, in pixels.
        high: [D] where it ends.
        cells: that it is divided into.
    """
    counts = last - first
    ends = np.cumsum(counts)  # the pixels of all boxes lie in one array, one box after another
    box = np.repeat(np.arange(len(first)), counts)
    pixels = np.arange(len(box)) - (ends - counts - first)[box]
    places = (pixels + 0.5 - low[box]) / np.maximum(high - low, 1e-6)[box] * cells - 0.5  # 0 is the first cell's centre
    below = np.floor(places)
    # A pixel lies between two cells. Two more on each side take the weights of pixels beyond the box, then are dropped.
    column = np.clip(below, -2, cells).astype(np.int64) + 2
    weights = np.zeros((len(box), cells + 4), np.float32)
    weights[np.arange(len(box)), column] = 1 - (places - below)
    weights[np.arange(len(box)), column + 1] = 1 - (below + 1 - places)
    return [weights[end - count : end, 2:-2] for count, end in zip(counts.tolist(), ends.tolist(), strict=True)]


def main(arguments: list[str]) -> int:
    """Print the detections in image files, a line of JSON for each, without masks."""
    if len(arguments) < 2:
        print("usage: python onnx_detector.py MODEL.onnx IMAGE ...  (lines of JSON, without masks)", file=sys.stderr)
        return 2
    try:
        detector = OnnxDetector(arguments[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = 0
    for path in arguments[1:]:
        try:
            result = detector.predict(path)[0]
        except ValueError as error:  # the others may be read
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        boxes, scores = result["boxes"].astype(float).round(2), result["scores"].astype(float).round(4)
        names = {"labels": result["labels"], "category_ids": np.asarray(result["category_ids"]).tolist()}
        print(json.dumps({"file": path, "boxes": boxes.tolist(), "scores": scores.tolist(), **names}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
