"""Memory of a training step on a GPU, estimated without one: of the paper's settings, or of one detector.

  python scripts/benchmark.py memory
  python scripts/benchmark.py memory --model NAME --stage pretrain|finetune [--micro-batch-size N] [--card-gb N] ...

A real step runs on the CPU, which is slow; memory_account.py says what is counted. Without --model: all five detectors
in both stages with the recipe's micro-batch, frozen layers, optimizer and mixed precision, 80 classes, 100 objects on
each image, with and without gradient checkpointing. The peers are torchvision's detectors on the same images and
objects, counted in the same way. With --model: the peak and its parts, the memory that the card needs, and the largest
micro-batch that fits.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.memory_account import KINDS, MemoryPeak, card_bytes, largest_micro_batch, peak_of_losses, peak_of_step
from benchmarks.rows import Row, row
from direct_pt.batch import Batch
from direct_pt.distributed.launch import PRECISIONS
from direct_pt.errors import InputError
from direct_pt.flags import not_negative_integer, positive_float, positive_integer
from direct_pt.models.detector import MODELS, Detector, DetectorConfig, build_detector
from direct_pt.models.layers import recompute_blocks
from direct_pt.recipes import IMAGE_SIZE, LONG_SIDE, SHORT_SIDE, STAGES, make_optimizer, paper_optimizer
from direct_pt.training.micro_batch import training_batch

GIB = 2**30
CLASSES, OBJECTS = 80, 100
MIN_SIDE = 64  # pixels: of smaller images, BatchNorm sees single values
TARGET = "under 9 GiB"
PEERS: dict[str, type[nn.Module]] = {
    "retinanet_r50_fpn": RetinaNet,
    "faster_rcnn_r50_fpn": FasterRCNN,
    "mask_rcnn_r50_fpn": MaskRCNN,
}
SIZE_FLAGS = {"pretrain": ("image_size",), "finetune": ("short_side", "long_side")}


@dataclass(frozen=True)
class Case:
    """What is trained: a detector, in a stage, on images of `size` (height, width), with `objects` on each."""

    config: DetectorConfig
    stage: str
    size: tuple[int, int]
    objects: int
    precision: str
    recompute: bool

    @property
    def name(self) -> str:
        """For people, without the number of images."""
        return f"{self.config.name} {self.stage}, {'checkpointing' if self.recompute else 'plain'}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of pretrain.py and finetune.py that memory depends on, and the card."""
    numbers: dict[str, Any] = {"type": positive_integer, "metavar": "N"}
    pixels = {**numbers, "metavar": "PIXELS"}
    parser.add_argument("--model", metavar="NAME", help=f"this detector alone: {', '.join(MODELS)}")
    parser.add_argument("--stage", choices=list(STAGES), help="of that detector (pretrain)")
    parser.add_argument("--image-size", **pixels, help=f"of pretrain's crops ({IMAGE_SIZE})")
    parser.add_argument("--short-side", **pixels, help=f"finetune's images fit in ({SHORT_SIDE})")
    parser.add_argument("--long-side", **pixels, help=f"finetune's images fit in ({LONG_SIDE})")
    parser.add_argument("--micro-batch-size", **numbers, help="images at once on the card (the recipe's)")
    parser.add_argument("--backbone", metavar="NAME", help="as in training, and so the next ones")
    parser.add_argument("--channels", **numbers)
    parser.add_argument("--rois-per-image", **numbers)
    parser.add_argument("--proposals", **numbers)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--mixed-precision", choices=[p for p in PRECISIONS if p != "auto"], help="(fp16)")
    parser.add_argument("--objects", type=not_negative_integer, metavar="N", help=f"on each image ({OBJECTS})")
    parser.add_argument("--classes", **numbers, help=f"of objects ({CLASSES})")
    parser.add_argument("--card-gb", type=positive_float, metavar="GIB", help="memory of the card (11)")


def measure(args: argparse.Namespace) -> list[Row]:
    """The table, or the rows of one detector. Raises InputError if flags contradict each other."""
    if args.model is not None:
        return _measure_detector(args)
    given = [name for name, value in vars(args).items() if value and name not in ("part", "output")]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} is for one detector: name it with --model")
    rows = []
    for stage in STAGES:
        for name in MODELS:
            images = STAGES[stage].paper.micro_batch_size
            size = _size(stage, IMAGE_SIZE, SHORT_SIDE, LONG_SIDE)
            peer = _peer_peak(name, stage, size, images) if name in PEERS else None
            for recompute in (False, True):
                case = Case(paper_config(name, CLASSES), stage, size, OBJECTS, "fp16", recompute)
                gib = _peak(case, images).total / GIB
                setting = f"{case.name}, {images} x {size[0]}x{size[1]}"
                rows.append(row("memory", setting, gib, "GiB", "torchvision" if peer else None, peer, TARGET))
                print(setting, f"{gib:.2f} GiB", flush=True)  # the whole table takes long
    return rows


def _measure_detector(args: argparse.Namespace) -> list[Row]:
    """One detector: the peak and its parts, the card, the largest micro-batch."""
    stage = args.stage or "pretrain"
    for other in SIZE_FLAGS["finetune" if stage == "pretrain" else "pretrain"]:
        if getattr(args, other) is not None:
            own = " and ".join(f"--{name.replace('_', '-')}" for name in SIZE_FLAGS[stage])
            raise InputError(f"--{other.replace('_', '-')}: images of {stage} have {own}")
    if args.image_size and args.image_size % 32:
        raise InputError(f"--image-size {args.image_size} is no multiple of 32")
    size = _size(stage, args.image_size or IMAGE_SIZE, args.short_side or SHORT_SIDE, args.long_side or LONG_SIDE)
    if min(size) < MIN_SIDE:
        raise InputError(f"{size[0]}x{size[1]}: images of under {MIN_SIDE} pixels a side are not measured")
    if size[0] > size[1]:
        raise InputError(f"the short side, {size[0]}, is above the long side, {size[1]}: swap them")
    flags = ("backbone", "channels", "rois_per_image", "proposals")
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    config = replace(paper_config(args.model, args.classes or CLASSES), **given)
    objects = OBJECTS if args.objects is None else args.objects
    case = Case(config, stage, size, objects, args.mixed_precision or "fp16", args.gradient_checkpointing)
    images = args.micro_batch_size or STAGES[stage].paper.micro_batch_size
    peaks = {number: _peak(case, number) for number in sorted({1, 2, images})}
    peak, card = peaks[images], args.card_gb or 11.0
    setting = f"{images} x {size[0]}x{size[1]}"
    needed = card_bytes(peak.total) / GIB
    fits = "fits" if needed <= card else "does not fit"
    return [
        row("memory", f"{case.name}, {setting}", peak.total / GIB, "GiB"),
        *(row("memory", f"  {kind}", getattr(peak, kind) / GIB, "GiB") for kind in KINDS),
        row("memory", f"  on the card: {fits}", needed, "GiB", target=f"under {card:g} GiB"),
        row("memory", f"  largest micro-batch on {card:g} GiB", largest_micro_batch(int(card * GIB), peaks), "images"),
    ]


def _size(stage: str, image_size: int, short_side: int, long_side: int) -> tuple[int, int]:
    """The padded (height, width) of a stage's images."""
    height, width = (image_size, image_size) if stage == "pretrain" else (short_side, long_side)
    return -(-height // 32) * 32, -(-width // 32) * 32


def paper_config(name: str, classes: int) -> DetectorConfig:
    """The paper's configuration, with this number of classes."""
    return DetectorConfig.from_paper(name, tuple(map(str, range(classes))), tuple(range(1, classes + 1)))


def make_training(case: Case) -> tuple[Detector, torch.optim.Optimizer]:
    """The detector as its stage trains it, and the recipe's optimizer."""
    torch.manual_seed(0)
    detector = build_detector(case.config.name, config=case.config).train()
    if case.stage == "finetune":
        detector.freeze_for_finetuning()
    if case.recompute:
        recompute_blocks(detector.backbone.network)
    detector.to(memory_format=torch.channels_last)
    recipe = STAGES[case.stage].recipe(case.config.name, paper_optimizer(detector.backbone.has_layernorm))
    return detector, make_optimizer(detector, recipe, recipe.lr)


def make_peer_training(name: str, stage: str, size: tuple[int, int]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """torchvision's detector, its backbone frozen as far as ours, and the same optimizer."""
    torch.manual_seed(0)
    frozen = stage == "finetune"
    pyramid = (
        {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if PEERS[name] is RetinaNet else {}
    )
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=torchvision.ops.FrozenBatchNorm2d if frozen else nn.BatchNorm2d,
        trainable_layers=3 if frozen else 5,
        **pyramid,
    )
    classes = CLASSES + 1  # with a background
    model = PEERS[name](backbone, num_classes=classes, min_size=size[0], max_size=size[1], fixed_size=size[::-1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    recipe = STAGES[stage].paper
    optimizer = torch.optim.SGD(trained, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, fused=True)
    return model.train(), optimizer


def peer_inputs(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch as torchvision's detectors take it: images, and a dictionary of objects for each."""
    targets = []
    for number in range(len(batch)):
        targets.append({"boxes": batch.boxes[number], "labels": batch.labels[number] + 1})
        if batch.masks is not None and batch.mask_rows is not None:
            targets[-1]["masks"] = torch.stack([batch.masks.dense(row) for row in batch.mask_rows[number].tolist()])
    return list(batch.images / 255), targets


def _peak(case: Case, images: int) -> MemoryPeak:
    """The peak of one micro-batch, as the stage trains it."""
    detector, optimizer = make_training(case)
    batch = training_batch(images, case.size, case.objects, len(case.config.class_names), detector.has_masks)
    waiting = max(0, STAGES[case.stage].paper.global_batch_size // images - 1)
    return peak_of_step(detector, batch, case.precision, optimizer, waiting)


def _peer_peak(name: str, stage: str, size: tuple[int, int], images: int) -> float:
    """The peak of torchvision's detector in GiB."""
    model, optimizer = make_peer_training(name, stage, size)
    pictures, targets = peer_inputs(training_batch(images, size, OBJECTS, CLASSES, PEERS[name] is MaskRCNN))
    inputs = [*pictures, *(value for target in targets for value in target.values())]
    waiting = STAGES[stage].paper.global_batch_size // images - 1
    return peak_of_losses(lambda: model(pictures, targets), model, inputs, "fp16", optimizer, waiting).total / GIB
