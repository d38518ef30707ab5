"""The training loop of both stages: steps with accumulation, then logging, checkpoints, evaluations between them."""

import math
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from direct_pt.batch import Batch
from direct_pt.checkpoint import History
from direct_pt.coco_eval import evaluate, metrics_table
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import Feed, Share, unreadable_reason
from direct_pt.distributed.processes import gather_to_main, main_decides
from direct_pt.errors import StopSignal, TrainingStopped, first_names, printable, printable_lines
from direct_pt.models.detector import Detector
from direct_pt.models.layers import running_statistics
from direct_pt.program.signals import END_SIGNALS, TIME_IS_UP, StopSignals
from direct_pt.recipes import Recipe
from direct_pt.reports.evaluation import Judged
from direct_pt.training.checkpoints import TrainingState
from direct_pt.training.failures import divergence_advice, explain_failure, is_lost_peer
from direct_pt.training.norm_statistics import average_running_statistics, recompute_statistics
from direct_pt.training.plan import Plan
from direct_pt.training.prepared import PreparedModel
from direct_pt.training.progress import Progress
from direct_pt.training.run_folder import RunFolder
from direct_pt.training.run_log import RunLog, duration
from direct_pt.training.settings import RunOptions
from direct_pt.training.trackers import Trackers
from direct_pt.training.unreadable import UnreadableImages
from direct_pt.transforms import TestPreset


@dataclass
class Run:
    """Everything that a run is made of.

    Attributes:
        title: of the stage, "pretrain" or "finetune".
        options: where it is written, and how often something is saved or logged.
        recipe: whose numbers are the plan's defaults.
        plan: batch, steps and learning rate.
        clip_grad_norm: maximum norm of a step's gradient; None for no limit.
        accelerator: device, precision and processes.
        model: the detector and its optimizer.
        average: moving average of the weights, which is then what is evaluated and kept; or None.
        feed: where training batches come from.
        val: what is evaluated on; None for no evaluation.
        test_preset: the transform of those images.
        progress: how far it has come.
        recompute_norm: whether BatchNorm's statistics are computed anew at the end.
        history: one dictionary a stage of training, this one the last.
        trackers: that get its figures.
        saved_log: what this process had gathered since the last log line of a resumed run.
    """

    title: str
    options: RunOptions
    recipe: Recipe
    plan: Plan
    clip_grad_norm: float | None
    accelerator: Accelerator
    model: PreparedModel
    average: ModelEmaV3 | None
    feed: Feed
    val: AnnotationTable | None
    test_preset: TestPreset
    progress: Progress
    recompute_norm: bool
    history: History
    trackers: Trackers
    saved_log: dict[str, Any] = field(default_factory=dict)


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


class Trainer:
    """A run under way: `train` is the loop; the rest is what happens in a step and between steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.plan, self.options, self.accelerator = run.plan, run.options, run.accelerator
        self.model, self.detector, self.progress = run.model, run.model.detector, run.progress
        self.folder = RunFolder(
            run.options.output_dir, run.accelerator, run.progress.step, run.options.keep_checkpoints
        )
        self.log = RunLog(run.plan, run.accelerator, run.progress.step, run.saved_log)
        self.signals = StopSignals()
        self.unreadable = UnreadableImages(run.feed)
        self.saved_statistics: list[tuple[Tensor, Tensor]] = []  # restored if the step under way is skipped
        self.in_step = False  # whether a step has begun that has not updated the weights yet
        self.saved_step = self.first_step = run.progress.step
        run.history[-1]["steps"] = run.progress.step
        self.signals.catch(run.options.max_hours)

    def train(self) -> None:
        """Train from the step reached to the last one."""
        total, options = self.plan.total_steps, self.options
        self.model.model.train()
        with closing(self._batches()) as batches, tqdm(
            total=total, initial=self.progress.step, desc=self.run.title, unit="step",
            disable=not self.accelerator.is_main_process, mininterval=1, dynamic_ncols=True,
        ) as self.bar, self._failures_explained():  # fmt: skip
            if self._evaluation_due():  # the run ended between the last save and its evaluation
                self._evaluate()
            while self.progress.step < total and not self.folder.is_stale(options.patience, options.min_delta):
                for group in self.model.optimizer.param_groups:
                    group["lr"] = self.plan.learning_rate(self.progress.step)
                start = time.monotonic()
                stop = self._step(batches)
                estimate = self.log.estimate(self.progress.step, time.monotonic() - start, self.run.val is not None)
                if estimate and self.accelerator.is_main_process:
                    self.bar.write(estimate)
                self.run.history[-1]["steps"] = done = self.progress.step
                self.bar.update()
                if done == total and self.run.recompute_norm:
                    recompute_statistics(self._result(), self.run.feed, self.plan, self.accelerator)
                if done % options.log_every == 0 or done == total:
                    self._log()
                if self._evaluation_due() or done % options.save_every == 0 or done == total:
                    self._save()
                if stop and (done < total or self._evaluation_due()):
                    self._save()
                    self._exit(stop)
                if self._evaluation_due():
                    self._evaluate()
        self.folder.must_be_saved(done := self.progress.step)
        if self.accelerator.is_main_process:
            skipped = f"; {self.progress.skipped} of {done} steps were skipped" if self.progress.skipped else ""
            early = (
                f"; stopped at step {done} of {total}, {self.folder.describe_best(options.patience, options.min_delta)}"
                if done < total
                else ""
            )
            print(printable(f"done: {options.output_dir / 'model'}{skipped}{early}"), flush=True)

    def _batches(self) -> Generator[Batch, None, None]:
        plan, process = self.plan, self.accelerator.process_index
        per_step = plan.accumulation * plan.processes  # micro-batches
        start, stop = self.progress.step * per_step, plan.total_steps * per_step
        share = Share(plan.micro_batch_size, start, stop, process, plan.processes)
        return self.run.feed.batches(share, self.run.saved_log.get("feed"))

    def _step(self, batches: Iterator[Batch]) -> int:
        """One optimizer step: forward and backward of each micro-batch, then the update. The stop signal, or 0."""
        # Random numbers depend on seed, step and process alone: a resumed run draws the same ones.
        seeds = np.random.SeedSequence((self.options.seed, self.progress.step, self.accelerator.process_index))
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        self.saved_statistics = [(statistic, statistic.clone()) for statistic in running_statistics(self.detector)]
        self.in_step = True
        micro_batches = [next(batches).to(self.accelerator.device) for _ in range(self.plan.accumulation)]
        sums: dict[str, Tensor] = {}
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        good: list[Tensor] = []  # of each micro-batch, whether its loss is finite and in range
        for batch, weight in zip(micro_batches, self._loss_weights(micro_batches), strict=True):
            with self.accelerator.accumulate(self.model.model):
                losses = {name: loss * weight for name, loss in self.model.model(batch).items()}
                loss = torch.stack(list(losses.values())).sum()
                good.append(loss.detach().isfinite() & (loss.detach() <= self.progress.max_loss))
                is_last = len(good) == len(micro_batches)
                self.model.backward(loss, torch.stack(good).all() if is_last else None)
            total += loss.detach()
            for name, part in losses.items():
                sums[name] = sums.get(name, 0) + part.detach()
            self.unreadable.own.update(batch.unreadable)
        norm = self.model.gradient_norm()
        step = self._agree(torch.stack(good), total / len(good), norm)
        skip = not step.is_good
        if skip:
            self.model.discard_gradients()
        else:
            self.in_step = False  # from here on the weights may have changed
            overflow = step.norm is not None and not math.isfinite(step.norm)  # of fp16: its loss scale is too large
            skip = self.model.update(self.run.clip_grad_norm, norm, overflow)
        if skip:
            self._restore_statistics()
            self._count_skipped(
                [batch for batch, is_good in zip(micro_batches, good, strict=True) if not is_good], step
            )
            return step.stop_signal
        known = self.model.norm_after_update() if norm is None else step.norm
        known = None if known is None or not math.isfinite(known) else known
        self.progress.succeed(step.loss, known)
        self.log.add_update(sums, known)
        average_running_statistics(self.detector, self.accelerator)
        if self.run.average is not None:
            self.run.average.update(self.model.full_detector(), self.progress.step)
        return step.stop_signal

    def _loss_weights(self, micro_batches: list[Batch]) -> list[Tensor | float]:
        """What each micro-batch's losses are multiplied by, so that the step equals one of a single large batch."""
        weights = [weight for batch in micro_batches if (weight := self.detector.loss_weight(batch)) is not None]
        if not weights:
            return [1.0] * len(micro_batches)
        mean = self.accelerator.reduce(torch.stack(weights).float().mean(), reduction="mean")
        return [weight / mean for weight in weights]

    def _agree(self, good: Tensor, loss: Tensor, norm: Tensor | None) -> StepOutcome:
        """The outcome of a step, the same on all processes; the one wait for the device in it.

        Args:
            good: [accumulation] bool, of this process's micro-batches.
            loss: their mean.
            norm: of the gradient, the same on all processes.
        """
        norms = [] if norm is None else [norm.double()]
        signals = torch.tensor([self.signals.number == number for number in END_SIGNALS]).to(good.device)
        sums = torch.stack([good.sum(), (~good).sum(), loss, *signals, *norms]).double()
        if self.plan.processes > 1:
            torch.distributed.all_reduce(sums)
        succeeded, failed, total, *rest = sums.tolist()
        size = None if norm is None else rest.pop() / self.plan.processes
        stop = next((number for number, count in zip(END_SIGNALS, rest, strict=True) if count), 0)
        overflow = size is not None and not math.isfinite(size) and self.accelerator.scaler is None
        mixed = bool(succeeded and failed)
        return StepOutcome(not failed and not overflow, mixed, total / self.plan.processes, size, stop)

    def _restore_statistics(self) -> None:
        """BatchNorm's, as they were before the step under way."""
        for statistic, before in self.saved_statistics:
            statistic.copy_(before)
        self.in_step = False

    def _count_skipped(self, failed: list[Batch], step: StepOutcome) -> None:
        """Count a step without an update; too many in a row end the run. Every process must call it.

        Args:
            failed: this process's micro-batches that failed.
            step: its outcome.
        """
        progress = self.progress
        progress.fail(step.mixed, self.plan.learning_rate(progress.step))
        images = [image for batch in failed for image in batch.indices.tolist()]
        names = gather_object([Path(self.run.feed.image_name(image)).name for image in images])
        names_text = printable(first_names(names, 8))
        if self.accelerator.is_main_process:
            # Where a step is a single batch, the first one to fail comes after good ones, as far as is known.
            single = self.plan.accumulation * self.plan.processes == 1
            named = step.mixed or (single and progress.skipped_in_a_row == 1)
            what = "a gradient" if not names else f"the loss of images {names_text}" if named else "every loss"
            limit = f", or over {progress.max_loss:.3g}" if names and math.isfinite(progress.max_loss) else ""
            self.bar.write(f"step {progress.step} skipped: {what} is not finite{limit}", file=sys.stderr)
        if not progress.must_stop(self.plan.total_steps):
            return
        if progress.has_diverged:
            self._stop_diverged()
        self.run.history[-1]["steps"] = progress.step
        self._save()
        self.folder.must_be_saved(progress.step)
        raise TrainingStopped(
            f"{progress.skipped_in_a_row} steps in a row were skipped, as the losses of some images among good ones "
            f"were not finite or far out of range, in the last one of images {names_text}; the state of step "
            f"{progress.step}, with the weights from before them, is saved. Look at those images' annotations, then "
            "continue with --resume"
        )

    def _stop_diverged(self) -> NoReturn:
        """Put the weights of a run that has diverged aside, and report it. Every process must call it."""
        first, result = self.progress.first_failed_step, self._result()
        outcome = main_decides(
            lambda: self.folder.set_aside_diverged(self.progress.calm_step, result, self.run.history),
            self.accelerator.state,
        )
        lr = self.progress.failed_lr or self.plan.learning_rate(first - 1)
        uses_fp16 = self.accelerator.scaler is not None
        advice = divergence_advice(self.plan, self.run.recipe, first, lr, self.run.clip_grad_norm, uses_fp16)
        raise TrainingStopped(
            f"the run has diverged: {self.progress.describe_divergence(lr)}. {outcome}. Continue with --resume and "
            f"{advice}"
        )

    def _log(self) -> None:
        """Write a log line; report unreadable images. Every process must call it."""
        progress = self.progress
        record, some_unreadable = self.log.next_record(progress.step, progress.skipped, len(self.unreadable.own))
        self.bar.set_postfix_str(
            f"loss {record['loss'] or math.nan:.3f}, lr {record['lr']:.2g}, "
            f"{record['images_per_second']:.1f} images/s, {record['memory_gib']:.1f} GiB"
        )
        self.folder.add(record)
        self.run.trackers.log(record)
        if some_unreadable:
            self._report_unreadable()

    def _report_unreadable(self) -> None:
        """Name images that could not be read; stop where they are too many. Every process must call it."""
        if too_many := self.unreadable.report(self.bar.write if self.accelerator.is_main_process else None):
            self._save()
            self.folder.must_be_saved(self.progress.step)
            raise TrainingStopped(
                f"{too_many}; the state of step {self.progress.step} is saved. Mend or remove them, then continue with "
                "--resume"
            )

    def _evaluation_due(self) -> bool:
        """Whether to evaluate at the step reached, where that was not done yet."""
        done = self.progress.step
        due = done > 0 and (done % self.plan.eval_steps == 0 or done == self.plan.total_steps)
        return due and self.run.val is not None and self.folder.evaluated_step != done

    def _evaluate(self) -> None:
        """Metrics of the weights as saved. A stop signal ends it: it is repeated after the resumption."""
        assert self.run.val is not None
        detector, start = self._result(), time.monotonic()
        metrics, predictions = evaluate(
            detector, self.run.val, self.run.test_preset, self.plan.micro_batch_size, self.accelerator,
            self.options.num_workers, self._exit_if_signalled, with_losses=True,
        )  # fmt: skip
        epoch = self.progress.step * self.plan.global_batch_size / self.plan.images
        record = {"step": self.progress.step, "epoch": epoch, **metrics}
        judged = Judged.of(self.run.val, predictions, metrics) if self.accelerator.is_main_process else None
        self.folder.add_evaluation(record, detector, self.run.history, judged)
        self.run.trackers.log(record)
        self.run.trackers.log_pictures(self.folder.pictures(record["step"]), record["step"])
        seconds = time.monotonic() - start
        if self.accelerator.is_main_process:
            loss = f"validation loss {metrics.get('val_loss') or math.nan:.3f}, {duration(seconds)}"
            self.bar.write(f"step {self.progress.step} ({loss}): {printable_lines(metrics_table(metrics))}")
            for image in predictions.unreadable:
                self.bar.write(f"unreadable image, no detections: {printable(unreadable_reason(self.run.val, image))}")
        self.log.exclude(seconds)

    def _result(self) -> Detector:
        """What is evaluated and kept: the weights, or their moving average. Every process must call it."""
        return self.model.full_detector() if self.run.average is None else self.run.average.module

    def _save(self) -> None:
        """The model and the training state, by the main process. Every process must call it."""
        if self.saved_step == self.progress.step:
            return
        detector, result, optimizer = self.model.full_detector(), self._result(), self.model.optimizer_state()
        micro_batches = (self.progress.step - self.first_step) * self.plan.accumulation
        log = {**self.log.state(self.progress.step), "feed": self.run.feed.state(micro_batches)}
        scaler = self.accelerator.scaler
        state = TrainingState(
            progress=self.progress,
            weights=detector.state_dict(),
            optimizer=optimizer,
            average=None if self.run.average is None else result.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            of_processes=gather_to_main(log, self.accelerator),
            micro_batch_size=self.plan.micro_batch_size,
        )
        self.saved_step = self.progress.step
        self.folder.save(state, result, self.run.history)
        self.accelerator.wait_for_everyone()  # a process that exits first makes the launcher kill the one that saves

    def _exit_if_signalled(self) -> None:
        """Between the batches of an evaluation, each process for itself: the state is saved already."""
        if self.signals.number:
            self._exit(self.signals.number)

    def _exit(self, number: int) -> NoReturn:
        """End the run after a stop signal; its state is saved."""
        self.folder.must_be_saved(self.progress.step)
        name = "--max-hours" if number == TIME_IS_UP else signal.Signals(number).name
        status = 0 if number == TIME_IS_UP else 128 + (number if number == signal.SIGINT else signal.SIGTERM)
        raise StopSignal(f"{name}: the state of step {self.progress.step} is saved; continue with --resume", status)

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        """Explains what ends a run from outside: no memory left, another process lost, data that are gone."""
        try:
            yield
        except (RuntimeError, MemoryError, ValueError) as error:
            if self.signals.number and self.saved_step == self.progress.step and is_lost_peer(error, self.plan):
                self._exit(self.signals.number)  # the others left an evaluation first
            explained = explain_failure(error, self.plan, self.run.feed.source)
            if explained is None:
                raise
            what, advice = explained
            if self.plan.processes == 1 and self.in_step:  # several processes could not agree on a save any more
                self._restore_statistics()
                self._save()
            raise TrainingStopped(
                f"step {self.progress.step + 1}: {what}; {self.folder.newest_checkpoint()}; continue with {advice}"
            ) from error
