"""How well one figure of many runs predicts another: rank correlations and mutual information."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

RESAMPLES = 400
NEIGHBOURS = 3  # of scikit-learn's estimator, which needs more runs than that


class Estimate(NamedTuple):
    """A rank correlation with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


class Information(NamedTuple):
    """Mutual information in nats, and what 95 % of estimates stay below when the two have nothing in common."""

    value: float
    chance: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.chance:.2f})"


def spearman(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's rho of n >= 3 runs; percentiles over samples of as many runs, drawn with replacement."""
    import numpy as np
    from scipy import stats

    x, y = _checked(x, y)
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    # A sample of one run only, repeated, has no correlation.
    samples = [(x[draw], y[draw]) for draw in draws if np.ptp(x[draw]) and np.ptp(y[draw])]
    low, high = np.quantile([stats.spearmanr(*sample).statistic for sample in samples], [0.025, 0.975])
    return Estimate(float(stats.spearmanr(x, y).statistic), float(low), float(high))


def kendall(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of n >= 3 runs."""
    from scipy import stats

    return float(stats.kendalltau(*_checked(x, y)).statistic)


def mutual_information(x: Sequence[float], y: Sequence[float]) -> Information | None:
    """I(x; y) by the distances to nearest neighbours (Kraskov et al. 2004), after ranking; None for too few runs.

    Mutual information does not change when x or y is mapped monotonically; this estimate of it does, so both are
    ranked first. A bootstrap repeats runs, which are then at distance 0 of each other and look like information. So
    instead of an interval there is the estimate for shuffled ranks, which shows how much of the figure is chance.
    """
    from scipy import stats

    x, y = _checked(x, y)
    if len(x) <= NEIGHBOURS:
        return None
    return Information(_information(stats.rankdata(x), stats.rankdata(y)), _chance(len(x)))


@functools.cache
def _chance(runs: int) -> float:
    """The 95th percentile of the estimate for ranks in random order."""
    import numpy as np

    generator, ranks = np.random.default_rng(0), np.arange(runs)
    return float(np.quantile([_information(generator.permutation(ranks), ranks) for _ in range(RESAMPLES)], 0.95))


def _information(x: Any, y: Any) -> float:
    from sklearn.feature_selection import mutual_info_regression

    found = mutual_info_regression(x[:, None], y, n_neighbors=NEIGHBOURS, discrete_features=False, random_state=0)
    return float(found[0])


def _checked(x: Sequence[float], y: Sequence[float]) -> tuple[Any, Any]:
    import numpy as np

    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"Invalid x and y of {len(x)} and {len(y)} values. Must be as many, and at least 3.")
    return np.asarray(x, dtype=float), np.asarray(y, dtype=float)
