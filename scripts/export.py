"""Write a trained detector as one file that runs without this project: ONNX, or PyTorch's exported program.

  python scripts/export.py RUN [--format onnx|torch-export] [--precision fp32|fp16] [--output FILE] [--images IMAGE ...]

The file holds all from pixels to final boxes, scores, classes and masks, NMS included; direct_pt/onnx_detector.py, one
file that needs onnxruntime, numpy and OpenCV, resizes images for it and reads its results. Before the file takes its
name, it is run on images beside the detector, and the results are compared.
"""

from direct_pt.program.run import run_program
import io
import zipfile
from itertools import islice
from pathlib import Path

from direct_pt.checkpoint import CONFIG, KINDS, WEIGHTS_HELP, describe_model, from_pretrained, model_folder
from direct_pt.data.names import walk_images
from direct_pt.data.problems import Problems
from direct_pt.errors import InputError, printable
from direct_pt.files import DamagedFile, check_inputs_kept, read_json, read_regular, reading, replacing, writing
from direct_pt.flags import any_path, make_parser, path_or_name
from direct_pt.images.decoding import UnreadableImage, read_image
from direct_pt.models.export_check import BOUNDS, check_export
from direct_pt.models.exported import write_onnx, write_program
from direct_pt.onnx_detector import METADATA

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2"}
CHECKED_IMAGES = 4
DATA_FLAGS = ("val_images", "data", "train_images")  # of a run, where images may lie


def find_images(given: list[Path] | None, run: Path) -> list[Path]:
    """The images to compare on: those given, or some of the run's data. Raises InputError."""
    if given is None:
        try:
            settings = read_json(run / CONFIG).get("settings", {})
        except (DamagedFile, OSError, AttributeError):
            settings = {}
        values = [settings.get(flag) for flag in DATA_FLAGS]
        given = [Path(str(one)) for value in values for one in (value if isinstance(value, list) else [value]) if value]
        given = [path for path in given if path.is_dir()][:1]
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise InputError(f"--images {path}: no such image or folder")
        inside = sorted(islice(walk_images(path, Problems()), 1000)) if path.is_dir() else [path]
        found += inside[:: max(1, len(inside) // CHECKED_IMAGES)][:CHECKED_IMAGES]
    if not found:
        raise InputError(
            "the export is compared with the detector on images, and none are known: name some with --images"
        )
    return found


def is_own(path: Path) -> bool:
    """Whether an existing file is an earlier export: then it is replaced."""
    with reading(str(path)):
        content = read_regular(path)
    try:
        if path.suffix == ENDINGS["torch-export"]:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return any(name.endswith(f"extra/{METADATA}") for name in archive.namelist())
        import onnx

        return any(entry.key == METADATA for entry in onnx.load_model_from_string(content).metadata_props)
    except Exception:  # whatever a foreign file makes of the readers
        return False


def main(argv: list[str] | None = None) -> None:
    """Export, compare, and only then put the file in its place."""
    p = make_parser(__doc__ or "")
    p.add_argument("run", type=path_or_name, metavar="RUN", help="a run, its model/ or best/, or a hub id")
    p.add_argument("--format", choices=ENDINGS, default="onnx", help="of the file (onnx)")
    p.add_argument("--precision", choices=BOUNDS, default="fp32", help="of weights and features (fp32)")
    p.add_argument("--output", type=any_path, metavar="FILE", help="(RUN/model.onnx, or model.pt2)")
    p.add_argument("--weights", choices=KINDS, default="best", help=WEIGHTS_HELP)
    p.add_argument(
        "--images", type=any_path, nargs="+", metavar="IMAGE", help="files or folders to compare on (some of the run's)"
    )
    args = p.parse_args(argv)

    folder = model_folder(args.run, args.weights)
    ending = ENDINGS[args.format]
    run = Path(args.run)
    if args.output is None and not run.is_dir():
        raise InputError(f"{args.run}: is no folder here; say with --output where to write the file")
    output: Path = args.output or run / f"model{ending}"
    if output.suffix != ending:
        raise InputError(f"--output {output}: a file of --format {args.format} ends in {ending}")
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output {output}: {'is a folder' if output.is_dir() else 'its folder does not exist'}")
    if output.exists() and not is_own(output):
        raise InputError(f"--output {output}: was not made by export.py; name another file")
    paths = find_images(args.images, run)
    check_inputs_kept([output], paths, "--output")
    print(printable(f"weights: {describe_model(folder)}"))
    detector = from_pretrained(folder)
    images = []
    for path in paths:
        try:
            images.append(read_image(path))
        except UnreadableImage as error:
            print(f"unreadable, not compared on: {printable(str(error))}")
    if not images:
        raise InputError(f"none of the {len(paths)} images can be read: name others with --images")

    write = write_onnx if args.format == "onnx" else write_program
    with writing(f"--output {output}"), replacing(output) as temporary:
        write(detector, temporary, args.precision == "fp16")
        megabytes = temporary.stat().st_size / 1e6
        result = check_export(detector, temporary, args.format, args.precision, images)
    print(result)
    print(printable(f"written: {output} ({megabytes:.1f} MB)"))


if __name__ == "__main__":
    run_program(main)
