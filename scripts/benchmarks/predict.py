"""Prediction: the detector alone beside torchvision's of the same backbone and heads, exported, and from file to file.

Random weights, noise of one square size, 80 classes, 1,000 proposals at most; no detection reaches the threshold, so
that nothing is drawn. Each side takes its turn in one process, and figures are medians after one warm-up. "Exported" is
the ONNX file of `export.py`, computed by onnxruntime with as many threads. From files to files: JPEGs are read and
resized, pictures and results written, as `predict.py` does.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.rows import Row, row, seconds
from benchmarks.step import torchvision_detector
from benchmarks.synthetic import CLASSES, noise_batch
from direct_pt.batch import Batch, collate
from direct_pt.distributed.launch import make_accelerator
from direct_pt.flags import pixels, positive_integer
from direct_pt.images.decoding import DEFAULT_DECODING
from direct_pt.models.detector import Detector, DetectorConfig, build_detector
from direct_pt.onnx_detector import OnnxDetector
from direct_pt.prediction.looking import ImageFiles, look_at
from direct_pt.prediction.outputs import OutputOptions
from direct_pt.prediction.seen import Classes, Seen
from direct_pt.transforms import TestPreset

MODELS = ("retinanet_r50_fpn", "faster_rcnn_r50_fpn")
ALL_SCORES_ARE_BELOW = 1 - 1e-6
FILES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The detectors' size, and the number of turns."""
    parser.add_argument("--backbone", default="resnet50", metavar="NAME", help="a ResNet (resnet50)")
    parser.add_argument(
        "--side", type=pixels, default=448, metavar="PIXELS", help="of the images, a multiple of 32 (448)"
    )
    parser.add_argument("--repeats", type=positive_integer, default=3, metavar="N", help="turns that count (3)")
    parser.add_argument("--no-export", action="store_true", help="without the exported detectors")


def measure(args: argparse.Namespace) -> list[Row]:
    """Each detector in each way."""
    rows = []
    for name in MODELS:
        detector, batch = own_detector(name, args.backbone, args.side), noise_batch(4, args.side)
        short, one = name.removesuffix("_r50_fpn"), noise_batch(1, args.side)
        peer = peer_detector(name, args.backbone, args.side)
        for count, images in ((1, one), (4, batch)):
            ours, theirs = seconds(partial(detect, detector, images, "no"), partial(detect_peer, peer, images),
                                   repeats=args.repeats)  # fmt: skip
            setting = f"{short}, {args.side}x{args.side}, {count} at once, fp32"
            rows.append(row("predict", setting, count / ours, "images/s", "torchvision", count / theirs))
        full, half = seconds(*(partial(detect, detector, batch, kind) for kind in ("no", "bf16")), repeats=args.repeats)
        rows.append(row("predict", f"{short}, 4 at once, bf16", 4 / half, "images/s", "fp32", 4 / full))
        with TemporaryDirectory() as folder:
            if not args.no_export:
                exported = export(detector, Path(folder) / "model.onnx")
                ours, theirs = seconds(exported_run(exported, one), partial(detect, detector, one, "no"),
                                       repeats=args.repeats)  # fmt: skip
                target = "ratio 1.3"
                setting = f"{short}, exported, 1 at once, fp32"
                rows.append(row("predict", setting, 1 / ours, "images/s", "PyTorch", 1 / theirs, target))
            files = image_files(Path(folder), args.side)
            whole, alone = seconds(from_files(detector, files), partial(in_memory, detector, files),
                                   repeats=args.repeats)  # fmt: skip
            setting = f"{short}, from files to files, 1 at once"
            rows.append(row("predict", setting, FILES / whole, "images/s", "the detector alone", FILES / alone))
    return rows


def own_detector(name: str, backbone: str, side: int) -> Detector:
    """Ours, with random weights, in eval mode, channels last."""
    torch.manual_seed(0)
    names = tuple(f"class {index}" for index in range(CLASSES))
    config = DetectorConfig.from_paper(name, names, tuple(range(1, CLASSES + 1)))
    config = replace(config, backbone=backbone, short_side=side, long_side=side)
    return build_detector(name, config=config).eval().to(memory_format=torch.channels_last)


def peer_detector(name: str, backbone: str, side: int) -> nn.Module:
    """torchvision's, with the same parts."""
    if name.startswith("faster"):
        return torchvision_detector(backbone, "4conv1fc", 512, side).eval()
    torch.manual_seed(0)
    extra = LastLevelP6P7(2048 if backbone == "resnet50" else 512, 256)
    body = resnet_fpn_backbone(
        backbone_name=backbone, weights=None, norm_layer=nn.BatchNorm2d, returned_layers=[2, 3, 4], extra_blocks=extra
    )
    peer = RetinaNet(body, CLASSES, min_size=side, max_size=side)
    return peer.eval().to(memory_format=torch.channels_last)


def detect(detector: Detector, batch: Batch, precision: str) -> None:
    """The detections of a batch."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        detector.detect(batch)


def detect_peer(peer: nn.Module, batch: Batch) -> None:
    """The same of torchvision's detector, which takes lists."""
    with torch.inference_mode():
        peer([image.float() / 255 for image in batch.images])


def export(detector: Detector, path: Path) -> OnnxDetector:
    """The exported detector, with as many threads as PyTorch has."""
    from direct_pt.models.exported import write_onnx

    write_onnx(detector, path)
    return OnnxDetector(path, threads=torch.get_num_threads())


def exported_run(detector: OnnxDetector, batch: Batch) -> Callable[[], object]:
    """Its detections of a batch."""
    images, sizes = np.ascontiguousarray(batch.images.permute(0, 2, 3, 1).numpy()), batch.sizes.numpy()
    return lambda: detector.run(images, sizes)


def image_files(folder: Path, side: int) -> ImageFiles:
    """Some JPEGs of noise."""
    rng, paths = np.random.default_rng(0), [folder / f"{number}.jpg" for number in range(FILES)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return ImageFiles(paths, TestPreset(side, side), DEFAULT_DECODING)


def in_memory(detector: Detector, images: ImageFiles) -> None:
    """The detections in them, one by one; reading them takes little of the time."""
    for index in range(len(images.paths)):
        detect(detector, collate([images[index]]), "no")


def from_files(detector: Detector, images: ImageFiles) -> Callable[[], None]:
    """What `predict.py` does with them."""
    config, paths = detector.config, images.paths
    thresholds, classes = np.full(CLASSES, ALL_SCORES_ARE_BELOW), Classes(config.class_names, config.category_ids)

    def run() -> None:
        folder = paths[0].parent
        accelerator, outputs = make_accelerator("no"), OutputOptions().outputs(folder, classes, folder)
        with torch.inference_mode(), ExitStack() as stack:
            writers = [stack.enter_context(one) for one in outputs]
            looked_at = look_at(detector, images, thresholds, accelerator, 1, 2)
            for index, size, found in stack.enter_context(closing(looked_at)):
                assert found is not None
                path = paths[index]
                for write in writers:
                    write(Seen(index + 1, path, Path("drawn") / path.stem, size, found, DEFAULT_DECODING))

    return run
