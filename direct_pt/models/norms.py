"""Normalisation layers: found, frozen out of the running, replaced."""

import math

import torch
from torch import Tensor, nn

GROUPS = 32  # of a GroupNorm; fewer where the channels do not divide into so many


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
