"""Measure a trained detector: COCO metrics and predictions of one split.

  accelerate launch --quiet scripts/evaluate.py --checkpoint RUN --data DIR [--split val] [--output-dir DIR]

Images are tested at the size that the detector was trained for unless --short-side and --long-side say otherwise.
Writes metrics.json and predictions.json (COCO results format, with the data set's own ids), for boxes and, where the
detector finds them, masks; of another split than val, metrics_SPLIT.json and predictions_SPLIT.json.
"""

from direct_pt.program.run import run_program
from pathlib import Path

from direct_pt.checkpoint import KINDS, WEIGHTS_HELP, describe_model, from_pretrained, model_folder
from direct_pt.coco_eval import evaluate, metrics_table
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
from direct_pt.program.folder_lock import hold_folder, release_folder
from direct_pt.training.limits import check_images_at_once
from direct_pt.training.resume import data_record
from direct_pt.transforms import TestPreset


def main(argv: list[str] | None = None) -> None:
    """Evaluate one split."""
    p = make_parser(__doc__ or "")
    p.add_argument(
        "--checkpoint", required=True, type=path_or_name, metavar="RUN", help="a run, its model/ or best/, or a hub id"
    )
    p.add_argument("--weights", choices=KINDS, default="best", help=WEIGHTS_HELP)
    add_flags(p, DataOptions, "data")
    p.add_argument("--split", choices=SPLITS, default="val", help="the split that is measured (val)")
    p.add_argument("--short-side", type=pixels, metavar="PIXELS", help="(default: the detector's own)")
    p.add_argument("--long-side", type=pixels, metavar="PIXELS", help="(default: the detector's own)")
    p.add_argument("--micro-batch-size", type=batch_size, default=4, metavar="N", help="images at once (4)")
    add_flags(p, DeviceOptions)
    p.add_argument("--output-dir", type=any_path, metavar="DIR", help="(default: the checkpoint's folder)")
    args = p.parse_args(argv)

    output = args.output_dir or Path(args.checkpoint)
    if args.output_dir is None and not output.is_dir():
        text = "no such folder; for a model from the hub, say with --output-dir where to write its metrics"
        raise InputError(f"--checkpoint {args.checkpoint}: {text}")
    options, suffix = read_flags(args, DataOptions), "" if args.split == "val" else f"_{args.split}"
    files = {name: output / f"{name}{suffix}.json" for name in ("metrics", "predictions")}

    def check_files() -> None:
        check_output(output)
        check_inputs_kept(files.values(), paths_of(options))

    def take_folder() -> None:  # figures and detections of one evaluation stay together
        with writing(f"--output-dir {output}"):
            hold_folder(output, f"evaluate{suffix}")

    processes = join_processes()
    main_decides(check_files, processes)  # only the main process writes
    folder = model_folder(args.checkpoint, args.weights)
    detector = from_pretrained(folder)
    tables = load_tables(options, [args.split], required=args.split)
    if args.split not in tables:
        raise InputError(f"--split {args.split}: there are too few training images to hold some out")
    table = tables[args.split]
    config = detector.config
    trained, listed = (dict(zip(part.category_ids, part.class_names, strict=True)) for part in (config, table))
    if trained != listed:
        raise InputError(
            f"{table.source} lists other classes than --checkpoint {args.checkpoint} was trained for: "
            f"{class_differences(listed, trained)}; give the data that it was trained on, with the same --classes"
        )
    preset = TestPreset(args.short_side or config.short_side, args.long_side or config.long_side)
    if preset.short_side > preset.long_side:
        raise InputError(
            f"--short-side {preset.short_side} is above --long-side {preset.long_side}: give a larger --long-side"
        )
    check_images_at_once(min(args.micro_batch_size, len(table)), preset)

    if processes.num_processes > 1:
        own = {"--split": args.split, "size of images": [preset.short_side, preset.long_side]}
        own |= {"--micro-batch-size": args.micro_batch_size, "--mixed-precision": args.mixed_precision}
        check_same(own | data_record(table, None), "flags and data", processes)
        check_same(sampled(detector.state_dict()), "--checkpoint", processes)

    if detector.has_masks:
        table.require_masks()
    main_decides(take_folder, processes)
    accelerator = make_accelerator(args.mixed_precision)
    if accelerator.is_main_process:
        is_chosen = args.split == "val" and folder.name == "best"
        chosen = "; chosen by their AP on this split, which is a little high for that: --weights last are not"
        print(printable(f"weights: {describe_model(folder)}{chosen * is_chosen}"), flush=True)
    detector.to(accelerator.device)
    metrics, predictions = evaluate(detector, table, preset, args.micro_batch_size, accelerator, args.num_workers)
    if accelerator.is_main_process:
        size = f"{len(table)} images at {preset.long_side}x{preset.short_side}"
        print(printable_lines(f"{args.split}: {size}\n{metrics_table(metrics)}"))  # a disk may fail after this
        if not any(row["objects"] for row in metrics["per_class"].values()):
            print("there is no object to find in these images, but for crowd regions: the figures are -1, unknown")
        reasons = [unreadable_reason(table, image) for image in predictions.unreadable]
        for reason in reasons:
            print(f"unreadable image, no detections: {printable(reason)}")
        if len(reasons) == len(table):
            few = " | ".join(reasons[:3]) + " | ..." * (len(reasons) > 3)
            raise InputError(f"none of the {len(reasons)} images could be read: {few}")
        about = {
            "split": args.split,
            "data": table.source,
            "images": len(table),
            "unreadable_images": len(reasons),
            "weights": str(folder),
        }
        with writing(f"--output-dir {output}"):
            write_json(files["metrics"], {**metrics, **about})
            write_json(files["predictions"], predictions.coco(table.image_ids, table.category_ids))
        release_folder(output, f"evaluate{suffix}")
        print(printable(f"written: {files['metrics']}, {files['predictions']}"))
    accelerator.wait_for_everyone()  # a process that exits first, with its connections open, may abort
    accelerator.end_training()


if __name__ == "__main__":
    run_program(main)
