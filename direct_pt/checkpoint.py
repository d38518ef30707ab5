"""What is saved and read back: a model folder (weights and what they mean), and the training state beside it.

A model folder holds `model.safetensors` and `config.json`; huggingface_hub uploads and downloads it as it is. The
training state is a folder of safetensors files too, the same whatever the run is spread over. Nothing is pickled.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from direct_pt.errors import InputError
from direct_pt.files import DamagedFile, read_tensors, sync, write_json, write_tensors
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.training.progress import Progress

WEIGHTS, CONFIG = "model.safetensors", "config.json"
OPTIMIZER, AVERAGE = "optimizer.safetensors", "average.safetensors"
History = list[dict[str, Any]]
Tensors = dict[str, Tensor]


@dataclass
class TrainingState:
    """All that a run needs to go on as if nothing had happened.

    Attributes:
        progress: how far it has come.
        weights: of the detector, by name.
        optimizer: its state, by "parameter name/entry".
        average: the weights' moving average, where the run has one.
        scaler: the loss scale's state, of fp16.
        of_processes: what each process has gathered since the last log.
        micro_batch_size: images at once on a device.
    """

    progress: Progress
    weights: Tensors
    optimizer: Tensors
    average: Tensors | None = None
    scaler: dict[str, Any] | None = None
    of_processes: list[dict[str, Any]] = field(default_factory=list)
    micro_batch_size: int = 0


def save_model(folder: Path, detector: Detector, history: History) -> None:
    """Write a model folder. Each file is replaced as a whole: a reader never sees half a model.

    Args:
        folder: made if it is not there.
        detector: unwrapped.
        history: one dictionary a stage of training that led here.

    Raises:
        OSError: it cannot be written; what stood there is as it was.
    """
    save_weights(folder, detector.config, detector.state_dict(), history)


def save_weights(folder: Path, config: DetectorConfig, weights: Tensors, history: History) -> None:
    """`save_model` of weights that are in no detector any more."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, weights)
    write_json(folder / CONFIG, {"detector": config.to_dict(), "history": history})


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
        weights, _ = read_tensors(folder / WEIGHTS)
    except DamagedFile as error:
        raise InputError(str(error)) from error
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


def save_training_state(folder: Path, state: TrainingState, keep: int) -> None:
    """Write `folder`/step-N whole: into a new folder that is renamed when all of it is on disk.

    Args:
        folder: of the run's checkpoints.
        state: of step N.
        keep: how many of the newest checkpoints stay; besides, the newest one from before the latest calm step, which
            a run that diverges resumes from.

    Raises:
        OSError: it cannot be written; the checkpoints before it are as they were.
    """
    step = state.progress.step
    final, partial, replaced = (folder / name.format(step) for name in ("step-{}", ".step-{}.partial", ".step-{}.old"))
    for left in folder.glob(".step-*"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(partial / WEIGHTS, state.weights)
        if state.average is not None:
            write_tensors(partial / AVERAGE, state.average)
        facts = {name: getattr(state, name) for name in ("scaler", "of_processes", "micro_batch_size")}
        write_tensors(partial / OPTIMIZER, state.optimizer, {"progress": asdict(state.progress), **facts})
        if final.exists():  # the same step, saved a moment ago: out of the way, but not gone before the new one stands
            final.rename(replaced)
        partial.rename(final)
        sync(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    known = checkpoints(folder)
    beyond = [path for path in known if _step(path) > step]  # damaged: the run went on from one before them
    whole = known[: len(known) - len(beyond)]
    calm = [path for path in whole if _step(path) < state.progress.calm_step][-1:]
    for old in (replaced, *beyond, *(path for path in whole[:-keep] if path not in calm)):
        shutil.rmtree(old, ignore_errors=True)


def load_training_state(folder: Path) -> TrainingState | None:
    """The newest state that is whole, or None where nothing was saved yet. Damaged ones are named on stderr.

    Raises:
        InputError: all of them are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return _read_training_state(path)
        except DamagedFile as error:
            print(f"warning: {error}; the checkpoint before it is used", file=sys.stderr, flush=True)
    if found:
        raise InputError(f"{folder}: none of its {len(found)} checkpoints is whole; remove the folder to begin anew")
    return None


def set_aside_checkpoints(folder: Path, calm_step: int) -> list[Path]:
    """Rename the checkpoints of a run that diverged to diverged-N, from its last calm step on: it does not resume from
    them. Returns them."""
    aside = []
    for path in checkpoints(folder):
        if _step(path) >= calm_step:
            aside.append(folder / f"diverged-{_step(path)}")
            shutil.rmtree(aside[-1], ignore_errors=True)
            path.rename(aside[-1])
    return aside


def _read_training_state(folder: Path) -> TrainingState:
    weights, _ = read_tensors(folder / WEIGHTS)
    optimizer, facts = read_tensors(folder / OPTIMIZER)
    average = read_tensors(folder / AVERAGE)[0] if (folder / AVERAGE).exists() else None
    try:
        progress = Progress(**facts.pop("progress"))
        return TrainingState(progress, weights, optimizer, average, **facts)
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / OPTIMIZER}: holds no training state ({error})") from error


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first, by step and not by file time."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


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
