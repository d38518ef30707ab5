"""Experiment trackers (--report-to): a run's settings, figures and pictures, given to those that accelerate knows."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tqdm import tqdm

from direct_pt.distributed.processes import main_decides
from direct_pt.errors import InputError, printable
from direct_pt.files import DamagedFile, read_json, write_json, writing

PROJECT = "direct_pt"  # the name under which trackers show all runs
IDS = "trackers.json"  # in a run's folder: by which name and id a tracker knows the run
NOT_IN_MLFLOW = re.compile(r"[^A-Za-z0-9_\-. /]")  # of a metric's name


class Trackers:
    """The trackers of a run. Only the main process has any.

    One that fails later, as where the network is down, is left out from then on, and named; training continues.
    """

    def __init__(self, opened: Mapping[str, GeneralTracker]) -> None:
        self._opened = dict(opened)

    def log(self, record: Mapping[str, Any]) -> None:
        """Give them the numbers in a record of metrics.jsonl, named by where they stand in it: "bbox/AP"."""
        figures = numbers_in(record)
        step = figures.pop("step")
        for name, tracker in list(self._opened.items()):
            named = _mlflow_names(figures) if name == "mlflow" else figures
            self._try(name, partial(tracker.log, named, step=step))

    def log_pictures(self, pictures: Mapping[str, Path], step: int) -> None:
        """Give pictures, by their names, to those trackers that take some."""
        for name, tracker in list(self._opened.items()) if pictures else ():
            self._try(name, partial(_log_pictures, name, tracker, pictures, step))

    def close(self) -> None:
        """Let them finish what they have to write or to send."""
        for name, tracker in list(self._opened.items()):
            self._try(name, tracker.finish)
        self._opened.clear()

    def _try(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # of libraries that are not ours, for any reason: nothing that was trained is lost
            del self._opened[name]
            text = f"warning: --report-to {name}: {_in_one_line(error)}; training continues without it"
            tqdm.write(printable(text), file=sys.stderr)


def open_trackers(
    names: tuple[str, ...], folder: Path, settings: Mapping[str, Any], step: int, processes: PartialState
) -> Trackers:
    """Begin with the trackers of these names, or go on where a run is resumed. Every process must call it.

    Args:
        names: some of `tracker_flags.TRACKERS`.
        folder: of the run; trackers that write files write them there.
        settings: all flags, JSON values by their names.
        step: that the run has reached.
        processes: of the run.

    Raises:
        InputError: one cannot begin.
    """
    opened: dict[str, GeneralTracker] = {}
    main_decides(lambda: opened.update({name: _open(name, folder, settings, step) for name in names}), processes)
    return Trackers(opened)


def _open(name: str, folder: Path, settings: Mapping[str, Any], step: int) -> GeneralTracker:
    ids = _read_ids(folder / IDS)
    given = {key: _plain(value) for key, value in settings.items() if value is not None}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](**_arguments(name, folder, ids, step))
        tracker.start()
        if name != "mlflow" or name not in ids:  # it refuses settings that differ from those of the first start
            tracker.store_init_configuration(given)
        if name == "mlflow":
            ids[name] = tracker.tracker.info.run_id
    except Exception as error:  # libraries raise what they like
        advice = "leave it out, or see its documentation"
        raise InputError(f"--report-to {name}: {_in_one_line(error)}; {advice}") from error
    with writing(str(folder / IDS)):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / IDS, ids)
    return tracker


def _arguments(name: str, folder: Path, ids: dict[str, str], step: int) -> dict[str, Any]:
    """How accelerate's class of a tracker is made; `ids` get what is new, and a resumed run is found by them."""
    title = folder.resolve().name
    match name:
        case "tensorboard":  # what was written after the step that the run resumes from is replaced
            return {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": step + 1 if step else None}
        case "wandb":
            identity = ids.setdefault(name, uuid4().hex[:12])
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            return {"run_name": project, "name": title, "id": identity, "resume": "allow", "dir": str(folder)}
        case "trackio":
            identity = ids.setdefault(name, f"{title}-{uuid4().hex[:6]}")
            return {"run_name": os.environ.get("TRACKIO_PROJECT", PROJECT), "name": identity, "resume": "allow"}
        case "mlflow":
            return {"experiment_name": PROJECT, "run_name": title, "run_id": ids.get(name)}
        case "aim":
            return {"run_name": title, "logging_dir": str(folder)}
    return {"run_name": PROJECT}


def _log_pictures(name: str, tracker: GeneralTracker, pictures: Mapping[str, Path], step: int) -> None:
    if name == "mlflow":
        for path in pictures.values():
            tracker.log_artifact(str(path), "pictures")
    elif name == "trackio":
        import trackio

        tracker.log({title: trackio.Image(str(path)) for title, path in pictures.items()}, step=step)
    elif hasattr(tracker, "log_images"):
        options = {"dataformats": "NHWC"} if name == "tensorboard" else {}
        for title, path in pictures.items():
            with Image.open(path) as image:
                tracker.log_images({title: np.asarray(image.convert("RGB"))[None]}, step=step, **options)


def numbers_in(record: Mapping[str, Any], prefix: str = "") -> dict[str, int | float]:
    """The numbers in nested dictionaries, by the path of keys that leads to each: {"bbox": {"AP": x}} has "bbox/AP"."""
    found: dict[str, int | float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers_in(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def _mlflow_names(figures: Mapping[str, int | float]) -> dict[str, int | float]:
    """Class names may have characters that MLflow's names must not have; none of two that become alike is lost."""
    named: dict[str, int | float] = {}
    for name, value in figures.items():
        allowed = NOT_IN_MLFLOW.sub("_", name)
        while allowed in named:
            allowed += "_"
        named[allowed] = value
    return named


def _plain(value: Any) -> int | float | str | bool:
    """A setting as every tracker takes it."""
    return value if isinstance(value, int | float | str | bool) else json.dumps(value)


def _read_ids(path: Path) -> dict[str, str]:
    """Of the trackers that an earlier start of the run used; one whose file is damaged begins a new record."""
    try:
        ids = read_json(path) if path.exists() else {}
    except DamagedFile:
        ids = {}
    return {name: text for name, text in ids.items() if isinstance(text, str)} if isinstance(ids, dict) else {}


def _in_one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.800}"
