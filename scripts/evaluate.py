"""Measure a trained detector: COCO metrics and predictions of one split.

  accelerate launch --quiet scripts/evaluate.py --checkpoint RUN --data DIR [--split val] [--output-dir DIR]

Images are tested at the size that the detector was trained for unless --short-side and --long-side say otherwise.
Writes metrics.json and predictions.json (COCO results format, with the data set's own ids), for boxes and, where the
detector finds them, masks.
"""

from pathlib import Path

from direct_pt.checkpoint import from_pretrained
from direct_pt.coco_eval import evaluate, metrics_table
from direct_pt.data.loader import unreadable_reason
from direct_pt.data.sources import SPLITS, DataOptions, load_tables
from direct_pt.distributed.launch import DeviceOptions, make_accelerator
from direct_pt.errors import InputError, class_differences, run_program
from direct_pt.files import write_json
from direct_pt.flags import add_flags, make_parser, pixels, positive_integer, read_flags
from direct_pt.transforms import TestPreset


def main() -> None:
    """Evaluate one split."""
    p = make_parser(__doc__ or "")
    p.add_argument("--checkpoint", required=True, metavar="RUN", help="a run, its model/ or best/, or a hub id")
    add_flags(p, DataOptions, "data")
    p.add_argument("--split", choices=SPLITS, default="val", help="the split that is measured (val)")
    p.add_argument("--short-side", type=pixels, metavar="PIXELS", help="(default: the detector's own)")
    p.add_argument("--long-side", type=pixels, metavar="PIXELS", help="(default: the detector's own)")
    p.add_argument("--micro-batch-size", type=positive_integer, default=4, metavar="N", help="images at once (4)")
    add_flags(p, DeviceOptions)
    p.add_argument("--output-dir", type=Path, metavar="DIR", help="(default: the checkpoint's folder)")
    args = p.parse_args()

    output = args.output_dir or Path(args.checkpoint)
    if args.output_dir is None and not output.is_dir():
        text = "no such folder; for a model from the hub, say with --output-dir where to write its metrics"
        raise InputError(f"--checkpoint {args.checkpoint}: {text}")
    if output.is_file():
        raise InputError(f"--output-dir {output}: is a file")
    detector = from_pretrained(args.checkpoint)
    tables = load_tables(read_flags(args, DataOptions), [args.split], required=args.split)
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

    accelerator = make_accelerator(args.mixed_precision)
    detector.to(accelerator.device)
    metrics, predictions = evaluate(detector, table, preset, args.micro_batch_size, accelerator, args.num_workers)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "metrics.json", metrics)
        write_json(output / "predictions.json", predictions.coco(table.image_ids, table.category_ids))
        print(f"{args.split}: {len(table)} images at {preset.long_side}x{preset.short_side}\n{metrics_table(metrics)}")
        if not any(row["objects"] for row in metrics["per_class"].values()):
            print("there is no object to find in these images, but for crowd regions: the figures are -1, unknown")
        for image in predictions.unreadable:
            print(f"unreadable image, no detections: {unreadable_reason(table, image)}")
        print(f"written: {output / 'metrics.json'}, {output / 'predictions.json'}")


if __name__ == "__main__":
    run_program(main)
