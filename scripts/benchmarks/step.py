"""A training step (forward, backward, update) on the CPU, beside torchvision's Faster R-CNN at equal settings.

Random images with 7 boxes each, 80 classes, SGD with momentum, channels_last on both sides; BatchNorm trains; equal
anchors, proposals (2,000 a level, 1,000 after NMS), RoIs, heads. RoIAlign is each side's own: adaptive here, 2x2
samples a bin in torchvision. Both step on the same images, in turn, in one process, which keeps freed memory as
training does; figures are medians after one step that does not count.

"MMDetection 3.3" is its Faster R-CNN R50 with the same head, forward and backward of 2 images of 448x448 in fp32, timed
once on 2 idle cores of another machine of this kind: compare it with a run on 2 idle cores.

The share of everything but convolutions and linear layers is of the operators' own CPU time in one step, by the
profiler. Their layout conversions and casts count as the rest.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead

from benchmarks.rows import Row, row, seconds
from direct_pt.batch import Batch
from direct_pt.distributed.launch import make_accelerator
from direct_pt.flags import positive_integer
from direct_pt.models.detector import PIXEL_MEAN, PIXEL_STD, DetectorConfig, build_detector

CLASSES = 80
MMDETECTION_SECONDS = 9.1
HEAVY = ("convolution", "linear", "addmm", "aten::mm", "aten::bmm")  # in an operator's name

Step = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How often."""
    parser.add_argument("--repeats", type=positive_integer, default=3, metavar="N", help="steps that count (3)")


def measure(args: argparse.Namespace) -> list[Row]:
    """ResNet-18 at 160x160, ResNet-50 at 448x448, and what a step is spent on."""
    make_accelerator("no")  # threads and memory as in training
    rows = []
    for setting, backbone, head, count, side, rois, precision, target in (
        ("ResNet-18, 16 x 160x160, 128 RoIs, bf16", "resnet18", "2fc", 16, 160, 128, "bf16", "ratio 2"),
        ("ResNet-50, 2 x 448x448, 512 RoIs, fp32", "resnet50", "4conv1fc", 2, 448, 512, "no", None),
        ("ResNet-50, 2 x 448x448, 512 RoIs, bf16", "resnet50", "4conv1fc", 2, 448, 512, "bf16", None),
    ):
        images = made_up(count, side)
        ours = step(detector(backbone, head, rois), images, precision)
        theirs = torchvision_step(torchvision_detector(backbone, head, rois, side), images, precision)
        mine, peer = seconds(ours, theirs, repeats=args.repeats)
        rows.append(row("step", setting, count / mine, "images/s", "torchvision", count / peer, target))
        if backbone == "resnet50":
            target = "as fast" if precision == "no" else "twice as fast"
            rows.append(row("step", setting, mine, "s", "MMDetection 3.3, fp32", MMDETECTION_SECONDS, target))
    share = rest_of_step(step(detector("resnet50", "4conv1fc", 512), made_up(8, 448), "bf16"))
    setting = "ResNet-50, 8 x 448x448, bf16, not convolution, not linear"
    rows.append(row("step", setting, 100 * share, "% of the step", target="under 15 %"))
    return rows


def detector(backbone: str, head: str, rois: int) -> nn.Module:
    """Ours."""
    torch.manual_seed(0)
    names = tuple(f"class {index}" for index in range(CLASSES))
    config = DetectorConfig.from_paper("faster_rcnn_r50_fpn", names, tuple(range(1, CLASSES + 1)))
    config = replace(config, backbone=backbone, box_head=head, rois_per_image=rois)
    return build_detector(config.name, config=config).to(memory_format=torch.channels_last).train()


def torchvision_detector(backbone: str, head: str, rois: int, side: int) -> nn.Module:
    """torchvision's, of the same parts."""
    torch.manual_seed(0)
    box_head: nn.Module = TwoMLPHead(256 * 7 * 7, 1024)
    if head == "4conv1fc":
        box_head = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024])
    model = FasterRCNN(
        resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5),
        num_classes=CLASSES + 1,
        min_size=side,
        max_size=side,
        image_mean=[value / 255 for value in PIXEL_MEAN],
        image_std=[value / 255 for value in PIXEL_STD],
        rpn_anchor_generator=AnchorGenerator(tuple((8 * 2**k,) for k in range(2, 7)), ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=2000,
        rpn_post_nms_top_n_train=1000,
        box_batch_size_per_image=rois,
        box_head=box_head,
    )
    return model.to(memory_format=torch.channels_last).train()


def made_up(count: int, side: int, objects: int = 7) -> Batch:
    """Noise, and boxes of all sizes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=draw).permute(0, 3, 1, 2)
    sides = torch.exp(torch.rand(count, objects, 2, generator=draw) * 2.5) * side / 16
    centres = sides / 2 + torch.rand(count, objects, 2, generator=draw) * (side - sides)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
    size = torch.full((count, 2), side)
    return Batch(
        images,
        sizes=size,
        padded_sizes=size,
        original_sizes=size,
        scales=torch.ones(count, 2),
        indices=torch.arange(count),
        seeds=torch.arange(count),
        boxes=boxes,
        labels=torch.randint(CLASSES, (count, objects), generator=draw),
        valid=torch.ones(count, objects, dtype=torch.bool),
        crowd=torch.zeros(count, objects, dtype=torch.bool),
    )


def step(model: nn.Module, batch: Batch, precision: str) -> Step:
    """One of ours."""
    return partial(_step, model, _optimizer(model), lambda: model(batch), precision)


def torchvision_step(model: nn.Module, batch: Batch, precision: str) -> Step:
    """One of torchvision's, which takes lists."""
    images = [image.contiguous() / 255 for image in batch.images]
    targets = [{"boxes": b, "labels": n + 1} for b, n in zip(batch.boxes, batch.labels, strict=True)]
    return partial(_step, model, _optimizer(model), lambda: model(images, targets), precision)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: Callable[[], dict[str, Tensor]], precision: str
) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = torch.stack(list(losses().values())).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def rest_of_step(one: Step) -> float:
    """The share of a step's CPU time that is neither convolution nor linear layer."""
    one()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        one()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return 1 - sum(time for name, time in times.items() if any(op in name for op in HEAVY)) / sum(times.values())
