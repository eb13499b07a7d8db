"""Count the instructions of a SAM step's optimizer side, tensors of one element: python -m bench.speed.instructions

A count repeats on a machine where other programs run, a time does not. Steps on many tensors and on one give what
a step costs whatever their number, and what each adds. Needs valgrind and gcc; each variant takes a minute or two.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import records
from bench.records import Row
from bench.speed import callgrind, rivals
from bench.speed.callgrind import Profile
from bench.speed.counted import EMPTY, HALVES, STEPS, WARM_UP_STEPS, label
from bench.speed.harness import finish, parse, parser
from bench.speed.shapes import HOST_SETS, host_set

DTYPE = "fp32"
VARIANTS = (rivals.OURS, "eager_sgd", "foreach_sgd_fused", rivals.TWICE)
# What of a step is no work of the host's in preparing it: FusedSAM's kernels, of the CPU; and the release of gradients,
# which every optimizer pays in zero_grad (of those that make temporaries, their release as well).
PARTS = {
    "kernels": re.compile(r"(?:[\w:]+ )?fused_sam::cpu::"),
    "freeing": re.compile(r"c10::TensorImpl::~TensorImpl\("),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    made = parser("instructions", __doc__)
    add = made.add_argument
    add("--tensors", type=int, default=HOST_SETS["resnet50"], help="beside 1 (default: %(default)s)")
    known = f"default: {', '.join(VARIANTS)}; known: {', '.join(rivals.VARIANTS)}"
    add("--variants", nargs="+", choices=rivals.VARIANTS, default=VARIANTS, metavar="NAME", help=known)
    options = parse(made, arguments)
    if options.tensors < 2:
        made.error("--tensors must be >= 2")
    return options


def figures(counted: dict[str, Profile], tensors: int) -> Row:
    """Return the part of a row that is counts: of a step, and what is fixed and what each tensor adds."""
    empty = counted[EMPTY].total
    of = {(n, half): counted[label(n, half)] for n in (1, tensors) for half in HALVES}
    row: Row = {}
    for half in HALVES:
        row[half] = linear(of[1, half].total - empty, of[tensors, half].total - empty, tensors)
    row["step"] = {name: row["first"][name] + row["second"][name] for name in row["first"]}
    for name, pattern in PARTS.items():
        one, many = (sum(of[n, half].inside(pattern) for half in HALVES) for n in (1, tensors))
        row[name] = linear(one, many, tensors)
    return row


def linear(one: int, many: int, tensors: int) -> dict[str, int]:
    """Return the instructions of a step, from those of all counted steps on one tensor and on many."""
    each = (many - one) / (tensors - 1)
    exact = {"total": many, "fixed": one - each, "per_tensor": each}
    return {name: round(value / STEPS) for name, value in exact.items()}


def measure(variant: str, tensors: int, library: Path) -> Row:
    """Return the row of one variant."""
    command = [sys.executable, "-m", "bench.speed.counted", variant, str(tensors), str(library)]
    counted = callgrind.run(command, library.parent / variant)
    common = {"set": host_set(tensors), "tensors": tensors, "dtype": DTYPE, "threads": 1}
    common |= {"steps": STEPS, "warm_up": WARM_UP_STEPS, "valgrind": callgrind.version(), "variant": variant}
    return records.header("instructions") | common | figures(counted, tensors)


def describe(row: Row) -> str:
    """Return one line for the terminal."""
    step, kernels, freeing = (row[name] for name in ("step", "kernels", "freeing"))
    return (
        f"{row['variant']:26}{step['total']:10,} a step; {step['fixed']:,} fixed, {step['per_tensor']:,} for a tensor, "
        f"of which kernels {kernels['per_tensor']:,}, freeing gradients {freeing['per_tensor']:,}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, append."""
    options = parse_arguments(arguments)
    console = Console(highlight=False, soft_wrap=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = callgrind.build(Path(folder))
            with Progress(*columns, console=console) as progress:
                for number, name in enumerate(options.variants, start=1):
                    place = f"{rivals.find(name).title} under valgrind, {number} of {len(options.variants)}"
                    bar = progress.add_task(place, total=1)
                    finish([measure(name, options.tensors, library)], options, console, describe)
                    progress.update(bar, completed=1)
    except callgrind.CallgrindError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
