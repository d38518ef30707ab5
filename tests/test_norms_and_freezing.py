"""Which parameters train and decay in each stage, and GroupNorm in place of BatchNorm."""

import copy

import pytest
import torch
from small_detectors import (
    CASCADE,
    FASTER,
    MASK,
    RETINANET,
    SWIN,
    small_detector,
    total_loss,
)
from torch import nn

from direct_pt.batch import Batch
from direct_pt.models.detector import MODELS
from direct_pt.models.layers import batchnorms, use_groupnorm
from direct_pt.recipes import parameter_groups

# Freezing and weight decay


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_frozen_from_scratch(name: str) -> None:
    detector = small_detector(name).train()
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert all(layer.training for layer in batchnorms(detector))
    assert len(batchnorms(detector)) == (0 if name == SWIN else 20)
    assert not any(layer.training for layer in batchnorms(detector.eval()))


@pytest.mark.parametrize(
    ("backbone", "first"),
    [
        ("resnet18", ("conv1.", "bn1.", "layer1.")),
        ("resnet50", ("conv1.", "bn1.", "layer1.")),
        ("mobilenetv3_large_100", ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
        ("efficientnet_b0", ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
    ],
)
def test_freeze_for_finetuning(backbone: str, first: tuple[str, ...]) -> None:
    """BatchNorm everywhere, and all that comes before the second stage."""
    detector = small_detector(backbone=backbone).train()
    detector.freeze_for_finetuning()
    frozen = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    norms = {
        f"{name}.{part}"
        for name, module in detector.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    prefixes = tuple(f"backbone.network.{prefix}" for prefix in first)
    beginning = {name for name, _ in detector.named_parameters() if name.startswith(prefixes)}
    assert len(detector.backbone.stem_and_first_stage()) == len(beginning)
    assert len(norms) > 20 and len(beginning - norms) > len(first)
    assert frozen == norms | beginning
    for mode in (detector.train(), detector.eval().train()):
        assert mode.training and not any(layer.training for layer in batchnorms(mode))


@pytest.mark.parametrize(("name", "backbone"), [(SWIN, MODELS[SWIN]), (FASTER, "convnext_atto")])
def test_networks_with_layernorm_train_whole(name: str, backbone: str) -> None:
    detector = small_detector(name, backbone=backbone).train()
    detector.freeze_for_finetuning()
    assert detector.backbone.has_layernorm and batchnorms(detector) == []
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert all(module.training for module in detector.train().modules())


def test_frozen_batchnorm_keeps_its_statistics(batch: Batch) -> None:
    detector = small_detector().train()
    detector.freeze_for_finetuning()
    before = copy.deepcopy(detector.state_dict())
    optimizer = torch.optim.SGD(parameter_groups(detector, 1e-4), lr=0.01)
    total_loss(detector, batch).backward()
    optimizer.step()
    changed = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, parameter in detector.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("name", "norm"), [(FASTER, "batch"), (FASTER, "group"), (SWIN, "batch")])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameter_groups(name: str, norm: str, frozen: bool) -> None:
    detector = small_detector(name, norm)
    if frozen:
        detector.freeze_for_finetuning()
    nothing = {"params": [], "weight_decay": 0.0}
    decayed, exempt, *more = [*parameter_groups(detector, 1e-4), nothing]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (1e-4, 0.0) and more in ([], [nothing])
    listed = [id(parameter) for parameter in decayed["params"] + exempt["params"]]
    trained = {id(parameter) for parameter in detector.parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trained
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    kinds = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    free = {id(p) for m in detector.modules() if isinstance(m, kinds) for p in m.parameters()}
    free |= {i for i, name in names.items() if name.endswith("relative_position_bias_table")}
    assert {names[id(p)] for p in exempt["params"]} == {names[i] for i in free & trained}
    assert any(names[id(p)].endswith("bias") for p in decayed["params"])  # biases of convolutions decay
    assert bool(exempt["params"]) == (not frozen or norm == "group" or name == SWIN)


# GroupNorm


@pytest.mark.parametrize("name", MODELS)
def test_use_groupnorm(name: str) -> None:
    """Also after the convolutions of pyramid and heads, but for predictors and the RPN's one convolution."""
    detector = small_detector(name, backbone="resnet18")
    count = len(batchnorms(detector))
    lists = {RETINANET: 3 + 5 + 8, FASTER: 8 + 4, CASCADE: 8, MASK: 8 + 4 + 4, SWIN: 8 + 4 + 4}[name]
    convolutions = [n for n, layer in detector.named_modules() if isinstance(layer, nn.Conv2d)]
    use_groupnorm(detector)
    assert count > 0 and batchnorms(detector) == []
    assert sum(isinstance(module, nn.GroupNorm) for module in detector.modules()) == count + lists
    bare = {
        n
        for n, layer in detector.named_modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not n.startswith("backbone.") and n in convolutions
    }
    rpn = {"rpn.conv", "rpn.objectness", "rpn.deltas"}
    expected = {
        RETINANET: {"head.logits", "head.deltas"},
        FASTER: rpn,
        CASCADE: rpn,
        MASK: rpn | {"roi_head.mask_head.logits"},
        SWIN: rpn | {"roi_head.mask_head.logits"},
    }[name]
    assert bare == expected  # the others are now the first of a pair


@pytest.mark.parametrize("backbone", ["resnet18", "regnetx_002", "mobilenetv3_large_100"])
@torch.no_grad()
def test_groupnorm_in_any_backbone(backbone: str) -> None:
    """Where channels are no multiple of 32, and where a norm carries its activation."""
    detector = small_detector(backbone=backbone)
    count = len(batchnorms(detector))
    image = torch.rand(1, 3, 64, 64)
    shapes = [level.shape for level in detector.eval().backbone(image)]
    use_groupnorm(detector)
    assert count > 0 and batchnorms(detector) == []
    assert sum(isinstance(module, nn.GroupNorm) for module in detector.backbone.modules()) == count
    assert [level.shape for level in detector.backbone(image)] == shapes
    # Each norm is followed by what followed it: without activations the network would be linear up to the norms.
    relu = sum(isinstance(module, nn.ReLU) for module in detector.backbone.modules())
    assert relu == sum(isinstance(module, nn.ReLU) for module in small_detector(backbone=backbone).backbone.modules())
