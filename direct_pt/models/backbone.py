"""Backbones: any timm network with a feature hierarchy, from random weights, and what may be frozen in it."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.errors import InputError

STRIDES = (4, 8, 16, 32)
DROP_PATH = 0.2  # of networks with LayerNorm (paper: Swin-T)
# Window attention is built for one image size unless told that any may come.
ANY_SIZE = {"strict_img_size": False, "always_partition": True}


class Backbone(nn.Module):
    """C2..C5 of a timm network, randomly initialised. Its parameters keep timm's names.

    Networks that normalise with LayerNorm (Swin, ConvNeXt) leave the sums of their stages as they are: here a LayerNorm
    follows each output, as in the detection version of Swin.

    Attributes:
        channels: of C2..C5.
        has_layernorm: whether it is such a network.

    Raises:
        InputError: timm does not know `name`, it gives no maps at strides 4, 8, 16 and 32, or it takes one size only.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(get_close_matches(name, timm.list_models(), n=3)) or "resnet18, resnet50"
            raise InputError(f"--backbone {name}: timm has no model of this name; try {close}")
        options: dict[str, Any] = dict(ANY_SIZE) if name.startswith(("swin_", "swinv2_")) else {}
        try:
            network = timm.create_model(name, pretrained=False, features_only=True, **options)
            self.has_layernorm = any(isinstance(layer, nn.LayerNorm) for layer in network.modules())
            reductions = network.feature_info.reduction()
            options["out_indices"] = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
            if self.has_layernorm:
                options["drop_path_rate"] = DROP_PATH
            network = timm.create_model(name, pretrained=False, features_only=True, **options)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"--backbone {name}: has no feature maps at strides 4, 8, 16 and 32; use a hierarchical network "
                "such as resnet18, resnet50, convnext_tiny or swin_tiny_patch4_window7_224"
            ) from error
        self.network = network
        self.channels: list[int] = network.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels if self.has_layernorm)
        self.channels_last = getattr(network, "output_fmt", None) == "NHWC"
        _undo_zero_init(network)
        if self.has_layernorm:
            _undo_zero_biases(network)
        for module in network.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = DetectionSwinBlock
        self._try(name)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] at strides 4, 8, 16, 32 of normalised images [B, 3, H, W]."""
        maps = self.network(images) if self.training else self.network.forward(images)  # not as compiled
        if not self.channels_last and self.norms:
            maps = [feature.permute(0, 2, 3, 1) for feature in maps]
        if self.norms:
            maps = [norm(feature) for norm, feature in zip(self.norms, maps, strict=True)]
        return [feature.permute(0, 3, 1, 2) for feature in maps] if self.channels_last or self.norms else maps

    def compile_training(self, one_shape: bool, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the network for training, in place; names stay. Other modes, with their many shapes, run uncompiled.

        Args:
            one_shape: all batches have the same; otherwise one compilation is to serve all of them.
            backend: of torch.compile.

        Raises:
            InputError: the network is compiled anew for each shape.
        """
        windowed = SwinTransformerBlock | SwinTransformerV2Block
        if not one_shape and any(isinstance(module, windowed) for module in self.network.modules()):
            raise InputError("--compile: Swin is compiled anew for each shape, and here there are many; leave it out")
        self.network.compile(dynamic=not one_shape, backend=backend)

    def stem_and_first_stage(self) -> list[nn.Parameter]:
        """What fine-tuning freezes: all up to the end of the first stage, as timm names it; of networks with LayerNorm
        nothing."""
        first_stage = self.network.feature_info.module_name()[0]
        names = [name for name, _ in self.network.named_parameters()]
        prefixes = (f"{first_stage}.", f"{first_stage.replace('.', '_')}.")
        inside = [place for place, name in enumerate(names) if name.startswith(prefixes)]
        if not inside or self.has_layernorm:
            return []
        return list(self.network.parameters())[: inside[-1] + 1]

    @torch.no_grad()
    def _try(self, name: str) -> None:
        """Some networks take one image size only, or start from another stride than they state."""
        self.eval()
        try:
            for height, width in ((96, 160), (224, 128)):
                sizes = [tuple(feature.shape[1:]) for feature in self(torch.zeros(1, 3, height, width))]
                assert sizes == [(c, height // s, width // s) for c, s in zip(self.channels, STRIDES, strict=True)]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise InputError(
                f"--backbone {name}: gives no maps at strides 4, 8, 16 and 32 of images of any size; use a network "
                "such as resnet18, resnet50, convnext_tiny or swin_tiny_patch4_window7_224"
            ) from error
        self.train()


class DetectionSwinBlock(SwinTransformerBlock):
    """timm's block, with windows padded before they are shifted, as in the detection version of Swin: the mask then
    covers the padding, and every odd block shifts at every size."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        below, right = (-side % window for side, window in zip((height, width), self.window_size, strict=True))
        return super()._attn(F.pad(x, (0, 0, 0, right, 0, below)))[:, :height, :width]


def _undo_zero_init(network: nn.Module) -> None:
    """timm starts residual branches at zero (their last norm's weight); the recipe trains them from one."""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) and weight is not None and not weight.any():
            nn.init.ones_(weight)


def _undo_zero_biases(network: nn.Module) -> None:
    """Convolutions that start without a bias make the padding's maps constant, whose LayerNorm multiplies gradients by
    1,000 a layer: ConvNeXt's first gradient would measure 1e10, out of float16's range, and hold AdamW's steps down for
    thousands of steps. As in Swin, whose patch embedding starts with random biases, it then measures about 1."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None and not module.bias.any():
            nn.init.normal_(module.bias, std=0.02)
