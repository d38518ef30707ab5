"""Backbones: any timm network with a feature hierarchy, from random weights, and what may be frozen in it."""

import math
from difflib import get_close_matches

import timm
import torch
from torch import Tensor, nn

from direct_pt.errors import InputError

STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """C2..C5 of a timm network, randomly initialised. Its parameters keep timm's names.

    Attributes:
        channels: of C2..C5.

    Raises:
        InputError: timm does not know `name`, or it gives no maps at strides 4, 8, 16 and 32.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(get_close_matches(name, timm.list_models(), n=3)) or "resnet18, resnet50"
            raise InputError(f"--backbone {name}: timm has no model of this name; try {close}")
        try:
            network = timm.create_model(name, pretrained=False, features_only=True)
            reductions = network.feature_info.reduction()
            levels = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
            network = timm.create_model(name, pretrained=False, features_only=True, out_indices=levels)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"--backbone {name}: has no feature maps at strides 4, 8, 16 and 32; use a hierarchical network "
                "such as resnet18 or resnet50"
            ) from error
        self.network = network
        self.channels: list[int] = network.feature_info.channels()
        _undo_zero_init(network)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps at strides 4, 8, 16, 32 of normalised images [B, 3, H, W]."""
        return self.network(images)

    def stem_and_first_stage(self) -> list[nn.Module]:
        """What fine-tuning freezes: everything up to the end of the first stage, as timm names it."""
        first_stage = self.network.feature_info.module_name()[0].replace(".", "_")
        children = dict(self.network.named_children())
        if first_stage not in children:
            return []
        return list(children.values())[: list(children).index(first_stage) + 1]


def _undo_zero_init(network: nn.Module) -> None:
    """timm starts residual branches at zero (their last norm's weight); the recipe trains them from one."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and weight is not None and not weight.any():
            nn.init.ones_(weight)


def replace_batchnorm(module: nn.Module, groups: int = 32) -> None:
    """GroupNorm in place of every BatchNorm2d of `module`, in place; for batches too small for BatchNorm.

    Args:
        module: searched to its leaves.
        groups: of a norm; fewer where the channels do not divide into so many.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm: nn.Module = nn.GroupNorm(math.gcd(groups, child.num_features), child.num_features)
            # timm's BatchNormAct2d carries the activation that follows it.
            after = [
                layer for layer in (getattr(child, "drop", None), getattr(child, "act", None)) if layer is not None
            ]
            setattr(module, name, nn.Sequential(norm, *after) if after else norm)
        else:
            replace_batchnorm(child, groups)


def batchnorms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """All BatchNorm layers inside `module`."""
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


@torch.no_grad()
def running_statistics(module: nn.Module) -> list[Tensor]:
    """The running means and variances of the BatchNorm layers that train."""
    training = [layer for layer in batchnorms(module) if layer.training and layer.track_running_stats]
    return [stat for layer in training for stat in (layer.running_mean, layer.running_var) if stat is not None]
