"""Results of `predict` for the package supervision: its annotators, trackers, zones and counters."""

from typing import Any

import numpy as np


def as_supervision(result: dict[str, Any]) -> Any:
    """One image's result as `supervision.Detections`, of this project's detectors or of an exported one.

    Args:
        result: an item of what `predict` returns.

    Returns:
        Boxes as xyxy, scores as confidence, class_ids as class_id, masks, and labels as data["class_name"].

    Raises:
        ModuleNotFoundError: supervision is not installed.
        TypeError: `result` is no item, such as the whole list.
    """
    if not isinstance(result, dict):
        raise TypeError("as_supervision takes the result of one image, such as predict(image)[0]")
    try:
        import supervision
    except ModuleNotFoundError as error:
        remedy = "pip install supervision"
        raise ModuleNotFoundError(
            f"as_supervision needs the package {error.name}: {remedy}", name=error.name
        ) from error
    return supervision.Detections(
        xyxy=np.asarray(result["boxes"], np.float32).reshape(-1, 4),
        confidence=np.asarray(result["scores"], np.float32),
        class_id=np.asarray(result["class_ids"], np.int64),
        mask=result.get("masks"),
        data={"class_name": np.array(result["labels"], dtype=str)},
    )
