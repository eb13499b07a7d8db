"""Tells the emulator which memory an op may touch: that of its tensors, to the byte."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
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


def has_entries(one: Any) -> bool:
    """Return whether this is a list or tuple, or the core's `Gradients`."""
    from fused_sam.ops.lists import is_list  # not before the core is that on the emulator

    return isinstance(one, tuple) or is_list(one)


def spans(*what: Any) -> Iterator[Span]:
    """Yield the memory of all tensors in lists and tuples."""
    for one in what:
        if isinstance(one, Tensor):
            with contextlib.suppress(RuntimeError, ValueError):  # without memory: the ops refuse it
                yield span(one)
        elif has_entries(one):
            yield from spans(*one)


def register(emulator: Emulator, what: Iterable[Span]) -> None:
    """Let kernels touch this memory."""
    for address, size in what:
        emulator.library.emulator_register(address, size)


def watch_native(emulator: Emulator) -> None:
    """Watch the CUDA kernels, whose ops are all run in one place."""
    from fused_sam.backends import native

    watch(emulator, native.Batch, "core", ("_run",))


def watch_triton(emulator: Emulator) -> None:
    """Watch Triton's kernels. What is passed to a launch is registered by the driver."""
    from fused_sam.backends import triton

    ops = ("norm", "perturb", "restore", "restore_accumulate", "sgd_update", "adam_update")
    watch(emulator, triton.Batch, "operands", ops)
    readable = triton.tables.readable

    def registered(value: Any) -> Any:
        """Return what is read of a rate or radius, which may be a copy, and only whose address is sent."""
        read = readable(value)
        register(emulator, spans(read))
        return read

    triton.tables.readable = registered


def watch(emulator: Emulator, batch: type, core: str, runs: tuple[str, ...]) -> None:
    """Check bounds in a batch's methods that launch kernels, for this process. ``core``: its attribute of the core."""
    make, set_backups = batch.__init__, batch.set_backups

    @functools.wraps(make)
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        lists = [one for one in (*arguments, *named.values()) if has_entries(one)]
        # Addresses, not tensors: the core asks whether a gradient has another owner.
        self.params_and_grads, self.spans = list(spans(*lists[:2])), list(spans(*lists[2:]))
        self.moved_by = next((one for one in arguments if isinstance(one, batch)), None)

    def with_backups(self: Any, backups: Any) -> None:
        set_backups(self, backups)
        self.spans += spans(backups)

    def checked(name: str) -> Any:
        run = getattr(batch, name)

        @functools.wraps(run)
        def within_bounds(self: Any, *arguments: Any, **named: Any) -> Any:
            emulator.library.emulator_forget()
            others = [one for one in arguments if isinstance(one, batch)]
            for one in filter(None, (self, self.moved_by, *others)):
                register(emulator, one.params_and_grads + one.spans)
                register(emulator, spans(one.params, getattr(one, core).memory))
            register(emulator, spans(*arguments, *named.values()))
            emulator.library.emulator_check_bounds(getattr(self, "for_gpu", True))
            try:
                return run(self, *arguments, **named)
            finally:
                emulator.library.emulator_check_bounds(False)
                if "perturb" in (name, getattr(next(iter(arguments), None), "__name__", "")):
                    # It lets its gradients go, but for those that are its backups, which the core's memory names.
                    self.params_and_grads = []

        return within_bounds

    batch.__init__, batch.set_backups = init, with_backups
    for name in runs:
        setattr(batch, name, checked(name))
