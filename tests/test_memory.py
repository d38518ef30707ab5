"""Memory of a training step: the account of tensors in known cases, a step's peak, and the micro-batch that fits."""

import argparse
import gc
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import small_runs as runs
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.memory_account import (
    CONTEXT,
    KINDS,
    MemoryAccount,
    MemoryPeak,
    card_bytes,
    cuda_autocast,
    largest_micro_batch,
    nms_bytes,
    peak_of_step,
)
from direct_pt.errors import InputError
from direct_pt.flags import make_parser
from direct_pt.models.boxes import grouped_nms
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.models.layers import force_gpu_path
from direct_pt.models.roi_align import pyramid_roi_align
from direct_pt.recipes import PRETRAIN, make_optimizer, paper_optimizer
from direct_pt.training.micro_batch import training_batch

KIB = 1024  # of float32: 256 numbers
MIB = 2**20


def rounded(tensors: list[Tensor]) -> int:
    """The bytes that CUDA's allocator gives to tensors, each storage once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(-(-size // 512) * 512 for size in sizes.values())


# The account


def test_a_storage_counts_while_anything_holds_it() -> None:
    with MemoryAccount() as account:
        first = torch.zeros(1000)  # 4000 bytes
        assert account.now["activations"] == 4096
        view = first[10:].view(2, -1)
        first.add_(1).relu_()
        assert account.now["activations"] == 4096
        del first
        assert account.now["activations"] == 4096
        alias = view.detach()
        del view
        assert account.now["activations"] == 4096
        del alias
        assert account.now["activations"] == 0
        with torch.no_grad():
            small = torch.zeros(1)
        assert account.now == {**dict.fromkeys(KINDS, 0), "rest": 512}
        del small
    assert sum(account.now.values()) == 0 and sum(account.most.values()) == 4096


def test_a_storage_counts_as_it_grows() -> None:
    with MemoryAccount() as account, torch.no_grad():
        tensor = torch.zeros(256)
        tensor.resize_(1024)
        assert account.now["rest"] == 4 * KIB


def test_what_autograd_alone_holds() -> None:
    weight = torch.ones(256, requires_grad=True)
    with MemoryAccount() as account:
        hidden = weight.exp()  # saved: its own derivative
        loss = hidden.sum()
        del hidden
        gc.collect()
        assert account.now["activations"] == KIB + 512
        loss.backward()
        assert account.now["activations"] == 512  # the loss
        assert account.now["rest"] == KIB  # the gradient


class Cube(torch.autograd.Function):
    """Saves its input and another tensor."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x * x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        _, square = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3 * square * gradients[0]


def test_what_a_custom_function_saves() -> None:
    weight = torch.ones(256, requires_grad=True)
    with MemoryAccount() as account:
        loss = Cube.apply(weight * 2).sum()
        # The doubled weight and its square; made inside the function, where gradients are off, the square counts as
        # `kind` says.
        assert account.now["activations"] + account.now["rest"] == 2 * KIB + 512
        loss.backward()
        assert account.now["activations"] + account.now["rest"] == 512 + KIB


def test_checkpointed_activations_come_and_go() -> None:
    weight = torch.ones(256, requires_grad=True)

    def deep(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x.exp().clamp(max=1)
        return x

    kept, most = [], []
    compute: list[Callable[[Tensor], Tensor]] = [deep, lambda x: checkpoint(deep, x, use_reentrant=False)]
    for run in compute:
        with MemoryAccount() as account:
            loss = run(run(weight * 1)).sum()
            kept.append(account.now["activations"])
            loss.backward()
            most.append(account.most["activations"])
        assert account.now["activations"] == 512
    assert kept[0] == 20 * KIB + 512 and kept[1] < 4 * KIB
    assert 10 * KIB < most[1] < 16 * KIB < most[0]  # recomputed: one of the two at a time


def test_cuda_autocast_keeps_norms_in_float32() -> None:
    images = torch.rand(2, 32, 8, 8, dtype=torch.bfloat16)

    def kinds() -> set[torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16):
            return {
                F.layer_norm(images, (8,), torch.ones(8), torch.zeros(8)).dtype,
                F.group_norm(images, 4, torch.ones(32), torch.zeros(32)).dtype,
                images.softmax(-1).dtype,
                F.interpolate(images, scale_factor=2, mode="nearest").dtype,
            }

    with cuda_autocast():
        assert kinds() == {torch.float32}
    assert kinds() == {torch.bfloat16}


@runs.cpu_only
def test_the_account_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly to the byte: kernels allocate very little themselves here."""
    monkeypatch.setattr("benchmarks.memory_account.BLOCK", 1)
    detector = small_detector("mask_rcnn_r50_fpn").to(memory_format=torch.channels_last)  # the kernels' own layout
    batch = training_batch(4, (128, 160), 8, 3, with_masks=True)
    for parameter in detector.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(detector(batch).values())).sum()
        loss.backward()

    step()
    account = MemoryAccount()
    account.hold([*detector.parameters(), *detector.buffers(), *(p.grad for p in detector.parameters())], "weights")
    account.hold([*vars(batch).values(), *vars(batch.masks).values()], "rest")
    before = sum(account.now.values())
    with account:
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = max(itertools.accumulate(size for _, size in changes))
    assert sum(account.most.values()) - before == pytest.approx(most, rel=0.005)


# Computing as a GPU does, on a CPU


def test_both_ways_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 90
    boxes = torch.cat([corners, corners + 5 + torch.rand(200, 2, generator=generator) * 30], dim=1)
    features = [torch.rand(2, 4, side, side, generator=generator) for side in (32, 16, 8, 4)]
    images = torch.arange(200) % 2
    scores = torch.rand(200, generator=generator)

    def both() -> tuple[Tensor, Tensor]:
        pooled = pyramid_roi_align(features, [4, 8, 16, 32], images, boxes, 7)
        return pooled, grouped_nms(boxes, scores, images, 0.5)

    with MemoryAccount() as account:
        pooled, kept = both()
        assert account.nms_boxes == 0  # each image's in a thread of its own
        with force_gpu_path():
            pooled_there, kept_there = both()
        assert account.nms_boxes == 200
    torch.testing.assert_close(pooled_there, pooled, atol=1e-5, rtol=1e-4)
    assert torch.equal(kept_there, kept)


# A step


def small_detector(name: str = "faster_rcnn_r50_fpn", backbone: str = "resnet18") -> Detector:
    torch.manual_seed(0)
    config = DetectorConfig.from_paper(name, ("a", "b", "c"), (1, 2, 3))
    config = replace(config, backbone=backbone, channels=32, proposals=100, rois_per_image=64)
    return build_detector(name, config=config).train()


def peak(detector: Detector, images: int, precision: str = "fp16", objects: int = 8, waiting: int = 0) -> MemoryPeak:
    recipe = PRETRAIN.recipe(detector.config.name, paper_optimizer(detector.backbone.has_layernorm))
    batch = training_batch(images, (96, 128), objects, 3, detector.has_masks)
    return peak_of_step(detector, batch, precision, make_optimizer(detector, recipe, 1e-3), waiting)


@pytest.mark.parametrize("name", ["retinanet_r50_fpn", "mask_rcnn_r50_fpn"])
def test_parts_of_the_peak(name: str) -> None:
    detector = small_detector(name)
    detector.freeze_for_finetuning()
    found = peak(detector, 3)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    assert found.weights == rounded([*detector.parameters(), *detector.buffers()])
    assert found.gradients == found.optimizer == rounded(trained)  # SGD's momentum
    assert found.total == sum(getattr(found, kind) for kind in KINDS) == max(found.passes, found.update)
    assert card_bytes(found.total) > found.total + CONTEXT
    assert (found.nms_boxes > 0) == (name == "mask_rcnn_r50_fpn")
    assert found.passes > found.at_nms


def test_micro_batches_that_wait_count() -> None:
    alone, before = (peak(small_detector("retinanet_r50_fpn"), 3, waiting=waiting) for waiting in (0, 2))
    assert before.passes - alone.passes == pytest.approx(2 * 3 * 3 * 96 * 128, rel=0.05)


def test_adamw_keeps_two_moments() -> None:
    detector = small_detector(backbone="convnext_atto")
    trained = rounded([parameter for parameter in detector.parameters() if parameter.requires_grad])
    steps = 512 * sum(1 for _ in detector.parameters())
    assert peak(detector, 1).optimizer == 2 * trained + steps


def test_a_step_takes_what_the_one_before_it_took() -> None:
    """The optimizer's state and the gradients exist from the start."""
    detector = small_detector("mask_rcnn_r50_fpn")
    batch = training_batch(2, (96, 128), 8, 3, with_masks=True)
    optimizer = make_optimizer(detector, PRETRAIN.recipe(detector.config.name, "sgd"), 1e-4)
    first, second = (peak_of_step(detector, batch, "bf16", optimizer) for _ in range(2))
    assert second.passes == pytest.approx(first.passes, rel=0.01)
    assert replace(second, activations=0, rest=0, passes=0, at_nms=0, update=0) == replace(
        first, activations=0, rest=0, passes=0, at_nms=0, update=0
    )


def test_mixed_precision_takes_less_and_images_take_alike() -> None:
    detector = small_detector()
    passes = {images: peak(detector, images).passes for images in (1, 2, 3)}
    assert passes[3] - passes[2] == pytest.approx(passes[2] - passes[1], rel=0.02)
    in_full = {images: peak(detector, images, "no").passes for images in (2, 3)}
    assert in_full[3] - in_full[2] > 1.3 * (passes[3] - passes[2])


def test_images_without_objects() -> None:
    assert peak(small_detector("mask_rcnn_r50_fpn"), 2, objects=0).total > 0


def test_the_batch_is_as_large_as_asked_for() -> None:
    batch = training_batch(3, (96, 128), 20, 5, with_masks=True)
    assert batch.images.shape == (3, 3, 96, 128) and batch.valid.all() and batch.boxes.shape == (3, 20, 4)
    boxes = batch.boxes.flatten(0, 1)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([128.0, 96.0])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 16).all()
    assert batch.masks is not None and len(batch.masks) == 60
    x1, y1, x2, y2 = batch.masks.windows[7].tolist()
    assert [x1, y1, x2, y2] == boxes[7].tolist() and batch.masks.dense(7).sum() == (x2 - x1) * (y2 - y1)
    assert training_batch(1, (96, 128), 0, 5).valid.sum() == 0


# What fits


def fixed_peak(passes: int, update: int = 0, at_nms: int = 0, nms_boxes: int = 0) -> MemoryPeak:
    return MemoryPeak(0, 0, 0, passes, 0, passes, update, at_nms, nms_boxes)


def test_the_largest_micro_batch() -> None:
    line = {images: fixed_peak(100 * MIB + 50 * MIB * images) for images in (1, 2)}
    for images in (1, 2, 7, 30):
        room = card_bytes((100 + 50 * images) * MIB)
        assert largest_micro_batch(room, line) == images
        assert largest_micro_batch(room - 1, line) == images - 1
    assert largest_micro_batch(CONTEXT, line) == 0
    # The update needs the same for any number of images, and more than a few images do.
    flat = {images: fixed_peak(50 * MIB * images, update=1000 * MIB) for images in (1, 2)}
    assert largest_micro_batch(card_bytes(1000 * MIB), flat) == 20
    assert largest_micro_batch(card_bytes(999 * MIB), flat) == 0
    # Beyond what was measured, the steepest growth counts.
    bent = {1: fixed_peak(10 * MIB), 2: fixed_peak(20 * MIB), 4: fixed_peak(80 * MIB)}
    assert largest_micro_batch(card_bytes(110 * MIB), bent) == 5


def test_the_largest_micro_batch_with_the_table_of_nms() -> None:
    peaks = {images: fixed_peak(MIB * images, at_nms=0, nms_boxes=6400 * images) for images in (1, 2)}
    assert nms_bytes(6400) == 6400 * 100 * 8
    for images in (3, 10):
        room = card_bytes(6400 * images * 100 * images * 8)
        assert largest_micro_batch(room, peaks) == images
        assert largest_micro_batch(room - 8, peaks) == images - 1


def test_the_estimate_foresees_larger_micro_batches() -> None:
    detector = small_detector()
    peaks = {images: peak(detector, images) for images in (1, 2)}
    there = peak(detector, 5)
    room = round(card_bytes(there.passes) * 1.002)  # not an image's worth
    assert largest_micro_batch(room, {n: replace(one, update=0) for n, one in peaks.items()}) == 5


# The command


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, object]]]:
    """The rows of `benchmark.py memory` for given flags."""
    monkeypatch.syspath_prepend(runs.SCRIPTS)
    from benchmarks import memory  # type: ignore[import-not-found]

    def ask(*flags: object) -> list[dict[str, object]]:
        p: argparse.ArgumentParser = make_parser("")
        memory.add_arguments(p)
        rows: list[dict[str, object]] = memory.measure(p.parse_args(list(map(str, flags))))
        return rows

    return ask


SMALL = ("--model", "mask_rcnn_r50_fpn", "--backbone", "resnet18", "--channels", 16, "--rois-per-image", 16)


@pytest.mark.parametrize(
    "stage", [("--image-size", 96), ("--stage", "finetune", "--short-side", 80, "--long-side", 100)]
)
def test_the_command_answers_for_one_detector(
    answer: Callable[..., list[dict[str, object]]], stage: tuple[object, ...]
) -> None:
    flags = (*SMALL, *stage, "--proposals", 50, "--objects", 5, "--micro-batch-size", 2, "--gradient-checkpointing")
    peak, *parts, card, largest = answer(*flags, "--card-gb", 2)
    assert ("96x96" if stage[0] == "--image-size" else "96x128") in str(peak["setting"])
    assert [str(part["setting"]).strip() for part in parts] == list(KINDS)
    assert sum(float(str(part["value"])) for part in parts) == pytest.approx(float(str(peak["value"])))
    assert "fits" in str(card["setting"]) and 1 < float(str(card["value"])) < 2
    assert int(str(largest["value"])) >= 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--card-gb", 11), "--card-gb is for one detector: name it with --model"),
        (("--model", "yolo"), "--model yolo: no such detector"),
        ((*SMALL, "--backbone", "resnet"), "--backbone resnet: timm has no model of this name"),
        ((*SMALL, "--image-size", 100), "--image-size 100 is no multiple of 32"),
        ((*SMALL, "--image-size", 32), "32x32: images of under 64 pixels a side are not measured"),
        ((*SMALL, "--short-side", 64), "--short-side: images of pretrain have --image-size"),
        ((*SMALL, "--stage", "finetune", "--image-size", 64), "images of finetune have --short-side and --long-side"),
        ((*SMALL, "--stage", "finetune", "--short-side", 96, "--long-side", 64), "above the long side"),
        ((*SMALL, "--card-gb", 0), "0 must be above 0"),
        ((*SMALL, "--objects", -1), "-1 must not be below 0"),
        ((*SMALL, "--micro-batch-size", "x"), "--micro-batch-size: 'x' is not a whole number"),
    ],
)
def test_flags_that_make_no_sense(
    answer: Callable[..., list[dict[str, object]]], flags: tuple[object, ...], message: str
) -> None:
    with pytest.raises(InputError) as error:
        answer(*flags)
    assert message in str(error.value)
