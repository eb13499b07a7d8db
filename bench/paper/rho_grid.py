"""The radius, chosen as the paper does: train with each on a part of the training images, take the best on the rest.

The paper holds out 10 %. Of the few images of the small runs that would be a hundred, too few to choose by, so that
these hold out as many as they train on.

The row's `test_error` is that of the images held out; `unseen_error`, that of the test set, takes no part in the choice
and shows how good it was. rho = 0 is SGD. (Section 3.1; for noisy labels, appendix C.1 and table 8.) With --method the
same is done for a cheaper kind of SAM, which may want another radius.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.paper import figures, methods, runner, summary, tables
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.paper.training import Training
from bench.records import Row

RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
NOISE_RATES = (0.0, 0.4)
PAPER_VALIDATION, VALIDATION = 0.1, 0.5


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    kinds = [name for name in methods.METHODS if name != "SGD"]
    whose = f"whose radius is chosen: {'; '.join(kinds)}"
    add("--method", choices=kinds, default="SAM", metavar="NAME", help=whose)
    add("--rhos", type=float, nargs="+", default=list(RHOS), metavar="RHO", help="radii to try (default: the paper's)")
    rates = "of symmetric label noise, one grid for each; labels that are held out are clean (default: none, and 40 %%)"
    add("--noise-rates", type=float, nargs="+", default=list(NOISE_RATES), metavar="P", help=rates)
    held_out = f"of the images is held out (default: {VALIDATION}; with --paper {PAPER_VALIDATION})"
    add("--validation", type=float, metavar="PART", help=held_out)


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    """Return SGD, and the method with every radius, for every rate of noise."""
    method = methods.METHODS[args.method]
    usual = PAPER_VALIDATION if args.paper else VALIDATION
    held_out = usual if args.validation is None else args.validation
    if args.method != "SAM" and args.micro_batch is None:
        base = replace(base, micro_batch=None)  # not all methods go with one
    runs = []
    for rate in args.noise_rates:
        task = replace(base, validation=held_out, noise_rate=rate)
        runs.append((f"SGD, {summary.labels(rate)}", task))
        for rho in args.rhos:
            runs.append((f"{args.method} rho={rho:g}, {summary.labels(rate)}", method.configure(task, rho)))
    return runs


def observe(training: Training) -> Row:
    """Measure the error on the test set."""
    return {"unseen_error": training.evaluate(training.images.unseen)[0]}


def by_rho(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Group the rows of one task and method by radius, which is 0 for SGD."""
    return summary.by_option(rows, "rho", 0.0)


def chosen(rows: Sequence[Row]) -> float:
    """Return the radius that is chosen for one task and method; the rows of SGD do not count."""
    return summary.chosen({rho: same for rho, same in by_rho(rows).items() if rho})


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each rate of noise: both errors over rho, and those of SGD."""
    tasks = summary.by(rows, "noise_rate")
    config, seeds = rows[0]["config"], len({row["seed"] for row in rows})
    held_out = round(config["validation"] * config["train_size"])
    images = f"{config['train_size'] - held_out:,} images, {held_out:,} held out"
    about = f"{config['dataset']}, {images}, {config['epochs']} epochs; mean, 95 % interval, {seeds} seeds"
    with figures.canvas("Choosing rho on images held out", about, path, panels=len(tasks)) as panels:
        for axes, ((rate,), same) in zip(panels, tasks.items(), strict=True):
            panel(axes, same)
            figures.describe(axes, f"{summary.labels(rate)}, rho = {chosen(same):g} chosen", "rho")
            figures.legend(axes)


def panel(axes: Any, rows: Sequence[Row]) -> None:
    """Draw both errors over the radius, and those of SGD."""
    groups, best = by_rho(rows), chosen(rows)
    sgd = groups.pop(0.0, [])
    looks = (("test_error", "held out", figures.SAM, "-", 0.98), ("unseen_error", "test set", figures.GREY, "--", 1.02))
    for name, label, colour, style, beside in looks:
        points = [(beside * rho, summary.of(same, name)) for rho, same in groups.items()]
        figures.line(axes, points, label, colour, style, beside * best if name == "test_error" else None)
        figures.level(axes, sgd, name, f"SGD, {label}", style)
    figures.radii(axes, list(groups))
    axes.set_ylabel("error, %")


def section(rows: Sequence[Row]) -> str:
    """Write a line for each radius of SAM, the chosen one in bold, beside the paper's; then other methods' choices."""
    sam = [row for row in rows if methods.name_of(row) in ("SGD", "SAM")]
    blocks = [_all_radii(sam)]
    others = [row for row in rows if row not in sam]
    if others:
        heads = ["method", "task", "radii tried", "rho chosen", "held out, %", "test set, %"]
        blocks.append(summary.table(heads, _choices(others)))
    return "\n\n".join([*blocks, summary.caption(rows)])


def _all_radii(rows: Sequence[Row]) -> str:
    paper = {(row["noise_rate"], row["rho"]): row["mean"] for row in tables.published("rho_grid")}
    heads, columns = ["rho"], []
    for (rate,), same in summary.by(rows, "noise_rate").items():
        groups, best = by_rho(same), chosen(same)
        heads += [f"{summary.labels(rate)}: held out, %", "test set, %"]
        for name in ("test_error", "unseen_error"):
            cells = {rho: str(summary.of(of, name)) for rho, of in groups.items()}
            columns.append(cells | {best: f"**{cells[best]}**"})
        theirs = {rho: f"{mean:.1f}" for (noise, rho), mean in paper.items() if noise == rate}
        if theirs:
            heads.append("paper, %")
            columns.append(theirs)
    lines = [[f"{rho:g}" if rho else "0 (SGD)", *(column.get(rho, "") for column in columns)] for rho in by_rho(rows)]
    return summary.table(heads, lines)


def _choices(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for (rate,), task in summary.by(rows, "noise_rate").items():
        for method in methods.METHODS:
            own = [row for row in task if methods.name_of(row) == method]
            if own:
                groups, best = by_rho(own), chosen(own)
                spreads = [str(summary.of(groups[best], name)) for name in ("test_error", "unseen_error")]
                radii = ", ".join(f"{rho:g}" for rho in groups)
                lines.append([method, summary.labels(rate), radii, f"{best:g}", *spreads])
    return lines


EXPERIMENT = Experiment(
    name="rho_grid",
    description=__doc__,
    defaults={"train_size": 2_000},
    grid=grid,
    figure=figure,
    section=section,
    add_arguments=add_arguments,
    observe=observe,
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
