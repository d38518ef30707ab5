"""How sure a difference between two arms is: an exact test over the sets, and an interval for its size."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 10_000
MAX_EXACT_SETS = 20  # 2**20 sign patterns
Differences = Mapping[str, Mapping[int, Sequence[float]]]  # by set and fold, those of the seeds


def paired(one: Mapping[tuple[str, int, int], float], other: Mapping[tuple[str, int, int], float]) -> Differences:
    """`one` minus `other` wherever both have a value of the same (set, fold, seed)."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for data, fold, seed in sorted(one.keys() & other.keys()):
        found[data][fold].append(one[data, fold, seed] - other[data, fold, seed])
    return found


def set_means(differences: Differences) -> np.ndarray:
    """[S] the mean of each set: over its folds, of the means over the seeds."""
    return np.array([np.mean([np.mean(seeds) for seeds in folds.values()]) for folds in differences.values()])


def sign_flip(means: np.ndarray) -> float:
    """The exact p of the hypothesis that each set's difference is as likely to be the other way round, two-sided.

    With few sets it cannot be small: 2 / 2**S at best.

    Args:
        means: [S] differences, one a set, at most MAX_EXACT_SETS.
    """
    signs = np.array(list(itertools.product((1, -1), repeat=len(means))))
    sums = np.abs(signs @ means)
    return float((sums >= sums[0] - 1e-12).mean())


def bootstrap(differences: Differences, share: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The interval that holds `share` of the mean difference over the sets, when sets, the folds of each and the seeds
    of each are drawn again with replacement."""
    rng = np.random.default_rng(seed)
    sets = [[np.asarray(seeds, float) for seeds in folds.values()] for folds in differences.values()]
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        total = 0.0
        for data in rng.integers(len(sets), size=len(sets)):
            folds = sets[data]
            chosen = rng.integers(len(folds), size=len(folds))
            total += np.mean([folds[fold][rng.integers(len(folds[fold]), size=len(folds[fold]))].mean()
                              for fold in chosen])  # fmt: skip
        means[number] = total / len(sets)
    low, high = np.percentile(means, [50 * (1 - share), 50 * (1 + share)])
    return float(low), float(high)
