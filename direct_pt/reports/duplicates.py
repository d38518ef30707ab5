"""Images that a data set holds more than once: with the very same pixels, or looking nearly the same.

Two images look nearly the same when their perceptual hashes differ in at most MOST_BITS of 256 bits. The hash takes the
16x16 lowest frequencies of a grey copy, 64x64 pixels large, and says of each whether it lies above their median. Size,
compression, brightness and contrast hardly change it. The limit lies between what copies differ in and what unrelated
photographs do (tests/test_check_data.py). Mirrored and turned copies are not found.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from tqdm import tqdm

MOST_BITS = 48
SIDE, FREQUENCIES = 64, 16
ROWS_AT_ONCE = 1024  # images that are compared with all others in one call


@dataclass(frozen=True)
class Fingerprints:
    """Of n images.

    Attributes:
        rows: [n] int64, the images' rows in their table.
        digests: [n] uint64 of the pixels.
        hashes: [n, 32] uint8, 256 bits of the looks.
    """

    rows: np.ndarray
    digests: np.ndarray
    hashes: np.ndarray

    @classmethod
    def gather(cls, found: Sequence[tuple[int, int, np.ndarray]]) -> "Fingerprints":
        """From (row, digest, hash) of each image."""
        return cls(
            np.array([row for row, _, _ in found], np.int64),
            np.array([digest for _, digest, _ in found], np.uint64),
            np.array([bits for _, _, bits in found], np.uint8).reshape(-1, FREQUENCIES**2 // 8),
        )

    def keep(self, kept: np.ndarray) -> "Fingerprints":
        """Only some images: a mask, or indices."""
        return Fingerprints(self.rows[kept], self.digests[kept], self.hashes[kept])


@dataclass(frozen=True)
class Twins:
    """Two images that are the same: their rows, and in how many bits the hashes differ, None where no pixel differs."""

    first: int
    second: int
    bits: int | None


def pixel_digest(image: np.ndarray) -> int:
    """64 bits of the SHA-256 of an image's pixels [h, w, 3] uint8 and its size.

    Of pixels rather than of the file: another compression or other metadata do not make another image.
    """
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest()[:8], "little")


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """[32] uint8, 256 bits of what an image [h, w, 3] uint8 RGB looks like."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    lowest = cv2.dct(small)[:FREQUENCIES, :FREQUENCIES].ravel()
    return np.packbits(lowest > np.median(lowest))


def twins_within(images: Fingerprints) -> list[Twins]:
    """Every image of which an earlier one has the same pixels, and of the others those that look most alike.

    Of each image one twin is told, so that there are never more pairs than images.
    """
    _, firsts, group = np.unique(images.digests, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(firsts[group] != np.arange(len(group)))
    same = [Twins(int(images.rows[firsts[group[i]]]), int(images.rows[i]), None) for i in repeats]
    distinct = images.keep(np.sort(firsts))
    others, bits = _closest(distinct.hashes, distinct.hashes, others=True)
    near = np.flatnonzero(bits <= MOST_BITS)
    pairs = {tuple(sorted((int(i), int(others[i])))): int(bits[i]) for i in near}
    return same + [Twins(int(distinct.rows[i]), int(distinct.rows[j]), n) for (i, j), n in sorted(pairs.items())]


def twins_between(first: Fingerprints, second: Fingerprints) -> list[Twins]:
    """For each image of `second` the one of `first` that has the same pixels, or else looks most alike."""
    known, where = np.unique(first.digests, return_index=True)
    same = np.isin(second.digests, known)
    of_same = where[np.searchsorted(known, second.digests[same])]
    pairs = zip(first.rows[of_same].tolist(), second.rows[same].tolist(), strict=True)
    rest = second.keep(~same)
    closest, bits = _closest(rest.hashes, first.hashes)
    near = [i for i in range(len(rest.rows)) if bits[i] <= MOST_BITS]
    return [Twins(i, j, None) for i, j in pairs] + [
        Twins(int(first.rows[closest[i]]), int(rest.rows[i]), int(bits[i])) for i in near
    ]


def _closest(queries: np.ndarray, among: np.ndarray, others: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each of `queries` [n, 32] the row of `among` that differs in the fewest bits, and in how many: [n] each.

    Where the two are the same array, `others` keeps an image from being its own twin.
    """
    rows, bits = np.zeros(len(queries), np.int64), np.full(len(queries), 8 * among.shape[1] + 1)
    if len(among) <= others:
        return rows, bits
    quick = len(queries) * len(among) < 1e8  # under a second
    for start in tqdm(range(0, len(queries), ROWS_AT_ONCE), desc="duplicates", leave=False, disable=quick):
        part = queries[start : start + ROWS_AT_ONCE]
        distances, found = cv2.batchDistance(part, among, cv2.CV_32S, normType=cv2.NORM_HAMMING, K=1 + others)
        itself = others & (found[:, 0] == np.arange(start, start + len(part)))
        column = itself.astype(int)[:, None]
        rows[start : start + len(part)] = np.take_along_axis(found, column, axis=1)[:, 0]
        bits[start : start + len(part)] = np.take_along_axis(distances, column, axis=1)[:, 0]
    return rows, bits
