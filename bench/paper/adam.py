"""SAM against Adam on ResNet-20: loss and error while they train.

Adam of one and of two times the epochs, SAM with Adam as its base, and SAM with SGD as its base. The curves are over
forward-backward passes, of which SAM takes two in a step. With --paper, for --dataset cifar10 or svhn: the settings of
"Sharpness-Aware Minimization in TensorFlow/Keras", which has no SGD.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.paper import figures, runner, summary, tables
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.records import Row

SAM = "SAM with Adam"
CURVES = {"train_loss": "Training loss", "test_error": "Test error (%)"}  # by their key in the history


def add_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--adam-lr", type=float, default=1e-3, help="first learning rate of Adam")


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    adam = replace(base, optimizer="adam", lr=args.adam_lr)
    sam = {"rho": args.rho}
    runs = [
        ("Adam", adam),
        ("Adam, 2x epochs", replace(adam, epochs=2 * base.epochs)),
        (SAM, replace(adam, optimizer="sam-adam", options=sam)),
    ]
    return runs if args.paper else [*runs, ("SAM", replace(base, optimizer="sam", options=sam))]


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw the means over the seeds of both curves."""
    methods = summary.by(rows, "method")
    colours = figures.colours([label for (label,) in methods])
    with figures.canvas("SAM against Adam", summary.subtitle(rows), path, panels=2) as panels:
        for axes, (key, name) in zip(panels, CURVES.items(), strict=True):
            for (label,), same in methods.items():
                histories = zip(*(row["history"] for row in same), strict=True)
                points = [(points[0]["passes"], summary.of(points, key)) for points in histories]
                figures.line(axes, points, label, colours[label])
            figures.describe(axes, name, "Forward-backward passes over the training set")
            figures.legend(axes)


def section(rows: Sequence[Row]) -> str:
    """Write loss and error at the end, with the points that SAM with Adam gains, paired by seed; and the report's."""
    methods, lines = summary.by(rows, "method"), []
    for (label,), same in methods.items():
        passes, error, _ = summary.errors(same)
        gain = summary.gain(same, methods.get((SAM,), []))
        lines.append([label, passes, summary.of(same, "train_loss").text(3), error, gain])
    for row in tables.published("keras_report"):
        lines.append([f"report: {row['dataset']}, {row['model']}, {row['method']}", "", "", tables.text(row), ""])
    heads = ["method", "passes", "training loss at the end", "test error, %", f"{SAM} gains on it, points"]
    return f"{summary.table(heads, lines)}\n\n{summary.caption(rows)}"


EXPERIMENT = Experiment(
    "adam",
    __doc__,
    grid,
    figure,
    section,
    add_arguments=add_arguments,
    # So few images and so many epochs that Adam's training loss no longer falls, for a seed that is not recorded.
    defaults={
        "train_size": 500,
        "model": "resnet-bottleneck-20-stride2",
        "paper_model": "resnet-bottleneck-20",
        "epochs": 100,
        "batch_size": 32,
        "weight_decay": 0.0,
        "measurements": 10,
        "test_size": 2_000,
    },
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
