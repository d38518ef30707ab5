"""Exchange weights with MMDetection 2.x and 3.x: its checkpoint becomes a run, or a run becomes a checkpoint for it.

  python scripts/import_mmdet.py CHECKPOINT.pth --model NAME --output-dir RUN [--categories FILE] [--backbone NAME]
  python scripts/import_mmdet.py RUN --export FILE.pth

Takes the paper's files, the model zoo's of 'pytorch' style, and your own of these detectors. Every tensor is matched,
or the file is refused. Files are read as plain weights: code in them is not run. What they do not contain is set to the
paper's values: size of test images, number of proposals. Class ids, except for COCO's, count from 1.
"""

from direct_pt.program.run import run_program
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from direct_pt.checkpoint import (
    CONFIG,
    KINDS,
    WEIGHTS,
    WEIGHTS_HELP,
    describe_model,
    from_pretrained,
    model_folder,
    save_model,
)
from direct_pt.errors import InputError, first_names, printable
from direct_pt.files import check_output, open_regular, read_regular, replacing, what_is_there, writing
from direct_pt.flags import any_path, make_parser, path_or_name
from direct_pt.models.detector import MODELS, PIXEL_MEAN, PIXEL_STD
from direct_pt.models.mmdet_weights import COMPUTED_BUFFERS, detector_from_mmdet, mmdet_state_dict

COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_NAMES = tuple(COCO.split(","))
COCO_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
# In the text of a training configuration: signs of weights for images of other normalisation or order of colours than
# ours, or of a network that strides in another convolution.
OUR_PIXEL_VALUES = "|".join(
    r",\s*".join(re.escape(f"{value:g}") + "0*" for value in row) for row in (PIXEL_MEAN, PIXEL_STD)
)
INCOMPATIBLE = re.compile(
    r"""\bstyle['"]?\s*[=:]\s*['"]caffe['"]|open-mmlab://[\w/]*caffe\w*|(?:\b\w{1,20})?to_rgb['"]?\s*[=:]\s*False"""
    rf"""|\b(mean|std)['"]?\s*[=:]\s*[\[(](?!\s*({OUR_PIXEL_VALUES})\b)[^\])]{{0,100}}[\])]?"""
)
MAX_CONFIG = 10_000_000  # characters of such a text that are searched
CLEANING_CODE = (
    "c = torch.load(FILE, map_location='cpu', weights_only=False); torch.save({'state_dict': c['state_dict'], 'meta': "
    "{k: c['meta'][k] for k in ('CLASSES', 'dataset_meta', 'config', 'cfg') if k in c['meta']}}, 'clean.pth')"
)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """A file's state dict, its "meta", and the other keys. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; to write a RUN as a checkpoint, give --export FILE.pth")
    if (there := what_is_there(path)) != "a file":
        raise InputError(f"{path}: no such file" + (there and f" ({there})"))
    try:
        with open_regular(path) as file, warnings.catch_warnings(action="ignore"):  # odd pickles; damage raises errors
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damage raises all kinds
        if kind := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path}: holds an object of type {kind[1]}, and code in a file is not run to make it; if you trust "
                f"where it comes from, make a clean one with what wrote it: {CLEANING_CODE}"
            ) from error
        reason = f"{type(error).__name__} {str(error).split('. ')[0]}".strip()
        raise InputError(
            f"{path}: is damaged or no checkpoint of torch ({reason}); copy or download it again"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        keys = (
            first_names([str(key) for key in content]) if isinstance(content, dict) else f"a {type(content).__name__}"
        )
        raise InputError(f"{path}: holds no state dict, alone or under 'state_dict', but {keys or 'nothing'}")
    prefix = "module." if all(str(name).startswith("module.") for name in state) else ""  # of DataParallel
    state_dict = {str(name).removeprefix(prefix): value for name, value in state.items()}
    if state is content:
        return state_dict, {}, []
    meta = content.get("meta")
    others = [str(key) for key in content if key not in ("state_dict", "meta")]
    return state_dict, meta if isinstance(meta, dict) else {}, others


def config_text(meta: dict[str, Any]) -> str:
    """What "meta" says of the training, as text."""
    values = [meta.get("config"), meta.get("cfg")]
    try:
        return " ".join(value[:MAX_CONFIG] if isinstance(value, str) else str(value)[:MAX_CONFIG] for value in values)
    except RecursionError:  # nested so deeply that it is no configuration
        return ""


def read_class_names(meta: dict[str, Any], path: Path) -> tuple[str, ...] | None:
    """The class names in "meta" of 2.x or 3.x, or None. Raises InputError."""
    dataset_meta = meta.get("dataset_meta")  # of 3.x
    merged = {**meta, **dataset_meta} if isinstance(dataset_meta, dict) else meta
    names = merged.get("classes") or merged.get("CLASSES")
    if not names:
        return None
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: the class names in its meta are no strings; save them as a list of strings")
    spaced = tuple(name.replace("_", " ") for name in names)  # old versions write traffic_light
    return COCO_NAMES if spaced == COCO_NAMES else tuple(names)


def read_categories(path: Path, names: tuple[str, ...] | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names and ids of the classes in a COCO file, in its order, which is MMDetection's. Raises InputError.

    Args:
        path: of the file.
        names: those in the checkpoint, or None.
    """
    try:
        pairs = [(str(record["name"]), record["id"]) for record in json.loads(read_regular(path))["categories"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"--categories {path}: cannot be read as a COCO file with 'categories' ({error!r})") from error
    file_names, ids = tuple(name for name, _ in pairs), tuple(category_id for _, category_id in pairs)
    are_integers = all(type(category_id) is int for category_id in ids)
    if not are_integers or len(set(file_names)) < len(pairs) or len(set(ids)) < len(pairs):
        raise InputError(f"--categories {path}: names and ids must be unique, and ids whole numbers")
    if names is not None and sorted(names) != sorted(file_names):
        differing = sorted(set(names) ^ set(file_names))
        raise InputError(
            f"--categories {path}: its {len(file_names)} classes are not the {len(names)} of the checkpoint, they "
            f"differ in {first_names(differing)}; give the file that it was trained on"
        )
    if names is not None and names != file_names:
        # MMDetection numbers classes in the order of its training file, whatever the order of the configured names.
        raise InputError(
            f"--categories {path}: has the checkpoint's classes in another order, so which is which is uncertain; if "
            "the detector was trained on this very file, its order counts: take the names out of the checkpoint's "
            "meta; if not, bring the file's 'categories' into the checkpoint's order"
        )
    return file_names, ids


def import_checkpoint(path: Path, model: str, output: Path, backbone: str | None, categories: Path | None) -> None:
    """Write `output`/model out of MMDetection's checkpoint. Raises InputError, before anything is written."""
    check_output(output)
    if any((output / name).exists() for name in (CONFIG, WEIGHTS, "model")):
        raise InputError(f"--output-dir {output}: holds a run already; choose another folder")
    state, meta, ignored = read_checkpoint(path)
    if setting := INCOMPATIBLE.search(config_text(meta)):
        raise InputError(
            f"{path}: was trained with {' '.join(setting[0].split())}: such weights expect images in another order of "
            "colours (BGR) or normalised otherwise, those of 'caffe' style also stride in another convolution; give a "
            f"file of 'pytorch' style, of RGB images with mean {PIXEL_MEAN} and deviation {PIXEL_STD}"
        )
    names, ids = read_class_names(meta, path), None
    if categories is not None:
        names, ids = read_categories(categories, names)
    elif names == COCO_NAMES:
        ids = COCO_IDS
    detector = detector_from_mmdet(state, model, names, ids, backbone, source=str(path))
    config = detector.config
    with writing(f"--output-dir {output}"):
        save_model(output / "model", detector, [{"stage": "import", "file": path.name, "model": model}])

    computed = [name for name in state if name.endswith(COMPUTED_BUFFERS)]
    loaded, total = len(state) - len(computed), len(detector.state_dict())
    box_head = "" if model.startswith("retinanet") else f", box head {config.box_head}"
    print(f"{loaded} of {loaded} tensors imported: {model}, {config.backbone}{box_head}, {config.channels} channels")
    if loaded < total:
        print(f"not in the file, so 0: {total - loaded} num_batches_tracked")
    if computed:
        kinds = sorted({name.rpartition(".")[2] for name in computed})
        print(f"left out: {len(computed)} buffers that are computed here ({', '.join(kinds)})")
    if ignored:
        print(printable(f"ignored: {', '.join(ignored)}"))
    ends = f"{config.category_ids[0]} to {config.category_ids[-1]}"
    print(f"{len(config.class_names)} classes, ids {ends}: {printable(first_names(config.class_names))}")
    if list(config.category_ids) != sorted(config.category_ids):
        print("their ids do not ascend: predict.py takes the model, evaluate.py and finetune.py need ids that do")
    print(printable(f"written: {output / 'model'}"))


def export_checkpoint(run: str, weights: str, path: Path) -> None:
    """Write a run's model as MMDetection's checkpoint, whole or not at all. Raises InputError."""
    if os.path.lexists(path):
        raise InputError(f"--export {path}: is there already; choose another name")
    check_output(path.parent, "--export")
    folder = model_folder(run, weights)
    detector = from_pretrained(folder)
    classes, state = detector.config.class_names, mmdet_state_dict(detector)
    content = {"meta": {"CLASSES": classes, "dataset_meta": {"classes": classes}}, "state_dict": state}
    with writing(f"--export {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # torch's writer hides the OSError
                raise OSError(str(error).splitlines()[0]) from error
    print(printable(f"weights: {describe_model(folder)}"))
    print(f"{len(state)} tensors, {len(classes)} classes: {printable(first_names(classes))}")
    print(printable(f"written: {path}"))


def main() -> None:
    """Import or export."""
    p = make_parser(__doc__ or "")
    p.add_argument(
        "source",
        type=path_or_name,
        metavar="CHECKPOINT|RUN",
        help="MMDetection's file; with --export a run, or a hub id",
    )
    p.add_argument("--model", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    p.add_argument("--output-dir", type=any_path, metavar="RUN", help="its model/ is written")
    p.add_argument(
        "--backbone", metavar="NAME", help="timm's name of another ResNet, ResNeXt or Swin (paper: by --model)"
    )
    p.add_argument("--categories", type=any_path, metavar="FILE", help="a COCO file with the ids of the classes")
    p.add_argument("--export", type=any_path, metavar="FILE", help="write this checkpoint for MMDetection")
    p.add_argument("--weights", choices=KINDS, help=f"with --export, {WEIGHTS_HELP}")
    args = p.parse_args()

    if args.export is not None:
        if any(value is not None for value in (args.model, args.output_dir, args.backbone, args.categories)):
            raise InputError("--export takes a RUN and no other flag: the run says what it is")
        export_checkpoint(args.source, args.weights or "best", args.export)
        return
    if args.weights is not None:
        raise InputError("--weights says which of a run's are written with --export: leave it out")
    if args.model is None:
        raise InputError(f"--model is missing: one of {', '.join(MODELS)}")
    if args.output_dir is None:
        raise InputError("--output-dir is missing: the run's folder, or --export FILE to write a run as a checkpoint")
    import_checkpoint(Path(args.source), args.model, args.output_dir, args.backbone, args.categories)


if __name__ == "__main__":
    run_program(main)
