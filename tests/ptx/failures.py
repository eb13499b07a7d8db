"""Launches that fail: said by the call that made them, and nothing is left displaced.

Run by test_ptx.py with the plugin, as launches.py is.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import snapshot
from ptx.plugin import EMULATOR

from fused_sam import FusedSAM

# Several launches an op, as a driver before CUDA 12.1 takes it; the last ones hold w in their gradients.
SIZES = [1 + k % 5 for k in range(250)] + [3000] * 3


@pytest.fixture(autouse=True)
def _many_launches_and_then_as_before() -> Iterator[None]:
    EMULATOR.library.emulator_set_driver(12000)
    yield
    EMULATOR.fail_after(-1)
    EMULATOR.library.emulator_set_driver(13000)


def optimizer_of(params: list[torch.Tensor]) -> FusedSAM:
    return FusedSAM(params, rho=0.3, lr=0.1, momentum=0.9, weight_decay=0.01, backend="emulated")


def with_gradients(seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    params = [torch.randn(n, requires_grad=True) for n in SIZES]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("good", range(8))
def test_an_ascent_that_fails_in_any_launch_displaces_nothing(good: int, zero_grad: bool) -> None:
    """Four launches are the norm's and three perturb's, so that seven good ones are all."""
    params = with_gradients(0)
    optimizer, before = optimizer_of(params), snapshot(params)
    gradients = snapshot([p.grad for p in params])
    EMULATOR.fail_after(good)
    if good == 7:
        optimizer.first_step(zero_grad)
        assert optimizer.perturbed
        return
    with pytest.raises(RuntimeError, match="CUDA error"):
        optimizer.first_step(zero_grad)
    assert snapshot(params) == before
    assert not optimizer.perturbed
    if not zero_grad or good <= 4:  # else some gradients have held w
        assert snapshot([p.grad for p in params]) == gradients
    # The step after it is that of an optimizer to which nothing has happened.
    stepped = []
    for params_, optimizer_ in ((params, optimizer), ((fresh := with_gradients(0)), optimizer_of(fresh))):
        for half in (optimizer_.first_step, optimizer_.second_step):
            for k, p in enumerate(params_):
                p.grad = torch.full_like(p, 0.01 * (k % 13) - 0.05)
            half(zero_grad=True)
        stepped.append(snapshot(params_))
    assert stepped[0] == stepped[1]


@pytest.mark.parametrize("good", range(3))
def test_weights_are_back_at_w_where_an_update_fails(good: int) -> None:
    params = with_gradients(1)
    optimizer, before = optimizer_of(params), snapshot(params)
    optimizer.first_step(zero_grad=True)
    for p in params:
        p.grad = torch.randn_like(p)
    EMULATOR.fail_after(good)
    with pytest.raises(RuntimeError, match="CUDA error"):
        optimizer.second_step()
    assert snapshot(params) == before
    assert not optimizer.perturbed
