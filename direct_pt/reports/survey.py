"""Figures about the annotations of a data set, and what the recipe should change for it. No image is read.

An object's side is the square root of its box's area. The recipe's numbers that it is held against are those of stage 1
(448x448) and stage 2 (1333x800), in the pixels that the detector sees.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from direct_pt.batch import Objects
from direct_pt.data.annotations import AnnotationTable
from direct_pt.models.anchors import Anchors
from direct_pt.recipes import IMAGE_SIZE, LONG_SIDE
from direct_pt.transforms import Preset, PretrainPreset, TestPreset

LEAST_SIDE = 8.0  # pixels: of a smaller object the finest map, of stride 4, has hardly two cells a side
MOST_BELOW = 0.1  # share of objects smaller than that which is put up with
LARGEST_IMAGE_SIZE = LONG_SIDE // 32 * 32  # that is proposed for stage 1
SAMPLE = 20_000  # objects that anchors are held against
SIZE_CLASSES = {"small": (0, 32), "medium": (32, 96), "large": (96, np.inf)}  # sides in pixels, COCO's
SHAPES = {"wide": (3, np.inf), "between": (1 / 3, 3), "tall": (0, 1 / 3)}  # width / height
POOR_RECALL, WORTH_TELLING = 0.5, 0.05  # of a class of objects, which are at least this share of all
RARE = 0.001  # share of the images that have a class
LEAST_OBJECTS = 50  # of a validation split
NAMED = 5  # classes in one sentence


def whole_image(image_size: int) -> PretrainPreset:
    """Stage 1 without its random choices: the image fits exactly."""
    return PretrainPreset(image_size, scale_range=(1.0, 1.0), flip=0.0)


STAGE_1, STAGE_2 = whole_image(IMAGE_SIZE), TestPreset()


def describe(table: AnnotationTable) -> dict[str, Any]:
    """The figures of one split, for JSON.

    "objects" are those that are learnt: no crowd regions, and no boxes of which less than a pixel lies in the image.
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
        "objects_with_outline": int(table.segmentations.present()[_learnt_rows(table)].sum()),
        "objects_per_image": _spread(table.targets_per_image()),
        "classes": [{"id": i, "name": name, "objects": int(n), "images": int(m)} for i, name, n, m in rows],
        "image_sizes": {
            "different": len(sizes),
            "most_frequent": [
                {"width": int(sizes[row, 1]), "height": int(sizes[row, 0]), "images": int(counts[row])}
                for row in frequent
            ],
            "width": _spread(table.sizes[:, 1]),
            "height": _spread(table.sizes[:, 0]),
            "aspect_ratio": _spread(table.sizes[:, 1] / table.sizes[:, 0]),
        },
        "object_sides": {
            "in_files": _spread(object_sides(table)),
            **{
                name: _spread(object_sides(table, preset)) | {"share_under_8_pixels": share_small(table, preset)}
                for name, preset in (("stage_1", STAGE_1), ("stage_2", STAGE_2))
            },
        },
    }


def object_sides(table: AnnotationTable, preset: Preset | None = None) -> np.ndarray:
    """[T] sides of the objects that are learnt, in pixels of the files, or as a preset without chance resizes them."""
    boxes, images, _ = _learnt(table)
    if preset is not None:
        boxes = boxes * np.tile(_frames(table, preset)[0], 2)[images]
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))


def share_small(table: AnnotationTable, preset: Preset) -> float:
    """Which share of the objects has a side under LEAST_SIDE as `preset` resizes them; 0 where there is none."""
    sides = object_sides(table, preset)
    return float((sides < LEAST_SIDE).mean()) if len(sides) else 0.0


def fitting_image_size(table: AnnotationTable) -> tuple[int, float]:
    """The smallest --image-size from the recipe's on at which few objects are too small, else the largest; their share.

    Sizes are multiples of 32.
    """
    sides, size, share = object_sides(table, STAGE_1) / IMAGE_SIZE, IMAGE_SIZE, 0.0
    for size in range(IMAGE_SIZE, LARGEST_IMAGE_SIZE + 1, 32) if len(sides) else ():
        share = float((sides * size < LEAST_SIDE).mean())
        if share <= MOST_BELOW:
            break
    return size, share


def anchor_recall(table: AnnotationTable, preset: Preset, anchors: Anchors) -> dict[str, Any]:
    """How well the anchors fit the objects, each counted where one of them has an IoU of at least 0.5 with it.

    Returns:
        "all", and by classes of size and of shape: how many objects, and of these the "recall", the share that has such
        an anchor, and the share "under_0.3": the RPN never learns to propose these. Null where there are no objects.
    """
    boxes, images, _ = _learnt(table)
    if len(boxes) > SAMPLE:
        chosen = np.random.default_rng(0).choice(len(boxes), SAMPLE, replace=False)
        boxes, images = boxes[chosen], images[chosen]
    scales, frames = _frames(table, preset)
    boxes = boxes * np.tile(scales, 2)[images]
    overlaps = best_overlaps(boxes, frames[images], anchors)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    groups = {"all": np.ones(len(boxes), bool)}
    groups |= {name: _between(np.sqrt(width * height), limits) for name, limits in SIZE_CLASSES.items()}
    groups |= {name: _between(width / height, limits) for name, limits in SHAPES.items()}
    return {name: _recall(overlaps[rows]) for name, rows in groups.items()}


def best_overlaps(boxes: np.ndarray, frames: np.ndarray, anchors: Anchors) -> np.ndarray:
    """[T] the best IoU that any anchor has with each box.

    Among the equal anchors of a level the best one is the one centred nearest by, whatever its shape: the overlap along
    an axis never grows with the distance of the centres. So the grid need not be searched.

    Args:
        boxes: [T, 4] corners in pixels of the padded image.
        frames: [T, 2] (height, width), what each one's image is padded to.
        anchors: of all levels.
    """
    strides = np.repeat(anchors.strides, anchors.per_cell)[:, None]
    cells = np.tile(anchors.cell_anchors.numpy(), (len(anchors.strides), 1))
    sides = (cells[:, 2:] - cells[:, :2]) * strides  # [A, 2] of every level's anchors
    centres = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    last = -(-frames[:, None, ::-1] // strides) - 1
    nearest = np.clip(np.rint(centres / strides), 0, last) * strides  # [T, A, 2]
    low = np.maximum(nearest - sides / 2, boxes[:, None, :2])
    high = np.minimum(nearest + sides / 2, boxes[:, None, 2:])
    shared = np.maximum(high - low, 0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return (shared / (areas[:, None] + sides.prod(axis=1) - shared)).max(axis=1, initial=0)


def summary(tables: Mapping[str, AnnotationTable], preset: Preset) -> list[str]:
    """At most six lines for a run's start: how large its objects are, and what may be wrong with the data.

    Args:
        tables: by split, "train" and what else there is.
        preset: how the stage resizes images, without chance: whole_image(image_size), or a TestPreset.
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


def proposals(tables: Mapping[str, AnnotationTable], recalls: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to change for this data set, a sentence each.

    Args:
        tables: by split.
        recalls: of the training split: anchor_recall's by size_name of both stages, then by kind of anchors.
    """
    lines = [
        line for preset in (STAGE_1, STAGE_2) if "train" in tables for line in _small_objects(tables["train"], preset)
    ]
    first, second = (recalls.get(size_name(stage), {}) for stage in (STAGE_1, STAGE_2))
    lines += _anchors(first, SIZE_CLASSES, STAGE_1, "stage 2 learns them, or stage 1 with a larger --image-size")
    lines += _anchors(second, SIZE_CLASSES, STAGE_2, "raise --short-side and --long-side")
    lines += _anchors(second, SHAPES, STAGE_2, "more RATIOS in direct_pt/models/detector.py fit them")
    return [*lines, *_classes(tables), *_splits(tables)]


def _anchors(recalls: Mapping[str, Any], groups: Iterable[str], preset: Preset, remedy: str) -> list[str]:
    """Which groups of objects, of those that matter, some kind of anchors fits badly."""
    lines = []
    for group in groups:
        found = {kind: of[group]["recall"] for kind, of in recalls.items()}
        share = max((of[group]["objects"] / max(of["all"]["objects"], 1) for of in recalls.values()), default=0.0)
        if share >= WORTH_TELLING and min(found.values()) < POOR_RECALL:
            told = ", ".join(f"{recall:.0%} ({kind})" for kind, recall in found.items())
            lines.append(
                f"{share:.0%} of the objects are {group} at {size_name(preset)}, and of these only {told} share an IoU "
                f"of 0.5 with an anchor: {remedy}"
            )
    return lines


def _small_objects(table: AnnotationTable, preset: Preset) -> list[str]:
    share = share_small(table, preset)
    if share <= MOST_BELOW:
        return []
    line = (
        f"{share:.0%} of the training objects are under {LEAST_SIDE:g} pixels at {size_name(preset)}, hardly learnt: "
    )
    if not isinstance(preset, PretrainPreset):
        return [f"{line}raise --short-side and --long-side, or cut the images into tiles"]
    size, rest = fitting_image_size(table)
    if rest > MOST_BELOW:
        return [f"{line}{rest:.0%} still at {size}x{size}; cut the images into tiles"]
    cost = (size / preset.image_size) ** 2
    return [f"{line}--image-size {size} leaves {rest:.0%}, at {cost:.1f} times the pixels a step"]


def _classes(tables: Mapping[str, AnnotationTable]) -> list[str]:
    """What is wrong with how often classes occur."""
    lines = []
    for split, table in tables.items():
        in_images, objects = class_counts(table)
        absent = np.flatnonzero(objects == 0)
        if len(absent):
            effect = "they cannot be learnt" if split == "train" else "their AP is unknown"
            of = f"{len(absent)} of {len(objects)} classes"
            lines.append(f"{of} have no object in {split} ({_names(table, absent)}): {effect}")
        rare = np.flatnonzero((objects > 0) & (in_images < RARE * len(table)))
        if len(rare) and split == "train":
            lines.append(
                f"{len(rare)} of {len(objects)} classes stand in under {RARE:.1%} of the training images "
                f"({_names(table, rare)}): --repeat-threshold {RARE:g} shows those images more often"
            )
    return lines


def _splits(tables: Mapping[str, AnnotationTable]) -> list[str]:
    """What is wrong with the splits' sizes."""
    lines = []
    empty = float((tables["train"].targets_per_image() == 0).mean()) if "train" in tables else 0.0
    if empty > 0.5:
        lines.append(f"{empty:.0%} of the training images have no object: --drop-empty trains on the others alone")
    if "val" not in tables:
        lines.append("there is no validation split: the AP stays unknown, and no best weights are kept")
    for split in tables:
        objects = int(tables[split].targets_per_image().sum())
        if split != "train" and objects < LEAST_OBJECTS:
            lines.append(f"{split} has {objects} objects: under {LEAST_OBJECTS}, its AP is mostly chance")
    return lines


def _learnt_rows(table: AnnotationTable) -> np.ndarray:
    return table.usable() & ~table.crowd


def _learnt(table: AnnotationTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corner boxes [T, 4], image rows [T] and labels [T] of the objects that are learnt."""
    rows = _learnt_rows(table)
    images = table.image_of_object()
    return table.corner_boxes()[rows], images[rows], table.labels[rows]


def class_counts(table: AnnotationTable) -> tuple[np.ndarray, np.ndarray]:
    """[C] in how many images each class stands, and [C] how many objects of it there are."""
    _, images, labels = _learnt(table)
    classes = len(table.class_names)
    pairs = np.sort(images * classes + labels, kind="stable")  # sorted nearly; np.unique takes many times as long
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    return np.bincount(pairs % classes, minlength=classes), np.bincount(labels, minlength=classes)


def _frames(table: AnnotationTable, preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    """[N, 2] (x, y) factors by which each image is resized, and [N, 2] (height, width) that it is padded to."""
    sizes, row = np.unique(table.sizes[:, 0].astype(np.int64) * 2**32 + table.sizes[:, 1], return_inverse=True)
    rng, scales, frames = np.random.default_rng(0), [], []
    for height, width in (divmod(size, 2**32) for size in sizes.tolist()):
        geometry = preset.geometry((height, width), Objects.none(), rng)
        scales.append(geometry.scale)
        frames.append(preset.padded_size(geometry.size))
    return np.array(scales)[row], np.array(frames)[row]


def _between(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (values >= limits[0]) & (values < limits[1])


def _recall(overlaps: np.ndarray) -> dict[str, Any]:
    recall, missed = ((overlaps >= 0.5).mean(), (overlaps < 0.3).mean()) if len(overlaps) else (None, None)
    return {"objects": len(overlaps), "recall": _float(recall), "under_0.3": _float(missed)}


def _float(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """The least, the 10th, 50th and 90th percentile, and the largest."""
    found = np.percentile(values, (0, 10, 50, 90, 100)).tolist() if len(values) else [None] * 5
    return dict(zip(("least", "p10", "median", "p90", "largest"), map(_float, found), strict=True))


def _names(table: AnnotationTable, rows: np.ndarray) -> str:
    """The first classes of `rows`, and how many more there are."""
    names = ", ".join(table.class_names[row] for row in rows[:NAMED])
    return names + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def size_name(preset: Preset) -> str:
    """As in reports: 448x448, 1333x800."""
    if isinstance(preset, PretrainPreset):
        return f"{preset.image_size}x{preset.image_size}"
    return f"{preset.long_side}x{preset.short_side}" if isinstance(preset, TestPreset) else str(preset)
