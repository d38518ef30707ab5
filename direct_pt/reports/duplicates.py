"""Images that a data set contains more than once: with identical pixels, or looking nearly the same.

Two images look nearly the same when their perceptual hashes differ in at most MAX_BITS of 256 bits. The hash takes the
16x16 lowest frequencies (DCT) of a 64x64 grey copy, and stores of each whether it lies above their median. Size,
compression, brightness and contrast hardly change it. MAX_BITS lies between the differences of copies and those of
unrelated photographs (tests/test_check_data.py). Mirrored and rotated copies are not found.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.problems import NOTE, Problem, Problems

MAX_BITS = 48
SIDE, FREQUENCIES = 64, 16
CHUNK_ROWS = 1024  # images that one call compares with all others
LEAK = "LEAKED images"  # begins the kind of a note about images that two splits share


@dataclass(frozen=True)
class Fingerprints:
    """The fingerprints of n images.

    Attributes:
        rows: [n] int64, the images' rows in their table.
        digests: [n] uint64 of the pixels.
        hashes: [n, 32] uint8, 256 bits of the appearance.
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
        """Only the images that `kept` selects: a mask, or indices."""
        return Fingerprints(self.rows[kept], self.digests[kept], self.hashes[kept])


@dataclass(frozen=True)
class Pair:
    """The rows of two equal images; `bits` in which their hashes differ, or None if all pixels are identical."""

    first: int
    second: int
    bits: int | None


def pixel_digest(image: np.ndarray) -> int:
    """64 bits of the SHA-256 of an image's size and pixels [h, w, 3] uint8.

    It does not depend on the file: the same pixels with another compression or other metadata have the same digest.
    """
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest()[:8], "little")


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """[32] uint8, 256 bits that describe the appearance of an image [h, w, 3] uint8 RGB."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    lowest = cv2.dct(small)[:FREQUENCIES, :FREQUENCIES].ravel()
    return np.packbits(lowest > np.median(lowest))


def find_duplicates(
    tables: dict[str, AnnotationTable], prints: dict[str, Fingerprints], problems: dict[str, Problems]
) -> list[dict[str, Any]]:
    """All pairs of equal images within and between the splits, for JSON. Each is also a note of the later split."""
    found = []
    for number, second in enumerate(tables):
        pairs = [(second, pair) for pair in pairs_within(prints[second])]
        for first in list(tables)[:number]:
            pairs += [(first, pair) for pair in pairs_between(prints[first], prints[second])]
        for first, pair in pairs:
            names = [tables[first].image_name(pair.first), tables[second].image_name(pair.second)]
            identical = pair.bits is None
            kind = f"duplicates in {second}" if identical else f"near-duplicates in {second}"
            text = f"has the same pixels as {names[0]}"
            if not identical:
                text = f"looks nearly like {names[0]} ({pair.bits} of 256 bits differ)"
            if first != second:
                kind = f"{LEAK} of {first} in {second}" if identical else f"near-duplicates in {first} and {second}"
                text += f" of {first}: the AP on {second} tells less about new images; move one of them"
            problems[second].add(Problem(NOTE, kind, names[1], text, names[1]))
            found.append({"splits": [first, second], "images": names, "kind": kind, "bits": pair.bits})
    return found


def pairs_within(images: Fingerprints) -> list[Pair]:
    """Each image with the first one of identical pixels; of the remaining ones, those that look most alike.

    An image is paired with one other at most, so that there are never more pairs than images.
    """
    _, firsts, group = np.unique(images.digests, return_index=True, return_inverse=True)
    repeats = np.flatnonzero(firsts[group] != np.arange(len(group)))
    identical = [Pair(int(images.rows[firsts[group[i]]]), int(images.rows[i]), None) for i in repeats]
    distinct = images.keep(np.sort(firsts))
    closest, bits = _closest(distinct.hashes, distinct.hashes, exclude_self=True)
    near = np.flatnonzero(bits <= MAX_BITS)
    similar = {tuple(sorted((int(i), int(closest[i])))): int(bits[i]) for i in near}
    return identical + [Pair(int(distinct.rows[i]), int(distinct.rows[j]), n) for (i, j), n in sorted(similar.items())]


def pairs_between(first: Fingerprints, second: Fingerprints) -> list[Pair]:
    """Each image of `second` with one of `first` that has identical pixels, or else looks most alike."""
    known, positions = np.unique(first.digests, return_index=True)
    identical = np.isin(second.digests, known)
    originals = positions[np.searchsorted(known, second.digests[identical])]
    rows = zip(first.rows[originals].tolist(), second.rows[identical].tolist(), strict=True)
    rest = second.keep(~identical)
    closest, bits = _closest(rest.hashes, first.hashes)
    near = np.flatnonzero(bits <= MAX_BITS)
    return [Pair(i, j, None) for i, j in rows] + [
        Pair(int(first.rows[closest[i]]), int(rest.rows[i]), int(bits[i])) for i in near
    ]


def _closest(queries: np.ndarray, hashes: np.ndarray, exclude_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """For each of `queries` [n, 32] the row of `hashes` that differs in the fewest bits, and in how many: [n] each.

    `exclude_self`: both arrays are the same, and a row is not compared with itself.
    """
    rows, bits = np.zeros(len(queries), np.int64), np.full(len(queries), 8 * hashes.shape[1] + 1)
    if len(hashes) <= exclude_self:
        return rows, bits
    is_quick = len(queries) * len(hashes) < 1e8  # under a second
    for start in tqdm(range(0, len(queries), CHUNK_ROWS), desc="duplicates", leave=False, disable=is_quick):
        chunk = queries[start : start + CHUNK_ROWS]
        end = start + len(chunk)
        distances, found = cv2.batchDistance(chunk, hashes, cv2.CV_32S, normType=cv2.NORM_HAMMING, K=1 + exclude_self)
        is_self = exclude_self & (found[:, 0] == np.arange(start, end))
        column = is_self.astype(int)[:, None]  # the closest one, or the second closest
        rows[start:end] = np.take_along_axis(found, column, axis=1)[:, 0]
        bits[start:end] = np.take_along_axis(distances, column, axis=1)[:, 0]
    return rows, bits
