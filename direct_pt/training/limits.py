"""What no machine can do: refused before anything of it is begun, in one line with the limit."""

import math

import psutil

from direct_pt.errors import InputError
from direct_pt.images.decoding import Size
from direct_pt.models.detector import Detector, DetectorConfig
from direct_pt.models.layers import running_statistics
from direct_pt.training.plan import Plan
from direct_pt.transforms import SIZE_DIVISOR, Preset, PretrainPreset, ResizePreset

BYTES_READ, BYTES_SHOWN = 3, 12  # of a pixel as it is read, and as the network is given it
FEW_CONVOLUTIONS = 9  # of 3x3, between `channels` and as many: no detector has fewer
COPIES = 3  # of each weight: itself, its gradient, its momentum
ROI_VALUES = 7 * 7  # of a channel


def memory() -> int:
    """Bytes that this machine has."""
    return int(psutil.virtual_memory().total)


def check_channels(config: DetectorConfig) -> DetectorConfig:
    """The configuration. Raises InputError where the weights of pyramid and heads cannot be."""
    square = 4 * COPIES * 9 * FEW_CONVOLUTIONS
    if square * config.channels**2 > memory():
        raise InputError(
            f"--channels {config.channels}: their weights would take over {square * config.channels**2 / 1e9:.3g} GB, "
            f"and this machine has {memory() / 1e9:.3g} GB: use at most {math.isqrt(memory() // square)}"
        )
    return config


def check_images_at_once(images: int, preset: Preset) -> None:
    """Raise InputError where the images of one micro-batch cannot all be in memory."""
    size = _sizes(preset)[0]
    one = size[0] * size[1] * (BYTES_READ + BYTES_SHOWN)
    if images * one > memory():
        raise InputError(
            f"--micro-batch-size {images}: so many images of {size[1]}x{size[0]} pixels take {images * one / 1e9:.3g} "
            f"GB, and this machine has {memory() / 1e9:.3g} GB: use at most {memory() // one}, or smaller images"
        )


def check_run(plan: Plan, detector: Detector, preset: Preset) -> None:
    """Check that a step can be made, as far as its images and RoIs tell.

    Raises:
        InputError: they cannot all be in memory, or BatchNorm would see one value.
    """
    size, least = _sizes(preset)
    check_images_at_once(plan.micro_batch_size, preset)
    one = size[0] * size[1] * BYTES_READ
    step = plan.micro_batch_size * plan.accumulation
    if step * one > memory():
        most = memory() // one // plan.micro_batch_size * plan.micro_batch_size * plan.processes
        raise InputError(
            f"--global-batch-size {plan.global_batch_size}: the images of a step, of {size[1]}x{size[0]} pixels, take "
            f"{step * one / 1e9:.3g} GB, and this machine has {memory() / 1e9:.3g} GB: use at most {most}"
        )
    config = detector.config
    rois = plan.micro_batch_size * config.rois_per_image * config.channels * ROI_VALUES * 2
    if not config.name.startswith("retinanet") and rois > memory():
        raise InputError(
            f"--rois-per-image {config.rois_per_image}: their features would take over {rois / 1e9:.3g} GB, and this "
            f"machine has {memory() / 1e9:.3g} GB: use at most {config.rois_per_image * memory() // rois}"
        )
    if plan.micro_batch_size == 1 and math.prod(least) == SIZE_DIVISOR**2 and running_statistics(detector):
        raise InputError(
            f"--micro-batch-size 1 with images of {least[1]}x{least[0]} pixels: BatchNorm would see one value of a "
            "channel, which has no variance; use larger images, a larger micro-batch or --norm group"
        )


def _sizes(preset: Preset) -> tuple[Size, Size]:
    """(height, width) of the largest samples, and of the smallest that there can be."""
    if isinstance(preset, PretrainPreset):
        return preset.frame, preset.frame
    assert isinstance(preset, ResizePreset)
    short, long = preset.short_side, preset.long_side
    least = min((short, short), (1, long), key=lambda size: math.prod(preset.padded_size(size)))
    return preset.padded_size((short, long)), preset.padded_size(least)
