"""m-sharpness (section 4.1, figure 3): SAM with an e of its own for every m images of a batch, for several m and rho.

Part of the training labels is wrong, so that there is something that should not be learnt. Of each trained network it
measures the m-sharpness for several m and radii, and how well that predicts the generalisation gap. The gap is that of
the error between training and test images whose labels have the same noise. Networks have GroupNorm in the place of
BatchNorm: with BatchNorm small groups would also be normalised by few images, which is another effect.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from bench.paper import association, figures, noise, runner, summary
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.paper.training import Training
from bench.records import Row
from fused_sam import analysis

RADII = (0.05, 0.2)  # to measure with; one step of the ascent, so that it is the gap that SAM sees in its step
SHOWN = 0.2  # in the picture


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--m", type=int, nargs="+", default=[64, 16, 4], help="images that share an e in training (64 16 4)")
    add("--rhos", type=float, nargs="+", default=[0.1, 0.2], metavar="RHO", help="radii to train with")
    add("--noise-rate", type=float, default=0.2, metavar="P", help="of the training labels are wrong (0.2)")
    add("--measured-m", type=int, nargs="+", default=[4, 16, 64, 256], metavar="M", help="to measure (4 16 64 256)")
    add("--examples", type=int, default=256, metavar="N", help="training images that it is measured on (256)")
    add("--batchnorm", action="store_true", help="leave BatchNorm in the network")


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    """SGD, which is SAM with rho = 0 for any m, and SAM for every m and rho."""
    if max(args.measured_m) > args.examples:
        raise ValueError(f"Invalid measured_m={args.measured_m}. Must be at most {args.examples}, the images for it.")
    model = base.model if args.batchnorm else f"{base.model}-groupnorm"
    measured = {"examples": args.examples, "m": args.measured_m}
    base = replace(base, model=model, noise_rate=args.noise_rate, extra=measured)
    runs = [("SGD", base)]
    for m in args.m:
        for rho in args.rhos:
            sam = replace(base, optimizer="sam", options={"rho": rho}, micro_batch=m)
            runs.append((f"SAM m={m} rho={rho:g}", sam))
    return runs


def observe(training: Training) -> Row:
    """The gap, and the m-sharpness of the training loss of the network in evaluation mode."""
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
    """Percentage of the test images, their labels with the noise of the training labels, in a wrong class."""
    test, config = training.images.test, training.config
    labels = noise.corrupted(test.labels, config, training.images.classes)
    return training.evaluate(test._replace(labels=labels))[0]


def measured(rows: Sequence[Row], rho: float, m: int) -> list[float]:
    """The m-sharpness of every run."""
    return [next(x["sharpness"] for x in row["sharpness"] if (x["rho"], x["m"]) == (rho, m)) for row in rows]


def figure(rows: Sequence[Row], path: Path) -> None:
    """Error over rho for each m; the gap over the m-sharpness; what that predicts, for each m it is measured with."""
    config = rows[0]["config"]
    runs = len(rows)
    about = f"{summary.task(rows[0])}, {config['noise_rate']:.0%} label noise"
    subtitle = f"{about}; mean and 95 % interval of {len(summary.by(rows, 'seed'))} seeds, {runs} runs"
    with figures.canvas("m-sharpness", subtitle, path, panels=3) as (errors, scatter, predictive):
        _errors(errors, rows)
        _scatter(scatter, rows)
        _predictive(predictive, rows)


def _colours(rows: Sequence[Row]) -> dict[int, str]:
    """One for each m, in training and measured."""
    trained = {m for (m,) in summary.by(rows, "micro_batch") if m is not None}
    ms = sorted(trained.union(rows[0]["config"]["extra"]["m"]))
    named = figures.colours([str(m) for m in ms])
    return {m: named[str(m)] for m in ms}


def _errors(axes: Any, rows: Sequence[Row]) -> None:
    sam = [row for row in rows if row["config"]["options"]]
    colours = _colours(rows)
    for (m,), same in summary.by(sam, "micro_batch").items():
        points = [(rho, summary.of(of)) for rho, of in _by_rho(same).items()]
        figures.line(axes, points, f"m={m}", colours[m])
    plain = [row for row in rows if not row["config"]["options"]]
    if plain:
        axes.axhline(summary.of(plain).mean, color=figures.SGD, linestyle="--", linewidth=1.2, label="SGD")
    rhos = sorted(_by_rho(sam))
    axes.set_xscale("log")
    axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    axes.minorticks_off()
    axes.set_title("Test error (%) by m in training", loc="left", fontsize=11)
    axes.set_xlabel("rho in training")
    axes.legend()


def _by_rho(rows: Sequence[Row]) -> dict[float, list[Row]]:
    groups: dict[float, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["config"]["options"]["rho"], []).append(row)
    return groups


def _scatter(axes: Any, rows: Sequence[Row]) -> None:
    ms = rows[0]["config"]["extra"]["m"]
    colours = _colours(rows)
    gaps = [row["gap"] for row in rows]
    for m in ms:
        axes.scatter(measured(rows, SHOWN, m), gaps, s=14, color=colours[m], alpha=0.8)
    axes.set_xscale("log")
    axes.set_title("Generalisation gap (% points)", loc="left", fontsize=11)
    axes.set_xlabel(f"m-sharpness with rho={SHOWN:g}; m: colours as on the right")


def _predictive(axes: Any, rows: Sequence[Row]) -> None:
    """Mutual information as bars, with what chance gives as a line across each; the rank correlation above."""
    ms = rows[0]["config"]["extra"]["m"]
    colours = _colours(rows)
    gaps = [row["gap"] for row in rows]
    for place, m in enumerate(ms):
        found = association.mutual_information(measured(rows, SHOWN, m), gaps) if len(rows) >= 3 else None
        if found is None:
            continue
        rank = association.spearman(measured(rows, SHOWN, m), gaps)
        axes.bar(place, found.value, color=colours[m], width=0.6)
        axes.hlines(found.chance, place - 0.4, place + 0.4, color=figures.GREY, linestyle="--", linewidth=1.2)
        axes.annotate(f"{rank.value:+.2f}", (place, max(found.value, found.chance)), ha="center", va="bottom")
    axes.set_xticks(range(len(ms)), [str(m) for m in ms])
    axes.margins(y=0.15)
    axes.set_title("Mutual information with the gap (nats)", loc="left", fontsize=11)
    axes.set_xlabel("m measured; above: Spearman's rho; line: chance")


def section(rows: Sequence[Row]) -> str:
    """Error and gap for each m and rho, then what the measurements predict."""
    parts = [_table(rows, "test_error", "test error, %"), _table(rows, "gap", "generalisation gap, % points")]
    if len(rows) >= 3:
        parts.append(_predictions(rows))
    return "\n\n".join([*parts, summary.caption(rows)])


def _table(rows: Sequence[Row], name: str, title: str) -> str:
    """A line per m, a column per rho."""
    sam = [row for row in rows if row["config"]["options"]]
    rhos = sorted(_by_rho(sam))
    plain = [row for row in rows if not row["config"]["options"]]
    lines = []
    for (m,), same in summary.by(sam, "micro_batch").items():
        cells = {rho: str(summary.of(of, name)) for rho, of in _by_rho(same).items()}
        sgd = str(summary.of(plain, name)) if plain else ""
        lines.append([f"m = {m}", sgd, *(cells.get(rho, "") for rho in rhos)])
    return summary.table([title, "SGD", *(f"rho = {rho:g}" for rho in rhos)], lines)


def _predictions(rows: Sequence[Row]) -> str:
    """A line per measurement."""
    gaps = [row["gap"] for row in rows]
    lines = []
    for rho in RADII:
        for m in rows[0]["config"]["extra"]["m"]:
            values = measured(rows, rho, m)
            ranks = [str(association.spearman(values, gaps)), f"{association.kendall(values, gaps):+.2f}"]
            information = association.mutual_information(values, gaps)
            lines.append([f"m = {m}, rho = {rho:g}", *ranks, str(information or "")])
    heads = ["m-sharpness", "Spearman's rho with the gap", "Kendall's tau", "mutual information, nats (chance)"]
    return summary.table(heads, lines)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    return runner.main(EXPERIMENT, argv)


if __name__ == "__main__":
    raise SystemExit(main())
