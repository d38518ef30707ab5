"""Parts of image files. Of a large file only the part is decoded, by libvips, so that memory stays flat.

libvips decodes tiles of TIFF where they lie, and other formats once, into a temporary file that it removes. What it
would decode otherwise than `decoding.py` does, and everything where it is not installed, is cut out of the whole image.
"""

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from direct_pt.errors import printable
from direct_pt.images.decoding import (
    DEFAULT_DECODING,
    Decoding,
    Size,
    decode_image,
    header_sizes,
    read_image,
)

LARGE_PIXELS = 32_000_000  # of a file; smaller ones are decoded whole
BANDS = {"srgb": 3, "b-w": 1}  # that libvips may decode, by what it calls their colours
LOADERS = ("jpegload", "pngload", "tiffload", "webpload")  # of the formats that libvips may decode


class Window(NamedTuple):
    """A part of an image, in its pixels: right of x1, above y2, and so on."""

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.y2 - self.y1, self.x2 - self.x1

    @staticmethod
    def whole(size: Size) -> "Window":
        """All of an image of `size`."""
        return Window(0, 0, size[1], size[0])


def read_window(
    source: Path | bytes,
    name: str,
    size: Size,
    window: Window,
    least: Size | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> np.ndarray:
    """A part of an image file as [h, w, 3] uint8 RGB.

    Args:
        source: the file, or its content.
        name: of the file, for messages.
        size: (height, width) of the whole image: see `decode_image`.
        window: the part.
        least: (height, width) that suffices for the part: see `decode_image`.
        decoding: see `decode_image`.

    Raises:
        UnreadableImage: see `decode_image`.
    """
    if isinstance(source, Path) and size[0] * size[1] >= LARGE_PIXELS:
        pixels = _read_piecewise(source, name, size, window, least or window.size)
        if pixels is not None:
            return pixels
    if window == Window.whole(size):
        return read_whole(source, name, size, least, decoding)
    changed = source.stat().st_mtime_ns if isinstance(source, Path) and source.exists() else 0
    whole = _decoded(source, name, size, decoding, changed)
    return whole[window.y1 : window.y2, window.x1 : window.x2]


def read_whole(source: Path | bytes, name: str, size: Size, least: Size | None, decoding: Decoding) -> np.ndarray:
    """A whole image: `decode_image` of a file or its content. Raises UnreadableImage."""
    if isinstance(source, bytes):
        return decode_image(source, name, size, least, decoding)
    return read_image(source, size, least, decoding)


@lru_cache(maxsize=1)  # the windows of an image follow each other
def _decoded(source: Path | bytes, name: str, size: Size, decoding: Decoding, changed: int) -> np.ndarray:
    """The same, kept for the next window; `changed` tells versions of a file apart."""
    return read_whole(source, name, size, None, decoding)


def _read_piecewise(path: Path, name: str, size: Size, window: Window, least: Size) -> np.ndarray | None:
    """A part of a large file, by libvips; None where it would not be the part of what `read_image` returns.

    Raises:
        UnreadableImage: the header cannot be read.
    """
    vips = _libvips()
    sizes = header_sizes(path, name)
    if vips is None or sizes.orientation != 1 or sizes.stored != size:
        return None
    is_whole = window == Window.whole(size)
    shrink = max(1, min(window.size[0] // least[0], window.size[1] // least[1]))
    try:
        image = _streamed(vips, path) if is_whole else _opened(path, path.stat().st_mtime_ns)
        if image.get("vips-loader") not in LOADERS or image.format != "uchar":
            return None
        if BANDS.get(image.interpretation) != image.bands or (image.height, image.width) != size:
            return None
        part = image if is_whole else image.crop(window.x1, window.y1, window.size[1], window.size[0])
        pixels: np.ndarray = (part.shrink(shrink, shrink, ceil=True) if shrink > 1 else part).numpy()
    except (vips.Error, OSError):  # the usual decoder tells why, or succeeds
        return None
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


@lru_cache(maxsize=1)
def _opened(path: Path, changed: int) -> Any:
    """A file of which any part can be read; `changed` tells its versions apart."""
    return _libvips().Image.new_from_file(os.fspath(path), access="random", fail_on="truncated")


def _streamed(vips: Any, path: Path) -> Any:
    """A file that is read once, from its first line to its last."""
    return vips.Image.new_from_file(os.fspath(path), access="sequential", fail_on="truncated")


@lru_cache(maxsize=1)
def _libvips() -> Any:
    """The package pyvips; None, which is said once, where parts of files cannot be read with it."""
    if _forked_from_vips:
        return None
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: without libvips itself
        text = (
            f"warning: files of {LARGE_PIXELS // 1_000_000} million pixels and more are decoded whole, as there is no"
        )
        print(printable(f"{text} pyvips ({error}): pip install pyvips pyvips-binary"), file=sys.stderr, flush=True)
        return None
    return pyvips


_forked_from_vips = False  # libvips' threads are gone then, and it would wait for them


def _forked() -> None:
    """What a forked process notes before anything else."""
    global _forked_from_vips
    _forked_from_vips = "pyvips" in sys.modules
    _libvips.cache_clear()


os.register_at_fork(after_in_child=_forked)
