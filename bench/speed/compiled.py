"""SAM as torch.compile would have it: the multi-tensor formulation, traced whole and fused by the compiler."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bench.speed.rivals import RHO, SGD_OPTIONS


class OutOfTime(BaseException):
    """Not an Exception: the compiler catches those and goes on another way."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread when the block takes longer."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _ascend(params: list[Tensor], grads: list[Tensor], backup: list[Tensor]) -> None:
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_copy_(backup, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, RHO / (norm + 1e-12)))


def _descend(params: list[Tensor], grads: list[Tensor], backup: list[Tensor], momenta: list[Tensor]) -> None:
    torch._foreach_copy_(params, backup)
    grads = torch._foreach_add(grads, params, alpha=SGD_OPTIONS["weight_decay"])
    torch._foreach_mul_(momenta, SGD_OPTIONS["momentum"])
    torch._foreach_add_(momenta, grads)
    torch._foreach_add_(params, momenta, alpha=-SGD_OPTIONS["lr"])


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, fullgraph=True, dynamic=False)


class CompiledSAM:
    """Two compiled functions, lasting backup. Where all is fused they move no more than FusedSAM.

    Each new list of shapes is compiled anew, at the first step.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        self.values = [p.detach() for p in self.params]
        self.backup = [torch.empty_like(v) for v in self.values]
        self.momenta = [torch.zeros_like(v) for v in self.values]

    def first_step(self, zero_grad: bool = False) -> None:
        """Displace every parameter by rho g / ||g||."""
        self._call(_ascend, zero_grad, self.backup)

    def second_step(self, zero_grad: bool = False) -> None:
        """Copy the old values back and step."""
        self._call(_descend, zero_grad, self.backup, self.momenta)

    @torch.no_grad()
    def _call(self, function: Callable[..., None], zero_grad: bool, *lists: Any) -> None:
        _compiled(function)(self.values, [p.grad for p in self.params], *lists)
        if zero_grad:
            for p in self.params:
                p.grad = None
