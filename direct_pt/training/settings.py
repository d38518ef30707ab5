"""The flags of pretrain.py and finetune.py, in groups that each part of the program takes alone, and config.json."""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from direct_pt.data.sources import DataOptions
from direct_pt.distributed.launch import DeviceOptions
from direct_pt.errors import InputError
from direct_pt.files import DamagedFile, read_json
from direct_pt.flags import (
    CHANGEABLE,
    FREE,
    LENGTH,
    add_flags,
    any_path,
    batch_size,
    decay,
    environment_number,
    epoch_count,
    flag,
    integer_or_auto,
    make_parser,
    not_negative_integer,
    number_up_to,
    positive_float,
    positive_integer,
    positive_number,
    random_seed,
    read_flags,
    share,
    to_arguments,
    to_json,
    whole_number,
)
from direct_pt.images.tiles import Tiling, chosen_tiling, overlap_flag, tile_side
from direct_pt.models.detector import MODELS
from direct_pt.recipes import (
    FINETUNE,
    MIN_LARGE_SET_IMAGES,
    OPTIMIZERS,
    PRETRAIN,
    RECIPES,
    SCHEDULES,
    Stage,
)
from direct_pt.training.detector_flags import FinetuneDetectorOptions, InitOptions
from direct_pt.training.image_flags import FinetuneImageOptions, PretrainImageOptions
from direct_pt.training.tracker_flags import NO_TRACKER, TRACKERS, check_trackers

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
MAX_PREVIEW = 1000  # samples
MAX_LR = 1e29  # float32 holds it; what is too large for training is found and told by the loop
NEXT_RUN = Path("runs/STAGE-N")  # stands for a folder that is not chosen yet
LENGTHS = ("schedule", "epochs", "max_steps")  # flags that exclude each other


@dataclass(frozen=True, kw_only=True)
class TrainingDataOptions(DataOptions):
    """Which data, and which of their images are shown how often."""

    drop_empty: bool = flag(False, "leave out images without objects, else negatives")
    repeat_threshold: float | None = flag(
        None, "show images of classes that fewer than this share of the images have more often, such as 0.001 (off)",
        share, metavar="X",
    )  # fmt: skip
    train_tiles: int | None = flag(
        None,
        "train and test on overlapping tiles of so many pixels a side, and on the whole images; 0: on these alone "
        "(stage 1: 0, stage 2: as --init)",
        tile_side, metavar="PIXELS",
    )  # fmt: skip
    overlap: float | None = overlap_flag()

    def tiling(self, own: Tiling | None = None) -> Tiling | None:
        """How images are cut, None where they are not; `own` where the flags do not say. Raises InputError."""
        return chosen_tiling("--train-tiles", self.train_tiles, self.overlap, own)


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
        choices=list(SCHEDULES), excludes="length", on_resume=LENGTH,
    )  # fmt: skip
    epochs: float | None = flag(
        None,
        "train for N epochs, in place of --schedule",
        epoch_count,
        metavar="N",
        excludes="length",
        on_resume=LENGTH,
    )
    max_steps: int | None = flag(
        None,
        "train for N steps, in place of --schedule",
        positive_integer,
        metavar="N",
        excludes="length",
        on_resume=LENGTH,
    )
    global_batch_size: int | None = flag(
        None,
        "images per optimizer step, over all processes (paper: {paper.global_batch_size}, small: "
        "{small[global_batch_size]})",
        batch_size, metavar="N", alias="--batch-size",
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
        positive_number(MAX_LR), metavar="X", on_resume=CHANGEABLE,
    )  # fmt: skip
    lr_schedule: str = flag(
        "recipe", "recipe: constant in stage 1, two steps down in stage 2 (paper); cosine: down to 0",
        choices=["recipe", "cosine"],
    )  # fmt: skip
    warmup_steps: int | None = flag(
        None, "steps of linear warm-up (paper: {paper.warmup_steps}, small: {small[warmup_steps]})",
        not_negative_integer, metavar="N", on_resume=CHANGEABLE,
    )  # fmt: skip
    optimizer: str | None = flag(
        None, "sgd or adamw, with the paper's rate for it (paper: adamw where the backbone has LayerNorm, else sgd)",
        choices=list(OPTIMIZERS),
    )  # fmt: skip
    weight_decay: float | None = flag(
        None, "but on norms and position tables (paper: {paper.weight_decay:g}; with adamw {adamw[weight_decay]:g})",
        number_up_to(1), metavar="X",
    )  # fmt: skip
    clip_grad_norm: float | None = flag(
        None, "clip the gradient to this norm (paper: none)", positive_float, metavar="X", on_resume=CHANGEABLE
    )
    ema: float | None = flag(
        None, "evaluate and keep a moving average of the weights, such as 0.999 (paper: none)", decay, metavar="DECAY"
    )
    eval_every: float | None = flag(
        None, "epochs between two evaluations (a twelfth of the run)", epoch_count, metavar="EPOCHS",
        on_resume=CHANGEABLE,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PretrainScheduleOptions(ScheduleOptions):
    """Batch, length and learning rate of stage 1, and how it ends."""

    recompute_norm: bool = flag(
        False, "at the end, compute BatchNorm's statistics anew over up to 1,024 training images"
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(DeviceOptions):
    """Where a run is written, how the machine is used, and how often something is saved or logged."""

    output_dir: Path = flag(
        NEXT_RUN, "the folder that the run is written to, counted up; with --resume the last one",
        any_path, metavar="RUN", on_resume=FREE,
    )  # fmt: skip
    resume: bool = flag(False, "continue from the newest checkpoint in --output-dir, if any", on_resume=FREE)
    gradient_checkpointing: bool = flag(
        False, "compute the backbone's activations again in the backward pass: less memory, the same gradients, slower",
        on_resume=FREE,
    )  # fmt: skip
    compile: bool = flag(
        False, "compile the backbone in the first steps, which takes minutes: meant for GPUs, no gain on a CPU"
    )
    seed: int = flag(0, "random seed of weights, order of images and augmentation", random_seed, metavar="N")
    save_every: int = flag(1000, "steps between two checkpoints", positive_integer, metavar="STEPS", on_resume=FREE)
    keep_checkpoints: int = flag(
        2, "how many of the newest checkpoints to keep", positive_integer, metavar="N", on_resume=FREE
    )
    log_every: int = flag(20, "steps between two log lines", positive_integer, metavar="STEPS", on_resume=FREE)
    patience: int | None = flag(
        None, "end the run after N evaluations without a higher AP (off)", positive_integer, metavar="N", on_resume=FREE
    )
    min_delta: float = flag(0.0, "how much higher an AP must be for --patience", share, metavar="X", on_resume=FREE)
    max_hours: float | None = flag(
        None, "save and end after so many hours, to be resumed", positive_float, metavar="X", on_resume=FREE
    )
    preview: int | None = flag(
        None, "write N training samples, as the detector will see them, to RUN/samples.jpg, and end",
        whole_number(1, MAX_PREVIEW), metavar="N", on_resume=FREE,
    )  # fmt: skip
    report_to: tuple[str, ...] = flag(
        (NO_TRACKER,), f"also give settings, figures and pictures to these trackers: {', '.join(TRACKERS)}",
        choices=(NO_TRACKER, *TRACKERS), metavar="NAME", many=True, on_resume=FREE,
    )  # fmt: skip

    @property
    def resumes(self) -> bool:
        """Whether a run in `output_dir` may be resumed: asked for, or the launcher's restart after a process died."""
        return self.resume or is_restart()

    def __post_init__(self) -> None:
        if self.compile and self.gradient_checkpointing:
            raise InputError("--compile and --gradient-checkpointing exclude each other: use one of them")
        if self.min_delta and self.patience is None:
            raise InputError("--min-delta says how much --patience waits for: give that too, or leave it out")
        check_trackers(self.report_to)

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers that --report-to names."""
        return check_trackers(self.report_to)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """All flags of a stage, by group. Only what starts a run takes all of them; the parts take a group, or a value."""

    stage: ClassVar[Stage]
    data: TrainingDataOptions
    detector: InitOptions
    schedule: ScheduleOptions
    run: RunOptions

    def __post_init__(self) -> None:
        model = self.detector.model
        if model is not None and model not in MODELS:
            raise InputError(f"--model {model}: no such detector; choose one of {', '.join(MODELS)}")
        init, kind = self.detector.init, self.detector.init_kind
        if self.detector.weights != InitOptions.weights and kind != "run":
            raise InputError(f"--weights {self.detector.weights}: --init {init} is no run; leave the flag out")
        if model is None and kind != "run":
            raise InputError(f"--model is missing: one of {', '.join(MODELS)}")
        if kind == "run" and Path(init).suffix in WEIGHT_FILES:
            raise InputError(f"--init {init}: no such file of weights")
        if self.detector.norm == "group" and kind in ("imagenet", "file"):
            raise InputError(f"--norm group with --init {init}: such weights are trained with their own norms")
        if self.run.patience is not None and self.to_dict().get("recompute_norm"):
            raise InputError(
                "--patience excludes --recompute-norm, which changes what the last evaluation has measured"
            )
        if self.data.streaming:
            if self.data.data is None:
                raise InputError("--streaming needs --data: a data set on the hub, or a folder of parquet files")
            for name, is_set in (
                ("--cache", self.to_dict().get("cache", "none") != "none"),
                ("--repeat-threshold", self.data.repeat_threshold is not None),
                ("--train-tiles", bool(self.data.train_tiles)),
                ("--classes", self.data.classes is not None),
                ("--micro-batch-size auto", self.schedule.micro_batch_size == "auto"),
                ("--anchor-scale auto", self.detector.anchor_scale == "auto"),
                ("--recompute-norm", bool(self.to_dict().get("recompute_norm"))),
                ("--canvas auto", self.to_dict().get("canvas") == "auto"),
                ("--mix", self.to_dict().get("mix") not in (None, "none")),
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
    schedule: PretrainScheduleOptions
    images: PretrainImageOptions


@dataclass(frozen=True, kw_only=True)
class FinetuneFlags(Flags):
    """All flags of finetune.py."""

    stage = FINETUNE
    detector: FinetuneDetectorOptions
    images: FinetuneImageOptions


SomeFlags = TypeVar("SomeFlags", bound=Flags)
TITLES = {
    "data": "data", "detector": "detector", "images": "images", "schedule": "schedule and batch", "run": "run",
}  # fmt: skip


def parse_flags(kind: type[SomeFlags], description: str, argv: list[str] | None = None) -> SomeFlags:
    """The flags of a stage, from the command line and the config.json that it may name.

    Raises:
        InputError: a flag is unknown or its value impossible.
    """
    groups, parser = option_groups(kind), _parser(kind, description)
    args = parser.parse_args(argv)
    if args.config is not None:
        saved = _saved_values(args.config, kind)
        given, _ = parser.parse_known_args(argv, type(args)(**dict.fromkeys(LENGTHS)))
        if any(getattr(given, name) is not None for name in LENGTHS):  # it replaces the saved one, of whatever kind
            saved = {name: value for name, value in saved.items() if name not in LENGTHS}
        try:
            defaults = _read_saved(parser, saved, kind)
        except InputError as error:
            raise InputError(f"--config {args.config}: {error}") from error
        parser.set_defaults(**vars(defaults))
        args = parser.parse_args(argv)
    try:
        return kind(**{name: read_flags(args, options) for name, options in groups.items()})
    except InputError as error:
        if args.config is None:
            raise
        raise InputError(f"--config {args.config}, with the flags beside it: {error}") from error


def _parser(kind: type[Flags], description: str) -> argparse.ArgumentParser:
    """Of all flags of a stage."""
    parser, stage = make_parser(description), kind.stage
    text = "a run's config.json: its flags become the defaults"
    parser.add_argument("--config", type=any_path, metavar="FILE", help=text)
    for name, options in option_groups(kind).items():
        add_flags(parser, options, TITLES[name], paper=stage.paper, small=stage.small, adamw=stage.adamw)
    return parser


def _read_saved(parser: argparse.ArgumentParser, saved: dict[str, Any], kind: type[Flags]) -> argparse.Namespace:
    """What saved values say, read as if flags had given them. Raises InputError."""
    arguments = [text for options in option_groups(kind).values() for text in to_arguments(saved, options)]
    return parser.parse_args(arguments)


def checked_values(saved: dict[str, Any], kind: type[Flags]) -> dict[str, Any]:
    """The saved values of some flags, as their checks read them. Raises InputError."""
    found = vars(_read_saved(_parser(kind, ""), saved, kind)) if saved else {}
    return {name: found[name] for name in saved}


def is_restart() -> bool:
    """Whether the launcher has started this program again, after a process died."""
    return environment_number("TORCHELASTIC_RESTART_COUNT", 0, 0, 10**9) > 0


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
        content = read_json(path)
        saved = content.get("settings") if isinstance(content, dict) else None
        if not isinstance(saved, dict):
            raise DamagedFile("(it has no object 'settings')")
    except DamagedFile as error:
        reason = str(error).removeprefix(f"{path}: cannot be read as JSON ")
        raise InputError(f"{path}: cannot be read as a run's config.json {reason}; give that of a run") from error
    return saved


def _saved_values(path: Path, kind: type[Flags]) -> dict[str, Any]:
    """The flags of an earlier run of the same stage. Raises InputError."""
    try:
        saved = read_config(path)
    except InputError as error:
        raise InputError(f"--config {error}") from error
    if saved.pop("stage", kind.stage.name) != kind.stage.name:
        raise InputError(f"--config {path}: is of the other stage; give it to the other script")
    # Earlier versions wrote all flags of both stages, where those of the other one had no meaning.
    known = {one.name for f in (PretrainFlags, FinetuneFlags) for o in option_groups(f).values() for one in fields(o)}
    if unknown := set(saved) - known:
        raise InputError(f"--config {path}: has unknown settings: {', '.join(sorted(unknown))}")
    saved.pop("resume", None)
    return saved
