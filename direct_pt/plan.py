"""From settings, the number of images and of processes to the numbers of a run: batch, steps, learning rate."""

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
        return lr


def make_plan(settings: Settings, recipe: Recipe, images: int, processes: int) -> Plan:
    """Resolve the batch, the schedule and the learning rate: what the settings say, and the recipe where they do not.

    Raises:
        InputError: the batch does not divide; the message gives the nearest ones that do.
    """
    micro = settings.micro_batch_size or recipe.micro_batch_size
    batch = settings.global_batch_size or recipe.global_batch_size
    unit = micro * processes
    if batch % unit:
        near = [size for size in (batch // unit * unit, (batch // unit + 1) * unit) if size]
        micros = [size for size in range(1, batch // processes + 1) if batch % (size * processes) == 0]
        raise InputError(
            f"--global-batch-size {batch} does not divide into micro-batches of {micro} on {processes} process(es); "
            f"use --global-batch-size {' or '.join(map(str, near))}"
            + (f", or --micro-batch-size {' or '.join(map(str, micros[-3:]))}" if micros else "")
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
        decay_steps=tuple(round(share * steps) for share in recipe.decays),
        eval_steps=max(1, round(eval_steps)),
        notes=tuple(notes),
    )
