"""Low-resolution copies of the training images: stage 1 sees each image 48 times, but decodes and shrinks it once.

A cache is a folder: `manifest.json` says what it was made from, `pixels` holds one copy after another, `index` has a
record per image with the place and the checksum of its copy, written once the pixels are on the disk. The cache is
complete when every image has a record; an interrupted build continues after the last record. What an index says is
checked, and a copy that is not what was written is not trained on.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.io import encode_jpeg
from tqdm import tqdm

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.cache_files import checksum, open_own, require_own_folder
from direct_pt.data.reader_processes import Readers, runs
from direct_pt.data.table_cache import cache_root
from direct_pt.errors import printable
from direct_pt.files import parse_json, write_json
from direct_pt.images.decoding import Size, UnreadableImage, decode_jpeg
from direct_pt.images.geometry import fit
from direct_pt.transforms import PretrainPreset

VERSION = 2
# The longest side of the copies, in crop sizes. JPEGs are as large as the largest resize; raw copies are a little
# smaller, so that COCO train2017 takes less than 30 GB.
KINDS = {"jpeg": PretrainPreset.scale_range[1], "raw": 1.05}
BYTES_PER_PIXEL = {"jpeg": 0.4, "raw": 1.5}  # JPEG's is a cautious estimate, to check the free space on the disk
CHUNK = 256  # images between two writes of the index
RECORD = np.dtype([("offset", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4"), ("checksum", "<u8")])
MAX_MANIFEST_BYTES = 10_000
Manifest = dict[str, Any]
JPEG_QUALITY = 90


class ImageCache:
    """The complete cache in `folder`: the copies by image row, and the manifest it was `made_from`."""

    def __init__(self, folder: Path, made_from: Manifest) -> None:
        self.folder = folder
        self.made_from = made_from
        self.index = _valid_records(folder, made_from)
        self.pixels = open_own(folder / "pixels")  # stays readable even if the folder is removed
        self._has_warned = False

    @property
    def gigabytes(self) -> float:
        """Size of the copies on the disk."""
        return float(self.index["length"].sum()) / 1e9

    def read(self, row: int, resized: Size) -> np.ndarray | None:
        """[h, w, 3] uint8 RGB, the copy of image `row`, or None if there is none.

        The caller will resize it to `resized`; raw copies have that size already.
        """
        offset, length, height, width, checksum = self.index[row].tolist()
        if not length:
            return None
        with suppress(OSError, RuntimeError, ValueError, cv2.error):  # a disk error; the image file remains
            stored = os.pread(self.pixels.fileno(), length, offset)
            if checksum_of(stored, (height, width)) == checksum:
                jpeg = self.made_from["kind"] == "jpeg"
                return decode_jpeg(stored) if jpeg else from_yuv(stored, (height, width), resized)
        if not self._has_warned:
            _warn(f"{self.folder}: the copy of image {row + 1} is damaged or was altered; such images are read from "
                  "their files. Remove the folder, and it is built anew")  # fmt: skip
            self._has_warned = True
        return None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _complete_cache, (self.folder, self.made_from)


def open_image_cache(
    table: AnnotationTable, kind: str, image_size: int, root: Path | None, workers: int
) -> ImageCache | None:
    """The cache of a table's images, built or completed first if necessary; None, with a warning, if that fails.

    If several processes call it at once, one builds and the others wait.

    Args:
        table: the images.
        kind: one of KINDS.
        image_size: of the crops.
        root: the folder of all caches; None for the default.
        workers: processes that read images.
    """
    try:
        root = root or cache_root()
    except RuntimeError as error:  # no home directory
        _warn(f"{error} The image files are read each time; --cache-dir takes a folder for the cache")
        return None
    made_from = _made_from(table, kind, image_size)
    tiles = [] if table.places is None else [hashlib.sha256(table.places.tobytes()).hexdigest()]
    location = json.dumps([str(Path(table.source).resolve()), str(table.folder.resolve()), *tiles])
    folder = root / f"images-{kind}-{image_size}-{hashlib.sha256(location.encode()).hexdigest()[:16]}"
    if cache := _complete_cache(folder, made_from):
        return cache
    try:
        if not root.exists():
            root.mkdir(parents=True, exist_ok=True)
        with open_own(root / f"{folder.name}.lock", "r+b", create=True) as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # not flock, which workers that outlive this process would hold
            finished = _finished_images(folder, made_from)
            try:
                if finished < len(table):
                    _build(table, folder, made_from, finished, workers)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return _complete_cache(folder, made_from)
    except OSError as error:
        smaller = ", --cache jpeg needs a quarter of the space" if kind == "raw" else ""
        _warn(f"{folder}: cannot be written ({error.strerror or error}), so that the image files are read each time; "
              f"--cache-dir takes a folder elsewhere{smaller}")  # fmt: skip
        return None


def _made_from(table: AnnotationTable, kind: str, image_size: int) -> Manifest:
    """The manifest: everything that the copies depend on."""
    files = hashlib.sha256(table.sizes.tobytes() + table.file_names.tobytes())
    files.update(repr(table.decoding).encode())
    if table.places is not None:
        files.update(table.places.tobytes())
    if table.encoded is not None:
        files.update(table.encoded.fingerprint.encode())
    for row in range(len(table)) if table.encoded is None else ():
        with suppress(OSError):  # a missing file has no copy, and training reports it
            status = table.path(row).stat()
            files.update(b"%d %d %d\n" % (row, status.st_size, status.st_mtime_ns))
    side = int(KINDS[kind] * image_size)
    return {"version": VERSION, "kind": kind, "side": side, "images": len(table), "files": files.hexdigest()}


def _complete_cache(folder: Path, made_from: Manifest) -> ImageCache | None:
    """The cache in `folder`, if it is complete and was made from `made_from`."""
    with suppress(OSError, ValueError):
        require_own_folder(folder)
        if _read_manifest(folder) == made_from:
            cache = ImageCache(folder, made_from)
            return cache if len(cache.index) == made_from["images"] else None
    return None


def _finished_images(folder: Path, made_from: Manifest) -> int:
    """How many images a cache holds, after partial writes are cut off. A useless cache is removed."""
    if not os.path.lexists(folder):
        return 0
    require_own_folder(folder)
    try:
        if _read_manifest(folder) == made_from:
            index = _valid_records(folder, made_from)
            for name, size in (("index", index.nbytes), ("pixels", index["length"].sum())):
                with open_own(folder / name, "r+b") as file:
                    file.truncate(size)
            return len(index)
        _warn(f"{folder}: was made from other images or by another version; it is built anew")
    except (OSError, ValueError):
        _warn(f"{folder}: is damaged; it is built anew")
    shutil.rmtree(folder)
    return 0


def _valid_records(folder: Path, made_from: Manifest) -> np.ndarray:
    """The index up to the first record that contradicts those before it or lacks pixels. Raises OSError."""
    with open_own(folder / "index") as file:
        content = file.read(made_from["images"] * RECORD.itemsize)
    index = np.frombuffer(content, RECORD, len(content) // RECORD.itemsize).copy()
    ends = np.cumsum(index["length"])
    valid = (index["offset"] == ends - index["length"]) & (index["length"] >= 0)
    for side in ("height", "width"):
        valid &= (index[side] > 0) == (index["length"] > 0)
        valid &= (index[side] >= 0) & (index[side] <= made_from["side"])
    with open_own(folder / "pixels") as file:
        valid &= ends <= os.fstat(file.fileno()).st_size
    return index[np.logical_and.accumulate(valid)]


def _read_manifest(folder: Path) -> Any:
    """What a cache was made from. Raises OSError or ValueError."""
    with open_own(folder / "manifest.json") as file:
        return parse_json(file.read(MAX_MANIFEST_BYTES))


def checksum_of(content: bytes, size: Size) -> int:
    """The checksum of a copy and its (height, width)."""
    return checksum(content, size[0] << 32 | size[1])


def _build(table: AnnotationTable, folder: Path, made_from: Manifest, finished: int, workers: int) -> None:
    """Append the images from row `finished` on."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "manifest.json", made_from)
    kind, side = made_from["kind"], made_from["side"]
    pixels_left = sum(math.prod(copy_size((height, width), side)) for height, width in table.sizes[finished:].tolist())
    needed, free = pixels_left * BYTES_PER_PIXEL[kind], shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} are free")
    rows = partial(iter, runs(finished, len(table), CHUNK))
    copies: Readers[list[tuple[bytes, Size]]] = Readers(Copies(table, kind, side), rows, workers, list)
    with (
        closing(iter(copies)) as chunks,
        open_own(folder / "pixels", "ab", create=True) as pixels,
        open_own(folder / "index", "ab", create=True) as index,
        tqdm(total=len(table), initial=finished, desc=f"image cache ({kind})", unit="image") as bar,
    ):
        for chunk in chunks:
            lengths = np.array([len(content) for content, _ in chunk])
            records = np.zeros(len(chunk), RECORD)
            records["offset"], records["length"] = pixels.tell() + np.cumsum(lengths) - lengths, lengths
            records["height"], records["width"] = np.array([size for _, size in chunk]).T
            records["checksum"] = [checksum_of(*copy) for copy in chunk]
            for file, content in ((pixels, b"".join(content for content, _ in chunk)), (index, records.tobytes())):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the pixels first: a record means that they are on the disk
            bar.update(len(chunk))


def _warn(message: str) -> None:
    print(printable(f"image cache: {message}"), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Copies(Dataset[tuple[bytes, Size]]):
    """The encoded copies of a table's images, and their sizes; empty for an unreadable image.

    Attributes:
        table: the images.
        kind: "jpeg" or "raw".
        side: largest height and width of a copy in pixels.
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
    """The size of the copy of an image of `size`: its own if that is small enough."""
    return fit(size, side, side) if max(size) > side else size


def to_yuv(pixels: np.ndarray) -> bytes:
    """[h, w, 3] RGB as YUV 4:2:0, as in most JPEGs: 12 bits per pixel. Odd sides are padded by a pixel."""
    height, width = pixels.shape[:2]
    even = cv2.copyMakeBorder(pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    # OpenCV takes the chroma of the first pixel in four; here it is the mean of all four.
    means = cv2.blur(even, (2, 2), anchor=(0, 0))
    luma, chroma = (cv2.cvtColor(image, cv2.COLOR_RGB2YUV_I420).ravel() for image in (even, means))
    count = even.shape[0] * even.shape[1]
    return luma[:count].tobytes() + chroma[count:].tobytes()


def from_yuv(stored: bytes, size: Size, resized: Size) -> np.ndarray:
    """[h, w, 3] RGB of size `resized` from `to_yuv`'s bytes of an image of `size`.

    It is resized as YUV, which has half as many values as RGB. Raises ValueError if the bytes do not fit the size.
    """
    height, width = _even(resized)
    new = np.empty((height * 3 // 2, width), np.uint8)
    for plane, new_plane in zip(_planes(np.frombuffer(stored, np.uint8), size), _planes(new, resized), strict=True):
        cv2.resize(plane, new_plane.shape[::-1], dst=new_plane, interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(new, cv2.COLOR_YUV2RGB_I420)[: resized[0], : resized[1]]


def _planes(image: np.ndarray, size: Size) -> list[np.ndarray]:
    """Views of the planes of a YUV image of `size`: luma [h, w], and two of chroma, half as large, rounded up."""
    height, width = _even(size)
    parts = np.split(image.ravel(), [height * width, height * width * 5 // 4])
    luma = parts[0].reshape(height, width)[: size[0], : size[1]]  # without padding, which would shift a resize
    return [luma, *(part.reshape(height // 2, width // 2) for part in parts[1:])]


def _even(size: Size) -> Size:
    return size[0] + size[0] % 2, size[1] + size[1] % 2
