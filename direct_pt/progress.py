"""How far a run has come and how its loss went: which steps fail, and when the run has diverged."""

import math
from dataclasses import dataclass

MAX_RISE = 100  # times its lowest value so far: a loss above that, or one that is not finite, fails its step
MIN_LOWEST = 0.1  # a lower one counts as this: among well learnt images a single new one may cost 100 times as much
SMOOTHING = 0.9  # of the moving average whose lowest value counts
MAX_CALM_RISE = 2  # times the lowest value: a loss up to that says that its step's weights were good
MAX_FAILED_STEPS = 10  # in a row: the run stops


@dataclass
class Progress:
    """How far a run has come, and how its loss went. Saved in checkpoints, and the same on all processes.

    Attributes:
        step: optimizer steps done, those that were skipped included.
        skipped: steps without an update, as a loss or a gradient was not finite or far out of range.
        skipped_in_a_row: how many of them are the latest ones.
        mixed_in_a_row: in how many of those some micro-batches failed among good ones.
        smoothed_loss: moving average of the loss of the steps that were not skipped; None before the first.
        lowest_loss: its lowest value.
        calm_step: the latest step, from 1, with a loss near that.
        last_norm: of the gradient in the latest step that was not skipped; None where it is not known.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    mixed_in_a_row: int = 0
    smoothed_loss: float | None = None
    lowest_loss: float | None = None
    calm_step: int = 0
    last_norm: float | None = None

    @property
    def max_loss(self) -> float:
        """The largest loss that does not fail its step."""
        return math.inf if self.lowest_loss is None else MAX_RISE * max(self.lowest_loss, MIN_LOWEST)

    @property
    def first_failed_step(self) -> int:
        """Of the latest failed steps in a row, the first one, from 1; while the step under way is not counted yet."""
        return self.step + 2 - self.skipped_in_a_row

    @property
    def must_stop(self) -> bool:
        """Whether too many steps in a row have failed."""
        return self.skipped_in_a_row >= MAX_FAILED_STEPS

    @property
    def has_diverged(self) -> bool:
        """Whether the weights are the cause, and not single images: whole steps fail, not micro-batches among good
        ones."""
        return 2 * self.mixed_in_a_row < self.skipped_in_a_row

    def succeeded(self, loss: float, norm: float | None) -> None:
        """Count the step under way, of this loss and gradient norm. The caller counts `step`."""
        self.skipped_in_a_row = self.mixed_in_a_row = 0
        self.last_norm = norm
        before = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = SMOOTHING * before + (1 - SMOOTHING) * loss
        if self.lowest_loss is None or self.smoothed_loss < self.lowest_loss:
            self.lowest_loss = self.smoothed_loss
        if loss <= MAX_CALM_RISE * self.lowest_loss:
            self.calm_step = self.step + 1

    def failed(self, mixed: bool) -> None:
        """Count the step under way; `mixed`: some of its micro-batches were good."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.mixed_in_a_row += mixed

    def resume(self) -> None:
        """A person had a stopped run go on: it gets as many steps as before."""
        if self.must_stop:
            self.skipped_in_a_row = self.mixed_in_a_row = 0

    def describe_divergence(self, lr: float) -> str:
        """Where and how it began; `lr` of the first failed step."""
        first = self.first_failed_step
        norm = "" if self.last_norm is None else f", and the gradient norm in the step before {self.last_norm:.3g}"
        if self.lowest_loss is None:
            return f"the loss was never finite; the learning rate at step {first} was {lr:.3g}"
        return (
            f"the loss was last near its lowest, {self.lowest_loss:.3g}, at step {self.calm_step}, and from step "
            f"{first} on over {MAX_RISE} times that, or not finite; the learning rate there was {lr:.3g}{norm}"
        )
