"""How images vary and which anchors fit them: what the flags say, or the recipe, or "auto" for the data at hand."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.mixing import Mix
from direct_pt.errors import InputError
from direct_pt.flags import flag_name, to_json
from direct_pt.images.decoding import Size
from direct_pt.models.detector import RETINA_SCALE, RPN_SCALE, DetectorConfig, anchors_of
from direct_pt.recipes import Augmentation, Stage, recipe_name
from direct_pt.reports.survey import anchor_recall, whole_image
from direct_pt.training.image_flags import parse_canvas
from direct_pt.training.saved_values import check_choices
from direct_pt.transforms import FLIPS, SIZE_DIVISOR, FinetunePreset, Preset, PretrainPreset, TestPreset

if TYPE_CHECKING:
    from direct_pt.data.stream import Stream

MIN_RECALL = 0.9  # of the objects that the anchors of --anchor-scale auto have to fit
ANCHOR_STEPS = 12  # quarter octaves below the paper's that it may go
TEXT_CLASSES = frozenset("0123456789abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Choices:
    """What a run has chosen; kept in its config.json, and used again when it is resumed.

    Attributes:
        augmentation: how images vary.
        canvas: (height, width) of the crops of stage 1; None for a square.
        anchor_scale: of the detector; None for the paper's.
        notes: how they came about, for the banner; not kept.
    """

    augmentation: Augmentation
    canvas: Size | None = None
    anchor_scale: float | None = None
    notes: tuple[str, ...] = ()

    def pretrain_preset(self, image_size: int) -> PretrainPreset:
        """Stage 1's, of square crops with sides of `image_size` pixels where there is no canvas."""
        own = self.augmentation
        return PretrainPreset(image_size, own.scale_jitter, own.flips, own.color_jitter, self.canvas)

    def finetune_preset(self, short_side: int, long_side: int) -> FinetunePreset:
        """Stage 2's."""
        return FinetunePreset(short_side, long_side, self.augmentation.flips, self.augmentation.color_jitter)

    @property
    def mix(self) -> Mix | None:
        """Which samples are made of several images."""
        own = self.augmentation
        return None if own.mix == "none" else Mix(own.mix, own.mix_share)

    def to_json(self) -> dict[str, Any]:
        """For config.json, with lists as JSON has them."""
        values = {one.name: getattr(self.augmentation, one.name) for one in fields(Augmentation)}
        values |= {"canvas": self.canvas, "anchor_scale": self.anchor_scale}
        return {name: to_json(value) for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Choices":
        """What `to_json` wrote. Raises WrongValue for anything else."""
        check_choices(values)
        canvas, anchor_scale = values["canvas"], values["anchor_scale"]
        jitter = tuple(values["scale_jitter"])
        augmentation = Augmentation(**{**values, "canvas": "square", "scale_jitter": jitter, "anchor_scale": None})
        notes = differences(augmentation, values)
        notes += [] if canvas is None else [f"crops of {canvas[1]}x{canvas[0]}"]
        notes += [] if anchor_scale is None else [f"--anchor-scale {anchor_scale:.3g}"]
        return cls(augmentation, None if canvas is None else tuple(canvas), anchor_scale, tuple(notes))


def choose(
    stage: Stage,
    given: dict[str, Any],
    model: str | None,
    size: int | tuple[int, int],
    train: "AnnotationTable | Stream",
    saved: dict[str, Any] | None,
) -> Choices:
    """The choices of a run.

    Args:
        stage: whose recipes fill what is not given.
        given: all flags by the fields' names; None: not given.
        model: the detector's name, where it begins with random weights; its anchors are chosen then.
        size: of the images that the anchors are to fit, in pixels: the side of stage 1's crops, or stage 2's (short,
            long) sides.
        train: training data.
        saved: what a run that is resumed has chosen.

    Raises:
        InputError: the data do not have what a choice needs.
    """
    if saved is not None:
        return Choices.from_json(saved)
    name = recipe_name(given["recipe"], len(train))
    defaults = stage.small_augmentation if name == "small" else Augmentation()
    own: dict[str, Any] = {one.name: given.get(one.name) for one in fields(Augmentation)}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items() if value is not None}
    augmentation = replace(defaults, **own)
    notes = differences(augmentation, own)
    canvas = None
    if augmentation.canvas == "auto":
        assert isinstance(train, AnnotationTable) and isinstance(size, int)
        canvas = usual_canvas(train.sizes, size)
        notes.append(f"--canvas auto: crops of {canvas[1]}x{canvas[0]}, the images' usual shape")
    elif augmentation.canvas != "square":
        canvas = parse_canvas(augmentation.canvas)
    if augmentation.mix == "copy-paste":
        require_outlines(train)
    if FLIPS[augmentation.flips][1] and TEXT_CLASSES.issuperset(map(str.lower, train.class_names)):
        notes.append(f"--flips {augmentation.flips} turns images upside down, and the classes look like characters")
    if given.get("cache") == "none" and isinstance(train, AnnotationTable) and train.places is not None:
        notes.append("--cache none: each tile decodes its whole image; jpeg and raw keep copies of the tiles")
    anchor_scale = augmentation.anchor_scale if model is not None else None
    if anchor_scale == "auto" and model is not None:
        assert isinstance(train, AnnotationTable)
        preset = whole_image(size, canvas) if isinstance(size, int) else TestPreset(*size)
        anchor_scale, share = fitting_anchor_scale(train, model, preset)
        notes.append(
            f"--anchor-scale auto: {anchor_scale:.3g}, with which {share:.0%} of the objects have an anchor of IoU 0.5"
        )
    elif anchor_scale is not None:
        notes.append(f"--anchor-scale {anchor_scale}")
    assert not isinstance(anchor_scale, str)
    return Choices(augmentation, canvas, anchor_scale, tuple(notes))


def differences(augmentation: Augmentation, own: dict[str, Any]) -> list[str]:
    """One line for what differs from the paper's images, with the flags that say it, and whether each was given."""
    found = [
        f"{flag_name(one.name)} {text_of(value)}" + ("" if one.name in own else " (small)")
        for one in fields(Augmentation)
        if one.name not in ("canvas", "anchor_scale") and (value := getattr(augmentation, one.name)) != one.default
    ]
    return ["images vary by " + ", ".join(found)] if found else []


def text_of(value: Any) -> str:
    """A value as its flag takes it."""
    return " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def usual_canvas(sizes: np.ndarray, image_size: int) -> Size:
    """(height, width) of about image_size**2 pixels in the median shape of images of `sizes` [N, 2], in multiples of
    32."""
    ratio = float(np.exp(np.median(np.log(sizes[:, 1] / sizes[:, 0]))))
    height = max(1, round(image_size / np.sqrt(ratio) / SIZE_DIVISOR)) * SIZE_DIVISOR
    width = max(1, round(image_size * np.sqrt(ratio) / SIZE_DIVISOR)) * SIZE_DIVISOR
    return height, width


def fitting_anchor_scale(table: AnnotationTable, model: str, preset: Preset) -> tuple[float, float]:
    """The anchor scale to use, and the share of the objects that have an anchor with an IoU of 0.5 at it.

    The largest, from the paper's down in quarter octaves, with which that share is MIN_RECALL; else the one with which
    it is highest.
    """
    start = RETINA_SCALE if model.startswith("retinanet") else RPN_SCALE
    found: list[tuple[float, float]] = []
    for step in range(ANCHOR_STEPS + 1):
        scale = start * 2 ** (-step / 4)
        config = replace(DetectorConfig.from_paper(model, ("any",), (1,)), anchor_scale=scale)
        found.append((anchor_recall(table, preset, anchors_of(config))["all"]["recall"] or 0.0, scale))
        if found[-1][0] >= MIN_RECALL:
            return scale, found[-1][0]
    share, scale = max(found)
    return scale, share


def require_outlines(train: "AnnotationTable | Stream") -> None:
    """Raise InputError unless every object can be cut out of its image."""
    missing = int(train.without_mask().sum()) if isinstance(train, AnnotationTable) else 0
    if missing:
        raise InputError(
            f"--mix copy-paste: {missing} objects of {train.source} have no 'segmentation' to cut them out by; use "
            "--mix mosaic"
        )
