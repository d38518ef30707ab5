"""Low-resolution copies of images, as the image cache stores them: as JPEGs, or uncompressed, with less colour."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.io import encode_jpeg

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.images import Size, UnreadableImage
from direct_pt.data.transforms import fit

JPEG_QUALITY = 90


@dataclass(frozen=True)
class Copies(Dataset[tuple[bytes, Size]]):
    """The copies of a table's images as they are stored, and their sizes; nothing of an image that cannot be read.

    Attributes:
        table: of the images.
        kind: "jpeg" or "raw".
        side: pixels that a copy is wide and high at most.
    """

    table: AnnotationTable
    kind: str
    side: int

    def __getitem__(self, row: int) -> tuple[bytes, Size]:
        size = copy_size(self.table.image_size(row), self.side)
        try:
            pixels = torch.tensor(self.table.read_image(row, least=size)).permute(2, 0, 1)
        except UnreadableImage:
            return b"", (0, 0)
        copy = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
        if self.kind == "jpeg":
            return encode_jpeg(copy.contiguous(), JPEG_QUALITY).numpy().tobytes(), size
        return to_yuv(copy.permute(1, 2, 0).numpy()), size


def copy_size(size: Size, side: int) -> Size:
    """Of the copy of an image of `size`: its own, where that is small enough."""
    return fit(size, side, side) if max(size) > side else size


def to_yuv(pixels: np.ndarray) -> bytes:
    """[h, w, 3] RGB as planes of brightness and, at half the resolution, of colour, as in most JPEGs: 12 bits a pixel.

    The sides are made even.
    """
    height, width = pixels.shape[:2]
    even = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    # OpenCV takes the colour of one pixel in four, the first; here it is the mean of all four.
    means = cv2.blur(even, (2, 2), anchor=(0, 0))
    bright, colour = (cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420).ravel() for image in (even, means))
    count = even.shape[0] * even.shape[1]
    return bright[:count].tobytes() + colour[count:].tobytes()


def from_yuv(stored: bytes, size: Size, resized: Size) -> np.ndarray:
    """`to_yuv`'s image of `size`, as [h, w, 3] RGB of size `resized`: before it has three colours, half is to do.

    Raises ValueError where that cannot be such an image.
    """
    height, width = _even(resized)
    new = np.empty((height * 3 // 2, width), np.uint8)
    for plane, new_plane in zip(_planes(np.frombuffer(stored, np.uint8), size), _planes(new, resized), strict=True):
        cv2.resize(plane, new_plane.shape[::-1], dst=new_plane, interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(new, cv2.COLOR_YUV2RGB_I420)[: resized[0], : resized[1]]


def _planes(image: np.ndarray, size: Size) -> list[np.ndarray]:
    """Views of the planes of an image of `size`: brightness [h, w], and twice colour, half of that rounded up."""
    height, width = _even(size)
    parts = np.split(image.ravel(), [height * width, height * width * 5 // 4])
    bright = parts[0].reshape(height, width)[: size[0], : size[1]]  # what makes it even would shift the others
    return [bright, *(part.reshape(height // 2, width // 2) for part in parts[1:])]


def _even(size: Size) -> Size:
    return size[0] + size[0] % 2, size[1] + size[1] % 2
