"""Time whole iterations, forward, backward and SAM, on a GPU: python -m bench.gpu.iteration

ResNet-50 (channels_last) and ViT-B/16 on synthetic images that are on the device, under bf16 autocast. A visit makes
several iterations back to back, as training does, so that the host runs ahead where it can. Appends one row per model,
batch and variant. `--device cpu` tries the program out with a tiny batch, and writes rows only to a file that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from bench import records
from bench.gpu import rivals as gpu_rivals
from bench.gpu import timing as gpu_timing
from bench.gpu.models import CLASSES, MODELS
from bench.gpu.rivals import EAGER, FOREACH, OURS, SCALE
from bench.records import Row, Spread

KIND = "gpu_iteration"
TWICE = "sgd_twice"
BATCHES = (64, 256, 1024)
ROUNDS, FEWEST_ROUNDS = 10, 2
# Iterations a visit, by images: short ones need more for the host to get ahead. The first of them does not count.
IMAGES_PER_VISIT, MOST_ITERATIONS = 1024, 6
WARM_UP_VISITS = 1
IMAGE, SMALL_IMAGE = 224, 32
STAGES = ("forward", "backward", "optimizer")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.iteration", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the program out")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    add("--batches", nargs="+", type=int, default=list(BATCHES), help="default: 64 256 1024")
    add("--rounds", type=int, default=ROUNDS, help=f"at most, per model and batch (default: {ROUNDS})")
    add("--seconds", type=float, default=600.0, help="for all; fewer rounds when it gets short (default: 600)")
    add("--smoke", action="store_true", help="two images of 32 x 32, one round")
    add("--out", type=Path, help="file to append to (default: bench/results/gpu_iteration.jsonl)")
    add("--dry-run", action="store_true", help="write no rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.batches) < 1:
        parser.error("--rounds and --batches must be >= 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "No GPU: torch sees no CUDA device.\n")
    if options.smoke:
        options.batches, options.rounds = [2], 1
    return options


class Iteration(NamedTuple):
    """Seconds of one iteration and of its stages, both passes together."""

    seconds: float
    forward: float
    backward: float
    optimizer: float


class Marks:
    """Points in time on the device: events there, a clock on the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.points: list[tuple[str, Any]] = []

    def mark(self, stage: str) -> None:
        """The end of a stage; the first mark of an iteration has none."""
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append((stage, event))
        else:
            self.points.append((stage, time.perf_counter()))

    def iteration(self) -> Iteration:
        """What the marks say, after the device is done."""
        stages = dict.fromkeys(STAGES, 0.0)
        for (_, before), (stage, after) in zip(self.points, self.points[1:], strict=False):
            stages[stage] += before.elapsed_time(after) / 1e3 if self.device == "cuda" else after - before
        return Iteration(sum(stages.values()), **stages)


class Trainer:
    """A model, a variant and a batch that stays."""

    def __init__(self, model_name: str, variant: str, batch: tuple[torch.Tensor, torch.Tensor], device: str) -> None:
        self.device, self.variant = device, variant
        before = _allocated(device)
        torch.manual_seed(0)
        self.model: nn.Module = MODELS[model_name]().to(device)
        if model_name == "resnet50":
            self.model = self.model.to(memory_format=torch.channels_last)
        known = gpu_rivals.variants(device, EAGER)
        build = known[SCALE if variant == TWICE else variant].build
        self.optimizer = build(list(self.model.parameters()))
        self.batch = batch
        self.visit(1)
        self.kept_bytes = _allocated(device) - before

    def visit(self, iterations: int) -> Iteration:
        """Mean of some iterations back to back without the first."""
        marks = []
        for _ in range(iterations):
            marks.append(Marks(self.device))
            self._iterate(marks[-1])
        gpu_timing.synchronize(self.device)
        seen = [mark.iteration() for mark in marks][1 if iterations > 1 else 0 :]
        return Iteration(*(sum(values) / len(seen) for values in zip(*seen, strict=True)))

    def peak_bytes(self) -> int:
        """Of one iteration, beyond what other trainers hold."""
        if self.device != "cuda":
            return 0
        before = _allocated(self.device)
        torch.cuda.reset_peak_memory_stats()
        self.visit(1)
        return torch.cuda.max_memory_allocated() - before + self.kept_bytes

    def _iterate(self, marks: Marks) -> None:
        marks.mark("begin")
        if self.variant != SCALE:
            self._gradients(marks)
            half = self.optimizer.second_step if self.variant == TWICE else self.optimizer.first_step
            half(zero_grad=True)
            marks.mark("optimizer")
        self._gradients(marks)
        self.optimizer.second_step(zero_grad=True)
        marks.mark("optimizer")

    def _gradients(self, marks: Marks) -> None:
        images, labels = self.batch
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = F.cross_entropy(self.model(images), labels)
        marks.mark("forward")
        loss.backward()
        marks.mark("backward")


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def make_batch(model_name: str, size: int, image: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels on the device."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(size, 3, image, image, device=device, generator=generator)
    if model_name == "resnet50":
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (size,), device=device, generator=generator)


@dataclass
class Job:
    """One model and batch size."""

    model: str
    size: int
    image: int
    device: str
    trainers: dict[str, Trainer] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seen: dict[str, list[Iteration]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """A visit's."""
        return max(2, min(MOST_ITERATIONS, IMAGES_PER_VISIT // self.size))

    def prepare(self) -> None:
        """Build and warm up the variants; the libraries' own memory is taken by a first one that is thrown away."""
        batch = make_batch(self.model, self.size, self.image, self.device)
        with contextlib.suppress(torch.OutOfMemoryError):  # each variant will say so
            Trainer(self.model, SCALE, batch, self.device)
        ours = [name for name in gpu_rivals.variants(self.device, EAGER) if name in OURS.values()]
        for name in (*ours, "eager_sgd", FOREACH, SCALE, TWICE):
            gc.collect()
            try:
                trainer = Trainer(self.model, name, batch, self.device)
                trainer.visit(WARM_UP_VISITS)
                self.peaks[name] = trainer.peak_bytes()
                self.trainers[name] = trainer
            except Exception as error:
                self.failed[name] = records.reason(error)

    def measure(self, rounds: int, deadline: float) -> None:
        """Make rounds in an order drawn anew, fewer past the deadline; one that is interrupted does not count."""
        names = list(self.trainers)
        self.seen = {name: [] for name in names}
        shuffle = random.Random(0).shuffle
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.monotonic() > deadline:
                break
            shuffle(names)
            taken: dict[str, Iteration] = {}
            for name in names:
                if name in self.failed:
                    continue
                try:
                    taken[name] = self.trainers[name].visit(self.iterations)
                except Exception as error:
                    self.failed[name] = records.reason(error)
            for name, iteration in taken.items():
                self.seen[name].append(iteration)

    def rows(self) -> list[Row]:
        """One per variant, those that failed included."""
        header = records.gpu_header(KIND) if self.device == "cuda" else records.header("smoke")
        common = header | {"model": self.model, "batch": self.size, "image": self.image, "dtype": "bf16 autocast"}
        failed = [common | {"variant": name, "failed": reason} for name, reason in self.failed.items()]
        for name in self.failed:
            self.seen.pop(name, None)
        return [common | self._figures(name) for name, own in self.seen.items() if own] + failed

    def _figures(self, name: str) -> Row:
        own = self.seen[name]
        spread = Spread.of([one.seconds for one in own]).rounded()
        row: Row = {
            "variant": name,
            "failed": None,
            "rounds": len(own),
            "iterations": self.iterations - 1,
            "median_s": spread["median"],
            "p20_s": spread["p20"],
            "p80_s": spread["p80"],
            "peak_bytes": self.peaks[name],
            "peak_over_sgd_bytes": self.peaks[name] - self.peaks[SCALE] if SCALE in self.peaks else None,
            "ratios": {},
        }
        for stage in STAGES:
            row[f"{stage}_s"] = Spread.of([getattr(one, stage) for one in own]).rounded()["median"]
        for other in self.seen:
            if other != name:
                pairs = zip(own, self.seen[other], strict=True)
                row["ratios"][other] = Spread.of([a.seconds / b.seconds for a, b in pairs]).rounded()
        return row


def describe(row: Row) -> str:
    """One line for the terminal."""
    head = f"{row['model']:9} batch {row['batch']:5} {row['variant']:18}"
    if row["failed"]:
        return f"{head} failed: {row['failed']}"
    stages = ", ".join(f"{stage} {1e3 * row[f'{stage}_s']:.2f}" for stage in STAGES)
    twice = row["ratios"].get(TWICE)
    return (
        f"{head}{1e3 * row['median_s']:9.2f} ms [{1e3 * row['p20_s']:.2f}, {1e3 * row['p80_s']:.2f}]  ({stages})"
        f"  peak {row['peak_bytes'] / 1e9:.2f} GB" + (f"  {twice['median']:.3f} of SGD twice" if twice else "")
    )


def run(options: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """Measure every model at every batch size; append the rows of each when it ends, or is interrupted."""
    end = time.monotonic() + options.seconds
    path = options.out or (records.RESULTS / f"{KIND}.jsonl" if options.device == "cuda" else None)
    image = SMALL_IMAGE if options.smoke else IMAGE
    jobs = [Job(model, size, image, options.device) for size in options.batches for model in options.models]
    rows: list[Row] = []
    for number, job in enumerate(jobs):
        begin = time.monotonic()
        if begin > end:
            say(f"{job.model} batch {job.size}: not measured, the time is up")
            continue
        try:
            job.prepare()
            job.measure(options.rounds, begin + (end - begin) / (len(jobs) - number))
        finally:
            new = job.rows()
            if path and not options.dry_run:
                records.write_rows(new, path)
            for row in new:
                say(describe(row))
        rows += new
        job.trainers.clear()
        gpu_timing.collect(options.device)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse_arguments(arguments)
    torch.backends.cudnn.benchmark = True
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = run(options, Console(highlight=False, soft_wrap=True).print)
    return 0 if any(not row["failed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
