"""Time the host's work of a SAM step's optimizer side, tensors of one element each: python -m bench.speed.host_time

As many tensors as models have, with nothing to compute: what is left is Python, argument checks and dispatch,
for which a GPU waits when its kernels are short.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from bench import records
from bench.records import Row, Spread
from bench.speed import rivals
from bench.speed.harness import (
    DTYPES,
    WARM_UP_ROUNDS,
    Sample,
    Task,
    finish,
    measure,
    parse,
    parser,
    progress_bar,
    ratios_to_rivals,
)
from bench.speed.shapes import HOST_SETS, host_set

DTYPE, THREADS = "fp32", 1
# A step on few tensors takes less than a wake-up of its process disturbs: each visit makes several.
ROUNDS, REPEATS = 25, 20
# The same where tensors are many, and a step long.
MANY = {1_000: (12, 10), 10_000: (8, 5)}


def effort(tensors: int, asked: int | None) -> tuple[int, int]:
    """Return rounds, and steps a visit."""
    rounds, repeats = MANY.get(tensors, (ROUNDS, REPEATS))
    return asked or rounds, repeats


def measure_set(tensors: int, names: Sequence[str], rounds: int | None, progress: Progress) -> list[Row]:
    """Return one row per variant for that many tensors."""
    rounds, repeats = effort(tensors, rounds)
    tick = progress_bar(progress, f"{tensors} tensors", rounds + WARM_UP_ROUNDS)
    tasks = [Task(name, [(1,)] * tensors, DTYPES[DTYPE], repeats) for name in names]
    samples = measure(tasks, rounds, [THREADS], tick)[THREADS]
    common = {"set": host_set(tensors), "tensors": tensors, "dtype": DTYPE, "threads": THREADS}
    common |= {"rounds": rounds, "repeats": repeats}
    to_rival = ratios_to_rivals(samples)
    return [
        records.header("host") | common | times(name, own) | {"ratio_to_rival": to_rival if name == rivals.OURS else {}}
        for name, own in samples.items()
    ]


def times(name: str, samples: Sequence[Sample]) -> Row:
    """Return the part of a row that is about one variant alone."""
    return {
        "variant": name,
        **Spread.of([sample.seconds for sample in samples]).seconds(),
        "first_s": records.median([sample.first_s for sample in samples]),
        "second_s": records.median([sample.second_s for sample in samples]),
    }


def describe(row: Row) -> str:
    """Return one line for the terminal."""
    low, middle, high, first, second = (1e6 * row[f"{x}_s"] for x in ("p20", "median", "p80", "first", "second"))
    spread = f"{middle:9.1f} us [{low:.1f}, {high:.1f}]"
    ratios = "".join(f"\n{'':10}{name:26}{x['median']:9.2f} x as long" for name, x in row["ratio_to_rival"].items())
    return f"{row['tensors']:<10}{row['variant']:26}{spread}, halves {first:.1f} and {second:.1f}{ratios}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    made = parser("host_time", __doc__, 0)
    sets = ", ".join(f"{name} {count}" for name, count in HOST_SETS.items())
    made.add_argument(
        "--sets", nargs="+", choices=HOST_SETS, default=list(HOST_SETS), help=f"tensors (default: all of {sets})"
    )
    known = f"default: all installed of {', '.join(rivals.VARIANTS)}"
    made.add_argument("--variants", nargs="+", choices=rivals.VARIANTS, metavar="NAME", help=known)
    return parse(made, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse_arguments(arguments)
    console = Console(highlight=False, soft_wrap=True)
    names = [n for n in rivals.available(DTYPES[DTYPE]) if not options.variants or n in options.variants]
    # No refreshing in the background: it would run while a step is timed.
    with Progress(console=console, auto_refresh=False) as progress:
        for name in options.sets:
            finish(measure_set(HOST_SETS[name], names, options.rounds, progress), options, console, describe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
