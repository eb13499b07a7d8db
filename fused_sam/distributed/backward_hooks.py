"""Gradients averaged while backward still makes others, for a model that is not in a DistributedDataParallel."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Variable

from fused_sam.distributed.buckets import Mean


class Averaging(Protocol):
    """Which collective averages, and what of the mean a rank gets."""

    def begin(self, params: list[Tensor]) -> Mean:
        """Begin to average the gradients of those parameters that take one now."""

    def reset(self) -> None:
        """Prepare for the next step."""


class BackwardHooks:
    """Sends a bucket as soon as backward has made its last gradient, and waits for all of them when backward ends.

    So ``p.grad`` is the mean after every backward, as with DistributedDataParallel. Several backwards before a step may
    each be averaged: the mean of (a mean + what is new here) is the mean of both. `skipped` saves all but the last.

    Args:
        params: of which gradients are averaged.
        averaging: how.
        wanted: whether a backward that runs now is to be averaged.
    """

    def __init__(self, params: list[Tensor], averaging: Averaging, wanted: Callable[[], bool]) -> None:
        self._averaging = averaging
        self._wanted = wanted
        self._params: list[Tensor] = []
        self._hooks: list[Any] = []
        self._skipping = 0
        self._mean: Mean | None = None
        self._place: dict[Tensor, int] = {}  # the bucket of each parameter
        self._left: list[int] = []  # gradients that each bucket lacks
        # Whether there may be a gradient of this rank alone. A rank whose backward made none must take part, too.
        self.pending = True
        self.watch(params)

    def watch(self, params: list[Tensor]) -> None:
        """Add parameters."""
        self._params += params
        hook = _weak(self._on_grad)
        self._hooks += [p.register_post_accumulate_grad_hook(hook) for p in params if p.requires_grad]

    @contextlib.contextmanager
    def skipped(self) -> Iterator[None]:
        """Keep backwards inside the block from being averaged."""
        self._skipping += 1
        try:
            yield
        finally:
            self._skipping -= 1

    def finish(self) -> None:
        """Average what there is, and wait for it."""
        mean, self._mean = self._mean or self._begun(), None
        mean.finish()
        self.pending = False

    def abandon(self) -> None:
        """Forget what a failed backward has sent: its gradients are thrown away."""
        self._mean = None

    def reset(self) -> None:
        """Prepare for the next step, whose gradients are new."""
        self.abandon()
        self.pending = True
        self._averaging.reset()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _on_grad(self, param: Tensor) -> None:
        self.pending = True
        if self._skipping or not self._wanted():
            return
        if self._mean is None:
            self._mean = self._begun()
            Variable._execution_engine.queue_callback(self.finish)
        place = self._place.get(param)
        if place is None:  # frozen since its forward
            return
        if place < self._mean.sent:
            raise RuntimeError(
                f"Invalid second gradient of a parameter (shape {list(param.shape)}) in one backward: the first has "
                "been sent. Checkpointing of shared layers needs use_reentrant=False, or no_sync() around it."
            )
        self._left[place] -= 1
        while self._mean.sent < len(self._left) and self._left[self._mean.sent] <= 0:
            self._mean.send()

    def _begun(self) -> Mean:
        mean = self._averaging.begin(self._params)
        self._place = {p: i for i, bucket in enumerate(mean.buckets) for p in bucket.params if p.requires_grad}
        self._left = [0] * len(mean.buckets)
        for place in self._place.values():
            self._left[place] += 1
        return mean


def _weak(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a hook that keeps nothing alive: the collector does not see through those of a parameter."""
    reference = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        if (target := reference()) is not None:
            target(param)

    return hook
