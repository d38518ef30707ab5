"""Charts of runs and data sets, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from direct_pt.files import replacing
from direct_pt.images.visualize import drawable_name, find_font


def plot_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Write a chart of losses, learning rate and AP by optimizer step, from the records of metrics.jsonl."""
    logged = [record for record in records if record.get("loss") is not None]
    evaluated = [record for record in records if "bbox" in record]
    figure = _figure(12, 4.5)
    losses, scores = figure.subplots(1, 2)
    steps = [record["step"] for record in logged]
    for name in logged[0]["losses"] if logged else []:
        losses.plot(steps, [record["losses"].get(name) for record in logged], label=name, linewidth=1)
    losses.plot(steps, [record["loss"] for record in logged], label="sum", color="black", linewidth=1)
    held_out = [record for record in evaluated if record.get("val_loss") is not None]
    losses.plot(
        [record["step"] for record in held_out], [record["val_loss"] for record in held_out], label="sum, validation",
        color="black", linestyle="--", marker="o", markersize=3, linewidth=1,
    )  # fmt: skip
    rate = losses.twinx()
    rate.plot(steps, [record["lr"] for record in logged], color="grey", linestyle=":", linewidth=1)
    rate.set_ylabel("learning rate (dotted)")
    losses.set(xlabel="optimizer step", ylabel="loss", yscale="log" if logged else "linear", title="losses")
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
    _save(figure, path)


def plot_object_sizes(panels: Mapping[str, Mapping[str, np.ndarray]], marks: Mapping[float, str], path: Path) -> None:
    """Write histograms of the objects' sides (square roots of the boxes' areas).

    Args:
        panels: for each title, the sides [T] in pixels of each split.
        marks: labels of the sides to mark in the last panel.
        path: of the picture.
    """
    figure = _figure(12, 4.5)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for plot, (title, splits) in zip(axes[0], panels.items(), strict=True):
        largest = max([64.0, *(sides.max(initial=1) for sides in splits.values())])
        _plot_shares(plot, splits, np.geomspace(1, largest * 1.01, 41))
        plot.set(xscale="log", xlim=(1, largest), xlabel="square root of the box's area, pixels", title=title)
        plot.xaxis.set_major_formatter("{x:g}")
        plot.set_ylabel("share of the split's objects")
    for side, label in marks.items():
        axes[0, -1].axvline(side, color="black", linestyle=":", linewidth=1)
        axes[0, -1].text(side, 0.98, f" {label}", rotation=90, ha="right", va="top", fontsize=8,
                         transform=axes[0, -1].get_xaxis_transform())  # fmt: skip
    _save(figure, path)


def plot_image_sizes(splits: Mapping[str, np.ndarray], path: Path) -> None:
    """Write charts of each split's image sizes [N, 2] (height, width): a scatter plot, and the aspect ratios."""
    figure = _figure(12, 4.5)
    plane, ratios = figure.subplots(1, 2)
    for color, (split, sizes) in enumerate(splits.items()):
        distinct, counts = np.unique(sizes, axis=0, return_counts=True)
        areas = 15 + 400 * counts / len(sizes)  # of the dots
        plane.scatter(*distinct.T[::-1], areas, color=f"C{color}", alpha=0.4, linewidths=0, label=split)
    plane.set(xlabel="width, pixels", ylabel="height, pixels", title="image sizes (larger dots: more images)")
    plane.set(xlim=(0, None), ylim=(0, None), aspect="equal")
    plane.grid(alpha=0.3)
    plane.legend(fontsize=8, markerscale=0.5)
    aspects = {split: sizes[:, 1] / sizes[:, 0] for split, sizes in splits.items()}
    widest = max(2.0, *(max(aspect.max(), 1 / aspect.min()) for aspect in aspects.values())) * 1.05
    _plot_shares(ratios, aspects, np.geomspace(1 / widest, widest, 42))
    ratios.set(xscale="log", xlabel="width / height", ylabel="share of the split's images", title="aspect ratios")
    ticks = [ratio for ratio in (0.1, 0.2, 0.33, 0.5, 0.75, 1, 1.33, 2, 3, 5, 10) if 1 / widest <= ratio <= widest]
    ratios.set_xticks(ticks, [f"{ratio:g}" for ratio in ticks])
    ratios.minorticks_off()
    _save(figure, path)


def plot_classes(
    names: Sequence[str],
    splits: Mapping[str, np.ndarray],
    path: Path,
    category_ids: Sequence[int] | None = None,
    most: int = 40,
) -> None:
    """Write a chart of the objects [C] of each class in each split, for the `most` frequent classes overall.

    `category_ids` stand for names that no font has the characters of; without them, the classes' places do.
    """
    names = [drawable_name(name, number) for name, number in zip(names, category_ids or range(len(names)), strict=True)]
    total = np.sum(list(splits.values()), axis=0)
    order = np.argsort(-total, kind="stable")[:most]
    figure = _figure(9, 1.5 + 0.25 * len(order))
    plot = figure.subplots()
    rows, height = np.arange(len(order)), 0.8 / len(splits)
    for color, (split, counts) in enumerate(splits.items()):
        plot.barh(rows + height * (color + 0.5) - 0.4, counts[order], height, label=split, color=f"C{color}")
    labels = [names[row] if len(names[row]) <= 30 else names[row][:28] + "..." for row in order]
    plot.set_yticks(rows, labels, fontsize=8, parse_math=False)  # a name may contain dollar signs
    for tick, label in zip(plot.get_yticklabels(), labels, strict=True):
        if font := find_font(label):
            tick.set(font=Path(font.path), fontsize=8)
    title = "objects by class" + (f", the {most} most frequent of {len(names)}" if len(names) > most else "")
    plot.set(ylim=(len(order) - 0.4, -0.6), xlabel="objects", title=title)
    if total[order].max(initial=0) > 30 * max(total[order].min(initial=1), 1):
        plot.set_xscale("symlog", linthresh=1)
        plot.xaxis.set_major_formatter("{x:g}")
    plot.set_xlim(0, 1.1 * max(1, *(counts.max() for counts in splits.values())))
    plot.grid(axis="x", alpha=0.3)
    plot.legend(fontsize=8)
    _save(figure, path)


def _plot_shares(plot: Any, splits: Mapping[str, np.ndarray], edges: np.ndarray) -> None:
    """Draw a histogram of each split's values, as shares."""
    for color, (split, values) in enumerate(splits.items()):
        shares = np.histogram(values, edges)[0] / max(len(values), 1)
        plot.stairs(shares, edges, label=f"{split} ({len(values)})", color=f"C{color}", fill=color == 0, alpha=0.6)
        plot.stairs(shares, edges, color=f"C{color}")
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)


def _figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure  # half a second to load, and most processes never need it

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Raises OSError."""
    with replacing(path, to_disk=False) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
