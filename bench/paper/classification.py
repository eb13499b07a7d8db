"""Training from scratch: SAM against SGD of one and of two times its epochs (section 3.1, table 1).

Two times the epochs of SGD are as many forward-backward passes as SAM takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.paper import figures, runner, summary
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.records import Row


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    return [
        ("SGD", base),
        ("SGD, 2x epochs", replace(base, epochs=2 * base.epochs)),
        ("SAM", replace(base, optimizer="sam", options={"rho": args.rho})),
    ]


def figure(rows: Sequence[Row], path: Path) -> None:
    with figures.canvas("Training from scratch", "", path) as (axes,):
        for place, ((_label,), same) in enumerate(summary.by(rows, "method").items()):
            axes.plot([place] * len(same), [row["test_error"] for row in same], "o")


def section(rows: Sequence[Row]) -> str:
    lines = [[label, str(summary.of(same))] for (label,), same in summary.by(rows, "method").items()]
    return summary.table(["method", "test error, %"], lines)


EXPERIMENT = Experiment("classification", __doc__, grid, figure, section)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment."""
    return runner.main(EXPERIMENT, argv)


if __name__ == "__main__":
    raise SystemExit(main())
