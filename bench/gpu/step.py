"""Time the optimizer side of a SAM step on a GPU: python -m bench.gpu.step

Eagerly and replayed from a CUDA graph, FusedSAM on every backend and its rivals, interleaved within rounds. Appends
one row per set, dtype, mode and variant; `python -m bench.report` turns rows into tables. `--device cpu` tries the
program out where there is no GPU, and writes rows only to a file that is named.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import records
from bench.gpu import rivals as gpu_rivals
from bench.gpu import timing as gpu_timing
from bench.gpu.rivals import EAGER, GRAPH, MODES, SCALE, CompileBudget, GpuVariant
from bench.gpu.subjects import (
    Floor,
    GraphSubject,
    Sample,
    StepSubject,
    copies_for,
    graph_computes_the_step,
    static_gradients,
)
from bench.records import Row, Spread
from bench.speed import rivals
from bench.speed.harness import DTYPES, FLOOR, Values
from bench.speed.shapes import GPU_SETS, Shape, parameter_count

KIND = "gpu_step"
DEFAULT_DTYPES = ("fp32", "bf16")
ROUNDS, FEWEST_ROUNDS, WARM_UP_ROUNDS = 30, 5, 2
# The compiler takes longer for more tensors, and other sets would show nothing else.
COMPILED_SETS = ("resnet50", "resnet20")
COMPILE_SECONDS = 120.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the program out")
    add("--sets", nargs="+", choices=GPU_SETS, default=list(GPU_SETS), help="parameter sets (default: all)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DEFAULT_DTYPES), help="default: fp32 bf16")
    add("--modes", nargs="+", choices=MODES, help="default: both; on the CPU only eager")
    add("--variants", nargs="+", choices=gpu_rivals.TITLES, metavar="NAME", help="default: all that work")
    add("--rounds", type=int, default=ROUNDS, help=f"at most, per set, dtype and mode (default: {ROUNDS})")
    add("--seconds", type=float, default=600.0, help="for all; fewer rounds when it gets short (default: 600)")
    add("--compile-seconds", type=float, default=COMPILE_SECONDS, help="for all of torch.compile (default: 120)")
    add("--out", type=Path, help="file to append to (default: bench/results/gpu_step.jsonl)")
    add("--dry-run", action="store_true", help="write no rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be >= 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "No GPU: torch sees no CUDA device.\n")
    options.modes = options.modes or list(MODES if options.device == "cuda" else (EAGER,))
    return options


@dataclass
class Job:
    """One set, dtype and mode, with its variants; those that fail say why."""

    name: str
    shapes: Sequence[Shape]
    dtype_name: str
    mode: str
    device: str
    copies: int
    variants: dict[str, GpuVariant]
    subjects: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    valid: dict[str, bool] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    counts: dict[str, gpu_timing.Counts | None] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors."""
        return DTYPES[self.dtype_name]

    def prepare(self, budget: CompileBudget) -> None:
        """Build, check and warm up every variant."""
        torch._dynamo.reset()
        gradients = static_gradients(self.shapes, self.dtype, self.device, self.copies) if self.mode == GRAPH else []
        weights = Values(self.shapes, self.dtype, 1.0, self.device)

        def make(variant: GpuVariant) -> StepSubject | GraphSubject:
            if self.mode == EAGER:
                return StepSubject(variant.build, self.shapes, self.dtype, self.device, self.copies)
            copies = [weights.make_all() for _ in range(self.copies)]
            return GraphSubject(variant.build, copies, gradients, self.device)

        for name, variant in self.variants.items():
            reason = self._why_not(variant)
            if reason:
                self.failed[name] = reason
                continue
            self._attempt(name, lambda v=variant, n=name: budget.run(v, lambda: self._ready(n, v, make(v))))
        copy = (self.shapes, self.dtype, self.device, self.copies)
        self._attempt(FLOOR, lambda: self._ready(FLOOR, None, Floor(*copy)))

    def _why_not(self, variant: GpuVariant) -> str:
        if self.mode == GRAPH and variant.not_captured:
            return variant.not_captured
        if variant.compiled and self.name not in COMPILED_SETS:
            return "not compiled for this set"
        return ""

    def _ready(self, name: str, variant: GpuVariant | None, subject: Any) -> None:
        subject.warm_up()
        self.valid[name] = variant is None or self._check(name, variant)
        self.subjects[name] = subject

    def _check(self, name: str, variant: GpuVariant) -> bool:
        alone = name == SCALE
        if self.mode == GRAPH:
            return graph_computes_the_step(variant.build, self.dtype, self.device, alone)
        oracle = rivals.PlainSGD if alone else rivals.EagerSAM
        return rivals.computes_the_step(variant.build, self.dtype, self.device, oracle)

    def _attempt(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            self.subjects.pop(name, None)
            self.failed[name] = records.reason(error)

    def measure(self, rounds: int, deadline: float, tick: Callable[[], None]) -> None:
        """Make rounds in an order drawn anew, fewer past the deadline; one that is interrupted does not count."""
        names = list(self.subjects)
        self.samples = {name: [] for name in names}
        shuffle = random.Random(0).shuffle
        for number in range(-WARM_UP_ROUNDS, rounds):
            if number >= FEWEST_ROUNDS and time.monotonic() > deadline:
                break
            shuffle(names)
            taken: dict[str, Sample] = {}
            for name in names:
                if name not in self.failed:
                    self._attempt(name, lambda n=name, t=taken: t.update({n: self.subjects[n].visit()}))
            for name, sample in taken.items() if number >= 0 else ():
                self.samples[name].append(sample)
            tick()

    def count(self) -> None:
        """Launches and waits of a step of each, which nobody times."""
        for name in list(self.subjects):
            self._attempt(name, lambda n=name: self.counts.update({n: self.subjects[n].count()}))

    def moved_bytes(self, name: str) -> int | None:
        """What the variant's operations read and write in a step; None where nobody counted."""
        if name == FLOOR:
            return self.subjects[FLOOR].moved_bytes
        moved = self.variants[name].moved(self.dtype)
        return None if moved is None else round(moved * parameter_count(list(self.shapes)))

    def rows(self) -> list[Row]:
        """One per variant, those that failed included."""
        cuda = self.device == "cuda"
        header = records.gpu_header(KIND) if cuda else records.header("smoke")
        common = header | {
            "set": self.name,
            "parameters": parameter_count(list(self.shapes)),
            "tensors": len(self.shapes),
            "dtype": self.dtype_name,
            "mode": self.mode,
            "copies": self.copies,
        }
        failed = [common | {"variant": name, "failed": reason} for name, reason in self.failed.items()]
        for name in self.failed:
            self.samples.pop(name, None)
        return [common | self._figures(name) for name, own in self.samples.items() if own] + failed

    def _figures(self, name: str) -> Row:
        own, counts = self.samples[name], self.counts.get(name)
        spread = Spread.of([sample.seconds for sample in own]).rounded()
        row: Row = {
            "variant": name,
            "failed": None,
            "valid": self.valid[name],
            "rounds": len(own),
            "median_s": spread["median"],
            "p20_s": spread["p20"],
            "p80_s": spread["p80"],
            "host_s": _median([sample.host_s for sample in own]),
            "first_s": _median([sample.first_s for sample in own]),
            "second_s": _median([sample.second_s for sample in own]),
            "launches": counts and counts.launches,
            "memory_operations": counts and counts.memory_operations,
            "syncs": counts and counts.syncs,
            "bytes": self.moved_bytes(name),
            "ratio_to_rival": {},
            "ratio_to_floor": None,
        }
        if name in gpu_rivals.OURS.values():
            others = [other for other in self.samples if other not in (name, FLOOR)]
            row["ratio_to_rival"] = {other: self._ratio(other, name).rounded() for other in others}
        if row["bytes"] and FLOOR in self.samples:
            share = row["bytes"] / self.moved_bytes(FLOOR)
            row["ratio_to_floor"] = Spread(*(share * value for value in self._ratio(FLOOR, name))).rounded()
        return row

    def _ratio(self, slow: str, fast: str) -> Spread:
        """How many times as long, round by round."""
        pairs = zip(self.samples[slow], self.samples[fast], strict=True)
        return Spread.of([a.seconds / b.seconds for a, b in pairs])


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return Spread.of(known).rounded()["median"] if known else None


def jobs(options: argparse.Namespace, sets: dict[str, Callable[[], list[Shape]]]) -> list[Job]:
    """List all sets of a dtype and mode before the next, the first mode's first."""
    cuda = options.device == "cuda"
    l2_bytes = records.gpu_hardware()["l2_bytes"] if cuda else 0
    made = []
    for mode in options.modes:
        known = gpu_rivals.variants(options.device, mode)
        chosen = {n: v for n, v in known.items() if not options.variants or n in options.variants}
        for dtype_name in options.dtypes:
            for name in options.sets:
                shapes = sets[name]()
                copies = copies_for(shapes, DTYPES[dtype_name], l2_bytes)
                made.append(Job(name, shapes, dtype_name, mode, options.device, copies, chosen))
    return made


def describe(row: Row) -> str:
    """One line for the terminal."""
    head = f"{row['set']:9} {row['dtype']} {row['mode']:5} {row['variant']:25}"
    if row["failed"]:
        return f"{head} failed: {row['failed']}"
    floor = row["ratio_to_floor"]
    return (
        f"{head}{1e6 * row['median_s']:10.1f} us [{1e6 * row['p20_s']:.1f}, {1e6 * row['p80_s']:.1f}]"
        f"  host {1e6 * row['host_s']:.0f} us"
        + (f"  {row['launches']}+{row['memory_operations']} launches" if row["launches"] is not None else "")
        + (f"  {row['syncs']} waits" if row["syncs"] else "")
        + (f"  {floor['median']:.2f} of the floor" if floor else "")
        + ("" if row["valid"] else "  WRONG RESULT")
    )


def run(
    options: argparse.Namespace, console: Console, sets: dict[str, Callable[[], list[Shape]]] = GPU_SETS
) -> list[Row]:
    """Measure all jobs; append the rows of each when it ends, or is interrupted."""
    end = time.monotonic() + options.seconds
    budget = CompileBudget(options.compile_seconds)
    counting = options.device == "cuda" and gpu_timing.counter_works()
    if not counting:
        console.print("launches and waits are not counted: no profiler here sees single kernels")
    all_jobs = jobs(options, sets)
    path = options.out or (records.RESULTS / f"{KIND}.jsonl" if options.device == "cuda" else None)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # No refreshing in the background: it would run while a step is timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        for number, job in enumerate(all_jobs):
            begin = time.monotonic()
            if begin > end:
                console.print(f"{job.name} {job.dtype_name} {job.mode}: not measured, the time is up")
                continue
            bar = progress.add_task(f"{job.name} {job.dtype_name} {job.mode}", total=options.rounds + WARM_UP_ROUNDS)
            deadline = begin + (end - begin) / (len(all_jobs) - number)
            try:
                job.prepare(budget)
                gc.collect()
                gc.disable()
                job.measure(options.rounds, deadline, lambda b=bar: _tick(progress, b))
                if counting:
                    job.count()
            finally:
                gc.enable()
                new = job.rows()
                if path and not options.dry_run:
                    records.write_rows(new, path)
                progress.remove_task(bar)
                for row in new:
                    console.print(describe(row))
            rows += new
            job.subjects.clear()
            gpu_timing.collect(options.device)
    return rows


def _tick(progress: Progress, bar: Any) -> None:
    progress.advance(bar)
    progress.refresh()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse_arguments(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if options.device == "cpu":
        torch.set_num_threads(1)
    return 0 if run(options, console) else 1


if __name__ == "__main__":
    sys.exit(main())
