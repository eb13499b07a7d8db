"""What every training run has: its rate, its losses, its clock, its bar."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fused_sam import backends


def check(values: Any, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise ValueError for the first attribute of these, besides None, for which the rule does not hold."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not holds(value):
            raise ValueError(f"Invalid {name}={value!r}. Must be {rule}.")


def chosen_device(name: str) -> str:
    """Return the device that "auto" stands for, and any other as it is."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def chosen_backend(name: str | None, device: str) -> str:
    """Return the name of the backend that FusedSAM uses."""
    return backends.chosen(torch.device(device).type, backends.requested(name))


def complain(error: BaseException, who: str = "") -> int:
    """Print what cannot work, and return the exit status for it."""
    text = f"{who}{type(error).__name__}: {error}"
    Console(highlight=False, markup=False).print(text, style="red", soft_wrap=True)
    return 1


def bar(console: Console, disable: bool = False) -> Progress:
    """Return bars with a status and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=disable)


def cosine(progress: float) -> float:
    """Return the learning rate's factor after this part of a run, from 1 to 0: (1 + cos(pi * progress)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def mean_of_finite(losses: Sequence[float], epoch: int, first: int = 1) -> float:
    """Return the mean of the losses of an epoch from the step `first` on; refuse one that is not finite."""
    for step, loss in enumerate(losses, start=first):
        if not math.isfinite(loss):
            where = f"step {step} of epoch {epoch}"
            raise FloatingPointError(f"Training stopped: loss is {loss} in {where}. Lower --lr or --rho.")
    return statistics.fmean(losses)


class StepClock:
    """Measures milliseconds that a training step spends in the model and in the optimizer; never waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time one part of the running step."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def read(self, steps: int) -> dict[str, list[float]]:
        """Return milliseconds per part and step since the last call, `steps` equal steps ago."""
        if self._cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for position, (name, start, stop) in enumerate(self._spans):
            elapsed = start.elapsed_time(stop) if self._cuda else 1e3 * (stop - start)
            times.setdefault(name, [0.0] * steps)[position * steps // len(self._spans)] += elapsed
        self._spans.clear()
        return times
