"""From an image file to pixels."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ORIENTATION_TAG = 0x0112


class UnreadableImage(Exception):
    """The file is missing, cut short, no image, or of another size than its annotation says."""


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file as 8-bit RGB.

    Args:
        path: of the file.
        size: (height, width) that the annotation states. The EXIF orientation is applied unless only the unrotated
            image has this size: then the annotation was made without regard to it.

    Raises:
        UnreadableImage: with the file's name and what is wrong with it.
    """
    try:
        with Image.open(path) as image:
            upright = _upright_size(image)
            stored = (image.height, image.width)
            if size is not None and size not in (stored, upright):
                raise UnreadableImage(
                    f"{path}: is {upright[1]}x{upright[0]} pixels, but its annotation says {size[1]}x{size[0]}"
                )
            image.load()
            if size is None or size == upright:
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: cannot be read as an image ({error})") from error


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the file's header (a TIFF is decoded). Raises UnreadableImage."""
    try:
        with Image.open(path) as image:
            return _upright_size(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: cannot be read as an image ({error})") from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        image.load()  # Pillow itself turns TIFFs upright, and forgets that it did
    rotated = image.getexif().get(ORIENTATION_TAG, 1) >= 5
    return (image.width, image.height) if rotated else (image.height, image.width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
