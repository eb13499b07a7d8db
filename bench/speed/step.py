"""Time the optimizer side of a SAM step on the parameter sets of real models: python -m bench.speed.step

Appends one row per set, dtype, thread count and variant; `python -m bench.report` turns rows into tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import records
from bench.records import Row, Spread
from bench.speed import rivals
from bench.speed.harness import (
    DTYPES,
    FLOOR,
    STEPS_PER_VISIT,
    WARM_UP_ROUNDS,
    Sample,
    Task,
    finish,
    has_floor,
    measure,
    parse,
    parser,
    progress_bar,
    ratio,
    ratios_to_rivals,
)
from bench.speed.shapes import SETS, TITLES, parameter_count

# Enough for the per-round ratios to settle, few enough for all sets and dtypes to take under six minutes.
ROUNDS = {"resnet50": 10, "wrn28_10": 7, "vit_b16": 5, "resnet20": 40}
SIXTEEN_BIT_SHARE = 0.5
# A step on ResNet-20 takes less than a wake-up of its process disturbs: each visit makes several.
REPEATS = {"resnet20": 50}
GATE_SETS = ("resnet50", "resnet20")
# (set, other): how many times as long as FusedSAM the other must take; for the floor, its share of that time.
GATE = {
    ("resnet50", "eager_sgd"): 2.0,
    ("resnet50", "foreach_sgd_fused"): 1.4,
    ("resnet50", FLOOR): 0.9,
    ("resnet20", "eager_sgd"): 8.0,
    ("resnet20", "foreach_sgd_fused"): 3.0,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    made = parser("step", __doc__, 0)
    add = made.add_argument
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="parameter sets (default: all)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    add("--threads", nargs="+", type=int, default=[1, 2], help="thread counts (default: 1 2)")
    known = f"default: all installed of {', '.join(rivals.VARIANTS)}"
    add("--variants", nargs="+", choices=rivals.VARIANTS, metavar="NAME", help=known)
    gate = "ResNet-50 and ResNet-20, fp32, one thread; exit 1 below the floors of CI"
    add("--gate", action="store_true", help=gate)
    options = parse(made, arguments)
    if min(options.threads) < 1:
        made.error("--threads must be >= 1")
    if options.gate:
        options.sets, options.dtypes, options.threads = list(GATE_SETS), ["fp32"], [1]
    return options


def rounds_of(set_name: str, dtype: str, asked: int | None) -> int:
    """Return how often to measure."""
    if asked is not None:
        return asked
    return ROUNDS[set_name] if dtype == "fp32" else max(3, round(SIXTEEN_BIT_SHARE * ROUNDS[set_name]))


def measure_set(options: argparse.Namespace, set_name: str, dtype_name: str, progress: Progress) -> list[Row]:
    """Return rows of one set and dtype, all thread counts."""
    dtype, shapes = DTYPES[dtype_name], SETS[set_name]()
    names = [n for n in rivals.available(dtype) if not options.variants or n in options.variants]
    if has_floor(shapes, dtype):
        names.append(FLOOR)
    rounds = rounds_of(set_name, dtype_name, options.rounds)
    tick = progress_bar(progress, f"{TITLES[set_name]} {dtype_name}", rounds + WARM_UP_ROUNDS)
    repeats = REPEATS.get(set_name, STEPS_PER_VISIT)
    tasks = [Task(name, shapes, dtype, repeats) for name in names]
    rows = []
    for threads, samples in measure(tasks, rounds, options.threads, tick).items():
        common = {"set": set_name, "dtype": dtype_name, "threads": threads, "rounds": rounds, "repeats": repeats}
        rows += [records.header("step") | common | figures(name, set_name, dtype_name, samples) for name in names]
    return rows


def moved_bytes(name: str, set_name: str, dtype_name: str) -> int:
    """Return what the variant's operations read and write in a step; the floor copies as much as FusedSAM moves."""
    variant = rivals.find(rivals.OURS if name == FLOOR else name)
    return round(variant.bytes_per_param(DTYPES[dtype_name]) * parameter_count(SETS[set_name]()))


def figures(name: str, set_name: str, dtype_name: str, samples: dict[str, list[Sample]]) -> Row:
    """Return the part of a row that is about one variant."""
    own = samples[name]
    moved = moved_bytes(name, set_name, dtype_name)
    row: Row = {
        "variant": name,
        "valid": name == FLOOR or name in rivals.OPTIONS or rivals.check(name, DTYPES[dtype_name]),
        **Spread.of([sample.seconds for sample in own]).seconds(),
        "first_s": records.median([sample.first_s for sample in own]),
        "second_s": records.median([sample.second_s for sample in own]),
        "minor_faults": records.median([sample.minor_faults for sample in own]),
        "bytes": moved,
        "ratio_to_rival": ratios_to_rivals(samples) if name == rivals.OURS else {},
        "ratio_to_floor": None,
    }
    if FLOOR in samples:
        share = moved / moved_bytes(FLOOR, set_name, dtype_name)
        to_floor = ratio(samples[FLOOR], own)
        row["ratio_to_floor"] = Spread(*(share * value for value in to_floor)).rounded()
    return row


def describe(row: Row) -> str:
    """Return one line for the terminal."""
    floor = row["ratio_to_floor"]
    return (
        f"{row['set']:9} {row['dtype']} {row['threads']}T  {row['variant']:26}"
        f"{1e3 * row['median_s']:9.3f} ms [{1e3 * row['p20_s']:.3f}, {1e3 * row['p80_s']:.3f}]"
        f"{row['bytes'] / row['median_s'] / 1e9:7.1f} GB/s" + (f"  {floor['median']:.2f} of the floor" if floor else "")
    )


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each row of FusedSAM that is below a floor of the gate."""
    sentences = []
    for (set_name, other), least in GATE.items():
        for row in rows:
            if row["set"] != set_name or row["variant"] != rivals.OURS:
                continue
            got = row["ratio_to_floor"] if other == FLOOR else row["ratio_to_rival"].get(other)
            if got is not None and got["median"] < least:
                sentences.append(f"{set_name} against {other}: {got['median']:.2f}. Must be >= {least}.")
    return sentences


def main() -> int:
    """Measure, print, append."""
    options = parse_arguments()
    console = Console(highlight=False, soft_wrap=True)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # No refreshing in the background: it would run while a step is timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        for dtype_name in options.dtypes:
            for set_name in options.sets:
                new = measure_set(options, set_name, dtype_name, progress)
                finish(new, options, console, describe)
                rows += new
    for other, spread in ((o, s) for row in rows for o, s in row["ratio_to_rival"].items()):
        console.print(f"FusedSAM against {other}: {spread['median']:.2f} [{spread['p20']:.2f}, {spread['p80']:.2f}]")
    missed = failures(rows) if options.gate else []
    for sentence in missed:
        console.print(sentence)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
