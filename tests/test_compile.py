"""Compilation of the backbone: few of them, the same losses and names, and what cannot be compiled is refused.

The backend only counts: it runs the graphs as they are.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_runs as runs
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from direct_pt.errors import InputError
from direct_pt.models.backbone import Backbone
from direct_pt.models.detector import Detector, build_detector
from direct_pt.training.micro_batch import training_batch

SHAPES = [(64, 96), (96, 64), (96, 96), (64, 128), (128, 96), (96, 160), (160, 64)]  # as of stage 2
SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def figures(detector: Detector, seed: int, size: tuple[int, int]) -> dict[str, float]:
    """The losses of a step, and the sum of the backbone's gradients."""
    batch = training_batch(2, size, 3, 3, seed=seed)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(batch)
    torch.stack(list(losses.values())).sum().backward()
    gradients = [parameter.grad.sum() for parameter in detector.backbone.parameters() if parameter.grad is not None]
    detector.zero_grad()
    return {name: value.item() for name, value in {**losses, "gradients": torch.stack(gradients).sum()}.items()}


def test_stage_1_compiles_once(counter: CompileCounterWithBackend) -> None:
    torch.manual_seed(0)
    plain = build_detector("retinanet_r50_fpn", num_classes=3, backbone="resnet18").train()
    compiled = copy.deepcopy(plain)
    compiled.backbone.compile_training(one_shape=True, backend=counter)
    for seed in range(2):
        assert figures(compiled, seed, SHAPES[0]) == pytest.approx(figures(plain, seed, SHAPES[0]), rel=1e-6)
        assert counter.frame_count == 1
    states = plain.state_dict()
    assert list(compiled.state_dict()) == list(states)
    assert all(torch.equal(value, states[name]) for name, value in compiled.state_dict().items())
    found = [detector.eval().detect(training_batch(1, (64, 160), 1, 3)) for detector in (plain, compiled)]
    assert torch.equal(found[0].boxes, found[1].boxes)
    assert counter.frame_count == 1  # other modes run as they are
    for detector in (plain, compiled):
        detector.train()
    assert figures(compiled, 2, SHAPES[0]) == pytest.approx(figures(plain, 2, SHAPES[0]), rel=1e-6)
    assert counter.frame_count == 1


def test_stage_2_compiles_for_all_shapes_together(counter: CompileCounterWithBackend) -> None:
    """With stem and first stage frozen."""
    torch.manual_seed(0)
    plain = Backbone("resnet18").train()
    for parameter in plain.stem_and_first_stage():
        parameter.requires_grad_(False)
    compiled = copy.deepcopy(plain)
    compiled.compile_training(one_shape=False, backend=counter)
    for size in SHAPES:
        images = torch.rand(2, 3, *size)
        for expected, found in zip(plain(images), compiled(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            if found.requires_grad:
                found.sum().backward(retain_graph=True)
    assert counter.frame_count <= 2


def test_swin_is_compiled_for_one_shape_only(counter: CompileCounterWithBackend) -> None:
    backbone = Backbone(SWIN)
    with pytest.raises(InputError, match="--compile: Swin is compiled anew for each shape"):
        backbone.compile_training(one_shape=False, backend=counter)
    backbone.compile_training(one_shape=True, backend=counter)


def test_it_needs_a_compiler(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="--compile needs a C\\+\\+ compiler"):
        runs.train("pretrain", *runs.PRETRAIN, *runs.train_part(demo), "--compile", "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
