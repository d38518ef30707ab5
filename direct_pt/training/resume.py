"""How a run resumes: the folder is checked, its newest good checkpoint read by the main process and given to all."""

import hashlib
import os
import socket
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
from accelerate import Accelerator, PartialState
from timm.utils import ModelEmaV3

from direct_pt.checkpoint import CONFIG, Tensors
from direct_pt.data.annotations import AnnotationTable
from direct_pt.distributed.processes import check_same, main_decides, share_tensors
from direct_pt.errors import InputError, class_differences, first_names
from direct_pt.files import (
    DamagedFile,
    check_inputs_kept,
    check_output,
    counted_folder,
    read_json,
    unfinished,
    writing,
)
from direct_pt.flags import CHANGEABLE, FIXED, LENGTH, flag_name, paths_of, to_json
from direct_pt.models.detector import Detector
from direct_pt.program.folder_lock import hold_folder
from direct_pt.recipes import Augmentation, Recipe
from direct_pt.reports.run_page import PAGE, PICTURES
from direct_pt.training.checkpoints import TrainingState, load_training_state
from direct_pt.training.choices import Choices
from direct_pt.training.plan import Plan, make_plan, micro_batch_sizes, warmup_notes
from direct_pt.training.prepared import PreparedModel
from direct_pt.training.progress import Progress
from direct_pt.training.saved_values import read_choices, read_data_record, read_plan, read_records
from direct_pt.training.settings import (
    NEXT_RUN,
    Flags,
    ScheduleOptions,
    checked_values,
    is_restart,
    on_resume,
    option_groups,
    read_config,
)

if TYPE_CHECKING:
    from direct_pt.data.stream import Stream

SomeFlags = TypeVar("SomeFlags", bound=Flags)
# Of a run, beside config.json.
FOLDERS, FILES = ("model", "best", "checkpoints", PICTURES), ("metrics.jsonl", "curves.png", PAGE)


@dataclass
class Resumption:
    """A run's newest good checkpoint.

    Attributes:
        progress: how far the run has come.
        scaler: state of fp16's loss scale.
        process_logs: what each process has gathered since the last log line.
        micro_batch_size: images at once on a device.
        plan: the run's batch, length, rate and schedule.
        notes: which flags have changed, in words.
        data: the run's `data_record`, if it has one.
        choices: the run's, see `Choices.to_json`.
        new_length: whether the flags give the run another length.
        state: the tensors, on the main process.
    """

    progress: Progress
    scaler: dict[str, Any] | None
    process_logs: list[dict[str, Any]]
    micro_batch_size: int
    plan: Plan
    notes: list[str]
    data: dict[str, Any] | None = None
    choices: dict[str, Any] = field(default_factory=dict)
    new_length: bool = False
    state: TrainingState | None = None

    def load_weights(self, detector: Detector, accelerator: Accelerator) -> None:
        """Load the weights, before the detector is prepared. Every process must call it, also the method below.

        Raises:
            InputError: they are of another detector.
        """
        main_decides(lambda: self._whole_state().check_weights(detector), accelerator.state)
        detector.load_state_dict(share_tensors(self._tensors("weights"), accelerator))

    def load_state(self, model: PreparedModel, average: ModelEmaV3 | None, accelerator: Accelerator) -> None:
        """Load the optimizer, the moving average and the loss scale. Raises InputError where they do not fit."""
        main_decides(lambda: self._whole_state().check_optimizer(*model.trained_names()), accelerator.state)
        model.load_optimizer_state(share_tensors(self._tensors("optimizer"), accelerator))
        if average is not None:
            average.module.load_state_dict(share_tensors(self._tensors("average"), accelerator))
        if accelerator.scaler is not None and self.scaler is not None:
            accelerator.scaler.load_state_dict(self.scaler)

    def process_log(self, accelerator: Accelerator) -> dict[str, Any]:
        """What this process had gathered; with another number of processes, the mean of what all had."""
        if len(self.process_logs) == accelerator.num_processes:
            return self.process_logs[accelerator.process_index]
        first = self.process_logs[0] if self.process_logs else {"losses": {}}
        sums = {name: sum(log["losses"].get(name, 0.0) for log in self.process_logs) for name in first["losses"]}
        return {**first, "losses": {name: total / len(self.process_logs) for name, total in sums.items()}}

    def compare_data(self, train: "AnnotationTable | Stream", val: AnnotationTable | None) -> None:
        """Note that the data are not those of the run until now. Raises InputError if the classes are not."""
        now, before = data_record(train, val), self.data
        if before is None or now == before:
            return
        if now["classes"] != before["classes"]:
            found, expected = ({int(key): name for key, name in one["classes"].items()} for one in (now, before))
            raise InputError(
                f"--resume: {train.source} lists other classes than the run was started with: "
                f"{class_differences(found, expected)}; give the same data, or choose another --output-dir"
            )
        for split in ("train", "val"):
            if now[split] != before[split]:
                counts = [
                    f"{part['images']} images with {part['objects']} objects" if part else "none"
                    for part in (now[split], before[split])
                ]
                same = ", others than before" if counts[0] == counts[1] else f", before {counts[1]}"
                kept = "; the number of steps stays" if split == "train" else ""
                self.notes.append(f"resumed with other data: {split} {counts[0]}{same}{kept}")

    def differences(self, plan: Plan) -> tuple[str, ...]:
        """What differs from the run until now, in words."""
        before = len(self.process_logs), self.micro_batch_size
        if before == (plan.processes, plan.micro_batch_size):
            return tuple(self.notes)
        note = (
            f"resumed on {plan.processes} process(es) with {plan.micro_batch_size} images at once, before "
            f"{before[0]} with {before[1]}: the same global batch and schedule"
        )
        return (note, *self.notes)

    def _whole_state(self) -> TrainingState:
        """On the main process."""
        assert self.state is not None
        return self.state

    def _tensors(self, name: str) -> Tensors | None:
        return None if self.state is None else getattr(self.state, name)


def open_run(flags: SomeFlags, processes: PartialState) -> tuple[SomeFlags, Resumption | None]:
    """Check the run's folder, and find what the run resumes from. Every process must call it.

    Returns:
        The flags: changeable ones that are not given now are as an earlier resumption left them. And the newest good
        checkpoint, or None for a new run.

    Raises:
        InputError: the folder holds another run, is being written by one, cannot be written or read, or all its
            checkpoints are damaged; or the processes were started with different flags.
    """
    if flags.run.output_dir == NEXT_RUN:
        first = NEXT_RUN.with_name(flags.stage.name)
        folder = main_decides(lambda: counted_folder(first, latest=flags.run.resumes), processes)
        flags = flags.changed({"output_dir": folder})
    given = {flag_name(name): value for name, value in flags.to_dict().items()}
    check_same(given | {"--output-dir": None}, "flags", processes)  # only the main process's is written
    states: list[TrainingState] = []  # on the main process, which alone reads and writes there

    def read() -> tuple[SomeFlags, Resumption | None]:
        path = flags.run.output_dir / CONFIG
        check_output(flags.run.output_dir)
        if not path.exists():
            check_inputs(flags)
            return flags, None
        with writing(f"--output-dir {flags.run.output_dir}"):
            hold_folder(flags.run.output_dir)
        check_flags(flags, path)
        check_entries(flags.run.output_dir)
        resumed, notes = changed_flags(flags, read_config(path))
        new_length = has_new_length(flags, read_config(path))
        plan, data = read_plan(path), read_data_record(path)
        choices = read_choices(path) or Choices(Augmentation()).to_json()  # of runs from before there were any
        read_records(flags.run.output_dir / "metrics.jsonl")  # raises what would end the main process alone later
        state = load_training_state(flags.run.output_dir / "checkpoints", flags.schedule.ema is not None)
        if state is None:
            return resumed, None
        states.append(state)
        state.progress.resume()
        if state.progress.step > plan.total_steps:
            raise InputError(
                f"{state.folder}: is of a longer run than the {plan.total_steps} steps of {path}; move it away"
            )
        return resumed, Resumption(
            state.progress,
            state.scaler,
            state.of_processes,
            state.micro_batch_size,
            plan,
            notes,
            data,
            choices,
            new_length,
        )

    flags, resumption = main_decides(read, processes)
    if resumption is not None and states:
        resumption.state = states[0]
    return flags, resumption


def data_record(train: "AnnotationTable | Stream", val: AnnotationTable | None) -> dict[str, Any]:
    """What tells data from others, wherever they lie, as JSON: the classes, and each split's images and objects."""

    def record(table: "AnnotationTable | Stream | None") -> dict[str, Any] | None:
        if not isinstance(table, AnnotationTable):
            return None  # a stream is not read before
        digest = hashlib.blake2b(digest_size=16)
        for name in ("file_names", "sizes", "starts", "boxes", "labels", "crowd"):
            digest.update(np.ascontiguousarray(getattr(table, name)).data)
        if table.places is not None:
            digest.update(table.places.data)
        for outlines in (table.segmentations.coordinates, table.segmentations.run_lengths):
            digest.update(np.ascontiguousarray(outlines).data)
        return {"images": len(table), "objects": len(table.boxes), "digest": digest.hexdigest()}

    classes = dict(zip(map(str, train.category_ids), train.class_names, strict=True))
    return {"classes": classes, "train": record(train), "val": record(val)}


def check_inputs(flags: Flags) -> None:
    """Raise InputError where a new run would be written over its data, what it starts from, or another run."""
    folder, inputs = flags.run.output_dir, paths_of(flags.data)
    if init := flags.to_dict().get("init"):
        inputs.append(Path(init))
    check_inputs_kept([folder], inputs)
    around = [place for path in inputs for place in (path, *path.absolute().parents)]
    outputs = [folder / name for name in (*FOLDERS, *FILES)]
    check_inputs_kept(outputs, around)
    if foreign := first_names([path.name for path in outputs if os.path.lexists(path)], 3):
        raise InputError(
            f"--output-dir {folder}: holds {foreign}, but no {CONFIG} of the run that wrote that; a new run would be "
            "written over it: choose another folder"
        )


def check_entries(folder: Path) -> None:
    """Raise InputError where something else lies in the place of a file or folder that a run writes."""
    wrong = [(folder / name, "no folder") for name in FOLDERS if not (folder / name).is_dir()]
    for name in (CONFIG, *FILES):
        wrong += [(path, "no file") for path in (folder / name, unfinished(folder / name)) if not path.is_file()]
    for path, what in wrong:
        if os.path.lexists(path):
            raise InputError(f"{path}: is {what}, and the run writes one there; move it away")


def check_flags(flags: Flags, path: Path) -> None:
    """Raise InputError where the run of a config.json must not be resumed, or not with these flags."""
    folder = flags.run.output_dir
    own = flags.run.resume or (is_restart() and read_launcher(path) == launcher_id())
    if not own:  # a restart continues only what the same launcher began
        raise InputError(
            f"--output-dir {folder}: holds a run already; continue with --resume, or choose another folder"
        )
    saved, given, defaults = read_config(path), flags.to_dict(), default_values(type(flags))
    for name in ("stage", *on_resume(type(flags), FIXED)):
        if saved.get(name, defaults.get(name)) != given[name]:
            what = flag_name(name) if name != "stage" else "the stage"
            raise InputError(
                f"--resume: {what} is {_said(given[name])} but the run in {folder} was started with "
                f"{_said(saved.get(name))}; give the same (--config {path} does), or choose another --output-dir"
            )


def has_new_length(flags: Flags, saved: dict[str, Any]) -> bool:
    """Whether the flags give a run another length than its config.json. Raises InputError where they leave it out."""
    given, defaults = flags.to_dict(), default_values(type(flags))
    names = on_resume(type(flags), LENGTH)
    differing = [name for name in names if saved.get(name, defaults[name]) != given[name]]
    if differing and all(given[name] == defaults[name] for name in names):
        name, folder = differing[0], flags.run.output_dir
        raise InputError(
            f"--resume: {flag_name(name)} is {_said(given[name])} but the run in {folder} was started with "
            f"{_said(saved.get(name))}; give the same (--config {folder / CONFIG} does), or more to make it longer"
        )
    return bool(differing)


def launcher_id() -> str:
    """Which process started this one: host, number and start time, as numbers are used again."""
    number = os.getppid()
    try:
        start = f"{psutil.Process(number).create_time():.2f}"
    except psutil.Error:  # it is outside this container, or has ended
        start = "unknown"
    return f"{socket.gethostname()} {number} {start}"


def read_launcher(path: Path) -> str | None:
    """The `launcher_id` in a run's config.json; None where there is none."""
    try:
        return read_json(path).get("launcher")
    except (DamagedFile, AttributeError):
        return None


def changed_flags(flags: SomeFlags, saved: dict[str, Any]) -> tuple[SomeFlags, list[str]]:
    """The flags with the saved values of changeable ones that are not given now, and which others differ, in words.

    Raises:
        InputError: a saved value is none that the flag takes.
    """
    given, defaults = flags.to_dict(), default_values(type(flags))
    names = sorted(set(on_resume(type(flags), CHANGEABLE)) - {"micro_batch_size"})  # the plan keeps that if it fits
    kept = {name: saved[name] for name in names if given[name] is None and saved.get(name) is not None}
    try:
        kept = checked_values(kept, type(flags))
    except InputError as error:
        raise InputError(f"{flags.run.output_dir / CONFIG}: {error}; or give the flag anew") from error
    notes = []
    for name in names:
        now, before = kept.get(name, given[name]), saved.get(name, defaults[name])
        if now != before:
            text = "not given before" if before is None else f"before {before!s:.60}"
            notes.append(f"resumed with {flag_name(name)} {now}, {text}")
    return flags.changed(kept), notes


def default_values(kind: type[Flags]) -> dict[str, Any]:
    """The default of each flag, as JSON holds it: what a run of before there was the flag was started with."""
    groups = option_groups(kind).values()
    return {one.name: to_json(one.default) for group in groups for one in fields(group) if one.default is not MISSING}


def resumed_plan(
    saved: Plan, options: ScheduleOptions, images: int, processes: int, fitting_micro_batch_size: int | None = None
) -> Plan:
    """A resumed run's plan: its own batch, length and schedule, on the processes that there are now.

    Args:
        saved: its plan until now.
        options: what the flags say; they may bring another rate, warm-up or micro-batch.
        images: of the training split now.
        processes: see `make_plan`.
        fitting_micro_batch_size: see `make_plan`.

    Raises:
        InputError: the batch does not divide; the message gives the numbers of processes or the micro-batches that do.
    """
    batch = saved.global_batch_size
    sizes = micro_batch_sizes(batch, processes)
    if not sizes:
        fitting = [str(number) for number in range(1, batch + 1) if batch % number == 0]
        raise InputError(
            f"--resume: the run's batch of {batch} does not divide over {processes} processes; start {_one_of(fitting)}"
        )
    given = options.micro_batch_size
    micro = fitting_micro_batch_size or next(size for size in sizes if size <= saved.micro_batch_size or size == 1)
    if isinstance(given, int):
        micro = given
        if micro not in sizes:
            raise InputError(
                f"--micro-batch-size {micro}: the run's batch of {batch} does not divide so on {processes} "
                f"process(es); use {_one_of([str(size) for size in reversed(sizes)])}"
            )
    eval_steps = saved.eval_steps
    if options.eval_every is not None:
        eval_steps = max(1, round(options.eval_every * saved.images / batch))
    lr = saved.lr if options.lr is None else options.lr
    warmup = saved.warmup_steps if options.warmup_steps is None else options.warmup_steps
    return replace(
        saved,
        images=images,
        processes=processes,
        micro_batch_size=micro,
        accumulation=batch // (micro * processes),
        lr=lr,
        warmup_steps=warmup,
        eval_steps=eval_steps,
        notes=tuple(warmup_notes(warmup, saved.total_steps, lr)),
    )


def longer_plan(plan: Plan, options: ScheduleOptions, recipe: Recipe, step: int) -> Plan:
    """A resumed run's plan with the length that the flags say now.

    Args:
        plan: of the run until now.
        options: what the flags say.
        recipe: of its stage and detector.
        step: that it has reached.

    Raises:
        InputError: that is shorter.
    """
    sizes: dict[str, Any] = {"global_batch_size": plan.global_batch_size, "micro_batch_size": plan.micro_batch_size}
    new = make_plan(replace(options, **sizes), recipe, plan.images, plan.processes)
    if new.total_steps < plan.total_steps:
        raise InputError(
            f"--resume: the run has {plan.total_steps} steps, and {new.total_steps} are fewer; give the same, or more"
        )
    new = replace(
        plan, total_steps=new.total_steps, decay_steps=new.decay_steps, eval_steps=new.eval_steps, notes=plan.notes
    )
    if new.total_steps == plan.total_steps:
        return plan
    notes = [f"made longer: {plan.total_steps} steps before"]
    before, now = plan.learning_rate(max(step - 1, 0)), new.learning_rate(step)
    usual = plan.learning_rate(step) / before if step and before else 1.0  # of a warm-up
    if step and now > before * max(usual, 1) * 1.001:
        notes.append(f"lr goes up again, from {before:.3g} to {now:.3g}, as the longer schedule has it at step {step}")
    return replace(new, notes=(*plan.notes, *notes))


def _said(value: Any) -> str:
    """A flag's value in messages."""
    return "its default" if value is None else f"{value!r:.60}"


def _one_of(choices: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
