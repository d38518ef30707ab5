"""Files that are written as a whole or not at all, and files of tensors with a checksum."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

CHECKSUM, FACTS = "sha256", "facts"  # keys of the metadata in a file of tensors


class DamagedFile(Exception):
    """A file cannot be read, or its content is not what was written. The message names the file."""


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
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text)
        replace_file(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # the error of a write does not name the file


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
