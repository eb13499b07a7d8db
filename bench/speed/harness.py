"""Interleaved measurement of the optimizer side of a SAM step.

Every variant lives in a process of its own, on parameters of its own. One round asks each of them once, in
an order drawn anew, while the others sleep; ratios are taken between times of the same round, so another
program slows both sides. Separate processes, because in a shared one a variant would build its temporaries
in heap that another one has just freed, and never meet the page faults that it causes in a training
program.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench import flags, records
from bench.records import Row, Spread, last_level_cache
from bench.speed.rivals import OURS, TwoPass, find
from bench.speed.shapes import Shape, parameter_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOOR = "floor"
FLOOR_COPIES = 5
GRADIENT_SCALE = 1e-2
WARM_UP_ROUNDS = 2
# A variant that rebinds its parameters alternates between two heap states, one with page faults: it costs
# the mean of two steps, while a median of single ones is either.
STEPS_PER_VISIT = 2
# torch._dynamo: the first optimizer of a process imports it.
PRELOAD = ["torch._dynamo", "fused_sam", "pytorch_optimizer", "bench.speed.harness"]


def parser(name: str, doc: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser of bench.speed.NAME with the options that all have; `rounds`: the default, 0 for one by set."""
    made = flags.parser(f"speed.{name}", doc.splitlines()[0])
    file = records.RESULTS / f"cpu_{name.partition('_')[0]}.jsonl"
    made.add_argument("--out", type=Path, default=file, help="file to append to")
    made.add_argument("--dry-run", action="store_true", help="write no rows")
    if rounds is not None:
        usual = f"default: {rounds or 'by set, fewer for large ones'}"
        made.add_argument("--rounds", type=int, default=rounds or None, help=usual)
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; refuse rounds that are none."""
    options = made.parse_args(arguments)
    if getattr(options, "rounds", None) is not None and options.rounds < 1:
        made.error("--rounds must be >= 1")
    return options


def progress_bar(progress: Progress, name: str, steps: int) -> Callable[[], None]:
    """Return what advances a new bar, and draws it: between rounds, not while one is timed."""
    bar = progress.add_task(name, total=steps)
    progress.refresh()

    def tick() -> None:
        progress.advance(bar)
        progress.refresh()

    return tick


def finish(rows: Sequence[Row], options: argparse.Namespace, console: Console, describe: Callable[[Row], str]) -> None:
    """Print the rows, and append them to the file."""
    for row in rows:
        console.print(describe(row))
    if not options.dry_run:
        records.write_rows(rows, options.out)


class Task(NamedTuple):
    """Says what one process measures: `repeats` steps a visit; the mean of all but the first fifth counts."""

    variant: str
    shapes: Sequence[Shape]
    dtype: torch.dtype
    repeats: int = STEPS_PER_VISIT


class Sample(NamedTuple):
    """Holds one step, or the mean of some: seconds of the two halves, and pages that the system had to hand out."""

    first_s: float
    second_s: float
    minor_faults: float

    @property
    def seconds(self) -> float:
        """Return those of the whole step."""
        return self.first_s + self.second_s


class Values:
    """Tensors cut from one block of random numbers: gradients cost little to make and no memory to keep."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, scale: float, device: str = "cpu") -> None:
        largest = max(parameter_count([shape]) for shape in shapes)
        block = torch.randn(largest, generator=torch.Generator().manual_seed(0)).mul_(scale).to(device, dtype)
        self.views = [block[: parameter_count([shape])].view(shape) for shape in shapes]

    def make(self, index: int) -> Tensor:
        """Return a fresh copy of the tensor for parameter `index`."""
        return self.views[index].clone()

    def make_all(self) -> list[Tensor]:
        """Return fresh copies of all tensors, in one operation: a device would wait for a loop of them."""
        return list(torch._foreach_mul(self.views, 1.0))


class Subject:
    """A variant with parameters of its own."""

    def __init__(self, build: Callable[[list[Tensor]], TwoPass], shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        weights = Values(shapes, dtype, 1.0)
        self.params = [weights.make(i).requires_grad_() for i in range(len(shapes))]
        self.grads = Values(shapes, dtype, GRADIENT_SCALE)
        self.optimizer = build(self.params)

    def assign_gradients(self) -> None:
        """Let autograd leave gradients as a backward pass leaves them, outside of the timed part.

        Fresh memory that has been written to, held by `p.grad` alone, the first layers last and so nearest in
        cache: the step pays for no first touch of a gradient, only for that of temporaries of its own. No Python
        object stands for a gradient until somebody reads `p.grad`; who does, pays for it in the timed part.
        """
        for i in reversed(range(len(self.params))):
            # Autograd copies what it is given, as others hold it, too.
            torch.autograd.backward(self.params[i], self.grads.views[i])

    def run(self) -> Sample:
        """Make one step; both halves end with zero_grad(), so they also free the gradients."""
        first_s, first_faults = self._half(self.optimizer.first_step)
        second_s, second_faults = self._half(self.optimizer.second_step)
        return Sample(first_s, second_s, first_faults + second_faults)

    def _half(self, step: Callable[[bool], None]) -> tuple[float, int]:
        self.assign_gradients()
        faults = _minor_faults()
        start = time.perf_counter()
        step(True)
        seconds = time.perf_counter() - start
        return seconds, _minor_faults() - faults


class Floor:
    """The bytes of FusedSAM's step through the fastest copy: per fp32 parameter 5 copies of 8 bytes."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
        self.source = torch.zeros(parameter_count(list(shapes)), dtype=dtype)
        self.target = torch.ones_like(self.source)
        self.copy = _stream_copy()

    def run(self) -> Sample:
        """Copy."""
        start = time.perf_counter()
        for _ in range(FLOOR_COPIES):
            self.copy(self.target, self.source)
        return Sample(0.0, time.perf_counter() - start, 0)


def _stream_copy() -> Callable[[Tensor, Tensor], Any]:
    try:
        from fused_sam import _native
    except ImportError:
        return lambda target, source: target.copy_(source)
    return lambda target, source: _native.stream_copy(target, source, torch.get_num_threads())


def _minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def has_floor(shapes: Sequence[Shape], dtype: torch.dtype) -> bool:
    """Return whether weights, gradients and momentum exceed the last-level cache; within it memory sets no floor."""
    return 3 * parameter_count(list(shapes)) * dtype.itemsize > last_level_cache()


class Worker:
    """A process that holds one variant and makes a step when asked."""

    def __init__(self, context: Any, task: Task) -> None:
        self.task = task
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, task), daemon=True)
        self.process.start()
        there.close()

    def ask(self, threads: int) -> Sample:
        """Return one step on that many threads."""
        self.pipe.send(threads)
        return self.answer()

    def answer(self) -> Any:
        """Return the sample asked for; None, once, when the process is ready."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.task.variant}: its process ended with {self.process.exitcode=}.") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, task: Task) -> None:
    try:
        torch.set_num_threads(1)
        subject = _subject(task)
        gc.collect()
        gc.disable()
        pipe.send(None)
        while True:
            torch.set_num_threads(pipe.recv())
            visit = [subject.run() for _ in range(task.repeats)]
            pipe.send(_mean(visit[task.repeats // 5 :]))
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{task.variant}: {type(error).__name__}: {error}"))


def measure(
    tasks: Sequence[Task], rounds: int, threads: Sequence[int], tick: Callable[[], None] = lambda: None
) -> dict[int, dict[str, list[Sample]]]:
    """Return samples of every variant by thread count, the i-th of each from the same round.

    `tick` is called after every round, the warm-up's included.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    shuffle = random.Random(0).shuffle
    samples = {count: {task.variant: list[Sample]() for task in tasks} for count in threads}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(contextlib.closing(Worker(context, task))) for task in tasks]
        for worker in workers:
            worker.answer()
        for number in range(-WARM_UP_ROUNDS, rounds):
            for count in threads:
                shuffle(workers)
                for worker in workers:
                    sample = worker.ask(count)
                    if number >= 0:
                        samples[count][worker.task.variant].append(sample)
            tick()
    return samples


def _subject(task: Task) -> Subject | Floor:
    if task.variant == FLOOR:
        return Floor(task.shapes, task.dtype)
    return Subject(find(task.variant).build, task.shapes, task.dtype)


def _mean(samples: list[Sample]) -> Sample:
    return Sample(*(statistics.fmean(values) for values in zip(*samples, strict=True)))


def ratio(slow: Sequence[Sample], fast: Sequence[Sample]) -> Spread:
    """Return how many times as long `slow` took as `fast`, round by round."""
    return Spread.of([a.seconds / b.seconds for a, b in zip(slow, fast, strict=True)])


def ratios_to_rivals(samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    """Return how many times as long as FusedSAM each of the others took."""
    if OURS not in samples:
        return {}
    others = (name for name in samples if name not in (OURS, FLOOR))
    return {name: ratio(samples[name], samples[OURS]).rounded() for name in others}
