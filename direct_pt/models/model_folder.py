"""A model folder, as it is written: `model.safetensors` and `config.json`. `direct_pt.checkpoint` reads it back."""

from pathlib import Path
from typing import Any

from torch import Tensor

from direct_pt.files import write_json, write_tensors

WEIGHTS, CONFIG = "model.safetensors", "config.json"
History = list[dict[str, Any]]
Tensors = dict[str, Tensor]


def write_model(folder: Path, config: dict[str, Any], weights: Tensors, history: History) -> None:
    """Write a model folder. Each file is replaced as a whole: a reader never sees half a model.

    Args:
        folder: created if it does not exist.
        config: `DetectorConfig.to_dict` of the detector.
        weights: its state.
        history: one dictionary for each stage of training so far; "AP" in the last is that of these weights, and
            "thresholds" the scores above which their detections are shown: {"all": x, "per_class": {name: x or None}}.

    Raises:
        OSError: the folder cannot be written; its earlier content is unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, {"detector": config, "history": history})
