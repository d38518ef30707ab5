"""The tables of a document, and a forest plot, out of the results."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from direct_pt.errors import InputError
from direct_pt.files import read_regular, write_text, writing
from small_sets.costs import Costs
from small_sets.factorial import effects
from small_sets.plan import Experiment, Plan
from small_sets.runs import Row
from small_sets.statistics import Differences, bootstrap, paired, set_means, sign_flip

Key = tuple[str, int, int]  # set, fold, seed
MARKS = "<!-- results of {name} -->", "<!-- end -->"


def write_report(plan: Plan, rows: list[Row], costs: Costs, document: Path | None, plot: Path | None) -> None:
    """Print each experiment's tables, or write them between the document's marks; draw the comparisons.

    Raises:
        InputError: the document or the picture cannot be read or written.
    """
    found = {one.name: table(one, rows, costs) for one in plan.experiments}
    if document is None:
        print("\n\n".join(f"{one.name}: {one.question}\n\n{found[one.name]}" for one in plan.experiments))
    else:
        try:
            text = read_regular(document).decode()
        except (OSError, ValueError) as error:
            raise InputError(f"--document {document}: cannot be read ({error})") from error
        if missing := [name for name in found if MARKS[0].format(name=name) not in text]:
            raise InputError(
                f"--document {document}: has no place for {', '.join(missing)}: write the lines "
                f"{MARKS[0].format(name=missing[0])} and {MARKS[1]} into it, or name others with --only"
            )
        with writing(f"--document {document}"):
            write_text(document, filled(text, found))
    if plot is not None:
        with writing(f"--plot {plot}"):
            draw_forest(plan, rows, plot)


def filled(text: str, tables: dict[str, str]) -> str:
    """A document with the tables between their marks."""
    begin, end = (re.escape(mark) for mark in (MARKS[0].replace("{name}", "NAME"), MARKS[1]))
    pattern = f"({begin.replace('NAME', '(.+?)')}).*?({end})"

    def replacement(found: re.Match[str]) -> str:
        content = tables.get(found[2])
        return found[0] if content is None else f"{found[1]}\n\n{content}\n\n{found[3]}"

    return re.sub(pattern, replacement, text, flags=re.DOTALL)


def table(experiment: Experiment, rows: list[Row], costs: Costs) -> str:
    """One experiment as Markdown: a row a set, a column an arm, then each arm against the first; or the factors'."""
    by_arm = results_by_arm(experiment, rows)
    if experiment.factors:
        return table_of_factors(experiment, by_arm)
    arms = [arm.name for arm in experiment.arms if by_arm[arm.name]]
    sets = [name for name in experiment.sets if any(row.set == name for arm in arms for row in by_arm[arm].values())]
    if not arms:
        return "No run is done yet."
    lines = ["| AP (AP50) | " + " | ".join(arms) + " |", "| --- |" + " --- |" * len(arms)]
    for name in sets:
        cells = [cell([row for row in by_arm[arm].values() if row.set == name]) for arm in arms]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    seconds = [np.mean([row.seconds for row in by_arm[arm].values()]) for arm in arms]
    lines.append("| processor seconds a run | " + " | ".join(f"{value:.0f}" for value in seconds) + " |")
    if planned := planned_seconds(experiment, sets, costs):
        lines.append("| the same, as calibrated | " + " | ".join(f"{planned[arm]:.0f}" for arm in arms) + " |")
    counts = [len(by_arm[arm]) for arm in arms]
    lines.append("| runs | " + " | ".join(map(str, counts)) + " |")
    comparisons = [f"* {arms[0]} against {arm}: {sentence(compared(by_arm[arms[0]], by_arm[arm]))}" for arm in arms[1:]]
    return "\n".join([*lines, *([""] if comparisons else []), *comparisons])


def planned_seconds(experiment: Experiment, sets: list[str], costs: Costs) -> dict[str, float]:
    """What a run of each arm costs on average by the calibration, from which its steps follow.

    Nothing where it was not calibrated, or arms are not compared at equal cost.
    """
    arms = {arm.name: arm for arm in experiment.arms}
    if not any(arm.equal_cost for arm in arms.values()):
        return {}
    try:
        return {
            name: float(np.mean([costs.of_arm(data, arms[arm.equal_cost or name]) for data in sets]))
            for name, arm in arms.items()
        }
    except InputError:
        return {}


def table_of_factors(experiment: Experiment, by_arm: dict[str, dict[Key, Row]]) -> str:
    """What each factor does to AP and to cost, out of the folds and seeds that all arms were run with."""
    levels = {arm.name: arm.levels for arm in experiment.arms}
    common = set.intersection(*(set(by_arm[arm]) for arm in levels))
    sets = [name for name in experiment.sets if any(key[0] == name for key in common)]
    if not sets:
        return f"{sum(map(len, by_arm.values()))} runs are done; each set needs all of its {len(levels)}."

    def mean(name: str, arm: str, figure: str) -> float:
        return float(np.mean([getattr(by_arm[arm][key], figure) for key in common if key[0] == name]))

    figures = [
        effects(levels, {name: {arm: mean(name, arm, figure) for arm in levels} for name in sets})
        for figure in ("AP", "seconds")
    ]
    lines = ["| change in AP | " + " | ".join(f"`{name}`" for name in sets) + " | mean | processor seconds |"]
    lines.append("| --- |" + " --- |" * (len(sets) + 2))
    for name, ap, seconds in zip(experiment.factors, *figures, strict=True):
        cells = [f"{ap.by_set[one]:+.3f}" for one in sets]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ap.mean:+.3f} ± {ap.error:.3f} | {seconds.mean:+.0f} |")
    return "\n".join(lines)


def results_by_arm(experiment: Experiment, rows: list[Row]) -> dict[str, dict[Key, Row]]:
    """The runs of each arm."""
    found: dict[str, dict[Key, Row]] = defaultdict(dict)
    for row in rows:
        if row.experiment == experiment.name:
            found[row.arm][row.set, row.fold, row.seed] = row
    return found


def cell(rows: list[Row]) -> str:
    """The mean AP and AP50 of some runs, and the standard deviation of AP over the seeds, on the same images."""
    if not rows:
        return ""
    folds = [[row.AP for row in rows if row.fold == fold] for fold in sorted({row.fold for row in rows})]
    variances = [np.var(seeds, ddof=1) for seeds in folds if len(seeds) > 1]
    spread = f" ± {np.sqrt(np.mean(variances)):.3f}" if variances else ""
    return f"{np.mean([np.mean(seeds) for seeds in folds]):.3f}{spread} ({np.mean([row.AP50 for row in rows]):.3f})"


def compared(one: dict[Key, Row], other: dict[Key, Row]) -> Differences:
    """The differences in AP of two arms' runs on the same set, fold and seed."""
    return paired(*({key: row.AP for key, row in runs.items()} for runs in (one, other)))


def sentence(differences: Differences) -> str:
    """What is known of a difference in AP, in words."""
    if not differences:
        return "no runs on the same images yet"
    means, (low, high) = set_means(differences), bootstrap(differences)
    pairs = sum(len(seeds) for folds in differences.values() for seeds in folds.values())
    if pairs == 1:
        return f"{means.mean():+.3f} AP, by one run of each: no interval"
    signs = f", p {sign_flip(means):.3f} (sign flips of the sets' means)" if len(means) > 1 else ""
    return (
        f"{means.mean():+.3f} AP, 95 % interval {low:+.3f} to {high:+.3f} out of {pairs} runs of each, higher on "
        f"{int((means > 0).sum())} of {len(means)} sets{signs}"
    )


def draw_forest(plan: Plan, rows: list[Row], path: Path) -> None:
    """The first arm of each experiment against the others: the difference on each set, and over all, with intervals."""
    from matplotlib.figure import Figure  # takes a second to load

    lines: list[tuple[str, float, float, float, bool]] = []
    for experiment in plan.experiments:
        if experiment.factors:
            continue
        by_arm = results_by_arm(experiment, rows)
        first = experiment.arms[0].name
        for arm in experiment.arms[1:]:
            found = compared(by_arm[first], by_arm[arm.name])
            for name in found:  # one run of each has no interval, and is a mark alone
                low, high = bootstrap({name: found[name]})
                lines.append((f"{name}", float(set_means({name: found[name]})[0]), low, high, False))
            if found:
                title = f"{experiment.name}: {first} against {arm.name}"
                lines.append((title, float(set_means(found).mean()), *bootstrap(found), True))
    if not lines:
        raise InputError(f"--plot {path}: no two arms of an experiment have runs on the same images yet")
    figure = Figure(figsize=(8, 0.6 + 0.28 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, (_, mean, low, high, is_whole) in enumerate(lines):
        color = "black" if is_whole else "tab:blue"
        axes.plot([low, high], [place, place], color=color, linewidth=2 if is_whole else 1)
        axes.plot(mean, place, marker="D" if is_whole else "o", color=color, markersize=6 if is_whole else 4)
    axes.set_yticks(range(len(lines)), [title for title, *_ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("difference in AP, with 95 % intervals")
    figure.savefig(path, dpi=120)
