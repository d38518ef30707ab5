"""Which detector predicts, and which of its detections are shown: flags that the programs share."""

from dataclasses import MISSING, dataclass

import numpy as np
import torch

from direct_pt.checkpoint import (
    CHECKPOINT_HELP,
    KINDS,
    PROVIDER_HELP,
    WEIGHTS_HELP,
    check_runtime,
    load_detector,
)
from direct_pt.distributed.launch import ComputeOptions
from direct_pt.errors import printable
from direct_pt.flags import batch_size, flag, path_or_name, share
from direct_pt.models.api import DetectorAPI

THRESHOLDS = ("model", "per-class")


def threshold(text: str) -> float | str:
    """The check of --score-threshold."""
    return text if text in THRESHOLDS else share(text)


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """The detector, and what it shows."""

    checkpoint: str = flag(MISSING, CHECKPOINT_HELP, path_or_name, metavar="RUN")
    weights: str = flag("best", WEIGHTS_HELP.removesuffix(" (best)"), choices=KINDS)
    score_threshold: float | str = flag(
        "model", "of what is shown and written: a number, the model's own, or its own of each class", threshold,
        metavar="X|model|per-class",
    )  # fmt: skip
    micro_batch_size: int = flag(
        4, "images of one shape, or tiles, at once", batch_size, metavar="N", alias="--batch-size"
    )
    provider: str | None = flag(None, PROVIDER_HELP, metavar="NAME")

    def check(self, compute: ComputeOptions) -> None:
        """Raise InputError where a flag would change nothing."""
        check_runtime(self.provider, compute.device, compute.mixed_precision, [self.checkpoint])

    def load(self, device: torch.device) -> tuple[DetectorAPI, np.ndarray]:
        """The detector, in eval mode, and [C] the score of each class above which detections are shown; both are said.

        Raises:
            InputError: see `load_detector`.
        """
        detector, _, description = load_detector(self.checkpoint, self.weights, self.provider)
        print(printable(f"weights: {description}"))
        thresholds = detector.thresholds(self.score_threshold)
        text = f"{detector.score_threshold:g}, the model's own"
        if self.score_threshold == "per-class":
            pairs = zip(detector.config.class_names, thresholds.tolist(), strict=True)
            text = ", ".join(f"{name} {score:g}" for name, score in pairs)
        elif self.score_threshold != "model":
            text = f"{self.score_threshold:g}"
        print(printable(f"score threshold: {text}"))
        return detector.to(device).eval(), thresholds
