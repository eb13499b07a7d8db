"""Training from scratch: SAM against SGD of one and of two times its epochs (section 3.1, table 1).

Two times the epochs of SGD are as many forward-backward passes as SAM takes; the paper gives SGD the better of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from bench.paper import figures, runner, summary, tables
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.records import Row

# The paper's rows that stand under ours: name of the table, data set and augmentation.
PUBLISHED = (
    ("svhn_fashion_mnist", "fashion-mnist", "basic"),
    ("classification", "cifar10", "basic"),
    ("classification", "cifar100", "basic"),
)


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    return [
        ("SGD", base),
        ("SGD, 2x epochs", replace(base, epochs=2 * base.epochs)),
        ("SAM", replace(base, optimizer="sam", options={"rho": args.rho})),
    ]


def section(rows: Sequence[Row]) -> str:
    """Write ours, and under it the paper's."""
    lines = []
    for (task, label), runs in summary.by(
        [row | {"task": summary.task(row)} for row in rows], "task", "method"
    ).items():
        lines.append([task, label, *summary.errors(runs)])
    lines += _published()
    heads = ["data and network", "method", "passes", "test error, %", "training error, %"]
    return f"{summary.table(heads, lines)}\n\n{summary.caption(rows)}"


def _published() -> list[list[str]]:
    """Return the lines of the paper's WRN-28-10 with the shortest training that it has."""
    lines = []
    for name, dataset, augment in PUBLISHED:
        known = [row for row in tables.published(name) if row["dataset"] == dataset and row["augment"] == augment]
        wide = [row for row in known if row["model"] == "wrn-28-10" and row.get("epochs") in (None, 200)]
        for row in sorted(wide, key=lambda row: row["method"], reverse=True):
            method = "SGD, the better length" if row["method"] == "SGD" else row["method"]
            lines.append([f"paper: {dataset}, wrn-28-10", method, "", tables.text(row), ""])
    return lines


EXPERIMENT = Experiment("classification", __doc__, grid, figures.errors("Training from scratch", 3.2), section)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
