"""What the two training scripts share: from flags, data and a detector to a run under way. What can be refused is
refused here, before the first step."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3

from direct_pt.batch import Batch
from direct_pt.checkpoint import CONFIG, History
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.image_cache import ImageCache
from direct_pt.data.loader import Feed, Share, TableFeed
from direct_pt.data.mixing import Mix
from direct_pt.data.sources import load_tables, spot_check
from direct_pt.data.tiled_table import training_tiles
from direct_pt.distributed.launch import is_deepspeed, make_accelerator, resolve_precision
from direct_pt.distributed.processes import check_same, local_main_process_first, main_decides, sampled
from direct_pt.errors import InputError, first_names, printable_lines
from direct_pt.files import write_json, writing
from direct_pt.images.tiles import Tiling
from direct_pt.models.detector import Detector
from direct_pt.models.layers import recompute_blocks
from direct_pt.program.folder_lock import hold_folder, release_folder
from direct_pt.recipes import Recipe, make_optimizer, paper_optimizer, recipe_name
from direct_pt.reports.run_page import MAX_SAMPLES, RunPage
from direct_pt.reports.survey import nothing_to_learn, summary
from direct_pt.training.banner import banner, git_revision, recipe_text
from direct_pt.training.choices import Choices
from direct_pt.training.loop import Run, Trainer
from direct_pt.training.micro_batch import Trial, fitting_micro_batch_size
from direct_pt.training.plan import Plan, global_batch_size, make_plan, micro_batch_sizes
from direct_pt.training.prepared import PreparedModel
from direct_pt.training.progress import Progress
from direct_pt.training.resume import Resumption, data_record, launcher_id, longer_plan, resumed_plan
from direct_pt.training.settings import Flags, RunOptions, TrainingDataOptions
from direct_pt.training.trackers import open_trackers
from direct_pt.transforms import Preset, TestPreset

if TYPE_CHECKING:
    from direct_pt.data.stream import Stream, StreamFeed


def load_data(
    options: TrainingDataOptions,
    processes: PartialState,
    check_images: bool,
    resumption: Resumption | None,
    tiling: Tiling | None,
) -> "tuple[AnnotationTable | Stream, AnnotationTable | None]":
    """The training and the validation data. Every process must call it.

    Args:
        options: which data.
        processes: that load them together.
        check_images: look at some image files, too; a run that resumes may have copies of them.
        resumption: gets a note where the data are not those that the run was started with.
        tiling: the tiles that the training data are made of; None for whole images.

    Raises:
        InputError: they cannot be read, or there is nothing to learn.
    """
    if options.streaming:
        from direct_pt.data.stream import open_stream  # its library takes a second to load

        assert options.data is not None
        stream = open_stream(
            options.data, options.bbox_format, options.decoding, options.shuffle_buffer, options.subset
        )
        val = load_tables(options, ["val"]).get("val")
        if resumption is not None:
            resumption.compare_data(stream, val)
        return stream, val

    def load() -> dict[str, AnnotationTable]:
        tables = load_tables(options, required="train")
        for table in tables.values() if check_images else ():
            spot_check(table)
        return tables

    tables = local_main_process_first(load, processes)
    table = tables["train"]
    if reason := nothing_to_learn(table):
        found = "; ".join(f"{kind}: {count}" for kind, count in table.repairs.items())
        raise InputError(f"{table.source}: {reason}" + (f" (found while reading: {found})" if found else ""))
    table = table if tiling is None else training_tiles(table, tiling)
    table = table.without_empty_images() if options.drop_empty else table
    if resumption is not None:
        resumption.compare_data(table, tables.get("val"))
    return table, tables.get("val")


def prepare_detector(
    detector: Detector,
    options: RunOptions,
    train: "AnnotationTable | Stream",
    val: AnnotationTable | None,
    one_shape: bool,
) -> None:
    """Check that the data have the masks that a mask detector needs; apply gradient checkpointing or compilation.

    Args:
        detector: with the weights that training starts from.
        options: of the run.
        train: training data.
        val: validation data.
        one_shape: whether all batches have one shape, which compiles faster.

    Raises:
        InputError: there are no masks, no blocks to compute again, or no compiler.
    """
    if detector.has_masks:
        for table in (train, val):
            if isinstance(table, AnnotationTable):
                table.require_masks()
    if options.gradient_checkpointing and not recompute_blocks(detector.backbone.network):
        raise InputError("--gradient-checkpointing: the backbone has no repeated blocks; leave it out")
    if options.compile:
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise InputError("--compile needs a C++ compiler: install g++, or leave it out")
        detector.backbone.compile_training(one_shape=one_shape)


def plan_run(
    flags: Flags,
    detector: Detector,
    train: "AnnotationTable | Stream",
    preset: Preset,
    processes: PartialState,
    resumption: Resumption | None,
) -> tuple[Plan, Recipe]:
    """Batch, steps and learning rate, and the recipe that their defaults are from. Every process must call it.

    Raises:
        InputError: the batch does not divide, no micro-batch fits, or the number of images is not known.
    """
    options, count = flags.schedule, processes.num_processes
    optimizer = options.optimizer or paper_optimizer(detector.backbone.has_layernorm)
    recipe = flags.stage.recipe(detector.config.name, optimizer, recipe_name(options.recipe, len(train)))
    recipe = recipe if options.weight_decay is None else replace(recipe, weight_decay=options.weight_decay)
    batch = resumption.plan.global_batch_size if resumption else global_batch_size(options, recipe, count)
    fitting = None
    if options.micro_batch_size == "auto" and isinstance(train, AnnotationTable):
        if not (sizes := micro_batch_sizes(batch, count)):
            raise InputError(f"--global-batch-size {batch} does not divide over {count} processes")
        fitting = resumption.micro_batch_size if resumption else 0
        if fitting not in sizes:
            copies = (count > 1) + (options.ema is not None)
            trial = Trial(
                detector.config, detector.frozen, flags.run.gradient_checkpointing, recipe, copies,
                processes.device, resolve_precision(flags.run.mixed_precision),
            )  # fmt: skip
            fitting = agreed_micro_batch_size(trial, train, preset, sizes)
    if resumption is not None:
        plan = resumed_plan(resumption.plan, options, len(train) or resumption.plan.images, count, fitting)
        if resumption.new_length:
            plan = longer_plan(plan, options, recipe, resumption.progress.step)
        return plan, recipe
    images = len(train)
    if not images:  # of a stream that does not say how many there are, those that the run takes
        if options.max_steps is None:
            raise InputError(f"{train.source}: does not say how many images it has: give --max-steps")
        images = batch * options.max_steps
    return make_plan(options, recipe, images, count, fitting), recipe


def agreed_micro_batch_size(trial: Trial, table: AnnotationTable, preset: Preset, sizes: list[int]) -> int:
    """The most images at once that fit on every process. Raises InputError, on all of them, where none does."""
    failure = "another process found none that fits"
    try:
        fitting = fitting_micro_batch_size(trial, table, preset, sizes)
    except InputError as error:
        fitting, failure = 0, str(error)
    smallest = min(gather_object([fitting]))
    if not smallest:
        raise InputError(failure)
    return smallest


def make_feed(
    train: "AnnotationTable | Stream",
    options: TrainingDataOptions,
    plan: Plan,
    preset: Preset,
    with_masks: bool,
    seed: int,
    num_workers: int,
    grouped: bool = False,
    cache: ImageCache | None = None,
    mix: Mix | None = None,
) -> Feed:
    """The source of training batches.

    Args:
        train: training data.
        options: how often images are shown.
        plan: of the run.
        preset: the transform of the images.
        with_masks: whether the detector learns masks.
        seed: of order and augmentation.
        num_workers: processes that read images.
        grouped: whether micro-batches are of like aspect ratio.
        cache: of low-resolution copies of the images.
        mix: which samples are made of several images; not of a stream.

    Raises:
        InputError: a stream begins with many images that are wrong.
    """
    if isinstance(train, AnnotationTable):
        return TableFeed(train, preset, seed, with_masks, num_workers, grouped, cache, options.repeat_threshold, mix)
    from direct_pt.data.stream import StreamFeed

    feed = StreamFeed(
        replace(train, images=plan.images), preset, seed, with_masks, num_workers, grouped, options.drop_empty
    )
    feed.check()
    return feed


def start_run(
    flags: Flags,
    choices: Choices,
    plan: Plan,
    recipe: Recipe,
    detector: Detector,
    feed: Feed,
    val: AnnotationTable | None,
    test_preset: TestPreset,
    resumption: Resumption | None,
    history: History,
) -> Run:
    """Prepare detector and optimizer for device, precision and processes, and load what the run resumes from.

    `history` lists the stages of training before this one. Every process must call it.

    Raises:
        InputError: the device cannot serve what was asked for, or config.json cannot be written.
    """
    if flags.run.patience is not None and (val is None or not val.targets_per_image().any()):
        text = "there is no validation split with objects: give one, or leave it out"
        raise InputError(f"--patience waits for a higher AP, and {text}")
    options, recompute_norm = flags.run, bool(flags.to_dict().get("recompute_norm"))
    notes = ("--recompute-norm: BatchNorm's statistics are computed anew at the end",) * recompute_norm
    plan = replace(plan, notes=(*choices.notes, *notes, *plan.notes))
    accelerator = make_accelerator(
        options.mixed_precision,
        plan.micro_batch_size,
        plan.accumulation,
        flags.schedule.clip_grad_norm,
    )
    if resumption is not None:
        resumption.load_weights(detector, accelerator)
        plan = replace(plan, notes=(*plan.notes, *resumption.differences(plan)))
    train = feed.table if isinstance(feed, TableFeed) else cast("StreamFeed", feed).stream
    data = data_record(train, val)
    check_same_start(detector, choices, plan, data, accelerator.state)
    detector.to(accelerator.device)
    if not is_deepspeed():  # it needs contiguous weights
        detector.to(memory_format=torch.channels_last)  # the fastest for convolutions, on CPU and GPU
    ema = flags.schedule.ema
    average = None if ema is None else ModelEmaV3(detector, ema, use_warmup=True)
    model = PreparedModel(accelerator, detector, make_optimizer(detector, recipe, plan.lr))
    if resumption is not None:
        resumption.load_state(model, average, accelerator)
    progress = resumption.progress if resumption else Progress()
    is_new, state = progress.step < plan.total_steps, accelerator.state
    if is_new:
        main_decides(lambda: take_folder(options.output_dir), state)
    trackers = open_trackers(options.trackers, options.output_dir, flags.to_dict(), progress.step, state)
    if is_new:
        main_decides(lambda: write_config(flags, choices, plan, data), state)
    else:  # its model came out of the flags that stand there
        plan = replace(plan, notes=(*plan.notes, "the run has ended: nothing is trained, config.json stays as it is"))
    stage = {
        "stage": flags.stage.name,
        "steps": plan.total_steps,
        "global_batch_size": plan.global_batch_size,
        "lr": plan.lr,
        "classes": first_names(detector.config.class_names, 5),
        "images": plan.images,
        "init": flags.to_dict().get("init", "none"),
    } | ({} if data["train"] is None else {"objects": data["train"]["objects"]})
    if test_preset.tiling is not None:
        stage["tiles"] = asdict(test_preset.tiling)
    return Run(
        title=flags.stage.name,
        options=options,
        recipe=recipe,
        plan=plan,
        clip_grad_norm=flags.schedule.clip_grad_norm,
        accelerator=accelerator,
        model=model,
        average=average,
        feed=feed,
        val=val,
        test_preset=test_preset,
        progress=progress,
        recompute_norm=recompute_norm,
        history=[*history, stage],
        trackers=trackers,
        saved_log=resumption.process_log(accelerator) if resumption else {},
    )


def check_same_start(
    detector: Detector, choices: Choices, plan: Plan, data: dict[str, Any], processes: PartialState
) -> None:
    """Raise InputError, on every process, where they would not train the same detector on the same data."""
    planned = {name: value for name, value in asdict(plan).items() if name != "notes"}
    parts = {"training split": data["train"], "validation split": data["val"], "list of classes": data["classes"]}
    check_same(parts, "--data", processes)
    check_same({"choice": choices.to_json(), "plan": planned}, "plan", processes)
    if processes.num_processes > 1:
        check_same(sampled(detector.state_dict()), "weights that training starts from", processes)


def take_folder(folder: Path) -> None:
    """Take the lock of a run's folder, which stays with this process.

    Raises:
        InputError: another run writes there, or began to since this one was started; or it cannot be written.
    """
    with writing(str(folder / CONFIG)):
        if hold_folder(folder) and (folder / CONFIG).exists():
            raise InputError(f"--output-dir {folder}: another run began there meanwhile; choose another folder")


def write_config(flags: Flags, choices: Choices, plan: Plan, data: dict[str, Any]) -> None:
    """Write a run's config.json. Raises InputError where the disk is full now: it will be at the first save."""
    path = flags.run.output_dir / CONFIG
    with writing(str(path)):
        write_json(
            path,
            {
                "settings": flags.to_dict(),
                "choices": choices.to_json(),
                "plan": asdict(plan),
                "data": data,
                "git": git_revision(),
                "launcher": launcher_id(),
            },
        )


def train_run(
    run: Run, flags: Flags, train: "AnnotationTable | Stream", images: str, origin: str, survey_preset: Preset
) -> None:
    """Print the start banner and train. Every process must call it.

    Args:
        run: prepared.
        flags: of the stage.
        train: training data.
        images: how they are resized, in words.
        origin: of the weights, in words.
        survey_preset: how they are resized, without random choices.

    Raises:
        TrainingStopped: training cannot continue; the state is saved.
        StopSignal: a stop signal came; the state is saved.
    """
    try:
        trainer = Trainer(run)  # from here on a stop signal ends the run after its next step
        options, trackers = run.options, run.trackers
        with closing(trackers):
            if run.accelerator.is_main_process:
                survey = []
                if isinstance(train, AnnotationTable):
                    tables = {"train": train} | ({} if run.val is None else {"val": run.val})
                    survey = summary(tables, survey_preset)
                detector = run.model.detector
                paper = flags.stage.recipe(detector.config.name, paper_optimizer(detector.backbone.has_layernorm))
                recipe = recipe_text(run.recipe, paper, run.plan, is_given=flags.schedule.recipe != "auto")
                text = printable_lines(banner(run, images, origin, recipe, survey))
                print(text, flush=True)
                page = RunPage(options.output_dir, run.title, text, shlex.join(sys.argv), run.plan.total_steps, run.val)
                samples: Iterator[Batch] = iter(())
                if isinstance(run.feed, TableFeed):  # a stream would be read twice
                    samples = replace(run.feed, num_workers=0).batches(Share(1, 0, MAX_SAMPLES))
                trainer.folder.show(page, samples, detector.config.class_names)
                trackers.log_pictures(trainer.folder.pictures(run.progress.step), run.progress.step)
            trainer.train()
        run.accelerator.wait_for_everyone()  # no process closes its connections while another still writes
        run.accelerator.end_training()
    finally:
        release_folder(run.options.output_dir)
