"""Loops that do not train, or train plainly, without an error: each is warned of once, and scaled steps are refused."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HYPER, RHO, assert_same_bits, leaves, quadratic, snapshot
from torch import Tensor

from fused_sam import FusedSAM


def nothing(params: list[Tensor], opt: FusedSAM) -> None:
    opt.first_step(zero_grad=True)
    quadratic(params)()
    opt.step()
    opt.zero_grad()


def nothing_at_the_second_pass(params: list[Tensor], opt: FusedSAM) -> None:
    quadratic(params)()
    opt.first_step(zero_grad=True)
    opt.step()


def a_closure_without_backward(params: list[Tensor], opt: FusedSAM) -> None:
    opt.step(lambda: torch.tensor(0.7))


def a_sum(params: list[Tensor], opt: FusedSAM) -> None:
    for half in (opt.first_step, opt.step):
        quadratic(params)()
        half()
    opt.zero_grad()


def a_clipped_sum(params: list[Tensor], opt: FusedSAM) -> None:
    quadratic(params)()
    opt.first_step()
    quadratic(params)()
    torch.nn.utils.clip_grad_norm_(params, 0.1)
    opt.step()
    opt.zero_grad()


def a_sum_over_micro_batches(params: list[Tensor], opt: FusedSAM) -> None:
    for half in (opt.first_step, opt.step):
        for _ in range(3):
            quadratic(params)()
        half()
    opt.zero_grad()


SCALER = torch.amp.GradScaler("cpu")


def a_scaled_closure(params: list[Tensor], opt: FusedSAM) -> None:
    opt.step(lambda: SCALER.scale(sum((p * p).sum() for p in params)).backward())


class Trainer:
    def __init__(self, params: list[Tensor]) -> None:
        self.params, self.scaler = params, torch.amp.GradScaler("cpu")

    def closure(self, weight: float) -> None:
        self.scaler.scale(weight * sum((p * p).sum() for p in self.params)).backward()


def a_method_that_scales(params: list[Tensor], opt: FusedSAM) -> None:
    opt.step([functools.partial(Trainer(params).closure, 0.3)])


MISTAKES = {
    nothing: "No parameter has a gradient at first_step",
    nothing_at_the_second_pass: "No parameter has a gradient at w + e",
    a_closure_without_backward: "No parameter has a gradient at first_step",
    a_sum: "then takes g1 + g2",
    a_clipped_sum: "then takes g1 + g2",
    a_sum_over_micro_batches: "then takes g1 + g2",
    a_scaled_closure: "seems to scale its loss",
    a_method_that_scales: "seems to scale its loss",
}


@pytest.mark.parametrize(("loop", "message"), MISTAKES.items(), ids=lambda x: getattr(x, "__name__", None))
def test_a_mistake_is_warned_of_once(
    loop: Callable[[list[Tensor], FusedSAM], None], message: str, backend: str, device: str
) -> None:
    params = leaves(9, 5, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loop(params, opt)
    said = [w for w in caught if message in str(w.message)]
    assert [w.filename for w in said] == [__file__]
    assert not opt.perturbed


@pytest.mark.parametrize("loop", MISTAKES, ids=lambda x: x.__name__)
def test_where_warnings_are_errors_nothing_stays_perturbed(
    loop: Callable[[list[Tensor], FusedSAM], None], backend: str, device: str
) -> None:
    params = leaves(9, 5, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w = snapshot(params)
    with pytest.raises(UserWarning):
        loop(params, opt)
    assert not opt.perturbed
    assert_same_bits(params, w)


def cleared_in_place(params: list[Tensor], opt: FusedSAM) -> None:
    for p in params:
        p.grad.zero_()


def cleared_by_torch(params: list[Tensor], opt: FusedSAM) -> None:
    opt.zero_grad(set_to_none=False)


def cleared_by_torch_in_a_twin_network(params: list[Tensor], opt: FusedSAM) -> None:
    """Each parameter is used twice, so that one backward writes its gradient twice."""
    opt.zero_grad(set_to_none=False)


def replaced(params: list[Tensor], opt: FusedSAM) -> None:
    for p in params:
        p.grad = torch.zeros_like(p)


def skipped_first(params: list[Tensor], opt: FusedSAM) -> None:
    """The second pass does without it, as a layer that is dropped at random."""
    cleared_in_place(params, opt)


def frozen_first(params: list[Tensor], opt: FusedSAM) -> None:
    params[0].grad = None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "scaler", [torch.amp.GradScaler("cpu", enabled=False), types.SimpleNamespace(scale=lambda loss: 0.3 * loss)]
)
def test_a_closure_that_scales_otherwise_is_no_mistake(scaler: Any) -> None:
    params = leaves(9)
    FusedSAM(params, rho=RHO, **HYPER).step(lambda: scaler.scale((params[0] * params[0]).sum()).backward())


@pytest.mark.parametrize(
    "clear",
    [
        cleared_in_place,
        cleared_by_torch,
        cleared_by_torch_in_a_twin_network,
        replaced,
        frozen_first,
        skipped_first,
    ],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_cleared_in_any_way_are_no_mistake(
    clear: Callable[[list[Tensor], FusedSAM], None], passes: int, backend: str, device: str
) -> None:
    """Warnings are errors here."""
    params = leaves(9, 5, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    twice = 2 if clear is cleared_by_torch_in_a_twin_network else 1

    def backward(used: list[Tensor]) -> None:
        sum(torch.stack([p * p, p.exp()]).sum() for p in used * twice).backward()

    for _ in range(4):
        for _ in range(passes):
            backward(params)
        opt.first_step()
        clear(params, opt)
        for _ in range(passes):
            backward(params[1:] if clear in (frozen_first, skipped_first) else params)
        opt.step()
        cleared_in_place(params[1:], opt)


@pytest.mark.parametrize(("micro_batches", "clipped"), [(1, False), (1, True), (3, True)])
def test_gradients_unscaled_before_the_ascent_only_are_refused(
    micro_batches: int, clipped: bool, backend: str, device: str
) -> None:
    """They would be 65,536 times too long. Unscaled after the second backward, and by two scalers, they are right."""
    steps = {}
    for unscaled in ("never", "at w + e", "at w", "by two scalers"):
        torch.manual_seed(5)
        params = leaves(9, 5, device=device)
        start = snapshot(params)
        opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
        scalers = [torch.amp.GradScaler(device, init_scale=2.0**16, growth_interval=1000) for _ in range(2)]
        for scaler, half in zip(scalers if "two" in unscaled else scalers[:1] * 2, ("at w", "at w + e"), strict=True):
            for _ in range(micro_batches):
                scaler.scale(sum(1.5 * (p * p).sum() for p in params) / micro_batches).backward()
            if unscaled in (half, "by two scalers"):
                scaler.unscale_(opt)
            if clipped:
                torch.nn.utils.clip_grad_norm_(params, 1e9)
            if half == "at w":
                opt.first_step(zero_grad=True)
        if unscaled == "at w":
            with pytest.raises(RuntimeError, match="still scaled"):
                scaler.step(opt)
            assert not opt.perturbed
            assert_same_bits(params, start)
            continue
        scaler.step(opt)
        steps[unscaled] = [p.detach().clone() for p in params]
    for found in steps.values():
        torch.testing.assert_close(found, steps["never"], rtol=1e-5, atol=1e-6)
