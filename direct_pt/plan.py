"""From settings, the number of images and of processes to the numbers of a run: batch, steps, learning rate."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from direct_pt.errors import InputError
from direct_pt.recipes import SCHEDULES, Recipe
from direct_pt.settings import Settings


@dataclass(frozen=True)
class Plan:
    """The resolved numbers of a run. Steps are optimizer steps.

    Attributes:
        images: of the training split.
        processes: that share the work.
        global_batch_size: images a step.
        micro_batch_size: images that go through the detector together.
        accumulation: micro-batches a step on each process.
        total_steps: of the run.
        lr: after the warm-up.
        warmup_steps: of linear warm-up.
        warmup_factor: share of the lr that the warm-up starts from.
        decay_steps: after which the lr falls to a tenth.
        cosine: the lr falls to 0 along half a cosine after the warm-up, in place of `decay_steps`.
        eval_steps: between two evaluations.
        notes: how the numbers came about where that may surprise.
    """

    images: int
    processes: int
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    total_steps: int
    lr: float
    warmup_steps: int
    warmup_factor: float
    decay_steps: tuple[int, ...]
    cosine: bool
    eval_steps: int
    notes: tuple[str, ...]

    @property
    def epochs(self) -> float:
        """Passes over the training images."""
        return self.total_steps * self.global_batch_size / self.images

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, from 0."""
        lr = self.lr * 0.1 ** sum(step >= decay for decay in self.decay_steps)
        if step < self.warmup_steps:
            lr *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_factor)
        elif self.cosine:
            lr *= (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))) / 2
        return lr


def read_plan(path: Path) -> Plan:
    """The plan in a run's config.json. Raises InputError."""
    try:
        values = json.loads(path.read_text())["plan"]
        return Plan(**{**values, "decay_steps": tuple(values["decay_steps"]), "notes": tuple(values["notes"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: its plan cannot be read ({error}); choose another --output-dir") from error


def global_batch_size(settings: Settings, recipe: Recipe, processes: int, saved: "Plan | None" = None) -> int:
    """Images an optimizer step, over all processes: what the flag says, or a resumed run had, or the recipe's.

    The small recipe's batch grows with the processes so that each of them has a whole micro-batch.
    """
    if settings.global_batch_size is not None:
        return settings.global_batch_size
    if saved is not None:
        return saved.global_batch_size
    if recipe.name == "paper" or isinstance(settings.micro_batch_size, int):
        return recipe.global_batch_size
    least = max(recipe.global_batch_size, recipe.min_micro_batch_size * processes)
    return -(-least // processes) * processes


def micro_batch_sizes(global_batch_size: int, processes: int) -> list[int]:
    """All sizes that divide a process's share of the global batch, largest first; none where it has no whole share."""
    share, rest = divmod(global_batch_size, processes)
    return [] if rest else [size for size in range(share, 0, -1) if share % size == 0]


def smaller_micro_batches(plan: Plan) -> list[int]:
    """The micro-batch sizes below a run's that keep its global batch, largest first."""
    return [n for n in micro_batch_sizes(plan.global_batch_size, plan.processes) if n < plan.micro_batch_size]


def make_plan(
    settings: Settings,
    recipe: Recipe,
    images: int,
    processes: int,
    fitting_micro_batch_size: int | None = None,
    saved: Plan | None = None,
    changed: Collection[str] = (),
) -> Plan:
    """Resolve the batch, the schedule and the learning rate: what the settings say, and the recipe where they do not.

    Args:
        settings: of the run.
        recipe: of its stage and detector.
        images: of the training split.
        processes: that share the work.
        fitting_micro_batch_size: what was found where the settings say "auto".
        saved: of a resumed run: it keeps its batch, length, rate and schedule, but for `changed`.
        changed: "lr", "warmup_steps": which of these follow the settings all the same.

    Raises:
        InputError: the batch does not divide; the message gives the nearest ones that do.
    """
    batch = global_batch_size(settings, recipe, processes, saved)
    micro = fitting_micro_batch_size or _micro_batch_size(settings, recipe, batch, processes, saved)
    unit = micro * processes
    if batch % unit:
        near = [size for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
        micros = micro_batch_sizes(batch, processes)[2::-1]
        raise InputError(
            f"--global-batch-size {batch} does not divide into micro-batches of {micro} on {processes} process(es); "
            f"use --global-batch-size {' or '.join(map(str, near))}"
            + (f", or --micro-batch-size {' or '.join(map(str, micros))}" if micros else "")
        )
    notes = []
    if settings.max_steps is not None:
        steps = settings.max_steps
    elif settings.epochs is not None:
        steps = max(1, round(settings.epochs * images / batch))
    else:
        times = SCHEDULES[settings.schedule]
        steps = max(1, round(recipe.epochs * times * images / batch))
        floor = round(recipe.min_images_seen * times / batch)
        if steps < floor:
            notes.append(f"{recipe.epochs * times} epochs of {images} images are {steps} steps: raised to {floor}")
            steps = floor
    lr = settings.lr
    if lr is None:
        lr = recipe.lr_for(batch)
        if batch != recipe.global_batch_size:
            share = f"{batch} / {recipe.global_batch_size}"
            share = f"the root of {share}, as AdamW's" if recipe.optimizer == "adamw" else share
            notes.append(f"lr {lr:.3g} = {recipe.lr:.3g} x {share}")
    warmup = _first(settings.warmup_steps, recipe.warmup_steps)
    if warmup > steps:
        notes.append(f"the warm-up of {warmup} steps is longer than the run: lr stays below {lr:g}")
    cosine = settings.lr_schedule == "cosine"
    if cosine:
        notes.append("lr falls to 0 along a cosine, which the recipe does not")
    if saved is not None:
        return replace(
            saved,
            images=images,
            processes=processes,
            micro_batch_size=micro,
            accumulation=batch // unit,
            lr=lr if "lr" in changed else saved.lr,
            warmup_steps=warmup if "warmup_steps" in changed else saved.warmup_steps,
            notes=(),
        )
    eval_steps = steps / 12 if settings.eval_every is None else settings.eval_every * images / batch
    return Plan(
        images=images,
        processes=processes,
        global_batch_size=batch,
        micro_batch_size=micro,
        accumulation=batch // unit,
        total_steps=steps,
        lr=lr,
        warmup_steps=warmup,
        warmup_factor=recipe.warmup_factor,
        decay_steps=() if cosine else tuple(round(share * steps) for share in recipe.decays),
        cosine=cosine,
        eval_steps=max(1, round(eval_steps)),
        notes=tuple(notes),
    )


def _micro_batch_size(settings: Settings, recipe: Recipe, batch: int, processes: int, saved: Plan | None) -> int:
    """What the flag says; else the recipe's, or a resumed run's, made to fit where no flag gave the batch."""
    if isinstance(settings.micro_batch_size, int):
        return settings.micro_batch_size
    wanted = recipe.micro_batch_size if saved is None else saved.micro_batch_size
    fitting = [size for size in micro_batch_sizes(batch, processes) if size <= wanted]
    chosen = settings.global_batch_size is None and recipe.name == "small"
    return fitting[0] if fitting and (saved is not None or chosen) else wanted


def _first(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given
