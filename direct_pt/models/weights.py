"""Weights out of files: compared with what a network needs before memory is taken for it, and looked through."""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from direct_pt.errors import InputError
from direct_pt.files import TENSOR_TYPES, Layout
from direct_pt.models.detector import Detector, DetectorConfig, build_detector

FLOATING = frozenset(name for name in TENSOR_TYPES.values() if "float" in name)


@functools.lru_cache(maxsize=4)
def outline_of(config: DetectorConfig) -> Detector:
    """A detector without memory for its tensors, which have shapes and types alone. No random numbers are drawn.

    Raises:
        InputError: there is no such detector.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build_detector(config.name, config=config)
        except InputError:
            return build_detector(config.name, config=config)  # a network may need real values while it is built


def layouts(tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    """Shapes and types, as `files.read_layouts` gives those of a file."""
    return {name: (list(tensor.shape), _type_name(tensor)) for name, tensor in tensors.items()}


def misfits(found: Mapping[str, Layout], expected: Mapping[str, Layout], what: str) -> str:
    """How tensors do not fit, in words; "" where they do. Any floating-point type stands for any other.

    Args:
        found: of the file.
        expected: of the network.
        what: the network, in words.
    """
    wrong = [name for name in expected if name not in found or not _fits(found[name], expected[name])]
    wrong += [name for name in found if name not in expected]
    if not wrong:
        return ""
    first = min(wrong)
    here, there = expected.get(first), found.get(first)
    same_shape = here is not None and there is not None and here[0] == there[0]
    sides = ["nothing" if side is None else f"{side[0]}" + f" {side[1]}" * same_shape for side in (here, there)]
    return f"{len(wrong)} tensors do not fit {what}, first {first[:200]}: expected {sides[0]}, found {sides[1]}"


def wrong_kind(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Which of some tensors is floating-point where it must not be, or the other way round, in words."""
    for name, tensor in found.items():
        kind, needed = (_kind(_type_name(one)) for one in (tensor, expected[name]))
        if kind != needed:
            return f"{name[:200]} is of type {_type_name(tensor)}, and must be {needed}"
    return ""


def bad_values(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor is not finite, or is none whose values are all in memory, in words; "" where none is."""
    for name, tensor in tensors.items():
        if reason := _hollow(tensor):
            return f"{name[:200]} {reason}"
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            count = int((~torch.isfinite(tensor.float())).sum())
            return f"{name[:200]} has {count} of {tensor.numel()} values that are not finite"
    return ""


def _hollow(tensor: Tensor) -> str:
    """Why a tensor is none whose values are all in memory, in words."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return "is no plain tensor"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"has the shape {list(tensor.shape)}, and fewer values than that"
    return ""


def _fits(found: Layout, expected: Layout) -> bool:
    return found[0] == expected[0] and _kind(found[1]) == _kind(expected[1])


def _kind(type_name: str) -> str:
    return "floating-point" if type_name in FLOATING else "whole" if "int" in type_name else type_name


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
