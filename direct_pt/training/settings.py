"""From command-line flags to settings, and from a run's config.json back to them."""

import argparse
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from direct_pt.data.image_cache import KINDS
from direct_pt.data.sources import DEFAULT_VAL_SHARE, DataOptions
from direct_pt.distributed.launch import PRECISIONS
from direct_pt.errors import InputError
from direct_pt.models.detector import BOX_HEADS, MODELS
from direct_pt.recipes import (
    IMAGE_SIZE,
    LONG_SIDE,
    RECIPES,
    SCHEDULES,
    SHORT_SIDE,
    SMALL,
    SMALL_SET_IMAGES,
    STAGES,
)

# What may differ between a run and its resumption: where and how it runs, not what it computes.
FREE_ON_RESUME = {
    "resume",
    "num_workers",
    "report_to",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "output_dir",
    "cache_dir",
    "gradient_checkpointing",
}
# What may differ besides, as a run that failed may need it to go on; the banner says so.
MENDABLE = {"lr", "warmup_steps", "clip_grad_norm", "micro_batch_size", "mixed_precision"}
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
Number = TypeVar("Number", int, float)
LENGTHS = ("schedule", "epochs", "max_steps")  # flags of which one at most is given


@dataclass(frozen=True, kw_only=True)
class Settings(DataOptions):
    """The flags of pretrain.py and finetune.py as given; None where a default depends on the data or the stage."""

    stage: str
    output_dir: Path
    drop_empty: bool = False
    repeat_threshold: float | None = None
    model: str | None = None
    backbone: str | None = None
    norm: str | None = None
    box_head: str | None = None
    channels: int | None = None
    rois_per_image: int | None = None
    proposals: int | None = None
    init: str = "none"
    image_size: int = IMAGE_SIZE
    cache: str = "none"
    cache_dir: Path | None = None
    short_side: int = SHORT_SIDE
    long_side: int = LONG_SIDE
    recipe: str = "auto"
    schedule: str = "1x"
    epochs: float | None = None
    max_steps: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | str | None = None
    lr: float | None = None
    lr_schedule: str = "recipe"
    warmup_steps: int | None = None
    clip_grad_norm: float | None = None
    ema: float | None = None
    mixed_precision: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    num_workers: int = 2
    eval_every: float | None = None
    save_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 20
    resume: bool = False
    report_to: str = "none"

    @property
    def init_kind(self) -> str:
        """What `init` means: "none", "imagenet", "file" (weights of a backbone) or "run" (a whole detector)."""
        if self.init in ("none", "imagenet"):
            return self.init
        return "file" if Path(self.init).is_file() else "run"

    @property
    def resumes(self) -> bool:
        """Whether a run in `output_dir` goes on: asked for, or started again by the launcher after a process died."""
        return self.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


class _OneLineParser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults and whose errors are one line and exit status 2."""
    return _OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data_arguments(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The flags that say which data and how they are read, in a group of their own: those of DataOptions."""
    data = p.add_argument_group("data")
    kinds = "COCO, Roboflow, YOLO, Pascal VOC or Hugging Face"
    data.add_argument("--data", type=Path, metavar="DIR|NAME", help=f"a folder ({kinds}), or a data set on the hub")
    for split in ("train", "val"):
        text = "COCO in place of --data; several sets are joined by class name"
        data.add_argument(f"--{split}-images", type=Path, nargs="+", metavar="DIR", help=text)
        data.add_argument(f"--{split}-annotations", type=Path, nargs="+", metavar="FILE", help=text)
    data.add_argument("--classes", type=_names, metavar="A,B,...", help="learn these alone (all)")
    text = f"of the training images, held out if there is no validation split; 0: no evaluation ({DEFAULT_VAL_SHARE:g})"
    data.add_argument("--val-share", type=_share, default=DEFAULT_VAL_SHARE, metavar="X", help=text)
    text = "of hub data: x, y, width, height, or x1, y1, x2, y2 (coco)"
    data.add_argument("--bbox-format", choices=["coco", "voc"], default="coco", help=text)
    text = "read the training images of hub data in one direction, without a copy on the disk"
    data.add_argument("--streaming", action="store_true", help=text)
    text = "of a stream, that are shuffled together, and held in memory (1000)"
    data.add_argument("--shuffle-buffer", **_count(1000, "IMAGES", text))
    add_decoding_arguments(data)
    return data


def add_decoding_arguments(p: argparse._ActionsContainer) -> None:
    """The flags that say how image files become pixels."""
    text = "turn photographs upright, unless their annotation says otherwise; or leave them as stored (apply)"
    p.add_argument("--exif", choices=["apply", "ignore"], default="apply", help=text)
    p.add_argument("--alpha", choices=["black", "white"], default="black", help="behind transparent pixels (black)")


def data_options(args: argparse.Namespace) -> DataOptions:
    """What add_data_arguments' flags say."""
    return DataOptions(**{field.name: _frozen(getattr(args, field.name)) for field in fields(DataOptions)})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def parse_training(stage: str, description: str, argv: list[str] | None = None) -> Settings:
    """The settings of pretrain.py or finetune.py.

    Raises:
        InputError: a flag is unknown or its value impossible.
    """
    p = parser(description)
    p.add_argument("--config", type=Path, metavar="FILE", help="a run's config.json: its flags become the defaults")
    data = add_data_arguments(p)
    data.add_argument("--drop-empty", action="store_true", help="leave out images without objects, else negatives")
    text = "show images of classes that fewer than this share of the images have more often, such as 0.001 (off)"
    data.add_argument("--repeat-threshold", type=_share, metavar="X", help=text)
    _add_detector_arguments(p.add_argument_group("detector"), stage)
    _add_image_arguments(p.add_argument_group("images"), stage)
    _add_schedule_arguments(p.add_argument_group("schedule and batch"), stage)
    _add_run_arguments(p.add_argument_group("run"))

    given, _ = p.parse_known_args(argv)
    if given.config is not None:
        saved = _saved_flags(given.config, stage)
        if any(getattr(given, name) is not None for name in LENGTHS):  # it replaces the saved one, of whatever kind
            saved = {name: value for name, value in saved.items() if name not in LENGTHS}
        p.set_defaults(**saved)
    values = {name: _frozen(value) for name, value in vars(p.parse_args(argv)).items()}
    values.pop("config")
    values["schedule"] = values["schedule"] or "1x"
    if values["output_dir"] is None:
        raise InputError("--output-dir is missing: the folder that the run is written to")
    return _checked(Settings(stage=stage, **values))


def _add_detector_arguments(group: argparse._ArgumentGroup, stage: str) -> None:
    """None of them has a default here: the paper's stand in DetectorConfig, and --init brings its own."""
    names = f"one of {', '.join(MODELS)}"
    if stage == "finetune":
        text = "a pre-trained run; random weights, nothing frozen; timm's for the backbone; a file of such weights"
        group.add_argument("--init", metavar="RUN|none|imagenet|FILE", help=text)
        names += "; where --init is no run"
    group.add_argument("--model", metavar="NAME", help=names)
    text = "any timm network with maps at strides 4 to 32 (paper: by --model)"
    group.add_argument("--backbone", metavar="NAME", help=text)
    group.add_argument("--norm", choices=["batch", "group"], help="(paper: batch)")
    group.add_argument("--box-head", choices=list(BOX_HEADS), help="(paper: 4conv1fc; Cascade R-CNN 2fc)")
    group.add_argument("--channels", **_count(None, "N", "width of the pyramid and heads (paper: 256)"))
    group.add_argument("--rois-per-image", **_count(None, "N", "that the second stage learns from (paper: 512)"))
    group.add_argument("--proposals", **_count(None, "N", "an image, that leave the RPN (paper: 1000)"))


def _add_image_arguments(group: argparse._ArgumentGroup, stage: str) -> None:
    if stage == "pretrain":
        group.add_argument("--image-size", **_count(IMAGE_SIZE, "PIXELS", f"of the crops (paper: {IMAGE_SIZE})"))
        text = "keep low-resolution copies: raw is fastest, jpeg a quarter as large and as sharp as the files (none)"
        group.add_argument("--cache", choices=["none", *KINDS], default="none", help=text)
        text = "where (DIRECT_PT_CACHE, else ~/.cache/direct_pt)"
        group.add_argument("--cache-dir", type=Path, metavar="DIR", help=text)
    else:
        group.add_argument("--short-side", **_count(SHORT_SIDE, "PIXELS", f"images fit in (paper: {SHORT_SIDE})"))
        group.add_argument("--long-side", **_count(LONG_SIDE, "PIXELS", f"images fit in (paper: {LONG_SIDE})"))


def _add_schedule_arguments(group: argparse._ArgumentGroup, stage: str) -> None:
    """All counted in optimizer steps or passes over the training images."""
    recipe, small = STAGES[stage], SMALL[stage]
    text = f"whose numbers are the defaults: small below {SMALL_SET_IMAGES:,} training images, else paper (auto)"
    group.add_argument("--recipe", choices=RECIPES, default="auto", help=text)
    length = group.add_mutually_exclusive_group()
    text = f"1x: {recipe.epochs} epochs (paper; small: at least {small['min_images_seen']:,} images seen)"
    length.add_argument("--schedule", choices=list(SCHEDULES), help=text)
    length.add_argument("--epochs", type=positive_float, metavar="N", help="in place of --schedule")
    length.add_argument("--max-steps", **_count(None, "N", "in place of --schedule"))
    sizes = f"(paper: {recipe.global_batch_size}, small: {small['global_batch_size']})"
    text = f"images an optimizer step, over all processes {sizes}"
    group.add_argument("--global-batch-size", **_count(None, "N", text))
    text = (
        f"images at once on a device, the rest is accumulated; auto: as many as fit (paper: {recipe.micro_batch_size})"
    )
    group.add_argument("--micro-batch-size", type=_micro_batch_size, metavar="N|auto", help=text)
    text = f"(paper: {recipe.lr:g} for a batch of {recipe.global_batch_size}; it follows the batch, AdamW's its root)"
    group.add_argument("--lr", type=positive_float, metavar="X", help=text)
    text = "recipe: constant in stage 1, two steps down in stage 2 (paper); cosine: down to 0 (recipe)"
    group.add_argument("--lr-schedule", choices=["recipe", "cosine"], default="recipe", help=text)
    text = f"(paper: {recipe.warmup_steps}, small: {small['warmup_steps']})"
    group.add_argument("--warmup-steps", type=not_negative_integer, metavar="N", help=text)
    text = "scale down gradients that measure more (paper: none)"
    group.add_argument("--clip-grad-norm", type=positive_float, metavar="X", help=text)
    text = "evaluate and keep a moving average of the weights, such as 0.999 (paper: none)"
    group.add_argument("--ema", type=_decay, metavar="DECAY", help=text)


def _add_run_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output-dir", type=Path, metavar="RUN", help="the run's folder")
    group.add_argument("--resume", action="store_true", help="from the newest checkpoint in --output-dir, if any")
    add_device_arguments(group)
    text = "compute the backbone's activations again in the backward pass: less memory, the same gradients, slower"
    group.add_argument("--gradient-checkpointing", action="store_true", help=text)
    text = "compile the backbone in the first steps, which takes minutes: meant for GPUs, no gain on a CPU"
    group.add_argument("--compile", action="store_true", help=text)
    text = "of weights, order and augmentation (0)"
    group.add_argument("--seed", type=not_negative_integer, default=0, metavar="N", help=text)
    text = "between two evaluations (a twelfth of the run)"
    group.add_argument("--eval-every", type=positive_float, metavar="EPOCHS", help=text)
    group.add_argument("--save-every", **_count(1000, "STEPS", "between two checkpoints (1000)"))
    group.add_argument("--keep-checkpoints", **_count(2, "N", "the newest that stay (2)"))
    group.add_argument("--log-every", **_count(20, "STEPS", "between two log lines (20)"))
    group.add_argument("--report-to", choices=["none", "tensorboard"], default="none", help="besides metrics.jsonl")


def add_device_arguments(p: argparse._ActionsContainer) -> None:
    """The flags that say how the machine is used."""
    text = "auto: the launcher's, else fp16 on a GPU, and bf16 on a CPU that computes in it"
    p.add_argument("--mixed-precision", choices=PRECISIONS, default="auto", help=text)
    text = "processes that read images (2)"
    p.add_argument("--num-workers", type=not_negative_integer, default=2, metavar="N", help=text)


def _count(default: int | None, metavar: str, text: str) -> dict[str, Any]:
    """The arguments of a flag that takes a number from 1."""
    return {"type": positive_integer, "default": default, "metavar": metavar, "help": text}


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's config.json, as JSON holds them. Raises InputError."""
    try:
        saved = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a run's config.json ({error})") from error
    if not isinstance(saved, dict):
        raise InputError(f"{path}: is no run's config.json: its 'settings' are no object")
    return saved


def _saved_flags(path: Path, stage: str) -> dict[str, Any]:
    """The flags of an earlier run's config.json."""
    saved = read_settings(path)
    if saved.pop("stage", stage) != stage:
        raise InputError(f"--config {path}: is of the other stage; give it to the other script")
    kinds = {field.name: field.type for field in fields(Settings)}
    unknown = set(saved) - set(kinds)
    if unknown:
        raise InputError(f"--config {path}: has unknown settings: {', '.join(sorted(unknown))}")
    saved.pop("resume", None)
    return {key: _parsed(value, str(kinds[key])) for key, value in saved.items()}


def _parsed(value: Any, kind: str) -> Any:
    """A value of config.json as the flag gives it."""
    if value is None or "Path" not in kind:
        return _frozen(value)
    if "tuple" in kind:  # earlier runs have one alone
        return tuple(map(Path, value if isinstance(value, list) else [value]))
    return Path(value)


def _checked(settings: Settings) -> Settings:
    if settings.stage == "pretrain" and settings.image_size % 32:
        lower = settings.image_size // 32 * 32
        near = " or ".join(str(size) for size in (lower, lower + 32) if size)
        raise InputError(f"--image-size {settings.image_size} is no multiple of 32: use {near}")
    if settings.short_side > settings.long_side:
        raise InputError(f"--short-side {settings.short_side} is above --long-side {settings.long_side}: swap them")
    if settings.stage == "finetune" and settings.init is None:
        raise InputError("--init is missing: the pre-trained run to start from, or none, imagenet or a file of weights")
    if settings.model is None and settings.init_kind != "run":
        raise InputError(f"--model is missing: one of {', '.join(MODELS)}")
    if settings.init_kind == "run" and Path(settings.init).suffix in WEIGHT_FILES:
        raise InputError(f"--init {settings.init}: no such file of weights")
    if settings.streaming:
        if settings.data is None:
            raise InputError("--streaming needs --data: a data set on the hub, or a folder of parquet files")
        for flag, value in (
            ("--cache", settings.cache != "none"),
            ("--repeat-threshold", settings.repeat_threshold is not None),
            ("--classes", settings.classes is not None),
            ("--micro-batch-size auto", settings.micro_batch_size == "auto"),
        ):
            if value:
                raise InputError(f"--streaming excludes {flag}, which looks at all images first: leave it out")
    if settings.compile and settings.gradient_checkpointing:
        raise InputError("--compile and --gradient-checkpointing exclude each other: use one of them")
    if settings.norm == "group" and settings.init_kind in ("imagenet", "file"):
        raise InputError(f"--norm group with --init {settings.init}: such weights are trained with their own norms")
    if settings.model is not None and settings.model not in MODELS:
        raise InputError(f"--model {settings.model}: no such detector; choose one of {', '.join(MODELS)}")
    return settings


def _micro_batch_size(text: str) -> int | str:
    return text if text == "auto" else positive_integer(text)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("names no class: give some, such as person,car")
    return names


def _share(text: str) -> float:
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to below 1")
    return value


def _decay(text: str) -> float:
    value = _number(float, text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1, such as 0.999")
    return value


def _number(kind: type[Number], text: str) -> Number:
    """argparse's own words for what is no number name the function that was to read it."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None


def positive_integer(text: str) -> int:
    """For argparse."""
    value = _number(int, text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def not_negative_integer(text: str) -> int:
    """For argparse."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be below 0")
    return value


def positive_float(text: str) -> float:
    """For argparse."""
    value = _number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value
