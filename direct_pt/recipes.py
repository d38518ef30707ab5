"""What each stage trains with unless a flag says otherwise: the paper's numbers, those for small sets, the optimizer.

Source of the paper's: the released configuration of Li, Zhang, Zhang, "Rethinking Training from Scratch for Object
Detection", arXiv 2106.03112. docs/small_sets.md holds the measurements behind ours.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

IMAGE_SIZE = 448  # stage 1, pixels
SHORT_SIDE, LONG_SIDE = 800, 1333  # stage 2 and testing, pixels
SCHEDULES = {"1x": 1, "3x": 3, "6x": 6}  # times the epochs
RECIPES = ("auto", "paper", "small")
MIN_LARGE_SET_IMAGES = 5_000  # a set of fewer training images is small
MIN_BATCHNORM_IMAGES = 4  # a micro-batch smaller than this gives BatchNorm poor statistics (ours)
POSITION_TABLES = ("relative_position_bias_table", "pos_embed")


@dataclass(frozen=True)
class Recipe:
    """How one stage trains one detector.

    Attributes:
        name: "paper" or "small".
        optimizer: "sgd" with momentum 0.9, or "adamw" with betas (0.9, 0.999).
        global_batch_size: images an optimizer step, over all processes and accumulation.
        micro_batch_size: images that go through the detector together on one device.
        epochs: of schedule "1x".
        lr: for `global_batch_size`; see `lr_for`.
        weight_decay: none on norm layers and position tables.
        warmup_steps: of linear warm-up.
        warmup_factor: share of the lr that the warm-up starts from.
        decays: shares of the run after which the lr falls to a tenth.
        min_images_seen: floor of the length, in images seen; 0 for none.
        min_micro_batch_size: that the small recipe leaves each process; in stage 1 as many as BatchNorm needs.
    """

    name: str
    optimizer: str
    global_batch_size: int
    micro_batch_size: int
    epochs: int
    lr: float
    weight_decay: float
    warmup_steps: int
    warmup_factor: float
    decays: tuple[float, ...]
    min_images_seen: int
    min_micro_batch_size: int

    def lr_for(self, batch: int) -> float:
        """The learning rate for another batch: in proportion to it with SGD, to its square root with AdamW."""
        share = batch / self.global_batch_size
        return self.lr * (math.sqrt(share) if self.optimizer == "adamw" else share)


@dataclass(frozen=True)
class Augmentation:
    """How training images vary. The first four are of stage 1 alone.

    Attributes:
        canvas: "square", "auto", or WIDTHxHEIGHT in pixels: the frame of the crops.
        scale_jitter: (low, high) factors of the size that images are fitted into.
        mix: "none", "mosaic" or "copy-paste": samples made of several images.
        mix_share: of the samples that are.
        flips: one of `transforms.FLIPS`.
        color_jitter: strength of the changes of colour; 0 for none.
        anchor_scale: of a detector with random weights: a number, "auto", or None for the paper's.
    """

    canvas: str = "square"
    scale_jitter: tuple[float, float] = (0.8, 1.2)
    mix: str = "none"
    mix_share: float = 0.5
    flips: str = "horizontal"
    color_jitter: float = 0.0
    anchor_scale: float | str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage and its recipes.

    Attributes:
        name: "pretrain" or "finetune".
        paper: the recipe of detectors whose backbone has BatchNorm.
        adamw: what differs in the paper's with AdamW: for backbones that normalise with LayerNorm (Swin-T).
        retinanet: what differs in the paper's for RetinaNet.
        small: what differs for small data sets; the learning rate follows the batch.
        small_retinanet: what differs for RetinaNet besides.
        small_augmentation: of small data sets; the paper's is Augmentation().
    """

    name: str
    paper: Recipe
    adamw: dict[str, Any]
    retinanet: dict[str, Any]
    small: dict[str, Any]
    small_retinanet: dict[str, Any] = field(default_factory=dict)
    small_augmentation: Augmentation = Augmentation()

    def recipe(self, model: str, optimizer: str, name: str = "paper") -> Recipe:
        """The numbers for one detector.

        Args:
            model: the detector's name.
            optimizer: "sgd" or "adamw", see `paper_optimizer`.
            name: "paper" or "small".
        """
        is_retinanet = model.startswith("retinanet") and optimizer == "sgd"
        recipe = replace(self.paper, **(self.adamw if optimizer == "adamw" else self.retinanet if is_retinanet else {}))
        if name == "small":
            recipe = replace(recipe, name="small", lr=recipe.lr_for(self.small["global_batch_size"]), **self.small)
            recipe = replace(recipe, **(self.small_retinanet if is_retinanet else {}))
        return recipe


# Small sets, stage 1: few images give many updates in small batches, at the paper's rate for such a batch.
# Stage 2: the paper's batch and rate, which trained detectors take after a short warm-up.
PRETRAIN = Stage(
    name="pretrain",
    paper=Recipe(
        name="paper",
        optimizer="sgd",
        global_batch_size=64,
        micro_batch_size=8,
        epochs=48,
        lr=0.08,
        weight_decay=1e-4,
        warmup_steps=500,
        warmup_factor=0.01,
        decays=(),
        min_images_seen=0,
        min_micro_batch_size=MIN_BATCHNORM_IMAGES,
    ),
    adamw={"optimizer": "adamw", "lr": 4e-4, "weight_decay": 0.05},
    retinanet={"lr": 0.04, "warmup_steps": 1000},
    small={"global_batch_size": 8, "warmup_steps": 200, "min_images_seen": 32_000},
)

FINETUNE = Stage(
    name="finetune",
    paper=Recipe(
        name="paper",
        optimizer="sgd",
        global_batch_size=16,
        micro_batch_size=2,
        epochs=12,
        lr=0.02,
        weight_decay=1e-4,
        warmup_steps=500,
        warmup_factor=0.001,
        decays=(8 / 12, 11 / 12),
        min_images_seen=0,
        min_micro_batch_size=1,
    ),
    adamw={"optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05},
    retinanet={},
    small={"global_batch_size": 16, "warmup_steps": 50, "min_images_seen": 4_000},
    small_retinanet={"lr": 0.01},  # half of the others', as in the paper's stage 1; at 0.02 it diverges
)

STAGES = {stage.name: stage for stage in (PRETRAIN, FINETUNE)}


OPTIMIZERS = ("sgd", "adamw")


def paper_optimizer(has_layernorm: bool) -> str:
    """The paper's choice, by how the backbone normalises."""
    return "adamw" if has_layernorm else "sgd"


def recipe_name(choice: str, images: int) -> str:
    """The choice, "paper" or "small"; where it is "auto", by the number of training images (0: not known)."""
    if choice == "auto":
        return "small" if 0 < images < MIN_LARGE_SET_IMAGES else "paper"
    return choice


def make_optimizer(detector: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """The recipe's optimizer of the parameters that train."""
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
