"""Pre-trained weights for the backbone alone: timm's from the hub, or a file."""

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
from direct_pt.models.weights import bad_values, wrong_kind

# The hub has several weights of these; we take torchvision's, which the paper and MMDetection start from.
RESNETS = re.compile(r"resnet(18|34|50|101|152)")


@dataclass(frozen=True)
class LoadedWeights:
    """How many `tensors` were loaded into a backbone, and their `source`, in words."""

    tensors: int
    source: str

    def __str__(self) -> str:
        return f"{self.tensors} tensors of the backbone loaded from {self.source}"


def load_backbone(backbone: Backbone, name: str, source: str) -> LoadedWeights:
    """Load all weights of a backbone's network; the norms that Direct-PT adds to its outputs stay as they are.

    Args:
        backbone: changed in place.
        name: timm's, of the network.
        source: "imagenet" for timm's weights on the hub, downloaded the first time, or a file: a PyTorch or safetensors
            state dict with timm's, torchvision's or the authors' names, with or without a classifier.

    Raises:
        InputError: there are no such weights, they cannot be read, or they do not fit.
    """
    if source == "imagenet":
        tag = f"{name}.tv_in1k" if RESNETS.fullmatch(name) else name
        state, source = _from_hub(tag), f"timm's {tag}"
    else:
        state = _from_file(Path(source), name)
    wanted = backbone.network.state_dict()
    found = {}
    for key in wanted:
        # timm's feature networks write `layers_0` for the classifier's `layers.0`.
        key_in_state = key if key in state else re.sub(r"_(\d+)\.", r".\1.", key, count=1)
        if key_in_state in state:
            found[key] = state[key_in_state]
    required = [key for key in wanted if key in found or not key.endswith("num_batches_tracked")]  # not in old files
    misfits = [key for key in required if key not in found or found[key].shape != wanted[key].shape]
    if misfits:
        first = misfits[0]
        actual = f"found {list(found[first].shape)}" if first in found else "not found"
        raise InputError(
            f"--init {source}: {len(misfits)} of the {len(wanted)} tensors of --backbone {name} are missing or "
            f"misshapen, first {first}: expected {list(wanted[first].shape)}, {actual}; give weights of "
            f"{name}, or the backbone that these are of"
        )
    if reason := bad_values(found) or wrong_kind(found, wanted):
        raise InputError(f"--init {source}: {reason}; give other weights of {name}")
    # A deeper network has all names and shapes of a shallower one, and more blocks in the same parts.
    parts = {re.sub(r"_\d+$", "", key.split(".")[0]) for key in wanted}
    known = timm.create_model(name, pretrained=False).state_dict()
    deeper = [key for key in state if key.split(".")[0] in parts and key not in known]
    if deeper:
        raise InputError(
            f"--init {source}: has {len(deeper)} tensors that --backbone {name} has not, first {deeper[0]}; give "
            f"weights of {name}, or the backbone that these are of"
        )
    backbone.network.load_state_dict({**wanted, **found})
    return LoadedWeights(len(found), source)


def _from_hub(tag: str) -> dict[str, Tensor]:
    """The state dict of timm's classifier `tag`."""
    try:
        return timm.create_model(tag, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--init imagenet: timm's weights {tag} cannot be had ({reason}); without network, download them elsewhere "
            "(timm's page on the hub, model.safetensors) and give the file: --init FILE"
        ) from error


def _from_file(path: Path, name: str) -> dict[str, Tensor]:
    """The file's state dict, with the names of timm's classifier."""
    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
        # timm's own conversion of the names that the network's authors chose, for networks that have one.
        convert = getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
        state = convert(state, timm.create_model(name, pretrained=False)) if convert else state
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # files that are no pickles, or of another network, raise all kinds
        reason = f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
        raise InputError(
            f"--init {path}: cannot be read as weights of {name} ({reason}); the file is "
            "damaged, or holds more than plain weights, and code in it is not run: save its state dict alone, best as "
            "safetensors"
        ) from error
