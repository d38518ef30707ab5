"""The flags of pretrain.py and finetune.py, in groups that each part of the program takes alone, and config.json."""

import json
import os
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from direct_pt.data.image_cache import KINDS
from direct_pt.data.sources import DataOptions
from direct_pt.distributed.launch import DeviceOptions
from direct_pt.errors import InputError
from direct_pt.flags import (
    CHANGEABLE,
    FREE,
    add_flags,
    any_path,
    batch_size,
    decay,
    epoch_count,
    flag,
    integer_or_auto,
    make_parser,
    not_negative_integer,
    path_or_name,
    pixels,
    positive_float,
    positive_integer,
    read_flags,
    share,
    to_arguments,
    to_json,
    whole_number,
)
from direct_pt.models.detector import BOX_HEADS, MODELS, DetectorConfig
from direct_pt.recipes import (
    FINETUNE,
    IMAGE_SIZE,
    LONG_SIDE,
    MIN_LARGE_SET_IMAGES,
    PRETRAIN,
    RECIPES,
    SCHEDULES,
    SHORT_SIDE,
    Stage,
)

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
LENGTHS = ("schedule", "epochs", "max_steps")  # flags that exclude each other


@dataclass(frozen=True, kw_only=True)
class TrainingDataOptions(DataOptions):
    """Which data, and which of their images are shown how often."""

    drop_empty: bool = flag(False, "leave out images without objects, else negatives")
    repeat_threshold: float | None = flag(
        None, "show images of classes that fewer than this share of the images have more often, such as 0.001 (off)",
        share, metavar="X",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What the detector is built from. None: the paper's, or what --init has."""

    model: str | None = flag(None, f"one of {', '.join(MODELS)}; not needed where --init is a run", metavar="NAME")
    backbone: str | None = flag(
        None, "any timm network with maps at strides 4 to 32 (paper: by --model)", metavar="NAME"
    )
    norm: str | None = flag(None, "normalisation layers (paper: batch)", choices=["batch", "group"])
    box_head: str | None = flag(
        None, "convolutions and fully connected layers of the box head (paper: 4conv1fc; Cascade R-CNN 2fc)",
        choices=list(BOX_HEADS),
    )  # fmt: skip
    channels: int | None = flag(
        None, "width of the pyramid and heads (paper: 256)", whole_number(1, 16_384), metavar="N"
    )
    rois_per_image: int | None = flag(
        None, "RoIs of an image that the second stage learns from (paper: 512)", whole_number(1, 100_000), metavar="N"
    )
    proposals: int | None = flag(
        None, "boxes of an image that the RPN proposes (paper: 1000)", whole_number(1, 100_000), metavar="N"
    )

    def applied_to(self, config: DetectorConfig, short_side: int, long_side: int) -> DetectorConfig:
        """The configuration with what the flags say about the detector, and the size that images are tested at."""
        names = ("backbone", "norm", "box_head", "channels", "rois_per_image", "proposals")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(config, **given, short_side=short_side, long_side=long_side)


@dataclass(frozen=True, kw_only=True)
class FinetuneDetectorOptions(DetectorOptions):
    """What the detector starts from, and is built from."""

    init: str = flag(
        MISSING, "the pre-trained run to start from, or none, imagenet or a file of weights",
        path_or_name, metavar="RUN|none|imagenet|FILE",
    )  # fmt: skip

    @property
    def init_kind(self) -> str:
        """What `init` means: "none", "imagenet", "file" (weights of a backbone) or "run" (a whole detector)."""
        if self.init in ("none", "imagenet"):
            return self.init
        return "file" if Path(self.init).is_file() else "run"


@dataclass(frozen=True, kw_only=True)
class PretrainImageOptions:
    """How large images are in stage 1, and where small copies of them are kept."""

    image_size: int = flag(IMAGE_SIZE, "size of the crops, a multiple of 32", pixels, metavar="PIXELS")
    cache: str = flag(
        "none", "keep low-resolution copies: raw is fastest, jpeg a quarter as large and as sharp as the files",
        choices=["none", *KINDS],
    )  # fmt: skip
    cache_dir: Path | None = flag(
        None, "folder of the cache (DIRECT_PT_CACHE, else ~/.cache/direct_pt)", Path, metavar="DIR", on_resume=FREE
    )

    def __post_init__(self) -> None:
        if self.image_size % 32:
            lower = self.image_size // 32 * 32
            near = " or ".join(str(size) for size in (lower, lower + 32) if size)
            raise InputError(f"--image-size {self.image_size} is no multiple of 32: use {near}")


@dataclass(frozen=True, kw_only=True)
class FinetuneImageOptions:
    """The size that images are fitted into in stage 2."""

    short_side: int = flag(SHORT_SIDE, "limit of the shorter side of images", pixels, metavar="PIXELS")
    long_side: int = flag(LONG_SIDE, "limit of the longer side", pixels, metavar="PIXELS")

    def __post_init__(self) -> None:
        if self.short_side > self.long_side:
            raise InputError(
                f"--short-side {self.short_side} is above --long-side {self.long_side}: give a larger --long-side"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Batch, length and learning rate. None: the recipe's. Counted in optimizer steps and passes over the images."""

    recipe: str = flag(
        "auto", f"whose numbers are the defaults: small below {MIN_LARGE_SET_IMAGES:,} training images, else paper",
        choices=RECIPES,
    )  # fmt: skip
    schedule: str = flag(
        "1x",
        "1x: {paper.epochs} epochs (paper; small: at least {small[min_images_seen]:,} images seen)",
        choices=list(SCHEDULES), excludes="length",
    )  # fmt: skip
    epochs: float | None = flag(
        None, "train for N epochs, in place of --schedule", epoch_count, metavar="N", excludes="length"
    )
    max_steps: int | None = flag(
        None, "train for N steps, in place of --schedule", positive_integer, metavar="N", excludes="length"
    )
    global_batch_size: int | None = flag(
        None,
        "images per optimizer step, over all processes (paper: {paper.global_batch_size}, small: "
        "{small[global_batch_size]})",
        batch_size, metavar="N",
    )  # fmt: skip
    micro_batch_size: int | str | None = flag(
        None,
        "images at once on a device, the rest is accumulated; auto: as many as fit (paper: {paper.micro_batch_size})",
        integer_or_auto, metavar="N|auto", on_resume=CHANGEABLE,
    )  # fmt: skip
    lr: float | None = flag(
        None,
        "learning rate after the warm-up (paper: {paper.lr:g} for a batch of {paper.global_batch_size}, by detector; "
        "it follows the batch, AdamW's its root)",
        positive_float, metavar="X", on_resume=CHANGEABLE,
    )  # fmt: skip
    lr_schedule: str = flag(
        "recipe", "recipe: constant in stage 1, two steps down in stage 2 (paper); cosine: down to 0",
        choices=["recipe", "cosine"],
    )  # fmt: skip
    warmup_steps: int | None = flag(
        None, "steps of linear warm-up (paper: {paper.warmup_steps}, small: {small[warmup_steps]})",
        not_negative_integer, metavar="N", on_resume=CHANGEABLE,
    )  # fmt: skip
    clip_grad_norm: float | None = flag(
        None, "clip the gradient to this norm (paper: none)", positive_float, metavar="X", on_resume=CHANGEABLE
    )
    ema: float | None = flag(
        None, "evaluate and keep a moving average of the weights, such as 0.999 (paper: none)", decay, metavar="DECAY"
    )
    eval_every: float | None = flag(
        None, "epochs between two evaluations (a twelfth of the run)", epoch_count, metavar="EPOCHS"
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(DeviceOptions):
    """Where a run is written, how the machine is used, and how often something is saved or logged."""

    output_dir: Path = flag(MISSING, "the folder that the run is written to", Path, metavar="RUN", on_resume=FREE)
    resume: bool = flag(False, "continue from the newest checkpoint in --output-dir, if any", on_resume=FREE)
    gradient_checkpointing: bool = flag(
        False, "compute the backbone's activations again in the backward pass: less memory, the same gradients, slower",
        on_resume=FREE,
    )  # fmt: skip
    compile: bool = flag(
        False, "compile the backbone in the first steps, which takes minutes: meant for GPUs, no gain on a CPU"
    )
    seed: int = flag(
        0, "random seed of weights, order of images and augmentation", whole_number(0, 2**32 - 1), metavar="N"
    )
    save_every: int = flag(1000, "steps between two checkpoints", positive_integer, metavar="STEPS", on_resume=FREE)
    keep_checkpoints: int = flag(
        2, "how many of the newest checkpoints to keep", positive_integer, metavar="N", on_resume=FREE
    )
    log_every: int = flag(20, "steps between two log lines", positive_integer, metavar="STEPS", on_resume=FREE)
    report_to: str = flag("none", "also log to this tracker", choices=["none", "tensorboard"], on_resume=FREE)

    @property
    def resumes(self) -> bool:
        """Whether a run in `output_dir` may be resumed: asked for, or the launcher's restart after a process died."""
        return self.resume or is_restart()

    def __post_init__(self) -> None:
        if self.compile and self.gradient_checkpointing:
            raise InputError("--compile and --gradient-checkpointing exclude each other: use one of them")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """All flags of a stage, by group. Only what starts a run takes all of them; the parts take a group, or a value."""

    stage: ClassVar[Stage]
    data: TrainingDataOptions
    detector: DetectorOptions
    schedule: ScheduleOptions
    run: RunOptions

    def __post_init__(self) -> None:
        model = self.detector.model
        if model is not None and model not in MODELS:
            raise InputError(f"--model {model}: no such detector; choose one of {', '.join(MODELS)}")
        if self.data.streaming:
            if self.data.data is None:
                raise InputError("--streaming needs --data: a data set on the hub, or a folder of parquet files")
            for name, is_set in (
                ("--cache", self.to_dict().get("cache", "none") != "none"),
                ("--repeat-threshold", self.data.repeat_threshold is not None),
                ("--classes", self.data.classes is not None),
                ("--micro-batch-size auto", self.schedule.micro_batch_size == "auto"),
            ):
                if is_set:
                    raise InputError(f"--streaming excludes {name}, which looks at all images first: leave it out")

    def to_dict(self) -> dict[str, Any]:
        """All values by the fields' names, as JSON holds them."""
        groups = [getattr(self, group.name) for group in fields(self)]
        return {"stage": self.stage.name} | {
            one.name: to_json(getattr(group, one.name)) for group in groups for one in fields(group)
        }

    def changed(self, values: dict[str, Any]) -> Self:
        """The flags with other values of some fields."""
        groups = {group.name: getattr(self, group.name) for group in fields(self)}
        for name, group in groups.items():
            own = {one.name: values[one.name] for one in fields(group) if one.name in values}
            groups[name] = replace(group, **own)
        return replace(self, **groups)


@dataclass(frozen=True, kw_only=True)
class PretrainFlags(Flags):
    """All flags of pretrain.py."""

    stage = PRETRAIN
    images: PretrainImageOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detector.model is None:
            raise InputError(f"--model is missing: one of {', '.join(MODELS)}")


@dataclass(frozen=True, kw_only=True)
class FinetuneFlags(Flags):
    """All flags of finetune.py."""

    stage = FINETUNE
    detector: FinetuneDetectorOptions
    images: FinetuneImageOptions

    def __post_init__(self) -> None:
        super().__post_init__()
        init, kind = self.detector.init, self.detector.init_kind
        if self.detector.model is None and kind != "run":
            raise InputError(f"--model is missing: one of {', '.join(MODELS)}")
        if kind == "run" and Path(init).suffix in WEIGHT_FILES:
            raise InputError(f"--init {init}: no such file of weights")
        if self.detector.norm == "group" and kind in ("imagenet", "file"):
            raise InputError(f"--norm group with --init {init}: such weights are trained with their own norms")


SomeFlags = TypeVar("SomeFlags", bound=Flags)
TITLES = {
    "data": "data", "detector": "detector", "images": "images", "schedule": "schedule and batch", "run": "run",
}  # fmt: skip


def parse_flags(kind: type[SomeFlags], description: str, argv: list[str] | None = None) -> SomeFlags:
    """The flags of a stage, from the command line and the config.json that it may name.

    Raises:
        InputError: a flag is unknown or its value impossible.
    """
    groups = option_groups(kind)
    parser = make_parser(description)
    text = "a run's config.json: its flags become the defaults"
    parser.add_argument("--config", type=any_path, metavar="FILE", help=text)
    for name, options in groups.items():
        add_flags(parser, options, TITLES[name], paper=kind.stage.paper, small=kind.stage.small)
    args = parser.parse_args(argv)
    if args.config is not None:
        saved = _saved_values(args.config, kind)
        given, _ = parser.parse_known_args(argv, type(args)(**dict.fromkeys(LENGTHS)))
        if any(getattr(given, name) is not None for name in LENGTHS):  # it replaces the saved one, of whatever kind
            saved = {name: value for name, value in saved.items() if name not in LENGTHS}
        try:
            arguments = [text for options in groups.values() for text in to_arguments(saved, options)]
            defaults = parser.parse_args(arguments)
        except InputError as error:
            raise InputError(f"--config {args.config}: {error}") from error
        parser.set_defaults(**vars(defaults))
        args = parser.parse_args(argv)
    return kind(**{name: read_flags(args, options) for name, options in groups.items()})


def is_restart() -> bool:
    """Whether the launcher has started this program again, after a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def option_groups(kind: type[Flags]) -> dict[str, type]:
    """The options class of each group of flags, in the order of the help."""
    types: dict[str, Any] = {one.name: one.type for one in fields(kind)}
    return {name: types[name] for name in TITLES}


def on_resume(kind: type[Flags], rule: str) -> list[str]:
    """The fields of a stage's flags to which one of flags.py's rules for resuming applies."""
    return [
        one.name
        for options in option_groups(kind).values()
        for one in fields(options)
        if one.metadata["on_resume"] == rule
    ]


def read_config(path: Path) -> dict[str, Any]:
    """The flags in a run's config.json, as JSON holds them. Raises InputError."""
    try:
        saved = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a run's config.json ({error})") from error
    if not isinstance(saved, dict):
        raise InputError(f"{path}: is no run's config.json: its 'settings' are no object")
    return saved


def _saved_values(path: Path, kind: type[Flags]) -> dict[str, Any]:
    """The flags of an earlier run of the same stage. Raises InputError."""
    saved = read_config(path)
    if saved.pop("stage", kind.stage.name) != kind.stage.name:
        raise InputError(f"--config {path}: is of the other stage; give it to the other script")
    # Earlier versions wrote all flags of both stages, where those of the other one had no meaning.
    known = {one.name for f in (PretrainFlags, FinetuneFlags) for o in option_groups(f).values() for one in fields(o)}
    if unknown := set(saved) - known:
        raise InputError(f"--config {path}: has unknown settings: {', '.join(sorted(unknown))}")
    saved.pop("resume", None)
    return saved
