"""Files of caches: only one's own are used, and only what was written into them.

Others may write where caches lie. So links, and what belongs to another user than this one or root, are left alone.
"""

import errno
import os
import stat
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from direct_pt.files import require_regular

WORDS = 512  # of 64 bits, that are summed before they are weighted by their place
FACTOR = 0x9E3779B97F4A7C15  # odd, and with bits everywhere
MODES = {"rb": os.O_RDONLY, "r+b": os.O_RDWR, "ab": os.O_WRONLY | os.O_APPEND}


class ForeignFile(OSError):
    """A file or folder of a cache is a link, or another user's. The message names it."""


def open_own(path: Path, mode: str = "rb", create: bool = False) -> IO[bytes]:
    """A file of a cache, opened in one of MODES.

    Args:
        path: of the file.
        mode: nothing in it cuts the file off.
        create: make the file where there is none.

    Raises:
        ForeignFile: it is a link, or another user's.
        OSError: it cannot be opened, or is no regular file.
    """
    flags = MODES[mode] | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise ForeignFile(f"{path} is a link; remove it") from error
        raise
    try:
        _require_own(require_regular(descriptor, path), path)
        return os.fdopen(descriptor, mode)
    except OSError:
        os.close(descriptor)
        raise


def require_own_folder(folder: Path) -> None:
    """Raise ForeignFile where a cache's folder is a link, or another user's; OSError where it is none."""
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise ForeignFile(f"{folder} is a link; remove it")
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    _require_own(status, folder)


def _require_own(status: os.stat_result, path: Path) -> None:
    if status.st_uid in (os.geteuid(), 0):
        return
    with suppress(OSError), tempfile.TemporaryFile(dir=path.parent) as probe:
        if os.fstat(probe.fileno()).st_uid == status.st_uid:  # network disks may show root's files as another user's
            return
    raise ForeignFile(f"{path} belongs to another user (number {status.st_uid}); name a folder of your own")


def checksum(content: bytes | np.ndarray, before: int = 0) -> int:
    """64 bits that tell damage, as fast as the memory is read: zlib's would take a quarter of the time of an image.

    Args:
        content: bytes, or an array [n] uint8.
        before: the checksum of what comes before it, or a number that belongs to it.
    """
    count = len(content) // 8
    words = np.frombuffer(content, "<u8", count) if count else np.zeros(0, "<u8")
    sums = np.add.reduceat(words, np.arange(0, count, WORDS)) if count else words
    total = int((sums * np.arange(1, 2 * len(sums), 2, dtype=np.uint64)).sum())  # by place: blocks may not swap
    return (before * FACTOR + total + zlib.crc32(bytes(content[count * 8 :]))) % 2**64
