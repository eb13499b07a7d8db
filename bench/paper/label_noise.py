"""Wrong training labels: SGD, Mixup and SAM, and each again on labels that its own first model gives (table 4).

A part of the training labels is wrong, the test labels are right. Symmetric noise puts any other class, asymmetric
noise one that is easily taken for it. SGD and Mixup train two times as long as SAM, which is as many forward-backward
passes. With bootstrapping a first model is trained on the labels as given, and a second one from new weights on what
the first one says of the training images; its passes count both.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper import figures, runner, summary, tables, training
from bench.paper.config import NOISES, Config
from bench.paper.runner import Experiment, Named
from bench.records import Row
from bench.training import checkpoint

METHODS = ("SGD", "Mixup", "Bootstrap + Mixup", "SAM", "Bootstrap + SAM")
LARGE_NOISE = 0.8  # from here on the paper takes half of its rho
ALPHA, PAPER_ALPHAS = 1.0, (1.0, 8.0, 16.0, 32.0)
HELD_OUT = 0.1  # of the training images, to choose alpha by; their labels are clean, as for the paper's choice of rho


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rates", type=float, nargs="*", default=[0.2, 0.4, 0.6, 0.8], metavar="P", help="of symmetric noise")
    add("--asymmetric", type=float, nargs="*", default=[0.4], metavar="P", help="rates of asymmetric noise")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="on symmetric noise")
    of_asymmetric = "on asymmetric noise (default: those that are not bootstrapped)"
    add("--asymmetric-methods", nargs="+", choices=METHODS, default=["SGD", "Mixup", "SAM"], help=of_asymmetric)
    alpha = "of Mixup's Beta(alpha, alpha); of several each run takes that with the lowest error on images held out"
    usual = f"(default: {ALPHA:g}; with --paper {' '.join(f'{x:g}' for x in PAPER_ALPHAS)})"
    add("--alpha", type=float, nargs="+", metavar="ALPHA", help=f"{alpha} {usual}")


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    alphas = args.alpha or (PAPER_ALPHAS if args.paper else [ALPHA])
    runs = []
    wanted = ((args.rates, args.methods), (args.asymmetric, args.asymmetric_methods))
    for noise, (rates, labels) in zip(NOISES, wanted, strict=True):
        for rate in rates:
            named = _methods(replace(base, noise=noise, noise_rate=rate), args.rho, alphas)
            runs += [(label, named[label]) for label in labels]
    return runs


def _methods(base: Config, rho: float, alphas: Sequence[float]) -> dict[str, Config]:
    """Return the runs by name. Bootstrapped ones are after those that they take their labels from."""
    rho = rho / 2 if base.noise_rate >= LARGE_NOISE else rho
    choice = {"alphas": list(alphas)} if len(alphas) > 1 else {}
    mixed = replace(base, epochs=2 * base.epochs, mixup=alphas[0], extra=choice)
    sam = replace(base, optimizer="sam", options={"rho": rho})
    sgd = replace(base, epochs=2 * base.epochs)
    runs = (sgd, mixed, replace(mixed, bootstrap=True), sam, replace(sam, bootstrap=True))
    return dict(zip(METHODS, runs, strict=True))


def execute(config: Config, context: training.Context) -> Row:
    """Train a run, with what its model thinks of its training labels kept for the bootstrapped one."""
    if "alphas" in config.extra:
        alpha = chosen_alpha(replace(config, bootstrap=False), context)
        return execute(replace(config, mixup=alpha, extra={}), context) | {"alpha": alpha}
    if not config.bootstrap:
        model = _first(config, context)
        return model["result"] | {"right_labels": model["right"]}
    images = context.split(config)
    first = _first(replace(config, bootstrap=False), context)
    relabelled = images._replace(train=images.train._replace(labels=first["labels"]))
    second = training.train(config, context, images=relabelled).result()
    spent = {name: round(first["result"][name] + second[name], 3) for name in ("seconds", "passes")}
    # Of the labels as given, like in the other rows, the second model has seen none.
    return second | spent | {"right_labels": first["right"]}


def chosen_alpha(config: Config, context: training.Context) -> float:
    """Return that of several for which the fewest images held out are in a wrong class; the smallest of those alike."""
    tried = [replace(config, mixup=alpha, validation=HELD_OUT, extra={}) for alpha in sorted(config.extra["alphas"])]
    return min(tried, key=lambda one: _first(one, context)["result"]["test_error"]).mixup


def _first(config: Config, context: training.Context) -> Row:
    """Return a finished run and the labels its model gives to the training images; from the file, if there is one."""
    path = context.folder / f"{config.key}.labels.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    trained = training.train(config, context)
    labels = trained.logits(trained.images.train.images).argmax(dim=1).cpu()
    known = {"result": trained.result(), "labels": labels, "right": _agreement(labels, trained.images.true_labels)}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(known, path)
    return known


def _agreement(labels: Tensor, others: Tensor) -> float:
    """Return the percentage of equal labels."""
    return 100 * float((labels == others).double().mean())


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw test error over the rate, a panel for each kind of noise; of a kind with one rate all runs."""
    kinds = summary.by(rows, "noise")
    with figures.canvas("Wrong training labels", summary.subtitle(rows), path, panels=len(kinds)) as panels:
        for axes, ((noise,), same) in zip(panels, kinds.items(), strict=True):
            rates = sorted(rate for (rate,) in summary.by(same, "noise_rate"))
            (figures.dots if len(rates) == 1 else _over_rates)(axes, same)
            which = f", {rates[0]:.0%}" if len(rates) == 1 else ""
            axes.set_title(f"{noise.capitalize()} noise{which}", loc="left", fontsize=11)


def _over_rates(axes: Any, rows: Sequence[Row]) -> None:
    methods = summary.by(rows, "method")
    colours = figures.colours([label for (label,) in methods])
    for (label,), runs in methods.items():
        points = [(100 * rate, summary.of(group)) for (rate,), group in summary.by(runs, "noise_rate").items()]
        figures.line(axes, points, label, colours[label])
    axes.set_xlabel("Wrong training labels (%)")
    axes.set_ylabel("Test error (%)")
    axes.set_ylim(bottom=0)
    figures.legend(axes, columns=3)


def section(rows: Sequence[Row]) -> str:
    """Write a table for each kind of noise; beside symmetric noise the paper's figures, of others' methods too."""
    published = {(row["method"], row["noise_rate"]): row["mean"] for row in tables.published("label_noise")}
    parts = [
        _errors(f"{noise} noise", same, published if noise == "symmetric" else {})
        for (noise,), same in summary.by(rows, "noise").items()
    ]
    return "\n\n".join([*parts, summary.caption(rows)])


def _errors(title: str, rows: Sequence[Row], published: Mapping[tuple[str, float], float]) -> str:
    """Write a line per method, a column per rate."""

    def error_of(label: str, rate: float) -> str:
        accuracy = published.get((label, rate))
        return "" if accuracy is None else f"{100 - accuracy:.1f}"

    rates = sorted(rate for (rate,) in summary.by(rows, "noise_rate"))
    cells = summary.by(rows, "method", "noise_rate")
    heads = [f"{title}: test error, %"]
    for rate in rates:
        heads += [f"{rate:.0%}"] + ["paper"] * bool(published)
    lines = []
    for (label,) in summary.by(rows, "method"):
        line = [label]
        for rate in rates:
            errors = [row["test_error"] for row in cells.get((label, rate), [])]
            line.append(str(summary.interval(errors)) if errors else "")
            line += [error_of(label, rate)] * bool(published)
        lines.append(line)
    differences = ["SGD minus SAM"]
    for rate in rates:
        points = summary.gain(cells.get(("SGD", rate), []), cells.get(("SAM", rate), []))
        differences += [points, *[""] * bool(published)]
    others = [
        [label, *itertools.chain.from_iterable(("", error_of(label, rate)) for rate in rates)]
        for label in dict.fromkeys(label for label, _ in published if (label,) not in summary.by(rows, "method"))
    ]
    return summary.table(heads, [*lines, differences, *others])


EXPERIMENT = Experiment(
    "label_noise",
    __doc__,
    grid,
    figure,
    section,
    add_arguments=add_arguments,
    defaults={"rho": 0.1, "noise_rate": 0.4},
    execute=execute,
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
