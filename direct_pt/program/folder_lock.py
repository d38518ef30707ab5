"""A lock on an output folder: two programs do not write the same files. It ends with the process that holds it."""

import atexit
import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from direct_pt.errors import InputError, printable

IS_HELD = (errno.EACCES, errno.EAGAIN)

_held: dict[Path, int] = {}  # this process's, by the lock's file: its descriptor


def hold_folder(folder: Path, program: str = "train", flag: str = "--output-dir") -> bool:
    """Take a folder's lock, and keep it until `release_folder` or the end of this process.

    The system's own record locks are used: they end with their process, however it ends, are not inherited by processes
    that it starts, and hold over NFS. The file says who holds it.

    Args:
        folder: created if it does not exist.
        program: whose files the lock is for.
        flag: that names the folder, for messages.

    Returns:
        Whether it was not this process's before.

    Raises:
        InputError: another process holds it.
        OSError: the folder or the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _lock_file(folder, program)
    if path in _held and _is_file(_held[path], path):
        return False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 300).decode(errors="replace").strip()
            if error.errno in IS_HELD:
                os.close(descriptor)
                raise InputError(
                    f"{flag} {folder}: {holder or 'another program'} writes there; wait until that has ended, or name "
                    "another folder"
                ) from error
            text = f"warning: {folder}: its file system has no locks ({error.strerror}): no other run may write there"
            print(printable(text), file=sys.stderr, flush=True)
        if _is_file(descriptor, path):  # and not one that its last holder has removed meanwhile
            break
        os.close(descriptor)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} (since {since})\n".encode())
    except OSError:
        os.close(descriptor)
        raise
    _held[path] = descriptor
    atexit.register(release_folder, folder, program, os.getpid())
    return True


def release_folder(folder: Path, program: str = "train", pid: int | None = None) -> None:
    """Give up a folder's lock, if this process, or the one of that number, holds it, and remove its file."""
    path = _lock_file(folder, program)
    if pid not in (None, os.getpid()) or path not in _held:
        return
    descriptor = _held.pop(path)
    with contextlib.suppress(OSError):
        if _is_file(descriptor, path):
            path.unlink()  # while it is held: whoever opened it meanwhile finds that it is gone
    os.close(descriptor)


def release_all() -> None:
    """Give up all locks of this process."""
    for path in list(_held):
        release_folder(path.parent, path.stem.removeprefix("."))


@contextmanager
def folder_held(folder: Path, program: str, flag: str = "--output-dir") -> Iterator[None]:
    """Hold a folder's lock inside it. Raises InputError, or OSError, as `hold_folder`."""
    hold_folder(folder, program, flag)
    try:
        yield
    finally:
        release_folder(folder, program)


def _lock_file(folder: Path, program: str) -> Path:
    return folder.resolve() / f".{program}.lock"


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
