"""The feature pyramid. Semantics follow MMDetection's FPN."""

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """P2..P6 from C2..C5: lateral 1x1, nearest upsampling, output 3x3; P6 is P5 subsampled by 2. No norm.

    Args:
        in_channels: of C2..C5.
        channels: of every output.
    """

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for conv in [*self.lateral, *self.output]:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Five maps of `channels` channels, strides 4, 8, 16, 32, 64."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in range(len(merged) - 1, 0, -1):
            finer = merged[level - 1]
            merged[level - 1] = finer + F.interpolate(merged[level], size=finer.shape[-2:], mode="nearest")
        outputs = [output(feature) for output, feature in zip(self.output, merged, strict=True)]
        return [*outputs, F.max_pool2d(outputs[-1], kernel_size=1, stride=2)]
