"""Time whole iterations, forward, backward and SAM, on a GPU: python -m bench.gpu.iteration

ResNet-50 (channels_last) and ViT-B/16 on synthetic images that are on the device, under bf16 autocast. A visit makes
several iterations back to back, as training does, so that the host runs ahead where it can. Appends one row per model,
batch and variant. `--device cpu` tries the program out with a tiny batch, and writes rows only to a file that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from bench import records
from bench.gpu import rivals as gpu_rivals
from bench.gpu import rounds
from bench.gpu.rivals import EAGER, FOREACH, OURS, SCALE
from bench.records import Row, Spread
from bench.speed.harness import ratio
from bench.speed.models import CLASSES, MODELS
from bench.training.run import StepClock

KIND = "gpu_iteration"
TWICE = "sgd_twice"
BATCHES = (64, 256, 1024)
ROUNDS = 10
# Iterations a visit, by images: short ones need more for the host to get ahead. The first of them does not count.
IMAGES_PER_VISIT, MOST_ITERATIONS = 1024, 6
WARM_UP_VISITS = 1
IMAGE, SMALL_IMAGE = 224, 32
STAGES = ("forward", "backward", "optimizer")
Batch = tuple[torch.Tensor, torch.Tensor]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = rounds.parser(KIND, __doc__, ROUNDS)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    add("--batches", nargs="+", type=int, default=list(BATCHES), help="default: 64 256 1024")
    add("--smoke", action="store_true", help="two images of 32 x 32, one round")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.batches) < 1:
        parser.error("--rounds and --batches must be >= 1")
    if options.device == "cuda":
        rounds.need_a_gpu(parser)
    if options.smoke:
        options.batches, options.rounds = [2], 1
    return options


class Iteration(NamedTuple):
    """Holds seconds of one iteration and of its stages, both passes together."""

    seconds: float
    forward: float
    backward: float
    optimizer: float


class Trainer:
    """A model, a variant and a batch that stays; a visit makes some iterations."""

    def __init__(self, model_name: str, variant: str, batch: Batch, device: str, iterations: int = 1) -> None:
        self.device, self.variant = device, variant
        before = _allocated(device)
        torch.manual_seed(0)
        self.model: nn.Module = MODELS[model_name]().to(device)
        if model_name == "resnet50":
            self.model = self.model.to(memory_format=torch.channels_last)
        known = gpu_rivals.variants(device, EAGER)
        build = known[SCALE if variant == TWICE else variant].build
        self.optimizer = build(list(self.model.parameters()))
        self.batch, self.iterations = batch, iterations
        self.clock = StepClock(torch.device(device))
        self.visit(1)
        self.kept_bytes = _allocated(device) - before

    def visit(self, iterations: int | None = None) -> Iteration:
        """Return the mean of some iterations back to back without the first, of one alone that one."""
        count = iterations or self.iterations
        for _ in range(count):
            self._iterate()
        times = self.clock.read(count)
        stages = {stage: statistics.fmean(ms[count > 1 :]) / 1e3 for stage, ms in times.items()}
        return Iteration(sum(stages.values()), **stages)

    def peak_bytes(self) -> int:
        """Return the peak of one iteration, beyond what other trainers hold."""
        if self.device != "cuda":
            return 0
        before = _allocated(self.device)
        torch.cuda.reset_peak_memory_stats()
        self.visit(1)
        return torch.cuda.max_memory_allocated() - before + self.kept_bytes

    def _iterate(self) -> None:
        if self.variant != SCALE:
            self._gradients()
            half = self.optimizer.second_step if self.variant == TWICE else self.optimizer.first_step
            with self.clock.part("optimizer"):
                half(zero_grad=True)
        self._gradients()
        with self.clock.part("optimizer"):
            self.optimizer.second_step(zero_grad=True)

    def _gradients(self) -> None:
        images, labels = self.batch
        with self.clock.part("forward"), torch.autocast(self.device, dtype=torch.bfloat16):
            loss = F.cross_entropy(self.model(images), labels)
        with self.clock.part("backward"):
            loss.backward()


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def make_batch(model_name: str, size: int, image: int, device: str) -> Batch:
    """Return random images and labels on the device."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(size, 3, image, image, device=device, generator=generator)
    if model_name == "resnet50":
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (size,), device=device, generator=generator)


class Job(rounds.Job):
    """One model and batch size."""

    def __init__(self, model: str, size: int, image: int, device: str) -> None:
        super().__init__(KIND, device, {"model": model, "batch": size, "image": image, "dtype": "bf16 autocast"})
        self.iterations = max(2, min(MOST_ITERATIONS, IMAGES_PER_VISIT // size))
        self.peaks: dict[str, int] = {}

    def prepare(self) -> None:
        """Build and warm up the variants; the libraries' own memory is taken by a first one that is thrown away."""
        model = self.about["model"]
        batch = make_batch(model, self.about["batch"], self.about["image"], self.device)
        with contextlib.suppress(torch.OutOfMemoryError):  # each variant will say so
            Trainer(model, SCALE, batch, self.device)
        ours = [name for name in gpu_rivals.variants(self.device, EAGER) if name in OURS.values()]

        def add(name: str) -> None:
            trainer = Trainer(model, name, batch, self.device, self.iterations)
            trainer.visit(WARM_UP_VISITS)
            self.peaks[name] = trainer.peak_bytes()
            self.subjects[name] = trainer

        for name in (*ours, "eager_sgd", FOREACH, SCALE, TWICE):
            gc.collect()
            self.attempt(name, lambda n=name: add(n))

    def figures(self, name: str) -> Row:
        """Return what the row of a variant says of its samples."""
        own = self.samples[name]
        others = {other: same for other, same in self.samples.items() if other != name}
        return {
            "iterations": self.iterations - 1,
            **Spread.of([one.seconds for one in own]).seconds(),
            "peak_bytes": self.peaks[name],
            "peak_over_sgd_bytes": self.peaks[name] - self.peaks[SCALE] if SCALE in self.peaks else None,
            "ratios": {other: ratio(own, same).rounded() for other, same in others.items()},
            **{f"{stage}_s": records.median([getattr(one, stage) for one in own]) for stage in STAGES},
        }


def describe(row: Row) -> str:
    """Return one line for the terminal."""
    head = f"{row['model']:9} batch {row['batch']:5} {row['variant']:18}"
    if row["failed"]:
        return f"{head} failed: {row['failed']}"
    stages = ", ".join(f"{stage} {1e3 * row[f'{stage}_s']:.2f}" for stage in STAGES)
    twice = row["ratios"].get(TWICE)
    return (
        f"{head}{1e3 * row['median_s']:9.2f} ms [{1e3 * row['p20_s']:.2f}, {1e3 * row['p80_s']:.2f}]  ({stages})"
        f"  peak {row['peak_bytes'] / 1e9:.2f} GB" + (f"  {twice['median']:.3f} of SGD twice" if twice else "")
    )


def run(options: argparse.Namespace, console: Console) -> list[Row]:
    """Measure every model at every batch size; append the rows of each when it ends, or is interrupted."""
    image = SMALL_IMAGE if options.smoke else IMAGE
    jobs = [Job(model, size, image, options.device) for size in options.batches for model in options.models]
    title = "{model} batch {batch}".format_map
    return rounds.run(options, jobs, lambda job: title(job.about), describe, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append."""
    options = parse_arguments(arguments)
    torch.backends.cudnn.benchmark = True
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = run(options, Console(highlight=False, soft_wrap=True))
    return 0 if any(not row["failed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
