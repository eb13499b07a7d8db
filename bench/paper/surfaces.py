"""Loss surfaces of a solution of SGD and of one of SAM, on one scale (figure 1, right; Li et al. 2018).

SGD trains for twice the epochs, which is as many forward-backward passes. Both start from the same weights. The loss of
training images is drawn over a plane through each solution along two random directions, which are the same for both but
for the length of each filter; at 1 every filter has moved by its own length.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.paper import clean_labels, runner, summary
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.paper.training import Training
from bench.records import Row
from fused_sam import analysis

CEILING = 4.0  # of the picture: the loss of guessing is 2.3


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--points", type=int, default=17, metavar="N", help="along each direction")
    add("--extent", type=float, default=1.0, metavar="C", help="of the plane, to both sides")
    add("--examples", type=int, default=256, metavar="N", help="training images that the loss is of")


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    plane = {"points": args.points, "extent": args.extent, "examples": args.examples}
    base = replace(base, extra=plane)
    sam = replace(base, optimizer="sam", options={"rho": args.rho})
    return [("SGD, 2x epochs", replace(base, epochs=2 * base.epochs)), (f"SAM, rho = {args.rho:g}", sam)]


def observe(training: Training) -> Row:
    """Measure the loss on the plane, of the network in evaluation mode."""
    plane = training.config.extra
    batch = training.examples(plane["examples"])
    training.model.eval()
    directions = [analysis.random_direction(training.model.parameters(), seed=seed) for seed in (0, 1)]
    axis = torch.linspace(-plane["extent"], plane["extent"], plane["points"], dtype=torch.float64)
    found = analysis.landscape(training.model, F.cross_entropy, batch, directions, [axis, axis])
    return {"axis": axis.tolist(), "surface": [[float(f"{x:.5g}") for x in line] for line in found.loss.tolist()]}


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw the surfaces of the first seed side by side."""
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    known = {row["method"]: _landscape(row) for row in first}
    drawn = analysis.plot_surfaces(known, ceiling=CEILING)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120, metadata={"Software": None})


def _landscape(row: Row) -> analysis.Landscape:
    axis = torch.tensor(row["axis"], dtype=torch.float64)
    return analysis.Landscape((axis, axis), torch.tensor(row["surface"], dtype=torch.float64))


def section(rows: Sequence[Row]) -> str:
    """Write errors, the loss at the solution, and how much it rises on circles around it."""
    lines = []
    for (label,), runs in summary.by(rows, "method").items():
        centre = [_landscape(row).loss[len(row["axis"]) // 2, len(row["axis"]) // 2].item() for row in runs]
        rises = [str(summary.interval([_rise(row, part) for row in runs])) for part in (0.25, 0.5)]
        lines.append([label, *summary.errors(runs), summary.interval(centre).text(3), *rises])
    extent = rows[0]["config"]["extra"]["extent"]
    around = [f"mean rise within {part * extent:g}" for part in (0.25, 0.5)]
    heads = ["method", "passes", "test error, %", "training error, %", "training loss", *around]
    return f"{summary.table(heads, lines)}\n\n{summary.caption(rows)}"


def _rise(row: Row, part: float) -> float:
    """Return the mean of the loss over the disc of this part of the plane's extent, minus that at its centre."""
    found = _landscape(row)
    axis = found.coordinates[0]
    inside = axis[:, None] ** 2 + axis[None, :] ** 2 <= (part * float(axis[-1])) ** 2 * (1 + 1e-9)
    middle = len(axis) // 2
    return float(found.loss[inside].mean() - found.loss[middle, middle])


EXPERIMENT = Experiment(
    name="surfaces",
    description=__doc__,
    defaults={"train_size": 2_000, "augment": "none", "rho": 0.1, "seeds": (0,)} | clean_labels.NETWORKS["small"],
    grid=grid,
    figure=figure,
    section=section,
    add_arguments=add_arguments,
    observe=observe,
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
