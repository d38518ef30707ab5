"""Files that are replaced as a whole, and tensors in them with a checksum of their content."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

CHECKSUM, FACTS = "sha256", "facts"  # keys of a file's metadata


class DamagedFile(Exception):
    """A file cannot be read, or does not hold what was written. The message names it."""


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: Any = None) -> None:
    """Write a file that `read_tensors` can check; one that stood there is replaced as a whole.

    Args:
        path: of the file; hidden beside it the new one is written first.
        tensors: on any device.
        facts: what JSON can hold, kept in the same file.

    Raises:
        OSError: the disk is full, or read-only, or broken.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts, allow_nan=False)
    # In a folder of its own: safetensors writes into a file of a random name first, which stays where it is killed.
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        temporary = partial / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # as for any new file; safetensors' own is for this user alone
        save_file(content, temporary, {"format": "pt", FACTS: text, CHECKSUM: _checksum(content, text)})
        temporary.chmod(mode)
        replace_file(temporary, path)
    except (SafetensorError, OSError) as error:
        raise error if isinstance(error, OSError) else OSError(f"{path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what is half there keeps a full disk full


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the facts. Files of other programs have no checksum and no facts (None).

    Raises:
        DamagedFile: the file is missing, cut short or altered.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
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
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write that failed does not say where


def replace_file(temporary: Path, final: Path) -> None:
    """Put `temporary` in `final`'s place, on disk before it is visible."""
    sync(temporary)
    temporary.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Have what a file holds, or a folder lists, on disk: it is there after a power cut too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
