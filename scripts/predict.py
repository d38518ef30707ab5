"""Detect objects in image files: drawn pictures and COCO results.

  python scripts/predict.py --checkpoint RUN IMAGE_OR_FOLDER... [--output-dir DIR] [--tiles PIXELS] [--as-annotations]

Folders are searched recursively, but for the output folder. Writes each picture with its detections drawn, and
predictions.json: COCO results with the data set's own category ids, masks as run lengths; images are numbered from 1 in
the order of their names, and named in each row, with bytes that are no UTF-8 as \\udcXX. Nothing is written over the
images, or over what predict.py did not make.
--as-annotations, --as-yolo, --as-label-studio, --as-cvat and --crops write the detections for other uses.
"""

from direct_pt.program.run import run_program
import os
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from tqdm import tqdm

from direct_pt.data.problems import Problems
from direct_pt.data.sources import DecodingOptions
from direct_pt.distributed.launch import DeviceOptions, make_accelerator
from direct_pt.errors import InputError, printable
from direct_pt.files import check_output, counted_folder, writing
from direct_pt.flags import add_flags, any_path, make_parser, read_flags
from direct_pt.images.decoding import Decoding, UnreadableImage, read_image
from direct_pt.images.tiles import TileOptions
from direct_pt.prediction.detector_options import DetectorOptions
from direct_pt.prediction.inputs import check_pictures, find_images
from direct_pt.prediction.looking import ImageFiles, look_at
from direct_pt.prediction.outputs import OutputOptions, describe
from direct_pt.prediction.seen import Classes, Seen, common_folder
from direct_pt.program.folder_lock import folder_held
from direct_pt.training.limits import check_images_at_once
from direct_pt.transforms import TestPreset


def main() -> None:
    """Predict, image by image: its rows are written and its picture drawn before the next one."""
    p = make_parser(__doc__ or "")
    p.add_argument(
        "images", nargs="+", type=any_path, metavar="IMAGE_OR_FOLDER", help="image files, or folders of them"
    )
    p.add_argument("--output-dir", type=any_path, metavar="DIR", help="where to write (runs/predict, -2 and so on)")
    add_flags(p, DetectorOptions)
    add_flags(p, OutputOptions, "results")
    add_flags(p, TileOptions)
    add_flags(p, DecodingOptions)
    add_flags(p, DeviceOptions)
    args = p.parse_args()

    own, machine = read_flags(args, DetectorOptions), read_flags(args, DeviceOptions)
    own.check(machine)
    output: Path = args.output_dir or counted_folder(Path("runs/predict"))
    check_output(output)
    notes, options = Problems(), read_flags(args, OutputOptions)
    options.check(output)
    files, left_out = find_images(args.images, output, notes)
    check_pictures(files, output)
    if left_out:
        print(f"not searched, as it is --output-dir: {printable(str(output))} ({left_out} image files)")
    for note, count in notes.summary().items():
        print(f"{printable(note)}: {count}")
    decoding = read_flags(args, DecodingOptions).decoding
    accelerator = make_accelerator(machine.mixed_precision, device=machine.device)
    detector, thresholds = own.load(accelerator.device)
    config = detector.config
    preset = TestPreset(config.short_side, config.long_side, read_flags(args, TileOptions).tiling(detector.tiling))
    print(f"images are looked at whole{f' {preset.tiling}' if preset.tiling else ''}")
    check_images_at_once(own.micro_batch_size if preset.tiling else min(own.micro_batch_size, len(files)), preset)
    paths = [path for path, _ in files]
    images = ImageFiles(paths, preset, decoding)
    classes = Classes(config.class_names, config.category_ids)
    is_folder = args.images[0].is_dir() and len(args.images) == 1
    base = Path(os.path.normpath(args.images[0].absolute())) if is_folder else common_folder(paths)
    outputs = options.outputs(output, classes, base)
    unreadable: list[str] = []
    count = 0
    with ExitStack() as stack:
        stack.enter_context(writing(f"--output-dir {output}"))
        stack.enter_context(folder_held(output, "predict"))
        writers = [stack.enter_context(one) for one in outputs]
        bar = stack.enter_context(tqdm(total=len(files), desc="predict", unit="image"))
        looked_at = look_at(detector, images, thresholds, accelerator, own.micro_batch_size, machine.num_workers)
        for index, size, found in stack.enter_context(closing(looked_at)):
            path, picture = files[index]
            bar.update()
            if found is None:
                unreadable.append(unreadable_reason(path, decoding))
                bar.write(f"unreadable, skipped: {unreadable[-1]}")
                continue
            seen = Seen(index + 1, path, picture.with_suffix(""), size, found, decoding)
            try:
                for write in writers:
                    write(seen)
            except UnreadableImage as error:  # it is gone meanwhile
                unreadable.append(printable(str(error)))
                bar.write(f"unreadable, skipped: {unreadable[-1]}")
                continue
            count += len(found.scores)
            if note := seen.drawn_smaller * (not options.no_pictures):
                bar.write(printable(note))
    if len(unreadable) == len(files):
        few = " | ".join(unreadable[:3]) + " | ..." * (len(files) > 3)
        raise InputError(f"none of the {len(files)} files could be read as an image: {few}")
    counts = f"{len(files) - len(unreadable)} images, {len(unreadable)} unreadable, {count} detections"
    for line in [f"{counts}: {output}", *describe(options, output, base)]:
        print(printable(line))


def unreadable_reason(path: Path, decoding: Decoding) -> str:
    """A file, and why it cannot be read."""
    try:
        read_image(path, decoding=decoding)
    except UnreadableImage as error:
        return printable(str(error))
    return printable(f"{path}: could not be read before, and can now")


if __name__ == "__main__":
    with torch.inference_mode():
        run_program(main)
