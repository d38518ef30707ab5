"""From settings to a run under way: everything that is looked at, built and refused before the first step."""

import os
import shutil
import tempfile
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3

from direct_pt.checkpoint import CONFIG, History, from_pretrained, read_history
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.image_cache import open_image_cache
from direct_pt.data.loader import Feed, TableFeed
from direct_pt.data.sources import load_tables, spot_check
from direct_pt.distributed.launch import is_deepspeed, join_processes, make_accelerator, resolve_precision
from direct_pt.distributed.processes import local_main_process_first, main_decides
from direct_pt.errors import InputError
from direct_pt.files import write_json
from direct_pt.models.backbone import Backbone
from direct_pt.models.backbone_weights import load_backbone
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.models.layers import recompute_blocks
from direct_pt.recipes import Recipe, make_optimizer, recipe_for, recipe_name
from direct_pt.reports.survey import summary, whole_image
from direct_pt.training.banner import banner, git_revision
from direct_pt.training.loop import Trainer, TrainingData
from direct_pt.training.micro_batch import Trial, fitting_micro_batch_size
from direct_pt.training.plan import Plan, global_batch_size, make_plan, micro_batch_sizes, resumed_plan
from direct_pt.training.prepared import Sharded
from direct_pt.training.progress import Progress
from direct_pt.training.resumption import Resumption, resumed_settings
from direct_pt.training.settings import FREE_ON_RESUME, MENDABLE, Settings, read_settings
from direct_pt.transforms import FinetunePreset, Preset, PretrainPreset, TestPreset

if TYPE_CHECKING:
    from direct_pt.data.stream import Stream


def run_stage(settings: Settings) -> None:
    """Train one stage from its settings to the model folder.

    Raises:
        InputError: something that the user can mend, found before training.
        TrainingStopped: training cannot go on; the state is saved.
        StopSignal: a stop signal came; the state is saved.
    """
    run = settings.output_dir
    processes = join_processes()
    main_decides(lambda: _check_output(settings), processes)  # it alone writes there; the others may not see it
    settings, changes = resumed_settings(settings, processes)
    train, val_table = _data(settings, processes)
    earlier = Resumption.find(settings, changes, processes)
    set_seed(settings.seed)
    detector, history, origin = _initial_detector(settings, train)
    if detector.has_masks:
        for table in (train, val_table):
            if isinstance(table, AnnotationTable):
                table.require_masks()
    _transform_backbone(detector.backbone, settings)
    name = recipe_name(settings.recipe, len(train))
    recipe = recipe_for(settings.stage, detector.config.name, detector.backbone.has_layernorm, name)
    preset, test_preset = presets(settings)
    count = processes.num_processes
    batch = global_batch_size(settings, recipe, count) if earlier is None else earlier.plan.global_batch_size
    fitting = None
    if settings.micro_batch_size == "auto" and isinstance(train, AnnotationTable):
        fitting = _fitting_micro_batch_size(settings, recipe, batch, detector, train, preset, processes, earlier)
    if earlier is None:
        plan = make_plan(settings, recipe, _count(train, settings, batch), count, fitting)
    else:
        plan = resumed_plan(earlier.plan, settings, len(train) or earlier.plan.images, count, fitting)
    feed = _feed(settings, train, plan, preset, detector.has_masks)
    data = TrainingData(feed, val_table, test_preset)
    accelerator = make_accelerator(
        settings.mixed_precision,
        plan.micro_batch_size,
        plan.accumulation,
        settings.clip_grad_norm,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_dir=str(run),
    )
    if earlier is not None:
        earlier.put_weights(detector, accelerator)
        plan = replace(plan, notes=(*plan.notes, *earlier.differences(plan)))
    detector.to(accelerator.device)
    if not is_deepspeed():  # which wants weights laid out plainly
        detector.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPU and GPU
    average = ModelEmaV3(detector, settings.ema, use_warmup=True) if settings.ema is not None else None
    sharded = Sharded(accelerator, detector, make_optimizer(detector, recipe, plan.lr))
    progress = Progress() if earlier is None else earlier.put_state(sharded, average, accelerator)
    main_decides(lambda: _write_config(settings, plan), processes)
    if accelerator.is_main_process:
        seen = whole_image(settings.image_size) if settings.stage == "pretrain" else test_preset
        tables = {split: of for split, of in (("train", train), ("val", val_table)) if isinstance(of, AnnotationTable)}
        told = summary(tables, seen) if "train" in tables else []
        print(banner(settings, recipe, plan, detector, data, accelerator, origin, progress, told), flush=True)
    if settings.report_to != "none":
        accelerator.init_trackers("tensorboard")
    gathered = {} if earlier is None else earlier.of_process(accelerator)
    history = [*history, _history_entry(settings, plan)]
    Trainer(settings, plan, accelerator, sharded, average, data, progress, gathered, history).train()
    accelerator.wait_for_everyone()  # they leave together: none closes its connections while another still writes
    accelerator.end_training()


def _data(settings: Settings, processes: PartialState) -> "tuple[AnnotationTable | Stream, AnnotationTable | None]":
    """What is trained on, and validated on. Every process must call it. Raises InputError."""
    if settings.streaming:
        from direct_pt.data.stream import open_stream  # its library takes a second to load

        assert settings.data is not None
        stream = open_stream(settings.data, settings.bbox_format, settings.decoding, settings.shuffle_buffer)
        return stream, load_tables(settings, ["val"]).get("val")
    tables = local_main_process_first(lambda: _checked_tables(settings), processes)
    table = tables["train"]
    if not table.targets_per_image().any():
        counts = f"{len(table)} images, {len(table.boxes)} objects"
        raise InputError(f"{table.source}: no image has an object to learn ({counts}); annotate some")
    return table.without_empty_images() if settings.drop_empty else table, tables.get("val")


def _checked_tables(settings: Settings) -> dict[str, AnnotationTable]:
    tables = load_tables(settings, required="train")
    for table in tables.values() if not settings.resumes else ():  # a run that goes on may have copies of its images
        spot_check(table)
    return tables


def _count(train: "AnnotationTable | Stream", settings: Settings, batch: int) -> int:
    """How many training images there are; of a stream that does not say, those that the run takes."""
    if len(train):
        return len(train)
    if settings.max_steps is None:
        raise InputError(f"{train.source}: does not say how many images it has: give --max-steps")
    return batch * settings.max_steps


def _feed(settings: Settings, train: "AnnotationTable | Stream", plan: Plan, preset: Preset, with_masks: bool) -> Feed:
    """Where the batches come from. Raises InputError where a stream begins with much that is wrong."""
    common = preset, settings.seed, with_masks, settings.num_workers, settings.stage == "finetune"
    if isinstance(train, AnnotationTable):
        cache = None
        if settings.cache != "none":
            cache = open_image_cache(
                train, settings.cache, settings.image_size, settings.cache_dir, settings.num_workers
            )
        return TableFeed(train, *common, cache, settings.repeat_threshold)
    from direct_pt.data.stream import StreamFeed

    feed = StreamFeed(replace(train, images=plan.images), *common, settings.drop_empty)
    feed.check()
    return feed


def _fitting_micro_batch_size(
    settings: Settings,
    recipe: Recipe,
    batch: int,
    detector: Detector,
    table: AnnotationTable,
    preset: Preset,
    processes: PartialState,
    earlier: Resumption | None,
) -> int:
    """For --micro-batch-size auto: what the run had, else the most that fits on every process."""
    sizes = micro_batch_sizes(batch, processes.num_processes)
    if not sizes:
        raise InputError(f"--global-batch-size {batch} does not divide over {processes.num_processes} processes")
    if earlier is not None and earlier.micro_batch_size in sizes:
        return earlier.micro_batch_size
    copies = (processes.num_processes > 1) + (settings.ema is not None)
    trial = Trial(
        detector.config, detector.batchnorm_frozen, settings.gradient_checkpointing, recipe, copies, processes.device,
        resolve_precision(settings.mixed_precision),
    )  # fmt: skip
    failure = "another process found none that fits"
    try:
        found = fitting_micro_batch_size(trial, table, preset, sizes)
    except InputError as error:
        found, failure = 0, str(error)
    least = min(gather_object([found]))
    if not least:
        raise InputError(failure)
    return least


def _transform_backbone(backbone: Backbone, settings: Settings) -> None:
    """Gradient checkpointing or compilation, where the flags ask for it. Raises InputError."""
    if settings.gradient_checkpointing and not recompute_blocks(backbone.network):
        raise InputError("--gradient-checkpointing: the backbone has no repeated blocks; leave it out")
    if settings.compile:
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise InputError("--compile needs a C++ compiler: install g++, or leave it out")
        backbone.compile_training(one_shape=settings.stage == "pretrain")


def presets(settings: Settings) -> tuple[Preset, TestPreset]:
    """The transforms for training and for testing."""
    if settings.stage == "pretrain":
        return PretrainPreset(settings.image_size), TestPreset(settings.image_size, settings.image_size)
    sides = settings.short_side, settings.long_side
    return FinetunePreset(*sides), TestPreset(*sides)


def _initial_detector(settings: Settings, table: "AnnotationTable | Stream") -> tuple[Detector, History, str]:
    """The detector that training starts from, the stages behind it, and where its weights come from, in words."""
    kind = settings.init_kind
    if kind == "run":
        detector = from_pretrained(settings.init, lambda config: _matched(config, settings, table))
        tensors = len(detector.state_dict())
        origin, history = f"{tensors} of {tensors} tensors loaded from {settings.init}", read_history(settings.init)
    else:
        assert settings.model is not None
        config = DetectorConfig.of_paper(settings.model, table.class_names, table.category_ids)
        detector = build_detector(settings.model, config=_with_flags(config, settings))
        tensors, history = len(detector.state_dict()), []
        origin = f"random: 0 of {tensors} tensors loaded (seed {settings.seed})"
        if kind != "none":
            loaded = load_backbone(detector.backbone, detector.config.backbone, settings.init)
            origin = f"{loaded}; the other {tensors - loaded.tensors} of {tensors} random (seed {settings.seed})"
    detector.train()
    if kind != "none":
        detector.freeze_for_finetuning()
    frozen = sum(not parameter.requires_grad for parameter in detector.parameters())
    assert not frozen or kind != "none", "from random weights anything frozen would cost most of the AP"
    what = "BatchNorm, stem and first stage frozen" if frozen else "nothing frozen"
    return detector, history, f"{origin}; {what}"


def _matched(config: DetectorConfig, settings: Settings, table: "AnnotationTable | Stream") -> DetectorConfig:
    """A pre-trained detector's configuration, with the flags of this stage; refused where the two contradict."""
    classes = dict(zip(config.category_ids, config.class_names, strict=True))
    if classes != dict(zip(table.category_ids, table.class_names, strict=True)):
        raise InputError(
            f"--init {settings.init}: was trained for the {len(classes)} classes {_few(config.class_names)}, but "
            f"{table.source} has {len(table.class_names)}: {_few(table.class_names)}; pre-train on this data set"
        )
    if config.category_ids != table.category_ids:
        raise InputError(
            f"--init {settings.init}: its classes stand in another order than their ids ({_few(config.class_names)}); "
            f"number the categories of {table.source} in that order"
        )
    for flag in ("model", "backbone", "norm", "box_head", "channels"):
        given, found = getattr(settings, flag), getattr(config, "name" if flag == "model" else flag)
        if given is not None and given != found:
            flag = flag.replace("_", "-")
            raise InputError(f"--{flag} {given}: --init {settings.init} has {found}; leave the flag out")
    return _with_flags(config, settings)


def _with_flags(config: DetectorConfig, settings: Settings) -> DetectorConfig:
    """The configuration with what the flags say about the detector, and the size that the stage tests at."""
    names = ("backbone", "norm", "box_head", "channels", "rois_per_image", "proposals")
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    test = presets(settings)[1]
    return replace(config, **given, short_side=test.short_side, long_side=test.long_side)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_output(settings: Settings) -> None:
    """Refuse a folder that holds another run or cannot be written, and a resumption with other settings."""
    path = settings.output_dir / CONFIG
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        raise InputError(f"--output-dir {settings.output_dir}: is a file")
    there = next(path for path in (settings.output_dir, *settings.output_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"--output-dir {settings.output_dir}: cannot be written ({error.strerror})") from error
    if not path.exists():
        return
    if not settings.resumes:
        raise InputError(
            f"--output-dir {settings.output_dir}: holds a run already; go on with --resume, or choose another folder"
        )
    saved = read_settings(path)
    for name, value in settings.to_dict().items():
        if name not in FREE_ON_RESUME | MENDABLE and saved.get(name, vars(Settings).get(name)) != value:
            flag = "--" + name.replace("_", "-") if name != "stage" else "the stage"
            raise InputError(
                f"--resume: {flag} is {value!r} but the run in {settings.output_dir} was started with "
                f"{saved.get(name)!r}; give the same (--config {path} does), or choose another --output-dir"
            )


def _write_config(settings: Settings, plan: Plan) -> None:
    """Raises InputError where the disk is full: what is not there at the start will not be at the first save."""
    path = settings.output_dir / CONFIG
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"settings": settings.to_dict(), "plan": asdict(plan), "git": git_revision()})
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room there") from error


def _history_entry(settings: Settings, plan: Plan) -> dict[str, Any]:
    return {
        "stage": settings.stage,
        "steps": plan.total_steps,
        "global_batch_size": plan.global_batch_size,
        "lr": plan.lr,
        "images": plan.images,
        "init": settings.init or "none",
    }
