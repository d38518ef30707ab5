"""The training loop of both stages, on accelerate: accumulation, schedule, logging, evaluation, checkpoints, resume."""

import math
import os
import resource
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from direct_pt.batch import Batch
from direct_pt.checkpoint import History, TrainingState
from direct_pt.coco_eval import evaluate, metrics_table
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import Feed, FeedFailed, Share, unreadable_reason
from direct_pt.distributed.processes import gather_to_main, main_decides
from direct_pt.errors import StopSignal, TrainingStopped, first_names
from direct_pt.models.detector import Detector
from direct_pt.models.layers import running_statistics
from direct_pt.training.micro_batch import is_out_of_memory
from direct_pt.training.plan import Plan, smaller_micro_batches
from direct_pt.training.prepared import Sharded
from direct_pt.training.progress import Progress
from direct_pt.training.run_folder import RunFolder
from direct_pt.training.settings import Settings
from direct_pt.transforms import TestPreset

UNREADABLE_SHARE = 0.01  # of the training images, and more than one of them: the run stops
UNTIMED_STEPS, TIMED_STEPS = 2, 10  # the first steps of a process are slower than the rest
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what Slurm sends ahead of its limit
PEER_IS_GONE = ("gloo", "NCCL", "Connection", "c10d")  # in the messages of collectives that fail
ECHO_SECONDS = 5  # in which a signal that comes again is the launcher's, which passes on what all processes got


@dataclass(frozen=True)
class StepOutcome:
    """What all processes agree on after the backward pass of a step.

    Attributes:
        is_good: whether all losses, and the gradient as far as it is known, are finite and in range.
        mixed: whether some micro-batches are good and others are not.
        loss: the mean over all micro-batches.
        norm: of the gradient; None where it is not known before the update.
        stop_signal: that any process got, or 0.
    """

    is_good: bool
    mixed: bool
    loss: float
    norm: float | None
    stop_signal: int


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, what is validated on, and how."""

    feed: Feed
    val: AnnotationTable | None
    test_preset: TestPreset


class Trainer:
    """One run under way: `train` is the loop; the rest is what happens between steps."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        accelerator: Accelerator,
        sharded: Sharded,
        average: ModelEmaV3 | None,
        data: TrainingData,
        progress: Progress,
        gathered: dict[str, Any],
        history: History,
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.accelerator = accelerator
        self.sharded = sharded
        self.average = average
        self.detector: Detector = sharded.detector
        self.data = data
        self.progress = progress
        self.history = history
        self.history[-1]["steps"] = progress.step
        self.folder = RunFolder(settings.output_dir, accelerator, progress.step, settings.keep_checkpoints)
        self.unreadable: set[int] = set()
        self.named: set[int] = set()  # of this process's
        self.reasons: dict[int, str] = {}  # of all processes'
        self.losses: dict[str, Any] = dict(gathered.get("losses", {}))  # summed since the last log
        self.updates: int = gathered.get("updates", 0)  # the same, of steps that were not skipped
        self.largest_norm: float | None = gathered.get("largest_norm")  # the same, of the gradients
        self.logged_step = progress.step - gathered.get("steps", 0)
        self.logged_time = time.monotonic()
        self.first_step, self.feed_state = progress.step, gathered.get("feed")
        self.timed_seconds = 0.0
        self.kept: list[tuple[Tensor, Tensor]] | None = None  # what undoes the step under way
        self.saved_step = progress.step
        self.stop_signal, self.stop_time = 0, 0.0

    def train(self) -> None:
        """From the step reached to the last one."""
        total = self.plan.total_steps
        self._catch_signals()
        self.sharded.model.train()
        with closing(self._batches()) as batches, tqdm(
            total=total, initial=self.progress.step, desc=self.settings.stage, unit="step",
            disable=not self.accelerator.is_main_process, mininterval=1, dynamic_ncols=True,
        ) as self.bar, self._failures_named():  # fmt: skip
            if self._evaluation_due():  # the run ended between the last save and its evaluation
                self._evaluate()
            while self.progress.step < total:
                for group in self.sharded.optimizer.param_groups:
                    group["lr"] = self.plan.learning_rate(self.progress.step)
                start = time.monotonic()
                stop = self._step(batches)
                self._tell_time(time.monotonic() - start)
                self.history[-1]["steps"] = done = self.progress.step
                self.bar.update()
                if done % self.settings.log_every == 0 or done == total:
                    self._log()
                if self._evaluation_due() or done % self.settings.save_every == 0 or done == total:
                    self._save()
                if stop and (done < total or self._evaluation_due()):
                    self._save()
                    self._leave(stop)
                if self._evaluation_due():
                    self._evaluate()
        self.folder.must_be_saved(self.progress.step)
        if self.accelerator.is_main_process:
            skipped = f"; {self.progress.skipped} of {total} steps were skipped" if self.progress.skipped else ""
            print(f"done: {self.settings.output_dir / 'model'}{skipped}", flush=True)

    def _step(self, batches: Iterator[Batch]) -> int:
        """One optimizer step: forward and backward of each micro-batch, then the update. The stop signal, or 0."""
        # What a step draws is its own: a run that goes on from a checkpoint draws the same.
        torch.manual_seed(_step_seed(self.settings.seed, self.progress.step, self.accelerator.process_index))
        self._keep_statistics()
        micro_batches = [next(batches).to(self.accelerator.device) for _ in range(self.plan.accumulation)]
        sums: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        good: list[Tensor] = []  # of each micro-batch, whether its loss is finite and in range
        for batch, share in zip(micro_batches, self._shares(micro_batches), strict=True):
            with self.accelerator.accumulate(self.sharded.model):
                losses = {name: loss * share for name, loss in self.sharded.model(batch).items()}
                loss = torch.stack(list(losses.values())).sum()
                good.append(loss.detach().isfinite() & (loss.detach() <= self.progress.max_loss))
                last = len(good) == len(micro_batches)
                self.sharded.backward(loss, torch.stack(good).all() if last else None)
            total += loss.detach()
            for name, part in losses.items():
                sums[name] = sums.get(name, 0) + part.detach()
            self.unreadable.update(batch.unreadable)
        norm = self.sharded.gradient_norm()
        step = self._agree(torch.stack(good), total / len(good), norm)
        skip = not step.is_good
        if skip:
            self.sharded.leave_out()
        else:
            statistics, self.kept = self.kept, None
            overflow = step.norm is not None and not math.isfinite(step.norm)  # of fp16, whose scale is too large
            skip = self.sharded.update(self.settings.clip_grad_norm, norm, overflow)
            self.kept = statistics if skip else None
        if skip:
            self._undo()
            self._skipped([batch for batch, fine in zip(micro_batches, good, strict=True) if not fine], step.mixed)
            return step.stop_signal
        known = self.sharded.norm_after_update() if norm is None else step.norm
        known = None if known is None or not math.isfinite(known) else known
        self.progress.succeed(step.loss, known)
        if known is not None:
            self.largest_norm = max(known, self.largest_norm or 0.0)
        for name, part in sums.items():
            self.losses[name] = self.losses.get(name, 0) + part
        self.updates += 1
        average_running_statistics(self.detector, self.accelerator)
        if self.average is not None:
            self.average.update(self.sharded.whole(), self.progress.step)
        return step.stop_signal

    def _keep_statistics(self) -> None:
        """BatchNorm's, as they are before a step: it is undone where it comes to nothing."""
        self.kept = [(statistic, statistic.clone()) for statistic in running_statistics(self.detector)]

    def _undo(self) -> None:
        """The step under way, as long as the weights were not updated."""
        for statistic, before in self.kept or ():
            statistic.copy_(before)
        self.kept = None

    def _agree(self, good: Tensor, loss: Tensor, norm: Tensor | None) -> "StepOutcome":
        """What all processes make of a step, the same on all of them; the one wait for the device in it.

        Args:
            good: [accumulation] bool, of this process's micro-batches.
            loss: their mean.
            norm: of the gradient, the same on all processes.
        """
        norms = [] if norm is None else [norm.double()]
        signals = torch.tensor([self.stop_signal == number for number in STOP_SIGNALS]).to(good.device)
        sums = torch.stack([good.sum(), (~good).sum(), loss, *signals, *norms]).double()
        if self.plan.processes > 1:
            torch.distributed.all_reduce(sums)
        fine, failed, total, *told = sums.tolist()
        size = None if norm is None else told.pop() / self.plan.processes
        stop = next((number for number, count in zip(STOP_SIGNALS, told, strict=True) if count), 0)
        overflow = size is not None and not math.isfinite(size) and self.accelerator.scaler is None
        return StepOutcome(not failed and not overflow, bool(fine and failed), total / self.plan.processes, size, stop)

    def _skipped(self, batches: list[Batch], mixed: bool) -> None:
        """Count a step without an update; too many in a row end the run. Every process must call it.

        Args:
            batches: this process's micro-batches that failed.
            mixed: whether others were good.
        """
        progress = self.progress
        progress.fail(mixed)
        images = [image for batch in batches for image in batch.indices.tolist()]
        names = gather_object([Path(self.data.feed.image_name(image)).name for image in images])
        names_text = first_names(names, 8)
        one_batch = self.plan.accumulation * self.plan.processes == 1
        if self.accelerator.is_main_process:
            # Where a step is a single batch, the first one to fail comes after good ones, as far as is known.
            named = mixed or (one_batch and progress.skipped_in_a_row == 1)
            what = "a gradient" if not names else f"the loss of images {names_text}" if named else "every loss"
            limit = f", or over {progress.max_loss:.3g}" if names and math.isfinite(progress.max_loss) else ""
            self.bar.write(f"step {progress.step} skipped: {what} is not finite{limit}", file=sys.stderr)
        if not progress.must_stop(self.plan.total_steps):
            return
        if progress.has_diverged:
            self._stop_diverged()
        self.history[-1]["steps"] = progress.step
        self._save()
        self.folder.must_be_saved(progress.step)
        raise TrainingStopped(
            f"{progress.skipped_in_a_row} steps in a row were skipped, as the losses of some images among good ones "
            f"were not finite or far out of range, in the last one of images {names_text}; the state of step "
            f"{progress.step}, with the weights from before them, is saved. Look at those images' annotations, then go "
            "on with --resume"
        )

    def _stop_diverged(self) -> NoReturn:
        """Put the weights of a run that has diverged out of the way, and say what happened. Every process must call
        it."""
        first, result = self.progress.first_failed_step, self._result()
        left = main_decides(
            lambda: self.folder.set_aside_diverged(self.progress.calm_step, result, self.history),
            self.accelerator.state,
        )
        in_warmup = first <= self.plan.warmup_steps
        lr = self.plan.learning_rate(first - 1)
        advice = [f"a lower rate, such as --lr {(lr if in_warmup else self.plan.lr) / 4:.2g}"]
        if in_warmup:
            advice.append("a longer --warmup-steps")
        if self.settings.clip_grad_norm is None:
            advice.append("--clip-grad-norm 10")
        if self.accelerator.scaler is not None:
            advice.append("--mixed-precision bf16")
        raise TrainingStopped(
            f"the run has diverged: {self.progress.describe_divergence(lr)}. {left}. Go on with --resume and "
            + ", or ".join(advice)
        )

    def _shares(self, micro_batches: list[Batch]) -> list[Tensor | float]:
        """What each micro-batch's losses are multiplied by to make the step's the same as of one large batch."""
        weights = [weight for batch in micro_batches if (weight := self.detector.loss_weight(batch)) is not None]
        if not weights:
            return [1.0] * len(micro_batches)
        mean = self.accelerator.reduce(torch.stack(weights).float().mean(), reduction="mean")
        return [weight / mean for weight in weights]

    def _batches(self) -> Generator[Batch, None, None]:
        plan, process = self.plan, self.accelerator.process_index
        a_step = plan.accumulation * plan.processes  # micro-batches
        steps = self.progress.step, plan.total_steps
        return self.data.feed.batches(
            Share(plan.micro_batch_size, steps[0] * a_step, steps[1] * a_step, process, plan.processes), self.feed_state
        )

    def _tell_time(self, spent: float) -> None:
        """What the run will take, once some steps have been timed; `spent` are the seconds of the latest one."""
        timed = self.progress.step - self.first_step - UNTIMED_STEPS
        left = self.plan.total_steps - self.progress.step
        self.timed_seconds += spent if timed > 0 else 0
        if timed != TIMED_STEPS or not left or not self.accelerator.is_main_process:
            return
        seconds = self.timed_seconds / TIMED_STEPS
        end = time.strftime("%a %H:%M", time.localtime(time.time() + left * seconds))
        evaluations = "no evaluation"
        if self.data.val is not None:
            every = self.plan.eval_steps
            wait = min(-self.progress.step % every, left)
            evaluations = (
                f"evaluation every {every:,} steps, which comes on top, the next one after step "
                f"{self.progress.step + wait:,} in {duration(wait * seconds)}"
            )
        self.bar.write(
            f"  time       {seconds:.2g} s a step: {duration(left * seconds)} for the other {left:,} steps, until "
            f"about {end}; {evaluations}"
        )

    def _log(self) -> None:
        """Average the losses since the last time over the processes, write them down. Every process must call it."""
        done, steps = self.progress.step, self.progress.step - self.logged_step
        names = list(self.losses)
        device = self.accelerator.device
        values = (*self.losses.values(), len(self.unreadable))
        sums = torch.stack([torch.as_tensor(value).to(device, torch.float64) for value in values])
        means = self.accelerator.reduce(sums, reduction="mean").tolist()
        count = max(1, self.updates) * self.plan.accumulation
        losses = {name: value / count for name, value in zip(names, means, strict=False)}
        elapsed = time.monotonic() - self.logged_time
        record = {
            "step": done,
            "epoch": done * self.plan.global_batch_size / self.plan.images,
            "loss": sum(losses.values()) if losses else None,  # of skipped steps alone
            "losses": losses,
            "lr": self.plan.learning_rate(done - 1),
            "gradient_norm": self.largest_norm,  # the largest since the last line
            "images_per_second": steps * self.plan.global_batch_size / elapsed,
            "memory_gib": _memory_gib(),
        }
        if self.progress.skipped:
            record["skipped"] = self.progress.skipped
        self.losses, self.updates, self.largest_norm = {}, 0, None
        self.logged_step, self.logged_time = done, time.monotonic()
        self.bar.set_postfix_str(
            f"loss {record['loss'] or math.nan:.3f}, lr {record['lr']:.2g}, "
            f"{record['images_per_second']:.1f} images/s, {record['memory_gib']:.1f} GiB"
        )
        self.folder.add(record)
        self._track(record)
        if means[-1] > 0:
            self._check_unreadable()

    def _check_unreadable(self) -> None:
        """Name the images that could not be read; stop where they are too many. Every process must call it."""
        mine = [(image, self.data.feed.unreadable_reason(image)) for image in sorted(self.unreadable - self.named)]
        self.named |= self.unreadable
        new = {image: reason for image, reason in gather_object(mine) if image not in self.reasons}
        self.reasons |= new
        for image in sorted(new) if self.accelerator.is_main_process else []:
            self.bar.write(f"unreadable image, replaced by another: {new[image]}")
        share = len(self.reasons) / len(self.data.feed)
        if share > UNREADABLE_SHARE and len(self.reasons) > 1:
            self._save()
            self.folder.must_be_saved(self.progress.step)
            raise TrainingStopped(
                f"{len(self.reasons)} of {len(self.data.feed)} training images cannot be read (more than "
                f"{UNREADABLE_SHARE:.0%}), first {self.reasons[min(self.reasons)]}; the state of step "
                f"{self.progress.step} is saved. Mend or remove them, then go on with --resume"
            )

    def _evaluation_due(self) -> bool:
        """Whether the step reached is one to evaluate at, and that was not done yet."""
        done = self.progress.step
        due = done > 0 and (done % self.plan.eval_steps == 0 or done == self.plan.total_steps)
        return due and self.data.val is not None and self.folder.evaluated_step != done

    def _evaluate(self) -> None:
        """Metrics of the weights as saved. A stop signal ends it: it is done anew after the resumption."""
        assert self.data.val is not None
        detector, start = self._result(), time.monotonic()
        metrics, predictions = evaluate(
            detector, self.data.val, self.data.test_preset, self.plan.micro_batch_size, self.accelerator,
            self.settings.num_workers, self._leave_if_asked,
        )  # fmt: skip
        epoch = self.progress.step * self.plan.global_batch_size / self.plan.images
        record = {"step": self.progress.step, "epoch": epoch, **metrics}
        self.folder.add_evaluation(record, detector, self.history)
        self._track(record)
        if self.accelerator.is_main_process:
            spent = duration(time.monotonic() - start)
            self.bar.write(f"step {self.progress.step} ({spent}): {metrics_table(metrics)}")
            for image in predictions.unreadable:
                self.bar.write(f"unreadable image, no detections: {unreadable_reason(self.data.val, image)}")
        self.logged_time += time.monotonic() - start  # the steps' speed is not that of what comes between them

    def _result(self) -> Detector:
        """What is evaluated and handed on: the weights, or their moving average. Every process must call it."""
        return self.sharded.whole() if self.average is None else self.average.module

    def _save(self) -> None:
        """The model and the training state, by the main process. Every process must call it."""
        if self.saved_step == self.progress.step:
            return
        whole, result, optimizer = self.sharded.whole(), self._result(), self.sharded.optimizer_state()
        gathered = {
            "losses": {name: float(value) for name, value in self.losses.items()},
            "updates": self.updates,
            "largest_norm": self.largest_norm,
            "steps": self.progress.step - self.logged_step,
            "feed": self.data.feed.state((self.progress.step - self.first_step) * self.plan.accumulation),
        }
        scaler = self.accelerator.scaler
        state = TrainingState(
            progress=self.progress,
            weights=whole.state_dict(),
            optimizer=optimizer,
            average=None if self.average is None else result.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            of_processes=gather_to_main(gathered, self.accelerator),
            micro_batch_size=self.plan.micro_batch_size,
        )
        self.saved_step = self.progress.step
        self.folder.save(state, result, self.history)
        # Who left before, told to stop, would have the launcher end the one that saves.
        self.accelerator.wait_for_everyone()

    def _track(self, record: dict[str, Any]) -> None:
        """Tell the trackers."""
        if self.settings.report_to == "none":
            return
        masks = {f"mask {name}": value for name, value in record.get("segm", {}).items()}
        figures = {**record, **record.get("losses", {}), **record.get("bbox", {}), **masks}
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, record["step"])

    def _catch_signals(self) -> None:
        """The first stop signal asks for a stop after the step under way; another one, later, ends at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_signal and time.monotonic() - self.stop_time > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            elif not self.stop_signal:
                self.stop_signal, self.stop_time = number, time.monotonic()

        for number in STOP_SIGNALS:
            signal.signal(number, ask)

    def _leave_if_asked(self) -> None:
        """Between the batches of an evaluation, each process for itself: the state is saved already."""
        if self.stop_signal:
            self._leave(self.stop_signal)

    def _leave(self, number: int) -> NoReturn:
        self.folder.must_be_saved(self.progress.step)
        status = 128 + (number if number == signal.SIGINT else signal.SIGTERM)
        message = f"{signal.Signals(number).name}: the state of step {self.progress.step} is saved; go on with --resume"
        raise StopSignal(message, status)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """What ends a run from outside, in words: no memory left, another process gone."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            first_line = next(iter(str(error).splitlines()), "")
            if is_out_of_memory(error):
                smaller = smaller_micro_batches(self.plan)
                advice = (
                    f"--micro-batch-size {smaller[0]}, which keeps the global batch" if smaller else "a larger card"
                )
                what = f"out of memory with {self.plan.micro_batch_size} images at once ({first_line})"
                advice = f"--resume and {advice}, or --gradient-checkpointing"
            elif isinstance(error, FeedFailed):
                what, advice = f"{self.data.feed.source} cannot be read on ({first_line})", "--resume"
            elif "DataLoader worker" in str(error):
                what, advice = f"a process that reads images ended ({first_line})", "--resume and fewer --num-workers"
            elif self.plan.processes > 1 and any(word in str(error) for word in PEER_IS_GONE):
                if self.stop_signal and self.saved_step == self.progress.step:  # the others left an evaluation first
                    self._leave(self.stop_signal)
                what = f"another of the {self.plan.processes} processes is gone or stuck ({first_line})"
                advice = "--resume"
            else:
                raise
            if self.plan.processes == 1 and self.kept is not None:  # several could not agree on a save any more
                self._undo()
                self._save()
            raise TrainingStopped(
                f"step {self.progress.step + 1}: {what}; {self.folder.newest_checkpoint()}; go on with {advice}"
            ) from error


def average_running_statistics(detector: Detector, accelerator: Accelerator) -> None:
    """Make BatchNorm's running statistics the mean over the processes: the model is then the same on all of them."""
    if accelerator.num_processes == 1:
        return
    statistics = running_statistics(detector)
    if statistics:
        flat = accelerator.reduce(torch.cat([stat.flatten() for stat in statistics]), reduction="mean")
        for stat, mean in zip(statistics, flat.split([stat.numel() for stat in statistics]), strict=True):
            stat.copy_(mean.view_as(stat))


def duration(seconds: float) -> str:
    """In words, in the unit that fits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _step_seed(seed: int, step: int, process: int) -> int:
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def _memory_gib() -> float:
    """Peak memory: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
