"""Backbones: which networks fit, how they start, and Swin by the definition of its attention."""

import numpy as np
import pytest
import small_runs as runs
import torch
from small_detectors import FASTER, SWIN, small_detector, total_loss
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.batch import Batch, Objects, collate
from direct_pt.errors import InputError
from direct_pt.models.backbone import Backbone, DetectionSwinBlock
from direct_pt.models.detector import MODELS, build_detector
from direct_pt.models.layers import batchnorms
from direct_pt.transforms import TestPreset


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet8", "no model of this name; try .*resnet"),
        ("swin_tinny_patch4_window7_224", "no model of this name; try .*swin_tiny_patch4_window7_224"),
        ("vit_tiny_patch16_224", "no feature maps at strides 4, 8, 16 and 32"),
        ("maxvit_tiny_tf_224", "no maps at strides 4, 8, 16 and 32 of images of any size"),
        ("hiera_tiny_224", "no maps at strides 4, 8, 16 and 32 of images of any size"),
    ],
)
def test_unfit_backbone(backbone: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--backbone {backbone}: .*{message}"):
        build_detector(runs.MODEL, 3, backbone)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("convnextv2_atto", [40, 80, 160, 320]),
        ("mobilenetv3_large_100", [24, 40, 112, 960]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
    ],
)
@torch.no_grad()
def test_backbones_that_fit(backbone: str, channels: list[int]) -> None:
    found = small_detector(SWIN if backbone == MODELS[SWIN] else FASTER, backbone=backbone).backbone.train()
    assert found.channels == channels
    maps = found(torch.randn(2, 3, 96, 160))
    assert [tuple(level.shape) for level in maps] == [
        (2, width, 96 // stride, 160 // stride) for width, stride in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert all(level.isfinite().all() and level.std() > 0 for level in maps)


def test_residual_branches_start_at_one() -> None:
    assert all((layer.weight == 1).all() for layer in batchnorms(small_detector()))


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_padding_does_not_blow_up_gradients(name: str) -> None:
    """Of networks with LayerNorm: maps without any contrast have it multiply gradients by 1,000."""
    torch.manual_seed(0)
    network = Backbone(name).train()
    images = torch.randn(2, 3, 96, 96)
    images[:, :, 48:] = 0  # as padding is
    sum((maps * torch.randn_like(maps)).mean() for maps in network(images)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    assert 0.01 < norm < 100


# Swin


def swin_blocks(backbone: Backbone) -> list[DetectionSwinBlock]:
    return [module for module in backbone.modules() if isinstance(module, DetectionSwinBlock)]


@pytest.fixture(scope="module")
def swin() -> Backbone:
    """In eval mode, with position biases that tell places apart."""
    backbone = small_detector(SWIN).backbone.eval()
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if name.endswith(("relative_position_bias_table", "qkv.bias")):
            nn.init.normal_(parameter)
    return backbone


def test_every_odd_block_shifts(swin: Backbone) -> None:
    blocks = swin_blocks(swin)
    assert len(blocks) == 12
    assert [block.shift_size for block in blocks] == [(0, 0), (3, 3)] * 6
    assert all(block.window_size == (7, 7) for block in blocks)


def windowed_attention(block: DetectionSwinBlock, features: Tensor) -> Tensor:
    """By the paper: pad to whole windows, roll, attend inside each window to what was near before, roll back."""
    attention, side, shift = block.attn, 7, block.shift_size[0]
    _, height, width, channels = features.shape
    padded = F.pad(features, (0, 0, 0, -width % side, 0, -height % side))
    rolled = padded.roll((-shift, -shift), dims=(1, 2))
    rows, columns = rolled.shape[1:3]
    output = torch.zeros_like(rolled)

    def region(place: int, length: int) -> int:
        return (place >= length - side) + (place >= length - shift) if shift else 0

    places = [(y, x) for y in range(side) for x in range(side)]
    heads, depth = attention.num_heads, channels // attention.num_heads
    bias = torch.stack(
        [
            torch.stack([attention.relative_position_bias_table[(y - v + 6) * 13 + x - u + 6] for v, u in places])
            for y, x in places
        ]
    )
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            window = rolled[:, top : top + side, left : left + side].reshape(-1, side * side, channels)
            regions = [(region(top + y, rows), region(left + x, columns)) for y, x in places]
            apart = torch.tensor([[-100.0 * (one != other) for other in regions] for one in regions])
            query, key, value = attention.qkv(window).split(channels, dim=-1)
            results = []
            for head in range(heads):
                part = slice(head * depth, (head + 1) * depth)
                scores = query[..., part] @ key[..., part].transpose(1, 2) / depth**0.5 + bias[..., head] + apart
                results.append(scores.softmax(dim=-1) @ value[..., part])
            mixed = attention.proj(torch.cat(results, dim=-1))
            output[:, top : top + side, left : left + side] = mixed.reshape(-1, side, side, channels)
    return output.roll((shift, shift), dims=(1, 2))[:, :height, :width]


@pytest.mark.parametrize("size", [(10, 13), (7, 14), (3, 9), (1, 1)])
@pytest.mark.parametrize("number", [0, 1, 11])
@torch.no_grad()
def test_swin_attention(swin: Backbone, number: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = swin_blocks(swin)[number]
    features = torch.randn(2, *size, block.dim)
    expected = windowed_attention(block, features)
    assert expected.std() > 0.01
    torch.testing.assert_close(block._attn(features), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_swin_at_any_size(swin: Backbone) -> None:
    """Maps are normalised, and do not depend on what size came before."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 96, 128)
    maps = swin(images)
    assert [tuple(level.shape) for level in maps] == [(1, 96 * 2**n, 24 >> n, 32 >> n) for n in range(4)]
    for level in maps:
        torch.testing.assert_close(level.mean(dim=1), torch.zeros_like(level[:, 0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(level.var(dim=1, correction=0), torch.ones_like(level[:, 0]), atol=1e-2, rtol=0)
    swin(torch.randn(2, 3, 64, 224))
    assert all(torch.equal(one, other) for one, other in zip(maps, swin(images), strict=True))


def test_swin_learns_from_images_of_any_size(batch: Batch) -> None:
    """75 x 110 pixels: a multiple neither of the windows nor of the strides."""
    image = torch.randint(0, 256, (75, 110, 3), dtype=torch.uint8).numpy()
    outline = np.array([[10.0, 8], [70, 12], [60, 66]])
    objects = Objects(np.array([[10.0, 8, 70, 66]]), np.array([3]), np.array([1500.0]), np.array([False]), [[outline]])
    sample = TestPreset(75, 110)(image, objects, np.random.default_rng(0))
    small = collate([sample])
    assert small.sizes.tolist() == [[75, 110]] and small.images.shape[-2:] == (96, 128)
    detector = small_detector(SWIN).train()
    assert total_loss(detector, small).isfinite()
    (result,) = detector.predict([image], score_threshold=0.05)
    assert result["masks"].shape[1:] == (75, 110) and np.isfinite(result["boxes"]).all()


def test_drop_path_where_there_is_layernorm() -> None:
    """Growing from nothing to 0.2 over Swin's blocks; none in a ResNet."""
    rates = [layer.drop_path1.drop_prob for layer in swin_blocks(small_detector(SWIN).backbone)[1:]]
    assert rates == pytest.approx(np.linspace(0, 0.2, 12)[1:].tolist())
    convnext = [layer.drop_prob for layer in Backbone("convnextv2_atto").modules() if isinstance(layer, DropPath)]
    assert max(convnext) == pytest.approx(0.2)
    assert not any(isinstance(layer, DropPath) for layer in small_detector().modules())
