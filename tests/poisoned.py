"""What test_skipped_steps.py trains: pre-training in which one process meets pixels that are not finite.

`accelerate launch ... poisoned.py STEPS FLAGS...`: in these steps ("2" or "2,3"), counted from 1, the last image of the
last process's last micro-batch is NaN. Everything else is pretrain.py's.
"""

from direct_pt.program.run import run_program
import sys
from collections.abc import Iterator
from dataclasses import replace

import small_runs as runs
import torch

from direct_pt.batch import Batch
from direct_pt.training import start
from direct_pt.training.loop import Trainer


class Poisoned(Trainer):
    """The training loop, fed with such pixels."""

    steps: tuple[int, ...] = ()

    def _step(self, batches: Iterator[Batch]) -> int:
        last = self.accelerator.process_index == self.accelerator.num_processes - 1
        return super()._step(self._poison(batches) if last and self.progress.step + 1 in self.steps else batches)

    def _poison(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for number in range(1, self.plan.accumulation + 1):
            batch = next(batches)
            if number == self.plan.accumulation:
                # Pixels in floating point count as normalised: nothing on the way to the detector mends them.
                images = self.detector.normalize(batch.to(self.accelerator.device)).cpu().clone()
                images[-1] = torch.nan
                batch = replace(batch, images=images)
            yield batch


def run(steps: str, *flags: str) -> None:
    """Pre-train so."""
    Poisoned.steps = tuple(int(step) for step in steps.split(","))
    start.Trainer = Poisoned  # type: ignore[misc]
    try:
        runs.load_script("pretrain").main(list(flags))
    finally:
        start.Trainer = Trainer  # type: ignore[misc]


if __name__ == "__main__":
    run_program(lambda: run(*sys.argv[1:]))
