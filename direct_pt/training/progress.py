"""How far a run has come, and its loss: which steps fail, and when the run has diverged."""

import math
from dataclasses import dataclass

MAX_RISE = 100  # times its lowest average: a loss above that, or one that is not finite, fails its step
MIN_LOWEST = 0.1  # a lower average counts as this: among well learnt images a single new one may cost 100 times as much
AVERAGED_STEPS = 10  # about as many make the average; before that the lowest loss of a single step stands in for it
MIN_EARLY_LOWEST = 1.0  # a lower one counts as this: a single batch may be easy by chance
MAX_EARLY_RISE = 10  # times the lowest single loss: the first average counts as this at most, as it may hold a rise
MAX_CALM_RISE = 2  # times the lowest average: a loss up to that says that the weights before its step were good
MAX_FAILED_STEPS = 10  # in a row: the run stops


@dataclass
class Progress:
    """How far a run has come, and its loss. Saved in checkpoints, and the same on all processes.

    Attributes:
        step: optimizer steps done, with those that failed.
        skipped: how many of them failed: without an update, as a loss or a gradient was not finite or out of range.
        skipped_in_a_row: how many of those are the latest ones.
        mixed_in_a_row: in how many of these some micro-batches failed among good ones.
        good_steps: steps that did not fail, up to `AVERAGED_STEPS`.
        average_loss: of the latest of those.
        lowest_loss: the lowest average; None while there are too few.
        lowest_early: the lowest loss of a single step among the first.
        calm_step: the latest step, from 1, with a loss near the lowest.
        last_norm: of the gradient in the latest step that did not fail; None where it is not known.
        failed_lr: learning rate of the first of the steps that are `skipped_in_a_row`.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    mixed_in_a_row: int = 0
    good_steps: int = 0
    average_loss: float = 0.0
    lowest_loss: float | None = None
    lowest_early: float | None = None
    calm_step: int = 0
    last_norm: float | None = None
    failed_lr: float | None = None

    @property
    def reference_loss(self) -> float:
        """What a loss is compared with; infinite before there is one."""
        if self.lowest_loss is not None:
            return max(self.lowest_loss, MIN_LOWEST)
        return math.inf if self.lowest_early is None else max(self.lowest_early, MIN_EARLY_LOWEST)

    @property
    def max_loss(self) -> float:
        """The largest loss that does not fail its step."""
        return MAX_RISE * self.reference_loss

    def succeed(self, loss: float, norm: float | None) -> None:
        """Count a step of this loss and gradient norm."""
        self.step += 1
        self.skipped_in_a_row = self.mixed_in_a_row = 0
        self.failed_lr = None
        self.last_norm = norm
        self.good_steps = min(self.good_steps + 1, AVERAGED_STEPS)
        self.average_loss += (loss - self.average_loss) / self.good_steps
        if self.lowest_loss is None and self.good_steps <= AVERAGED_STEPS:
            self.lowest_early = min(loss, math.inf if self.lowest_early is None else self.lowest_early)
        if self.good_steps == AVERAGED_STEPS:
            highest = MAX_EARLY_RISE * self.reference_loss if self.lowest_loss is None else self.lowest_loss
            self.lowest_loss = min(self.average_loss, highest)
        if loss <= MAX_CALM_RISE * self.reference_loss:
            self.calm_step = self.step

    def fail(self, mixed: bool, lr: float | None = None) -> None:
        """Count a step without an update at this learning rate; `mixed`: some of its micro-batches were good."""
        if not self.skipped_in_a_row:
            self.failed_lr = lr
        self.step += 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.mixed_in_a_row += mixed

    @property
    def first_failed_step(self) -> int:
        """Of the failed steps that are the latest ones, the first, from 1."""
        return self.step + 1 - self.skipped_in_a_row

    def must_stop(self, total_steps: int) -> bool:
        """Whether too many steps in a row have failed, or the run would end with weights that make them fail."""
        ends = self.step == total_steps and self.skipped_in_a_row > 1 and self.has_diverged
        return ends or self.skipped_in_a_row >= MAX_FAILED_STEPS

    @property
    def has_diverged(self) -> bool:
        """Whether the weights are the cause, not single images: whole steps fail, not micro-batches among good ones."""
        return 2 * self.mixed_in_a_row < self.skipped_in_a_row

    def resume(self) -> None:
        """A person resumed a stopped run: it may fail as often as before."""
        if self.skipped_in_a_row >= MAX_FAILED_STEPS:
            self.skipped_in_a_row = self.mixed_in_a_row = 0

    def describe_divergence(self, lr: float) -> str:
        """Where and how it began; `lr` of the first failed step."""
        norm = "" if self.last_norm is None else f", and the gradient norm in the step before {self.last_norm:.3g}"
        calm = f"the loss was last near its lowest at step {self.calm_step}; " if self.calm_step else ""
        limit = f"over {self.max_loss:.3g}, or " if math.isfinite(self.max_loss) else ""
        return (
            f"{calm}from step {self.first_failed_step} on it or its gradient was {limit}not finite; the learning rate "
            f"there was {lr:.3g}{norm}"
        )
