"""The model card of a detector, README.md in its folder: what it is, how it was trained, how to use it."""

import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from direct_pt.errors import printable
from direct_pt.models.config import DetectorConfig
from direct_pt.models.model_folder import History

MARK = "\n<!-- written by direct_pt: {} -->\n"  # by which a card is known as not edited since
TEMPLATE = Path(__file__).with_suffix(".md")
FIGURES = {"AP": "box AP", "AP50": "box AP50", "mask_AP": "mask AP"}  # of a stage in the history
STAGE = {
    "stage": "stage", "classes": "classes", "images": "training images", "objects": "objects", "steps": "steps so far",
    "global_batch_size": "batch", "lr": "base learning rate", "init": "started from",
}  # fmt: skip
NAMED_STARTS = ("none", "imagenet")  # others are paths, which say nothing elsewhere


def model_card(
    name: str,
    config: DetectorConfig,
    history: History,
    thresholds: tuple[float, Sequence[float]],
    has_masks: bool,
    license: str | None,
) -> str:
    """The card as Markdown, with the hub's metadata on top.

    Args:
        name: that the model is loaded by: on the hub, or its folder.
        config: of the detector.
        history: of its training.
        thresholds: of its scores: for all classes, and of each.
        has_masks: whether it finds masks.
        license: the hub's identifier of one; that there is None is said.
    """
    last = history[-1] if history else {}
    figures = {title: last[key] for key, title in FIGURES.items() if last.get(key, -1) >= 0}
    task = "image-segmentation" if has_masks else "object-detection"
    data = ModelCardData(
        library_name="direct-pt",
        pipeline_tag=task,
        license=license,
        tags=["direct-pt", config.name],
        model_name=printable(name),
        eval_results=None
        if not figures
        else [
            EvalResult(task, "own", "its own validation split", metric, round(value, 4), metric_name=metric)
            for metric, value in figures.items()
        ],
    )
    columns = [key for key in STAGE if any(key in stage for stage in history)]
    names = map(_cell, config.class_names)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=printable(name),
        quoted_name=json.dumps(name),
        config=config,
        task=task.replace("-", " "),
        figures=[f"{title} {value:.3f}" for title, value in figures.items()],
        threshold=thresholds[0],
        measured="thresholds" in last,
        by_hand=last.get("thresholds_set_by_hand", False),
        classes=list(zip(config.category_ids, names, thresholds[1], strict=True)),
        columns=[STAGE[key] for key in columns],
        stages=[[_stage_cell(key, stage.get(key, "")) for key in columns] for stage in history],
        license=license,
    )
    text = str(card).rstrip() + "\n"
    return text + MARK.format(_digest(text))


def is_own_card(path: Path) -> bool:
    """Whether a file is a card of `model_card`, as it was written."""
    try:
        text, mark, rest = path.read_text().rpartition(MARK.partition("{")[0])
    except (OSError, ValueError):
        return False
    return bool(mark) and mark + rest == MARK.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _stage_cell(key: str, value: object) -> str:
    """A value of a stage in the table."""
    return "other weights" if key == "init" and value and value not in NAMED_STARTS else _cell(value)


def _cell(value: object) -> str:
    """A value in a table, without what Markdown or HTML would read."""
    text = f"{value:g}" if isinstance(value, float) else html.escape(printable(str(value)), quote=False)
    return re.sub(r"[|`*\[\]\\]", lambda found: f"&#{ord(found[0])};", text)
