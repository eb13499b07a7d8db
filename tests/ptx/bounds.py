"""Tells the emulator which memory an op may touch: that of its tensors, to the byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ptx.emulator import Emulator
from torch import Tensor

Span = tuple[int, int]  # address and bytes


def span(tensor: Tensor) -> Span:
    """Return the memory that a tensor's elements lie in, whatever its strides."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def spans(*what: Any) -> Iterator[Span]:
    """Yield the memory of all tensors in lists and tuples."""
    for one in what:
        if isinstance(one, Tensor):
            with contextlib.suppress(RuntimeError):  # without memory: the ops refuse it
                yield span(one)
        elif isinstance(one, (list, tuple)):
            yield from spans(*one)


def watch(emulator: Emulator) -> None:
    """Make every op of the native backend's CUDA kernels say what it may touch, for this process."""
    from fused_sam.backends import native

    make, set_backups, run = native.Batch.__init__, native.Batch.set_backups, native.Batch._run

    def init(
        self: Any, for_cuda: bool, params: Any, grads: Any, backups: Any, *states: Any, masters: Any = None
    ) -> None:
        make(self, for_cuda, params, grads, backups, *states, masters=masters)
        # Addresses, not tensors: the core asks whether a gradient has another owner.
        self.spans = list(spans(backups, states, masters)) if for_cuda else []
        self.grads = list(spans(grads)) if for_cuda else []

    def with_backups(self: Any, backups: Any) -> None:
        set_backups(self, backups)
        self.spans += spans(backups)

    def within_bounds(self: Any, op: Callable[..., None], ascent: Any, *first: Any, last: tuple[Any, ...] = ()) -> None:
        library = emulator.library
        library.emulator_forget()
        for batch in filter(None, (self, ascent, self.ascent)):
            for address, size in [*batch.spans, *batch.grads, *spans(batch.params, batch.core.memory)]:
                library.emulator_register(address, size)
        for address, size in spans(*first):
            library.emulator_register(address, size)
        library.emulator_check_bounds(self.for_cuda)
        try:
            run(self, op, ascent, *first, last=last)
        finally:
            library.emulator_check_bounds(False)
            if op.__name__ == "perturb":
                self.grads = []  # which it lets go, but for those that are its backups, in core.memory

    native.Batch.__init__, native.Batch.set_backups, native.Batch._run = init, with_backups, within_bounds
