"""Measure a trained detector: COCO metrics and predictions of one split.

  accelerate launch --quiet scripts/evaluate.py --checkpoint RUN --data DIR [--split val] [--output-dir DIR]

Images are tested at the size that the detector was trained for unless --short-side and --long-side say otherwise, and
--tiles in pieces too.
Writes metrics.json and predictions.json (COCO results format, with the data set's own ids), for boxes and, where the
detector finds them, masks; and report.html: curves, thresholds, errors and pictures in one file, its figures in
report.json. Of another split than val, the files are named metrics_SPLIT.json and so on.
"""

from direct_pt.program.run import run_program
import argparse
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from accelerate import Accelerator

from direct_pt.checkpoint import (
    CHECKPOINT_HELP,
    KINDS,
    PROVIDER_HELP,
    WEIGHTS_HELP,
    Loaded,
    check_runtime,
    is_exported,
    load_detector,
)
from direct_pt.coco_eval import evaluate, metrics_table
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.loader import unreadable_reason
from direct_pt.data.sources import SPLITS, DataOptions, load_tables
from direct_pt.distributed.launch import DeviceOptions, join_processes, make_accelerator
from direct_pt.distributed.processes import check_same, main_decides, sampled
from direct_pt.errors import InputError, class_differences, printable, printable_lines
from direct_pt.files import check_inputs_kept, check_output, write_json, writing
from direct_pt.flags import (
    add_flags,
    any_path,
    batch_size,
    make_parser,
    path_or_name,
    paths_of,
    pixels,
    read_flags,
)
from direct_pt.images.tiles import TileOptions
from direct_pt.program.folder_lock import hold_folder, release_folder
from direct_pt.reports.evaluation import Judged, analyse, comparison
from direct_pt.reports.evaluation_page import write_evaluation_page
from direct_pt.training.limits import check_images_at_once
from direct_pt.training.resume import data_record
from direct_pt.transforms import TestPreset


class Model(NamedTuple):
    """A detector that is measured, and the size of its images."""

    flag: str  # that names it, with its value
    loaded: Loaded
    preset: TestPreset

    @property
    def size(self) -> str:
        """The size of its images, in words."""
        tiles = f", {self.preset.tiling}" if self.preset.tiling else ""
        return f"{self.preset.long_side}x{self.preset.short_side}{tiles}"


def read_model(flag: str, checkpoint: Path | str, args: argparse.Namespace) -> Model:
    """A detector from a run, a model folder, an exported file or the hub. Raises InputError."""
    loaded = load_detector(checkpoint, args.weights, args.provider)
    config, tiling = loaded.detector.config, read_flags(args, TileOptions).tiling(loaded.detector.tiling)
    preset = TestPreset(args.short_side or config.short_side, args.long_side or config.long_side, tiling)
    if preset.short_side > preset.long_side:
        raise InputError(
            f"--short-side {preset.short_side} is above --long-side {preset.long_side}: give a larger --long-side"
        )
    return Model(f"{flag} {checkpoint}", loaded, preset)


def check_model(model: Model, table: AnnotationTable) -> None:
    """Raise InputError unless the split can be measured with it."""
    config = model.loaded.detector.config
    trained, listed = (dict(zip(part.category_ids, part.class_names, strict=True)) for part in (config, table))
    if trained != listed:
        raise InputError(
            f"{table.source} lists other classes than {model.flag} was trained for: "
            f"{class_differences(listed, trained)}; give the data that it was trained on, with the same --classes"
        )
    if model.loaded.detector.has_masks:
        table.require_masks()


def print_result(model: Model, table: AnnotationTable, split: str, judged: Judged) -> None:
    """Figures, and images that could not be read. Raises InputError where none could."""
    size = f"{len(table)} images at {model.size}"
    print(printable_lines(f"{split}: {size}\n{metrics_table(judged.metrics)}"))
    if text := threshold_text(judged):
        print(text)
    if not any(row["objects"] for row in judged.metrics["per_class"].values()):
        print("there is no object to find in these images, but for crowd regions: the figures are -1, unknown")
    reasons = [unreadable_reason(table, image) for image in judged.predictions.unreadable]
    for reason in reasons:
        print(f"unreadable image, no detections: {printable(reason)}")
    if len(reasons) == len(table):
        few = " | ".join(reasons[:3]) + " | ..." * (len(reasons) > 3)
        raise InputError(f"none of the {len(reasons)} images could be read: {few}")


def threshold_text(judged: Judged, start: str = "") -> str:
    """The best threshold and what it gives, behind `start`; empty where nothing was found."""
    if not (at := judged.thresholds["all"]):
        return ""
    worth = f"precision {at['precision']:.3f}, recall {at['recall']:.3f}, F1 {at['f1']:.3f}"
    return f"{start}best score threshold {at['threshold']:g}: {worth}"


def measure(
    model: Model, table: AnnotationTable, args: argparse.Namespace, accelerator: Accelerator
) -> tuple[Judged, float] | None:
    """A model's figures, printed, and images a second; of the main process. Every process must call it."""
    if accelerator.is_main_process:
        is_chosen = args.split == "val" and model.loaded.place.name == "best"
        chosen = "; they were chosen by their AP on this split, so it is a little high; --weights last were not"
        print(printable(f"weights: {model.loaded.description}{chosen * is_chosen}"), flush=True)
    detector, start = model.loaded.detector.to(accelerator.device), perf_counter()
    metrics, predictions = evaluate(detector, table, model.preset, args.micro_batch_size, accelerator, args.num_workers)
    speed = len(table) / (perf_counter() - start)
    if not accelerator.is_main_process:
        return None
    judged = Judged.of(table, predictions, metrics)
    print_result(model, table, args.split, judged)  # a disk may fail after this
    return judged, speed


def write_results(
    files: dict[str, Path], split: str, models: list[Model], measured: list[tuple[Judged, float] | None], device: str
) -> None:
    """Write the first model's figures, detections and report, with the second one beside it. Raises OSError."""
    (judged, speed), *others = [one for one in measured if one is not None]
    model, table = models[0], judged.table
    about = {
        "split": split,
        "data": table.source,
        "images": len(table),
        "unreadable_images": len(judged.predictions.unreadable),
        "weights": str(model.loaded.place),
    }
    if model.preset.tiling is not None:
        about["tiles"] = vars(model.preset.tiling)
    write_json(files["metrics.json"], {**judged.metrics, **about})
    write_json(files["predictions.json"], judged.predictions.coco(table.image_ids, table.category_ids))
    head = {
        "model": model.loaded.description,
        "data": f"{table.source}, {split}",
        "tested at": f"{model.size} pixels",
        "speed": f"{speed:.3g} images a second, from files to figures, on {device}",
    }
    figures = analyse(judged)
    other = others[0][0] if others else None
    if other is not None:
        figures["comparison"] = {"weights": str(models[1].loaded.place), **comparison(judged, other)}
    write_json(files["report.json"], {**about, **figures})
    other_about = ""
    if other is not None:
        other_about = f"the other at {models[1].size} pixels{threshold_text(other, '; its ')}"
        if len({one.loaded.detector.has_masks for one in models}) > 1:
            other_about += "; as only one of them finds masks, boxes alone are compared"
    name = models[-1].loaded.description
    write_evaluation_page(files["report.html"], judged, figures, head, other, name, other_about)


def main(argv: list[str] | None = None) -> None:
    """Evaluate one split."""
    p = make_parser(__doc__ or "")
    p.add_argument("--checkpoint", required=True, type=path_or_name, metavar="RUN", help=CHECKPOINT_HELP)
    p.add_argument("--weights", choices=KINDS, default="best", help=WEIGHTS_HELP)
    p.add_argument("--compare", type=path_or_name, metavar="RUN", help="another one, measured beside it in report.html")
    add_flags(p, DataOptions, "data")
    p.add_argument("--split", choices=SPLITS, default="val", help="the split that is measured (val)")
    p.add_argument("--short-side", type=pixels, metavar="PIXELS", help="(default: the detector's own)")
    p.add_argument("--long-side", type=pixels, metavar="PIXELS", help="(default: the detector's own)")
    add_flags(p, TileOptions)
    p.add_argument(
        "--micro-batch-size", "--batch-size", type=batch_size, default=4, metavar="N", help="images at once (4)"
    )
    add_flags(p, DeviceOptions)
    p.add_argument("--provider", metavar="NAME", help=PROVIDER_HELP)
    p.add_argument("--output-dir", type=any_path, metavar="DIR", help="(default: the checkpoint's folder)")
    args = p.parse_args(argv)

    output = args.output_dir or Path(args.checkpoint)
    if args.output_dir is None and not output.is_dir():
        what = "is a file" if is_exported(args.checkpoint) else "no such folder; for a model from the hub"
        text = f"{what}, say with --output-dir where to write its metrics"
        raise InputError(f"--checkpoint {args.checkpoint}: {text}")
    options, suffix = read_flags(args, DataOptions), "" if args.split == "val" else f"_{args.split}"
    names = ("metrics.json", "predictions.json", "report.json", "report.html")
    files = {name: output / Path(name).with_stem(Path(name).stem + suffix) for name in names}

    def check_files() -> None:
        check_output(output)
        check_inputs_kept(files.values(), paths_of(options))

    def take_folder() -> None:  # figures and detections of one evaluation stay together
        with writing(f"--output-dir {output}"):
            hold_folder(output, f"evaluate{suffix}")

    paths = [args.checkpoint, *([] if args.compare is None else [args.compare])]
    check_runtime(args.provider, args.device, args.mixed_precision, paths)
    processes = join_processes(args.device)
    main_decides(check_files, processes)  # only the main process writes
    models = [read_model("--checkpoint", args.checkpoint, args)]
    if args.compare is not None:
        models.append(read_model("--compare", args.compare, args))
    tables = load_tables(options, [args.split], required=args.split)
    if args.split not in tables:
        raise InputError(f"--split {args.split}: there are too few training images to hold some out")
    table = tables[args.split]
    for model in models:
        check_model(model, table)
        check_images_at_once(min(args.micro_batch_size, len(table)), model.preset)

    if processes.num_processes > 1:
        sizes = [[model.preset.short_side, model.preset.long_side] for model in models]
        own = {"--split": args.split, "sizes of images": sizes, "--micro-batch-size": args.micro_batch_size}
        own["--tiles"] = [str(model.preset.tiling) for model in models]
        own |= {"--mixed-precision": args.mixed_precision, **data_record(table, None)}
        check_same(own, "flags and data", processes)
        for model in models:
            check_same(sampled(model.loaded.detector.state_dict()), model.flag.split()[0], processes)

    main_decides(take_folder, processes)
    accelerator = make_accelerator(args.mixed_precision)
    measured = [measure(model, table, args, accelerator) for model in models]
    if accelerator.is_main_process:
        with writing(f"--output-dir {output}"):
            write_results(files, args.split, models, measured, accelerator.device.type)
        release_folder(output, f"evaluate{suffix}")
        print(printable(f"written: {', '.join(map(str, files.values()))}"))
    accelerator.wait_for_everyone()  # a process that exits first, with its connections open, may abort
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main)
