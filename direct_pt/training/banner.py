"""The start banner: what is about to happen, for a person to check before the hours are spent."""

import contextlib
import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch

import direct_pt
from direct_pt.distributed.launch import computes_bf16, precision_of
from direct_pt.errors import printable
from direct_pt.models.layers import batchnorms
from direct_pt.recipes import MIN_BATCHNORM_IMAGES, MIN_LARGE_SET_IMAGES, Recipe
from direct_pt.training.loop import Run
from direct_pt.training.plan import Plan

MAX_CLASSES = 20  # that are listed
GIT_PLACES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
)  # set for its hooks
OPTIMIZER_NAMES = {"sgd": "SGD, momentum 0.9", "adamw": "AdamW"}


def banner(run: Run, images: str, origin: str, recipe: str, survey: list[str]) -> str:
    """The text.

    Args:
        run: about to begin or to resume.
        images: how training images are resized.
        origin: of the weights.
        recipe: see `recipe_text`.
        survey: lines about the data.
    """
    options, plan, detector, progress = run.options, run.plan, run.model.detector, run.progress
    config = detector.config
    device = torch.cuda.get_device_name() if run.accelerator.device.type == "cuda" else "CPU"
    revision = git_revision()
    sizes = [(_parameter_size(p), p.requires_grad) for p in detector.parameters()]
    trained = [size for size, requires_grad in sizes if requires_grad]
    lines = [
        f"Direct-PT {run.title}: {config.name}, backbone {config.backbone}, norm {config.norm}",
        f"  run        {options.output_dir} ({'' if revision.startswith('version') else 'git '}{revision})",
        f"  device     {plan.processes} x {device}, precision {precision_of(run.accelerator)}, "
        f"torch {torch.__version__}"
        + ", gradient checkpointing" * options.gradient_checkpointing
        + ", compiled backbone" * options.compile,
        f"  train      {run.feed.describe()}",
        f"  val        {run.val.describe() if run.val else 'none: no evaluation'}",
        *(f"  data       {line}" for line in survey),
        f"  images     {images}",
        f"  weights    {origin if not progress.step else f'of the checkpoint of step {progress.step}'}",
        f"  trainable  {len(trained)} of {len(sizes)} tensors, {sum(trained):,} of "
        f"{sum(size for size, _ in sizes):,} parameters",
        f"  recipe     {recipe if not progress.step else 'as the run began'}",
        f"  batch      {plan.global_batch_size} images a step = {plan.processes} process(es) x {plan.micro_batch_size} "
        f"micro-batch x {plan.accumulation} accumulated",
        f"  optimizer  {optimizer_text(run)}",
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
    if device == "CPU" and precision_of(run.accelerator) == "bf16" and not computes_bf16():
        lines.append(
            "  WARNING    this processor imitates bf16, up to a hundred times slower: use --mixed-precision no, or auto"
        )
    counts = run.feed.objects_per_class()
    lines.append(f"  classes    {len(config.class_names)} (id name{': training objects' if counts else ''})")
    names = [f"{number} {name}" for number, name in zip(config.category_ids, config.class_names, strict=True)]
    rows = [f"{name}: {count}" for name, count in zip(names, counts, strict=True)] if counts else names
    lines += [f"             {row}" for row in rows[:MAX_CLASSES]]
    lines += [f"             and {len(rows) - MAX_CLASSES} more"] if len(rows) > MAX_CLASSES else []
    return "\n".join(map(printable, lines))  # a name may hold a new line


def recipe_text(recipe: Recipe, paper: Recipe, plan: Plan, is_given: bool) -> str:
    """Which recipe, why, and how a plan by it differs from the paper's; `is_given`: whether a flag named the recipe."""
    if recipe.name == "paper":
        own = recipe.global_batch_size, recipe.lr_for(plan.global_batch_size), recipe.warmup_steps
        text = "the paper's" + " (--recipe paper)" * is_given
        if own != (plan.global_batch_size, plan.lr, plan.warmup_steps):
            text += f", with batch {plan.global_batch_size}, lr {plan.lr:.3g}, warm-up {plan.warmup_steps} steps"
        return text
    why = "--recipe small" if is_given else f"under {MIN_LARGE_SET_IMAGES:,} training images"
    return (
        f"small ({why}): batch {plan.global_batch_size}, lr {plan.lr:.3g}, warm-up {plan.warmup_steps} steps; the "
        f"paper's (--recipe paper): {paper.global_batch_size}, {paper.lr:.3g}, {paper.warmup_steps}"
    )


def optimizer_text(run: Run) -> str:
    """The recipe's optimizer, with the options that the recipe does not have."""
    clip = "" if run.clip_grad_norm is None else f"; gradients clipped at a norm of {run.clip_grad_norm:g}"
    average = "" if run.average is None else f"; moving average of the weights, decay {run.average.decay:g}"
    name, decay = OPTIMIZER_NAMES[run.recipe.optimizer], run.recipe.weight_decay
    return f"{name}, weight decay {decay:g} but on norms and position tables{clip}{average}"


def git_revision(package: Path = Path(direct_pt.__file__).parent) -> str:
    """Of the code that runs: of this project's own git checkout, or "version X" of an installed package.

    An installed package may lie in a repository of the user's, whose revision says nothing about it.
    """
    checkout = package.resolve().parent
    environment = {name: value for name, value in os.environ.items() if name not in GIT_PLACES}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        tracked = git("ls-files", "--error-unmatch", f"{package.name}/__init__.py")
        if tracked and Path(git("rev-parse", "--show-toplevel")).resolve() == checkout:
            return git("describe", "--always", "--dirty")
    try:
        return f"version {importlib.metadata.version('direct-pt')}"
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _parameter_size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO 3 a process holds none of it
