"""Time the host's work of a SAM step's optimizer side, 161 tensors of one element: python -m bench.speed.host_time

ResNet-50's number of tensors with nothing to compute: what is left is Python, argument checks and dispatch,
for which a GPU waits when its kernels are short.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from bench import records
from bench.records import Spread
from bench.speed import rivals
from bench.speed.harness import DTYPES, Task, finish, measure, parse, parser, ratios_to_rivals

TENSORS = 161
ROUNDS = 25
REPEATS = 20


def rows(rounds: int) -> list[records.Row]:
    """Return one row per variant."""
    shapes = [(1,)] * TENSORS
    names = list(rivals.available(DTYPES["fp32"]))
    samples = measure([Task(name, shapes, DTYPES["fp32"], REPEATS) for name in names], rounds, [1])[1]
    common = {"set": f"{TENSORS} x 1", "dtype": "fp32", "threads": 1, "rounds": rounds, "repeats": REPEATS}
    made = []
    for name in names:
        seconds = Spread.of([sample.seconds for sample in samples[name]]).seconds()
        to_rival = ratios_to_rivals(samples) if name == rivals.OURS else {}
        made.append(records.header("host") | common | {"variant": name} | seconds | {"ratio_to_rival": to_rival})
    return made


def describe(row: records.Row) -> str:
    """Return one line for the terminal."""
    low, middle, high = (1e6 * row[name] for name in ("p20_s", "median_s", "p80_s"))
    return f"{row['variant']:26}{middle:9.1f} us [{low:.1f}, {high:.1f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse(parser("host_time", __doc__, ROUNDS), arguments)
    finish(rows(options.rounds), options, Console(highlight=False, soft_wrap=True), describe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
