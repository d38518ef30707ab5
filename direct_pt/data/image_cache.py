"""Low-resolution copies of the training images: stage 1 sees each of them 48 times, and decodes and shrinks it once.

A cache is a folder: `manifest.json` says what it was made from, `pixels` holds one copy after another, `index` says
where each begins, a record an image, written once its pixels are on the disk. It counts as whole when every image has
its record; building goes on after the last one.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.io import encode_jpeg
from tqdm import tqdm

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.images import Size, UnreadableImage, decode_jpeg
from direct_pt.data.table_cache import cache_root
from direct_pt.transforms import fit

VERSION = 1
# How large the copies are, in crop sizes. JPEGs have all that the largest resize can show. Raw copies are a little
# smaller, so that COCO train2017 takes under 30 GB.
KINDS = {"jpeg": 1.2, "raw": 1.05}
BYTES_A_PIXEL = {"jpeg": 0.4, "raw": 1.5}  # JPEG's is a guess on the safe side, to look for space on the disk
CHUNK = 256  # images between two writes of the index
RECORD = np.dtype([("offset", "<i8"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4")])
Manifest = dict[str, Any]
JPEG_QUALITY = 90


class ImageCache:
    """The copies, by the images' rows, of the whole cache in `folder`, and the manifest of it."""

    def __init__(self, folder: Path, made_from: Manifest) -> None:
        self.folder = folder
        self.made_from = made_from
        self.index = _sound_records(folder)
        self.pixels = (folder / "pixels").open("rb")  # stays readable, whatever becomes of the folder

    @property
    def gigabytes(self) -> float:
        """On the disk."""
        return float(self.index["length"].sum()) / 1e9

    def read(self, row: int, resized: Size) -> np.ndarray | None:
        """[h, w, 3] uint8 RGB, the copy of image `row`, or None where there is none to be had.

        It is to become `resized`, and may be so already.
        """
        offset, length, height, width = self.index[row].tolist()
        try:
            stored = os.pread(self.pixels.fileno(), length, offset)
            if not length or len(stored) < length:
                return None
            jpeg = self.made_from["kind"] == "jpeg"
            return decode_jpeg(stored) if jpeg else from_yuv(stored, (height, width), resized)
        except (OSError, RuntimeError, ValueError):  # the disk's doing; the image file is still there
            return None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _whole_cache, (self.folder, self.made_from)


def open_image_cache(
    table: AnnotationTable, kind: str, image_size: int, root: Path | None, workers: int
) -> ImageCache | None:
    """The cache of a table's images, built or completed first where need be; None, and why on stderr, if that fails.

    Of several processes that call it at once, one builds and the others wait.

    Args:
        table: of the images.
        kind: one of KINDS.
        image_size: of the crops.
        root: the folder that caches stand in; None for the usual one.
        workers: processes that read images.
    """
    try:
        root = root or cache_root()
    except RuntimeError as error:  # nobody's home
        _warn(f"{error} The image files are read each time; --cache-dir takes a folder for the cache")
        return None
    made_from = _made_from(table, kind, image_size)
    place = json.dumps([str(Path(table.source).resolve()), str(table.folder.resolve())])
    folder = root / f"images-{kind}-{image_size}-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    if cache := _whole_cache(folder, made_from):
        return cache
    try:
        if not root.exists():
            root.mkdir(parents=True, exist_ok=True)
        with (root / f"{folder.name}.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # not flock, which workers that outlive this process would hold
            begun = _begun(folder, made_from)
            try:
                if begun < len(table):
                    _build(table, folder, made_from, begun, workers)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return _whole_cache(folder, made_from)
    except OSError as error:
        smaller = ", --cache jpeg needs a quarter of the space" if kind == "raw" else ""
        _warn(f"{folder}: cannot be written ({error.strerror or error}), so that the image files are read each time; "
              f"--cache-dir takes a folder elsewhere{smaller}")  # fmt: skip
        return None


def _made_from(table: AnnotationTable, kind: str, image_size: int) -> Manifest:
    """The manifest: whatever would change the copies."""
    files = hashlib.sha256(table.sizes.tobytes() + table.file_names.tobytes())
    files.update(repr(table.decoding).encode())
    if table.encoded is not None:
        files.update(table.encoded.fingerprint.encode())
    for row in range(len(table)) if table.encoded is None else ():
        with suppress(OSError):  # a missing file has no copy, and training names it
            status = table.path(row).stat()
            files.update(b"%d %d %d\n" % (row, status.st_size, status.st_mtime_ns))
    side = int(KINDS[kind] * image_size)
    return {"version": VERSION, "kind": kind, "side": side, "images": len(table), "files": files.hexdigest()}


def _whole_cache(folder: Path, made_from: Manifest) -> ImageCache | None:
    """The cache in `folder`, if there is a whole one that was made from this."""
    with suppress(OSError, ValueError):
        if json.loads((folder / "manifest.json").read_text()) == made_from:
            cache = ImageCache(folder, made_from)
            return cache if len(cache.index) == made_from["images"] else None
    return None


def _begun(folder: Path, made_from: Manifest) -> int:
    """How many images a cache holds, after what was left half written is cut off. What is of no use is removed."""
    if not folder.exists():
        return 0
    try:
        if json.loads((folder / "manifest.json").read_text()) == made_from:
            index = _sound_records(folder)
            os.truncate(folder / "index", index.nbytes)
            os.truncate(folder / "pixels", index["length"].sum())
            return len(index)
        _warn(f"{folder}: was made from other images or by another version; it is built anew")
    except (OSError, ValueError):
        _warn(f"{folder}: is damaged; it is built anew")
    shutil.rmtree(folder)
    return 0


def _sound_records(folder: Path) -> np.ndarray:
    """The index up to the first record that does not fit those before it or has no pixels. Raises OSError."""
    index = np.fromfile(folder / "index", RECORD)
    ends = np.cumsum(index["length"])
    sound = (index["offset"] == ends - index["length"]) & (index["length"] >= 0)
    sound &= ends <= (folder / "pixels").stat().st_size
    return index[np.logical_and.accumulate(sound)]


def _build(table: AnnotationTable, folder: Path, made_from: Manifest, begun: int, workers: int) -> None:
    """Append the images from row `begun` on."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(made_from))
    kind, side = made_from["kind"], made_from["side"]
    pixels_left = sum(math.prod(copy_size((height, width), side)) for height, width in table.sizes[begun:].tolist())
    needed, free = pixels_left * BYTES_A_PIXEL[kind], shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} are free")
    chunks: Iterable[list[tuple[bytes, Size]]] = DataLoader(
        Copies(table, kind, side),
        sampler=range(begun, len(table)),
        batch_size=CHUNK,
        collate_fn=list,
        num_workers=workers,
        generator=torch.Generator(),  # its own, as the training loader's
        worker_init_fn=_end_with_parent,
    )
    with (
        (folder / "pixels").open("ab") as pixels,
        (folder / "index").open("ab") as index,
        tqdm(total=len(table), initial=begun, desc=f"image cache ({kind})", unit="image") as bar,
    ):
        for chunk in chunks:
            lengths = np.array([len(content) for content, _ in chunk])
            records = np.zeros(len(chunk), RECORD)
            records["offset"], records["length"] = pixels.tell() + np.cumsum(lengths) - lengths, lengths
            records["height"], records["width"] = np.array([size for _, size in chunk]).T
            for file, content in ((pixels, b"".join(content for content, _ in chunk)), (index, records.tobytes())):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the pixels before what says that they are there
            bar.update(len(chunk))


def _end_with_parent(worker: int) -> None:
    """One that waits to hand over what it has would outlive a killed parent for ever."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _warn(message: str) -> None:
    print(f"image cache: {message}", file=sys.stderr, flush=True)


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
