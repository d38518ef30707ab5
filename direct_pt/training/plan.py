"""From flags, the number of images and of processes to the numbers of a run: batch, steps, learning rate."""

import math
from dataclasses import dataclass

from direct_pt.errors import InputError
from direct_pt.recipes import SCHEDULES, Recipe
from direct_pt.training.settings import ScheduleOptions


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
        """The learning rate of optimizer step `step`, counted from 0."""
        lr = self.lr * 0.1 ** sum(step >= decay for decay in self.decay_steps)
        if step < self.warmup_steps:
            lr *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_factor)
        elif self.cosine:
            lr *= (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))) / 2
        return lr


def global_batch_size(options: ScheduleOptions, recipe: Recipe, processes: int) -> int:
    """Images an optimizer step, over all processes: what the flag says, or else the recipe's.

    The small recipe's batch grows with the processes so that each of them has a whole micro-batch.
    """
    if options.global_batch_size is not None:
        return options.global_batch_size
    if recipe.name == "paper" or isinstance(options.micro_batch_size, int):
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
    options: ScheduleOptions, recipe: Recipe, images: int, processes: int, fitting_micro_batch_size: int | None = None
) -> Plan:
    """Resolve the batch, the schedule and the learning rate: what the flags say, and the recipe where they do not.

    Args:
        options: what the flags say.
        recipe: of its stage and detector.
        images: of the training split.
        processes: that share the work.
        fitting_micro_batch_size: what fits the device, for --micro-batch-size auto.

    Raises:
        InputError: the batch does not divide; the message gives the nearest ones that do.
    """
    batch = global_batch_size(options, recipe, processes)
    micro, given = recipe.micro_batch_size, options.micro_batch_size
    if fitting_micro_batch_size or isinstance(given, int):
        micro = fitting_micro_batch_size or int(given or 0)
    elif recipe.name == "small" and options.global_batch_size is None:  # which was made to divide
        micro = next(size for size in micro_batch_sizes(batch, processes) if size <= micro)
    elif given is None:
        fitting = [size for size in micro_batch_sizes(batch, processes) if size <= micro][:1]
        micro = next((size for size in fitting if size >= recipe.min_micro_batch_size), micro)
    unit = micro * processes
    if batch % unit:
        near = [size for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
        micros = sorted(sorted(micro_batch_sizes(batch, processes), key=lambda size: abs(size - micro))[:2])
        raise InputError(
            f"--global-batch-size {batch} does not divide into micro-batches of {micro} on {processes} process(es); "
            f"use --global-batch-size {' or '.join(map(str, near))}"
            + (f", or --micro-batch-size {' or '.join(map(str, micros))}" if micros else "")
        )
    notes = []
    if given is None and options.global_batch_size and micro < recipe.micro_batch_size:
        notes.append(f"micro-batches of {micro}, as {batch} images do not divide into {recipe.micro_batch_size}")
    if options.max_steps is not None:
        steps = options.max_steps
    elif options.epochs is not None:
        steps = max(1, round(options.epochs * images / batch))
    else:
        times = SCHEDULES[options.schedule]
        steps = max(1, round(recipe.epochs * times * images / batch))
        floor = round(recipe.min_images_seen * times / batch)
        if steps < floor:
            notes.append(
                f"{recipe.epochs * times} epochs of {images} images are {steps} steps: raised to {floor} steps"
            )
            steps = floor
    lr = options.lr
    if lr is None:
        lr = recipe.lr_for(batch)
        if batch != recipe.global_batch_size:
            share = f"{batch} / {recipe.global_batch_size}"
            share = f"the root of {share}, as AdamW's" if recipe.optimizer == "adamw" else share
            notes.append(f"lr {lr:.3g} = {recipe.lr:.3g} x {share}")
    warmup = recipe.warmup_steps if options.warmup_steps is None else options.warmup_steps
    notes += warmup_notes(warmup, steps, lr)
    cosine = options.lr_schedule == "cosine"
    if cosine:
        notes.append("lr falls to 0 along a cosine, which the recipe does not")
    eval_steps = steps / 12 if options.eval_every is None else options.eval_every * images / batch
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


def warmup_notes(warmup_steps: int, total_steps: int, lr: float) -> list[str]:
    """What is to be said of a warm-up that is longer than the run."""
    if warmup_steps <= total_steps:
        return []
    return [f"the warm-up of {warmup_steps} steps is longer than the run: lr stays below {lr:g}"]
