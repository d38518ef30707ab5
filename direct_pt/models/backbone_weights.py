"""Weights for the backbone alone, as ImageNet training leaves them: timm's from the hub, or a file of them."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
from huggingface_hub.errors import HfHubHTTPError
from timm.models import load_state_dict
from torch import Tensor

from direct_pt.errors import InputError
from direct_pt.models.backbone import Backbone

# Of a ResNet's several weights on the hub torchvision's, which the paper and MMDetection start from.
TORCHVISION = re.compile(r"resnet(18|34|50|101|152)")


@dataclass(frozen=True)
class Loaded:
    """How many `tensors` a backbone got, and its weights' `source`; `str` says both."""

    tensors: int
    source: str

    def __str__(self) -> str:
        return f"{self.tensors} tensors of the backbone loaded from {self.source}"


def load_backbone(backbone: Backbone, name: str, source: str) -> Loaded:
    """Load a backbone's weights, all of them; norms that Direct-PT adds behind its outputs stay as they are.

    Args:
        backbone: changed in place.
        name: timm's.
        source: "imagenet" for timm's weights on the hub, which are downloaded the first time, or a file: a PyTorch or
            safetensors state dict with timm's, torchvision's or the authors' names, with or without a classifier.

    Raises:
        InputError: there are no such weights, they cannot be read, or they do not fit.
    """
    if source == "imagenet":
        tag = f"{name}.tv_in1k" if TORCHVISION.fullmatch(name) else name
        state, source = _from_hub(tag), f"timm's {tag}"
    else:
        state = _from_file(Path(source), name)
    wanted = backbone.network.state_dict()
    found = {ours: state[theirs] for ours in wanted if (theirs := _classifier_name(ours, state)) is not None}
    old = [key for key in wanted if key not in found and key.endswith("num_batches_tracked")]  # files without counts
    wrong = [key for key in wanted if key not in old and (key not in found or found[key].shape != wanted[key].shape)]
    if wrong:
        have = f"found {list(found[wrong[0]].shape)}" if wrong[0] in found else "not found"
        raise InputError(
            f"--init {source}: {len(wrong)} of the {len(wanted)} tensors of --backbone {name} are missing or "
            f"misshapen, first {wrong[0]}: expected {list(wanted[wrong[0]].shape)}, {have}; give weights of "
            f"{name}, or the backbone that these are of"
        )
    # A deeper network has every name and shape of a shallower one, and more blocks in the same parts.
    parts = {re.sub(r"_\d+$", "", key.split(".")[0]) for key in wanted}
    known = timm.create_model(name, pretrained=False).state_dict()
    deeper = [key for key in state if key.split(".")[0] in parts and key not in known]
    if deeper:
        raise InputError(
            f"--init {source}: has {len(deeper)} tensors that --backbone {name} has not, first {deeper[0]}; give "
            f"weights of {name}, or the backbone that these are of"
        )
    backbone.network.load_state_dict({**wanted, **found})
    return Loaded(len(found), source)


def _from_hub(tag: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(tag, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--init imagenet: timm's weights {tag} cannot be had ({reason}); without network, download them elsewhere "
            "(timm's page on the hub, model.safetensors) and give the file: --init FILE"
        ) from error


def _from_file(path: Path, name: str) -> dict[str, Tensor]:
    """The file's weights by the names of timm's classifier."""
    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
        # timm's own rules for names that the networks' authors chose, where there are any.
        rules = getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
        state = rules(state, timm.create_model(name, pretrained=False)) if rules else state
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # what is no pickle, or of another network, may raise any
        reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
        raise InputError(
            f"--init {path}: cannot be read as weights of {name} ({reason}); the file is "
            "damaged, or holds more than plain weights, and code in it is not run: save its state dict alone, best as "
            "safetensors"
        ) from error


def _classifier_name(ours: str, state: dict[str, Tensor]) -> str | None:
    """The name in `state` of a weight of the feature network, where timm writes `layers_0` for `layers.0`."""
    return next((key for key in (ours, re.sub(r"_(\d+)\.", r".\1.", ours, count=1)) if key in state), None)
