"""A run's folder, written by the main process while training runs, also where the disk is full for a while."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from direct_pt.batch import Batch
from direct_pt.checkpoint import CONFIG, History, read_history, save_model, save_weights
from direct_pt.errors import InputError, TrainingStopped, printable
from direct_pt.files import replacing, write_json, write_text, writing
from direct_pt.models.detector import Detector
from direct_pt.models.model_folder import model_facts
from direct_pt.reports.evaluation import Judged
from direct_pt.reports.plots import plot_curves
from direct_pt.reports.run_page import RunPage
from direct_pt.training.checkpoints import (
    TrainingState,
    checkpoints,
    load_training_state,
    save_training_state,
    set_aside_checkpoints,
)
from direct_pt.training.saved_values import read_records, warn_of_lines

DRAWING_SHARE = 0.05  # of the time, at most


class RunFolder:
    """The files of a run's folder. Every process has one of these; only the main process's reads and writes.

    Training continues where something cannot be written: it is tried again at the next save, and the last save must
    succeed (`must_be_saved`).

    Attributes:
        records: the lines of metrics.jsonl.
        page: of the run, if it is shown.
        aps: of all evaluations, known to every process.
        evaluated_step: the last step that was evaluated, known to every process.
    """

    def __init__(self, path: Path, accelerator: Accelerator, last_step: int, keep: int) -> None:
        """Read the records up to `last_step`, which the run resumes from; `keep` checkpoints stay. Collective."""
        self.path = path
        self.keep = keep
        self.is_main = accelerator.is_main_process
        self.records: list[dict[str, Any]] = self._read_records(last_step) if self.is_main else []
        evaluations = [record for record in self.records if "bbox" in record]
        self.best_ap = max((record["bbox"]["AP"] for record in evaluations), default=-1.0)
        if self.is_main and not self._step_of_best():
            self.best_ap = -1.0  # it was set aside
        known: list[Any] = [
            max((record["step"] for record in evaluations), default=0),
            [r["bbox"]["AP"] for r in evaluations],
        ]
        broadcast_object_list(known)
        self.evaluated_step, self.aps = known
        self.page: RunPage | None = None
        self._error = ""
        self._unsaved_best: Callable[[], None] | None = None
        self._drawn, self._draw_from = 0, 0.0  # records, and when to draw again

    def add(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self.records.append(record)

        def append() -> None:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(_lines([record]))

        self._try(append)  # the next save writes all lines anew

    def add_evaluation(
        self, record: dict[str, Any], detector: Detector, history: History, judged: Judged | None
    ) -> None:
        """Write the metrics of a step, also to the model saved of it, and the detector where it is the best."""
        thresholds = judged and judged.best_thresholds()  # only the main process's is not None
        figures = {"AP": record["bbox"]["AP"], "AP50": record["bbox"]["AP50"]}
        if "segm" in record:
            figures["mask_AP"] = record["segm"]["AP"]
        stage = {**history[-1], **figures} | ({"thresholds": thresholds} if thresholds else {})
        measured = [*history[:-1], stage]
        if self.is_main and record["bbox"]["AP"] > self.best_ap:
            self.best_ap = record["bbox"]["AP"]
            # A copy: it may be written only after training has changed the weights.
            weights = {name: value.detach().to("cpu", copy=True) for name, value in detector.state_dict().items()}
            self._unsaved_best = lambda: save_weights(self.path / "best", detector.config, weights, measured)
            self._try(self._write_best)
        self._try(lambda: self._write_ap(detector, history, measured))
        if judged is not None and (page := self.page) is not None:
            self._try(lambda: page.add_evaluation(record["step"], judged))
        self.add(record)  # from now on the evaluation is not repeated
        self.evaluated_step = record["step"]
        self.aps.append(record["bbox"]["AP"])
        self._try(self._draw)

    def save(self, state: TrainingState, result: Detector, history: History) -> None:
        """Write a checkpoint, and the model that the run would end with now."""

        def write() -> None:
            # Before the state that the run resumes from: what a full disk kept from being written until now.
            self._write_best()
            write_text(self.path / "metrics.jsonl", _lines(self.records))
            save_model(self.path / "model", result, history)  # a run killed after this writes it again
            save_training_state(self.path / "checkpoints", state, self.keep, model_facts(result.config, history))
            self._error = ""
            self._draw()

        self._try(write)

    def set_aside_diverged(self, calm_step: int, result: Detector, history: History) -> str:
        """Rename what a run that diverged has saved since its last calm step; model/ gets the weights from before it.

        For the main process. Returns what --resume will do, in words.
        """
        folder, best, model = self.path / "checkpoints", self.path / "best", self.path / "model"
        self._unsaved_best = None
        try:
            aside = set_aside_checkpoints(folder, calm_step)
            if self._step_of_best() >= calm_step:
                aside.append(folder / "diverged-best")
                shutil.rmtree(aside[-1], ignore_errors=True)
                best.rename(aside[-1])
            state = load_training_state(folder)
            if state is None:
                shutil.rmtree(model, ignore_errors=True)  # the same weights as in the newest that was set aside
            elif aside:
                steps = [*history[:-1], {**history[-1], "steps": state.progress.step}]
                save_weights(model, result.config, state.average or state.weights, steps)
        except (OSError, InputError) as error:
            return f"Not all weights since then could be renamed ({error}): look into {folder} before you resume"
        moved = (
            f"; the later weights are in {', '.join(path.name for path in aside)}, and may be deleted" if aside else ""
        )
        if state is None:
            return f"No checkpoint is from before that: --resume begins anew{moved}"
        return f"--resume takes {folder / f'step-{state.progress.step}'}, from before that{moved}"

    def is_stale(self, patience: int | None, min_delta: float) -> bool:
        """Whether the last `patience` evaluations brought no AP that is higher by more than `min_delta`."""
        best, since = -1.0, 0
        for ap in self.aps:
            best, since = (ap, 0) if ap > best + min_delta else (best, since + 1)
        return patience is not None and since >= patience

    def describe_best(self, patience: int | None, min_delta: float) -> str:
        """Why a run was stale, and its best evaluation, in words, on the main process."""
        best = max((r for r in self.records if "bbox" in r), key=lambda record: record["bbox"]["AP"])
        higher = f"more than {min_delta:g} higher than before" if min_delta else "higher than before"
        count = "the last evaluation's AP was not" if patience == 1 else f"no AP of the last {patience} evaluations was"
        return f"as {count} {higher} (--patience); the best is {best['bbox']['AP']:.3f}, of step {best['step']}"

    def newest_checkpoint(self) -> str:
        """Which checkpoint is the newest, in words."""
        saved = checkpoints(self.path / "checkpoints")
        return f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    def show(self, page: RunPage, samples: Iterable[Batch], class_names: tuple[str, ...]) -> None:
        """Write the run's page from now on, for the main process; with these training samples unless it has some."""
        self.page = page
        if not page.has_samples():
            self._try(lambda: page.add_samples(samples, class_names))
        self._try(lambda: page.write(self.records))

    def pictures(self, step: int) -> dict[str, Path]:
        """The page's pictures of a step by their names, on the main process: of detections, or at 0 of samples."""
        return {} if self.page is None else self.page.pictures(step)

    def must_be_saved(self, step: int) -> None:
        """Raise TrainingStopped where the last save failed. Called whenever a run ends."""
        self._try(lambda: self._draw(is_last=True))
        if self._error:
            raise TrainingStopped(
                f"step {step} could not be saved: {self._error}; {self.newest_checkpoint()}. Make room there, then "
                "continue with --resume"
            )

    def _try(self, write: Callable[[], None]) -> None:
        if not self.is_main:
            return
        try:
            write()
        except OSError as error:
            self._error = str(error)
            message = f"warning: not saved: {error}; {self.newest_checkpoint()}; training continues"
            tqdm.write(printable(message), file=sys.stderr)

    def _draw(self, is_last: bool = False) -> None:
        """The charts of new records, and the page that shows them. Raises OSError.

        Not at each save: it takes as long as some steps of a small detector.
        """
        start = time.monotonic()
        if self._drawn == len(self.records) or (start < self._draw_from and not is_last):
            return
        plot_curves(self.records, self.path / "curves.png")
        if self.page is not None:
            self.page.write(self.records)
        self._drawn, now = len(self.records), time.monotonic()
        self._draw_from = now + (now - start) / DRAWING_SHARE

    def _write_best(self) -> None:
        if self._unsaved_best is not None:
            self._unsaved_best()
            self._unsaved_best = None

    def _write_ap(self, detector: Detector, history: History, measured: History) -> None:
        """Note the AP of model/, where it is the one that was evaluated: of a run's last step it is saved before."""
        model = self.path / "model"
        with suppress(InputError):
            if read_history(model) == history:
                write_json(model / CONFIG, model_facts(detector.config, measured))

    def _read_records(self, last_step: int) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl up to `last_step`: what a killed run wrote after its checkpoint is removed.

        Raises:
            InputError: they cannot be read, or not be written again.
        """
        path = self.path / "metrics.jsonl"
        found, wrong = read_records(path)
        records = [record for record in found if record["step"] <= last_step]
        if wrong:
            kept = path.with_name(f"metrics.damaged-{time.time_ns()}.jsonl")
            with writing(f"{kept}, a copy"), replacing(kept) as copy:
                shutil.copyfile(path, copy)
            warn_of_lines(path, wrong, kept)
        evaluations = [record for record in records if "bbox" in record]
        if evaluations:
            best = max(evaluations, key=lambda record: record["bbox"]["AP"])  # the first of equals, as in training
            if best["step"] == last_step and self._step_of_best() != last_step:
                records.remove(best)  # its model could not be written: evaluate again
        if path.exists():
            with writing(str(path)):
                write_text(path, _lines(records))
        return records

    def _step_of_best(self) -> int:
        """The step of best/, 0 where there is none."""
        try:
            return read_history(self.path / "best")[-1]["steps"]
        except (InputError, IndexError, KeyError):
            return 0


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
