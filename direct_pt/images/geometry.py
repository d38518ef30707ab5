"""Where a sample's pixels come from: resize, crop, turn and mirror; of images, points, boxes and masks alike."""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from direct_pt.images.decoding import Size

cv2.setNumThreads(0)  # worker processes run in parallel already, and OpenCV's own threads do not survive a fork

EMPTY_MASK = np.zeros((0, 0), np.uint8)  # of an object that is not visible


@dataclass(frozen=True)
class Geometry:
    """From the original image to the sample's frame: resize, crop, transpose, then mirror. Sizes are (height, width).

    Attributes:
        original: size of the image.
        resized: size of the whole image after resizing.
        corner: (top, left) of the crop in the resized image, whole pixels.
        size: size of the crop.
        flip: whether the sample is mirrored left to right.
        flip_vertically: whether it is mirrored top to bottom.
        transpose: whether rows and columns of the crop are exchanged, before it is mirrored.
    """

    original: Size
    resized: Size
    corner: Size
    size: Size
    flip: bool = False
    flip_vertically: bool = False
    transpose: bool = False

    @property
    def frame(self) -> Size:
        """Size of the sample."""
        return self.size[::-1] if self.transpose else self.size

    def zoomed(self, zoom: int) -> "Geometry":
        """The same crop in pixels that are `zoom` times finer."""
        resized, corner, size = ((pair[0] * zoom, pair[1] * zoom) for pair in (self.resized, self.corner, self.size))
        return replace(self, resized=resized, corner=corner, size=size)

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from the original image to the crop."""
        return self.resized[1] / self.original[1], self.resized[0] / self.original[0]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] (x, y) in the sample's frame; they may lie outside it."""
        moved = points * self.scale - np.array(self.corner[::-1])
        if self.transpose:
            moved = moved[..., ::-1].copy()
        if self.flip:
            moved[..., 0] = self.frame[1] - moved[..., 0]
        if self.flip_vertically:
            moved[..., 1] = self.frame[0] - moved[..., 1]
        return moved

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [G, 4] in the sample's frame, clipped to it; those outside of it lose their width or height."""
        moved = boxes * (self.scale * 2) - (self.corner[::-1] * 2)
        height, width = self.frame
        if self.transpose:
            moved = moved[:, [1, 0, 3, 2]]
        if self.flip:
            moved[:, [0, 2]] = width - moved[:, [2, 0]]
        if self.flip_vertically:
            moved[:, [1, 3]] = height - moved[:, [3, 1]]
        return np.minimum(np.maximum(moved, 0), (width, height, width, height))

    def image(self, image: np.ndarray) -> np.ndarray:
        """[height, width, 3] uint8, the sample's pixels from those of the original [h, w, 3] or of a smaller copy.

        Bilinear between pixel centres, as OpenCV does in the recipe; area means where bilinear would skip pixels.
        """
        (top, left), (height, width) = self.corner, self.size
        halved = image.shape[0] >= 2 * self.resized[0] and image.shape[1] >= 2 * self.resized[1]
        interpolation = cv2.INTER_AREA if halved else cv2.INTER_LINEAR
        resized = cv2.resize(image, self.resized[::-1], interpolation=interpolation)
        crop = resized[top : top + height, left : left + width]
        if self.transpose:
            crop = cv2.transpose(crop)
        if self.flip or self.flip_vertically:
            crop = cv2.flip(crop, -1 if self.flip and self.flip_vertically else int(self.flip))
        return crop

    def mask(self, mask: np.ndarray) -> tuple[list[int], np.ndarray]:
        """A binary mask [h, w] of the original image in the sample, by nearest neighbour.

        Returns:
            its window (x1, y1, x2, y2) in the sample, and the mask inside it.
        """
        window, sources = [], []
        for axis in (0, 1):  # y, then x
            content = np.flatnonzero(mask.any(axis=1 - axis))
            if not len(content):
                return [0, 0, 0, 0], EMPTY_MASK
            factor, shift = self.resized[axis] / self.original[axis], self.corner[axis]
            ends = np.array([np.floor(content[0] * factor), np.ceil((content[-1] + 1) * factor)]) - shift
            low, high = np.clip(ends, 0, self.size[axis]).astype(int).tolist()
            sources.append((2 * (np.arange(low, high) + shift) + 1) * self.original[axis] // (2 * self.resized[axis]))
            window.append((low, high))
        inside = mask[np.ix_(*sources)]
        if not inside.size:
            return [0, 0, 0, 0], EMPTY_MASK
        if self.transpose:
            window, inside = window[::-1], inside.T
        for axis, mirrored in enumerate((self.flip_vertically, self.flip)):
            if mirrored:
                low, high = window[axis]
                window[axis] = self.frame[axis] - high, self.frame[axis] - low
                inside = np.flip(inside, axis)
        (top, bottom), (left, right) = window
        return [left, top, right, bottom], inside


def fit(size: Size, short_side: int, long_side: int) -> Size:
    """The largest size of the same aspect ratio with the longer side in `long_side` and the shorter in `short_side`."""
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def fit_into(size: Size, frame: Size) -> Size:
    """The largest size of the same aspect ratio within `frame`."""
    scale = min(frame[0] / size[0], frame[1] / size[1])
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def has_extent(boxes: np.ndarray) -> np.ndarray:
    """[G] bool, whether boxes [G, 4] have width and height, in float32 as the detector sees them."""
    boxes = boxes.astype(np.float32)
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
