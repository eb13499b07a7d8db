"""The rivals are what they are said to be: the same step, in as many operations as the benchmarks quote."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import tables
from bench.speed import rivals
from bench.speed.step import moved_bytes

COUNT = 5  # parameters


@pytest.mark.parametrize("name", rivals.available(torch.float32))
def test_every_variant_makes_the_same_step(name):
    assert rivals.check(name, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_notices_a_missing_displacement(monkeypatch, dtype):
    def build(params):
        return rivals.PlainSGD(params, **rivals.SGD_OPTIONS)

    monkeypatch.setitem(rivals.VARIANTS, "eager_sgd", rivals.Variant("SGD", build, 0))
    assert not rivals.check("eager_sgd", dtype)


def test_eager_step_is_the_formula():
    """Foret et al. 2021, eq. 2 and Algorithm 1, first step without momentum's past."""
    torch.manual_seed(0)
    w, g, g_at_displaced = torch.randn(3, 7, dtype=torch.float64)
    p = w.clone().requires_grad_()
    optimizer = rivals.EagerSAM([p], rho=0.5, lr=0.1)
    p.grad = g.clone()
    optimizer.first_step(zero_grad=True)
    torch.testing.assert_close(p.detach(), w + 0.5 * g / g.norm())
    p.grad = g_at_displaced.clone()
    optimizer.second_step(zero_grad=True)
    torch.testing.assert_close(p.detach(), w - 0.1 * g_at_displaced)


class Counter(TorchDispatchMode):
    """Counts the operations that would launch a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function not in (
            torch.ops.aten.detach.default,
            torch.ops.profiler._record_function_enter_new.default,
        )
        return function(*args, **(kwargs or {}))


def test_eager_ascent_makes_six_operations_per_tensor_and_five():
    params = [torch.randn(4).requires_grad_() for _ in range(COUNT)]
    for p in params:
        p.grad = torch.randn(4)
    optimizer = rivals.EagerSAM(params, **rivals.SGD_OPTIONS)
    with Counter() as counter:
        optimizer.first_step()
    assert counter.count == 6 * COUNT + 5


def test_the_table_of_options_names_each_with_its_bytes():
    spread = {"median": 0.9, "p20": 0.8, "p80": 1.0}
    rows = [
        {"kind": "options", "variant": name, "median_s": 0.02, "p20_s": 0.02, "p80_s": 0.02}
        | {"set": "resnet50", "bytes": moved_bytes(name, "resnet50", "fp32")}
        | {"ratio_to_floor": spread, "machine": {}, "versions": {}, "date": "2026-01-01"}
        for name in (*rivals.OPTIONS, rivals.OURS)
    ]
    lines = tables.options(rows).splitlines()
    assert lines[2].startswith("| FusedSAM | 40 |")
    for start in ("| ASAM | 44 |", "| p = inf | 36 |", "| AdamW | 52 |", "| MSAM | 40 |"):
        (line,) = [line for line in lines if line.startswith(start)]
        assert "20 (20 to 20)" in line
        assert line.endswith("| 90% |")
