"""The feature pyramid. Semantics follow MMDetection's FPN."""

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Lateral 1x1, nearest upsampling and output 3x3 for each map of the backbone, then coarser levels. No norm.

    Args:
        in_channels: of the backbone's maps that are used, its last ones.
        channels: of every output.
        convolved_levels: how many coarser levels come out of stride-2 convolutions, the first of them out of the
            backbone's last map (RetinaNet). With none, the one coarser level is the last output subsampled by 2.
    """

    def __init__(self, in_channels: list[int], channels: int, convolved_levels: int = 0) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        for level in range(convolved_levels):
            source_channels = channels if level else in_channels[-1]
            self.output.append(nn.Conv2d(source_channels, channels, 3, stride=2, padding=1))
        for conv in [*self.lateral, *self.output]:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps [B, channels, h, w], each of half the size of the one before it."""
        features = features[-len(self.lateral) :]
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for level in range(len(merged) - 1, 0, -1):  # top-down
            finer = merged[level - 1]
            merged[level - 1] = finer + F.interpolate(merged[level], size=finer.shape[-2:], mode="nearest")
        outputs = [output(feature) for output, feature in zip(self.output, merged, strict=False)]
        convolutions = self.output[len(merged) :]
        if not convolutions:
            return [*outputs, F.max_pool2d(outputs[-1], kernel_size=1, stride=2)]
        coarse = features[-1]
        for conv in convolutions:
            if (
                self.training and coarse.shape[-1] == 1
            ):  # a CPU's bf16 gradient of such a map is partly uninitialised memory
                coarse = F.pad(coarse, (0, 1))  # as the convolution pads it
            coarse = conv(coarse)
            outputs.append(coarse)
        return outputs
