"""--score-threshold of the programs that predict."""

from direct_pt.flags import share
from direct_pt.models.api import DetectorAPI

THRESHOLDS = ("model", "per-class")
THRESHOLD_HELP = "of what is drawn and written: a number, the model's own, or its own of each class (model)"


def threshold(text: str) -> float | str:
    """The value of the flag."""
    return text if text in THRESHOLDS else share(text)


def describe_threshold(detector: DetectorAPI, threshold: float | str) -> str:
    """In words."""
    if threshold == "per-class":
        pairs = zip(detector.config.class_names, detector.class_thresholds, strict=True)
        return ", ".join(f"{name} {score:g}" for name, score in pairs)
    return f"{detector.score_threshold:g}, the model's own" if threshold == "model" else f"{threshold:g}"
