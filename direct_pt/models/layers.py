"""Changes to layers that the networks need not know of, in three sections: BatchNorm and GroupNorm, gradient
checkpointing, and the choice between the code paths of CPU and GPU."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

MAX_GROUPS = 32  # of a GroupNorm; fewer where the channels are not divisible by so many
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of a BatchNorm


# BatchNorm and GroupNorm


def batchnorms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """All BatchNorm layers inside `module`."""
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


@torch.no_grad()
def running_statistics(module: nn.Module) -> list[Tensor]:
    """The running means and variances of the BatchNorm layers in training mode."""
    training = [layer for layer in batchnorms(module) if layer.training and layer.track_running_stats]
    return [stat for layer in training for stat in (layer.running_mean, layer.running_var) if stat is not None]


def use_groupnorm(detector: nn.Module) -> None:
    """Replace every BatchNorm by GroupNorm, and add one after each convolution of the pyramid and the heads that stands
    in a list (`nn.ModuleList`), as MMDetection does for training from scratch. Predictors stand in none.
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
    # At least two channels a group: a single value has no variance.
    return nn.GroupNorm(math.gcd(MAX_GROUPS, max(1, channels // 2), channels), channels)


# Gradient checkpointing


def recompute_blocks(network: nn.Module) -> int:
    """Have every repeated block of `network` recompute its activations in the backward pass, in place. Returns how
    many blocks there are; their parameters keep their names."""
    blocks = repeated_blocks(network)
    classes = {kind: type(f"Recomputed{kind.__name__}", (Recomputed, kind), {}) for kind in set(map(type, blocks))}
    for block in blocks:
        block.__class__ = classes[type(block)]
    return len(blocks)


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that the stages are lists of: a ResNet's bottlenecks, the blocks of Swin and ConvNeXt.

    Stages are lists, or modules of children that are all of one type. Lists inside a block are part of it.
    """
    children = list(network.children())
    is_stage = isinstance(network, nn.Sequential | nn.ModuleList) or (
        len(children) > 1 and len({type(child) for child in children}) == 1
    )
    blocks = []
    for child in children:
        # More than one layer with its norm and activation, and something that computes.
        num_layers = sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in child.modules())
        is_block = is_stage and num_layers > 1 and not isinstance(child, nn.ModuleList)
        blocks += repeated_blocks(child) or ([child] if is_block else [])
    return blocks


class Recomputed:
    """Mixed into a block's class: in training, its activations are recomputed when the backward pass needs them.

    Gradients stay the same: the second forward pass draws the same random numbers (drop path), and does not update
    BatchNorm's statistics.
    """

    training: bool

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the block's own class computes."""
        compute = super().forward  # type: ignore[misc]
        if not (self.training and is_grad_enabled()):
            return compute(*inputs, **options)
        inputs = tuple(list(one) if isinstance(one, list) else one for one in inputs)  # DenseNet's list grows later
        return checkpoint(
            compute, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _keep_statistics(self)), **options
        )


@contextmanager
def _keep_statistics(block: Any) -> Iterator[None]:
    """Inside it, `block`'s BatchNorm layers update copies of their running statistics."""
    layers = [layer for layer in block.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    saved = [
        (layer, name, statistic)
        for layer in layers
        if layer.training
        for name in STATISTICS
        if (statistic := getattr(layer, name)) is not None
    ]
    for layer, name, statistic in saved:
        setattr(layer, name, statistic.clone())
    try:
        yield
    finally:
        for layer, name, statistic in saved:
            setattr(layer, name, statistic)


# Code paths of CPU and GPU

_gpu_path_forced = ContextVar("_gpu_path_forced", default=False)


def takes_gpu_path(tensor: Tensor) -> bool:
    """Whether to compute with the GPU's code, where CPU and GPU have different ones."""
    return tensor.is_cuda or _gpu_path_forced.get()


@contextmanager
def force_gpu_path() -> Iterator[None]:
    """Inside it a CPU takes the GPU's code path too: slower, but it needs the memory, and waits, that a GPU would."""
    token = _gpu_path_forced.set(True)
    try:
        yield
    finally:
        _gpu_path_forced.reset(token)
