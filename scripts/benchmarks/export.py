"""AP of exported detectors beside PyTorch's: each of the five is trained for a while, exported, and evaluated.

The scripts themselves do it: `pretrain.py`, `export.py`, and `evaluate.py` of the run and of the file, with the whole
validation split and without autocast. A set with outlines gives masks, too.
"""

import argparse

from benchmarks.rows import Row, row, run_script
from direct_pt.files import read_json
from direct_pt.flags import any_path, positive_integer
from direct_pt.models.detector import MODELS

SMALL = ("--channels", "64", "--rois-per-image", "32", "--proposals", "256", "--image-size",
         "224", "--micro-batch-size", "8", "--global-batch-size", "8", "--anchor-scale", "auto", "--eval-every",
         "10000", "--num-workers", "1")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data, where, how long."""
    parser.add_argument("--data", type=any_path, required=True, metavar="DIR", help="as of pretrain.py")
    parser.add_argument("--output-dir", type=any_path, required=True, metavar="DIR", help="of the runs")
    parser.add_argument("--steps", type=positive_integer, default=400, metavar="N", help="of 8 images (400)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(all)")


def measure(args: argparse.Namespace) -> list[Row]:
    """AP of boxes and masks by the file, and by PyTorch."""
    rows = []
    for model in args.models:
        run = args.output_dir / model
        backbone = () if "swin" in model else ("--backbone", "resnet18")
        run_script("pretrain", "--data", args.data, "--model", model, *backbone, *SMALL, "--max-steps", args.steps,
                   "--output-dir", run, "--resume")  # fmt: skip
        run_script("export", run)
        metrics = []
        for checkpoint, name in ((run / "model.onnx", "exported"), (run, "PyTorch")):
            run_script("evaluate", "--checkpoint", checkpoint, "--data", args.data, "--mixed-precision", "no",
                       "--output-dir", args.output_dir / f"{model} {name}")  # fmt: skip
            metrics.append(read_json(args.output_dir / f"{model} {name}/metrics.json"))
        exported, own = metrics
        for kind in ("bbox", "segm"):
            if kind in own:
                setting = f"{model.removesuffix('_r50_fpn')}, {kind}"
                target = "within 0.001"
                rows.append(row("export", setting, exported[kind]["AP"], "AP", "PyTorch", own[kind]["AP"], target))
    return rows
