"""How often a training step would make the processor wait for a GPU, counted without one: by what would wait."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from direct_pt.models.detector import MODELS, DetectorConfig, build_detector
from direct_pt.models.layers import force_gpu_path
from direct_pt.training.micro_batch import training_batch

MOST = 8
# Operators whose results are as large as their values say, or that a GPU's kernel finishes on the processor.
WAITING = ("nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "repeat_interleave", "nms")
# What moves values between Python and a device.
MOVING = ("tolist", "item", "new_tensor", "__bool__", "__int__", "__float__", "numpy")


class Waits(TorchDispatchMode):
    """Counts the waiting operators and, in `count`, whatever else is added."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        name = func.name().split("::")[1].split(".")[0]
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITING or any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in chosen):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def counted(waits: Waits, name: str) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def call(*args: Any, **options: Any) -> Any:
        waits.count[name] += 1
        return original(*args, **options)

    return call


@pytest.mark.parametrize("name", MODELS)
def test_few_waits_in_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DetectorConfig("", ("a", "b", "c"), (1, 2, 3), "resnet18", channels=32, proposals=100, rois_per_image=32)
    backbone = MODELS[name] if "swin" in name else "resnet18"
    config = DetectorConfig(**{**config.to_dict(), "name": name, "backbone": backbone})
    torch.manual_seed(0)
    detector = build_detector(name, config=config).train()
    batch = training_batch(2, (128, 128), 5, 3, with_masks=detector.has_masks)
    waits = Waits()
    for move in MOVING:
        monkeypatch.setattr(Tensor, move, counted(waits, move))
    with force_gpu_path(), waits:
        torch.stack(list(detector(batch).values())).sum().backward()
    monkeypatch.undo()
    assert sum(waits.count.values()) <= MOST, waits.count
    assert name.startswith("retinanet") or waits.count["nms"] == 1


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits()
    for move in MOVING:
        monkeypatch.setattr(Tensor, move, counted(waits, move))
    values = torch.from_numpy(np.arange(4.0))
    with waits:
        assert (values[values > 1].sum() > 0) and values.tolist() and torch.nonzero(values).numel() == 3
        values.new_tensor([1.0])
    monkeypatch.undo()
    assert waits.count == {"index": 1, "__bool__": 1, "tolist": 1, "nonzero": 1, "new_tensor": 1}
