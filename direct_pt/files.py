"""Files that are written as a whole or not at all, never over what is read; files of tensors with a checksum."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from direct_pt.errors import InputError

CHECKSUM, FACTS = "sha256", "facts"  # keys of the metadata in a file of tensors
MAX_STEM_BYTES = 240  # of a temporary file's name; with what is added, file systems take 255
PROBE_BYTES = 4096  # that a disk must take before work begins


class DamagedFile(Exception):
    """A file cannot be read, or its content is not what was written. The message names the file."""


# Whether something can be written, and does no harm


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns an OSError inside it into an InputError about `what`: a flag and its value, or a file."""
    try:
        yield
    except OSError as error:
        file = f": {error.filename}" if isinstance(error.filename, str) and error.filename not in what else ""
        reason = f"{error.strerror or error}{file}"
        raise InputError(f"{what}: cannot be written ({reason}); make room there, or name another place") from error


def check_output(folder: Path, flag: str = "--output-dir") -> None:
    """Raise InputError where a folder cannot be written. Nothing is created: what is refused later leaves no trace."""
    with writing(f"{flag} {folder}"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{flag} {folder}: is a file")
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


def check_inputs_kept(outputs: Iterable[Path], inputs: Iterable[Path], flag: str = "--output-dir") -> None:
    """Raise InputError where something to be written is something that is read, also by another name or through a link.

    Args:
        outputs: files or folders; most do not exist yet.
        inputs: files or folders.
        flag: that the outputs follow from.
    """
    existing: dict[Any, Path] = {place: path for path in outputs if (place := _place(path)) is not None}
    for path in inputs if existing else ():
        if output := existing.get(_place(path)):
            same = "is read too" if output == path else f"is the same as {path}, which is read"
            raise InputError(f"{flag}: {output} {same}, and would be written over; name another place")


def _place(path: Path) -> tuple[int, int] | None:
    """What all names of a file or folder have in common: its device and number there. None if it does not exist."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


# Writing


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: Any = None) -> None:
    """Write tensors with a checksum that `read_tensors` verifies; an existing file is replaced as a whole.

    Args:
        path: of the file; the new one is first written to a hidden folder beside it.
        tensors: on any device.
        facts: a JSON value, stored in the same file.

    Raises:
        OSError: the disk is full, read-only or broken.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts, allow_nan=False)
    # A folder, because safetensors writes to a file of a random name first, and leaves it there if it is killed.
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        temporary = partial / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file; safetensors would make it readable for this user only
        save_file(content, temporary, {"format": "pt", FACTS: text, CHECKSUM: _checksum(content, text)})
        temporary.chmod(mode)
        replace_file(temporary, path)
    except (SafetensorError, OSError) as error:
        raise error if isinstance(error, OSError) else OSError(f"{path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # an unfinished file would keep a full disk full


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the facts. Files of other programs have no checksum, and None as facts.

    Raises:
        DamagedFile: the file is missing, truncated or altered.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"{path}: cannot be read as tensors ({error}); the file is missing or damaged") from error
    text = metadata.get(FACTS, "null")
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, text):
        raise DamagedFile(f"{path}: its checksum does not fit its content; the file is damaged")
    try:
        return tensors, json.loads(text)
    except ValueError as error:
        raise DamagedFile(f"{path}: its metadata cannot be read ({error})") from error


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as a whole. Raises OSError."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextmanager
def replacing(path: Path, to_disk: bool = True) -> Iterator[Path]:
    """A temporary file's path beside `path`, to write to: it gets that name at the end, or is removed after an error.

    A link at `path` is replaced, not followed.

    Args:
        path: of the file.
        to_disk: wait until the content is on disk.

    Raises:
        OSError: with the name of `path`; a file there is unchanged.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:MAX_STEM_BYTES])
    temporary = path.with_name(f".{stem}.partial")
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        if to_disk:
            replace_file(temporary, path)
        else:
            temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # an unfinished file would keep a full disk full


def replace_file(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`, once its content is on disk."""
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk and survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 of the facts' text and each tensor's name, type, shape and content, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
