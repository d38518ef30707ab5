"""The flags of both stages that say what the detector is built from and starts from."""

import argparse
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

from direct_pt.checkpoint import KINDS
from direct_pt.flags import flag, number_or_auto, path_or_name, whole_number
from direct_pt.models.detector import BOX_HEADS, FREEZES, MODELS, RETINA_SCALE, RPN_SCALE, DetectorConfig
from direct_pt.models.saved_config import ANCHOR_SCALES, CHANNELS, NORMS, PROPOSALS, ROIS_PER_IMAGE


def anchor_side(text: str) -> float | str:
    """A side in strides, or "auto"."""
    value = number_or_auto(text)
    low, high = ANCHOR_SCALES
    if isinstance(value, float) and not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} must be from {low:g} to {high:g}, or auto")
    return value


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What the detector is built from. None: the paper's, or what --init has."""

    model: str | None = flag(None, f"one of {', '.join(MODELS)}; not needed where --init is a run", metavar="NAME")
    backbone: str | None = flag(
        None, "any timm network with maps at strides 4 to 32 (paper: by --model)", metavar="NAME"
    )
    norm: str | None = flag(None, "normalisation layers (paper: batch)", choices=NORMS)
    box_head: str | None = flag(
        None, "convolutions and fully connected layers of the box head (paper: 4conv1fc; Cascade R-CNN 2fc)",
        choices=list(BOX_HEADS),
    )  # fmt: skip
    channels: int | None = flag(
        None, "width of the pyramid and heads (paper: 256)", whole_number(*CHANNELS), metavar="N"
    )
    rois_per_image: int | None = flag(
        None,
        "RoIs of an image that the second stage learns from (paper: 512)",
        whole_number(*ROIS_PER_IMAGE),
        metavar="N",
    )
    proposals: int | None = flag(
        None, "boxes of an image that the RPN proposes (paper: 1000)", whole_number(*PROPOSALS), metavar="N"
    )

    anchor_scale: float | str | None = flag(
        None,
        "side of each level's smallest anchors, in strides of the level; auto: as the objects need (paper: "
        f"{RPN_SCALE:g}; RetinaNet {RETINA_SCALE:g})",
        anchor_side, metavar="X|auto",
    )  # fmt: skip

    def applied_to(self, config: DetectorConfig, short_side: int, long_side: int) -> DetectorConfig:
        """The configuration with what the flags say about the detector, and the size that images are tested at."""
        names = ("backbone", "norm", "box_head", "channels", "rois_per_image", "proposals")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(config, **given, short_side=short_side, long_side=long_side)


@dataclass(frozen=True, kw_only=True)
class InitOptions(DetectorOptions):
    """What the detector starts from, and is built from."""

    init: str = flag(
        "none", "start from random weights (paper), a run, whatever its classes, or a backbone's: imagenet or a file",
        path_or_name, metavar="none|RUN|imagenet|FILE",
    )  # fmt: skip

    weights: str = flag("last", "of the run that --init names: the last, or those of its highest AP", choices=KINDS)

    @property
    def init_kind(self) -> str:
        """What `init` means: "none", "imagenet", "file" (weights of a backbone) or "run" (a whole detector)."""
        if self.init in ("none", "imagenet"):
            return self.init
        return "file" if Path(self.init).is_file() else "run"


@dataclass(frozen=True, kw_only=True)
class FinetuneDetectorOptions(InitOptions):
    """What the detector of stage 2 starts from."""

    freeze: str = flag(
        "paper", "of a pre-trained detector: BatchNorm, stem and first stage (paper), BatchNorm (norm), or none",
        choices=list(FREEZES),
    )  # fmt: skip

    init: str = flag(
        MISSING, "the pre-trained run to start from, whatever its classes, or none, imagenet or a file of weights",
        path_or_name, metavar="RUN|none|imagenet|FILE",
    )  # fmt: skip
