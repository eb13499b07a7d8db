"""What every training run has: its rate, its losses, its clock."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from fused_sam import backends


def chosen_backend(name: str | None, device: str) -> str:
    """The name of the backend that FusedSAM uses."""
    module = backends.for_device(torch.device(device).type, backends.requested(name))
    return module.__name__.rpartition(".")[2]


def cosine(progress: float) -> float:
    """The learning rate's factor after this part of a run, from 1 to 0: (1 + cos(pi * progress)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def mean_of_finite(losses: list[float], where: str) -> float:
    """The mean of the losses of the steps of `where`."""
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"Training stopped: loss is {loss} in step {step} of {where}. Lower --lr or --rho."
            )
    return statistics.fmean(losses)


class StepClock:
    """Milliseconds a training step spends in the model and in the optimizer; never waits for a GPU."""

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
        """Milliseconds per part and step since the last call, `steps` equal steps ago."""
        if self._cuda:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for position, (name, start, stop) in enumerate(self._spans):
            elapsed = start.elapsed_time(stop) if self._cuda else 1e3 * (stop - start)
            times.setdefault(name, [0.0] * steps)[position * steps // len(self._spans)] += elapsed
        self._spans.clear()
        return times
