"""The report of check_data.py: its text, its histograms, and samples with their annotations drawn."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from direct_pt.batch import PackedMasks
from direct_pt.data.annotations import AnnotationTable, decode_name
from direct_pt.data.problems import ERROR, NOTE, REPAIRED
from direct_pt.errors import printable
from direct_pt.files import replacing
from direct_pt.images.visualize import contact_sheet, draw_detections, drawable_name
from direct_pt.reports.duplicates import Fingerprints
from direct_pt.reports.plots import plot_classes, plot_image_sizes, plot_object_sizes
from direct_pt.reports.survey import MIN_OBJECT_SIDE, STAGE_1, STAGE_2, class_counts, object_sides, size_name
from direct_pt.transforms import TestPreset

MAX_SAMPLES, CELL = 24, 400  # pictures on a contact sheet, and their side in pixels
MAX_PROBLEMS = 3  # problems of a kind that are printed; report.json has all of them
MAX_CLASSES = 40  # classes that are printed
QUANTILES = ("least", "p10", "median", "p90", "largest")


# Text


def report_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"Data check: {report['data']}", ""]
    for split, figures in report["splits"].items():
        sides, sizes = figures["object_sides"], figures["image_sizes"]
        frequent = ", ".join(f"{s['width']}x{s['height']} ({s['images']})" for s in sizes["most_frequent"][:3])
        lines += [
            f"{split}: {figures['images']} images ({figures['images_without_objects']} without objects), "
            f"{figures['objects']} objects ({figures['objects_with_outline']} with an outline), "
            f"{figures['crowd_regions']} crowd regions, {figures['boxes_under_1_pixel']} boxes under 1 pixel; "
            f"from {figures['source']}",
            f"    image sizes    {sizes['different']} different: {frequent}{', ...' * (sizes['different'] > 3)}",
            f"    object sizes   {_quantiles(sides['in_files'])} in the files",
        ]
        for stage, preset in (("stage_1", STAGE_1), ("stage_2", STAGE_2)):
            small = f"{sides[stage]['share_under_8_pixels']:.1%} under 8"
            lines.append(f"                   {_quantiles(sides[stage])} at {size_name(preset)}, {small}")
    lines += ["    (square roots of the boxes' areas in pixels: least / 10 % / median / 90 % / largest)", ""]
    lines += _class_table(report["splits"])
    for grade, title in ((ERROR, "errors"), (REPAIRED, "repaired"), (NOTE, "notes")):
        lines += ["", f"{title}: {report['counts'][grade] or 'none'}"]
        lines += _problem_lines([problem for problem in report["problems"] if problem["grade"] == grade])
    lines += _anchor_table(report["anchors"])
    for stage, schedule in report["schedules"].items():
        length = f"{schedule['steps']} steps of {schedule['images_per_step']} images = {schedule['epochs']:g} epochs"
        lines += ["", f"{stage}: {length}, by the {schedule['recipe']} recipe"]
        lines += [f"    {note}" for note in schedule["notes"]]
    lines += ["", f"advice: {len(report['advice']) or 'none'}", *(f"  * {line}" for line in report["advice"])]
    return "\n".join(map(printable, lines))  # each is one line, whatever names are in it


def _quantiles(values: dict[str, float | None]) -> str:
    return " / ".join("-" if values[key] is None else f"{values[key]:.4g}" for key in QUANTILES)


def _class_table(splits: dict[str, Any]) -> list[str]:
    """Objects and images of each class in each split, the most frequent class first."""
    columns = {split: {row["id"]: row for row in figures["classes"]} for split, figures in splits.items()}
    names = {number: row["name"] for column in columns.values() for number, row in column.items()}
    total = {number: sum(column[number]["objects"] for column in columns.values()) for number in names}
    order = sorted(names, key=lambda number: -total[number])
    lines = [f"{'class':<32}" + "".join(f"{f'{split}: objects':>16}{'in images':>11}" for split in columns)]
    for number in order[:MAX_CLASSES]:
        cells = [f"{column[number]['objects']:>16}{column[number]['images']:>11}" for column in columns.values()]
        lines.append(f"{f'{number} {names[number]}':<32.32}" + "".join(cells))
    return lines + ([f"and {len(order) - MAX_CLASSES} more in report.json"] if len(order) > MAX_CLASSES else [])


def _problem_lines(problems: list[dict[str, Any]]) -> list[str]:
    """The most frequent kinds of problems first, with some examples each."""
    lines = []
    for kind, count in Counter(problem["kind"] for problem in problems).most_common():
        lines.append(f"  {count} x {kind}")
        for row in [problem for problem in problems if problem["kind"] == kind][:MAX_PROBLEMS]:
            places = [f"{key} {row[key]}" for key in ("image", "annotation") if row[key] not in (None, row["file"])]
            lines.append(f"      {row['file']}: {row['message']}" + (f" [{', '.join(places)}]" if places else ""))
        lines += [f"      and {count - MAX_PROBLEMS} more in report.json"] if count > MAX_PROBLEMS else []
    return lines


def _anchor_table(anchors: dict[str, Any]) -> list[str]:
    """The share of objects with a good anchor, by size and shape, for each image size and kind of anchors."""
    rows = [(size, kind, groups) for size, kinds in anchors.items() for kind, groups in kinds.items()]
    titles = {"wide": "over 3:1", "between": "between", "tall": "under 1:3"}
    lines: list[str] = []
    for size, kind, groups in rows:
        if not lines:
            columns = "".join(f"{titles.get(name, name):>14}" for name in groups)
            lines = ["", f"{'anchors, IoU 0.5 or more':<28}{columns}"]
        shares = [
            f"{group['recall']:.0%} of {group['objects']}" if group["objects"] else "-" for group in groups.values()
        ]
        lines.append(f"    {f'{kind}, {size}':<24}" + "".join(f"{share:>14}" for share in shares))
    return lines


# Pictures


def picture_names(splits: Iterable[str]) -> list[str]:
    """The names of the files that `write_pictures` may write."""
    return ["object_sizes.png", "image_sizes.png", "classes.png", *(f"samples_{split}.jpg" for split in splits)]


def write_pictures(tables: dict[str, AnnotationTable], prints: dict[str, Fingerprints], folder: Path) -> list[str]:
    """Write the histograms and the samples of the readable images. Returns the files' names. Raises OSError."""
    files = picture_names(split for split in tables if len(prints[split].rows))
    in_files = {split: object_sides(table) for split, table in tables.items()}
    resized = {split: object_sides(table, STAGE_1) for split, table in tables.items()}
    panels = {"object sizes in the files": in_files, f"object sizes in stage 1, at {size_name(STAGE_1)}": resized}
    marks = {MIN_OBJECT_SIDE: "hardly learnt below", 32.0: "smallest anchor of the RPN"}
    plot_object_sizes(panels, marks, folder / files[0])
    plot_image_sizes({split: table.sizes for split, table in tables.items()}, folder / files[1])
    counts = {split: class_counts(table)[1] for split, table in tables.items()}
    first = next(iter(tables.values()))
    plot_classes(first.class_names, counts, folder / files[2], first.category_ids)
    for split, table in tables.items():
        if len(prints[split].rows):
            with replacing(folder / f"samples_{split}.jpg", to_disk=False) as temporary:
                draw_samples(table, prints[split].rows).save(temporary, "JPEG", quality=90)
    return files


def draw_samples(table: AnnotationTable, readable: np.ndarray) -> Image.Image:
    """A contact sheet of random images, those with objects first, with their annotations drawn.

    Args:
        table: of the images.
        readable: rows of the images to choose from.
    """
    rng, preset, pictures = np.random.default_rng(0), TestPreset(CELL, CELL), []
    rows = rng.permutation(readable)
    rows = rows[np.argsort(table.targets_per_image()[rows] == 0, kind="stable")][:MAX_SAMPLES]
    class_names = [drawable_name(*pair) for pair in zip(table.class_names, table.category_ids, strict=True)]
    for row in rows.tolist():
        sample = preset(table.read_image(row), table.objects(row, with_masks=True), rng)
        objects, image = sample.objects, Image.fromarray(sample.image.permute(1, 2, 0).numpy())
        names = [class_names[label][:16] for label in objects.labels.tolist()]
        captions = [name + " (crowd)" * crowd for name, crowd in zip(names, objects.crowd.tolist(), strict=True)]
        masks = whole_masks(sample.masks, (image.height, image.width)) if sample.masks else None
        pictures.append(draw_detections(image, objects.boxes, objects.labels, captions, masks))
    return contact_sheet(pictures, [decode_name(table.file_names[row]) for row in rows], CELL)


def whole_masks(masks: PackedMasks, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Each mask as [height, width] bool, one after another; supersampled ones are read at every `zoom`-th pixel."""
    for number, zoom in enumerate(masks.zooms.tolist()):
        x1, y1, x2, y2 = masks.windows[number].tolist()
        fine = masks.bits[masks.offsets[number] : masks.offsets[number + 1]].view(y2 - y1, x2 - x1).numpy()
        rows, columns = np.arange(-(-y1 // zoom), -(-y2 // zoom)), np.arange(-(-x1 // zoom), -(-x2 // zoom))
        mask = np.zeros(size, bool)
        mask[np.ix_(rows, columns)] = fine[np.ix_(rows * zoom - y1, columns * zoom - x1)]
        yield mask
