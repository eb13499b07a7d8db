"""Time the host's work of a SAM step's optimizer side, 161 tensors of one element: python -m bench.speed.host_time

ResNet-50's number of tensors with nothing to compute: what is left is Python, argument checks and dispatch,
for which a GPU waits when its kernels are short.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import records
from bench.records import Spread
from bench.speed import rivals
from bench.speed.harness import DTYPES, Task, measure, ratios_to_rivals

TENSORS = 161
ROUNDS = 25
REPEATS = 20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"each of {REPEATS} steps (default: {ROUNDS})")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "cpu_host.jsonl", help="file to append to")
    parser.add_argument("--dry-run", action="store_true", help="write no rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be >= 1")
    return options


def rows(rounds: int) -> list[records.Row]:
    """One row per variant."""
    shapes = [(1,)] * TENSORS
    names = list(rivals.available(DTYPES["fp32"]))
    samples = measure([Task(name, shapes, DTYPES["fp32"], REPEATS) for name in names], rounds, [1])[1]
    common = {"set": f"{TENSORS} x 1", "dtype": "fp32", "threads": 1, "rounds": rounds, "repeats": REPEATS}
    made = []
    for name in names:
        time = Spread.of([sample.seconds for sample in samples[name]]).rounded()
        times = {"median_s": time["median"], "p20_s": time["p20"], "p80_s": time["p80"]}
        to_rival = ratios_to_rivals(samples) if name == rivals.OURS else {}
        made.append(records.header("host") | common | {"variant": name} | times | {"ratio_to_rival": to_rival})
    return made


def main() -> int:
    """Measure, print, append."""
    options = parse_arguments()
    made = rows(options.rounds)
    console = Console(highlight=False, soft_wrap=True)
    for row in made:
        low, middle, high = (1e6 * row[name] for name in ("p20_s", "median_s", "p80_s"))
        console.print(f"{row['variant']:26}{middle:9.1f} us [{low:.1f}, {high:.1f}]")
    if not options.dry_run:
        records.write_rows(made, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
