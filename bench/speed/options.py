"""Time FusedSAM's options against a copy of the bytes each has to move: python -m bench.speed.options

ResNet-50's parameters, fp32, one thread; rows of kind "options". The protocol is that of bench.speed.step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench import records
from bench.speed import rivals
from bench.speed.harness import FLOOR, STEPS_PER_VISIT, WARM_UP_ROUNDS, Task, measure
from bench.speed.shapes import SETS
from bench.speed.step import describe, figures

SET, DTYPE, THREADS = "resnet50", "fp32", 1
ROUNDS = 12


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.options", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--set", choices=SETS, default=SET, help=f"parameter set (default: {SET})")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "cpu_options.jsonl", help="file to append to")
    parser.add_argument("--dry-run", action="store_true", help="write no rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be >= 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse_arguments(arguments)
    names = [rivals.OURS, *rivals.OPTIONS, FLOOR]
    shapes = SETS[options.set]()
    tasks = [Task(name, shapes, rivals.torch.float32, STEPS_PER_VISIT) for name in names]
    console = Console(highlight=False, soft_wrap=True)
    with Progress(console=console, auto_refresh=False) as progress:
        bar = progress.add_task("options", total=options.rounds + WARM_UP_ROUNDS)
        samples = measure(tasks, options.rounds, [THREADS], lambda: (progress.advance(bar), progress.refresh()))[
            THREADS
        ]
    common = {
        "set": options.set,
        "dtype": DTYPE,
        "threads": THREADS,
        "rounds": options.rounds,
        "repeats": STEPS_PER_VISIT,
    }
    rows = [
        records.header("options") | common | figures(name, options.set, DTYPE, samples) | {"ratio_to_rival": {}}
        for name in names
    ]
    for row in rows:
        console.print(describe(row))
    if not options.dry_run:
        records.write_rows(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
