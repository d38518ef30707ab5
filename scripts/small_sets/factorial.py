"""Several changes tried at once: which arms, and what each change does, estimated from all of them.

Source: Box, Hunter and Hunter, "Statistics for Experimenters", two-level fractional factorial designs.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BASE = 4  # factors whose combinations are all tried
# Those beyond: on where an odd number of three others is, so that no effect is mixed with that of two factors together.
GENERATORS = ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2))
MAX_FACTORS = BASE + len(GENERATORS)


@dataclass(frozen=True)
class Effect:
    """What a factor changes, on average over the sets.

    Attributes:
        by_set: {set: change}.
        mean: over the sets.
        error: its standard error, by what the factors do not explain; NaN where that cannot be told.
    """

    by_set: dict[str, float]
    mean: float
    error: float


def combinations(factors: int) -> list[tuple[bool, ...]]:
    """Which factors are on in each arm: 2**factors arms, at most 16."""
    found = []
    for base in itertools.product((False, True), repeat=min(factors, BASE)):
        more = [sum(base[place] for place in three) % 2 == 1 for three in GENERATORS[: max(0, factors - BASE)]]
        found.append((*base, *more))
    return found


def effects(levels: Mapping[str, Sequence[bool]], values: Mapping[str, Mapping[str, float]]) -> list[Effect]:
    """The effect of each factor, by least squares.

    Args:
        levels: {arm: which factors are on}.
        values: {set: {arm: value}}, of all arms.
    """
    signs = np.array([[1.0, *(1.0 if on else -1.0 for on in one)] for one in levels.values()])  # [arms, 1 + factors]
    results: np.ndarray = np.array([[one[arm] for arm in levels] for one in values.values()]).T  # [arms, sets]
    solution = np.linalg.lstsq(signs, results, rcond=None)[0]
    left = (len(signs) - signs.shape[1]) * len(values)
    variance = float(((results - signs @ solution) ** 2).sum()) / left if left else np.nan
    error = 2 * float(np.sqrt(variance / results.size))
    changes = 2 * solution[1:]
    return [Effect(dict(zip(values, change.tolist(), strict=True)), float(change.mean()), error) for change in changes]
