"""What goes wrong in training must not go wrong with the weights: exceptions, bad gradients, leaks."""

from __future__ import annotations

import copy
import ctypes
import math
from typing import Any

import pytest
import torch
from emulated_tests import NATIVE
from helpers import (
    HYPER,
    LARGE,
    RHO,
    assert_as_torch,
    assert_bits_of_torch,
    assert_same_bits,
    bits,
    buffers,
    leaves,
    quadratic,
    set_grads,
    snapshot,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, backends

every_base = pytest.mark.parametrize(
    "base", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam], ids=["SGD", "Adam", "NAdam"]
)


class Mishap(BaseException):
    """Something no `except Exception` sees, as KeyboardInterrupt."""


def state_of(opt: torch.optim.Optimizer) -> list[bytes]:
    return [bits(v) for s in opt.state.values() for _, v in sorted(s.items()) if isinstance(v, Tensor)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Mishap], ids=lambda e: e.__name__)
def test_an_exception_in_a_closure_leaves_weights_and_state_as_they_were(
    error: type[BaseException], backend: str, device: str
) -> None:
    """Raise before and after the backward of either pass; test_promises.py does with every option and base."""
    params = leaves(9, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    for failing_pass, backward_first in ((1, False), (2, True), (1, True), (2, False)):
        twins = copy.deepcopy(opt)
        w, state, calls = snapshot(params), state_of(opt), 0

        def closure(failing_pass: int = failing_pass, backward_first: bool = backward_first) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == failing_pass and not backward_first:
                raise error("mishap")
            loss = quadratic(params)()
            if calls == failing_pass:
                raise error("mishap")
            return loss

        with pytest.raises(error, match="mishap"):
            opt.step(closure)
        assert calls == failing_pass
        assert_same_bits(params, w)
        assert state_of(opt) == state
        assert not opt.perturbed
        opt.step(quadratic(params))
        twins.step(quadratic(twins.param_groups[0]["params"]))
        assert_same_bits(params, twins.param_groups[0]["params"])
        assert state_of(opt) == state_of(twins)


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_a_second_pass_that_skips_backward_restores_the_weights(backend: str, device: str) -> None:
    """As training code does on a non-finite loss: there is no gradient at all, so there is no update."""
    params = leaves(9, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w, calls = snapshot(params), 0

    def closure() -> Tensor | None:
        nonlocal calls
        calls += 1
        return quadratic(params)() if calls == 1 else None

    opt.step(closure)
    assert calls == 2
    assert_same_bits(params, w)
    assert all(m is None for m in buffers(opt))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0], ids=str)
@every_base
def test_gradients_of_pass_1_without_a_direction_leave_a_plain_base_step(
    bad: float, base: type[torch.optim.Optimizer], backend: str, device: str, ieee_roots: None
) -> None:
    """No perturbation, no NaN anywhere: the step is the base optimizer's with the second gradient."""
    params = leaves(9, LARGE, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt = FusedSAM(params, base, rho=RHO, backend=backend, lr=0.13, weight_decay=0.017)
    plain = base(twins, lr=0.13, weight_decay=0.017, foreach=False)
    w = snapshot(params)
    for zero_grad in (False, True):
        quadratic(params)()
        if bad == 0:
            for p in params:
                p.grad.zero_()
        else:
            params[1].grad[503] = bad
        opt.first_step(zero_grad=zero_grad)
        assert_same_bits(params, w, "unperturbed")
        opt.zero_grad()
        quadratic(params)()
        opt.step()
        plain.zero_grad()
        quadratic(twins)()
        plain.step()
        (assert_bits_of_torch if base is torch.optim.SGD else assert_as_torch)(params, twins)
        w = snapshot(params)
        opt.zero_grad()


def sparse_gradient(p: Tensor) -> Tensor:
    return torch.ones_like(p).detach().to_sparse()


class Twice(nn.Module):
    """Two parameters of which one gets a gradient that is to be refused."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.fine = nn.Parameter(torch.randn(5, device=device))
        self.culprit = nn.Parameter(torch.randn(7, 3, device=device))


@pytest.mark.parametrize(("named", "form"), [(True, "closure"), (False, "two calls")])
@every_base
def test_sparse_gradients_are_refused_by_name(
    named: bool, form: str, base: type[torch.optim.Optimizer], backend: str, device: str
) -> None:
    net = Twice(device)
    opt = FusedSAM(net.named_parameters() if named else net.parameters(), base, rho=RHO, backend=backend, lr=0.13)
    w, gradient = snapshot(net.parameters()), torch.ones_like(net.fine)

    def closure() -> Tensor:
        net.fine.grad, net.culprit.grad = gradient, sparse_gradient(net.culprit)
        return torch.tensor(0.0)

    closure()
    act = opt.step if form == "closure" else opt.first_step
    argument: Any = closure if form == "closure" else True
    with pytest.raises((TypeError, ValueError), match="culprit" if named else r"\b1\b") as refusal:
        act(argument)
    assert "sparse" in str(refusal.value)
    assert not opt.perturbed
    assert_same_bits(net.parameters(), w)
    assert not state_of(opt)
    if form == "two calls":
        assert net.fine.grad is gradient
        assert net.culprit.grad.is_sparse
    assert bool((gradient == 1).all())


@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_a_gradient_refused_in_pass_2_restores_the_weights(form: str, backend: str, device: str) -> None:
    net = Twice(device)
    opt = FusedSAM(net.named_parameters(), rho=RHO, backend=backend, **HYPER)
    opt.step(quadratic(list(net.parameters())))
    w, state, calls = snapshot(net.parameters()), state_of(opt), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = quadratic(list(net.parameters()))()
        if calls == 2:
            net.culprit.grad = sparse_gradient(net.culprit)
        return loss

    if form == "two calls":
        opt.zero_grad()
        closure()
        opt.first_step(zero_grad=True)
        closure()
    with pytest.raises((TypeError, ValueError), match="culprit"):
        opt.step(closure if form == "closure" else None)
    assert_same_bits(net.parameters(), w)
    assert state_of(opt) == state
    assert not opt.perturbed


class HalfWay(torch.optim.SGD):
    """Updates its first parameter, and fails."""

    def step(self, closure: Any = None) -> None:
        p = self.param_groups[0]["params"][0]
        with torch.no_grad():
            p.sub_(p.grad)
        raise OverflowError("too large")


@pytest.mark.parametrize("ascent_steps", [1, 2])
def test_a_base_step_that_fails_half_way_leaves_the_weights(ascent_steps: int, backend: str, device: str) -> None:
    params = leaves(33, 7, 129, device=device)
    opt = FusedSAM(params, HalfWay, rho=RHO, lr=0.013, ascent_steps=ascent_steps, backend=backend)
    w = snapshot(params)
    for _ in range(ascent_steps):
        set_grads(params, [torch.randn_like(p) for p in params])
        opt.first_step(zero_grad=True)
    assert snapshot(params) != w
    set_grads(params, [torch.randn_like(p) for p in params])
    with pytest.raises(OverflowError, match="too large"):
        opt.step()
    assert not opt.perturbed
    assert snapshot(params) == w


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2], ids=str)
def test_parameters_of_an_unsupported_dtype_are_refused_by_name(dtype: torch.dtype, backend: str, device: str) -> None:
    fine, culprit = torch.randn(5, device=device), torch.randn(7, device=device).to(dtype)
    fine.grad, culprit.grad = torch.ones_like(fine), torch.ones_like(culprit)
    w = bits(fine)
    with pytest.raises((TypeError, ValueError), match="culprit"):
        FusedSAM([("fine", fine), ("culprit", culprit)], rho=RHO, backend=backend, lr=0.13).first_step()
    assert bits(fine) == w


def test_parameters_that_overlap_are_refused(backend: str, device: str) -> None:
    flat = torch.randn(20, device=device)
    with pytest.raises(ValueError, match="overlap"):
        FusedSAM([flat[:9].requires_grad_(), flat[8:].requires_grad_()], rho=RHO, backend=backend, lr=0.13)


@pytest.mark.skipif(backends.available().get("native") != "ok", reason="the native backend is not built")
@pytest.mark.parametrize("backend", NATIVE)
def test_the_ascent_takes_the_gradients_memory(backend: str) -> None:
    """Nothing but the step refers to the gradients then: w lies where they were, and nothing is allocated for it."""
    params = leaves(LARGE, 90_000)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    quadratic(params)()
    places = [p.grad.data_ptr() for p in params]
    w = snapshot(params)
    opt.first_step(zero_grad=True)
    assert snapshot(params) != w
    assert [ctypes.string_at(at, len(old)) for at, old in zip(places, w, strict=True)] == w
