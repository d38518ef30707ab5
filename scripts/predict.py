"""Detect objects in image files: drawn pictures and COCO results.

  python scripts/predict.py --checkpoint RUN IMAGE_OR_FOLDER... --output-dir DIR [--score-threshold 0.3]

Folders are searched recursively. Writes each picture with its detections drawn, and predictions.json: COCO results with
the data set's own category ids, masks as run lengths; images are numbered from 1 in the order of their names, and named
in each row.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from direct_pt.batch import Detections, Sample, collate
from direct_pt.checkpoint import from_pretrained
from direct_pt.coco_eval import Predictions
from direct_pt.data.sources import DecodingOptions
from direct_pt.distributed.launch import DeviceOptions, make_accelerator
from direct_pt.errors import InputError, run_program
from direct_pt.flags import add_flags, make_parser, positive_integer, read_flags, share
from direct_pt.images import FORMATS, Decoding, UnreadableImage, image_size, read_image
from direct_pt.models.masks import paste_masks
from direct_pt.transforms import TestPreset
from direct_pt.visualize import draw_detections


class ImageFiles(Dataset[Sample]):
    """Test samples of files; an unreadable one comes back black and named."""

    def __init__(self, paths: list[Path], preset: TestPreset, decoding: Decoding) -> None:
        self.paths = paths
        self.preset = preset
        self.decoding = decoding

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        try:
            size = image_size(path, self.decoding)
            sample = self.preset.sample(size, lambda least: read_image(path, size, least, self.decoding))
            return replace(sample, index=index)
        except UnreadableImage:
            return replace(self.preset.black_sample((32, 32)), index=index, unreadable=(index,))


def find_images(inputs: list[Path]) -> list[tuple[Path, Path]]:
    """Each image file and the relative path that its picture gets, no two the same."""
    found: dict[Path, Path] = {}
    for given in inputs:
        if given.is_dir():
            inside = sorted(path for path in given.rglob("*") if path.suffix.lower() in FORMATS and path.is_file())
            pairs = [(path, path.relative_to(given)) for path in inside]
        elif given.is_file():
            pairs = [(given, Path(given.name))]
        else:
            raise InputError(f"{given}: no such image or folder")
        for path, name in pairs:
            picture, copy = name.with_suffix(".jpg"), 1
            while picture in found:
                copy += 1
                picture = name.with_name(f"{name.stem}_{copy}.jpg")
            found[picture] = path
    if not found:
        raise InputError(f"{', '.join(map(str, inputs))}: no image files there ({', '.join(FORMATS)})")
    return [(path, picture) for picture, path in found.items()]


def draw(photo: Image.Image, found: Detections, class_names: tuple[str, ...]) -> Image.Image:
    """One image with its detections."""
    values = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    captions = [f"{class_names[label]} {score:.2f}" for label, score in values]
    boxes, masks = found.boxes.numpy(), None
    if found.masks is not None:
        size, pairs = (photo.height, photo.width), zip(found.masks.numpy(), boxes, strict=True)
        masks = (paste_masks(probabilities[None], box[None], size)[0] for probabilities, box in pairs)  # one at a time
    return draw_detections(photo, boxes, found.labels.numpy(), captions, masks)


def main() -> None:
    """Predict, batch by batch: rows are written and pictures drawn before the next one."""
    p = make_parser(__doc__ or "")
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="image files, or folders of them")
    p.add_argument("--checkpoint", required=True, metavar="RUN", help="a run, its model/ or best/, or a hub id")
    p.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="where to write")
    p.add_argument("--score-threshold", type=share, default=0.3, metavar="X", help="of what is drawn and written (0.3)")
    p.add_argument("--micro-batch-size", type=positive_integer, default=4, metavar="N", help="images at once (4)")
    add_flags(p, DecodingOptions)
    add_flags(p, DeviceOptions)
    args = p.parse_args()

    if args.output_dir.is_file():
        raise InputError(f"--output-dir {args.output_dir}: is a file")
    files = find_images(args.images)
    decoding = read_flags(args, DecodingOptions).decoding
    accelerator = make_accelerator(args.mixed_precision)
    detector = from_pretrained(args.checkpoint).to(accelerator.device)
    config = detector.config
    preset = TestPreset(config.short_side, config.long_side)
    loader = DataLoader(
        ImageFiles([path for path, _ in files], preset, decoding), args.micro_batch_size, collate_fn=collate,
        num_workers=args.num_workers,
    )  # fmt: skip
    image_ids = np.arange(1, len(files) + 1)
    class_names = dict(zip(config.category_ids, config.class_names, strict=True))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    partial, unreadable, rows = args.output_dir / ".predictions.json.partial", 0, 0
    with partial.open("w") as file, tqdm(total=len(files), desc="predict", unit="image") as bar:
        for batch in loader:
            with accelerator.autocast():
                found = detector.detect(batch.to(accelerator.device)).to("cpu").above(args.score_threshold)
            for result in Predictions.of_batch(batch, found).coco(image_ids, config.category_ids):
                image_id, category_id = result["image_id"], result["category_id"]
                row = {
                    "image_id": image_id,
                    "file_name": str(files[image_id - 1][0]),
                    "category_id": category_id,
                    "category_name": class_names[category_id],
                    **result,
                }
                file.write((",\n" if rows else "[\n") + json.dumps(row))
                rows += 1
            for position, index in enumerate(batch.indices.tolist()):
                path, picture = files[index]
                bar.update()
                if index in batch.unreadable:
                    unreadable += 1
                    bar.write(f"unreadable, skipped: {path}")
                    continue
                photo = Image.fromarray(read_image(path, decoding=decoding))
                target = args.output_dir / picture
                target.parent.mkdir(parents=True, exist_ok=True)
                draw(photo, found.of_image(position), config.class_names).save(target, quality=92)
        file.write("\n]\n" if rows else "[]\n")
    partial.replace(args.output_dir / "predictions.json")
    if unreadable == len(files):
        raise InputError(f"none of the {len(files)} files could be read as an image")
    print(f"{len(files) - unreadable} images, {unreadable} unreadable, {rows} detections: {args.output_dir}")


if __name__ == "__main__":
    with torch.inference_mode():
        run_program(main)
