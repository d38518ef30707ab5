"""Figures about the annotations of a data set, and what the recipe should change for it. No image is read.

An object's side is the square root of its box's area. Sides are compared with what stage 1 (448x448) and stage 2
(1333x800) can learn, in the pixels that the detector sees.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from direct_pt.batch import Objects
from direct_pt.data.annotations import AnnotationTable
from direct_pt.images.decoding import Size
from direct_pt.images.tiles import MIN_SIDE, Tiling
from direct_pt.models.anchors import Anchors
from direct_pt.models.detector import RetinaNet, TwoStage, build_detector
from direct_pt.recipes import IMAGE_SIZE, LONG_SIDE
from direct_pt.transforms import Preset, PretrainPreset, TestPreset

MIN_OBJECT_SIDE = 8.0  # pixels: a smaller object covers hardly two cells a side of the finest map, of stride 4
MAX_SMALL_SHARE = 0.1  # of the objects may be smaller than that
MAX_IMAGE_SIZE = LONG_SIDE // 32 * 32  # the largest that is proposed for stage 1
MAX_ANCHOR_OBJECTS = 20_000  # objects that are compared with the anchors
SIZE_CLASSES = {"small": (0, 32), "medium": (32, 96), "large": (96, np.inf)}  # sides in pixels, COCO's
SHAPES = {"wide": (3, np.inf), "between": (1 / 3, 3), "tall": (0, 1 / 3)}  # width / height
MIN_RECALL, MIN_GROUP_SHARE = 0.5, 0.05  # a group of objects with less recall is reported, if it is not too small
MIN_CLASS_SHARE = 0.001  # of the images; a class in fewer is rare
MIN_VALIDATION_OBJECTS = 50
MAX_NAMES = 5  # classes that one sentence names


def whole_image(image_size: int, canvas: Size | None = None) -> PretrainPreset:
    """Stage 1 without its random choices: the whole image fits exactly."""
    return PretrainPreset(image_size, scale_range=(1.0, 1.0), flips="none", canvas=canvas)


STAGE_1, STAGE_2 = whole_image(IMAGE_SIZE), TestPreset()


# Figures


def describe(table: AnnotationTable) -> dict[str, Any]:
    """The figures of one split, for JSON.

    "objects" are the training targets: no crowd regions, and no boxes of which less than a pixel lies in the image.
    """
    in_images, objects = class_counts(table)
    sizes, counts = np.unique(table.sizes, axis=0, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:10]
    rows = zip(table.category_ids, table.class_names, objects, in_images, strict=True)
    return {
        "source": table.source,
        "images": len(table),
        "images_without_objects": int((table.targets_per_image() == 0).sum()),
        "objects": int(objects.sum()),
        "crowd_regions": int(table.crowd.sum()),
        "boxes_under_1_pixel": int((~table.usable()).sum()),
        "objects_with_outline": int(table.segmentations.present()[_is_target(table)].sum()),
        "objects_per_image": _quantiles(table.targets_per_image()),
        "classes": [{"id": i, "name": name, "objects": int(n), "images": int(m)} for i, name, n, m in rows],
        "image_sizes": {
            "different": len(sizes),
            "most_frequent": [
                {"width": int(sizes[row, 1]), "height": int(sizes[row, 0]), "images": int(counts[row])}
                for row in frequent
            ],
            "width": _quantiles(table.sizes[:, 1]),
            "height": _quantiles(table.sizes[:, 0]),
            "aspect_ratio": _quantiles(table.sizes[:, 1] / table.sizes[:, 0]),
        },
        "object_sides": {
            "in_files": _quantiles(object_sides(table)),
            **{
                name: _quantiles(object_sides(table, preset)) | {"share_under_8_pixels": share_small(table, preset)}
                for name, preset in (("stage_1", STAGE_1), ("stage_2", STAGE_2))
            },
        },
    }


def class_counts(table: AnnotationTable) -> tuple[np.ndarray, np.ndarray]:
    """[C] in how many images each class occurs, and [C] how many objects it has."""
    _, images, labels = _targets(table)
    classes = len(table.class_names)
    pairs = np.sort(images * classes + labels, kind="stable")  # nearly sorted already: much faster than np.unique
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    return np.bincount(pairs % classes, minlength=classes), np.bincount(labels, minlength=classes)


def object_sides(table: AnnotationTable, preset: Preset | None = None) -> np.ndarray:
    """[T] sides of the target objects, in pixels of the files, or as a preset without random choices resizes them."""
    boxes, images, _ = _targets(table)
    if preset is not None:
        boxes = boxes * np.tile(_scales_and_frames(table, preset)[0], 2)[images]
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))


def share_small(table: AnnotationTable, preset: Preset) -> float:
    """The share of the objects with a side under MIN_OBJECT_SIDE as `preset` resizes them; 0 without objects."""
    sides = object_sides(table, preset)
    return float((sides < MIN_OBJECT_SIDE).mean()) if len(sides) else 0.0


def fitting_image_size(table: AnnotationTable) -> tuple[int, float]:
    """The --image-size to use, a multiple of 32, and the share of objects that are too small at it.

    The smallest size from the recipe's up at which that share is at most MAX_SMALL_SHARE, else MAX_IMAGE_SIZE.
    """
    sides, size, share = object_sides(table, STAGE_1) / IMAGE_SIZE, IMAGE_SIZE, 0.0
    for size in range(IMAGE_SIZE, MAX_IMAGE_SIZE + 1, 32) if len(sides) else ():
        share = float((sides * size < MIN_OBJECT_SIDE).mean())
        if share <= MAX_SMALL_SHARE:
            break
    return size, share


def fitting_tiles(table: AnnotationTable, image_size: int) -> str:
    """The --train-tiles to use for stage 1's images of `image_size`, and what it does, in words.

    It is the largest multiple of 32 at which at most MAX_SMALL_SHARE of the objects are too small, where there is one.
    """
    sides = object_sides(table)
    fitting = int(np.quantile(sides, MAX_SMALL_SHARE) * image_size / MIN_OBJECT_SIDE) // 32 * 32
    tile = max(MIN_SIDE, fitting)
    rest = float((sides * image_size / tile < MIN_OBJECT_SIDE).mean())
    height, width = np.median(table.sizes, axis=0).astype(int).tolist()
    return f"--train-tiles {tile} (about {len(Tiling(tile).windows((height, width)))} of an image; leaves {rest:.0%})"


def nothing_to_learn(table: AnnotationTable) -> str:
    """Why nobody can train on these images, and what to do; empty if someone can."""
    if table.targets_per_image().any():
        return ""
    reason = "annotate some"
    if len(table.boxes):
        reason = (
            "all of them are crowd regions (iscrowd 1, difficult), which nothing learns from"
            if table.crowd.all()
            else "those that are no crowd regions are under a pixel in their image"
        )
    return f"no image has an object to learn ({len(table)} images, {len(table.boxes)} objects); {reason}"


def _is_target(table: AnnotationTable) -> np.ndarray:
    """[M] bool, whether an object is a training target."""
    return table.usable() & ~table.crowd


def _targets(table: AnnotationTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corner boxes [T, 4], image rows [T] and labels [T] of the training targets."""
    rows = _is_target(table)
    images = table.image_of_object()
    return table.corner_boxes()[rows], images[rows], table.labels[rows]


def _scales_and_frames(table: AnnotationTable, preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    """[N, 2] (x, y) factors by which each image is resized, and [N, 2] (height, width) that it is padded to."""
    # Both sides in one number: np.unique sorts numbers many times as fast as rows.
    sizes, row = np.unique(table.sizes[:, 0].astype(np.int64) * 2**32 + table.sizes[:, 1], return_inverse=True)
    rng, scales, frames = np.random.default_rng(0), [], []
    for height, width in (divmod(size, 2**32) for size in sizes.tolist()):
        geometry = preset.geometry((height, width), Objects.none(), rng)
        scales.append(geometry.scale)
        frames.append(preset.padded_size(geometry.size))
    return np.array(scales)[row], np.array(frames)[row]


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    """The smallest value, the 10th, 50th and 90th percentile, and the largest value."""
    found = np.percentile(values, (0, 10, 50, 90, 100)).tolist() if len(values) else [None] * 5
    return dict(zip(("least", "p10", "median", "p90", "largest"), map(_rounded, found), strict=True))


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)


# Anchors


def anchor_figures(table: AnnotationTable) -> dict[str, dict[str, Any]]:
    """`anchor_recall` at the image sizes of both stages, for the anchors of the RPN and of RetinaNet."""
    two_stage, one_stage = (build_detector(f"{name}_r50_fpn", 1, "resnet18") for name in ("faster_rcnn", "retinanet"))
    assert isinstance(two_stage, TwoStage) and isinstance(one_stage, RetinaNet)
    kinds: dict[str, Anchors] = {"RPN": two_stage.rpn.anchors, "RetinaNet": one_stage.head.anchors}
    return {
        size_name(preset): {kind: anchor_recall(table, preset, anchors) for kind, anchors in kinds.items()}
        for preset in (STAGE_1, STAGE_2)
    }


def anchor_recall(table: AnnotationTable, preset: Preset, anchors: Anchors) -> dict[str, Any]:
    """How well the anchors fit the objects: an object is recalled if an anchor has an IoU of at least 0.5 with it.

    Returns:
        For "all" objects, and by classes of size and of shape: their number "objects"; the share "recall"; and the
        share "under_0.3" whose best IoU is below that: the RPN never learns to propose these. None without objects.
    """
    boxes, images, _ = _targets(table)
    if len(boxes) > MAX_ANCHOR_OBJECTS:
        chosen = np.random.default_rng(0).choice(len(boxes), MAX_ANCHOR_OBJECTS, replace=False)
        boxes, images = boxes[chosen], images[chosen]
    scales, frames = _scales_and_frames(table, preset)
    boxes = boxes * np.tile(scales, 2)[images]
    ious = best_ious(boxes, frames[images], anchors)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    groups = {"all": np.ones(len(boxes), bool)}
    for values, classes in ((np.sqrt(width * height), SIZE_CLASSES), (width / height, SHAPES)):
        groups |= {name: (values >= low) & (values < high) for name, (low, high) in classes.items()}
    figures = {}
    for name, rows in groups.items():
        of_group = ious[rows]
        recall, missed = ((of_group >= 0.5).mean(), (of_group < 0.3).mean()) if len(of_group) else (None, None)
        figures[name] = {"objects": len(of_group), "recall": _rounded(recall), "under_0.3": _rounded(missed)}
    return figures


def best_ious(boxes: np.ndarray, frames: np.ndarray, anchors: Anchors) -> np.ndarray:
    """[T] the highest IoU that any anchor has with each box.

    Among the equal anchors of a level, the one whose centre is nearest to the box's has the highest IoU, whatever its
    shape: the overlap along an axis never grows with the distance of the centres. So the grid need not be searched.

    Args:
        boxes: [T, 4] corners in pixels of the padded image.
        frames: [T, 2] (height, width) that each box's image is padded to.
        anchors: of all levels.
    """
    strides = np.repeat(anchors.strides, anchors.per_cell)[:, None]
    cells = np.tile(anchors.cell_anchors.numpy(), (len(anchors.strides), 1))
    sides = (cells[:, 2:] - cells[:, :2]) * strides  # [A, 2], of all levels
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    last = -(-frames[:, None, ::-1] // strides) - 1
    nearest = np.clip(np.rint(centres / strides), 0, last) * strides  # [T, A, 2]
    low = np.maximum(nearest - sides / 2, boxes[:, None, :2])
    high = np.minimum(nearest + sides / 2, boxes[:, None, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return (shared / (areas[:, None] + sides.prod(axis=1) - shared)).max(axis=1, initial=0)


# Advice


def summary(tables: Mapping[str, AnnotationTable], preset: Preset) -> list[str]:
    """At most six lines for a run's start: how large its objects are, and what may be wrong with the data.

    Args:
        tables: by split; "train" is one of them.
        preset: how the stage resizes images, without random choices: whole_image(image_size), or a TestPreset.
    """
    sides = object_sides(tables["train"], preset)
    lines = []
    if len(sides):
        low, middle, high = np.percentile(sides, (10, 50, 90))
        lines.append(
            f"objects at {size_name(preset)}: a tenth are under {low:.0f} pixels (square root of the box's area), half "
            f"under {middle:.0f}, a tenth above {high:.0f}"
        )
    return [*lines, *_small_objects(tables["train"], preset), *_classes(tables), *_splits(tables)][:6]


def advice(tables: Mapping[str, AnnotationTable], recalls: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to change for this data set, one sentence each.

    Args:
        tables: by split.
        recalls: `anchor_figures` of the training split.
    """
    lines = [
        line for preset in (STAGE_1, STAGE_2) if "train" in tables for line in _small_objects(tables["train"], preset)
    ]
    first, second = (recalls.get(size_name(stage), {}) for stage in (STAGE_1, STAGE_2))
    lines += _anchors(
        first,
        SIZE_CLASSES,
        STAGE_1,
        "stage 2 learns them, or stage 1 with --anchor-scale auto, or a larger --image-size",
    )
    lines += _anchors(second, SIZE_CLASSES, STAGE_2, "raise --short-side and --long-side")
    lines += _anchors(second, SHAPES, STAGE_2, "the recipe's anchors are 1:2, 1:1 and 2:1")
    return [*lines, *_classes(tables), *_splits(tables)]


def _anchors(recalls: Mapping[str, Any], groups: Iterable[str], preset: Preset, remedy: str) -> list[str]:
    """The groups of objects that are large enough and fit the anchors badly. `recalls` by kind of anchors."""
    lines = []
    for group in groups:
        found = {kind: figures[group]["recall"] for kind, figures in recalls.items()}
        shares = [figures[group]["objects"] / max(figures["all"]["objects"], 1) for figures in recalls.values()]
        share = max(shares, default=0.0)
        if share >= MIN_GROUP_SHARE and min(found.values()) < MIN_RECALL:
            percentages = ", ".join(f"{recall:.0%} ({kind})" for kind, recall in found.items())
            lines.append(
                f"{share:.0%} of the objects are {group} at {size_name(preset)}, and of these only {percentages} share "
                f"an IoU of 0.5 with an anchor: {remedy}"
            )
    return lines


def _small_objects(table: AnnotationTable, preset: Preset) -> list[str]:
    """Whether too many objects are too small, and what to do about it."""
    share = share_small(table, preset)
    if share <= MAX_SMALL_SHARE:
        return []
    line = (
        f"{share:.0%} of the training objects are under {MIN_OBJECT_SIDE:g} pixels at {size_name(preset)}, hardly "
        "learnt: "
    )
    if not isinstance(preset, PretrainPreset):
        return [f"{line}raise --short-side and --long-side, or give {fitting_tiles(table, IMAGE_SIZE)}"]
    size, rest = fitting_image_size(table)
    if rest > MAX_SMALL_SHARE:
        return [f"{line}{rest:.0%} still at {size}x{size}; give {fitting_tiles(table, preset.image_size)}"]
    cost = (size / preset.image_size) ** 2
    return [f"{line}--image-size {size} leaves {rest:.0%}, at {cost:.1f} times the pixels a step"]


def _classes(tables: Mapping[str, AnnotationTable]) -> list[str]:
    """Classes that are absent or rare."""

    def names(table: AnnotationTable, rows: np.ndarray) -> str:
        listed = ", ".join(table.class_names[row] for row in rows[:MAX_NAMES])
        return listed + (f" and {len(rows) - MAX_NAMES} more" if len(rows) > MAX_NAMES else "")

    lines = []
    for split, table in tables.items():
        in_images, objects = class_counts(table)
        absent = np.flatnonzero(objects == 0)
        if len(absent):
            effect = "they cannot be learnt" if split == "train" else "their AP is unknown"
            count = f"{len(absent)} of {len(objects)} classes"
            lines.append(f"{count} have no object in {split} ({names(table, absent)}): {effect}")
        rare = np.flatnonzero((objects > 0) & (in_images < MIN_CLASS_SHARE * len(table)))
        if len(rare) and split == "train":
            lines.append(
                f"{len(rare)} of {len(objects)} classes occur in under {MIN_CLASS_SHARE:.1%} of the training images "
                f"({names(table, rare)}): --repeat-threshold {MIN_CLASS_SHARE:g} shows those images more often"
            )
    return lines


def _splits(tables: Mapping[str, AnnotationTable]) -> list[str]:
    """Splits that are missing, small, or mostly empty."""
    lines = []
    empty = float((tables["train"].targets_per_image() == 0).mean()) if "train" in tables else 0.0
    if 0.5 < empty < 1:
        lines.append(f"{empty:.0%} of the training images have no object: --drop-empty trains on the others alone")
    if "val" not in tables:
        lines.append("there is no validation split: the AP stays unknown, and no best weights are kept")
    for split in tables:
        objects = int(tables[split].targets_per_image().sum())
        if split != "train" and not objects:
            count = len(tables[split])
            lines.append(
                f"none of the {count} images of {split} has an object to find: its AP stays -1 (unknown), and no best "
                "weights are kept"
            )
        elif split != "train" and objects < MIN_VALIDATION_OBJECTS:
            lines.append(f"{split} has {objects} objects: under {MIN_VALIDATION_OBJECTS}, its AP is mostly chance")
    return lines


def size_name(preset: Preset) -> str:
    """The image size of a preset as reports write it: 448x448, 1333x800."""
    if isinstance(preset, PretrainPreset):
        return f"{preset.frame[1]}x{preset.frame[0]}"
    return f"{preset.long_side}x{preset.short_side}" if isinstance(preset, TestPreset) else str(preset)
