"""What is timed on a device: a variant with parameters of its own, step by step or replayed from a CUDA graph.

A step on a small set would find everything in the L2 cache, which a training program fills with activations
meanwhile. So a subject holds as many copies of the set as exceed that cache and takes all of their first halves
before all of their second ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.timing import Counts, counted, synchronize, timed
from bench.speed import rivals
from bench.speed.harness import FLOOR_COPIES, GRADIENT_SCALE, Values
from bench.speed.rivals import SGD_OPTIONS, EagerSAM, PlainSGD, TwoPass
from bench.speed.shapes import Shape, parameter_count

Build = Callable[[list[Tensor]], TwoPass]
# For every copy the gradients of the first pass and of the second.
Passes = Sequence[tuple[list[Tensor], list[Tensor]]]
L2_MULTIPLE = 3
WARM_UP_STEPS = 3
CHECKED_REPLAYS = 2


class Sample(NamedTuple):
    """A step, the mean over the copies: seconds on the device of both halves, and of the host until they returned.

    A graph's halves are not told apart.
    """

    seconds: float
    host_s: float
    first_s: float | None = None
    second_s: float | None = None


def copies_for(shapes: Sequence[Shape], dtype: torch.dtype, l2_bytes: int) -> int:
    """Return how many copies of weights, gradients, momentum and backup exceed the cache by a factor of L2_MULTIPLE."""
    working = 4 * parameter_count(list(shapes)) * dtype.itemsize
    return math.ceil(L2_MULTIPLE * l2_bytes / working) or 1


class Member:
    """One copy: parameters and their optimizer."""

    def __init__(self, build: Build, weights: list[Tensor]) -> None:
        self.params = [w.requires_grad_() for w in weights]
        self.optimizer = build(self.params)

    def assign(self, grads: list[Tensor]) -> None:
        """Hand over gradients; the list is emptied, so that `p.grad` alone holds them, as after backward."""
        for p in reversed(self.params):
            p.grad = grads.pop()


class StepSubject:
    """Called from Python, step by step. The device is idle before each half: what the host takes is not hidden."""

    def __init__(self, build: Build, shapes: Sequence[Shape], dtype: torch.dtype, device: str, copies: int) -> None:
        weights = Values(shapes, dtype, 1.0, device)
        self.device = device
        self.grads = Values(shapes, dtype, GRADIENT_SCALE, device)
        self.members = [Member(build, weights.make_all()) for _ in range(copies)]

    def warm_up(self) -> None:
        """Do what only first steps do: momentum buffers, compilation, plans."""
        self.visit()

    def visit(self) -> Sample:
        """Make one step of every copy; gradients are written to fresh memory before the clock starts."""
        halves = []
        for second in (False, True):
            device_s = host_s = 0.0
            for member in self.members:
                member.assign(self.grads.make_all())
                optimizer = member.optimizer
                half = optimizer.second_step if second else optimizer.first_step
                time = timed(functools.partial(half, zero_grad=True), self.device)
                device_s += time.device_s / len(self.members)
                host_s += time.host_s / len(self.members)
            halves.append((device_s, host_s))
        (first_s, first_host_s), (second_s, second_host_s) = halves
        return Sample(first_s + second_s, first_host_s + second_host_s, first_s, second_s)

    def count(self) -> Counts:
        """Count launches and waits of one step; the gradients of its second half are made before."""
        member = self.members[0]
        member.assign(self.grads.make_all())
        later = self.grads.make_all()

        def step() -> None:
            member.optimizer.first_step(zero_grad=True)
            member.assign(later)
            member.optimizer.second_step(zero_grad=True)

        return counted(step)


def static_gradients(shapes: Sequence[Shape], dtype: torch.dtype, device: str, copies: int) -> Passes:
    """Return gradients of both passes for every copy at addresses that stay, as a graph wants them.

    They are only read, so all variants of a round may share them: each finds them in memory, after the others' work.
    """
    values = Values(shapes, dtype, GRADIENT_SCALE, device)
    return [(values.make_all(), values.make_all()) for _ in range(copies)]


class GraphSubject:
    """Both halves of a step of all copies in one CUDA graph.

    Gradients stay (`zero_grad=False`), so their memory cannot hold the old weights: every variant keeps
    those in memory of its own, at as many bytes.
    """

    def __init__(self, build: Build, weights: Sequence[list[Tensor]], gradients: Passes, device: str) -> None:
        self.device = device
        self.gradients = gradients
        self.members = [Member(build, one) for one in weights]
        self.replay: Callable[[], None] = self.steps

    def steps(self) -> None:
        """Do what is captured: first halves of all copies, then second ones."""
        for member, (first, _) in zip(self.members, self.gradients, strict=True):
            member.assign(list(first))
            member.optimizer.first_step(zero_grad=False)
        for member, (_, second) in zip(self.members, self.gradients, strict=True):
            member.assign(list(second))
            member.optimizer.second_step(zero_grad=False)

    def warm_up(self) -> None:
        """Make steps on a stream of their own, as torch asks before a capture; then the capture, which runs nothing."""
        if self.device != "cuda":
            raise RuntimeError("a CUDA graph needs a CUDA device")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.steps()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.steps()
        self.replay = graph.replay
        self.replay()

    def visit(self) -> Sample:
        """Make one replay; return its times by the number of copies."""
        time = timed(self.replay, self.device)
        return Sample(time.device_s / len(self.members), time.host_s / len(self.members))

    def count(self) -> Counts:
        """Count those of one copy's share of a replay."""
        return Counts(*(count // len(self.members) for count in counted(self.replay)))


class Floor:
    """As many bytes as FusedSAM moves, through torch's copy: per fp32 parameter 5 copies of 8 bytes.

    Over all copies of the set at once, so that neither the cache nor the launch of a small copy counts.
    """

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: str, copies: int) -> None:
        self.device = device
        self.copies = copies
        self.source = torch.ones(copies * parameter_count(list(shapes)), dtype=dtype, device=device)
        self.target = torch.empty_like(self.source)

    @property
    def moved_bytes(self) -> int:
        """Read and written, for one copy of the set."""
        return FLOOR_COPIES * 2 * self.source.nbytes // self.copies

    def warm_up(self) -> None:
        """Make the first copy."""
        self.visit()

    def visit(self) -> Sample:
        """Copy."""
        time = timed(self._copy, self.device)
        return Sample(time.device_s / self.copies, time.host_s / self.copies)

    def count(self) -> Counts | None:
        """Return None: how a copy is made is not asked for."""
        return None

    def _copy(self) -> None:
        for _ in range(FLOOR_COPIES):
            self.target.copy_(self.source)


def graph_computes_the_step(build: Build, dtype: torch.dtype, device: str, alone: bool) -> bool:
    """Return whether replays go on from one another, as eager steps in float64 do. `alone`: SGD without SAM."""
    weights, first, second = rivals.small_problem(dtype)
    gradients = [([g.to(device) for g in first], [g.to(device) for g in second])]
    subject = GraphSubject(build, [[w.to(device, copy=True) for w in weights]], gradients, device)
    subject.warm_up()
    for _ in range(CHECKED_REPLAYS):
        subject.replay()
    synchronize(device)
    steps = WARM_UP_STEPS + 1 + CHECKED_REPLAYS
    return is_after(subject.members[0].params, steps, dtype, alone)


def is_after(params: Sequence[Tensor], steps: int, dtype: torch.dtype, alone: bool = False) -> bool:
    """Return whether the small problem's weights are where so many steps in float64 take them."""
    weights, first, second = ([x.double() for x in tensors] for tensors in rivals.small_problem(dtype))
    oracle = functools.partial(PlainSGD if alone else EagerSAM, **SGD_OPTIONS)
    exact = GraphSubject(oracle, [weights], [(first, second)], "cpu")
    for _ in range(steps):
        exact.steps()
    got = [p.detach().cpu().double() for p in params]
    expected = [p.detach() for p in exact.members[0].params]
    return rivals.agree(got, expected, 16 * steps * torch.finfo(dtype).eps)
