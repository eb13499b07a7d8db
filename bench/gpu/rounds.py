"""What both benchmarks of a GPU have: options, and variants that take turns in rounds until the time is up."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import flags, records
from bench.gpu import timing as gpu_timing
from bench.records import Row


def parser(kind: str, doc: str, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    made = flags.parser(kind.replace("_", "."), doc.splitlines()[0])
    add = made.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the program out")
    add("--rounds", type=int, default=rounds, help="at most, of each job")
    add("--seconds", type=float, default=600.0, help="for all; fewer rounds when it gets short")
    add("--out", type=Path, help=f"file to append to (default: bench/results/{kind}.jsonl, from a GPU)")
    add("--dry-run", action="store_true", help="write no rows")
    return made


def need_a_gpu(made: argparse.ArgumentParser) -> None:
    """End the program where there is none."""
    if not torch.cuda.is_available():
        made.exit(1, "No GPU: torch sees no CUDA device.\n")


@dataclass
class Job:
    """One table of variants that are compared; those that fail say why, and are left out.

    Args:
        kind: of the rows.
        device: "cuda" or "cpu".
        about: what all rows say, and the names of the job on the terminal.
    """

    kind: str
    device: str
    about: Row
    subjects: dict[str, Any] = field(default_factory=dict)  # with a `visit` that returns a sample with its `seconds`
    failed: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)

    fewest_rounds, warm_up_rounds = 2, 0

    def prepare(self) -> None:
        """Build, check and warm up every variant."""
        raise NotImplementedError

    def figures(self, name: str) -> Row:
        """Return what the row of a variant says of its samples."""
        raise NotImplementedError

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """Do something for a variant, which is left out from then on if that fails."""
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
        for number in range(-self.warm_up_rounds, rounds):
            if number >= self.fewest_rounds and time.monotonic() > deadline:
                break
            shuffle(names)
            taken: dict[str, Any] = {}
            for name in names:
                if name not in self.failed:
                    self.attempt(name, lambda n=name, t=taken: t.update({n: self.subjects[n].visit()}))
            for name, sample in taken.items() if number >= 0 else ():
                self.samples[name].append(sample)
            tick()

    def rows(self) -> list[Row]:
        """Return one per variant, those that failed included."""
        header = records.gpu_header(self.kind) if self.device == "cuda" else records.header("smoke")
        common = header | self.about
        failed = [common | {"variant": name, "failed": reason} for name, reason in self.failed.items()]
        for name in self.failed:
            self.samples.pop(name, None)
        head = {name: {"variant": name, "failed": None, "rounds": len(own)} for name, own in self.samples.items()}
        return [common | head[name] | self.figures(name) for name, own in self.samples.items() if own] + failed


def run(
    options: argparse.Namespace,
    jobs: Sequence[Job],
    title: Callable[[Job], str],
    describe: Callable[[Row], str],
    console: Console,
) -> list[Row]:
    """Measure all jobs; append the rows of each when it ends, or is interrupted."""
    end = time.monotonic() + options.seconds
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # No refreshing in the background: it would run while a step is timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        for number, job in enumerate(jobs):
            begin = time.monotonic()
            if begin > end:
                console.print(f"{title(job)}: not measured, the time is up")
                continue
            bar = progress.add_task(title(job), total=options.rounds + job.warm_up_rounds)
            deadline = begin + (end - begin) / (len(jobs) - number)
            try:
                job.prepare()
                job.measure(options.rounds, deadline, lambda b=bar: (progress.advance(b), progress.refresh()))
            finally:
                new = job.rows()
                path = options.out or (records.RESULTS / f"{job.kind}.jsonl" if job.device == "cuda" else None)
                if path and not options.dry_run:
                    records.write_rows(new, path)
                progress.remove_task(bar)
                for row in new:
                    console.print(describe(row))
            rows += new
            job.subjects.clear()
            gpu_timing.collect(job.device)
    return rows
