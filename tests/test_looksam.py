"""LookSAM: the steps between the perturbed ones use the orthogonal part of SAM's gradient again, ``looksam_alpha``."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    FLOAT64_RTOL,
    HYPER,
    LARGE,
    RHO,
    assert_all_close,
    assert_same_bits,
    batches,
    closure_for,
    ids,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
    through_a_file,
)
from torch import Tensor
from torch.amp import GradScaler

from fused_sam import FusedSAM
from fused_sam.reference import norm, orthogonal_part, perturb, sgd_update, with_reused

ALPHA = 0.37
KEY = "orthogonal_grad"


def gradient_at(net: torch.nn.Module, ws: list[Tensor], batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p, w in zip(twin.parameters(), ws, strict=True):
            p.copy_(w)
    twin.zero_grad()
    closure_for(twin, batch)()
    return [p.grad.clone() for p in twin.parameters()]


@pytest.mark.parametrize(
    ("form", "interval"), [("closure", 3), ("two calls", 2), ("two calls, gradients zeroed in place", 3)]
)
def test_a_trajectory_matches_the_float64_reference(form: str, interval: int, backend: str, device: str) -> None:
    net, data = small_net(device=device), batches(7, device=device)
    ws = [p.detach().clone() for p in net.parameters()]
    momenta: list[Any] = [None] * len(ws)
    opt = FusedSAM(net.parameters(), rho=0.3, interval=interval, looksam_alpha=ALPHA, backend=backend, **HYPER)
    for step, batch in enumerate(data):
        calls: list[int] = []

        def closure(batch: Any = batch, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return closure_for(net, batch)()

        if form == "closure":
            opt.step(closure)
        else:
            opt.zero_grad()
            closure()
            if opt.perturb_next:
                opt.first_step(zero_grad=form == "two calls")
                opt.zero_grad(set_to_none=form == "two calls")
                closure()
            opt.step()
        assert len(calls) == (2 if step % interval == 0 else 1)  # no pass is made in vain

        gradient = gradient_at(net, ws, batch)
        if step % interval == 0:
            second = gradient_at(net, perturb(ws, gradient, [0.3] * len(ws), [False] * len(ws)), batch)
            orthogonal = orthogonal_part(gradient, second)
            gradient = second
        else:
            gradient = with_reused(gradient, orthogonal, ALPHA)
        updates = [sgd_update(w, g, m, **HYPER) for w, g, m in zip(ws, gradient, momenta)]
        ws, momenta = [w for w, _ in updates], [m for _, m in updates]
        assert_all_close([p.grad for p in net.parameters()], gradient)
        assert_all_close([p.detach() for p in net.parameters()], ws)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_kept_part_is_orthogonal_over_all_tensors_together(dtype: torch.dtype, backend: str, device: str) -> None:
    """A projection tensor by tensor, as in other implementations, would be orthogonal in each."""
    params = leaves(9, LARGE, 67, 0, device=device, dtype=dtype)
    opt = FusedSAM(params, rho=RHO, interval=2, looksam_alpha=ALPHA, backend=backend, lr=0.0)
    first = [torch.randn_like(x) for x in params]
    second = [torch.randn_like(x) + 0.5 * g for x, g in zip(params, first)]
    set_grads(params, first)
    opt.first_step(zero_grad=True)
    set_grads(params, second)
    opt.step()
    kept = [opt.state[x][KEY] for x in params]
    assert all(v.dtype == dtype for v in kept)
    dots = [float((v.double() * g.double()).sum()) for v, g in zip(kept, first)]
    size = float(
        norm(params, [v.double() for v in kept], [False] * 4) * norm(params, [g.double() for g in first], [False] * 4)
    )
    assert abs(sum(dots)) < 10 * torch.finfo(dtype).eps * size
    assert max(map(abs, dots)) > 100 * torch.finfo(dtype).eps * size or dtype in (torch.bfloat16, torch.float16)
    expected = orthogonal_part([g.double() for g in first], [g.double() for g in second])
    # In float64 the reference's own sums are some ulps off.
    tolerance = FLOAT64_RTOL if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for v, e in zip(kept, expected):
        torch.testing.assert_close(v.double(), e, rtol=tolerance, atol=2 * tolerance)


def test_a_base_step_between_is_clipped_after_the_reuse(backend: str, device: str) -> None:
    params = leaves(9, 67, device=device, dtype=torch.float64)
    opt = FusedSAM(params, rho=RHO, interval=2, looksam_alpha=2.0, backend=backend, lr=0.0, max_grad_norm=0.1)
    for _ in range(2):
        opt.step(lambda: sum(x.exp().square().sum() for x in params).backward())
    assert float(torch.cat([x.grad for x in params]).norm()) == pytest.approx(0.1, rel=1e-6)
    assert float(opt.last.second_grad_norm) > 1


def test_before_the_first_and_after_the_last_perturbed_step_nothing_is_reused(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, interval=2, start=2, stop=5, looksam_alpha=ALPHA, backend=backend, lr=0.01)
    for step in range(8):
        with torch.no_grad():
            plain = [2 * (x.exp().square()) for x in params]
        opt.step(lambda: sum(x.exp().square().sum() for x in params).backward())
        same = all(torch.equal(x.grad, g) for x, g in zip(params, plain))
        assert same == (step not in (2, 3, 4))


def test_parameters_that_stay_and_none_gradients(backend: str, device: str) -> None:
    params = leaves(9, 67, 5, device=device, dtype=torch.float64)
    groups = [{"params": params[:2]}, {"params": params[2:], "perturb": False}]
    opt = FusedSAM(groups, rho=RHO, interval=3, looksam_alpha=ALPHA, backend=backend, lr=0.0)
    first, second, third = ([torch.randn_like(x) for x in params] for _ in range(3))
    set_grads(params, [first[0], None, first[2]])
    opt.first_step(zero_grad=True)
    set_grads(params, second)
    opt.step()
    assert [KEY in opt.state.get(x, {}) for x in params] == [True, False, False]
    set_grads(params, third)
    opt.step()
    expected = with_reused(third[:1], orthogonal_part(first[:1], second[:1]), ALPHA)
    assert_all_close([x.grad for x in params], [*expected, *third[1:]])
    set_grads(params, [None, third[1], None])
    opt.step()
    assert params[0].grad is None
    assert_all_close([params[1].grad], [third[1]])


@pytest.mark.parametrize("bad", ["zero first", "nan first", "inf second", "parallel"])
def test_gradients_that_have_no_orthogonal_part(bad: str, backend: str, device: str) -> None:
    """The last part is kept, or none of it is used; weights and later steps stay finite."""
    params = leaves(9, 67, device=device)
    opt = FusedSAM(params, rho=RHO, interval=2, looksam_alpha=ALPHA, backend=backend, lr=0.0)
    g = [torch.randn_like(x) for x in params]
    if bad != "parallel":
        set_grads(params, g)
        opt.first_step(zero_grad=True)
        set_grads(params, [torch.randn_like(x) for x in params])
        opt.step()
        set_grads(params, g)
        opt.step()
    before = [opt.state[x][KEY].clone() for x in params] if bad != "parallel" else [torch.zeros_like(x) for x in params]
    w = snapshot(params)
    scaler = GradScaler(device, init_scale=4.0)
    scaler.scale(torch.ones((), device=device))
    firsts = {"zero first": 0.0, "nan first": math.nan}
    set_grads(params, [torch.full_like(x, firsts[bad]) if bad in firsts else y for x, y in zip(params, g)])
    opt.first_step(zero_grad=True)
    seconds = {"inf second": [torch.full_like(x, math.inf) for x in params], "parallel": [2 * y for y in g]}
    set_grads(params, seconds.get(bad, g))
    scaler.step(opt)
    scaler.update()
    assert_same_bits(params, w)
    kept = [opt.state[x][KEY] for x in params]
    if bad == "parallel":
        assert all(float(v.abs().max()) < 1e-6 for v in kept)
        for v in kept:
            v.zero_()
    else:
        assert_same_bits(kept, before)
    set_grads(params, g)
    opt.step()
    if bad == "parallel":
        assert_same_bits((x.grad for x in params), g)
    assert all(bool(torch.isfinite(x.grad).all()) for x in params)


def test_the_scale_of_a_scaler_may_change_between_the_steps(backend: str, device: str) -> None:
    params = leaves(9, 67, device=device)
    opt = FusedSAM(params, rho=RHO, interval=2, looksam_alpha=ALPHA, backend=backend, lr=0.0)
    first, second, third = ([torch.randn_like(x) for x in params] for _ in range(3))
    for scale in (1.0, 1024.0):
        set_grads(params, [g * scale for g in first])
        opt.first_step(zero_grad=True)
        set_grads(params, [g * scale for g in second])
        opt.step()
        set_grads(params, third)
        opt.step()
        got = [x.grad.clone() for x in params]
        if scale == 1.0:
            expected = got
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_with_masters_too_a_run_goes_on_bit_for_bit(backend: str, device: str) -> None:
    """From the middle of an interval. Without masters: test_promises.py."""
    net, data = small_net(torch.bfloat16, device), batches(8, torch.bfloat16, device)
    options = {"rho": 0.3, "interval": 3, "looksam_alpha": ALPHA, "master_weights": True, "backend": backend, **HYPER}
    opt = FusedSAM(net.parameters(), **options)
    for batch in data[:2]:
        opt.step(closure_for(net, batch))
    twin = copy.deepcopy(net)
    resumed = FusedSAM(twin.parameters(), **options)
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    for batch in data[2:]:
        opt.step(closure_for(net, batch))
        resumed.step(closure_for(twin, batch))
    assert_same_bits(twin.parameters(), snapshot(net.parameters()))


def test_a_list_of_closures_is_refused_unless_it_holds_one(backend: str, device: str) -> None:
    params = leaves(3, device=device)
    opt = FusedSAM(params, lr=0.13, interval=2, looksam_alpha=0.3, backend=backend)
    with pytest.raises(ValueError, match=r"Invalid looksam_alpha=0\.3 with a list of closures"):
        opt.step([quadratic(params), quadratic(params)])
    opt.step([quadratic(params)])


FREED = torch.randn(67)
FREED.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "edited",
    [
        torch.randn(66),
        torch.randn(67).double(),
        torch.randn(67).to_sparse(),
        FREED,
        0.5,
        torch.empty(67, device="meta"),
    ],
    ids=["short", "float64", "sparse", "freed", "number", "meta"],
)
@pytest.mark.parametrize("perturbed", [True, False])
def test_a_part_that_was_edited_is_refused_by_name(edited: Any, perturbed: bool, backend: str, device: str) -> None:
    """A freed one ended the process: what was mixed with the new part was not checked."""
    params = leaves(9, 67, device=device)
    names = [("absent", params[0]), ("culprit", params[1])]
    opt = FusedSAM(names, rho=RHO, interval=2, looksam_alpha=ALPHA, backend=backend, **HYPER)
    for _ in range(2 if perturbed else 1):
        opt.step(quadratic(params[1:]))
    assert opt.perturb_next == perturbed
    w, momentum = snapshot(params), snapshot([opt.state[params[1]]["momentum_buffer"]])
    opt.state[params[1]][KEY] = edited
    with pytest.raises((ValueError, TypeError), match="culprit"):
        opt.step(quadratic(params[1:]))
    assert snapshot(params) == w
    assert snapshot([opt.state[params[1]]["momentum_buffer"]]) == momentum
    assert not opt.perturbed
