"""Write measured rows into README.md and the pages of docs/ as tables, and draw them: python -m bench.report

A block stands between <!-- NAME:start --> and <!-- NAME:end -->; bench/tables.py and bench/gpu/tables.py list the
names, and each experiment of bench/paper has the block "paper:" with its name. Only the newest row of each measured
thing counts. Absent files and blocks, and blocks without text, are left as they are.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import flags, records, tables
from bench.gpu import plot as gpu_plot
from bench.gpu import tables as gpu_tables
from bench.paper import reduction
from bench.paper import runner as paper
from bench.speed import plot as step_plot
from bench.tables import latest

PAGES = ("README.md", *(f"docs/{name}.md" for name in ("benchmarks", "step_times", "gpu", "distributed", "paper")))
BLOCKS = tables.BLOCKS | gpu_tables.BLOCKS | paper.blocks()
PLOTS = {
    "docs/step_cpu.png": step_plot.draw,
    "bench/results/paper_reduction.png": reduction.draw,
    f"docs/{gpu_tables.STEP_PICTURE}": gpu_plot.draw_steps,
    f"docs/{gpu_tables.ITERATION_PICTURE}": gpu_plot.draw_iterations,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = flags.parser("report", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--results", type=Path, default=records.RESULTS, help="folder of .jsonl files")
    add("--root", type=Path, default=records.ROOT, help="folder of README.md and docs/")
    add(
        "--check",
        action="store_true",
        help="write nothing; exit 1 where a page differs from what the rows give",
    )
    return parser.parse_args(arguments)


def filled(page: str, rows: Sequence[records.Row]) -> str:
    """Return the page with every known block replaced."""
    for name, render in BLOCKS.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if (start in page) != (end in page):
            raise ValueError(f"Invalid block {name!r}. Must have both {start} and {end}.")
        text = render(rows)
        if start in page and text:
            pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
            page = pattern.sub(lambda _, block=f"{start}\n{text}\n{end}": block, page)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check."""
    options = parse_arguments(arguments)
    rows = latest(records.read(options.results))
    stale = False
    for name in PAGES:
        path = options.root / name
        if not path.is_file():
            continue
        before = path.read_text(encoding="utf-8")
        after = filled(before, rows)
        if before == after:
            continue
        stale = True
        if options.check:
            lines = (text.splitlines(keepends=True) for text in (before, after))
            sys.stdout.writelines(difflib.unified_diff(*lines, name, f"{name} from the rows"))
        else:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {name}")
    if not options.check:
        for name, draw in PLOTS.items():
            if draw(rows, options.root / name):
                print(f"wrote {name}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
