"""What a detector's saved configuration may say: the one place with the type and range of each of its values."""

from typing import Any

from direct_pt.models.config import BOX_HEADS, MODELS, DetectorConfig
from direct_pt.schema import WrongValue, fail, list_of, number, one_of, optional, table, text, whole

# (lowest, highest), of flags too
CHANNELS, PROPOSALS, ROIS_PER_IMAGE = (1, 16_384), (1, 100_000), (1, 100_000)
ANCHOR_SCALES = (0.25, 64.0)
SIDES = (1, 1_000_000)  # of test images, pixels
MAX_CLASSES = 1_000_000
NORMS = ("batch", "group")
CHECK = table(
    {
        "name": one_of(MODELS),
        "class_names": list_of(text(), 1, MAX_CLASSES),
        "category_ids": list_of(whole(-(2**63), 2**63 - 1), 1, MAX_CLASSES),
        "backbone": text(200),
    },
    {
        "norm": one_of(NORMS),
        "box_head": one_of(BOX_HEADS),
        "channels": whole(*CHANNELS),
        "proposals": whole(*PROPOSALS),
        "rois_per_image": whole(*ROIS_PER_IMAGE),
        "anchor_scale": optional(number(*ANCHOR_SCALES)),
        "short_side": whole(*SIDES),
        "long_side": whole(*SIDES),
    },
)


def config_from_json(values: Any, name: str = "detector") -> DetectorConfig:
    """What `DetectorConfig.to_dict` wrote, as JSON holds it. Raises WrongValue, with `name` for the whole."""
    CHECK(values, name)
    config = DetectorConfig(**{**values, **{key: tuple(values[key]) for key in ("class_names", "category_ids")}})
    check_classes(config.class_names, config.category_ids, name)
    if config.short_side > config.long_side:
        fail(f"{name}.short_side", config.short_side, f"at most long_side, {config.long_side}")
    return config


def check_classes(names: tuple[str, ...], ids: tuple[int, ...], name: str) -> None:
    """Raise WrongValue unless there are as many class names as category ids, and each stands there once."""
    if len(names) != len(ids):
        raise WrongValue(f"{name} has {len(names)} class_names but {len(ids)} category_ids: there must be one of each")
    for key, values in (("class_names", names), ("category_ids", ids)):
        if len(set(values)) < len(values):
            seen: set[str | int] = set()
            twice = next(value for value in values if value in seen or seen.add(value))  # type: ignore[func-returns-value]
            fail(f"{name}.{key}", twice, "there once, and is there twice")


def check_config(config: DetectorConfig, name: str = "detector") -> None:
    """Raise WrongValue where a configuration could not be read back."""
    values = config.to_dict()
    config_from_json({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}, name)
