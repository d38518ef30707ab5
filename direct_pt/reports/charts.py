"""Charts as SVG text for HTML pages; their colours are the page's (CSS variables), so that they follow its theme."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 38  # margins


class Line(NamedTuple):
    """A curve of points (x, y); `label` is the class that it belongs to, None for all classes."""

    label: int | None
    points: Sequence[tuple[float, float]]


class Mark(NamedTuple):
    """A vertical line with a text, of a class or, None, of all."""

    label: int | None
    x: float
    text: str


def line_chart(title: str, x_title: str, y_title: str, lines: Sequence[Line], marks: Sequence[Mark] = ()) -> Markup:
    """Curves over the unit square. Those of a class carry data-class, so that the page can show one at a time."""
    parts = [_frame(title, x_title, y_title)]
    for label, points in lines:
        if len(points) == 1:
            ((x, y),) = points
            parts.append(f'<circle class="dot{_of_class(label)} cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="3"/>')
        elif points:
            path = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)
            parts.append(f'<polyline class="line{_of_class(label)} points="{path}"/>')
    for label, at, text in marks:
        x, bottom = _x(at), _y(0)
        shift, anchor = (-4, "end") if at > 0.6 else (4, "start")
        parts.append(
            f'<g class="note{_of_class(label)}>'
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom:.1f}"/>'
            f'<text x="{x + shift:.1f}" y="{bottom - 6:.1f}" text-anchor="{anchor}">{escape(text)}</text></g>'
        )
    return Markup("".join([*parts, "</svg>"]))


def bar_chart(title: str, x_title: str, y_title: str, bars: Sequence[tuple[float, float, float, str]]) -> Markup:
    """Bars (from, to, height, tooltip) over the unit square, with the diagonal."""
    parts = [_frame(title, x_title, y_title)]
    for low, high, height, tooltip in bars:
        x, width = _x(low) + 1, _x(high) - _x(low) - 2
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{_y(height):.1f}" width="{width:.1f}" '
            f'height="{_y(0) - _y(height):.1f}"><title>{escape(tooltip)}</title></rect>'
        )
    parts.append(f'<line class="mark" x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}"/></svg>')
    return Markup("".join(parts))


def _frame(title: str, x_title: str, y_title: str) -> str:
    """The start of a chart: title, grid, ticks."""
    ticks = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(t):.1f}" y2="{_y(t):.1f}"/>'
        f'<text x="{LEFT - 5}" y="{_y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        f'<text x="{_x(t):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{grid}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )


def _of_class(label: int | None) -> str:
    """The rest of a class attribute, and the data set's class; those of one class are hidden at first."""
    return '" data-class="all"' if label is None else f' off" data-class="{label}"'


def _x(value: float) -> float:
    return LEFT + value * (WIDTH - LEFT - RIGHT)


def _y(value: float) -> float:
    return HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM)
