"""The flags of pretrain.py and finetune.py that say how large images are, and how they vary."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from direct_pt.data.image_cache import KINDS
from direct_pt.data.mixing import MIXES
from direct_pt.errors import InputError
from direct_pt.flags import FREE, flag, number_up_to, pixels, positive_float
from direct_pt.images.colors import MAX_COLOR_JITTER
from direct_pt.images.decoding import Size
from direct_pt.recipes import IMAGE_SIZE, LONG_SIDE, SHORT_SIDE
from direct_pt.transforms import FLIPS, SIZE_DIVISOR

MIN_SCALE, MAX_SCALE = 0.05, 10.0  # of --scale-jitter


def scale_factor(text: str) -> float:
    """A factor of the crop's size."""
    value = positive_float(text)
    if not MIN_SCALE <= value <= MAX_SCALE:
        raise argparse.ArgumentTypeError(f"{text} must be from {MIN_SCALE:g} to {MAX_SCALE:g}")
    return value


def crop_shape(text: str) -> str:
    """ "square", "auto" or a size."""
    if text not in ("square", "auto"):
        try:
            parse_canvas(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse_canvas(text: str) -> Size:
    """(height, width) of WIDTHxHEIGHT. Raises InputError."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise InputError(f"{text!r:.40} is neither square, auto nor a size such as 512x384")
    width, height = int(found[1]), int(found[2])
    for side in (width, height):
        check_multiple(f"{text}:", side)
        if not side:
            raise InputError(f"{text}: must be above 0")
    return height, width


def check_multiple(name: str, size: int) -> None:
    """Raise InputError where the size of a crop does not fit the coarsest feature map."""
    if size % SIZE_DIVISOR:
        lower = size // SIZE_DIVISOR * SIZE_DIVISOR
        near = " or ".join(str(one) for one in (lower, lower + SIZE_DIVISOR) if one)
        raise InputError(f"{name} {size} is no multiple of {SIZE_DIVISOR}: use {near}")


def flips_flag() -> Any:
    """A field of both stages."""
    text = (
        "mirror half of the images left to right, top to bottom, or both; dihedral: quarter turns besides (paper: "
        "horizontal)"
    )
    return flag(None, text, choices=list(FLIPS))


def color_jitter_flag() -> Any:
    """A field of both stages."""
    text = "how much brightness, contrast and saturation change, and a little hue, such as 0.3 (paper: 0)"
    return flag(None, text, number_up_to(MAX_COLOR_JITTER), metavar="X")


@dataclass(frozen=True, kw_only=True)
class PretrainImageOptions:
    """How large images are in stage 1, and where small copies of them are kept."""

    image_size: int = flag(IMAGE_SIZE, "size of the crops, a multiple of 32", pixels, metavar="PIXELS")
    canvas: str | None = flag(
        None,
        "square; auto: crops of the images' usual shape and the same area; or the crops' size (paper: square of "
        "--image-size)",
        crop_shape, metavar="square|auto|WIDTHxHEIGHT",
    )  # fmt: skip
    scale_jitter: tuple[float, float] | None = flag(
        None, "images are fitted into the crop's size times U(low, high), cropped, padded (paper: 0.8 1.2)",
        scale_factor, metavar=("LOW", "HIGH"), many=2,
    )  # fmt: skip
    flips: str | None = flips_flag()
    color_jitter: float | None = color_jitter_flag()
    mix: str | None = flag(
        None, "samples made of several images: mosaics of four, or objects pasted by their outlines (paper: none)",
        choices=list(MIXES),
    )  # fmt: skip
    mix_share: float | None = flag(
        None, "of the samples that --mix makes of several images (0.5)", number_up_to(1), metavar="X"
    )
    cache: str = flag(
        "none", "keep low-resolution copies: raw is fastest, jpeg a quarter as large and as sharp as the files",
        choices=["none", *KINDS],
    )  # fmt: skip
    cache_dir: Path | None = flag(
        None, "folder of the cache (DIRECT_PT_CACHE, else ~/.cache/direct_pt)", Path, metavar="DIR", on_resume=FREE
    )

    def __post_init__(self) -> None:
        check_multiple("--image-size", self.image_size)
        if self.scale_jitter is not None:
            text = " ".join(f"{number:g}" for number in self.scale_jitter)
            if self.scale_jitter[0] > self.scale_jitter[1]:
                low, high = self.scale_jitter
                raise InputError(f"--scale-jitter {text} is upside down: give {high:g} {low:g}")
        if self.mix_share is not None and self.mix in (None, "none"):
            raise InputError(f"--mix-share {self.mix_share:g} needs --mix: give --mix mosaic or --mix copy-paste")


@dataclass(frozen=True, kw_only=True)
class FinetuneImageOptions:
    """The size that images are fitted into in stage 2."""

    short_side: int = flag(SHORT_SIDE, "limit of the shorter side of images", pixels, metavar="PIXELS")
    long_side: int = flag(LONG_SIDE, "limit of the longer side", pixels, metavar="PIXELS")
    flips: str | None = flips_flag()
    color_jitter: float | None = color_jitter_flag()

    def __post_init__(self) -> None:
        if self.short_side > self.long_side:
            raise InputError(
                f"--short-side {self.short_side} is above --long-side {self.long_side}: give a larger --long-side"
            )
