"""From settings, the number of images and of processes to the numbers of a run: batch, steps, learning rate."""

import math
from dataclasses import dataclass

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


def global_batch_size(settings: Settings, recipe: Recipe) -> int:
    """Images an optimizer step, over all processes."""
    return settings.global_batch_size or recipe.global_batch_size


def micro_batch_sizes(global_batch_size: int, processes: int) -> list[int]:
    """All sizes that divide a process's share of the global batch, largest first; none where it has no whole share."""
    share, rest = divmod(global_batch_size, processes)
    return [] if rest else [size for size in range(share, 0, -1) if share % size == 0]


def smaller_micro_batches(plan: Plan) -> list[int]:
    """The micro-batch sizes below a run's that keep its global batch, largest first."""
    return [n for n in micro_batch_sizes(plan.global_batch_size, plan.processes) if n < plan.micro_batch_size]


def make_plan(
    settings: Settings, recipe: Recipe, images: int, processes: int, fitting_micro_batch_size: int | None = None
) -> Plan:
    """Resolve the batch, the schedule and the learning rate: what the settings say, and the recipe where they do not.

    Args:
        settings: of the run.
        recipe: of its stage and detector.
        images: of the training split.
        processes: that share the work.
        fitting_micro_batch_size: what was found where the settings say "auto".

    Raises:
        InputError: the batch does not divide; the message gives the nearest ones that do.
    """
    given = settings.micro_batch_size
    micro = (given if isinstance(given, int) else fitting_micro_batch_size) or recipe.micro_batch_size
    batch = global_batch_size(settings, recipe)
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
        epochs = recipe.epochs * SCHEDULES[settings.schedule]
        steps = max(1, round(epochs * images / batch))
        # The floor is in images seen, so that a smaller batch gets more steps.
        floor = round(recipe.least_steps * SCHEDULES[settings.schedule] * recipe.global_batch_size / batch)
        if steps < floor:
            notes.append(f"{epochs} epochs of {images} images are {steps} steps: raised to the floor of {floor}")
            steps = floor
    lr = settings.lr
    if lr is None:
        lr = recipe.lr * batch / recipe.global_batch_size
        if batch != recipe.global_batch_size:
            notes.append(f"lr {lr:g} = {recipe.lr:g} x {batch} / {recipe.global_batch_size}")
    warmup = settings.warmup_steps
    cosine = settings.lr_schedule == "cosine"
    if cosine:
        notes.append("lr falls to 0 along a cosine, which the recipe does not")
    if warmup is None:
        warmup = min(recipe.warmup_steps, max(1, steps // 10))
        if warmup < recipe.warmup_steps:
            notes.append(f"warm-up {warmup} steps, a tenth of the run, in place of {recipe.warmup_steps}")
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
