"""Training from scratch: SAM against SGD of one and of two times its epochs (section 3.1, table 1).

Two times the epochs of SGD are as many forward-backward passes as SAM takes; the paper gives SGD the better of both.
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


def figure(rows: Sequence[Row], path: Path) -> None:
    """Test error of each run, and the intervals."""
    seeds = len(summary.by(rows, "seed"))
    subtitle = f"{summary.task(rows[0])}; {seeds} seeds, mean and 95 % interval"
    with figures.canvas("Training from scratch", subtitle, path, height=3.2) as (axes,):
        figures.dots(axes, {label: [row["test_error"] for row in same] for (label,), same in _methods(rows)})
        axes.set_xlabel("Test error (%)")


def _methods(rows: Sequence[Row]) -> list[tuple[tuple[str], list[Row]]]:
    return list(summary.by(rows, "method").items())


def section(rows: Sequence[Row]) -> str:
    """Ours, and under it the paper's."""
    lines = []
    for (task,), same in summary.by([row | {"task": summary.task(row)} for row in rows], "task").items():
        for (label,), runs in _methods(same):
            figures_ = [str(summary.of(runs, name)) for name in ("test_error", "train_error")]
            lines.append([task, label, f"{summary.of(runs, 'passes').mean:.0f}", *figures_])
    lines += _published()
    heads = ["data and network", "method", "passes", "test error, %", "training error, %"]
    return f"{summary.table(heads, lines)}\n\n{summary.caption(rows)}"


def _published() -> list[list[str]]:
    """The paper's WRN-28-10 with the shortest training that it has."""
    lines = []
    for name, dataset, augment in PUBLISHED:
        known = [row for row in tables.published(name) if row["dataset"] == dataset and row["augment"] == augment]
        wide = [row for row in known if row["model"] == "wrn-28-10" and row.get("epochs") in (None, 200)]
        for row in sorted(wide, key=lambda row: row["method"], reverse=True):
            half = "" if row["half"] is None else f" ± {row['half']}"
            method = "SGD, the better length" if row["method"] == "SGD" else row["method"]
            lines.append([f"paper: {dataset}, wrn-28-10", method, "", f"{row['mean']}{half}", ""])
    return lines


EXPERIMENT = Experiment("classification", __doc__, grid, figure, section)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    return runner.main(EXPERIMENT, argv)


if __name__ == "__main__":
    raise SystemExit(main())
