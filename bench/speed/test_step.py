"""pytest-benchmark entry for the two halves of a step: pytest bench --benchmark-only

For profiling and for comparing two states of the code; the published ratios come from `python -m bench.speed.step`.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.speed import rivals
from bench.speed.harness import Subject
from bench.speed.shapes import SETS

ROUNDS = 8


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
