"""Detections drawn on images, and contact sheets of such pictures."""

import colorsys
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MASK_OPACITY = 128  # of 255


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class index; the hues of successive indices are a golden angle apart."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.85, 1.0)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_detections(
    image: Image.Image,
    boxes: np.ndarray,
    labels: np.ndarray,
    captions: list[str],
    masks: Iterable[np.ndarray] | None = None,
) -> Image.Image:
    """A copy of an RGB image with transparent masks, boxes and captions drawn over it.

    Args:
        image: the original.
        boxes: [n, 4] (x1, y1, x2, y2) in its pixels.
        labels: [n] class indices, which decide the colours.
        captions: [n], one for each box.
        masks: n arrays [h, w] bool of the whole image, drawn only inside their boxes. A generator may produce them one
            by one, so that they are not all in memory at once.
    """
    drawn = image.copy()
    if masks is not None:
        corners = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
        windows = np.clip(corners, 0, [image.width, image.height] * 2).astype(int).tolist()
        for mask, (x1, y1, x2, y2), label in zip(masks, windows, labels.tolist(), strict=True):
            drawn.paste(
                class_color(label), (x1, y1, x2, y2), Image.fromarray(mask[y1:y2, x1:x2] * np.uint8(MASK_OPACITY))
            )
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


def contact_sheet(pictures: list[Image.Image], titles: list[str], cell: int, columns: int = 6) -> Image.Image:
    """One image with all pictures, each at most cell x cell pixels large and below its title."""
    font, line, gap = ImageFont.load_default(size=14), 20, 8
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    heights = [max(picture.height for picture in pictures[row * columns : (row + 1) * columns]) for row in range(rows)]
    tops = np.cumsum([0, *heights]) + np.arange(rows + 1) * (line + gap)
    sheet = Image.new("RGB", (columns * (cell + gap) - gap, int(tops[-1]) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, top = number % columns * (cell + gap), int(tops[number // columns])
        while pen.textlength(title, font=font) > cell:
            title = "…" + title.removeprefix("…")[1:]
        pen.text((left, top), title, fill="black", font=font)
        sheet.paste(picture, (left, top + line))
    return sheet
