"""Model folders: a detector's weights and what they mean, written and read back.

A model folder holds `model.safetensors` and `config.json`; huggingface_hub uploads and downloads it as it is. Nothing
is pickled.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from direct_pt.errors import InputError, printable
from direct_pt.files import DamagedFile, read_json, read_layouts, read_tensors
from direct_pt.images.tiles import MAX_OVERLAP
from direct_pt.models.api import DetectorAPI
from direct_pt.models.config import DetectorConfig
from direct_pt.models.detector import Detector, build_detector
from direct_pt.models.model_folder import CONFIG, WEIGHTS, History, Tensors, write_model
from direct_pt.models.onnx_model import OnnxModel
from direct_pt.models.saved_config import config_from_json
from direct_pt.models.weights import bad_values, layouts, misfits, outline_of
from direct_pt.onnx_detector import PROVIDERS
from direct_pt.schema import anything, fail, list_of, mapping, number, optional, table, text, whole

AVERAGE = "average.safetensors"  # of a checkpoint: the weights' moving average
KINDS = ("best", "last")  # of a run's weights
PROVIDER_HELP = "of onnxruntime, for an exported detector, such as CUDAExecutionProvider (its CPU)"
CHECKPOINT_HELP = "a run, its model/ or best/, a hub id, or an exported file *.onnx"
WEIGHTS_HELP = "of a run: those of the highest AP on its validation split, or the last (best)"
CHECK_THRESHOLDS = table({"all": number(0, 1), "per_class": mapping(optional(number(0, 1)))})
CHECK_AP = number(-1, 1)
CHECK_STAGE = {
    "stage": text(), "steps": whole(), "AP": CHECK_AP, "AP50": CHECK_AP, "mask_AP": CHECK_AP,
    "thresholds": CHECK_THRESHOLDS, "tiles": table({"size": whole(1), "overlap": number(0, MAX_OVERLAP)}),
}  # fmt: skip
CHECK_HISTORY = list_of(table({}, CHECK_STAGE, is_open=True))


class Loaded(NamedTuple):
    """A detector to predict with, the folder or file of its model, and both in words."""

    detector: DetectorAPI
    place: Path
    description: str


def save_model(folder: Path, detector: Detector, history: History) -> None:
    """`write_model` of an unwrapped detector. Raises OSError; what was there is unchanged then."""
    save_weights(folder, detector.config, detector.state_dict(), history)


def save_weights(folder: Path, config: DetectorConfig, weights: Tensors, history: History) -> None:
    """`save_model` for weights without their detector."""
    write_model(folder, config, weights, history)


def from_pretrained(
    path_or_hub_id: str | Path,
    change: Callable[[DetectorConfig], DetectorConfig] | None = None,
    weights: str = "best",
    revision: str | None = None,
) -> Detector:
    """The detector of a run's folder, a model folder, or a model on the Hugging Face hub, in eval mode.

    Args:
        path_or_hub_id: each checkpoints/step-N of a run is a model folder, too.
        change: maps the saved configuration to the one to build; it must keep the shapes of the weights.
        weights: of a run, see `model_folder`.
        revision: of a model on the hub.

    Raises:
        InputError: there is no such model, or it is damaged.
    """
    folder = model_folder(path_or_hub_id, weights, revision)
    saved, history = _read_config(folder)
    config = change(saved) if change else saved
    try:
        expected = layouts(outline_of(config).state_dict())
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    path = folder / (AVERAGE if (folder / AVERAGE).exists() else WEIGHTS)  # of a checkpoint: what is evaluated
    try:  # before memory is taken for what a damaged configuration asks for
        if reason := misfits(read_layouts(path), expected, f"the detector of its {CONFIG}"):
            raise DamagedFile(f"{path}: {reason}")
        tensors, _ = read_tensors(path)
        if reason := bad_values(tensors):
            raise DamagedFile(f"{path}: {reason}; take the model again from where it was trained")
    except DamagedFile as error:
        raise InputError(str(error)) from error
    if _read_config(folder)[0] != saved:  # another model was written there meanwhile
        return from_pretrained(path_or_hub_id, change, weights, revision)
    detector = build_detector(config.name, config=config)
    detector.load_state_dict(tensors)
    detector.history = history
    if thresholds := next(iter(history[-1:]), {}).get("thresholds"):
        detector.score_threshold, per_class = thresholds["all"], thresholds["per_class"]
        own = (per_class.get(name) for name in config.class_names)
        detector.class_thresholds = tuple(thresholds["all"] if score is None else score for score in own)
    return detector.eval()


def load_detector(path_or_hub_id: str | Path, weights: str = "best", provider: str | None = None) -> Loaded:
    """A detector to predict with: as for `from_pretrained`, or an exported one, which onnxruntime computes.

    Args:
        path_or_hub_id: see `from_pretrained`; or a file *.onnx that `scripts/export.py` wrote.
        weights: see `from_pretrained`.
        provider: of onnxruntime, for exported ones; None for the CPU.

    Raises:
        InputError: there is no such model, it is damaged, or cannot be run here.
    """
    path = Path(path_or_hub_id)
    if is_exported(path):
        exported = OnnxModel(path, (provider,) if provider else PROVIDERS)
        return Loaded(exported, path, _described(path, exported.history))
    folder = model_folder(path_or_hub_id, weights)
    detector = from_pretrained(folder).to(memory_format=torch.channels_last)  # convolutions are faster, as in training
    return Loaded(detector, folder, describe_model(folder))


def is_exported(path: str | Path) -> bool:
    """Whether a path names an exported detector."""
    return Path(path).suffix.lower() == ".onnx"


def check_runtime(provider: str | None, device: str, mixed_precision: str, paths: Iterable[str | Path]) -> None:
    """Raise InputError where a flag would change nothing.

    Args:
        provider: of --provider, which exported detectors take.
        device: of --device, which the others take.
        mixed_precision: of --mixed-precision, the same.
        paths: of all detectors.
    """
    paths = list(paths)
    if provider is not None and not any(map(is_exported, paths)):
        raise InputError(
            f"--provider {provider}: is for exported detectors (a file *.onnx); leave it out, or see --device"
        )
    for flag, value, usual in (("--device", device, "cpu"), ("--mixed-precision", mixed_precision, "no")):
        if value not in ("auto", usual) and all(map(is_exported, paths)):
            remedy = "see --provider" if flag == "--device" else "its precision is that of its export"
            raise InputError(f"{flag} {value}: is not for exported detectors (a file *.onnx): leave it out; {remedy}")


def read_history(path: str | Path, weights: str = "best") -> History:
    """The stages of training that led to a model, "AP" in the last where it was measured. Raises InputError."""
    return _read_config(model_folder(path, weights))[1]


def model_folder(path_or_hub_id: str | Path, weights: str = "best", revision: str | None = None) -> Path:
    """The folder of a model, downloaded if it is on the hub.

    Args:
        path_or_hub_id: of a run, of a model, or on the hub.
        weights: of a run, "best" (of the highest AP on its validation split; the last ones where nothing was found yet)
            or "last".
        revision: a branch, tag or commit on the hub; None for its newest.

    Raises:
        InputError: there is no such model.
    """
    if weights not in KINDS:
        raise InputError(f"weights is {weights!r}: give one of {', '.join(KINDS)}")
    path = Path(path_or_hub_id)
    if path.exists() and revision is not None:
        raise InputError(f"{path}: is a folder here, which has no revision {revision!r}; leave it out")
    if weights == "best" and _is_model(path / "best") and _last_stage(path / "best").get("AP", 1) > 0:
        return path / "best"
    for folder in (path / "model", path):
        if _is_model(folder):
            return folder
    parent_exists = path.parent != Path() and path.parent.is_dir()  # then it is a misspelt run, not a hub id
    if path.exists() or parent_exists or str(path_or_hub_id).count("/") != 1:
        reason = f"holds no model ({WEIGHTS} and {CONFIG})" if path.exists() else "no such folder"
        raise InputError(f"{path_or_hub_id}: {reason}; give a run's folder, its model/, or a hub id such as user/name")
    print(printable(f"{path}: no such folder, asking the Hugging Face hub"), file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(str(path_or_hub_id), revision=revision, allow_patterns=[WEIGHTS, CONFIG]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{' '.join(str(error).split()):.300}"
        raise InputError(f"{path_or_hub_id}: no such folder, and the hub gives no such model ({reason})") from error


def describe_model(folder: Path) -> str:
    """A model folder in words, with the step that it is of and its AP, where they are known."""
    return _described(folder, _read_config(folder)[1])


def _described(place: Path, history: History) -> str:
    stage = next(iter(history[-1:]), {})
    step = [f"step {stage['steps']}"] if "steps" in stage else []
    ap = [f"AP {stage['AP']:.3f} on its validation split"] if "AP" in stage else []
    return f"{place} ({', '.join(step + ap)})" if step + ap else str(place)


def _is_model(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def _last_stage(folder: Path) -> dict[str, Any]:
    """The last stage of training of a model; empty where there was none. Raises InputError."""
    return next(iter(_read_config(folder)[1][-1:]), {})


def _read_config(folder: Path) -> tuple[DetectorConfig, History]:
    """The detector's configuration and its history. Raises InputError."""
    try:
        content = read_json(folder / CONFIG)
        table({"detector": anything, "history": CHECK_HISTORY})(content, "its content")
        try:
            json.dumps(content["history"], allow_nan=False)  # as a run that goes on from this model writes it
        except ValueError:
            fail("history", "NaN or Infinity", "of finite numbers")
        return config_from_json(content["detector"]), content["history"]
    except (DamagedFile, ValueError) as error:
        reason = str(error).removeprefix(f"{folder / CONFIG}: ")
        raise InputError(
            f"{folder / CONFIG}: cannot be read as a detector's configuration ({reason}); take the model again from "
            "where it was trained"
        ) from error
