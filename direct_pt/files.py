"""Files that are written as a whole or not at all, never over what is read; files of tensors with a checksum.

Only regular files are read: a pipe could keep a program waiting for ever, a device could fill its memory.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from direct_pt.errors import InputError

CHECKSUM, FACTS = "sha256", "facts"  # keys of the metadata in a file of tensors
MAX_NAME_BYTES = 255  # of a file's name, on nearly all file systems
MAX_STEM_BYTES = 240  # of a temporary file's name, to which something is added
PROBE_BYTES = 4096  # that a disk must take before work begins
MAX_JSON_BYTES = 2**26  # of a JSON file of ours, which is a few kilobytes
MAX_JSON_DEPTH = 100  # far more than any such file has: what works on its content may recurse
# safetensors' names of types, and torch's
TENSOR_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
Layout = tuple[list[int], str]  # shape and type, as torch calls it
AnyPath = str | os.PathLike[str]
NO_FILES = {  # what a path may lead to that cannot be read as a file
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class DamagedFile(Exception):
    """A file cannot be read, or its content is not what was written. The message names the file."""


# Opening


def open_regular(path: AnyPath) -> BinaryIO:
    """A file, opened for reading in binary. Raises OSError, also where it is no regular file; links are followed."""
    return os.fdopen(_descriptor(path), "rb")


def read_regular(path: AnyPath) -> bytes:
    """A file's content. Raises OSError, also where it is no regular file; links are followed."""
    with FileIO(_descriptor(path)) as file:
        return file.readall()


def _descriptor(path: AnyPath) -> int:
    """Of a regular file, for reading."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it, a pipe waits for its writer
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(f"it is {what_is_there(path)}, not a file") from error
        raise
    try:
        require_regular(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    os.set_blocking(descriptor, True)  # else, disks that fetch a file from an archive may fail to read it
    return descriptor


def require_regular(descriptor: int, path: AnyPath) -> os.stat_result:
    """The status of an open file. Raises OSError where it is no regular one."""
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return status
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(f"it is {NO_FILES.get(stat.S_IFMT(status.st_mode), 'no regular file')}, not a file")


def what_is_there(path: AnyPath) -> str:
    """What a path leads to, or why that is unknown, in words; "" if nothing is there."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - any name
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return ""
    except OSError as error:
        return str(error.strerror or error)
    kinds = NO_FILES | {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "no regular file")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns an OSError inside it into an InputError about the file that it names, or else about `what`."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str | os.PathLike) else what
        raise InputError(f"{name}: cannot be read ({error.strerror or error}); allow it, or mend the path") from error


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
    """Raise InputError where a folder cannot be written, or is removed later, as a run's old checkpoints are.

    Nothing is created: what is refused later leaves no trace.
    """
    with writing(f"{flag} {folder}"):
        for place in (real := folder.resolve(), *real.parents):
            if place.name == "checkpoints" and (place.parent / "config.json").exists():
                raise InputError(f"{flag} {folder}: a run removes what lies in its {place}; name another place")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{flag} {folder}: is a file")
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


def counted_folder(first: Path, latest: bool = False) -> Path:
    """The folder after the latest of NAME, NAME-2 and so on, or that one itself; `first` where there is none."""
    numbers = [0]
    for path in first.parent.glob(f"{first.name}*"):
        rest = path.name.removeprefix(first.name)
        if not rest:
            numbers.append(1)
        elif rest.startswith("-") and rest[1:].isascii() and rest[1:].isdigit() and len(rest) < 10:
            numbers.append(int(rest[1:]))
    number = max(max(numbers) + (not latest), 1)
    return first if number == 1 else first.with_name(f"{first.name}-{number}")


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


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as a whole. Raises OSError."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def valid_unicode(content: Any) -> Any:
    """A JSON value with escapes in place of lone surrogates (bytes of names that are no UTF-8): readers refuse them."""
    if isinstance(content, str):
        return content.encode("utf-8", "backslashreplace").decode()
    if isinstance(content, dict):
        return {valid_unicode(key): valid_unicode(value) for key, value in content.items()}
    return [valid_unicode(value) for value in content] if isinstance(content, list | tuple) else content


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    temporary = unfinished(path)
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


def unfinished(path: Path) -> Path:
    """The file that `replacing(path)` writes to; a kill may leave it until the next one."""
    return path.with_name(f".{shortened(path.name, MAX_STEM_BYTES)}.partial")


def shortened(name: str, limit: int) -> str:
    """The start of a file name, of at most `limit` bytes."""
    while len(os.fsencode(name)) > limit:
        name = name[:-1]
    return name


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


# Reading


def read_json(path: Path, most_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file. Raises DamagedFile: it is missing, too large, or no JSON that `parse_json` takes."""
    try:
        with open_regular(path) as file:
            content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"it has more than {most_bytes:,} bytes")
        return parse_json(content)
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path}: cannot be read as JSON ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text says. Raises ValueError, also where it is nested too deeply."""
    too_deep = f"it is nested more than {MAX_JSON_DEPTH} levels deep"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    except ValueError as error:
        if "integer string" in str(error):  # Python's own words name a setting of Python
            raise ValueError("it has an integer of thousands of digits") from error
        raise
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = [part for part in level if isinstance(part, dict | list)]
        level = [item for part in inner for item in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return value
    raise ValueError(too_deep)


def read_layouts(path: Path) -> dict[str, Layout]:
    """The shapes and types of a file's tensors, out of its header alone. Raises DamagedFile."""
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            types = {name: part.get_dtype() for name, part in parts.items()}
            return {
                name: (part.get_shape(), TENSOR_TYPES.get(types[name], types[name])) for name, part in parts.items()
            }
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"{path}: cannot be read as tensors ({error}); the file is missing or damaged") from error


def read_tensors(path: Path, is_ours: bool = False) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the facts. Files of other programs have no checksum, and None as facts.

    Args:
        path: of the file.
        is_ours: `write_tensors` wrote it, if it is what it should be: one without a checksum is damaged.

    Raises:
        DamagedFile: the file is missing, truncated or altered.
    """
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if is_ours and CHECKSUM not in metadata:
                raise DamagedFile(f"{path}: has no checksum, so this program did not write it like this")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"{path}: cannot be read as tensors ({error}); the file is missing or damaged") from error
    text = metadata.get(FACTS, "null")
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, text):
        raise DamagedFile(f"{path}: its checksum does not fit its content; the file is damaged")
    try:
        return tensors, parse_json(text)
    except ValueError as error:
        raise DamagedFile(f"{path}: its metadata cannot be read ({error})") from error


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 of the facts' text and each tensor's name, type, shape and content, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
