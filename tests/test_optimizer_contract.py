"""What code around an optimizer relies on: call forms, parameters and their groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    RHO,
    assert_all_close,
    assert_same_bits,
    batches,
    bits,
    buffers,
    closure_for,
    gradient_stream,
    leaves,
    momentum_of,
    quadratic,
    set_grads,
    small_net,
    snapshot,
    zeroing,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, ReferenceSAM


def test_every_call_form_makes_the_same_step(backend: str, device: str) -> None:
    net, data = small_net(torch.float32, device), batches(4, torch.float32, device)
    results = []
    for form in ("closure", "first_step, second_step", "first_step, step", "accelerate", "keeping gradients"):
        model = copy.deepcopy(net)
        opt = FusedSAM(model.parameters(), rho=RHO, backend=backend, **HYPER)
        for batch in data:
            closure = closure_for(model, batch)
            if form == "closure":
                opt.step(closure)
                continue
            opt.zero_grad()
            closure()
            opt.first_step(zero_grad=form != "keeping gradients")
            opt.zero_grad()
            closure()
            if form == "first_step, second_step":
                opt.second_step(zero_grad=True)
            elif form == "accelerate":
                opt.step(None)
            else:
                opt.step()
        results.append(snapshot([*model.parameters(), *buffers(opt)]))
    assert all(r == results[0] for r in results)
    assert results[0] != snapshot([*net.parameters(), *buffers(opt)])


def test_closure_returns_what_it_does_at_w_and_runs_twice_with_gradients_enabled(backend: str, device: str) -> None:
    params = leaves(5, 130, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    at_w = sum(1.5 * (p * p).sum() for p in params).item()
    calls: list[tuple[bool, bool, float]] = []

    def closure() -> tuple[float, str]:
        assert all(p.grad is None or not p.grad.any() for p in params), "gradients of the pass before"
        loss = quadratic(params)()
        calls.append((torch.is_grad_enabled(), opt.perturbed, loss.item()))
        return loss.item(), "whatever it returns"

    for p in params:
        p.grad = torch.full_like(p, 7.0)  # stale: must be zeroed before the first call
    with torch.no_grad():
        returned = opt.step(closure)
    assert [(grad, perturbed) for grad, perturbed, _ in calls] == [(True, False), (True, True)]
    assert returned == (calls[0][2], "whatever it returns")
    assert calls[0][2] == pytest.approx(at_w)
    assert calls[1][2] > calls[0][2]
    assert not opt.perturbed


def test_step_needs_an_ascent_first(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, backend=backend, lr=0.13)
    quadratic(params)()
    before = snapshot(params)
    for call in (opt.step, opt.second_step, lambda: opt.step(None)):
        with pytest.raises(RuntimeError, match="first_step"):
            call()
    assert snapshot(params) == before
    opt.first_step()
    opt.step()
    with pytest.raises(RuntimeError, match="first_step"):
        opt.step()


def test_a_second_first_step_is_refused_and_loses_nothing(backend: str, device: str) -> None:
    params = leaves(9, 67, device=device)
    opt = FusedSAM(params, backend=backend, rho=RHO, lr=0.13)
    w = snapshot(params)
    quadratic(params)()
    opt.first_step(zero_grad=True)
    perturbed = snapshot(params)
    quadratic(params)()
    with pytest.raises(RuntimeError):
        opt.first_step()
    assert snapshot(params) == perturbed
    opt.restore()
    assert snapshot(params) == w


def test_a_closure_between_the_passes_is_the_second_one(backend: str, device: str) -> None:
    """It runs once, on the gradients there are: a wrapper's is empty."""
    results, calls = [], []
    for empty in (False, True):
        torch.manual_seed(3)
        params = leaves(9, device=device)
        opt = FusedSAM(params, backend=backend, rho=RHO, lr=0.13)
        quadratic(params)()
        opt.first_step(zero_grad=True)
        if empty:
            quadratic(params)()
            assert opt.step(lambda: calls.append(1)) is None
        else:
            assert opt.step(quadratic(params)) is not None
        assert not opt.perturbed
        results.append(snapshot(params))
    assert results[0] == results[1]
    assert calls == [1]


def test_what_cannot_be_a_second_pass_is_refused_between_them(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, backend=backend, rho=RHO, lr=0.13)
    w = snapshot(params)
    quadratic(params)()
    opt.first_step()
    with pytest.raises(RuntimeError, match="after first_step"):
        opt.step([quadratic(params), quadratic(params)])
    with pytest.raises(RuntimeError, match="after first_step"):
        opt.step(quadratic(params), ascent=quadratic(params))
    assert opt.perturbed
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert snapshot(params) == w


def test_restore_undoes_the_ascent_and_nothing_else(backend: str, device: str) -> None:
    params = leaves(9, 1009, device=device)
    opt = FusedSAM(params, backend=backend, rho=RHO, **HYPER)
    w = snapshot(params)
    opt.restore()
    assert snapshot(params) == w
    for zero_grad in (False, True):
        quadratic(params)()
        opt.first_step(zero_grad=zero_grad)
        assert opt.perturbed
        assert snapshot(params) != w
        opt.restore()
        opt.restore()
        assert not opt.perturbed
        assert snapshot(params) == w
    assert not opt.state


@pytest.mark.parametrize("zero_grad", [False, True])
def test_zero_grad_of_both_steps(zero_grad: bool, backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, backend=backend, lr=0.13)
    quadratic(params)()
    gradient = bits(params[0].grad)
    opt.first_step(zero_grad=zero_grad)
    assert params[0].grad is None if zero_grad else bits(params[0].grad) == gradient
    params[0].grad = torch.ones_like(params[0])
    opt.second_step(zero_grad=zero_grad)
    assert (params[0].grad is None) == zero_grad


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_none_gradients_in_either_pass_or_both(backend: str, device: str) -> None:
    """Two rounds, so that what the first leaves behind would show in the second."""
    sizes = (7, 40, 17, 17)
    start = [torch.randn(n, dtype=torch.float64, device=device) for n in sizes]
    params, wide = [p.clone() for p in start], [p.clone() for p in start]
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    reference = ReferenceSAM(wide, rho=RHO, **HYPER)
    patterns = [
        ([1, 1, 0, 0], [1, 0, 1, 0]),
        ([0, 1, 1, 0], [1, 1, 0, 0]),
        ([0] * 4, [1] * 4),
        ([1] * 4, [0] * 4),
        ([0, 1, 1, 1], [1] * 4),  # the ascent then keeps fewer weights than the update sees
    ]
    stream = gradient_stream([(n,) for n in sizes], len(patterns), torch.float64)
    for (seen, seen_again), (first, second) in zip(patterns, stream):
        for o, tensors in ((opt, params), (reference, wide)):
            set_grads(tensors, [g if s else None for g, s in zip(first, seen)])
            o.first_step(zero_grad=True)
            set_grads(tensors, [g if s else None for g, s in zip(second, seen_again)])
            o.second_step()
        assert_all_close(params, wide)
        for p, w in zip(params, wide, strict=True):
            assert (momentum_of(opt, p) is None) == (momentum_of(reference, w) is None)


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_frozen_parameters_stay_and_join_when_thawed(backend: str, device: str) -> None:
    params = leaves(9, 9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    params[1].requires_grad_(False)
    frozen = bits(params[1])
    opt.step(quadratic(params[:1]))
    assert bits(params[1]) == frozen
    assert not params[1].requires_grad
    assert "momentum_buffer" not in opt.state[params[1]]
    params[1].requires_grad_(True)
    opt.step(quadratic(params))
    assert bits(params[1]) != frozen
    for p in params:
        p.requires_grad_(False)
    w = snapshot(params)
    opt.step(lambda: None)  # with nothing to train
    assert snapshot(params) == w


def test_a_group_added_later_takes_part(backend: str, device: str) -> None:
    params = leaves(9, 130, 4, device=device)
    later = FusedSAM(params[:1], rho=RHO, backend=backend, **HYPER)
    later.add_param_group({"params": params[1:], "lr": 0.021, "rho": 0.3})
    twins = [p.detach().clone().requires_grad_() for p in params]
    groups = [{"params": twins[:1]}, {"params": twins[1:], "lr": 0.021, "rho": 0.3}]
    at_once = FusedSAM(groups, rho=RHO, backend=backend, **HYPER)
    assert later.param_groups[1]["rho"] == 0.3
    assert later.param_groups[1]["momentum"] == HYPER["momentum"]
    for _ in range(3):
        later.step(quadratic(params))
        at_once.step(quadratic(twins))
    assert_same_bits(params, twins)


def test_a_group_added_between_the_passes_gets_a_plain_step(backend: str, device: str) -> None:
    params = leaves(9, 130, device=device)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params[:1], rho=RHO, backend=backend, lr=0.13)
    quadratic(params[:1])()
    opt.first_step(zero_grad=True)
    opt.add_param_group({"params": params[1:]})
    set_grads(params, [torch.ones(9), torch.ones(130)])
    opt.step()
    for p, start in zip(params, w, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.13)


def test_groups_without_perturbation_and_without_parameters(backend: str, device: str) -> None:
    """rho = 0 keeps a group at w, and its gradients still count in the one global norm."""
    params = leaves(9, 9, device=device, dtype=torch.float64)
    w = [p.detach().clone() for p in params]
    groups: list[Any] = [{"params": []}, {"params": params[:1], "rho": 0.0}, {"params": params[1:]}]
    opt = FusedSAM(groups, rho=RHO, backend=backend, **HYPER)
    quadratic(params)()
    opt.first_step()
    assert bits(params[0]) == bits(w[0])
    torch.testing.assert_close(params[1].detach(), w[1] + RHO * w[1] / torch.cat(w).norm())
    opt.step()
    assert bits(params[0]) != bits(w[0])


def test_named_parameters(backend: str, device: str) -> None:
    params = leaves(9, 130, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    named = FusedSAM(zip(("weight", "bias"), params), rho=RHO, backend=backend, **HYPER)
    plain = FusedSAM(twins, rho=RHO, backend=backend, **HYPER)
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]
    for _ in range(2):
        named.step(quadratic(params))
        plain.step(quadratic(twins))
    assert_same_bits(params, twins)


def test_empty_and_zero_dimensional_parameters(backend: str, device: str) -> None:
    params = [
        torch.zeros(0, 3, device=device).requires_grad_(),
        torch.tensor(2.0, device=device).requires_grad_(),
    ]
    opt = FusedSAM(params, rho=0.5, backend=backend, lr=0.1)
    opt.step(quadratic(params))
    assert params[1].item() == pytest.approx(2 - 0.1 * 3 * 2.5)
    only_empty = FusedSAM(params[:1], rho=0.5, backend=backend, lr=0.1, momentum=0.9)
    only_empty.step(quadratic(params[:1]))


def test_tied_weights_are_one_parameter(backend: str, device: str) -> None:
    net = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7)).to(device, torch.float64)
    net[2].weight = net[0].weight
    twin, x = copy.deepcopy(net), torch.randn(5, 7, dtype=torch.float64, device=device)
    opt = FusedSAM(net.parameters(), rho=RHO, backend=backend, **HYPER)
    reference = ReferenceSAM(twin.parameters(), rho=RHO, **HYPER)

    def closure(model: nn.Module) -> Tensor:
        loss = (model(x) - x).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        opt.step(lambda: closure(net))
        reference.step(zeroing(twin, lambda: closure(twin)))
    assert net[2].weight is net[0].weight
    assert_all_close(net.parameters(), twin.parameters())
