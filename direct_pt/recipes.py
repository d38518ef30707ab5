"""The paper's numbers, once: what each stage trains with unless a flag says otherwise.

Source: the released configuration of Li, Zhang, Zhang, "Rethinking Training from Scratch for Object Detection",
arXiv 2106.03112. The floors of steps are ours.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How one stage trains one detector.

    Attributes:
        optimizer: "sgd" with momentum 0.9, or "adamw" with betas (0.9, 0.999).
        global_batch_size: images an optimizer step, over all processes and accumulation.
        micro_batch_size: images that go through the detector together on one device.
        epochs: of schedule "1x".
        lr: for `global_batch_size`; another batch scales it in proportion.
        weight_decay: none on norm layers and position tables.
        warmup_steps: of linear warm-up.
        warmup_factor: share of the lr that the warm-up starts from.
        decays: shares of the run after which the lr falls to a tenth.
        least_steps: that a small data set is given (ours; see README, "Small data sets").
    """

    optimizer: str
    global_batch_size: int
    micro_batch_size: int
    epochs: int
    lr: float
    weight_decay: float
    warmup_steps: int
    warmup_factor: float
    decays: tuple[float, ...]
    least_steps: int


PRETRAIN = Recipe(
    optimizer="sgd",
    global_batch_size=64,
    micro_batch_size=8,
    epochs=48,
    lr=0.08,
    weight_decay=1e-4,
    warmup_steps=500,
    warmup_factor=0.01,
    decays=(),
    least_steps=500,
)

FINETUNE = Recipe(
    optimizer="sgd",
    global_batch_size=16,
    micro_batch_size=2,
    epochs=12,
    lr=0.02,
    weight_decay=1e-4,
    warmup_steps=500,
    warmup_factor=0.001,
    decays=(8 / 12, 11 / 12),
    least_steps=250,
)

STAGES = {"pretrain": PRETRAIN, "finetune": FINETUNE}


def recipe_for(stage: str, model: str, has_layernorm: bool) -> Recipe:
    """The numbers of a stage, "pretrain" or "finetune", for a detector by name, and by how its backbone normalises."""
    recipe = STAGES[stage]
    if has_layernorm:  # the paper's for Swin-T
        return replace(recipe, optimizer="adamw", lr=4e-4 if stage == "pretrain" else 1e-4, weight_decay=0.05)
    if model == "retinanet_r50_fpn" and stage == "pretrain":
        return replace(recipe, lr=0.04, warmup_steps=1000)
    return recipe


SCHEDULES = {"1x": 1, "3x": 3, "6x": 6}  # times the epochs

IMAGE_SIZE = 448  # stage 1, pixels
SHORT_SIDE, LONG_SIDE = 800, 1333  # stage 2 and testing, pixels
LEAST_BATCHNORM_IMAGES = 4  # a micro-batch smaller than this gives BatchNorm poor statistics (ours)
