"""The training state of a run, saved and read back: a model folder step-N with the optimizer's state for each.

The files do not depend on how many processes train, or on how DeepSpeed spreads the optimizer state over them. Nothing
is pickled.
"""

import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from direct_pt.checkpoint import AVERAGE, CONFIG, WEIGHTS, Tensors
from direct_pt.errors import InputError, printable
from direct_pt.files import DamagedFile, read_tensors, sync, write_json, write_tensors
from direct_pt.models.detector import Detector
from direct_pt.models.weights import layouts, misfits
from direct_pt.training.progress import Progress
from direct_pt.training.saved_values import check_state

OPTIMIZER = "optimizer.safetensors"
NAME = re.compile(r"step-([0-9]{1,18})")


@dataclass
class TrainingState:
    """All that a run needs to resume exactly.

    Attributes:
        progress: how far the run has come.
        weights: the detector's, by name.
        optimizer: the optimizer state, by "parameter name/entry".
        average: the weights' moving average, if the run keeps one.
        scaler: the state of fp16's loss scaler.
        of_processes: what each process has gathered since the last log line.
        micro_batch_size: images at once on a device.
        folder: that it was read from.
    """

    progress: Progress
    weights: Tensors
    optimizer: Tensors
    average: Tensors | None = None
    scaler: dict[str, Any] | None = None
    of_processes: list[dict[str, Any]] = field(default_factory=list)
    micro_batch_size: int = 0
    folder: Path = Path()

    def check_weights(self, detector: Detector) -> None:
        """Raise InputError unless the weights, and their moving average, are the detector's."""
        expected = layouts(detector.state_dict())
        for name, tensors in ((WEIGHTS, self.weights), (AVERAGE, self.average)):
            if tensors is not None:
                reason = misfits(layouts(tensors), expected, "the detector of this run")
                self._refuse(name, reason)

    def check_optimizer(self, trained: list[str], entries: tuple[str, ...]) -> None:
        """Raise InputError unless the optimizer state is of the parameters that train.

        Args:
            trained: their names.
            entries: the tensors of a parameter's shape that the optimizer keeps for each.
        """
        known = (*entries, "step") if "exp_avg" in entries else entries  # SGD does not count
        of_parameters = {name.rpartition("/")[0] for name in self.optimizer}
        expected = {
            f"{name}/{entry}": ([] if entry == "step" else list(self.weights[name].shape), "float32")
            for name in trained
            if name in of_parameters  # one that has had no gradient yet has no state
            for entry in known
        }
        self._refuse(OPTIMIZER, misfits(layouts(self.optimizer), expected, "the optimizer of this run"))

    def _refuse(self, name: str, reason: str) -> None:
        if reason:
            raise InputError(
                f"{self.folder / name}: {reason}; if {self.folder.name} is of another run, move it away, and the one "
                "before it is used"
            )


def save_training_state(folder: Path, state: TrainingState, keep: int, config: dict[str, Any] | None = None) -> None:
    """Write `folder`/step-N as a whole: a new folder gets its final name when all of it is on disk.

    Args:
        folder: of the run's checkpoints.
        state: the state after step N.
        keep: how many of the newest checkpoints stay. One more stays: the newest from before the latest calm step, for
            a run that diverges to resume from.
        config: of the model folder that step-N is to be, from `checkpoint.about`.

    Raises:
        OSError: the state cannot be written; earlier checkpoints are unchanged.
    """
    step = state.progress.step
    final, partial, replaced = (folder / name.format(step) for name in ("step-{}", ".step-{}.partial", ".step-{}.old"))
    for leftover in folder.glob(".step-*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(partial / WEIGHTS, state.weights)
        if config is not None:
            write_json(partial / CONFIG, config)
        if state.average is not None:
            write_tensors(partial / AVERAGE, state.average)
        facts = {name: getattr(state, name) for name in ("scaler", "of_processes", "micro_batch_size")}
        write_tensors(partial / OPTIMIZER, state.optimizer, {"progress": asdict(state.progress), **facts})
        if os.path.lexists(final):  # the same step was saved before: keep it until the new one is in place
            final.rename(replaced)
        partial.rename(final)
        sync(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    found = checkpoints(folder)
    later = [path for path in found if _step(path) > step]  # damaged: the run resumed from one before them
    valid = found[: len(found) - len(later)]
    calm = [path for path in valid if _step(path) < state.progress.calm_step][-1:]
    for old in (replaced, *later, *(path for path in valid[:-keep] if path not in calm)):
        shutil.rmtree(old, ignore_errors=True)


def load_training_state(folder: Path, with_average: bool = False) -> TrainingState | None:
    """The newest undamaged state, or None if nothing has been saved yet. Damaged ones are named on stderr.

    Args:
        folder: of the run's checkpoints.
        with_average: a state without a moving average is damaged.

    Raises:
        InputError: all checkpoints are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return _read_training_state(path, with_average)
        except DamagedFile as error:
            print(printable(f"warning: {error}; the checkpoint before it is used"), file=sys.stderr, flush=True)
    if found:
        raise InputError(f"{folder}: none of its {len(found)} checkpoints is whole; remove the folder to begin anew")
    return None


def _read_training_state(checkpoint: Path, with_average: bool) -> TrainingState:
    """The state in one checkpoint. Raises DamagedFile."""
    weights, _ = read_tensors(checkpoint / WEIGHTS, is_ours=True)
    optimizer, facts = read_tensors(checkpoint / OPTIMIZER, is_ours=True)
    average = None
    if with_average or (checkpoint / AVERAGE).exists():
        average, _ = read_tensors(checkpoint / AVERAGE, is_ours=True)
    try:
        check_state(facts, _step(checkpoint))
        progress = Progress(**facts.pop("progress"))
        return TrainingState(progress, weights, optimizer, average, **facts, folder=checkpoint)
    except ValueError as error:
        raise DamagedFile(f"{checkpoint / OPTIMIZER}: holds no training state: {error}") from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, by step and not by file time."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def set_aside_checkpoints(folder: Path, calm_step: int) -> list[Path]:
    """Rename a diverged run's checkpoints from `calm_step` on to diverged-N: it does not resume from them.

    Returns:
        The renamed folders.
    """
    renamed = []
    for path in checkpoints(folder):
        if _step(path) >= calm_step:
            renamed.append(folder / f"diverged-{_step(path)}")
            shutil.rmtree(renamed[-1], ignore_errors=True)
            path.rename(renamed[-1])
    return renamed


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])
