"""The training loop of both stages, on accelerate: accumulation, schedule, logging, evaluation, checkpoints, resume."""

import json
import math
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from direct_pt.batch import Batch
from direct_pt.checkpoint import (
    History,
    Progress,
    save_model,
    save_training_state,
)
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.image_cache import ImageCache
from direct_pt.data.loader import SampleOrder, aspect_groups, training_loader, unreadable_reason
from direct_pt.data.transforms import Preset, TestPreset
from direct_pt.errors import StopSignal, TrainingStopped
from direct_pt.evaluation import evaluate, metrics_table
from direct_pt.models.detector import Detector
from direct_pt.models.norms import running_statistics
from direct_pt.plan import Plan
from direct_pt.settings import Settings
from direct_pt.visualize import plot_curves

UNREADABLE_SHARE = 0.01  # of the training images, and more than one of them: the run stops


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, out of a cache where there is one, what is validated on, and the transforms of both."""

    train: AnnotationTable
    val: AnnotationTable | None
    preset: Preset
    test_preset: TestPreset
    cache: ImageCache | None = None


class Trainer:
    """One run under way: `train` is the loop; the rest is what happens between steps."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: TrainingData,
        progress: Progress,
        history: History,
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.accelerator = accelerator
        self.model = model
        self.detector: Detector = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.data = data
        self.progress = progress
        self.history = history
        self.records = _read_records(settings.output_dir, progress.step)
        self.unreadable: set[int] = set()
        self.named: set[int] = set()
        self.losses: dict[str, Tensor] = {}
        self.logged_step = progress.step
        self.logged_time = time.monotonic()
        self.stop_signal = 0

    def train(self) -> None:
        """From the step reached to the last one."""
        total = self.plan.total_steps
        self._catch_signals()
        self.model.train()
        batches = self._batches()
        with tqdm(
            total=total, initial=self.progress.step, desc=self.settings.stage, unit="step",
            disable=not self.accelerator.is_main_process, mininterval=1, dynamic_ncols=True,
        ) as self.bar:  # fmt: skip
            for step in range(self.progress.step, total):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.plan.learning_rate(step)
                self._step(batches)
                average_running_statistics(self.detector, self.accelerator)
                self.progress.step = self.history[-1]["steps"] = step + 1
                self.bar.update()
                done = self.progress.step
                due_evaluation = self.data.val is not None and (done % self.plan.eval_steps == 0 or done == total)
                due_save = due_evaluation or done % self.settings.save_every == 0 or done == total
                if done % self.settings.log_every == 0 or due_save:
                    self._log()
                if due_evaluation:
                    self._evaluate()
                if due_save:
                    self._save()
                self._stop_if_asked()
        if self.accelerator.is_main_process:
            print(f"done: {self.settings.output_dir / 'model'}", flush=True)

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: forward and backward of each micro-batch, then the update."""
        micro_batches = [next(batches).to(self.accelerator.device) for _ in range(self.plan.accumulation)]
        for batch, share in zip(micro_batches, self._shares(micro_batches), strict=True):
            with self.accelerator.accumulate(self.model):
                losses = {name: loss * share for name, loss in self.model(batch).items()}
                self.accelerator.backward(torch.stack(list(losses.values())).sum())
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, loss in losses.items():
                self.losses[name] = self.losses.get(name, 0) + loss.detach()
            self.unreadable.update(batch.unreadable)

    def _shares(self, micro_batches: list[Batch]) -> list[Tensor | float]:
        """What each micro-batch's losses are multiplied by to make the step's the same as of one large batch."""
        weights = [weight for batch in micro_batches if (weight := self.detector.loss_weight(batch)) is not None]
        if not weights:
            return [1.0] * len(micro_batches)
        mean = self.accelerator.reduce(torch.stack(weights).float().mean(), reduction="mean")
        return [weight / mean for weight in weights]

    def _batches(self) -> Iterator[Batch]:
        plan, settings = self.plan, self.settings
        groups = aspect_groups(self.data.train) if settings.stage == "finetune" else None
        order = SampleOrder(len(self.data.train), settings.seed, plan.micro_batch_size, groups)
        a_step = plan.accumulation * plan.processes  # micro-batches
        part = (
            self.progress.step * a_step,
            plan.total_steps * a_step,
            self.accelerator.process_index,
            plan.processes,
        )
        masks = self.detector.has_masks
        loader = training_loader(
            self.data.train, self.data.preset, order, part, masks, settings.num_workers, self.data.cache
        )
        return iter(loader)

    def _log(self) -> None:
        """Average the losses since the last time over the processes, write them down, and check what must hold."""
        done, steps = self.progress.step, self.progress.step - self.logged_step
        names = list(self.losses)
        sums = torch.stack(
            [self.losses[name] for name in names] + [torch.tensor(len(self.unreadable)).to(self.losses[names[0]])]
        )
        means = self.accelerator.reduce(sums, reduction="mean").tolist()
        losses = {name: value / (steps * self.plan.accumulation) for name, value in zip(names, means, strict=False)}
        elapsed = time.monotonic() - self.logged_time
        record = {
            "step": done,
            "epoch": done * self.plan.global_batch_size / self.plan.images,
            "loss": sum(losses.values()),
            "losses": losses,
            "lr": self.plan.learning_rate(done - 1),
            "images_per_second": steps * self.plan.global_batch_size / elapsed,
            "memory_gib": _memory_gib(),
        }
        self.losses, self.logged_step, self.logged_time = {}, done, time.monotonic()
        if not math.isfinite(record["loss"]):
            raise self._diverged(f"the losses {losses} are")
        self.bar.set_postfix_str(
            f"loss {record['loss']:.3f}, lr {record['lr']:.2g}, {record['images_per_second']:.1f} images/s, "
            f"{record['memory_gib']:.1f} GiB"
        )
        self._write(record)
        if means[-1] > 0:
            self._check_unreadable()

    def _diverged(self, what: str) -> TrainingStopped:
        return TrainingStopped(
            f"{what} not finite after step {self.progress.step}; the last checkpoint before that is kept in "
            f"{self.settings.output_dir / 'checkpoints'}. Lower --lr, or raise --warmup-steps"
        )

    def _check_unreadable(self) -> None:
        """Name the images that could not be read; stop where they are too many. Every process must call it."""
        everywhere = set(gather_object(sorted(self.unreadable)))
        new = sorted(everywhere - self.named)
        self.named = everywhere
        for image in new if self.accelerator.is_main_process else []:
            self.bar.write(f"unreadable image, replaced by another: {unreadable_reason(self.data.train, image)}")
        share = len(everywhere) / len(self.data.train)
        if share > UNREADABLE_SHARE and len(everywhere) > 1:
            self._save()
            raise TrainingStopped(
                f"{len(everywhere)} of {len(self.data.train)} training images cannot be read (more than "
                f"{UNREADABLE_SHARE:.0%}), first "
                f"{unreadable_reason(self.data.train, min(everywhere))}; the state of step "
                f"{self.progress.step} is saved. Mend or remove them, then go on with --resume"
            )

    def _evaluate(self) -> None:
        assert self.data.val is not None
        metrics, predictions = evaluate(
            self.detector, self.data.val, self.data.test_preset, self.plan.micro_batch_size, self.accelerator,
            self.settings.num_workers,
        )  # fmt: skip
        epoch = self.progress.step * self.plan.global_batch_size / self.plan.images
        self._write({"step": self.progress.step, "epoch": epoch, **metrics})
        if self.accelerator.is_main_process:
            self.bar.write(f"step {self.progress.step}: {metrics_table(metrics)}")
            for image in predictions.unreadable:
                self.bar.write(f"unreadable image, no detections: {unreadable_reason(self.data.val, image)}")
        if metrics["bbox"]["AP"] > self.progress.best_ap:
            self.progress.best_ap = metrics["bbox"]["AP"]
            if self.accelerator.is_main_process:
                save_model(self.settings.output_dir / "best", self.detector, self.history)
        self.logged_time = time.monotonic()

    def _save(self) -> None:
        """The model, the training state and the curves. Every process must call it."""
        run = self.settings.output_dir
        if not torch.stack(torch._foreach_norm(list(self.detector.parameters()))).isfinite().all():
            raise self._diverged("the weights are")
        if self.accelerator.is_main_process:  # before the state: a run killed in between does these again
            save_model(run / "model", self.detector, self.history)
            plot_curves(self.records, run / "curves.png")
        save_training_state(run / "checkpoints", self.accelerator, self.progress.step, self.settings.keep_checkpoints)

    def _write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the trackers."""
        self.records.append(record)
        if self.accelerator.is_main_process:
            with (self.settings.output_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.settings.report_to != "none":
            masks = {f"mask {name}": value for name, value in record.get("segm", {}).items()}
            figures = {**record, **record.get("losses", {}), **record.get("bbox", {}), **masks}
            self.accelerator.log(
                {name: value for name, value in figures.items() if isinstance(value, int | float)}, record["step"]
            )

    def _catch_signals(self) -> None:
        """The first SIGTERM or SIGINT asks for a stop after the step under way; a second one ends at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask)

    def _stop_if_asked(self) -> None:
        """Where any process got a stop signal, all of them save the same step and leave."""
        number = self.stop_signal  # read once: a signal that comes after the processes agreed counts at the next step
        if self.plan.processes > 1:
            if number:
                self.accelerator.set_trigger()
            number = (number or signal.SIGTERM) if self.accelerator.check_trigger() else 0
        if number and self.progress.step < self.plan.total_steps:
            self._log() if self.losses else None
            self._save()
            name = signal.Signals(number).name
            message = f"{name}: the state of step {self.progress.step} is saved; go on with --resume"
            raise StopSignal(message, 128 + number)


def average_running_statistics(detector: Detector, accelerator: Accelerator) -> None:
    """Make BatchNorm's running statistics the mean over the processes: the model is then the same on all of them."""
    if accelerator.num_processes == 1:
        return
    statistics = running_statistics(detector)
    if statistics:
        flat = accelerator.reduce(torch.cat([stat.flatten() for stat in statistics]), reduction="mean")
        for stat, mean in zip(statistics, flat.split([stat.numel() for stat in statistics]), strict=True):
            stat.copy_(mean.view_as(stat))


def _read_records(run: Path, last_step: int) -> list[dict[str, Any]]:
    """The records of metrics.jsonl up to `last_step`; what a killed run wrote after its checkpoint is taken out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # the last line of a killed run
        if record["step"] <= last_step:
            records.append(record)
    if PartialState().is_main_process:
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        temporary.replace(path)
    return records


def _memory_gib() -> float:
    """Peak memory: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
