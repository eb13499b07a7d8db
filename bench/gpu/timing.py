"""Clocks and counters of a device: events, host time, launches, synchronisations."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

LABEL = "measured"
SYNCHRONISING = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
MEMORY_OPERATIONS = ("Memcpy", "Memset")


def collect(device: str) -> None:
    """Give back what is no longer held: parameters, graphs, the allocator's cache."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Timed(NamedTuple):
    """Seconds until the device was done, and until the host was."""

    device_s: float
    host_s: float


class Counts(NamedTuple):
    """What a call made the device do: kernels, copies and fills, and how often the host waited for it."""

    launches: int
    memory_operations: int
    syncs: int


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> Timed:
    """Time one call that finds the device idle. On the CPU both times are the same."""
    synchronize(device)
    if device != "cuda":
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return Timed(seconds, seconds)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = time.perf_counter()
    call()
    host_s = time.perf_counter() - start
    end.record()
    end.synchronize()
    return Timed(begin.elapsed_time(end) / 1e3, host_s)


def counted(call: Callable[[], Any]) -> Counts:
    """Count what one call launches on the CUDA device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function(LABEL):
            call()
        torch.cuda.synchronize()
    return tally(recorded.profiler.kineto_results.events())


def tally(events: Sequence[Any]) -> Counts:
    """Count the profiler's events; those of the host only within the label, as the profiler waits by itself."""
    label = next(e for e in events if e.name() == LABEL and e.device_type() == DeviceType.CPU)
    begin, end = label.start_ns(), label.start_ns() + label.duration_ns()
    launches = memory_operations = syncs = 0
    for event in events:
        if event.device_type() == DeviceType.CUDA:
            # The label and torch's own marks appear on the device's time line as well.
            if event.is_user_annotation() or event.name() == LABEL:
                continue
            if event.name().startswith(MEMORY_OPERATIONS):
                memory_operations += 1
            else:
                launches += 1
        elif begin <= event.start_ns() < end and event.name() in SYNCHRONISING:
            syncs += 1
    return Counts(launches, memory_operations, syncs)


def counter_works() -> bool:
    """Return whether the profiler sees the one kernel of an addition and the one wait of a read."""
    x = torch.ones((), device="cuda")
    counted(lambda: x.add_(1))  # the first profile of a process may miss what happens as it starts
    return counted(lambda: x.add_(1)) == Counts(1, 0, 0) and counted(x.item).syncs >= 1
