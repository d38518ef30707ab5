"""Pictures: detections drawn on images, and a run's curves."""

import colorsys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")  # files only; a display is not needed
from matplotlib import pyplot as plt

TINT = 128  # of 255, how much of its class's colour a mask takes on


def class_color(label: int) -> tuple[int, int, int]:
    """A colour of its own for each class index: hues a golden angle apart."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.85, 1.0)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray,
    labels: np.ndarray,
    captions: list[str],
    masks: Iterable[np.ndarray] | None = None,
) -> Image.Image:
    """A copy of an RGB image with tinted masks, and boxes and captions over them.

    Args:
        image: the original.
        boxes: [n, 4] (x1, y1, x2, y2) in its pixels.
        labels: [n] class indices, for the colours.
        captions: [n].
        masks: n of [h, w] bool in the whole image, seen inside their boxes only; made one after another, they need not
            be in memory at once.
    """
    drawn = image.copy()
    if masks is not None:
        corners = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
        windows = np.clip(corners, 0, [image.width, image.height] * 2).astype(int).tolist()
        for mask, (x1, y1, x2, y2), label in zip(masks, windows, labels.tolist(), strict=True):
            drawn.paste(class_color(label), (x1, y1, x2, y2), Image.fromarray(mask[y1:y2, x1:x2] * np.uint8(TINT)))
    pen = ImageDraw.Draw(drawn)
    side = min(image.size)
    font = ImageFont.load_default(size=max(9, side // 40))
    for box, label, caption in zip(boxes.tolist(), labels.tolist(), captions, strict=True):
        color = class_color(label)
        pen.rectangle(box, outline=color, width=max(1, side // 250))
        left, top, right, bottom = pen.textbbox((0, 0), caption, font=font)
        x = min(max(0, box[0]), max(0, image.width - right))
        y = box[1] - bottom if box[1] >= bottom else box[1]
        pen.rectangle((x + left, y + top, x + right, y + bottom), fill=color)
        pen.text((x, y), caption, fill=(0, 0, 0), font=font)
    return drawn


def plot_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Losses, learning rate and AP over the optimizer steps, from the records of metrics.jsonl."""
    logged = [record for record in records if record.get("loss") is not None]
    evaluated = [record for record in records if "bbox" in record]
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    steps = [record["step"] for record in logged]
    for name in logged[0]["losses"] if logged else []:
        losses.plot(steps, [record["losses"][name] for record in logged], label=name, linewidth=1)
    losses.plot(steps, [record["loss"] for record in logged], label="sum", color="black", linewidth=1)
    rate = losses.twinx()
    rate.plot(steps, [record["lr"] for record in logged], color="grey", linestyle=":", linewidth=1)
    rate.set_ylabel("learning rate (dotted)")
    losses.set(xlabel="optimizer step", ylabel="loss", yscale="log" if logged else "linear", title="training losses")
    losses.legend(fontsize=8)
    steps = [record["step"] for record in evaluated]
    for name in ("AP", "AP50", "AP75"):
        scores.plot(steps, [record["bbox"][name] for record in evaluated], marker="o", markersize=3, label=name)
    masked = [record for record in evaluated if "segm" in record]
    for color, name in enumerate(("AP", "AP50") if masked else ()):
        scores.plot(
            [record["step"] for record in masked], [record["segm"][name] for record in masked], marker="o",
            markersize=3, label=f"mask {name}", color=f"C{color}", linestyle="--",
        )  # fmt: skip
    label = "box AP; mask AP (dashed)" if masked else "box AP"
    scores.set(xlabel="optimizer step", ylabel=label, ylim=(0, 1), title="validation")
    scores.grid(alpha=0.3)
    scores.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write that failed does not say where
    finally:
        plt.close(figure)
