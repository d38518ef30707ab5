"""What test_training.py runs in two processes at once: `accelerate launch ... two_processes.py ARGUMENTS`.

Each part leaves files in the folder OUTPUT that the tests look at. ARGUMENTS: OUTPUT, the demo data to train on, other
data to evaluate on, and the model to evaluate.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import small_runs as runs
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from direct_pt.batch import Batch
from direct_pt.errors import StopSignal
from direct_pt.models.detector import build_detector
from direct_pt.models.layers import batchnorms
from direct_pt.training import start
from direct_pt.training.loop import Trainer
from direct_pt.training.norm_statistics import average_running_statistics

FOURS = ("--global-batch-size", "8", "--micro-batch-size", "4")
STEPS = ("--max-steps", "3", *runs.NO_EVALUATION, "--log-every", "1")


class Recording(Trainer):
    """Writes down each process's own detector at the end."""

    def train(self) -> None:
        super().train()
        rank = self.accelerator.process_index
        torch.save(self.detector.state_dict(), self.options.output_dir / f"rank{rank}.pt")


class Interrupted(Trainer):
    """One process of the two gets a stop signal in its second step."""

    def _step(self, batches: Iterator[Batch]) -> int:
        if self.progress.step == 1 and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._step(batches)


def pretrain(*flags: Any, trainer: type[Trainer] = Trainer) -> None:
    """Pre-train with `trainer` as the loop. accelerate's state stays: a process joins its group once."""
    start.Trainer = trainer  # type: ignore[misc]
    runs.load_script("pretrain").main([*map(str, runs.PRETRAIN), *FOURS, *map(str, STEPS), *map(str, flags)])


def evaluate(data: Path, checkpoint: Path, output: Path) -> None:
    """evaluate.py."""
    flags = ("--checkpoint", checkpoint, "--data", data, "--output-dir", output / "evaluation")
    sys.argv = ["evaluate.py", *map(str, flags), *runs.MACHINE]
    runs.load_script("evaluate").main()


def statistics(output: Path) -> None:
    """What averaging does to running statistics that each process gathered on images of its own."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(0)
    detector = build_detector(runs.MODEL, 3, "resnet18").train()
    torch.manual_seed(rank)
    detector.backbone(torch.randn(2, 3, 64, 64) + rank)
    frozen = batchnorms(detector)[0].eval()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    average_running_statistics(detector, accelerator)
    frozen_name = next(name for name, module in detector.named_modules() if module is frozen)
    torch.save((before, detector.state_dict(), frozen_name), output / f"statistics{rank}.pt")


def stop_signal(data: Path, output: Path) -> None:
    """An interrupted run and its resumption, beside one that nobody interrupts."""
    pretrain("--data", data, "--output-dir", output / "whole", trainer=Recording)
    try:
        pretrain("--data", data, "--output-dir", output / "stopped", trainer=Interrupted)
        message: tuple[Any, ...] = ()
    except StopSignal as stop:
        message = (str(stop), stop.exit_status)
    messages = gather_object([message])
    saved = runs.steps_saved(output / "stopped")
    if Accelerator(cpu=True).is_main_process:
        (output / "stop.json").write_text(json.dumps([messages, saved]))
    pretrain("--data", data, "--output-dir", output / "stopped", "--resume", trainer=Recording)


if __name__ == "__main__":
    output, data, truth, checkpoint = map(Path, sys.argv[1:])
    leave_group = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # the processes stay together until the last run is over
    with runs.float64():
        for model in runs.COMPARED:
            pretrain(*runs.train_part(data), *runs.THREE_STEPS, "--model", model, "--output-dir", output / model)
    evaluate(truth, checkpoint, output)
    statistics(output)
    stop_signal(data, output)
    leave_group(Accelerator(cpu=True))
