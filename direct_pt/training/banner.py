"""What is about to happen, for a person to check before the hours are spent."""

import subprocess
from pathlib import Path

import torch
from accelerate import Accelerator

from direct_pt.distributed.launch import precision_of
from direct_pt.models.detector import Detector
from direct_pt.models.layers import batchnorms
from direct_pt.recipes import MIN_BATCHNORM_IMAGES, SMALL_SET_IMAGES, Recipe, recipe_for
from direct_pt.training.loop import TrainingData
from direct_pt.training.plan import Plan
from direct_pt.training.progress import Progress
from direct_pt.training.settings import Settings


def banner(
    settings: Settings,
    recipe: Recipe,
    plan: Plan,
    detector: Detector,
    data: TrainingData,
    accelerator: Accelerator,
    origin: str,
    progress: Progress,
    survey: list[str],
) -> str:
    """What is about to happen, for a person to check before the hours are spent. `survey` is what the data are like."""
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
        f"  run        {settings.output_dir} (git {git_revision()})",
        f"  device     {plan.processes} x {device}, precision {precision_of(accelerator)}, torch {torch.__version__}"
        + ", gradient checkpointing" * settings.gradient_checkpointing
        + ", compiled backbone" * settings.compile,
        f"  train      {data.feed.describe()}",
        f"  val        {data.val.describe() if data.val else 'none: no evaluation'}",
        *(f"  data       {line}" for line in survey),
        f"  images     {sizes}",
        f"  weights    {origin}",
        f"  trainable  {len(trained)} of {len(list(detector.parameters()))} tensors, "
        f"{sum(map(_size, trained)):,} of {sum(map(_size, detector.parameters())):,} parameters",
        f"  recipe     {_recipe(settings, recipe, plan, detector, progress)}",
        f"  batch      {plan.global_batch_size} images a step = {plan.processes} process(es) x {plan.micro_batch_size} "
        f"micro-batch x {plan.accumulation} accumulated",
        f"  optimizer  {_optimizer(recipe)}{_options(settings)}",
        f"  schedule   {plan.total_steps} steps = {plan.epochs:.1f} epochs, from step {progress.step}; lr {plan.lr:g}, "
        f"warm-up {plan.warmup_steps}, x0.1 after {list(plan.decay_steps) or 'no step'}; "
        f"evaluation every {plan.eval_steps}",
        *(f"  note       {note}" for note in plan.notes),
    ]
    if any(layer.training for layer in batchnorms(detector)) and plan.micro_batch_size < MIN_BATCHNORM_IMAGES:
        lines.append(
            f"  WARNING    BatchNorm trains on micro-batches of {plan.micro_batch_size}: under "
            f"{MIN_BATCHNORM_IMAGES} its statistics are poor; raise --micro-batch-size or use --norm group"
        )
    counts = data.feed.objects_a_class()
    lines.append(f"  classes    {len(config.class_names)} (id name{': training objects' if counts else ''})")
    names = [f"{number} {name}" for number, name in zip(config.category_ids, config.class_names, strict=True)]
    rows = [f"{name}: {count}" for name, count in zip(names, counts, strict=True)] if counts else names
    lines += [f"             {row}" for row in rows[:20]]
    lines += [f"             and {len(rows) - 20} more"] if len(rows) > 20 else []
    return "\n".join(lines)


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO 3 a process holds none of it


def _recipe(settings: Settings, recipe: Recipe, plan: Plan, detector: Detector, progress: Progress) -> str:
    """Which, why, and how it differs from the paper's."""
    if progress.step:
        return "as the run began"
    if recipe.name == "paper":
        return "the paper's" + " (--recipe paper)" * (settings.recipe == "paper")
    paper = recipe_for(settings.stage, detector.config.name, detector.backbone.has_layernorm)
    why = "--recipe small" if settings.recipe == "small" else f"under {SMALL_SET_IMAGES:,} training images"
    return (
        f"small ({why}): batch {plan.global_batch_size}, lr {plan.lr:.3g}, warm-up {plan.warmup_steps} steps; the "
        f"paper's (--recipe paper): {paper.global_batch_size}, {paper.lr:.3g}, {paper.warmup_steps}"
    )


def _optimizer(recipe: Recipe) -> str:
    name = {"sgd": "SGD, momentum 0.9", "adamw": "AdamW, as the backbone normalises with LayerNorm"}[recipe.optimizer]
    return f"{name}, weight decay {recipe.weight_decay:g} but on norms and position tables"


def _options(settings: Settings) -> str:
    clip = "" if settings.clip_grad_norm is None else f"; gradients clipped at a norm of {settings.clip_grad_norm:g}"
    return clip + ("" if settings.ema is None else f"; moving average of the weights, decay {settings.ema:g}")


def git_revision() -> str:
    """Of the code that runs, or unknown outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
