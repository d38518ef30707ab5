"""Look a data set over before training: its figures, what is wrong with it, and what to change for it.

  python scripts/check_data.py --data DIR [--output-dir DIR] [--num-workers N]

Reads all annotations and decodes every image. Prints a report and writes it as report.json, with pictures: histograms
of objects, classes and images, and samples of each split with their annotations drawn. Exit status 2 if there are
errors, which training would refuse or skip.
"""

import io
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

from direct_pt.batch import PackedMasks
from direct_pt.data.annotations import AnnotationTable, decode_name
from direct_pt.data.images import READABLE, UnreadableImage, header_sizes
from direct_pt.data.problems import ERROR, NOTE, REPAIRED, Problem, Problems
from direct_pt.data.sources import SPLITS, DataOptions, load_tables
from direct_pt.errors import InputError, printable, run_program
from direct_pt.files import write_json
from direct_pt.flags import add_flags, make_parser, not_negative_integer, read_flags
from direct_pt.models.anchors import Anchors
from direct_pt.models.detector import RetinaNet, TwoStage, build_detector
from direct_pt.recipes import STAGES, recipe_name
from direct_pt.reports.duplicates import Fingerprints, Twins, perceptual_hash, pixel_digest, twins_between, twins_within
from direct_pt.reports.plots import plot_classes, plot_image_sizes, plot_object_sizes
from direct_pt.reports.survey import (
    LEAST_SIDE,
    STAGE_1,
    STAGE_2,
    anchor_recall,
    class_counts,
    describe,
    object_sides,
    proposals,
    size_name,
)
from direct_pt.training.plan import make_plan
from direct_pt.training.settings import ScheduleOptions
from direct_pt.transforms import TestPreset
from direct_pt.visualize import contact_sheet, draw_detections

SAMPLES, CELL = 24, 400  # pictures of a contact sheet, and their side in pixels
SHOWN = 3  # problems of a kind, and pairs of images, that are printed; report.json has all
CLASSES = 40  # that are printed
QUANTILES = ("least", "p10", "median", "p90", "largest")
LEAK = "LEAKED images"
Found = tuple[list[Problem], tuple[int, int, np.ndarray] | None]


class ImageChecks(Dataset[Found]):
    """By image: what is wrong with it, and its fingerprint if it can be read."""

    def __init__(self, table: AnnotationTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Found:
        name = self.table.image_name(row)
        try:
            pixels = self.table.read_image(row)
            notes = [Problem(NOTE, kind, name, text, name) for kind, text in self._notes(row)]
            return notes, (row, pixel_digest(pixels), perceptual_hash(pixels))
        except UnreadableImage as error:
            kind = "unreadable image"
            with suppress(UnreadableImage, OSError):
                if self.table.image_size(row) not in header_sizes(self.table.image_content(row), name)[:2]:
                    kind = "image size"
            return [Problem(ERROR, kind, name, str(error).removeprefix(f"{name}: "), name)], None

    def _notes(self, row: int) -> Iterator[tuple[str, str]]:
        """Kind and text of what the file holds that may surprise."""
        content, size, decoding = self.table.image_content(row), self.table.image_size(row), self.table.decoding
        stored, upright, orientation = header_sizes(content, "")
        if orientation > 1:
            done = f"its EXIF orientation {orientation} is"
            if not decoding.exif:
                yield "EXIF orientation ignored", f"{done} ignored (--exif ignore)"
            elif stored == upright:
                yield (
                    "EXIF orientation, doubtful",
                    f"{done} applied; its size does not tell if its annotation means that",
                )
            elif size == upright:
                yield "EXIF orientation applied", f"{done} applied: its annotation states the size that it has then"
            else:
                yield "EXIF orientation not applied", f"{done} not applied: its annotation states the size as stored"
        with warnings.catch_warnings(action="ignore"), suppress(Image.DecompressionBombError):  # too large to look at
            image = Image.open(io.BytesIO(content), formats=READABLE)
            if image.has_transparency_data:
                yield "transparency", f"transparent pixels are read as {decoding.alpha} (--alpha)"
            if image.mode.startswith(("I", "F")):
                yield "more than 8 bits", f"mode {image.mode} is scaled to 8 bits: look if the samples are too dark"
            if image.mode == "CMYK":
                yield "CMYK", "is converted to RGB without its colour profile"


def _leave_interrupt_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_images(
    tables: dict[str, AnnotationTable], problems: dict[str, Problems], num_workers: int
) -> dict[str, Fingerprints]:
    """Decode every image. What is wrong goes into `problems`; back come the fingerprints of those that can be read."""
    splits = [split for split, table in tables.items() for _ in range(len(table))]
    found: dict[str, list[tuple[int, int, np.ndarray]]] = {split: [] for split in tables}
    images: ConcatDataset[Found] = ConcatDataset(ImageChecks(table) for table in tables.values())
    loader = DataLoader(
        images, batch_size=8, collate_fn=list, num_workers=num_workers, worker_init_fn=_leave_interrupt_to_parent
    )
    checked = (one for batch in loader for one in batch)
    for split, (wrong, fingerprint) in zip(splits, tqdm(checked, "images", len(splits), unit="image"), strict=True):
        for problem in wrong:
            problems[split].add(problem)
        if fingerprint is not None:
            found[split].append(fingerprint)
    return {split: Fingerprints.gather(prints) for split, prints in found.items()}


def find_twins(
    tables: dict[str, AnnotationTable], prints: dict[str, Fingerprints], problems: dict[str, Problems]
) -> list[dict[str, Any]]:
    """The images that are there more than once, for JSON; each is a note of the later split, too."""
    found = []
    for number, second in enumerate(tables):
        pairs: list[tuple[str, Twins]] = [(second, twins) for twins in twins_within(prints[second])]
        for first in list(tables)[:number]:
            pairs += [(first, twins) for twins in twins_between(prints[first], prints[second])]
        for first, twins in pairs:
            names = [tables[first].image_name(twins.first), tables[second].image_name(twins.second)]
            problem = Problem(NOTE, *_twins_note(first, second, names, twins.bits), names[1])
            problems[second].add(problem)
            found.append({"splits": [first, second], "images": names, "kind": problem.kind, "bits": twins.bits})
    return found


def _twins_note(first: str, second: str, names: list[str], bits: int | None) -> tuple[str, str, str]:
    """Kind, file and text of the note."""
    kind, text = f"near-duplicates in {second}", f"looks nearly like {names[0]} ({bits} of 256 bits differ)"
    if bits is None:
        kind, text = f"duplicates in {second}", f"has the same pixels as {names[0]}"
    if first != second:
        kind = f"{LEAK} of {first} in {second}" if bits is None else f"near-duplicates in {first} and {second}"
        text += f" of {first}: the AP on {second} tells less about new images; move one of them"
    return kind, names[1], text


def anchor_figures(table: AnnotationTable) -> dict[str, Any]:
    """anchor_recall at the sizes of both stages, of both kinds of detectors' anchors."""
    two_stage, one_stage = (build_detector(f"{name}_r50_fpn", 1, "resnet18") for name in ("faster_rcnn", "retinanet"))
    assert isinstance(two_stage, TwoStage) and isinstance(one_stage, RetinaNet)
    kinds: dict[str, Anchors] = {"RPN": two_stage.rpn.anchors, "RetinaNet": one_stage.head.anchors}
    return {
        size_name(preset): {kind: anchor_recall(table, preset, anchors) for kind, anchors in kinds.items()}
        for preset in (STAGE_1, STAGE_2)
    }


def schedules(images: int) -> dict[str, Any]:
    """What the recipe's two stages will do with so many training images."""
    found = {}
    for name, stage in STAGES.items():
        recipe = stage.recipe("faster_rcnn_r50_fpn", False, recipe_name("auto", images))
        plan = make_plan(ScheduleOptions(), recipe, images, processes=1)
        found[name] = {
            "recipe": recipe.name, "steps": plan.total_steps, "images_a_step": plan.global_batch_size,
            "epochs": round(plan.epochs, 1), "lr": plan.lr, "warmup_steps": plan.warmup_steps,
            "notes": list(plan.notes),
        }  # fmt: skip
    return found


def draw_samples(table: AnnotationTable, readable: np.ndarray) -> Image.Image:
    """A contact sheet of some images, those with objects first, with their annotations drawn."""
    rng, preset, pictures = np.random.default_rng(0), TestPreset(CELL, CELL), []
    rows = rng.permutation(readable)
    rows = rows[np.argsort(table.targets_per_image()[rows] == 0, kind="stable")][:SAMPLES]
    for row in rows.tolist():
        sample = preset(table.read_image(row), table.objects(row, with_masks=True), rng)
        objects, image = sample.objects, Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        names = [table.class_names[label][:16] for label in objects.labels.tolist()]
        captions = [name + " (crowd)" * crowd for name, crowd in zip(names, objects.crowd.tolist(), strict=True)]
        masks = whole_masks(sample.masks, (image.height, image.width)) if sample.masks else None
        pictures.append(draw_detections(image, objects.boxes, objects.labels, captions, masks))
    return contact_sheet(pictures, [decode_name(table.file_names[row]) for row in rows], CELL)


def whole_masks(masks: PackedMasks, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """[height, width] bool each, one after another; of one that is drawn larger than life every few pixels."""
    for number, zoom in enumerate(masks.zooms.tolist()):
        x1, y1, x2, y2 = masks.windows[number].tolist()
        fine = masks.bits[masks.offsets[number] : masks.offsets[number + 1]].view(y2 - y1, x2 - x1).numpy()
        rows, columns = np.arange(-(-y1 // zoom), -(-y2 // zoom)), np.arange(-(-x1 // zoom), -(-x2 // zoom))
        mask = np.zeros(size, bool)
        mask[np.ix_(rows, columns)] = fine[np.ix_(rows * zoom - y1, columns * zoom - x1)]
        yield mask


def write_pictures(tables: dict[str, AnnotationTable], prints: dict[str, Fingerprints], folder: Path) -> list[str]:
    """The histograms and contact sheets. Back come the files' names. Raises OSError."""
    files = ["object_sizes.png", "image_sizes.png", "classes.png"]
    in_files = {split: object_sides(table) for split, table in tables.items()}
    resized = {split: object_sides(table, STAGE_1) for split, table in tables.items()}
    panels = {"object sizes in the files": in_files, f"object sizes in stage 1, at {size_name(STAGE_1)}": resized}
    plot_object_sizes(
        panels, {LEAST_SIDE: "hardly learnt below", 32.0: "smallest anchor of the RPN"}, folder / files[0]
    )
    plot_image_sizes({split: table.sizes for split, table in tables.items()}, folder / files[1])
    counts = {split: class_counts(table)[1] for split, table in tables.items()}
    plot_classes(next(iter(tables.values())).class_names, counts, folder / files[2])
    for split, table in tables.items():
        if len(prints[split].rows):
            files.append(f"samples_{split}.jpg")
            draw_samples(table, prints[split].rows).save(folder / files[-1], quality=90)
    return files


def report_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"Data check: {report['data']}", ""]
    for split, of in report["splits"].items():
        sides, sizes = of["object_sides"], of["image_sizes"]
        frequent = ", ".join(f"{s['width']}x{s['height']} ({s['images']})" for s in sizes["most_frequent"][:3])
        lines += [
            f"{split}: {of['images']} images ({of['images_without_objects']} without objects), {of['objects']} objects "
            f"({of['objects_with_outline']} with an outline), {of['crowd_regions']} crowd regions, "
            f"{of['boxes_under_1_pixel']} boxes under 1 pixel; from {of['source']}",
            f"    image sizes    {sizes['different']} different: {frequent}{', ...' * (sizes['different'] > 3)}",
            f"    object sizes   {_spread(sides['in_files'])} in the files",
        ]
        for stage, preset in (("stage_1", STAGE_1), ("stage_2", STAGE_2)):
            small = f"{sides[stage]['share_under_8_pixels']:.1%} under 8"
            lines.append(f"                   {_spread(sides[stage])} at {size_name(preset)}, {small}")
    lines += ["    (square roots of the boxes' areas in pixels: least / 10 % / median / 90 % / largest)", ""]
    lines += _class_table(report["splits"])
    for grade, title in ((ERROR, "errors"), (REPAIRED, "repaired"), (NOTE, "notes")):
        lines += ["", f"{title}: {report['counts'][grade] or 'none'}"]
        lines += _problem_lines([problem for problem in report["problems"] if problem["grade"] == grade])
    lines += _anchor_table(report["anchors"])
    for stage, of in report["schedules"].items():
        length = f"{of['steps']} steps of {of['images_a_step']} images = {of['epochs']:g} epochs"
        lines += ["", f"{stage}: {length}, by the {of['recipe']} recipe"]
        lines += [f"    {note}" for note in of["notes"]]
    lines += ["", f"proposals: {len(report['proposals']) or 'none'}", *(f"  * {line}" for line in report["proposals"])]
    return "\n".join(lines)


def _spread(values: dict[str, float | None]) -> str:
    return " / ".join("-" if values[key] is None else f"{values[key]:.4g}" for key in QUANTILES)


def _class_table(splits: dict[str, Any]) -> list[str]:
    """Objects and images of each class in each split, the most frequent first."""
    columns = {split: {one["id"]: one for one in of["classes"]} for split, of in splits.items()}
    names = {number: one["name"] for of in columns.values() for number, one in of.items()}
    total = {number: sum(of[number]["objects"] for of in columns.values()) for number in names}
    order = sorted(names, key=lambda number: -total[number])
    lines = [f"{'class':<32}" + "".join(f"{f'{split}: objects':>16}{'in images':>11}" for split in columns)]
    for number in order[:CLASSES]:
        counts = "".join(f"{of[number]['objects']:>16}{of[number]['images']:>11}" for of in columns.values())
        lines.append(f"{f'{number} {names[number]}':<32.32}{counts}")
    return lines + ([f"and {len(order) - CLASSES} more in report.json"] if len(order) > CLASSES else [])


def _problem_lines(problems: list[dict[str, Any]]) -> list[str]:
    lines = []
    for kind, count in Counter(problem["kind"] for problem in problems).most_common():
        lines.append(f"  {count} x {kind}")
        for one in [problem for problem in problems if problem["kind"] == kind][:SHOWN]:
            where = [f"{key} {one[key]}" for key in ("image", "annotation") if one[key] not in (None, one["file"])]
            lines.append(f"      {one['file']}: {one['message']}" + (f" [{', '.join(where)}]" if where else ""))
        lines += [f"      and {count - SHOWN} more in report.json"] if count > SHOWN else []
    return lines


def _anchor_table(anchors: dict[str, Any]) -> list[str]:
    """Shares of objects with a good anchor, and of how many."""
    rows = [(size, kind, groups) for size, kinds in anchors.items() for kind, groups in kinds.items()]
    titles = {"wide": "over 3:1", "between": "between", "tall": "under 1:3"}
    lines: list[str] = []
    for size, kind, groups in rows:
        if not lines:
            columns = "".join(f"{titles.get(name, name):>14}" for name in groups)
            lines = ["", f"{'anchors, IoU 0.5 or more':<28}{columns}"]
        shares = [f"{of['recall']:.0%} of {of['objects']}" if of["objects"] else "-" for of in groups.values()]
        lines.append(f"    {f'{kind}, {size}':<24}" + "".join(f"{share:>14}" for share in shares))
    return lines


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what writes there. Raises InputError where that fails."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--output-dir {folder}: cannot be written ({error})") from error


def main() -> None:
    """Check a data set."""
    p = make_parser(__doc__ or "")
    add_flags(p, DataOptions, "data")
    text = "where report.json and the pictures go (runs/check_data)"
    p.add_argument("--output-dir", type=Path, default=Path("runs/check_data"), metavar="DIR", help=text)
    text = "processes that decode images (2)"
    p.add_argument("--num-workers", type=not_negative_integer, default=2, metavar="N", help=text)
    args = p.parse_args()
    if args.streaming:
        raise InputError("--streaming: all images are read here: leave it out, or check a part of the data")

    folder: Path = args.output_dir
    problems = {split: Problems(collects=True) for split in SPLITS}
    tables = {
        split: table
        for split, table in load_tables(read_flags(args, DataOptions), SPLITS, problems).items()
        if len(table)
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    prints = check_images(tables, problems, args.num_workers) if tables else {}
    twins = find_twins(tables, prints, problems)
    leaks = [
        f"{count} image(s) stand in two splits ({kind}): the AP there is not that on new images; take them out of one"
        for kind, count in Counter(pair["kind"] for pair in twins if LEAK in pair["kind"]).items()
    ]
    train = tables.get("train")
    anchors = anchor_figures(train) if train else {}
    listed = [asdict(one) | {"split": split} for split, of in problems.items() for one in of.listed]
    report: dict[str, Any] = {
        "data": str(args.data or " ".join(table.source for table in tables.values())),
        "splits": {split: describe(table) for split, table in tables.items()},
        "counts": {grade: sum(one["grade"] == grade for one in listed) for grade in (ERROR, REPAIRED, NOTE)},
        "problems": listed,
        "duplicates": twins,
        "anchors": anchors,
        "schedules": schedules(len(train)) if train else {},
        "proposals": leaks + proposals(tables, anchors),
    }
    with writing(folder):
        report["pictures"] = write_pictures(tables, prints, folder) if tables else []
        write_json(folder / "report.json", report)
    print("\n".join(map(printable, report_text(report).split("\n"))))
    print(f"\nwritten to {folder}: {', '.join(['report.json', *report['pictures']])}")
    errors = [problem for of in problems.values() for problem in of.listed if problem.grade == ERROR]
    if errors:
        raise InputError(f"{len(errors)} error(s) in the data, all in {folder / 'report.json'}; first: {errors[0]}")


if __name__ == "__main__":
    run_program(main)
