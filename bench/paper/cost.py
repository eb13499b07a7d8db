"""Test error against what it costs: SGD, SAM, and the ways to make SAM cheaper, each at several lengths.

Two prices: seconds (of the processor, with one thread, where it is a CPU), and forward-backward passes over the
training set. The first has in it what the optimizer does beside them, the second does not depend on the machine. A
point that none undercuts in both error and price is on the Pareto front: the methods to choose from. SGD and MSAM,
with one pass a step, also run twice as long as the longest of the others: as many passes as SAM takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.paper import figures, runner, summary
from bench.paper.config import Config
from bench.paper.methods import METHODS, name_of
from bench.paper.runner import Experiment, Named
from bench.records import Row

NOISE_RATES = (0.0, 0.4)
LENGTHS = (0.25, 0.5, 1.0)
NOISY = 2.0  # times rho with label noise: section 3.3 takes 0.1 where the rest of the paper takes 0.05
RADII = {"MSAM": 10.0}  # times SAM's rho, where bench.paper.rho_grid --method chose another
DOUBLED = ("SGD", "MSAM")  # one pass a step: twice the longest length has as many passes as SAM has there
PRICES = {"seconds": "CPU seconds, one thread", "passes": "forward-backward passes over the training set"}


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    names = f"some of: {'; '.join(METHODS)} (default: all)"
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="NAME", help=names)
    lengths = "of the runs, in units of --epochs"
    add("--lengths", type=float, nargs="+", default=list(LENGTHS), metavar="X", help=lengths)
    rates = "of symmetric label noise, a comparison each; rho is doubled where there is noise"
    add("--noise-rates", type=float, nargs="+", default=list(NOISE_RATES), metavar="P", help=rates)


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    """Return every method at every length, for every rate of noise."""
    lengths = sorted({max(1, round(length * base.epochs)) for length in args.lengths})
    runs = []
    for rate in args.noise_rates:
        task = replace(base, noise_rate=rate)
        rho = args.rho * (NOISY if rate else 1.0)
        for name in args.methods:
            for epochs in [*lengths, 2 * lengths[-1]] if name in DOUBLED else lengths:
                run = METHODS[name].configure(replace(task, epochs=epochs), RADII.get(name, 1.0) * rho)
                runs.append((f"{name}; {epochs} epochs, {summary.labels(rate)}", run))
    return runs


class Point(NamedTuple):
    """Holds what a method costs at one length, and how good it gets, over seeds."""

    method: str
    epochs: int
    seconds: summary.Interval
    passes: summary.Interval
    error: summary.Interval  # of the test set, in percent


def points(rows: Sequence[Row]) -> list[Point]:
    """Return one for each method and length, in the order of METHODS and the shortest first."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((name_of(row), row["config"]["epochs"]), []).append(row)
    order = list(METHODS)
    return [
        Point(*key, *(summary.of(groups[key], name) for name in ("seconds", "passes", "test_error")))
        for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    ]


def front(found: Sequence[Point], price: str) -> list[Point]:
    """Return those with a lower mean error than every point that costs no more, the cheapest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (getattr(point, price).mean, point.error.mean)):
        if not best or point.error.mean < best[-1].error.mean:
            best.append(point)
    return best


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw a row of two panels for each rate of noise: error over seconds and over passes."""
    tasks = summary.by(rows, "noise_rate")
    config, seeds = rows[0]["config"], len({row["seed"] for row in rows})
    about = f"{config['dataset']}, {config['train_size']:,} images; means of {seeds} seeds; grey: the Pareto front"
    height = 0.9 + 5.2 * len(tasks)
    shape = {"panels": 2 * len(tasks), "rows": len(tasks), "height": height}
    with figures.canvas("Test error against its price", about, path, **shape) as panels:
        for place, ((rate,), same) in enumerate(tasks.items()):
            found = points(same)
            for axes, price in zip(panels[2 * place :], PRICES):
                _panel(axes, found, price)
                figures.describe(axes, summary.labels(rate), PRICES[price])
                figures.legend(axes)


def _panel(axes: Any, found: Sequence[Point], price: str) -> None:
    """Draw one line for each method over its lengths, and the front."""
    from matplotlib import ticker

    best = front(found, price)
    axes.plot(
        [getattr(point, price).mean for point in best],
        [point.error.mean for point in best],
        color=figures.GREY,
        linewidth=7,
        alpha=0.25,
        solid_capstyle="round",
    )
    colours = figures.colours(list(METHODS))
    for name in METHODS:
        own = [point for point in found if point.method == name]
        axes.plot(
            [getattr(point, price).mean for point in own],
            [point.error.mean for point in own],
            color=colours[name],
            marker="o",
            markersize=5,
            linewidth=1.4,
            label=name,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_ylabel("test error, %")


def section(rows: Sequence[Row]) -> str:
    """Write a table for each task: what an epoch of each method costs, and its errors by length; the front in bold."""
    blocks = []
    for (rate,), same in summary.by(rows, "noise_rate").items():
        found = points(same)
        heads = [summary.labels(rate), "passes an epoch", "CPU s an epoch"]
        lengths = sorted({point.epochs for point in found})
        heads += [f"{epochs} epochs: error, %" for epochs in lengths]
        best = front(found, "seconds")
        names = dict.fromkeys(point.method for point in found)
        lines = [_line(name, [point for point in found if point.method == name], lengths, best) for name in names]
        blocks.append(summary.table(heads, lines))
    note = "In bold: on the Pareto front of seconds and error."
    return "\n\n".join([*blocks, f"{note} {summary.caption(rows)}"])


def _line(name: str, own: Sequence[Point], lengths: Sequence[int], best: Sequence[Point]) -> list[str]:
    epochs = sum(point.epochs for point in own)
    prices = [sum(getattr(point, price).mean for point in own) / epochs for price in ("passes", "seconds")]
    cells = {point.epochs: f"**{point.error}**" if point in best else str(point.error) for point in own}
    return [name, f"{prices[0]:.2f}", f"{prices[1]:.2f}", *(cells.get(epochs, "") for epochs in lengths)]


EXPERIMENT = Experiment(
    name="cost",
    description=__doc__,
    defaults={"epochs": 20, "micro_batch": None},  # not all of these kinds go with one
    grid=grid,
    figure=figure,
    section=section,
    add_arguments=add_arguments,
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
