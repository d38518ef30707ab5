"""Train another project's detector from random weights on the same images, for so many seconds of a processor.

  python scripts/small_sets/peers.py torchvision --train-images DIR ... --seconds 700 --output-dir RUN
  python scripts/small_sets/peers.py ultralytics --python ENV/bin/python --train-images DIR ... --output-dir RUN

An arm of scripts/experiments.py whose stage is called `peers` runs it, with --seconds {seconds} and equal_cost.

torchvision: its Faster R-CNN on ResNet-18 with a pyramid, batches of 8, and the settings of its own reference script
at the rate of such a batch. ultralytics: yolo11n from its YAML file, with its own defaults. It is under the AGPL:
install it into an environment of its own, whose interpreter --python names; it is only ever started, as a program.
"""

from direct_pt.program.run import run_program
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from direct_pt.coco_eval import Predictions, coco_metrics
from direct_pt.data.annotations import AnnotationTable, corners_of
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.errors import InputError
from direct_pt.files import write_json, write_text
from direct_pt.flags import any_path, make_parser, positive_integer, positive_number

BATCH = 8
LR = 0.02 * BATCH / 16  # torchvision's for 2 images on each of 8 GPUs
WARMUP_STEPS = 200
DECAYS = (16 / 26, 22 / 26)  # shares of the time
RESERVE = 15.0  # seconds of start, of which training knows nothing, and of the detections at the end
# What the interpreter of --python is given: the folder, the image size, the seed, the hours.
ULTRALYTICS = """
import json, sys
from pathlib import Path
from ultralytics import YOLO
folder, size, seed, hours = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
model = YOLO("yolo11n.yaml")
model.train(data=str(folder / "data.yaml"), time=hours, imgsz=size, seed=seed, device="cpu", workers=0,
            pretrained=False, plots=False, val=False, project=str(folder), name="run", exist_ok=True, amp=False)
model = YOLO(folder / "run/weights/last.pt")
found = []
for path in sorted((folder / "images/val").iterdir()):
    (one,) = model.predict(path, imgsz=size, conf=0.001, iou=0.7, max_det=300, device="cpu", verbose=False)
    found.append([int(path.stem), one.boxes.xyxy.tolist(), one.boxes.conf.tolist(), one.boxes.cls.tolist()])
images = int(Path(folder / "run/results.csv").read_text().strip().splitlines()[-1].split(",")[0])
(folder / "found.json").write_text(json.dumps({"epochs": images, "found": found}))
"""


def main(argv: list[str] | None = None) -> None:
    """Train, detect on the validation images, and write what comes of it."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("peer", choices=["torchvision", "ultralytics"])
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-images", type=any_path, required=True, metavar="DIR", help="of the images")
        parser.add_argument(f"--{split}-annotations", type=any_path, required=True, metavar="FILE", help="of COCO")
    parser.add_argument("--seconds", type=positive_number(1e7), required=True, metavar="X", help="of a processor")
    parser.add_argument("--image-size", type=positive_integer, default=256, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    parser.add_argument("--python", type=any_path, metavar="FILE", help="interpreter that has ultralytics")
    parser.add_argument("--output-dir", type=any_path, required=True, metavar="RUN", help="of the result")
    parser.add_argument("--resume", action="store_true", help="nothing is kept of a run that was stopped: begins anew")
    args = parser.parse_args(argv)
    options = DataOptions(
        train_images=(args.train_images,), train_annotations=(args.train_annotations,),
        val_images=(args.val_images,), val_annotations=(args.val_annotations,),
    )  # fmt: skip
    tables = load_tables(options)
    train, val = tables["train"], tables["val"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.peer == "torchvision":
        images, found = with_torchvision(train, val, args.seconds, args.image_size, args.seed)
    elif args.python is None:
        raise InputError("--python is missing: the interpreter of an environment that has ultralytics")
    else:
        folder = args.output_dir / "ultralytics"
        images, found = with_ultralytics(train, val, args.seconds, args.image_size, args.seed, folder, args.python)
    write_json(args.output_dir / "peer.json", {"images": images, **coco_metrics(val, found)})


def with_torchvision(
    train: AnnotationTable, val: AnnotationTable, seconds: float, image_size: int, seed: int
) -> tuple[int, Predictions]:
    """The number of images seen, and the detections on the validation images."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    model = FasterRCNN(backbone, len(train.class_names) + 1, min_size=image_size, max_size=image_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    rows = endless(rng, len(train))
    steps, end = 0, seconds - RESERVE
    while (spent := time.process_time()) < end:
        factor = min(1.0, (steps + 1) / WARMUP_STEPS) * 0.1 ** sum(spent >= share * end for share in DECAYS)
        optimizer.param_groups[0]["lr"] = LR * factor
        samples = [training_sample(train, next(rows), rng) for _ in range(BATCH)]
        with torch.autocast("cpu", torch.bfloat16):
            losses = model([image for image, _ in samples], [target for _, target in samples])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        steps += 1
    model.eval()
    parts = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for row in range(len(val)):
            (found,) = model([as_tensor(val.read_image(row))])
            boxes, scores = (found[name].float().numpy().astype(np.float64) for name in ("boxes", "scores"))
            parts.append(detections(row, boxes, scores, found["labels"].numpy() - 1))
    return steps * BATCH, Predictions.concatenate(parts)


def endless(rng: np.random.Generator, count: int) -> Iterator[int]:
    """Rows in random order, each once an epoch."""
    while True:
        yield from rng.permutation(count).tolist()


def training_sample(table: AnnotationTable, row: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """An image, mirrored half of the time, and its objects, as torchvision's detectors take them."""
    image = table.read_image(row)
    start, stop = table.starts[row : row + 2].tolist()
    kept = ~table.crowd[start:stop]
    boxes = corners_of(table.boxes[start:stop])[kept].astype(np.float32)
    labels = table.labels[start:stop][kept] + 1
    if rng.random() < 0.5:
        image = image[:, ::-1].copy()
        boxes = np.stack([image.shape[1] - boxes[:, 2], boxes[:, 1], image.shape[1] - boxes[:, 0], boxes[:, 3]], axis=1)
    return as_tensor(image), {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels.astype(np.int64))}


def as_tensor(image: np.ndarray) -> Tensor:
    """[3, h, w] float32 from 0 to 1, of [h, w, 3] uint8."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def detections(row: int, corners: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Predictions:
    """Of one image: [D, 4] corners, [D] scores and rows of the classes."""
    boxes = corners.reshape(-1, 4).copy()
    boxes[:, 2:] -= boxes[:, :2]
    return Predictions(np.full(len(boxes), row, np.int64), boxes, scores, labels.astype(np.int64))


def with_ultralytics(
    train: AnnotationTable, val: AnnotationTable, seconds: float, image_size: int, seed: int, folder: Path, python: Path
) -> tuple[int, Predictions]:
    """The same of yolo11n, with its files in `folder`. Raises InputError where it fails."""
    for split, table in (("train", train), ("val", val)):
        write_yolo(table, folder / "images" / split, folder / "labels" / split)
    names = {number: f"class {number}" for number in range(len(train.class_names))}
    content = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val", "names": names}
    write_json(folder / "data.yaml", content)  # which YAML is, too
    hours = (seconds - RESERVE) / 3600
    command = [str(python), "-c", ULTRALYTICS, str(folder.resolve()), str(image_size), str(seed), str(hours)]
    if status := subprocess.run(command, cwd=folder, check=False).returncode:
        raise InputError(f"--python {python}: ultralytics ended with status {status}: see its output above")
    result = json.loads((folder / "found.json").read_text())
    parts = [
        detections(row, np.array(boxes, float), np.array(scores, float), np.array(labels, int))
        for row, boxes, scores, labels in result["found"]
    ]
    return result["epochs"] * len(train), Predictions.concatenate(parts)


def write_yolo(table: AnnotationTable, images: Path, labels: Path) -> None:
    """Links to the images, named by their rows, and their objects but crowd regions as YOLO's text."""
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    for row in range(len(table)):
        source = Path(table.path(row)).resolve()
        link = images / f"{row:06d}{source.suffix.lower()}"
        link.unlink(missing_ok=True)
        link.symlink_to(source)
        height, width = table.sizes[row]
        lines = []
        for number in range(int(table.starts[row]), int(table.starts[row + 1])):
            if not table.crowd[number]:
                x, y, w, h = table.boxes[number] / np.array([width, height, width, height])
                lines.append(f"{table.labels[number]} {x + w / 2} {y + h / 2} {w} {h}\n")
        write_text(labels / f"{row:06d}.txt", "".join(lines))


if __name__ == "__main__":
    run_program(main)
