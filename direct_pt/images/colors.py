"""Random changes of colour."""

import cv2
import numpy as np
import torch
from torch import Tensor

MAX_COLOR_JITTER = 0.9
GREY = np.array([0.299, 0.587, 0.114])  # BT.601's weights of R, G, B
HUE_SHARE = 0.1  # of a turn, at a strength of 1


def jitter_colors(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue at random, in one affine map of the colours.

    Args:
        image: [3, h, w] uint8 RGB.
        strength: from 0 to MAX_COLOR_JITTER. Brightness, contrast and saturation are multiplied by U(1 - strength,
            1 + strength), the hue is turned by up to HUE_SHARE * strength of a circle, as in YIQ.
        rng: draws four numbers.

    Returns:
        [3, h, w] uint8.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    angle = 2 * np.pi * HUE_SHARE * strength * rng.uniform(-1, 1)
    matrix = saturation * _turned_hue(angle) + (1 - saturation) * np.outer(np.ones(3), GREY)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    mean = GREY @ np.array(cv2.mean(pixels)[:3])
    gain = brightness * contrast
    affine = np.column_stack([gain * matrix, np.full(3, brightness * (1 - contrast) * mean)])
    return torch.from_numpy(cv2.transform(pixels, affine)).permute(2, 0, 1)


def _turned_hue(angle: float) -> np.ndarray:
    """[3, 3], which turns the colours around the axis of grey, and keeps GREY's weighted sum."""
    to_yiq = np.array([GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return np.linalg.inv(to_yiq) @ turn @ to_yiq
