"""The spectrum of the Hessian while SGD and SAM train (section 4.2, figure 3, left).

At several epochs: the five largest eigenvalues of the Hessian of the training loss, by eigsh, their ratio lambda_1 /
lambda_5, and the density of all, by stochastic Lanczos quadrature. It is that of some training images without
augmentation; at the end, of as many images that were not trained on too. Networks have no normalisation, as in the
paper; others have GroupNorm in the place of BatchNorm.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.paper import figures, models, runner, summary, tables
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.paper.training import Training
from bench.records import Row
from fused_sam import analysis

LARGEST = 5
POINTS = 400  # of a density in the picture
WIDTH = 0.02  # of its Gaussians, of the whole span


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--measurements", type=int, default=6, metavar="N", help="at as many epochs, the last one at the end")
    add("--examples", type=int, default=128, metavar="N", help="images that the Hessian is of")
    add("--probes", type=int, default=1, metavar="N", help="of the density")
    add("--lanczos-steps", type=int, default=20, metavar="N", help="for each of them")
    norm = "what normalises, one network for each (default: none group; with --paper none)"
    add("--norm", nargs="+", choices=tuple(models.NORMS), help=norm)


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    """Return SGD and SAM of as many epochs, for each kind of normalisation."""
    sizes = {"examples": args.examples, "probes": args.probes, "lanczos_steps": args.lanczos_steps}
    runs = []
    for norm in args.norm or (["none"] if args.paper else ["none", "group"]):
        model = base.model + models.NORMS[norm].suffix
        sgd = replace(base, model=model, measurements=args.measurements, extra=sizes)
        runs += [("SGD", sgd), ("SAM", replace(sgd, optimizer="sam", options={"rho": args.rho}))]
    return runs


def observe_during(training: Training) -> Row:
    """Measure eigenvalues and density on training images."""
    sizes = training.config.extra
    x, y = training.examples(sizes["examples"])
    hessian = analysis.Hessian(training.model.eval(), F.cross_entropy, (x, y))
    density = analysis.density(hessian, sizes["probes"], steps=sizes["lanczos_steps"])
    with torch.no_grad():
        loss = float(F.cross_entropy(training.model(x), y))
    return {
        "loss": loss,
        "eigenvalues": _eigenvalues(hessian),
        "nodes": [float(f"{node:.5g}") for node in density.nodes.tolist()],
        "weights": [float(f"{weight:.5g}") for weight in density.weights.tolist()],
    }


def observe(training: Training) -> Row:
    """Measure eigenvalues on images that were not trained on."""
    batch = training.examples(training.config.extra["examples"], "unseen")
    hessian = analysis.Hessian(training.model.eval(), F.cross_entropy, batch)
    return {"unseen_loss": training.evaluate(training.images.unseen)[1], "unseen_eigenvalues": _eigenvalues(hessian)}


def _eigenvalues(hessian: analysis.Hessian) -> list[float]:
    """Return the largest, those first."""
    return analysis.eigenvalues(hessian, LARGEST, tol=1e-3).values.tolist()


def _by_epoch(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """Group the points of the histories by method and epoch."""
    found = {}
    for (label,), same in summary.by(rows, "method").items():
        points = summary.by([point for row in same for point in row["history"]], "epoch")
        found[label] = {epoch: at for (epoch,), at in points.items()}
    return found


def _curvature(eigenvalues: Sequence[Sequence[float]]) -> list[summary.Interval]:
    """Return lambda_1 and lambda_1 / lambda_5."""
    ratios = [found[0] / found[-1] for found in eigenvalues]
    return [summary.interval([found[0] for found in eigenvalues]), summary.interval(ratios)]


def _figures_of(points: Sequence[Row]) -> list[summary.Interval]:
    """Return training loss, lambda_1 and lambda_1 / lambda_5."""
    return [summary.of(points, "loss"), *_curvature([point["eigenvalues"] for point in points])]


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw loss, lambda_1 and its ratio over the epochs; below, densities at the first, a middle and the last epoch.

    Networks but the first are dashed lines without intervals, and have no density.
    """
    networks = {model: _by_epoch(own) for (model,), own in summary.by(rows, "model").items()}
    (model, points), *others = networks.items()
    own = [row for row in rows if row["config"]["model"] == model]
    subtitle = summary.subtitle(own, f"Hessian of {rows[0]['config']['extra']['examples']} training images")
    colours = figures.colours(list(points))
    epochs = sorted(next(iter(points.values())))
    with figures.canvas("Hessian spectra during training", subtitle, path, panels=6, rows=2, height=8.4) as panels:
        names = ("Training loss on the measured images", "$\\lambda_1$", "$\\lambda_1 / \\lambda_5$")
        for axes, name, place in zip(panels, names, range(3)):
            for label, by_epoch in points.items():
                line = [(epoch, _figures_of(same)[place]) for epoch, same in by_epoch.items()]
                figures.line(axes, line, label, colours[label])
            for other, by_method in others:
                for label, by_epoch in by_method.items():
                    means = [_figures_of(same)[place].mean for same in by_epoch.values()]
                    axes.plot(
                        list(by_epoch), means, "--", color=colours[label], linewidth=1.2, label=f"{label}, {other}"
                    )
            axes.set_xticks(epochs)
            axes.set_ylim(bottom=0)
            figures.describe(axes, name, "Epoch")
            figures.legend(axes)
        for axes, epoch in zip(panels[3:], sorted({epochs[0], epochs[len(epochs) // 2], epochs[-1]})):
            _densities(axes, {label: by_epoch.get(epoch, []) for label, by_epoch in points.items()}, colours)
            about = "$\\lambda$; marks below: $\\lambda_1$ of each seed"
            figures.describe(axes, f"Epoch {epoch}: density of eigenvalues", about)
            figures.legend(axes)


def _densities(axes: Any, points: dict[str, list[Row]], colours: dict[str, str]) -> None:
    """Draw Gaussians around the nodes of all seeds, on a logarithmic scale; lambda_1 of each seed as a mark below."""
    nodes = {label: torch.tensor([x for point in same for x in point["nodes"]]) for label, same in points.items()}
    low = min(float(found.min()) for found in nodes.values() if len(found))
    high = max(point["eigenvalues"][0] for same in points.values() for point in same)
    width = WIDTH * (high - low)
    grid = torch.linspace(low - 4 * width, high + 4 * width, POINTS)
    for label, same in points.items():
        if not same:
            continue
        weights = torch.tensor([x for point in same for x in point["weights"]]) / len(same)
        density = torch.exp(-(((grid[:, None] - nodes[label]) / width) ** 2) / 2) @ weights
        axes.plot(grid, density / (width * math.sqrt(2 * math.pi)), color=colours[label], linewidth=1.6, label=label)
        largest = [point["eigenvalues"][0] for point in same]
        place = axes.get_xaxis_transform()  # x in data, y in parts of the height
        axes.plot(largest, [0.03] * len(same), "|", color=colours[label], markersize=10, transform=place)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)


def section(rows: Sequence[Row]) -> str:
    """Write a table for each network, and the paper's."""
    ours = [_table(model, own) for (model,), own in summary.by(rows, "model").items()]
    return "\n\n".join([*ours, _paper(), summary.caption(rows)])


def _table(model: str, rows: Sequence[Row]) -> str:
    """Write a line per epoch, and one for images that were not trained on."""
    points = _by_epoch(rows)
    lines = []
    for epoch in sorted(next(iter(points.values()))):
        lines.append([f"epoch {epoch}", *(str(one) for own in points.values() for one in _figures_of(own[epoch]))])
    unseen = ["at the end, on unseen images"]
    for same in summary.by(rows, "method").values():
        unseen.append(str(summary.of(same, "unseen_loss")))
        unseen += map(str, _curvature([row["unseen_eigenvalues"] for row in same]))
    heads = [f"{label}: {name}" for label in points for name in ("loss", "λ₁", "λ₁ / λ₅")]
    return summary.table([f"ours: {model}", *heads], [*lines, unseen])


def _paper() -> str:
    cells = {(row["epoch"], row["method"], row["metric"]): row["mean"] for row in tables.published("spectra")}
    metrics = {"λ₁": "lambda_max", "λ₁ / λ₅": "lambda_max / lambda_5"}
    heads = ["paper: CIFAR-10, WRN-40-10 without BatchNorm"]
    heads += [f"{method}: {name}" for method in ("SGD", "SAM") for name in metrics]
    lines = []
    for epoch in dict.fromkeys(epoch for epoch, _, _ in cells):
        found = [str(cells[epoch, method, metric]) for method in ("SGD", "SAM") for metric in metrics.values()]
        lines.append([f"epoch {epoch}", *found])
    return summary.table(heads, lines)


EXPERIMENT = Experiment(
    "spectra",
    __doc__,
    grid,
    figure,
    section,
    add_arguments=add_arguments,
    defaults={"rho": 0.1, "epochs": 24},
    observe=observe,
    observe_during=observe_during,
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
