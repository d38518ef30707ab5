"""A training step (forward, backward, update) on the CPU, beside torchvision's Faster R-CNN at equal settings.

Random images with 7 boxes each, 80 classes, SGD with momentum, channels_last on both sides; BatchNorm trains; equal
anchors, proposals (2,000 a level, 1,000 after NMS), RoIs, heads. Each side uses its own RoIAlign: adaptive here, 2x2
samples a bin in torchvision. Both train on the same images, in turn, in one process, which keeps freed memory as in
training; figures are medians after one warm-up step.

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
from benchmarks.synthetic import CLASSES, noise_batch
from direct_pt.batch import Batch
from direct_pt.distributed.launch import make_accelerator
from direct_pt.flags import positive_integer
from direct_pt.models.detector import PIXEL_MEAN, PIXEL_STD, DetectorConfig, build_detector

MMDETECTION_SECONDS = 9.1
HEAVY = ("convolution", "linear", "addmm", "aten::mm", "aten::bmm")  # in an operator's name

Step = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The number of steps."""
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
        images = noise_batch(count, side)
        ours = step(detector(backbone, head, rois), images, precision)
        theirs = torchvision_step(torchvision_detector(backbone, head, rois, side), images, precision)
        our_time, peer_time = seconds(ours, theirs, repeats=args.repeats)
        rows.append(row("step", setting, count / our_time, "images/s", "torchvision", count / peer_time, target))
        if backbone == "resnet50":
            target = "as fast" if precision == "no" else "twice as fast"
            rows.append(row("step", setting, our_time, "s", "MMDetection 3.3, fp32", MMDETECTION_SECONDS, target))
    share = rest_of_step(step(detector("resnet50", "4conv1fc", 512), noise_batch(8, 448), "bf16"))
    setting = "ResNet-50, 8 x 448x448, bf16, not convolution, not linear"
    rows.append(row("step", setting, 100 * share, "% of the step", target="under 15 %"))
    return rows


def detector(backbone: str, head: str, rois: int) -> nn.Module:
    """Our Faster R-CNN."""
    torch.manual_seed(0)
    names = tuple(f"class {index}" for index in range(CLASSES))
    config = DetectorConfig.from_paper("faster_rcnn_r50_fpn", names, tuple(range(1, CLASSES + 1)))
    config = replace(config, backbone=backbone, box_head=head, rois_per_image=rois)
    return build_detector(config.name, config=config).to(memory_format=torch.channels_last).train()


def torchvision_detector(backbone: str, head: str, rois: int, side: int) -> nn.Module:
    """torchvision's Faster R-CNN with the same parts."""
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


def step(model: nn.Module, batch: Batch, precision: str) -> Step:
    """A step of our detector."""
    return partial(_step, model, _optimizer(model), lambda: model(batch), precision)


def torchvision_step(model: nn.Module, batch: Batch, precision: str) -> Step:
    """A step of torchvision's detector, which takes lists."""
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


def rest_of_step(run: Step) -> float:
    """The share of a step's CPU time that is neither convolution nor linear layer."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return 1 - sum(time for name, time in times.items() if any(op in name for op in HEAVY)) / sum(times.values())
