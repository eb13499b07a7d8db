"""Time FusedSAM's options against a copy of the bytes each has to move: python -m bench.speed.options

ResNet-50's parameters, fp32, one thread; rows of kind "options". The protocol is that of bench.speed.step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from bench import records
from bench.speed import rivals
from bench.speed.harness import DTYPES, FLOOR, STEPS_PER_VISIT, WARM_UP_ROUNDS, Task, finish, measure, parse, parser
from bench.speed.shapes import SETS
from bench.speed.step import describe, figures

SET, DTYPE, THREADS = "resnet50", "fp32", 1
ROUNDS = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    made = parser("options", __doc__, ROUNDS)
    made.add_argument("--set", choices=SETS, default=SET, help=f"parameter set (default: {SET})")
    options = parse(made, arguments)
    names = [rivals.OURS, *rivals.OPTIONS, FLOOR]
    tasks = [Task(name, SETS[options.set](), DTYPES[DTYPE]) for name in names]
    console = Console(highlight=False, soft_wrap=True)
    with Progress(console=console, auto_refresh=False) as progress:
        bar = progress.add_task("options", total=options.rounds + WARM_UP_ROUNDS)
        found = measure(tasks, options.rounds, [THREADS], lambda: (progress.advance(bar), progress.refresh()))
    common = {"set": options.set, "dtype": DTYPE, "threads": THREADS, "rounds": options.rounds}
    common |= {"repeats": STEPS_PER_VISIT}
    of = {name: figures(name, options.set, DTYPE, found[THREADS]) | {"ratio_to_rival": {}} for name in names}
    finish([records.header("options") | common | of[name] for name in names], options, console, describe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
