"""m-sharpness (section 4.1, figure 3): SAM with a perturbation for every m images of a batch, for several m and rho.

Part of the training labels is wrong, so that there is something that should not be learnt. Of each trained network it
measures the m-sharpness for several m and radii, and how well that predicts the generalisation gap. The gap is that of
the error between training and test images whose labels have the same noise. Networks have GroupNorm in the place of
BatchNorm: with BatchNorm small groups would also be normalised by few images, which is another effect.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F

from bench.paper import data, figures, models, runner, summary
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.paper.training import Training
from bench.records import Row
from fused_sam import analysis

RADII = (0.05, 0.2)  # to measure with; one step of the ascent, so that it is the gap that SAM sees in its step
SHOWN = 0.2  # in the picture
RESAMPLES = 400
NEIGHBOURS = 3  # of scikit-learn's estimator, which needs more runs than that


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--m", type=int, nargs="+", default=[64, 16, 4], help="images that share a perturbation in training")
    add("--rhos", type=float, nargs="+", default=[0.1, 0.2], metavar="RHO", help="radii to train with")
    add("--noise-rate", type=float, default=0.2, metavar="P", help="of the training labels are wrong")
    add("--measured-m", type=int, nargs="+", default=[4, 16, 64, 256], metavar="M", help="to measure")
    add("--examples", type=int, default=256, metavar="N", help="training images that it is measured on")
    add("--norm", choices=tuple(models.NORMS), default="group", help="what normalises")


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    """Return SGD, which is SAM with rho = 0 for any m, and SAM for every m and rho."""
    if max(args.measured_m) > args.examples:
        raise ValueError(f"Invalid measured_m={args.measured_m}. Must be at most {args.examples}, the images for it.")
    model = base.model + models.NORMS[args.norm].suffix
    measured = {"examples": args.examples, "m": args.measured_m}
    base = replace(base, model=model, noise_rate=args.noise_rate, micro_batch=None, extra=measured)
    runs = [("SGD", base)]
    for m in args.m:
        for rho in args.rhos:
            sam = replace(base, optimizer="sam", options={"rho": rho}, micro_batch=m)
            runs.append((f"SAM m={m} rho={rho:g}", sam))
    return runs


def observe(training: Training) -> Row:
    """Measure the gap, and the m-sharpness of the training loss of the network in evaluation mode."""
    config, images = training.config, training.images
    gap = noisy_test_error(training) - training.evaluate(images.train)[0]
    batch = training.examples(config.extra["examples"])
    found = []
    for rho in RADII:
        for m in config.extra["m"]:
            value = analysis.sharpness(training.model, F.cross_entropy, batch, rho=rho, m=m).sharpness
            found.append({"rho": rho, "m": m, "sharpness": value})
    return {"gap": gap, "sharpness": found}


def noisy_test_error(training: Training) -> float:
    """Return the percentage of test images in a wrong class, their labels with the noise of the training labels."""
    test, config = training.images.test, training.config
    labels = data.corrupted(test.labels, config, training.images.classes)
    return training.evaluate(test._replace(labels=labels))[0]


def measured(rows: Sequence[Row], rho: float, m: int) -> list[float]:
    """Return the m-sharpness of every run."""
    return [next(x["sharpness"] for x in row["sharpness"] if (x["rho"], x["m"]) == (rho, m)) for row in rows]


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw error over rho by m, the gap over the m-sharpness, and what that predicts by the m that is measured."""
    noise_rate = f"{rows[0]['config']['noise_rate']:.0%} label noise"
    subtitle = f"{summary.subtitle(rows, noise_rate)}, {len(rows)} runs"
    with figures.canvas("m-sharpness", subtitle, path, panels=3) as (errors, scatter, predictive):
        _errors(errors, rows)
        _scatter(scatter, rows)
        _predictive(predictive, rows)


def _colours(rows: Sequence[Row]) -> dict[int, str]:
    """Return one for each m, in training and measured."""
    trained = {m for (m,) in summary.by(rows, "micro_batch") if m is not None}
    ms = sorted(trained.union(rows[0]["config"]["extra"]["m"]))
    named = figures.colours([str(m) for m in ms])
    return {m: named[str(m)] for m in ms}


def _sgd_and_sam(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    sam = [row for row in rows if row["config"]["options"]]
    return [row for row in rows if row not in sam], sam


def _errors(axes: Any, rows: Sequence[Row]) -> None:
    sgd, sam = _sgd_and_sam(rows)
    colours = _colours(rows)
    for (m,), same in summary.by(sam, "micro_batch").items():
        points = [(rho, summary.of(of)) for rho, of in summary.by_option(same, "rho").items()]
        figures.line(axes, points, f"m={m}", colours[m])
    figures.level(axes, sgd)
    figures.radii(axes, list(summary.by_option(sam, "rho")))
    figures.describe(axes, "Test error (%) by m in training", "rho in training")
    figures.legend(axes)


def _scatter(axes: Any, rows: Sequence[Row]) -> None:
    ms = rows[0]["config"]["extra"]["m"]
    colours = _colours(rows)
    gaps = [row["gap"] for row in rows]
    for m in ms:
        axes.scatter(measured(rows, SHOWN, m), gaps, s=14, color=colours[m], alpha=0.8, label=f"measured with m={m}")
    axes.set_xscale("log")
    figures.describe(axes, "Generalisation gap (% points)", f"m-sharpness with rho={SHOWN:g}")
    figures.legend(axes)


def _predictive(axes: Any, rows: Sequence[Row]) -> None:
    """Draw mutual information as bars, with what chance gives as a line across each; the rank correlation above."""
    ms = rows[0]["config"]["extra"]["m"]
    colours = _colours(rows)
    gaps = [row["gap"] for row in rows]
    for place, m in enumerate(ms):
        if len(rows) <= NEIGHBOURS:
            continue
        found = mutual_information(measured(rows, SHOWN, m), gaps)
        rank = spearman(measured(rows, SHOWN, m), gaps)
        axes.bar(place, found.value, color=colours[m], width=0.6)
        axes.hlines(found.chance, place - 0.4, place + 0.4, color=figures.GREY, linestyle="--", linewidth=1.2)
        axes.annotate(f"{rank.value:+.2f}", (place, max(found.value, found.chance)), ha="center", va="bottom")
    axes.set_xticks(range(len(ms)), [str(m) for m in ms])
    axes.margins(y=0.15)
    about = "m measured; above: Spearman's rho; line: chance"
    figures.describe(axes, "Mutual information with the gap (nats)", about)


def section(rows: Sequence[Row]) -> str:
    """Write error and gap for each m and rho, then what the measurements predict."""
    parts = [_table(rows, "test_error", "test error, %"), _table(rows, "gap", "generalisation gap, % points")]
    if len(rows) > NEIGHBOURS:
        parts.append(_predictions(rows))
    return "\n\n".join([*parts, summary.caption(rows)])


def _table(rows: Sequence[Row], name: str, title: str) -> str:
    """Write a line per m, a column per rho."""
    sgd, sam = _sgd_and_sam(rows)
    rhos = list(summary.by_option(sam, "rho"))
    plain = str(summary.of(sgd, name)) if sgd else ""
    lines = []
    for (m,), same in summary.by(sam, "micro_batch").items():
        cells = {rho: str(summary.of(of, name)) for rho, of in summary.by_option(same, "rho").items()}
        lines.append([f"m = {m}", plain, *(cells.get(rho, "") for rho in rhos)])
    return summary.table([title, "SGD", *(f"rho = {rho:g}" for rho in rhos)], lines)


def _predictions(rows: Sequence[Row]) -> str:
    """Write a line per measurement."""
    from scipy import stats

    gaps = [row["gap"] for row in rows]
    lines = []
    for rho in RADII:
        for m in rows[0]["config"]["extra"]["m"]:
            values = measured(rows, rho, m)
            ranks = [str(spearman(values, gaps)), f"{stats.kendalltau(values, gaps).statistic:+.2f}"]
            lines.append([f"m = {m}, rho = {rho:g}", *ranks, str(mutual_information(values, gaps))])
    heads = ["m-sharpness", "Spearman's rho with the gap", "Kendall's tau", "mutual information, nats (chance)"]
    return summary.table(heads, lines)


# how well one figure of many runs predicts another


class Estimate(NamedTuple):
    """Holds a rank correlation with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


class Information(NamedTuple):
    """Holds mutual information in nats, and what 95 % of estimates stay below when the two have nothing in common."""

    value: float
    chance: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.chance:.2f})"


def spearman(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Return Spearman's rho of n >= 3 runs; percentiles over samples of as many runs, drawn with replacement."""
    import numpy as np
    from scipy import stats

    x, y = np.asarray(x), np.asarray(y)
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    # A sample of one run only, repeated, has no correlation.
    samples = [(x[draw], y[draw]) for draw in draws if np.ptp(x[draw]) and np.ptp(y[draw])]
    low, high = np.quantile([stats.spearmanr(*sample).statistic for sample in samples], [0.025, 0.975])
    return Estimate(float(stats.spearmanr(x, y).statistic), float(low), float(high))


def mutual_information(x: Sequence[float], y: Sequence[float]) -> Information:
    """Return I(x; y) by the distances to nearest neighbours (Kraskov et al. 2004), after ranking.

    Mutual information does not change when x or y is mapped monotonically; this estimate of it does, so both are
    ranked first. A bootstrap repeats runs, which are then at distance 0 of each other and look like information. So
    instead of an interval there is the estimate for shuffled ranks, which shows how much of the figure is chance.
    """
    from scipy import stats

    return Information(_estimate(stats.rankdata(x), stats.rankdata(y)), _chance(len(x)))


@functools.cache
def _chance(runs: int) -> float:
    """Return the 95th percentile of the estimate for ranks in random order."""
    import numpy as np

    generator, ranks = np.random.default_rng(0), np.arange(runs)
    return float(np.quantile([_estimate(generator.permutation(ranks), ranks) for _ in range(RESAMPLES)], 0.95))


def _estimate(x: Any, y: Any) -> float:
    from sklearn.feature_selection import mutual_info_regression

    found = mutual_info_regression(x[:, None], y, n_neighbors=NEIGHBOURS, discrete_features=False, random_state=0)
    return float(found[0])


EXPERIMENT = Experiment(
    "m_sharpness",
    __doc__,
    grid,
    figure,
    section,
    add_arguments=add_arguments,
    defaults={"train_size": 512, "batch_size": 64, "epochs": 28, "augment": "none"},
    observe=observe,
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
