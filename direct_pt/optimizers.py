"""The recipe's optimizers, and which parameters they decay."""

from typing import Any

import torch
from torch import nn

from direct_pt.recipes import Recipe

POSITION_TABLES = ("relative_position_bias_table", "pos_embed")


def make_optimizer(detector: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """The recipe's, for the parameters that train."""
    groups = parameter_groups(detector, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)


def parameter_groups(detector: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that train: with weight decay, and without it those of norm layers and position tables."""
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    exempt = {
        id(p) for layer in detector.modules() if isinstance(layer, norms) for p in layer.parameters(recurse=False)
    }
    exempt |= {id(p) for name, p in detector.named_parameters() if name.endswith(POSITION_TABLES)}
    trained = [p for p in detector.parameters() if p.requires_grad]
    return [
        {"params": params, "weight_decay": decay}
        for params, decay in (
            ([p for p in trained if id(p) not in exempt], weight_decay),
            ([p for p in trained if id(p) in exempt], 0.0),
        )
        if params  # none where BatchNorm is frozen
    ]
