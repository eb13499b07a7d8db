"""Time the optimizer side of a SAM step on a GPU: python -m bench.gpu.step

Eagerly and replayed from a CUDA graph, FusedSAM on every backend and its rivals, interleaved within rounds. Appends
one row per set, dtype, mode and variant; `python -m bench.report` turns rows into tables. `--device cpu` tries the
program out where there is no GPU, and writes rows only to a file that is named.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from bench import records
from bench.gpu import rivals as gpu_rivals
from bench.gpu import rounds
from bench.gpu import timing as gpu_timing
from bench.gpu.rivals import EAGER, GRAPH, MODES, SCALE, CompileBudget, GpuVariant
from bench.gpu.subjects import (
    Floor,
    GraphSubject,
    StepSubject,
    copies_for,
    graph_computes_the_step,
    static_gradients,
)
from bench.records import Row, Spread
from bench.speed import rivals
from bench.speed.harness import DTYPES, FLOOR, Values, ratio
from bench.speed.shapes import GPU_SETS, Shape, parameter_count

KIND = "gpu_step"
DEFAULT_DTYPES = ("fp32", "bf16")
ROUNDS, WARM_UP_ROUNDS = 30, 2
# The compiler takes longer for more tensors, and other sets would show nothing else.
COMPILED_SETS = ("resnet50", "resnet20")
COMPILE_SECONDS = 120.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = rounds.parser(KIND, __doc__, ROUNDS)
    add = parser.add_argument
    add("--sets", nargs="+", choices=GPU_SETS, default=list(GPU_SETS), help="parameter sets (default: all)")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DEFAULT_DTYPES), help="default: fp32 bf16")
    add("--modes", nargs="+", choices=MODES, help="default: both; on the CPU only eager")
    add("--variants", nargs="+", choices=gpu_rivals.TITLES, metavar="NAME", help="default: all that work")
    add("--compile-seconds", type=float, default=COMPILE_SECONDS, help="for all of torch.compile (default: 120)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be >= 1")
    if options.device == "cuda":
        rounds.need_a_gpu(parser)
    options.modes = options.modes or list(MODES if options.device == "cuda" else (EAGER,))
    return options


class Job(rounds.Job):
    """One set, dtype and mode, with its variants."""

    fewest_rounds, warm_up_rounds = 5, WARM_UP_ROUNDS

    def __init__(
        self,
        name: str,
        shapes: list[Shape],
        dtype_name: str,
        mode: str,
        device: str,
        copies: int,
        variants: dict[str, GpuVariant],
        budget: CompileBudget,
        counting: bool = False,
    ) -> None:
        sizes = {"parameters": parameter_count(shapes), "tensors": len(shapes)}
        about = {"set": name, **sizes, "dtype": dtype_name, "mode": mode, "copies": copies}
        super().__init__(KIND, device, about)
        self.name, self.shapes, self.dtype, self.mode, self.copies = name, shapes, DTYPES[dtype_name], mode, copies
        self.variants, self.budget, self.counting = variants, budget, counting
        self.valid: dict[str, bool] = {}
        self.counts: dict[str, gpu_timing.Counts | None] = {}

    def prepare(self) -> None:
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
            self.attempt(name, lambda v=variant, n=name: self.budget.run(v, lambda: self._ready(n, v, make(v))))
        copy = (self.shapes, self.dtype, self.device, self.copies)
        self.attempt(FLOOR, lambda: self._ready(FLOOR, None, Floor(*copy)))

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

    def measure(self, rounds: int, deadline: float, tick: Callable[[], None]) -> None:
        """Make rounds without the garbage collector, then count launches and waits of a step of each."""
        gc.collect()
        gc.disable()
        try:
            super().measure(rounds, deadline, tick)
            for name in list(self.subjects) if self.counting else ():
                self.attempt(name, lambda n=name: self.counts.update({n: self.subjects[n].count()}))
        finally:
            gc.enable()

    def moved_bytes(self, name: str) -> int | None:
        """Return what the variant's operations read and write in a step; None where that was not counted."""
        if name == FLOOR:
            return self.subjects[FLOOR].moved_bytes
        moved = self.variants[name].moved(self.dtype)
        return None if moved is None else round(moved * self.about["parameters"])

    def figures(self, name: str) -> Row:
        """Return what the row of a variant says of its samples."""
        own, counts = self.samples[name], self.counts.get(name)
        row: Row = {
            "valid": self.valid[name],
            **Spread.of([sample.seconds for sample in own]).seconds(),
            "host_s": _median([sample.host_s for sample in own]),
            "first_s": _median([sample.first_s for sample in own]),
            "second_s": _median([sample.second_s for sample in own]),
            **{key: counts and getattr(counts, key) for key in gpu_timing.Counts._fields},
            "bytes": self.moved_bytes(name),
            "ratio_to_rival": {},
            "ratio_to_floor": None,
        }
        if name in gpu_rivals.OURS.values():
            others = [other for other in self.samples if other not in (name, FLOOR)]
            row["ratio_to_rival"] = {other: ratio(self.samples[other], own).rounded() for other in others}
        if row["bytes"] and FLOOR in self.samples:
            share = row["bytes"] / self.moved_bytes(FLOOR)
            to_floor = ratio(self.samples[FLOOR], own)
            row["ratio_to_floor"] = Spread(*(share * value for value in to_floor)).rounded()
        return row


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return records.median(known) if known else None


def jobs(options: argparse.Namespace, sets: dict[str, Callable[[], list[Shape]]], counting: bool) -> list[Job]:
    """List all sets of a dtype and mode before the next, the first mode's first."""
    budget = CompileBudget(options.compile_seconds)
    l2_bytes = records.gpu_hardware()["l2_bytes"] if options.device == "cuda" else 0
    made = []
    for mode in options.modes:
        known = gpu_rivals.variants(options.device, mode)
        chosen = {n: v for n, v in known.items() if not options.variants or n in options.variants}
        for dtype, name in itertools.product(options.dtypes, options.sets):
            shapes = sets[name]()
            copies = copies_for(shapes, DTYPES[dtype], l2_bytes)
            made.append(Job(name, shapes, dtype, mode, options.device, copies, chosen, budget, counting))
    return made


def describe(row: Row) -> str:
    """Return one line for the terminal."""
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
    counting = options.device == "cuda" and gpu_timing.counter_works()
    if not counting:
        console.print("launches and waits are not counted: no profiler here sees single kernels")
    title = "{set} {dtype} {mode}".format_map
    return rounds.run(options, jobs(options, sets, counting), lambda job: title(job.about), describe, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse_arguments(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if options.device == "cpu":
        torch.set_num_threads(1)
    return 0 if run(options, console) else 1


if __name__ == "__main__":
    sys.exit(main())
