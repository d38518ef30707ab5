"""Backbones: any timm network with feature maps at strides 4 to 32, with random weights."""

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
ANY_IMAGE_SIZE = {"strict_img_size": False, "always_partition": True}  # timm builds window attention for one size only


class Backbone(nn.Module):
    """C2..C5 of a timm network, randomly initialised. Its parameters keep timm's names.

    Networks that normalise with LayerNorm (Swin, ConvNeXt) do not normalise the outputs of their stages. Here a
    LayerNorm follows each output, as in the detection version of Swin.

    Attributes:
        channels: of C2..C5.
        has_layernorm: whether it is such a network.

    Raises:
        InputError: timm does not know `name`, or the network has no maps at strides 4, 8, 16 and 32, or it takes one
            image size only.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(get_close_matches(name, timm.list_models(), n=3)) or "resnet18, resnet50"
            raise InputError(f"--backbone {name}: timm has no model of this name; try {close}")
        options: dict[str, Any] = dict(ANY_IMAGE_SIZE) if name.startswith(("swin_", "swinv2_")) else {}
        try:
            network = timm.create_model(name, pretrained=False, features_only=True, **options)
            self.has_layernorm = any(isinstance(layer, nn.LayerNorm) for layer in network.modules())
            reductions = network.feature_info.reduction()  # of several maps of one stride, the last counts
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
        for module in network.modules():
            # timm starts residual branches at zero (their last norm's weight); the recipe starts them at one.
            weight = module.weight if isinstance(module, nn.BatchNorm2d | nn.GroupNorm) else None
            if weight is not None and not weight.is_meta and not weight.any():
                nn.init.ones_(weight)
            # Without random biases, maps are constant in the padding, and each LayerNorm there multiplies gradients by
            # 1,000. ConvNeXt's first gradient would measure 1e10, overflow float16, and keep AdamW's steps tiny for
            # thousands of steps. With them, as in Swin's patch embedding, it measures about 1.
            bias = module.bias if self.has_layernorm and isinstance(module, nn.Conv2d) else None
            if bias is not None and not bias.is_meta and not bias.any():
                nn.init.normal_(bias, std=0.02)
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = DetectionSwinBlock
        self.check_feature_maps(name)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps [B, C, h, w] at strides 4, 8, 16, 32 of normalised images [B, 3, H, W]."""
        maps = self.network(images) if self.training else self.network.forward(images)  # compiled: training only
        if not self.channels_last and self.norms:
            maps = [feature.permute(0, 2, 3, 1) for feature in maps]
        if self.norms:
            maps = [norm(feature) for norm, feature in zip(self.norms, maps, strict=True)]
        return [feature.permute(0, 3, 1, 2) for feature in maps] if self.channels_last or self.norms else maps

    def compile_training(self, one_shape: bool, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the network for training, in place; names stay. Evaluation, with its many shapes, runs uncompiled.

        Args:
            one_shape: all batches have the same shape; otherwise one compilation serves all shapes.
            backend: of torch.compile.

        Raises:
            InputError: there are many shapes, and the network would be compiled anew for each.
        """
        window_blocks = SwinTransformerBlock | SwinTransformerV2Block
        if not one_shape and any(isinstance(module, window_blocks) for module in self.network.modules()):
            raise InputError("--compile: Swin is compiled anew for each shape, and here there are many; leave it out")
        self.network.compile(dynamic=not one_shape, backend=backend)

    def stem_and_first_stage(self) -> list[nn.Parameter]:
        """What fine-tuning freezes: all parameters up to the end of the first stage; none of networks with
        LayerNorm."""
        first_stage = self.network.feature_info.module_name()[0]
        prefixes = (f"{first_stage}.", f"{first_stage.replace('.', '_')}.")
        names = [name for name, _ in self.network.named_parameters()]
        in_first_stage = [index for index, name in enumerate(names) if name.startswith(prefixes)]
        if not in_first_stage or self.has_layernorm:
            return []
        return list(self.network.parameters())[: in_first_stage[-1] + 1]

    @torch.no_grad()
    def check_feature_maps(self, name: str) -> None:
        """Raise InputError where the maps are not at the strides that timm states, or images must have one size."""
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
