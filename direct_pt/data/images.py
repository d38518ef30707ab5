"""From an image file to pixels."""

import contextlib
import io
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps

Size = tuple[int, int]

FORMATS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ORIENTATION_TAG = 0x0112


class UnreadableImage(Exception):
    """The file is missing, cut short, no image, or of another size than its annotation says."""


def read_image(path: Path, size: Size | None = None, least: Size | None = None) -> np.ndarray:
    """An image file as [h, w, 3] uint8 RGB.

    Args:
        path: of the file.
        size: (height, width) that the annotation states. The EXIF orientation is applied unless only the unrotated
            image has this size: then the annotation was made without regard to it.
        least: (height, width) that will do: of a larger image every few pixels may be read as one, which is faster.

    Raises:
        UnreadableImage: with the file's name and what is wrong with it.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            upright = _upright_size(image)
            stored = (image.height, image.width)
            if size is not None and size not in (stored, upright):
                raise UnreadableImage(
                    f"{path}: is {upright[1]}x{upright[0]} pixels, but its annotation says {size[1]}x{size[0]}"
                )
            turn = (size is None or size == upright) and image.getexif().get(ORIENTATION_TAG, 1) != 1
            whole = upright if turn else stored
            wanted = least or whole
            shrink = max(1, min(whole[0] // wanted[0], whole[1] // wanted[1]))
            if image.format == "JPEG" and shrink > 1:
                image.draft(image.mode, (stored[1] // shrink, stored[0] // shrink))
            elif image.format == "JPEG" and image.mode == "RGB" and not turn:
                with contextlib.suppress(RuntimeError):  # what this fast decoder refuses, the other one decides on
                    return decode_jpeg(content)
            image.load()
            if turn:
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            return np.asarray(rgb.reduce(shrink) if image.format != "JPEG" and shrink > 1 else rgb)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{path}: cannot be read as an image ({error})") from error


def decode_jpeg(content: bytes) -> np.ndarray:
    """[h, w, 3] uint8 RGB of a JPEG file's content. Raises RuntimeError."""
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


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
