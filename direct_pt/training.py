"""The training loop of both stages, on accelerate: accumulation, schedule, logging, evaluation, checkpoints, resume."""

import json
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from direct_pt.batch import Batch
from direct_pt.checkpoint import (
    CONFIG,
    History,
    Progress,
    checkpoints,
    from_pretrained,
    read_history,
    save_model,
    save_training_state,
    write_json,
)
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import Preset, SampleOrder, aspect_groups, training_loader
from direct_pt.data.sources import load_split
from direct_pt.data.transforms import FinetunePreset, PretrainPreset, TestPreset
from direct_pt.device import count_processes, make_accelerator
from direct_pt.errors import InputError, StopSignal, TrainingStopped
from direct_pt.evaluation import evaluate, metrics_table
from direct_pt.models.backbone import batchnorms, running_statistics
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.recipes import LEAST_BATCHNORM_IMAGES
from direct_pt.settings import FREE_ON_RESUME, Plan, Settings, make_plan
from direct_pt.visualize import plot_curves

UNREADABLE_SHARE = 0.01  # of the training images, and more than one of them: the run stops
WITH_MASKS = False  # no detector learns from masks yet


def run_stage(settings: Settings) -> None:
    """Train one stage from its settings to the model folder.

    Raises:
        InputError: something that the user can mend, found before training.
        TrainingStopped: training cannot go on; the state is saved.
        StopSignal: a stop signal came; the state is saved.
    """
    run = settings.output_dir
    _check_output(settings)
    splits = settings.splits()
    if "train" not in splits:
        raise InputError("no training split: --data has no instances_train file; give --train-images as well")
    train_table = load_split(splits["train"])
    val_table = load_split(splits["val"], like=train_table) if "val" in splits else None
    if settings.drop_empty:
        train_table = train_table.without_empty_images()
    if not len(train_table):
        raise InputError(f"{train_table.source}: no image has an object to learn, and --drop-empty leaves none")

    plan = make_plan(settings, len(train_table), count_processes())
    set_seed(settings.seed)
    detector, history, origin = _initial_detector(settings, train_table)
    accelerator = make_accelerator(
        settings.mixed_precision,
        gradient_accumulation_steps=plan.accumulation,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=str(run),
        # BatchNorm statistics are averaged over the processes, not copied from the first one before each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    set_seed(settings.seed, device_specific=True)
    history = [*history, _history_entry(settings, plan)]
    optimizer = torch.optim.SGD(
        parameter_groups(detector, settings.recipe.weight_decay), lr=plan.lr, momentum=settings.recipe.momentum
    )
    progress = Progress()
    detector.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPU and GPU
    model, optimizer = accelerator.prepare(detector, optimizer)
    accelerator.register_for_checkpointing(progress)
    if settings.resume and (saved := checkpoints(run / "checkpoints")):
        accelerator.load_state(str(saved[-1]))
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / CONFIG, {"settings": settings.to_dict(), "plan": asdict(plan), "git": _git_revision()})
        print(banner(settings, plan, detector, train_table, val_table, accelerator, origin, progress), flush=True)
    accelerator.wait_for_everyone()
    if settings.report_to != "none":
        accelerator.init_trackers("tensorboard")
    _Run(settings, plan, accelerator, model, optimizer, train_table, val_table, progress, history).train()
    accelerator.end_training()


class _Run:
    """One run under way: `train` is the loop; the rest is what happens between steps."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_table: AnnotationTable,
        val_table: AnnotationTable | None,
        progress: Progress,
        history: History,
    ) -> None:
        self.settings = settings
        self.plan = plan
        self.accelerator = accelerator
        self.model = model
        self.detector: Detector = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.train_table = train_table
        self.val_table = val_table
        self.progress = progress
        self.history = history
        self.preset, self.test_preset = presets(settings)
        self.records = _read_records(settings.output_dir, progress.step)
        self.unreadable: set[int] = set()
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
        bar = tqdm(
            total=total, initial=self.progress.step, desc=self.settings.stage, unit="step",
            disable=not self.accelerator.is_main_process, mininterval=1, dynamic_ncols=True,
        )  # fmt: skip
        self.bar = bar
        for step in range(self.progress.step, total):
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.learning_rate(step)
            self._step(batches)
            average_running_statistics(self.detector, self.accelerator)
            self.progress.step = step + 1
            bar.update()
            done = self.progress.step
            due_evaluation = self.val_table is not None and (done % self.plan.eval_steps == 0 or done == total)
            due_save = due_evaluation or done % self.settings.save_every == 0 or done == total
            if done % self.settings.log_every == 0 or due_save:
                self._log()
            if due_evaluation:
                self._evaluate()
            if due_save:
                self._save()
            self._stop_if_asked()
        bar.close()
        if self.accelerator.is_main_process:
            print(f"done: {self.settings.output_dir / 'model'}", flush=True)

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: forward and backward of each micro-batch, then the update."""
        for _ in range(self.plan.accumulation):
            batch = next(batches).to(self.accelerator.device)
            with self.accelerator.accumulate(self.model):
                losses = self.model(batch)
                self.accelerator.backward(torch.stack(list(losses.values())).sum())
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, loss in losses.items():
                self.losses[name] = self.losses.get(name, 0) + loss.detach()
            self.unreadable.update(batch.unreadable)

    def _batches(self) -> Iterator[Batch]:
        plan, settings = self.plan, self.settings
        groups = aspect_groups(self.train_table) if settings.stage == "finetune" else None
        order = SampleOrder(len(self.train_table), settings.seed, plan.micro_batch_size, groups)
        a_step = plan.accumulation * plan.processes  # micro-batches
        part = (
            self.progress.step * a_step,
            plan.total_steps * a_step,
            self.accelerator.process_index,
            plan.processes,
        )
        return iter(training_loader(self.train_table, self.preset, order, part, WITH_MASKS, settings.num_workers))

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
        if not torch.isfinite(torch.tensor(record["loss"])):
            raise TrainingStopped(
                f"the loss is not finite after step {done} ({losses}); the last checkpoint is kept in "
                f"{self.settings.output_dir / 'checkpoints'}. Lower --lr, or raise --warmup-steps"
            )
        self.bar.set_postfix_str(
            f"loss {record['loss']:.3f}, lr {record['lr']:.2g}, {record['images_per_second']:.1f} images/s, "
            f"{record['memory_gib']:.1f} GiB"
        )
        self._write(record)
        if means[-1] > 0:
            self._check_unreadable()

    def _check_unreadable(self) -> None:
        """Name the images that could not be read; stop where they are too many. Every process must call it."""
        everywhere = set(gather_object(sorted(self.unreadable)))
        new = sorted(everywhere - getattr(self, "named", set()))
        self.named = everywhere
        for image in new:
            self.bar.write(f"unreadable image, replaced by another: {self.train_table.path(image)}")
        share = len(everywhere) / len(self.train_table)
        if share > UNREADABLE_SHARE and len(everywhere) > 1:
            self._save()
            raise TrainingStopped(
                f"{len(everywhere)} of {len(self.train_table)} training images cannot be read (more than "
                f"{UNREADABLE_SHARE:.0%}), first {self.train_table.path(min(everywhere))}; the state of step "
                f"{self.progress.step} is saved. Mend or remove them, then go on with --resume"
            )

    def _evaluate(self) -> None:
        assert self.val_table is not None
        metrics, predictions = evaluate(
            self.detector, self.val_table, self.test_preset, self.plan.micro_batch_size, self.accelerator,
            self.settings.num_workers,
        )  # fmt: skip
        epoch = self.progress.step * self.plan.global_batch_size / self.plan.images
        self._write({"step": self.progress.step, "epoch": epoch, **metrics})
        if self.accelerator.is_main_process:
            names = [str(self.val_table.path(image)) for image in predictions.unreadable]
            self.bar.write(f"step {self.progress.step}: {metrics_table(metrics)}")
            if names:
                self.bar.write(f"{len(names)} validation images cannot be read and have no detections: {names[:5]}")
        if metrics["bbox"]["AP"] > self.progress.best_ap:
            self.progress.best_ap = metrics["bbox"]["AP"]
            if self.accelerator.is_main_process:
                save_model(self.settings.output_dir / "best", self.detector, self.history)
        self.logged_time = time.monotonic()

    def _save(self) -> None:
        """The model, the training state and the curves. Every process must call it."""
        run = self.settings.output_dir
        self.history[-1]["steps"] = self.progress.step
        save_training_state(run / "checkpoints", self.accelerator, self.progress.step, self.settings.keep_checkpoints)
        if self.accelerator.is_main_process:
            save_model(run / "model", self.detector, self.history)
            plot_curves(self.records, run / "curves.png")
        self.accelerator.wait_for_everyone()

    def _write(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the trackers."""
        self.records.append(record)
        if self.accelerator.is_main_process:
            with (self.settings.output_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.settings.report_to != "none":
            figures = {**record, **record.get("losses", {}), **record.get("bbox", {})}
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
        if self.plan.processes > 1:
            if self.stop_signal:
                self.accelerator.set_trigger()
            if self.accelerator.check_trigger() and not self.stop_signal:
                self.stop_signal = signal.SIGTERM
        if self.stop_signal and self.progress.step < self.plan.total_steps:
            self._log() if self.losses else None
            self._save()
            name = signal.Signals(self.stop_signal).name
            message = f"{name}: the state of step {self.progress.step} is saved; go on with --resume"
            raise StopSignal(message, 128 + self.stop_signal)


def presets(settings: Settings) -> tuple[Preset, Preset]:
    """The transforms for training and for testing."""
    if settings.stage == "pretrain":
        return PretrainPreset(settings.image_size), TestPreset(settings.image_size, settings.image_size)
    return (
        FinetunePreset(settings.short_side, settings.long_side),
        TestPreset(settings.short_side, settings.long_side),
    )


def parameter_groups(detector: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that train: with weight decay, and without it those of norm layers."""
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    exempt = {
        id(p) for layer in detector.modules() if isinstance(layer, norms) for p in layer.parameters(recurse=False)
    }
    trained = [p for p in detector.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]


def average_running_statistics(detector: Detector, accelerator: Accelerator) -> None:
    """Make BatchNorm's running statistics the mean over the processes: the model is then the same on all of them."""
    if accelerator.num_processes == 1:
        return
    statistics = running_statistics(detector)
    if statistics:
        flat = accelerator.reduce(torch.cat([stat.flatten() for stat in statistics]), reduction="mean")
        for stat, mean in zip(statistics, flat.split([stat.numel() for stat in statistics]), strict=True):
            stat.copy_(mean.view_as(stat))


def banner(
    settings: Settings,
    plan: Plan,
    detector: Detector,
    train_table: AnnotationTable,
    val_table: AnnotationTable | None,
    accelerator: Accelerator,
    origin: str,
    progress: Progress,
) -> str:
    """What is about to happen, for a person to check before the hours are spent."""
    config = detector.config
    trained = [p for p in detector.parameters() if p.requires_grad]
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    sizes = (
        f"{settings.image_size}x{settings.image_size} crops"
        if settings.stage == "pretrain"
        else f"fit into {settings.long_side}x{settings.short_side}"
    )
    lines = [
        f"Direct-PT {settings.stage}: {config.name}, backbone {config.backbone}, norm {config.norm}",
        f"  run        {settings.output_dir} (git {_git_revision()})",
        f"  device     {plan.processes} x {device}, precision {accelerator.mixed_precision}, torch {torch.__version__}",
        f"  train      {_describe(train_table)}",
        f"  val        {_describe(val_table) if val_table else 'none: no evaluation'}",
        f"  images     {sizes}",
        f"  weights    {origin}",
        f"  trainable  {len(trained)} of {len(list(detector.parameters()))} tensors, "
        f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in detector.parameters()):,} parameters",
        f"  batch      {plan.global_batch_size} images a step = {plan.processes} process(es) x {plan.micro_batch_size} "
        f"micro-batch x {plan.accumulation} accumulated",
        f"  schedule   {plan.total_steps} steps = {plan.epochs:.1f} epochs, from step {progress.step}; lr {plan.lr:g}, "
        f"warm-up {plan.warmup_steps}, x0.1 after {list(plan.decay_steps) or 'no step'}; "
        f"evaluation every {plan.eval_steps}",
        *(f"  note       {note}" for note in plan.notes),
    ]
    if any(layer.training for layer in batchnorms(detector)) and plan.micro_batch_size < LEAST_BATCHNORM_IMAGES:
        lines.append(
            f"  WARNING    BatchNorm trains on micro-batches of {plan.micro_batch_size}: under "
            f"{LEAST_BATCHNORM_IMAGES} its statistics are poor; raise --micro-batch-size or use --norm group"
        )
    counts = torch.bincount(torch.from_numpy(train_table.labels[~train_table.crowd]), minlength=len(config.class_names))
    lines.append(f"  classes    {len(config.class_names)} (id name: training objects)")
    rows = list(zip(config.category_ids, config.class_names, counts.tolist(), strict=True))
    lines += [f"             {i} {name}: {n}" for i, name, n in rows[:20]]
    lines += [f"             and {len(rows) - 20} more"] if len(rows) > 20 else []
    return "\n".join(lines)


def _describe(table: AnnotationTable) -> str:
    repairs = "".join(f"; {what}: {count}" for what, count in table.repairs.items())
    return (
        f"{len(table)} images ({int((table.targets_per_image() == 0).sum())} without objects), {len(table.boxes)} "
        f"objects ({int(table.crowd.sum())} crowd regions) from {table.source}{repairs}"
    )


def _initial_detector(settings: Settings, table: AnnotationTable) -> tuple[Detector, History, str]:
    """The detector that training starts from, the stages behind it, and where its weights come from, in words."""
    if settings.init in (None, "none"):
        assert settings.model is not None
        config = DetectorConfig(
            name=settings.model,
            class_names=table.class_names,
            category_ids=table.category_ids,
            backbone=settings.backbone or "resnet50",
            norm=settings.norm,
            channels=settings.channels,
        )
        detector = build_detector(settings.model, config=_with_flags(config, settings))
        _assert_everything_trains(detector)
        tensors = len(detector.state_dict())
        return detector, [], f"random: 0 of {tensors} tensors loaded, nothing frozen (seed {settings.seed})"
    detector = from_pretrained(settings.init, lambda config: _with_flags(config, settings))
    config = detector.config
    classes = dict(zip(config.category_ids, config.class_names, strict=True))
    if classes != dict(zip(table.category_ids, table.class_names, strict=True)):
        raise InputError(
            f"--init {settings.init}: was trained for the {len(classes)} classes {_few(config.class_names)}, but "
            f"{table.source} has {len(table.class_names)}: {_few(table.class_names)}; pre-train on this data set"
        )
    for flag, given, found in (
        ("--model", settings.model, config.name), ("--backbone", settings.backbone, config.backbone)
    ):  # fmt: skip
        if given is not None and given != found:
            raise InputError(f"{flag} {given}: --init {settings.init} is a {found}; leave the flag out")
    detector.train().freeze_for_finetuning()
    tensors = len(detector.state_dict())
    origin = f"{tensors} of {tensors} tensors loaded from {settings.init}; BatchNorm, stem and first stage frozen"
    return detector, read_history(settings.init), origin


def _with_flags(config: DetectorConfig, settings: Settings) -> DetectorConfig:
    """The configuration with what may differ between the stages, the test size among it."""
    short_side, long_side = settings.short_side, settings.long_side
    if settings.stage == "pretrain":
        short_side = long_side = settings.image_size
    return replace(
        config,
        proposals=settings.proposals,
        rois_per_image=settings.rois_per_image,
        short_side=short_side,
        long_side=long_side,
    )


def _assert_everything_trains(detector: Detector) -> None:
    """From random weights anything frozen would cost most of the AP."""
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert not detector.batchnorm_frozen


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_output(settings: Settings) -> None:
    """Refuse a folder that holds another run, and a resumption with other settings."""
    path = settings.output_dir / CONFIG
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        raise InputError(f"--output-dir {settings.output_dir}: is a file")
    if not path.exists():
        return
    if not settings.resume:
        raise InputError(
            f"--output-dir {settings.output_dir}: holds a run already; go on with --resume, or choose another folder"
        )
    try:
        saved = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as a run's configuration ({error})") from error
    for name, value in settings.to_dict().items():
        if name not in FREE_ON_RESUME and saved.get(name) != value:
            flag = "--" + name.replace("_", "-") if name != "stage" else "the stage"
            raise InputError(
                f"--resume: {flag} is {value!r} but the run in {settings.output_dir} was started with "
                f"{saved.get(name)!r}; give the same (--config {path} does), or choose another --output-dir"
            )


def _history_entry(settings: Settings, plan: Plan) -> dict[str, Any]:
    return {
        "stage": settings.stage,
        "steps": plan.total_steps,
        "global_batch_size": plan.global_batch_size,
        "lr": plan.lr,
        "images": plan.images,
        "init": settings.init or "none",
    }


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


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
