"""A model folder, as it is written: `model.safetensors` and `config.json`. `direct_pt.checkpoint` reads it back."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from direct_pt.errors import InputError
from direct_pt.files import DamagedFile, read_json, replacing, write_tensors
from direct_pt.models.config import DetectorConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"
History = list[dict[str, Any]]
Tensors = dict[str, Tensor]


def check_model_folder(folder: Path) -> None:
    """Raise InputError where a model written there would take the place of other files."""
    for path in (folder / WEIGHTS, folder / CONFIG):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: is no regular file; choose another folder")
    if not (folder / CONFIG).exists():
        if (folder / WEIGHTS).exists():
            raise InputError(f"{folder}: holds {WEIGHTS} of something else; choose another folder")
        return
    try:
        content = read_json(folder / CONFIG)
    except DamagedFile:
        content = None
    if not isinstance(content, dict) or not {"detector", "history"} <= set(content):
        what = "is a run's folder" if isinstance(content, dict) and "settings" in content else "holds another " + CONFIG
        raise InputError(f"{folder}: {what}; choose another folder for the model")


def model_facts(config: DetectorConfig, history: History) -> dict[str, Any]:
    """A model folder's config.json: what its weights mean."""
    return {"detector": config.to_dict(), "history": history}


def write_model(folder: Path, config: DetectorConfig, weights: Tensors, history: History) -> None:
    """Write a model folder. Each file is replaced as a whole, one right after the other.

    Args:
        folder: created if it does not exist.
        config: of the detector.
        weights: its state.
        history: one dictionary for each stage of training so far; "AP" in the last is that of these weights, and
            "thresholds" the scores above which their detections are shown: {"all": x, "per_class": {name: x or None}}.

    Raises:
        OSError: the folder cannot be written; its earlier content is unchanged.
        ValueError, TypeError: JSON cannot hold a value; the same.
    """
    text = json.dumps(model_facts(config, history), indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(text)
        write_tensors(folder / WEIGHTS, weights)
