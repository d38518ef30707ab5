"""What must hold of a model's and a run's folder, taken or refused: see fuzz.py."""

import functools
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from odd_data import Files
from odd_runs import CONFIG, FLAGS, MODEL, small_detector
from rules import Broken, chance_of, refusal

from direct_pt.checkpoint import from_pretrained, read_history
from direct_pt.errors import InputError
from direct_pt.models.detector import Detector
from direct_pt.reports.plots import plot_curves
from direct_pt.training.checkpoints import load_training_state
from direct_pt.training.choices import Choices
from direct_pt.training.plan import Plan
from direct_pt.training.resume import Resumption, changed_flags, check_flags, resumed_plan
from direct_pt.training.run_log import RunLog
from direct_pt.training.saved_values import read_choices, read_data_record, read_plan, read_records
from direct_pt.training.settings import PretrainFlags, parse_flags, read_config

LARGEST_SIDE = 512  # of images that a detector looks at


def check_model(folder: Path, files: Files) -> bool:
    """A model's folder as predict.py, evaluate.py and finetune.py read it."""
    try:
        detector = from_pretrained(folder / MODEL)
        read_history(folder / MODEL)
    except InputError as error:
        refusal(error, folder)
        return False
    if not all(value.isfinite().all() for value in detector.state_dict().values()):
        raise Broken("weights that are not finite")
    config = detector.config
    if config.long_side <= LARGEST_SIDE and not chance_of(files) % 8:
        (found,) = detector.predict(torch.zeros(3, 40, 50, dtype=torch.uint8), score_threshold=0.0)
        if not set(found["labels"]) <= set(config.class_names):
            raise Broken(f"classes {found['labels']}")
    return CONFIG not in files or files[CONFIG] is not None


def check_run(folder: Path, files: Files) -> bool:
    """A run's folder as --resume, and its config.json as --config, read it."""
    run, taken = folder / "run", True
    path = run / "config.json"
    try:
        again = parse_flags(PretrainFlags, "", ["--config", str(path), "--output-dir", str(run)])
        check_numbers(again.to_dict())
    except InputError as error:
        refusal(error, folder)
        taken = False
    flags = parse_flags(PretrainFlags, "", [*FLAGS, "--output-dir", str(run), "--resume"])
    try:
        check_flags(flags, path)
        flags, notes = changed_flags(flags, read_config(path))
        check_numbers(flags.to_dict())
        state = load_training_state(run / "checkpoints", with_average=True)
        plan, data, choices = read_plan(path), read_data_record(path), read_choices(path)
        records, wrong = read_records(run / "metrics.jsonl")
        if state is None:
            return taken
        state.progress.resume()
        state.check_weights(usual_detector())
        state.check_optimizer([name for name, _ in usual_detector().named_parameters()], ("momentum_buffer",))
        if choices is not None:
            Choices.from_json(choices)
        resumed = resumed_plan(plan, flags.schedule, 100, 1)
    except InputError as error:
        refusal(error, folder)
        return False
    check_state_used(Resumption(state.progress, state.scaler, state.of_processes, 4, plan, notes, data), resumed)
    if not all(isinstance(record["step"], int) for record in records):
        raise Broken(f"records {records!r:.500}")
    best = max((record["bbox"]["AP"] for record in records if "bbox" in record), default=-1.0)
    if not -1 <= best <= 1:
        raise Broken(f"the best AP is {best}")
    if not files or not chance_of(files) % 200:  # the first time its library is loaded, which writes a cache
        plot_curves(records, folder.parent / "cache/curves.png")
    return taken and not wrong


@functools.cache
def usual_detector() -> Detector:
    """The run's."""
    return small_detector()


def check_numbers(flags: dict[str, Any]) -> None:
    """Whether all numbers among flags are finite, and the counts above 0."""
    for name, value in flags.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise Broken(f"{name} is {number}")
    for name in ("global_batch_size", "lr", "max_steps", "channels", "save_every", "image_size"):
        value = flags[name]
        if value is not None and (isinstance(value, bool | str) or value <= 0):
            raise Broken(f"{name} is {value}")


def check_state_used(resumption: Resumption, plan: Plan) -> None:
    """What a run does with the facts of a checkpoint, without its tensors."""
    for one in fields(resumption.progress):
        value = getattr(resumption.progress, one.name)
        if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
            raise Broken(f"progress.{one.name} is {value!r:.100}")
    resumption.progress.describe_divergence(0.1)
    resumption.differences(plan)
    for count in (1, 2):
        accelerator = cast(Any, SimpleNamespace(num_processes=count, process_index=0))
        log = RunLog(plan, accelerator, resumption.progress.step, resumption.process_log(accelerator))
        log.state(resumption.progress.step)
    if resumption.scaler is not None:
        torch.amp.GradScaler("cpu").load_state_dict(resumption.scaler)
    for step in (0, plan.total_steps - 1):
        if not 0 <= plan.learning_rate(step) < math.inf:
            raise Broken(f"the learning rate at step {step} is {plan.learning_rate(step)}")
