"""Gradient checkpointing: a network's blocks keep their inputs alone, and are computed again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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
