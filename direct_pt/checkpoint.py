"""What is saved and read back: a model folder (weights and what they mean), and the training state beside it.

A model folder holds `model.safetensors` and `config.json`; huggingface_hub uploads and downloads it as it is. Nothing
in it is pickled. The training state is accelerate's.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from direct_pt.errors import InputError
from direct_pt.models.detector import Detector, DetectorConfig, build_detector

WEIGHTS, CONFIG = "model.safetensors", "config.json"
History = list[dict[str, Any]]


@dataclass
class Progress:
    """How far a run has come; part of the training state."""

    step: int = 0
    best_ap: float = -1.0

    def state_dict(self) -> dict[str, Any]:
        """For accelerate."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For accelerate."""
        vars(self).update(state)


def save_model(folder: Path, detector: Detector, history: History) -> None:
    """Write a model folder. Each file is replaced as a whole: a reader never sees half a model.

    Args:
        folder: made if it is not there.
        detector: unwrapped.
        history: one dictionary a stage of training that led here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
    temporary = folder / f".{WEIGHTS}.partial"
    save_file(weights, temporary, metadata={"format": "pt"})
    replace_file(temporary, folder / WEIGHTS)
    write_json(folder / CONFIG, {"detector": detector.config.to_dict(), "history": history})


def from_pretrained(
    path_or_hub_id: str | Path, change: Callable[[DetectorConfig], DetectorConfig] | None = None
) -> Detector:
    """The detector of a run's folder, a model folder, or a model on the hub, in eval mode.

    Args:
        path_or_hub_id: a RUN means its model/.
        change: of the saved configuration, in what the weights' shapes do not depend on.

    Raises:
        InputError: there is none, or it is damaged.
    """
    folder = _model_folder(path_or_hub_id)
    config = _read_config(folder)[0]
    config = change(config) if change else config
    detector = build_detector(config.name, config=config)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read as weights ({error}); the file is damaged") from error
    expected = {name: tensor.shape for name, tensor in detector.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise InputError(
            f"{folder / WEIGHTS}: {len(wrong)} tensors do not fit the detector of its {CONFIG}, first {wrong[0]}: "
            f"expected {_shape(expected, wrong[0])}, found {_shape(found, wrong[0])}"
        )
    detector.load_state_dict(weights)
    return detector.eval()


def read_history(path: str | Path) -> History:
    """The stages of training behind a model folder. Raises InputError."""
    return _read_config(_model_folder(path))[1]


def save_training_state(folder: Path, accelerator: Accelerator, step: int, keep: int) -> Path:
    """Write `folder`/step-N whole: into a new folder that is renamed when done. Every process must call it.

    Args:
        folder: of the run's checkpoints.
        accelerator: whose state it is.
        step: N.
        keep: how many of the newest checkpoints stay.
    """
    final, partial, replaced = (folder / name.format(step) for name in ("step-{}", ".step-{}.partial", ".step-{}.old"))
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():  # the same step, saved a moment ago: out of the way, but not gone before the new one stands
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def load_training_state(folder: Path, accelerator: Accelerator) -> None:
    """Read back what `save_training_state` wrote. Raises InputError where the files are damaged."""
    try:
        accelerator.load_state(str(folder))
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        raise InputError(
            f"{folder}: cannot be read as a training state ({error}); remove it to go on from the one before it"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first, by step and not by file time."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as a whole."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    replace_file(temporary, path)


def replace_file(temporary: Path, final: Path) -> None:
    """Put `temporary` in `final`'s place, on disk before it is visible."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def _model_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a model: a RUN means its model/."""
    path = Path(path_or_hub_id)
    for folder in (path / "model", path):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    beside_others = path.parent != Path() and path.parent.is_dir()  # a misspelt run, no hub id
    if path.exists() or beside_others or str(path_or_hub_id).count("/") != 1:
        reason = f"holds no model ({WEIGHTS} and {CONFIG})" if path.exists() else "no such folder"
        raise InputError(f"{path_or_hub_id}: {reason}; give a run's folder, its model/, or a hub id such as user/name")
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=[WEIGHTS, CONFIG]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{path_or_hub_id}: no such folder, and the hub gives no such model ({error})") from error


def _read_config(folder: Path) -> tuple[DetectorConfig, History]:
    try:
        content = json.loads((folder / CONFIG).read_text())
        return DetectorConfig.from_dict(content["detector"]), content["history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG}: cannot be read as a detector's configuration ({error})") from error


def _shape(shapes: dict[str, Any], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "nothing"
