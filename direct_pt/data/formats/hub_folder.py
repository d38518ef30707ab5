"""What the files of a local Hugging Face set name: nothing outside of its folder, on the disk or on the net.

That is decided before the `datasets` library is called, which looks for all that they name at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import datasets
import yaml
from huggingface_hub import DatasetCard, constants

from direct_pt.data.problems import DataError
from direct_pt.errors import InputError
from direct_pt.files import parse_json, read_regular

CARDS = ("README.md", ".huggingface.yaml")  # whose `configs` say which files belong to which split
NAMING = ("data_files", "data_dir")  # the fields of a configuration that name files and folders
CHAIN = "::"  # joins addresses to one, for the library
MAX_CARD_BYTES = 2**18  # of a card's YAML, which takes the library a minute for some megabytes
MAX_DEPTH = 6  # of lists in a field


def check_named_files(data: Path) -> None:
    """Check that the files of a local set name nothing outside of its folder.

    What cannot be read is left to the library, which reads it in the same way and reports it.

    Raises:
        DataError: naming the file and the field.
        InputError: the folder's own name would be taken for an address.
    """
    if CHAIN in str(data.absolute()):
        raise InputError(
            f"--data {data}: the datasets library takes {CHAIN} in a path for an address; rename the folder"
        )
    for name in CARDS:
        with suppress(OSError, ValueError, TypeError, yaml.YAMLError, RecursionError):
            for field, value in _named_by_card(data / name):
                _require_inside(data, data / name, field, value)
    states = [data / "state.json"]
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        file = data / "dataset_dict.json"
        for number, split in enumerate(parse_json(read_regular(file))["splits"]):
            _require_inside(data, file, f"splits[{number}]", split)
            states.append(data / split / "state.json")
    for file in states:
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            for number, piece in enumerate(parse_json(read_regular(file))["_data_files"]):
                _require_inside(data, file, f"_data_files[{number}].filename", piece["filename"])


def _named_by_card(path: Path) -> Iterator[tuple[str, Any]]:
    """The fields that name files, and the names and patterns in them."""
    if not path.is_file():
        return
    header = read_regular(path)
    if path.suffix == ".md":
        header = header[3:].partition(b"\n---")[0] if header.startswith(b"---") else b""
    if len(header) > MAX_CARD_BYTES:
        text = f"its YAML has {len(header):,} bytes, and at most {MAX_CARD_BYTES:,} are read: remove its configs"
        raise DataError("path", path, text)
    if path.suffix == ".md":
        configs = DatasetCard.load(path, ignore_metadata_errors=True).data.get("configs")
    else:
        configs = dict(yaml.safe_load(read_regular(path).decode()) or {}).get("configs")
    for number, config in enumerate(configs if isinstance(configs, list) else ()):
        for field in NAMING:
            if isinstance(config, dict) and config.get(field) is not None:
                yield from _leaves(f"configs[{number}].{field}", config[field])


def _leaves(field: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The values of a field that is a value, a list of values, or a dictionary of them by split."""
    if depth < MAX_DEPTH and isinstance(value, list):
        for number, one in enumerate(value):
            yield from _leaves(f"{field}[{number}]", one, depth + 1)
    elif depth < MAX_DEPTH and isinstance(value, dict):
        for key, one in value.items():
            if key != "split":
                yield from _leaves(f"{field}.{key}", one, depth + 1)
    else:
        yield field, value


def _require_inside(data: Path, file: Path, field: str, value: Any) -> None:
    """Raise DataError unless a value of a field is a path, or a pattern of paths, below the folder."""
    if not isinstance(value, str):
        raise DataError("path", file, f"{field} is {value!r:.60}: write the name of a file in {data}, or a pattern")
    try:
        is_address = bool(urlsplit(value).scheme or urlsplit(value).netloc) or CHAIN in value or "://" in value
    except ValueError:  # as of "//["
        is_address = True
    path = PurePosixPath(value.replace("\\", "/"))
    if is_address or path.is_absolute() or value.startswith("~") or ".." in path.parts:
        text = f"{field} names {value!r:.200}, which does not lie in {data}; nothing else is read: remove it there"
        raise DataError("path", file, text)


@contextmanager
def without_network() -> Iterator[None]:
    """Within it the Hugging Face libraries send nothing: they count how often a local set is loaded, too."""
    switches = (
        (datasets.config, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
        (constants, "HF_HUB_OFFLINE", True),
    )
    before = [getattr(module, name, value) for module, name, value in switches]
    try:
        for module, name, value in switches:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(switches, before, strict=True):
            setattr(module, name, value)
