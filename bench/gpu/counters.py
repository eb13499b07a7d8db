"""Read the GPU's counters for every kernel of one step, with Nsight Compute: python -m bench.gpu.counters

What a clock cannot tell: bytes that a kernel moves from and to memory, how much the L2 cache answered, how busy
memory was. Appends one row per kernel. The step is one of many copies of a set, as in bench.gpu.step.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench import flags, records
from bench.gpu import rivals as gpu_rivals
from bench.gpu.rivals import EAGER
from bench.gpu.rounds import need_a_gpu
from bench.gpu.subjects import StepSubject, copies_for
from bench.records import Row
from bench.speed.harness import DTYPES
from bench.speed.shapes import GPU_SETS, parameter_count

KIND = "gpu_counters"
TOOL = "ncu"
FOLDERS = ("/usr/local/cuda/bin", *map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)))
# Our names, and the tool's for them; those of memory and cache are sums over the device.
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "read_bytes": "dram__bytes_read.sum",
    "written_bytes": "dram__bytes_write.sum",
    "memory_busy": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hits": "lts__t_sector_hit_rate.pct",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
# To seconds, bytes and shares of 1.
UNITS = {
    **{"second": 1.0, "s": 1.0, "msecond": 1e-3, "ms": 1e-3, "usecond": 1e-6, "us": 1e-6, "nsecond": 1e-9, "ns": 1e-9},
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
    "%": 0.01,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = flags.parser("gpu.counters", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--sets", nargs="+", choices=GPU_SETS, default=["resnet50", "vit_b16"], help="of tensors")
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32"], help="of the parameters")
    variants = list(gpu_rivals.OURS.values())
    add("--variants", nargs="+", choices=variants, default=variants[:2], help="of the step")
    add("--seconds", type=float, default=300.0, help="for all; what is not begun by then is left out")
    add("--out", type=Path, default=records.RESULTS / f"{KIND}.jsonl", help="file to append to")
    add("--dry-run", action="store_true", help="write no rows")
    add("--step", action="store_true", help="make the step that the tool looks at; for its own use")
    options = parser.parse_args(arguments)
    need_a_gpu(parser)
    if not options.step and find_tool() is None:
        parser.exit(1, f"No counters: {TOOL} (Nsight Compute) is neither on the PATH nor in {', '.join(FOLDERS)}.\n")
    return options


def find_tool() -> str | None:
    """Return the program, where there is one."""
    return shutil.which(TOOL) or shutil.which(TOOL, path=os.pathsep.join(FOLDERS))


def make_step(set_name: str, dtype_name: str, variant: str) -> None:
    """Make the step to be looked at, after two that are not; the tool sees what is between start and stop."""
    build = gpu_rivals.variants("cuda", EAGER)[variant].build
    shapes, dtype = GPU_SETS[set_name](), DTYPES[dtype_name]
    copies = copies_for(shapes, dtype, records.gpu_hardware()["l2_bytes"])
    subject = StepSubject(build, shapes, dtype, "cuda", copies)
    for _ in range(2):
        subject.warm_up()
    # All copies take their halves in turn, and the last one's is looked at: the cache is as a step leaves it.
    for half, member in itertools.product(("first_step", "second_step"), subject.members):
        member.assign(subject.grads.make_all())
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile() if member is subject.members[-1] else contextlib.nullcontext():
            getattr(member.optimizer, half)(zero_grad=True)
            torch.cuda.synchronize()


def command(tool: str, set_name: str, dtype_name: str, variant: str) -> list[str]:
    """Return a command that runs the whole program once for each group of counters: the cache is then as in a step."""
    options = ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS.values())]
    options += ["--replay-mode", "application", "--cache-control", "none", "--clock-control", "none"]
    options += ["--profile-from-start", "off"]
    step = ["-m", "bench.gpu.counters", "--step", "--sets", set_name, "--dtypes", dtype_name, "--variants", variant]
    return [tool, *options, sys.executable, *step]


def read(output: str) -> list[Row]:
    """Return the kernels in the order of their launches, from the tool's table: names, then units, then numbers."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    if len(lines) < 2 or "Kernel Name" not in lines[0]:
        raise ValueError(f"Invalid output of {TOOL}. Must hold a table: {output.strip()[-300:]!r}.")
    units, *kernels = csv.DictReader(lines)
    return [_kernel(number, values, units) for number, values in enumerate(kernels)]


def _kernel(number: int, values: dict[str, str], units: dict[str, str]) -> Row:
    row: Row = {"number": number, "kernel": short_name(values["Kernel Name"])}
    row |= {"grid": values["Grid Size"], "block": values["Block Size"]}
    for name, metric in METRICS.items():
        text = values.get(metric, "").replace(",", "")
        if text in ("", "n/a", "nan"):
            row[name] = None
            continue
        if units[metric] not in UNITS:
            raise ValueError(f"Invalid unit {units[metric]!r} of {metric}. Must be one of {list(UNITS)}.")
        row[name] = float(f"{float(text) * UNITS[units[metric]]:.4g}")
    return row


def short_name(signature: str) -> str:
    """Return a kernel's name without namespaces, arguments of its template and parameters."""
    name = re.sub(r"\(anonymous namespace\)|<unnamed>", "", signature)
    while (plain := re.sub(r"<[^<>]*>", "", name)) != name:
        name = plain
    return name.partition("(")[0].split()[-1].split("::")[-1]


def measure(tool: str, set_name: str, dtype_name: str, variant: str, seconds: float) -> list[Row]:
    """Return the rows of one step."""
    try:
        done = subprocess.run(
            command(tool, set_name, dtype_name, variant), cwd=records.ROOT, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{TOOL} took more than {seconds:.0f} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"{TOOL} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
    # One date for the kernels of one step.
    common = records.gpu_header(KIND) | {"set": set_name, "dtype": dtype_name, "variant": variant}
    common["parameters"] = parameter_count(GPU_SETS[set_name]())
    return [common | row for row in read(done.stdout)]


def scaled(row: Row, name: str) -> str:
    """Write a number in the unit that is usual for it: microseconds, megabytes, percent; "" where it is not known."""
    factor = 1e6 if name == "seconds" else 1e-6 if name.endswith("bytes") else 100.0
    return "" if row[name] is None else f"{factor * row[name]:.1f}"


def describe(row: Row) -> str:
    """Return one line for the terminal."""
    seconds, read_bytes, written, busy, hits, occupancy = (scaled(row, name) or "?" for name in METRICS)
    return (
        f"{row['set']:9} {row['dtype']} {row['variant']:18}{row['kernel']:20}{seconds:>9} us  read {read_bytes} MB, "
        f"wrote {written} MB, memory busy {busy} %, L2 hits {hits} %, occupancy {occupancy} %"
    )


def run(options: argparse.Namespace, console: Console, tool: str) -> Iterable[Row]:
    """Measure all, append their rows; print what fails, and leave it out."""
    end = time.monotonic() + options.seconds
    worked = list(gpu_rivals.variants("cuda", EAGER))
    variants = [name for name in options.variants if name in worked]
    for step in itertools.product(options.sets, options.dtypes, variants):
        left = end - time.monotonic()
        if left <= 0:
            console.print(f"{' '.join(step)}: not measured, the time is up")
            continue
        try:
            rows = measure(tool, *step, left)
        except (RuntimeError, ValueError) as error:
            console.print(f"{' '.join(step)}: failed: {error}")
            continue
        for row in rows:
            console.print(describe(row))
        if not options.dry_run:
            records.write_rows(rows, options.out)
        yield from rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append; 1 if nothing was."""
    options = parse_arguments(arguments)
    if options.step:
        make_step(options.sets[0], options.dtypes[0], options.variants[0])
        return 0
    tool = find_tool()
    assert tool is not None
    console = Console(highlight=False, soft_wrap=True)
    return 0 if list(run(options, console, tool)) else 1


if __name__ == "__main__":
    sys.exit(main())
