"""A second data set: SAM against SGD of one and of two times its epochs, with clean and with wrong labels.

By default scikit-learn's digits, which need no download: 1,797 images of 8x8 pixels, enlarged to 24x24 with a black
border of two, 359 of them for the test. Radii are the paper's, 0.05 and with wrong labels 0.1; none is chosen by the
images that are tested on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.paper import figures, runner, summary
from bench.paper.config import Config
from bench.paper.cost import NOISE_RATES, NOISY
from bench.paper.runner import Experiment, Named
from bench.records import Row


def add_arguments(group: argparse._ArgumentGroup) -> None:
    rates = "of symmetric label noise, a comparison each; rho is doubled where there is noise"
    group.add_argument("--noise-rates", type=float, nargs="+", default=list(NOISE_RATES), metavar="P", help=rates)


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    runs = []
    for rate in args.noise_rates:
        sgd = replace(base, noise_rate=rate)
        sam = replace(sgd, optimizer="sam", options={"rho": args.rho * (NOISY if rate else 1.0)})
        runs += [("SGD", sgd), ("SGD, 2x epochs", replace(sgd, epochs=2 * base.epochs)), ("SAM", sam)]
    return runs


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each rate: every run's error, and the intervals of the methods."""
    tasks = summary.by(rows, "noise_rate")
    with figures.canvas("A second data set", summary.subtitle(rows), path, panels=len(tasks)) as panels:
        for axes, ((rate,), same) in zip(panels, tasks.items(), strict=True):
            figures.dots(axes, same)
            axes.set_title(summary.labels(rate).capitalize(), loc="left", fontsize=11)


def section(rows: Sequence[Row]) -> str:
    """Write a line for each method, with the points that SAM gains on it, paired by seed."""
    lines = []
    for (rate,), same in summary.by(rows, "noise_rate").items():
        methods = summary.by(same, "method")
        sam = methods.get(("SAM",), [])
        lines += [
            [summary.labels(rate), label, *summary.errors(own), summary.gain(own, sam)]
            for (label,), own in methods.items()
        ]
    heads = ["labels", "method", "passes", "test error, %", "training error, %", "SAM gains on it, points"]
    return f"{summary.table(heads, lines)}\n\n{summary.caption(rows)}"


EXPERIMENT = Experiment(
    "second_dataset",
    __doc__,
    grid,
    figure,
    section,
    add_arguments=add_arguments,
    defaults={"dataset": "digits", "seeds": tuple(range(8))},
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
