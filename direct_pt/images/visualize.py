"""Detections drawn on images, and contact sheets of such pictures; fonts that have the characters of a text."""

import colorsys
import functools
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from direct_pt.errors import printable

MASK_OPACITY = 128  # of 255
MAX_JPEG_SIDE = 65_500  # pixels; the library that writes them takes no more
INVISIBLE = ("Cc", "Cf", "Zs")  # Unicode categories of characters without a glyph of their own
NORMAL_WEIGHT = 400  # of fonts
VARIATION_SELECTORS = range(0xFE00, 0xFE10)


class FontFile(NamedTuple):
    """A font: its file, and its number in a collection of several."""

    path: str
    number: int = 0


def find_font(text: str) -> FontFile | None:
    """A font that has all characters of a text: DejaVu Sans, else one of the system's, else None."""
    needed = {ord(c) for c in text if unicodedata.category(c) not in INVISIBLE and ord(c) not in VARIATION_SELECTORS}
    return _font_with(frozenset(needed))


def drawable(text: str) -> str:
    """The text as it can be drawn: control characters, and all others that no font has, as escapes."""
    text = printable(text)
    return text if find_font(text) else text.encode("ascii", "backslashreplace").decode()


def drawable_name(name: str, category_id: int) -> str:
    """A class name as it can be drawn, or its id if no font has its characters."""
    name = printable(name)
    return name if find_font(name) else f"class {category_id}"


@functools.cache
def _font_with(characters: frozenset[int]) -> FontFile | None:
    default = _default_font()
    if characters <= _characters(default):
        return default
    from matplotlib.font_manager import fontManager  # it lists the system's fonts: seconds, the first time

    entries = [entry for entry in fontManager.ttflist if "lastresort" not in entry.fname.lower()]  # one of boxes alone
    entries.sort(key=lambda entry: (entry.style != "normal", entry.weight != NORMAL_WEIGHT, entry.fname))
    fonts = (FontFile(entry.fname, getattr(entry, "index", 0)) for entry in entries)
    return next((font for font in fonts if characters <= _characters(font) and _is_scalable(font)), None)


@functools.cache
def _default_font() -> FontFile:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic."""
    import matplotlib  # slow to load, as is fontTools, and only what draws needs them

    return FontFile(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")))


@functools.cache
def _characters(font: FontFile) -> frozenset[int]:
    """The code points that a font has; none if its file cannot be read."""
    from fontTools.ttLib import TTFont

    try:
        with TTFont(font.path, fontNumber=font.number, lazy=True) as file:
            return frozenset(file.getBestCmap() or ())
    except Exception:  # a damaged file raises nearly anything
        return frozenset()


def _is_scalable(font: FontFile) -> bool:
    try:
        _load_font(font, 14)
    except OSError:  # of bitmaps, as those of coloured emoji
        return False
    return True


@functools.cache
def _load_font(font: FontFile, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, size, index=font.number)


def _text_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """For what `drawable` returns."""
    return _load_font(find_font(text) or _default_font(), size)


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
        captions: [n], one for each box; what cannot be drawn is escaped.
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
    for box, label, caption in zip(boxes.tolist(), labels.tolist(), captions, strict=True):
        color, caption = class_color(label), drawable(caption)
        font = _text_font(caption, max(9, side // 40))
        pen.rectangle(box, outline=color, width=max(1, side // 250))
        left, top, right, bottom = pen.textbbox((0, 0), caption, font=font)
        x = min(max(0, box[0]), max(0, image.width - right))
        y = box[1] - bottom if box[1] >= bottom else box[1]
        pen.rectangle((x + left, y + top, x + right, y + bottom), fill=color)
        pen.text((x, y), caption, fill=(0, 0, 0), font=font)
    return drawn


def contact_sheet(pictures: list[Image.Image], titles: list[str], cell: int, columns: int = 6) -> Image.Image:
    """One image with all pictures, each at most cell x cell pixels large and below its title."""
    line, gap = 20, 8
    columns = max(columns, -(-len(pictures) // (MAX_JPEG_SIDE // (cell + line + gap))))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    heights = [max(picture.height for picture in pictures[row * columns : (row + 1) * columns]) for row in range(rows)]
    tops = np.cumsum([0, *heights]) + np.arange(rows + 1) * (line + gap)
    sheet = Image.new("RGB", (columns * (cell + gap) - gap, int(tops[-1]) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, top = number % columns * (cell + gap), int(tops[number // columns])
        title = drawable(title)
        font = _text_font(title, 14)
        while title != "..." and pen.textlength(title, font=font) > cell:
            title = "..." + title.removeprefix("...")[1:]
        pen.text((left, top), title, fill="black", font=font)
        sheet.paste(picture, (left, top + line))
    return sheet
