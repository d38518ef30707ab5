"""What is logged between two log lines: losses, gradient norm, speed, memory, and how long the run will take."""

import resource
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from direct_pt.training.plan import Plan

UNTIMED_STEPS, TIMED_STEPS = 2, 10  # the first steps of a process are slower than the rest


class RunLog:
    """The losses since the last log line, and the time.

    Attributes:
        losses: by name, summed over the updates since the last log line, on this process.
        updates: how many steps those are; skipped ones do not count.
        largest_norm: of their gradients; None where none is known.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator, step: int, saved: dict[str, Any]) -> None:
        """`saved` is what `state` returned when the checkpoint of `step` was written; empty for a new run."""
        self.plan = plan
        self.accelerator = accelerator
        self.losses: dict[str, Any] = dict(saved.get("losses", {}))
        self.updates: int = saved.get("updates", 0)
        self.largest_norm: float | None = saved.get("largest_norm")
        self._first_step = step
        self._logged_step = step - saved.get("steps", 0)
        self._logged_time = time.monotonic()
        self._timed_seconds = 0.0

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint of `step` keeps of it, in JSON's types."""
        return {
            "losses": {name: float(value) for name, value in self.losses.items()},
            "updates": self.updates,
            "largest_norm": self.largest_norm,
            "steps": step - self._logged_step,
        }

    def add_update(self, losses: dict[str, Tensor], norm: float | None) -> None:
        """Count a step with an update: its losses, and the norm of its gradient where that is known."""
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0) + loss
        self.updates += 1
        if norm is not None:
            self.largest_norm = max(norm, self.largest_norm or 0.0)

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on steps, as in an evaluation."""
        self._logged_time += seconds

    def next_record(self, step: int, skipped: int, unreadable: int) -> tuple[dict[str, Any], bool]:
        """The record of a log line, averaged over the processes, and begin the next. Every process must call it.

        Args:
            step: reached.
            skipped: steps of the run.
            unreadable: images of this process.

        Returns:
            The record, and whether any process has unreadable images.
        """
        names, device = list(self.losses), self.accelerator.device
        values = (*self.losses.values(), unreadable)
        sums = torch.stack([torch.as_tensor(value).to(device, torch.float64) for value in values])
        means = self.accelerator.reduce(sums, reduction="mean").tolist()
        count = max(1, self.updates) * self.plan.accumulation
        losses = {name: value / count for name, value in zip(names, means, strict=False)}
        elapsed = time.monotonic() - self._logged_time
        record = {
            "step": step,
            "epoch": step * self.plan.global_batch_size / self.plan.images,
            "loss": sum(losses.values()) if losses else None,  # None: all steps since the last line were skipped
            "losses": losses,
            "lr": self.plan.learning_rate(step - 1),
            "gradient_norm": self.largest_norm,  # the largest since the last line
            "images_per_second": (step - self._logged_step) * self.plan.global_batch_size / elapsed,
            "memory_gib": peak_memory_gib(),
        }
        if skipped:
            record["skipped"] = skipped
        self.losses, self.updates, self.largest_norm = {}, 0, None
        self._logged_step, self._logged_time = step, time.monotonic()
        return record, means[-1] > 0

    def estimate(self, step: int, seconds: float, evaluates: bool) -> str | None:
        """A line on how long the run will take, once, after some steps; `seconds` were spent on the latest one."""
        timed, left = step - self._first_step - UNTIMED_STEPS, self.plan.total_steps - step
        self._timed_seconds += seconds if timed > 0 else 0
        if timed != TIMED_STEPS or not left:
            return None
        mean = self._timed_seconds / TIMED_STEPS
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left * mean))
        evaluations = "no evaluation"
        if evaluates:
            every = self.plan.eval_steps
            wait = min(-step % every, left)
            evaluations = (
                f"evaluation every {every:,} steps, which comes on top, the next one after step {step + wait:,} in "
                f"{duration(wait * mean)}"
            )
        return (
            f"  time       {mean:.2g} s a step: {duration(left * mean)} for the other {left:,} steps, until about "
            f"{end}; {evaluations}"
        )


def duration(seconds: float) -> str:
    """A time in words, in the unit that fits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def peak_memory_gib() -> float:
    """Peak memory: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
