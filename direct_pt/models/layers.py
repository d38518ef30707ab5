"""What is done to layers from outside: normalisation, gradient checkpointing, the kernels of CPU and GPU."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

GROUPS = 32  # of a GroupNorm; fewer where the channels do not divide into so many
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batchnorms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """All BatchNorm layers inside `module`."""
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


@torch.no_grad()
def running_statistics(module: nn.Module) -> list[Tensor]:
    """The running means and variances of the BatchNorm layers that train."""
    training = [layer for layer in batchnorms(module) if layer.training and layer.track_running_stats]
    return [stat for layer in training for stat in (layer.running_mean, layer.running_var) if stat is not None]


def use_groupnorm(detector: nn.Module) -> None:
    """GroupNorm in place of every BatchNorm, and after the convolutions of pyramid and heads that have no norm.

    The latter are those that stand in lists (`nn.ModuleList`); predictors do not. So MMDetection trains from scratch.
    """
    parts = [(part, module) for part, child in detector.named_children() for module in child.modules()]
    for part, module in parts:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                # timm's BatchNormAct2d carries the activation that follows it.
                after = [layer for layer in (getattr(child, "drop", None), getattr(child, "act", None)) if layer]
                norm = _groupnorm(child.num_features)
                setattr(module, name, nn.Sequential(norm, *after) if after else norm)
            elif part != "backbone" and isinstance(module, nn.ModuleList) and isinstance(child, nn.Conv2d):
                setattr(module, name, nn.Sequential(child, _groupnorm(child.out_channels)))


def _groupnorm(channels: int) -> nn.GroupNorm:
    groups = math.gcd(GROUPS, max(1, channels // 2), channels)  # one value alone has no deviation
    return nn.GroupNorm(groups, channels)


class Recomputed:
    """Mixed into a block's class: in training its activations are made anew when the backward pass needs them.

    Gradients stay what they were: random numbers (drop path) are drawn again alike, and BatchNorm's statistics learn
    from the first pass alone.
    """

    training: bool

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the block's class computes."""
        compute = super().forward  # type: ignore[misc]
        if not (self.training and is_grad_enabled()):
            return compute(*inputs, **options)
        inputs = tuple(list(one) if isinstance(one, list) else one for one in inputs)  # DenseNet's list grows on
        return checkpoint(
            compute, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(self)), **options
        )


def recompute_blocks(network: nn.Module) -> int:
    """Make every repeated block of `network` `Recomputed`, in place; names stay. Returns how many there are."""
    blocks = repeated_blocks(network)
    kinds = {kind: type(f"Recomputed{kind.__name__}", (Recomputed, kind), {}) for kind in set(map(type, blocks))}
    for block in blocks:
        block.__class__ = kinds[type(block)]
    return len(blocks)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that the stages are lists of: a ResNet's bottlenecks, the blocks of Swin and ConvNeXt.

    Stages are lists, or modules of members that are all alike. What stands in lists inside a block is part of it.
    """
    members = list(network.children())
    is_stage = isinstance(network, nn.Sequential | nn.ModuleList) or (
        len(members) > 1 and len({type(member) for member in members}) == 1
    )
    found = []
    for member in members:
        inner = repeated_blocks(member)
        found += inner or ([member] if is_stage and _is_block(member) else [])
    return found


def _is_block(module: nn.Module) -> bool:
    """Something that computes, and more than one layer with its norm and activation."""
    layers = sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in module.modules())
    return layers > 1 and not isinstance(module, nn.ModuleList)


@contextmanager
def _statistics_kept(block: Any) -> Iterator[None]:
    """Inside it, `block`'s BatchNorm layers update copies of their running statistics."""
    layers = [layer for layer in block.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    kept = [
        (layer, name, statistic)
        for layer in layers
        if layer.training
        for name in STATISTICS
        if (statistic := getattr(layer, name)) is not None
    ]
    for layer, name, statistic in kept:
        setattr(layer, name, statistic.clone())
    try:
        yield
    finally:
        for layer, name, statistic in kept:
            setattr(layer, name, statistic)


_gpu_everywhere = ContextVar("_gpu_everywhere", default=False)


def takes_gpu_path(tensor: Tensor) -> bool:
    """Which way to compute where a GPU and a CPU have one each."""
    return tensor.is_cuda or _gpu_everywhere.get()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside it a CPU takes the GPU's ways too: slower there, but they need the GPU's memory."""
    token = _gpu_everywhere.set(True)
    try:
        yield
    finally:
        _gpu_everywhere.reset(token)
