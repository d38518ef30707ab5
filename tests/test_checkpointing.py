"""Gradient checkpointing: the same gradients, statistics and weights, out of less memory."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import small_runs as runs
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.memory_account import MemoryAccount
from direct_pt.errors import InputError
from direct_pt.models.backbone import Backbone
from direct_pt.models.detector import Detector, build_detector
from direct_pt.models.layers import recompute_blocks, repeated_blocks
from direct_pt.training.micro_batch import training_batch
from direct_pt.training.settings import PretrainFlags, parse_flags

SWIN = "swin_tiny_patch4_window7_224"
BLOCKS = {
    "resnet18": (8, "layer1.0"),
    SWIN: (12, "layers_0.blocks.0"),
    "convnext_atto": (12, "stages_0.blocks.0"),
    "mobilenetv3_small_100": (11, "blocks.0.0"),
    "regnety_004": (15, "s2.b1"),  # blocks that stand in no list
}


def pair(backbone: str) -> tuple[Backbone, Backbone]:
    """Two with the same weights in training mode, the second one recomputed."""
    torch.manual_seed(0)
    plain = Backbone(backbone)
    recomputed = copy.deepcopy(plain)
    assert recompute_blocks(recomputed.network)
    return plain, copy.deepcopy(recomputed)


def step(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """Forward and backward in bf16. The maps, and numbers drawn after the forward and the backward pass."""
    torch.manual_seed(1)  # of drop path
    with torch.autocast("cpu", torch.bfloat16):
        maps = backbone(images)
    drawn = [torch.rand(3)]
    torch.stack(
        [(feature.float() * torch.linspace(-1, 1, feature.shape[-1])).sum() for feature in maps]
    ).sum().backward()
    return [feature.detach() for feature in maps] + [*drawn, torch.rand(3)]


def assert_same_training(one: nn.Module, other: nn.Module) -> None:
    """Gradients and statistics, to the bit."""
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        gradient = others[name].grad
        if parameter.grad is None:
            assert gradient is None
        else:
            assert gradient is not None and torch.equal(parameter.grad, gradient), name
    states = other.state_dict()
    assert list(one.state_dict()) == list(states)
    for name, value in one.state_dict().items():
        assert torch.equal(value, states[name]), name


@pytest.mark.parametrize("backbone", BLOCKS)
def test_every_repeated_block_is_found(backbone: str) -> None:
    network = Backbone(backbone).network
    names = {id(module): name for name, module in network.named_modules()}
    blocks = repeated_blocks(network)
    assert (len(blocks), names[id(blocks[0])]) == BLOCKS[backbone]


def test_a_network_without_blocks() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    assert recompute_blocks(network) == 0


@pytest.mark.parametrize("backbone", ["resnet18", SWIN, "convnext_atto", "mobilenetv3_small_100"])
def test_same_gradients_and_statistics(backbone: str) -> None:
    """BatchNorm's statistics learn once from each step, and drop path draws once."""
    plain, recomputed = pair(backbone)
    for seed in range(2):
        images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
        for one, other in zip(step(plain, images), step(recomputed, images), strict=True):
            assert torch.equal(one, other)
    assert_same_training(plain, recomputed)
    statistics = [value for name, value in recomputed.state_dict().items() if name.endswith("num_batches_tracked")]
    assert all(number == 2 for number in statistics) and (statistics or backbone in (SWIN, "convnext_atto"))


class Growing(nn.Module):
    """As DenseNet's layers do, takes the list of all maps so far."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(4 * place, 8, 1), nn.Conv2d(8, 4, 3, padding=1))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.convs(torch.cat(maps, dim=1))


def test_blocks_that_take_a_growing_list() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList(Growing(place) for place in (1, 2, 3))
    recomputed = copy.deepcopy(plain)
    assert recompute_blocks(recomputed) == 3
    for layers in (plain, recomputed):
        maps = [torch.ones(2, 4, 8, 8)]
        for layer in layers:
            maps.append(layer(maps))
        maps[-1].square().sum().backward()
    assert_same_training(plain, recomputed)


def runs_of_first_block(backbone: Backbone, act: Callable[[], None]) -> int:
    """How often `act` runs the first layer of the last block."""
    seen: list[int] = []
    layer = next(repeated_blocks(backbone.network)[-1].children())
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    act()
    handle.remove()
    return len(seen)


def test_only_training_recomputes() -> None:
    plain, recomputed = pair("resnet18")
    images = torch.rand(2, 3, 64, 64)
    assert runs_of_first_block(recomputed, lambda: step(recomputed, images) and None) == 2
    assert runs_of_first_block(plain, lambda: step(plain, images) and None) == 1
    recomputed.eval()
    assert runs_of_first_block(recomputed, lambda: step(recomputed, images) and None) == 1
    recomputed.train()
    with torch.no_grad():
        assert runs_of_first_block(recomputed, lambda: recomputed(images) and None) == 1


def small_detectors(freeze: bool = False) -> tuple[Detector, Detector]:
    torch.manual_seed(0)
    plain = build_detector("retinanet_r50_fpn", num_classes=3, backbone="resnet18").train()
    if freeze:
        plain.freeze_for_finetuning()
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed.backbone.network)
    return plain, recomputed


def test_frozen_stages_and_batchnorm() -> None:
    """As in stage 2."""
    plain, recomputed = small_detectors(freeze=True)
    batch = training_batch(2, (64, 96), 3, 3)
    for detector in (plain, recomputed):
        torch.stack(list(detector(batch).values())).sum().backward()
    assert_same_training(plain, recomputed)
    frozen = [parameter for parameter in recomputed.parameters() if not parameter.requires_grad]
    assert frozen and all(parameter.grad is None for parameter in frozen)


def test_in_a_distributed_process(tmp_path: Path) -> None:
    plain, recomputed = small_detectors()
    batch = training_batch(2, (64, 64), 3, 3)
    torch.stack(list(plain(batch).values())).sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        distributed = DistributedDataParallel(recomputed, broadcast_buffers=False)
        torch.stack(list(distributed(batch).values())).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same_training(plain, recomputed)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_it_keeps_less_than_half_of_the_activations(backbone: str) -> None:
    """Of what stays of the forward pass for the backward pass, in mixed precision."""
    kept = []
    for one in pair(backbone):
        with MemoryAccount() as account:
            with torch.autocast("cpu", torch.bfloat16):
                maps = one(torch.rand(2, 3, 128, 128))
            kept.append(account.now["activations"])
        del maps
    assert kept[1] < 0.5 * kept[0]


@runs.cpu_only
def test_a_run_with_it_is_the_run_without(
    demo: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it may be turned on and off on the way."""
    flags = (*runs.FINETUNE, *runs.train_part(demo), "--init", pretrained, *runs.EIGHT, "--log-every", 1)
    for folder, *more in (("plain",), ("recomputed", "--gradient-checkpointing")):
        runs.train("finetune", *flags, "--max-steps", 2, *more, "--output-dir", tmp_path / folder)
        assert bool(re.search("device .*, gradient checkpointing", capsys.readouterr().out)) == bool(more)
    assert runs.largest_difference(*(runs.weights(tmp_path / name) for name in ("plain", "recomputed"))) == 0
    assert runs.records(tmp_path / "plain") == runs.records(tmp_path / "recomputed")
    resume = ("--max-steps", 2, "--resume", "--output-dir", tmp_path / "plain")
    runs.train("finetune", *flags, *resume, "--gradient-checkpointing")


def test_not_with_compilation() -> None:
    flags = ["--model", "faster_rcnn_r50_fpn", "--output-dir", "run", "--compile", "--gradient-checkpointing"]
    with pytest.raises(InputError, match="--compile and --gradient-checkpointing exclude each other"):
        parse_flags(PretrainFlags, "", flags)
