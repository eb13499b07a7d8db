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

from bench.paper import figures, runner, savings, summary, tables
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.paper.training import Training
from bench.records import Row

RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
NOISE_RATES = (0.0, 0.4)
PAPER_VALIDATION, VALIDATION = 0.1, 0.5


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    kinds = [name for name in savings.METHODS if name != "SGD"]
    whose = f"whose radius is chosen: {'; '.join(kinds)} (default: %(default)s)"
    add("--method", choices=kinds, default="SAM", metavar="NAME", help=whose)
    add("--rhos", type=float, nargs="+", default=list(RHOS), metavar="RHO", help="radii to try (default: the paper's)")
    rates = "of symmetric label noise, one grid for each; labels that are held out are clean (default: none, and 40 %%)"
    add("--noise-rates", type=float, nargs="+", default=list(NOISE_RATES), metavar="P", help=rates)
    held_out = f"of the images is held out (default: {VALIDATION}; with --paper {PAPER_VALIDATION})"
    add("--validation", type=float, metavar="PART", help=held_out)


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    """SGD, and the method with every radius, for every rate of noise."""
    method = savings.METHODS[args.method]
    usual = PAPER_VALIDATION if args.paper else VALIDATION
    held_out = usual if args.validation is None else args.validation
    runs = []
    for rate in args.noise_rates:
        task = replace(base, validation=held_out, noise_rate=rate)
        runs.append((f"SGD, {_task(rate)}", task))
        for rho in args.rhos:
            runs.append((f"{args.method} rho={rho:g}, {_task(rate)}", method.configure(task, rho)))
    return runs


def observe(training: Training) -> Row:
    """The error on the test set."""
    return {"unseen_error": training.evaluate(training.images.unseen)[0]}


def rho_of(row: Row) -> float:
    """0 for SGD."""
    return row["config"]["options"].get("rho", 0.0)


def chosen(rows: Sequence[Row]) -> float:
    """The radius with the lowest mean error on the images held out; the smaller of two that are alike.

    Args:
        rows: of one task and method; those of SGD do not count.
    """
    means = {rho: summary.of(same).mean for rho, same in _by_rho(rows).items() if rho}
    return min(means, key=lambda rho: (means[rho], rho))


def _by_rho(rows: Sequence[Row]) -> dict[float, list[Row]]:
    groups: dict[float, list[Row]] = {}
    for row in sorted(rows, key=rho_of):
        groups.setdefault(rho_of(row), []).append(row)
    return groups


def _task(rate: float) -> str:
    return f"{rate:.0%} label noise" if rate else "clean labels"


def figure(rows: Sequence[Row], path: Path) -> None:
    """A panel for each rate of noise: both errors over rho, and those of SGD."""
    tasks = summary.by(rows, "noise_rate")
    config, seeds = rows[0]["config"], len({row["seed"] for row in rows})
    held_out = round(config["validation"] * config["train_size"])
    images = f"{config['train_size'] - held_out:,} images, {held_out:,} held out"
    about = f"{config['dataset']}, {images}, {config['epochs']} epochs; mean, 95 % interval, {seeds} seeds"
    with figures.canvas("Choosing rho on images held out", about, path, panels=len(tasks)) as panels:
        for axes, ((rate,), same) in zip(panels, tasks.items(), strict=True):
            _panel(axes, same)
            axes.set_title(f"{_task(rate)}, rho = {chosen(same):g} chosen", loc="left", fontsize=11)


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    groups = _by_rho(rows)
    rhos = [rho for rho in groups if rho]
    best = chosen(rows)
    looks = (("test_error", "held out", figures.SAM, "-", 0.98), ("unseen_error", "test set", figures.GREY, "--", 1.02))
    for name, label, colour, dashes, beside in looks:
        spreads = [summary.of(groups[rho], name) for rho in rhos]
        axes.errorbar(
            [beside * rho for rho in rhos],
            [spread.mean for spread in spreads],
            yerr=[spread.half for spread in spreads],
            color=colour,
            linestyle=dashes,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.6,
            label=label,
        )
        if name == "test_error":
            mark = spreads[rhos.index(best)].mean
            axes.plot([beside * best], [mark], "o", color=colour, markersize=11, fillstyle="none")
        if 0.0 in groups:
            level = summary.of(groups[0.0], name).mean
            axes.axhline(level, color=figures.SGD, linestyle=dashes, linewidth=1.2, label=f"SGD, {label}")
    axes.set_xscale("log")
    axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    axes.minorticks_off()
    axes.set_xlabel("rho")
    axes.set_ylabel("error, %")
    axes.legend(fontsize=8)


def section(rows: Sequence[Row]) -> str:
    """A line for each radius of SAM, the chosen one in bold, beside the paper's; then what other methods choose."""
    sam = [row for row in rows if savings.name_of(row) in ("SGD", "SAM")]
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
        groups = _by_rho(same)
        best = chosen(same)
        heads += [f"{_task(rate)}: held out, %", "test set, %"]
        for name in ("test_error", "unseen_error"):
            columns.append({rho: _cell(summary.of(of, name), rho == best) for rho, of in groups.items()})
        theirs = {rho: f"{mean:.1f}" for (noise, rho), mean in paper.items() if noise == rate}
        if theirs:
            heads.append("paper, %")
            columns.append(theirs)
    rhos = sorted({rho_of(row) for row in rows})
    lines = [[f"{rho:g}" if rho else "0 (SGD)", *(column.get(rho, "") for column in columns)] for rho in rhos]
    return summary.table(heads, lines)


def _choices(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for (rate,), task in summary.by(rows, "noise_rate").items():
        for method in savings.METHODS:
            own = [row for row in task if savings.name_of(row) == method]
            if own:
                groups, best = _by_rho(own), chosen(own)
                spreads = [str(summary.of(groups[best], name)) for name in ("test_error", "unseen_error")]
                lines.append([method, _task(rate), ", ".join(f"{rho:g}" for rho in groups), f"{best:g}", *spreads])
    return lines


def _cell(spread: summary.Interval, bold: bool) -> str:
    return f"**{spread}**" if bold else str(spread)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    return runner.main(EXPERIMENT, argv)


if __name__ == "__main__":
    raise SystemExit(main())
