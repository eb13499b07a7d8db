"""pytest-benchmark entries for each op on ResNet-50's shapes and the halves of a step: pytest bench --benchmark-only

Ops of every working backend of fused_sam.ops, and the same arithmetic as a loop over the parameters ("loop"). For
profiling and for comparing two states of the code; the published ratios come from `python -m bench.speed.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.speed import rivals
from bench.speed.harness import GRADIENT_SCALE, Subject, Values
from bench.speed.rivals import RHO, SGD_OPTIONS
from bench.speed.shapes import SETS
from fused_sam import backends, ops

ROUNDS = 8
SHAPES = SETS["resnet50"]()
LOOP = "loop"
BACKENDS = [name for name, state in backends.available("cpu").items() if state == "ok"]
ASCENT = [ops.AscentGroup(size=len(SHAPES), rho=RHO, adaptive=False)]
DESCENT = [ops.SGDGroup(size=len(SHAPES), **SGD_OPTIONS, dampening=0.0, nesterov=False, maximize=False, first=False)]


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count}T")
def thread_count(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run torch, and FusedSAM with it, on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Lists:
    """What the ops take: [161] tensors each."""

    def __init__(self) -> None:
        self.params, self.backups, self.momentum = (self._make(1.0) for _ in range(3))
        self.grads = self._make(GRADIENT_SCALE)

    @staticmethod
    def _make(scale: float) -> list[Tensor]:
        values = Values(SHAPES, torch.float32, scale)
        return [values.make(i) for i in range(len(SHAPES))]


def loop_norm(t: Lists) -> Tensor:
    return torch.stack([(1.0 * g).norm(p=2) for g in t.grads]).norm(p=2)


def loop_perturb(t: Lists, norm: Tensor) -> None:
    scale = RHO / (norm + 1e-12)
    for i, (p, g) in enumerate(zip(t.params, t.grads, strict=True)):
        t.backups[i] = p.clone()
        p.add_(1.0 * g * scale.to(p))


def loop_sgd_update(t: Lists) -> None:
    for p, g, w, m in zip(t.params, t.grads, t.backups, t.momentum, strict=True):
        p.data = w
        d = g.add(p, alpha=SGD_OPTIONS["weight_decay"])
        m.mul_(SGD_OPTIONS["momentum"]).add_(d)
        p.add_(m, alpha=-SGD_OPTIONS["lr"])


def calls(t: Lists, backend: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by op."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(t.grads))).double()
    if backend == LOOP:
        single = norm.float()
        return {
            "norm": lambda: loop_norm(t),
            "perturb": lambda: loop_perturb(t, single),
            "sgd_update": lambda: loop_sgd_update(t),
        }
    return {
        "norm": lambda: ops.norm(t.params, t.grads, ASCENT, backend=backend),
        "perturb": lambda: ops.perturb(t.params, t.grads, t.backups, norm, ASCENT, backend=backend),
        "sgd_update": lambda: ops.sgd_update(t.params, t.grads, t.backups, t.momentum, DESCENT, backend=backend),
    }


@pytest.mark.parametrize("op", ["norm", "perturb", "sgd_update"])
@pytest.mark.parametrize("backend", [*BACKENDS, LOOP])
@torch.no_grad()
def test_op(benchmark: BenchmarkFixture, backend: str, op: str, thread_count: int) -> None:
    benchmark.group = f"{op} {thread_count}T"
    benchmark.pedantic(calls(Lists(), backend)[op], rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.parametrize("half", ["first_step", "second_step"])
@pytest.mark.parametrize("set_name", ["resnet50", "resnet20"])
@pytest.mark.parametrize("name", rivals.available(torch.float32))
def test_step(benchmark: BenchmarkFixture, name: str, set_name: str, half: str, thread_count: int) -> None:
    benchmark.group = f"{half} {set_name} {thread_count}T"
    subject = Subject(rivals.VARIANTS[name].build, SETS[set_name](), torch.float32)
    steps = [subject.optimizer.first_step, subject.optimizer.second_step]
    timed = 0 if half == "first_step" else 1

    def before() -> tuple[tuple[bool], dict[str, bool]]:
        for step in steps[:timed]:
            subject.assign_gradients()
            step(True)
        subject.assign_gradients()
        return (True,), {}

    def after(zero_grad: bool) -> None:
        for step in steps[timed + 1 :]:
            subject.assign_gradients()
            step(zero_grad)

    benchmark.pedantic(steps[timed], setup=before, teardown=after, rounds=ROUNDS, warmup_rounds=1)
