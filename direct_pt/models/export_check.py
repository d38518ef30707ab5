"""Whether an exported file finds what its detector finds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from direct_pt.batch import Objects, collate
from direct_pt.errors import InputError
from direct_pt.models.boxes import overlaps
from direct_pt.models.detector import Detector, RetinaNet, TwoStage
from direct_pt.onnx_detector import Found, OnnxDetector
from direct_pt.transforms import TestPreset

WORDS = {
    "boxes": "boxes differ by",
    "scores": "scores differ by",
    "masks": "masks differ by",
    "missing": "the share without a counterpart is",
}
SAME_IOU = 0.9  # of the boxes of one detection
LOW_SCORES = 0.01  # above the lowest score that is a detection: closer to it, rounding decides


@dataclass(frozen=True)
class Differences:
    """Between an export's detections and its detector's.

    Attributes:
        boxes: in shares of the box's longer side.
        scores: of one detection.
        masks: of one probability.
        missing: the share of detections that only one of the two has.
    """

    boxes: float
    scores: float
    masks: float
    missing: float


# A score that is equal to another's, or an IoU at a threshold, may fall to either side by the last bit.
BOUNDS = {"fp32": Differences(0.005, 0.001, 0.01, 0.02), "fp16": Differences(0.05, 0.05, 0.2, 0.1)}


def check_export(detector: Detector, path: Path, kind: str, precision: str, images: list[np.ndarray]) -> str:
    """Compare an exported file with its detector, image by image; the largest differences in words.

    Args:
        detector: that the file was made from, in eval mode.
        path: of the file.
        kind: "onnx" or "torch-export".
        precision: one of BOUNDS.
        images: [h, w, 3] uint8 RGB.

    Raises:
        InputError: the differences are too large, or it does not run at all.
    """
    detect = OnnxDetector(path).detect if kind == "onnx" else program_detections(path, detector)
    bounds, pairs = BOUNDS[precision], []
    for image in images:
        with torch.inference_mode():
            pairs.append((detector.find([image])[0], detect([image])[0]))
    measured = compare(pairs, lowest_score(detector) + LOW_SCORES)
    wrong = [
        f"{WORDS[name]} {value:.3g} (at most {most:.3g})"
        for name, value, most in zip(vars(bounds), vars(measured).values(), vars(bounds).values(), strict=True)
        if not value <= most
    ]
    count = sum(len(ours.scores) for ours, _ in pairs)
    if wrong:
        raise InputError(
            f"the exported detector does not find what the detector finds: of {count} detections in {len(images)} "
            f"images, {', '.join(wrong)}; nothing was written. Please report it, with the detector's config.json"
        )
    if not count:
        return (
            f"nothing was found in {len(images)} images, so nothing could be compared: name images with objects of its "
            "classes with --images"
        )
    masks = f", masks by {measured.masks:.2g}" if detector.has_masks else ""
    return (
        f"compared on {len(images)} images, {count} detections: boxes differ by up to {100 * measured.boxes:.2g} % of "
        f"their side, scores by {measured.scores:.2g}{masks}; {100 * measured.missing:.2g} % have no counterpart"
    )


def lowest_score(detector: Detector) -> float:
    """What detections score at least."""
    if isinstance(detector, RetinaNet):
        return detector.head.score_threshold
    assert isinstance(detector, TwoStage)
    return detector.roi_head.score_threshold


def program_detections(path: Path, detector: Detector) -> Callable[[list[np.ndarray]], list[Found]]:
    """What detects with a file of `write_program`."""
    with path.open("rb") as file:  # whose name may end in something else still
        program = torch.export.load(file).module()
    preset = TestPreset(detector.config.short_side, detector.config.long_side)

    def detect(images: list[np.ndarray]) -> list[Found]:
        found = []
        for image in images:
            batch = collate([preset(image, Objects.none(), np.random.default_rng(0))])
            try:
                with torch.inference_mode():
                    _, boxes, *others = program(batch.images.permute(0, 2, 3, 1).contiguous(), batch.sizes)
            except Exception as error:  # the program's own guards
                height, width = batch.images.shape[-2:]
                reason = " ".join(str(error).split())
                raise InputError(
                    f"--format torch-export: such a file takes no image of {width}x{height} pixels, as the detector "
                    f"gets it ({reason:.200}); it may be too small: use --format onnx"
                ) from error
            scale = batch.scales.repeat(1, 2)
            found.append(Found((boxes / scale).numpy(), *(values.numpy() for values in others)))
        return found

    return detect


def compare(pairs: list[tuple[Found, Found]], lowest: float) -> Differences:
    """The largest differences over all images, of detections that score at least `lowest`."""
    boxes = scores = masks = 0.0
    count = missing = 0
    for ours, theirs in pairs:
        partner = partners(ours, theirs)
        back = partners(theirs, ours)
        for one, other in ((ours, partner), (theirs, back)):
            clear = one.scores >= lowest
            count += int(clear.sum())
            missing += int((clear & (other < 0)).sum())
        rows = np.flatnonzero((ours.scores >= lowest) & (partner >= 0))
        others = partner[rows]
        if len(rows):
            sides = (ours.boxes[rows, 2:] - ours.boxes[rows, :2]).max(axis=1)
            boxes = max(boxes, float((np.abs(ours.boxes[rows] - theirs.boxes[others]).max(axis=1) / sides).max()))
            scores = max(scores, float(np.abs(ours.scores[rows] - theirs.scores[others]).max()))
        if len(rows) and ours.masks is not None and theirs.masks is not None:
            masks = max(masks, float(np.abs(ours.masks[rows] - theirs.masks[others]).max()))
    return Differences(boxes, scores, masks, missing / max(1, count))


def partners(ours: Found, theirs: Found) -> np.ndarray:
    """[D] of each of our detections theirs that is the same, -1 if there is none."""
    if not len(ours.boxes) or not len(theirs.boxes):
        return np.full(len(ours.boxes), -1)
    ious, _ = overlaps(torch.from_numpy(ours.boxes)[None], torch.from_numpy(theirs.boxes)[None])
    same = ious[0].numpy() * (ours.labels[:, None] == theirs.labels[None])
    best = same.argmax(axis=1)
    return np.where(same[np.arange(len(best)), best] >= SAME_IOU, best, -1)
