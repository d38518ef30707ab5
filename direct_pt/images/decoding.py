"""From an image file, its bytes, or an image in memory to pixels."""

import contextlib
import errno
import io
import logging
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from direct_pt.errors import InputError
from direct_pt.files import open_regular, read_regular

Size = tuple[int, int]
AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray | torch.Tensor
Images = AnyImage | Iterable[AnyImage]

FORMATS = (  # suffixes of files that are taken for images
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".avif", ".jp2", ".j2k",
)  # fmt: skip
# Recognised by the content, not by the name. Not all of Pillow's formats: reading some starts other programs.
READABLE = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 20_000 * 20_000
ORIENTATION_TAG = 0x0112
UPRIGHT = {  # the transposition that turns the stored pixels upright, by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
OPPOSITE = {6: 8, 8: 6}  # the other orientations are their own inverses
CHANNELS = (1, 3, 4)  # of images in memory: grey, RGB, RGB and opacity
BITS_TAG, PHOTOMETRIC_TAG, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second one
WIDTH_TAG, HEIGHT_TAG = 256, 257
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableImage(Exception):
    """The file is missing, truncated, not an image, too large, or of another size than its annotation says."""


@dataclass(frozen=True)
class Decoding:
    """The choices in reading an image file.

    Attributes:
        exif: whether pixels are rotated and flipped as the EXIF orientation says; otherwise they stay as stored.
        alpha: "black" or "white", the background of transparent pixels.
    """

    exif: bool = True
    alpha: str = "black"


class Sizes(NamedTuple):
    """The size in an image file's header.

    Attributes:
        stored: (height, width) of the pixels in the file.
        upright: (height, width) once the EXIF orientation is applied.
        orientation: EXIF orientation, 1 to 8; 1 if it is missing or damaged.
    """

    stored: Size
    upright: Size
    orientation: int


DEFAULT_DECODING = Decoding()

logging.getLogger("PIL").addHandler(logging.NullHandler())  # it raises the errors that it logs


def read_image(
    path: Path, size: Size | None = None, least: Size | None = None, decoding: Decoding = DEFAULT_DECODING
) -> np.ndarray:
    """An image file as [h, w, 3] uint8 RGB: `decode_image` of its content. Raises UnreadableImage."""
    try:
        content = read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _unreadable(str(path), error) from error
    return decode_image(content, str(path), size, least, decoding)


def decode_image(
    content: bytes,
    name: str,
    size: Size | None = None,
    least: Size | None = None,
    decoding: Decoding = DEFAULT_DECODING,
) -> np.ndarray:
    """An image file's content as [h, w, 3] uint8 RGB; of several images in the file, the first.

    All modes are scaled to 0 to 255. Integers of more than 8 bits are taken as 16 bits, with white at 65535, even if
    all values are small (12 bits if a TIFF says so). Floating-point values are taken as 0 to 1 if none is larger, as 0
    to 255 otherwise. Values outside are clipped, NaN is black. Colour profiles are not applied.

    Args:
        content: of a file of one of the READABLE formats.
        name: of the file, for messages.
        size: (height, width) that the annotation states. The EXIF orientation is applied unless only the unrotated
            image has this size: then the annotation was made without regard to it.
        least: (height, width) that suffices: a larger image may be reduced while it is decoded, which is faster.
        decoding: whether the EXIF orientation counts, and the background of transparent pixels.

    Raises:
        UnreadableImage: with the name and the reason; no other exception, whatever the content.
    """
    file = io.BytesIO(content)
    with _opened(file, name) as image:
        sizes = _sizes(image, file)
        upright = _is_upright(sizes, size, name, decoding)
        full = sizes.upright if upright else sizes.stored
        needed = least or full
        shrink = max(1, min(full[0] // needed[0], full[1] // needed[1]))
        jpeg = isinstance(image, JpegImageFile)
        if jpeg and shrink > 1:
            image.draft(image.mode, (sizes.stored[1] // shrink, sizes.stored[0] // shrink))
        elif jpeg and image.mode == "RGB" and not (upright and sizes.orientation > 1):
            with contextlib.suppress(RuntimeError):  # if this fast decoder fails, Pillow tries
                return decode_jpeg(content)
        image.load()
        rgb = _to_rgb(image, decoding.alpha)
        turn = sizes.orientation if upright else 1
        if isinstance(image, TiffImageFile):  # Pillow has turned it upright by itself
            turn = 1 if upright else OPPOSITE.get(sizes.orientation, sizes.orientation)
        if turn > 1:
            rgb = rgb.transpose(UPRIGHT[turn])
        return np.asarray(rgb if jpeg or shrink == 1 else rgb.reduce(shrink))


def rgb_images(images: Images) -> Iterator[np.ndarray]:
    """`as_rgb` of one image, or of each of several, one after another. Raises InputError with the place in the list."""
    if isinstance(images, bytes | bytearray | dict):
        raise InputError(f"images: is a {type(images).__name__}; give paths, PIL images, RGB arrays or tensors")
    is_one = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", None) in (0, 2, 3)
    listed: Iterable[Any] = images if isinstance(images, Iterable) and not is_one else [images]
    for place, image in enumerate(listed):
        yield as_rgb(image, f"images[{place}]")


def as_rgb(image: AnyImage, name: str) -> np.ndarray:
    """An image as [h, w, 3] uint8 RGB. BGR, as OpenCV reads files, cannot be told from RGB: convert it before.

    Transparent pixels are blended with black, as in `decode_image`.

    Args:
        image: a file's path: upright, see `read_image`. Or a PIL image of any mode: as it is, without regard to its
            EXIF orientation. Or an array or tensor of shape [h, w], [h, w, C] or [C, h, w] with 1, 3 or 4 channels:
            uint8, uint16 (white at 65535), or floating-point values from 0 to 1.
        name: of the image, for messages.

    Raises:
        InputError: it is empty or unreadable, or its shape, type or values may mean several things.
    """
    if isinstance(image, str) and re.match(r"[a-z]+://", image):
        raise InputError(f"{name}: {image:.80} is an address: download the image first")
    if isinstance(image, str | os.PathLike):
        try:
            return read_image(Path(image))
        except UnreadableImage as error:
            raise InputError(f"{name}: {error}") from error
    if isinstance(image, Image.Image):
        if not image.width * image.height:
            raise InputError(f"{name}: has no pixels ({image.width}x{image.height}); leave it out")
        try:
            return np.asarray(_to_rgb(image, DEFAULT_DECODING.alpha))
        except Exception as error:  # it is read from its file only now: see _opened
            raise InputError(f"{name}: {_unreadable('PIL image', error)}") from error
    if not isinstance(image, np.ndarray | torch.Tensor):
        remedy = "give a file's path, a PIL image, or an array or tensor of its pixels"
        raise InputError(f"{name}: is a {type(image).__name__}, not an image; {remedy}")
    is_tensor = isinstance(image, torch.Tensor)
    described = f"{name}: {image.dtype} {'tensor' if is_tensor else 'array'} {list(image.shape)}"
    if isinstance(image, torch.Tensor):
        if image.layout != torch.strided or image.is_quantized or image.is_meta:
            raise InputError(f"{described}: is sparse, quantised or without values; give a dense tensor or an array")
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    first, last = (image.ndim == 3 and image.shape[axis] in CHANNELS for axis in (0, -1))
    if image.ndim == 2:
        image = image[:, :, None]
    elif not (first or last):
        raise InputError(f"{described}: is no image; its shape must be [h, w], [h, w, C] or [C, h, w], C of {CHANNELS}")
    elif first and last and is_tensor:  # arrays have their channels last by convention, tensors either way
        raise InputError(f"{described}: may be [C, h, w] or [h, w, C]; give it as a numpy array [h, w, C]")
    elif first and not last:
        image = image.transpose(1, 2, 0)
    if not image.size:
        raise InputError(f"{described}: has no pixels; leave it out")
    pixels = np.ascontiguousarray(_to_bytes(image, described))
    if pixels.shape[2] == 3:
        return pixels
    return np.asarray(_to_rgb(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), "black"))


def _to_bytes(image: np.ndarray, described: str) -> np.ndarray:
    """The values of an array as uint8. Raises InputError."""
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:
        return cv2.convertScaleAbs(image.astype(np.uint16), alpha=255 / 65535).reshape(image.shape)
    if image.dtype.kind == "b":
        raise InputError(f"{described}: is a mask, not an image; give an image, or 255 * it.astype(np.uint8)")
    if image.dtype.kind != "f":
        raise InputError(f"{described}: give values from 0 to 255 as .astype(np.uint8)")
    low, high = image.min(), image.max()
    if np.isnan(low):
        raise InputError(f"{described}: contains NaN; replace it, or leave the image out")
    if low < 0 or high > 1:
        inside = low >= 0 and high <= 255
        remedy = "give values from 0 to 255 as .astype(np.uint8)" if inside else "undo its normalisation, or clip it"
        raise InputError(f"{described}: has values from {low:g} to {high:g}, where floats count from 0 to 1; {remedy}")
    return (image * 255 + 0.5).astype(np.uint8)


def decode_jpeg(content: bytes) -> np.ndarray:
    """[h, w, 3] uint8 RGB of a JPEG file's content. Raises RuntimeError."""
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()


def image_size(path: Path, decoding: Decoding = DEFAULT_DECODING) -> Size:
    """(height, width) of the image as decode_image returns it, from the file's header. Raises UnreadableImage."""
    sizes = header_sizes(path, str(path))
    return sizes.upright if decoding.exif else sizes.stored


def encoded_size(content: bytes, name: str, decoding: Decoding = DEFAULT_DECODING) -> Size:
    """The same from a file's content; messages use `name`. Raises UnreadableImage."""
    sizes = header_sizes(content, name)
    return sizes.upright if decoding.exif else sizes.stored


def header_sizes(source: Path | bytes, name: str) -> Sizes:
    """Both sizes of an image, without decoding it: an annotation may mean either.

    Args:
        source: the file, or its content.
        name: of the file, for messages.

    Raises:
        UnreadableImage: the header cannot be read or states too many pixels. The rest of the file may be damaged.
    """
    try:
        file: BinaryIO = open_regular(source) if isinstance(source, Path) else io.BytesIO(source)
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    with file, _opened(file, name) as image:
        return _sizes(image, file)


class _QuietPillow:
    """Around every use of Pillow here: no pixel limit except ours, no warnings about damage that it can read.

    Both are settings of the whole process, which may use Pillow elsewhere with its own limit: they are restored as soon
    as no thread is reading.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = 0
        self.restore = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.readers:
                self.restore.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self.restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None
            self.readers += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.readers -= 1
            if not self.readers:
                self.restore.close()


_quiet_pillow = _QuietPillow()


@contextlib.contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[ImageFile]:
    """An image of at most MAX_PIXELS, not decoded yet. All errors, also in decoding it, become UnreadableImage."""
    try:
        with _quiet_pillow, _open(file) as image:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise UnreadableImage(
                    f"{name}: has {image.width}x{image.height} = {pixels} pixels, more than the {MAX_PIXELS} that are "
                    "read; cut it into tiles, or shrink it, and its annotations too"
                )
            yield image
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        empty = not file.seek(0, io.SEEK_END)
        what = (
            "is empty"
            if empty
            else "is no JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, AVIF or JPEG 2000 image, or its header is damaged"
        )
        raise UnreadableImage(f"{name}: {what}; replace or convert it, or leave it out") from error
    # Damaged bytes make Pillow's plugins raise nearly any exception (struct.error, IndexError, KeyError, EOFError,
    # TypeError, OverflowError, MemoryError ...), and each version others.
    except Exception as error:
        raise _unreadable(name, error) from error


def _open(file: BinaryIO) -> ImageFile:
    try:
        return Image.open(file, formats=READABLE)
    except UnidentifiedImageError:  # Pillow rejects a JPEG for some kinds of damage in its EXIF block
        file.seek(0)
        return Image.open(io.BytesIO(file.read().replace(b"Exif\0\0", bytes(6))), formats=READABLE)


def blamed(error: Exception) -> Exception:
    """The error; raised here where the machine is short of something, and the file is not at fault."""
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        raise error
    return error


def _unreadable(name: str, error: Exception) -> UnreadableImage:
    error = blamed(error)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UnreadableImage(f"{name}: cannot be read as an image ({reason}); replace the file or leave it out")


def _is_upright(sizes: Sizes, size: Size | None, name: str, decoding: Decoding) -> bool:
    """Whether the EXIF orientation is applied to an image whose annotation states `size`. Raises UnreadableImage."""
    usual = sizes.upright if decoding.exif else sizes.stored
    if size is None or size == usual or (decoding.exif and size == sizes.stored):
        return decoding.exif and size in (None, usual)
    message = f"{name}: is {usual[1]}x{usual[0]} pixels, but its annotation says {size[1]}x{size[0]}"
    if size == sizes.upright:
        raise UnreadableImage(
            f"{message}, as it is once its EXIF orientation ({sizes.orientation}) is applied: --exif ignore leaves it "
            "as stored; leave that option out"
        )
    raise UnreadableImage(f"{message}; put the image in place that was annotated, or correct the annotation")


def _sizes(image: ImageFile, file: BinaryIO) -> Sizes:
    """The sizes of an image that is not decoded yet."""
    orientation = _orientation(image, file)
    stored = image.height, image.width
    if isinstance(image, TiffImageFile):  # some versions of Pillow give the upright size, others the stored one
        stored = image.tag_v2[HEIGHT_TAG], image.tag_v2[WIDTH_TAG]
    return Sizes(stored, stored[::-1] if orientation >= 5 else stored, orientation)


def _orientation(image: ImageFile, file: BinaryIO) -> int:
    with contextlib.suppress(Exception):  # damaged EXIF raises nearly anything, and does not matter
        exif = Image.Image.getexif(image)  # a PNG's own method would decode its pixels
        if image.format == "PNG" and not exif:
            exif.load(_exif_of_png(file))
        value = exif.get(ORIENTATION_TAG, 1)
        return int(value) if value in range(1, 9) else 1
    return 1


def _exif_of_png(file: BinaryIO) -> bytes:
    """The EXIF block of a PNG, also if it follows the pixels, where Pillow finds it only after decoding them."""
    position, block = file.tell(), b""
    file.seek(8)
    while not block and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            block = file.read(length)
        file.seek(length + 4, io.SEEK_CUR)
    file.seek(position)
    return block


def _to_rgb(image: Image.Image, alpha: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip at 255
        return _grey(image, alpha).convert("RGB")
    if not image.has_transparency_data:
        return _as_mode(image, "RGB")
    rgba = _as_mode(image.convert("LA") if image.mode == "La" else image, "RGBA")
    background = Image.new("RGB", image.size, alpha)
    background.paste(rgba, mask=rgba)
    return background


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # convert would copy a large image


def _grey(image: Image.Image, alpha: str) -> Image.Image:
    """An image with one channel of more than 8 bits as one of 8 bits."""
    stored, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        white = 1.0 if stored.max(where=np.isfinite(stored), initial=0) <= 1 else 255.0
        values = np.nan_to_num(np.clip(stored, 0, white))
    else:
        white = 4095 if tags.get(BITS_TAG) == (12,) else 65535
        values = np.clip(stored, 0, white).astype(np.uint16, copy=False)
    grey = cv2.convertScaleAbs(values, alpha=255 / white)
    if tags.get(PHOTOMETRIC_TAG) == WHITE_IS_ZERO:  # Pillow inverts only images of 8 bits
        grey = 255 - grey
    if "transparency" in image.info:
        grey[stored == image.info["transparency"]] = 255 if alpha == "white" else 0
    return Image.fromarray(grey)
