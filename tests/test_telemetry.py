"""``optimizer.last``, and what ``telemetry=True`` adds to it."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    HYPER,
    LARGE,
    LENGTH_RTOL,
    NORM_RTOL,
    RHO,
    SIXTEEN_BIT,
    assert_same_bits,
    batches,
    buffers,
    closure_for,
    ids,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
)
from torch import Tensor
from torch.amp import GradScaler

from fused_sam import FusedSAM
from fused_sam.report import Report

MEASURED = ("second_grad_norm", "radius", "cosine")
# Sums in fp64 of what is in the dtype itself.
FLOAT64_SUM = 1e-12


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def cosine(first: list[Tensor], second: list[Tensor]) -> float:
    a, b = flat(first), flat(second)
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("zero_grad", "base"), [(False, torch.optim.SGD), (True, torch.optim.SGD), (True, torch.optim.Adam)]
)
def test_every_field_against_its_definition(
    dtype: torch.dtype, zero_grad: bool, base: Any, backend: str, device: str
) -> None:
    params = leaves(9, 67, LARGE, device=device, dtype=dtype)
    options = {"lr": 0.013} if base is torch.optim.SGD else {"lr": 0.013, "eps": 0.01}  # fp16 has no 1e-8
    opt = FusedSAM(params, base, rho=RHO, backend=backend, telemetry=True, **options)
    for _ in range(2):
        first, second = ([torch.randn(p.shape).to(p) for p in params] for _ in range(2))
        w = [p.detach().clone() for p in params]
        set_grads(params, first)
        opt.first_step(zero_grad=zero_grad)
        moved = flat(params) - flat(w)
        set_grads(params, second)
        opt.step()
        last = opt.last
        assert float(last.grad_norm) == pytest.approx(float(flat(first).norm()), rel=NORM_RTOL[dtype])
        assert float(last.second_grad_norm) == pytest.approx(float(flat(second).norm()), rel=NORM_RTOL[dtype])
        assert float(last.radius) == pytest.approx(float(moved.norm()), rel=FLOAT64_SUM)
        assert float(last.cosine) == pytest.approx(cosine(first, second), rel=FLOAT64_SUM, abs=FLOAT64_SUM)
        assert (last.loss, last.loss_perturbed, last.loss_gap) == (None, None, None)
        for x in last:
            assert x is None or (x.shape, x.dtype, x.device.type, x.requires_grad) == ((), torch.float64, device, False)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_radius_is_the_one_reached_and_not_the_one_asked_for(dtype: torch.dtype, backend: str, device: str) -> None:
    """Large bf16 weights swallow the perturbation whole."""
    params = leaves(LARGE, device=device, dtype=dtype)
    with torch.no_grad():
        params[0].mul_(1e-4)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.0, telemetry=True)
    opt.step(quadratic(params))
    if dtype not in SIXTEEN_BIT:
        assert float(opt.last.radius) == pytest.approx(RHO, rel=LENGTH_RTOL[dtype])
    with torch.no_grad():
        params[0].add_(1000)
    opt.step(lambda: set_grads(params, [torch.ones_like(p) for p in params]))
    if dtype in SIXTEEN_BIT:
        assert float(opt.last.radius) == 0.0


def test_losses_and_their_gap_are_there_in_the_closure_form(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device, dtype=torch.float64)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(quadratic(params)())
        return seen[-1]

    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    opt.step(closure)
    last = opt.last
    assert_same_bits([last.loss, last.loss_perturbed, last.loss_gap], [seen[0], seen[1], seen[1] - seen[0]], "loss")
    assert not last.loss.requires_grad
    assert float(last.loss_gap) > 0
    assert float(last.grad_norm) > 0
    assert all(getattr(last, name) is None for name in MEASURED)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2.5, 2.5), (3, 3), (None, None), ({"loss": 1}, None), (torch.ones(2), None), (torch.tensor([4.0]), 4.0)],
    ids=str,
)
def test_what_is_no_loss_is_not_kept(value: Any, expected: float | None, backend: str) -> None:
    params = leaves(3)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    opt.step(lambda: (quadratic(params)(), value)[1])
    assert opt.last.loss == expected
    assert opt.last.loss_gap == (None if expected is None else 0.0)


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_a_list_of_closures_has_one_entry_for_each(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device, dtype=torch.float64)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13, telemetry=True)
    opt.step([quadratic(params), quadratic(params[1:]), quadratic(params[:1])])
    last = opt.last
    expected = [3 * float(flat(x).norm()) for x in (w, w[1:], w[:1])]
    assert last.grad_norm.tolist() == pytest.approx(expected, rel=NORM_RTOL[torch.float64])
    assert last.radius.tolist() == pytest.approx([RHO] * 3, rel=LENGTH_RTOL[torch.float64])
    assert last.cosine.tolist() == pytest.approx([1.0] * 3, rel=FLOAT64_SUM)
    losses = torch.stack([1.5 * flat(x).square().sum() for x in (w, w[1:], w[:1])])
    torch.testing.assert_close(last.loss.to(losses), losses)
    assert last.loss_gap.shape == (3,)
    mean = flat(p.grad for p in params)
    assert float(last.second_grad_norm) == pytest.approx(float(mean.norm()), rel=NORM_RTOL[torch.float64])
    opt.step([quadratic(params)])
    assert last.loss_gap.shape == (3,)
    assert opt.last.loss.shape == (1,)
    opt.step([quadratic(params), lambda: 2.0])
    assert opt.last.loss[1] == 2.0
    opt.step([quadratic(params), lambda: None])
    assert opt.last.loss is None


@pytest.mark.parametrize("options", [{"adaptive": True}, {"max_grad_norm": 0.37}, {"interval": 2}], ids=str)
def test_telemetry_changes_no_bit_of_the_steps(options: dict[str, Any], backend: str, device: str) -> None:
    net, data = small_net(torch.float32, device), batches(4, torch.float32, device)
    twin = copy.deepcopy(net)
    options = {"rho": RHO, "backend": backend, **HYPER, **options}
    opt, plain = FusedSAM(net.parameters(), telemetry=True, **options), FusedSAM(twin.parameters(), **options)
    for batch in data:
        opt.step(closure_for(net, batch))
        plain.step(closure_for(twin, batch))
        assert_same_bits((p.grad for p in net.parameters()), [p.grad for p in twin.parameters()], "gradient")
    assert_same_bits(net.parameters(), snapshot(twin.parameters()))
    assert_same_bits(buffers(opt), buffers(plain), "momentum")


def test_the_norm_that_clipping_takes_is_reported_as_it_was_before(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device, dtype=torch.float64)
    opt = FusedSAM(params, rho=0.0, backend=backend, lr=0.13, max_grad_norm=0.37)
    expected = 3 * float(flat(params).norm())
    opt.step(quadratic(params))
    assert float(opt.last.second_grad_norm) == pytest.approx(expected, rel=NORM_RTOL[torch.float64])
    assert float(flat(p.grad for p in params).norm()) == pytest.approx(0.37, rel=1e-6)


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_none_gradients_count_as_zero_and_no_gradient_has_no_angle(backend: str, device: str) -> None:
    params = leaves(9, 67, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13, telemetry=True)
    g = [torch.randn(p.shape, device=device) for p in params]
    zeros = [torch.zeros_like(p) for p in params]
    set_grads(params, [g[0], g[1], None])
    opt.first_step(zero_grad=True)
    set_grads(params, [g[0], None, g[2]])
    opt.step()
    expected = cosine([g[0], g[1], zeros[2]], [g[0], zeros[1], g[2]])
    assert float(opt.last.cosine) == pytest.approx(expected, rel=FLOAT64_SUM)
    for first, second in ((g, [None] * 3), ([None] * 3, g), (zeros, g), (g, [g[0] * math.nan, *g[1:]])):
        set_grads(params, first)
        opt.first_step(zero_grad=True)
        set_grads(params, second)
        opt.step()
        assert math.isnan(opt.last.cosine)


def test_steps_without_perturbation_and_steps_that_fail(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, start=1, lr=0.13, telemetry=True)
    assert opt.last == Report()
    expected = 3 * float(flat(params).norm())
    opt.step(quadratic(params))
    last = opt.last
    assert float(last.second_grad_norm) == pytest.approx(expected, rel=1e-6)
    assert float(last.loss) > 0
    assert (last.grad_norm, last.loss_perturbed, last.loss_gap, last.radius, last.cosine) == (None,) * 5

    def failing() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(failing)
    quadratic(params)()
    opt.first_step()
    opt.restore()
    assert opt.last is last


@pytest.mark.parametrize("unscaled_by_caller", [False, True])
def test_under_a_scaler_gradients_are_as_they_were_left(unscaled_by_caller: bool, backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13, telemetry=True)
    scaler, norm = GradScaler(device, init_scale=2.0**10), float(flat(params).norm())
    for _ in range(2):
        scaler.scale(0.5 * params[0].square().sum()).backward()
        if not opt.perturbed:
            opt.first_step(zero_grad=True)
    if unscaled_by_caller:
        scaler.unscale_(opt)
    scaler.step(opt)
    assert float(opt.last.grad_norm) == pytest.approx(2.0**10 * norm, rel=1e-6)
    scale = 1.0 if unscaled_by_caller else 2.0**10
    assert float(opt.last.second_grad_norm) == pytest.approx(scale * (norm + RHO), rel=1e-6)
    assert float(opt.last.cosine) == pytest.approx(1.0, rel=1e-6)


def test_no_gradient_and_no_graph_outlives_the_step(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13, telemetry=True)
    dead: list[weakref.ref[Any]] = []

    def closure() -> Tensor:
        loss = quadratic(params)()
        dead.extend(weakref.ref(x) for x in (loss, *(p.grad for p in params)))
        return loss

    opt.step(closure)
    opt.step([closure] * 2)
    opt.zero_grad()
    gc.collect()
    assert [r() for r in dead] == [None] * len(dead)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_measures_too_but_has_made_no_step(duplicate: Callable[[FusedSAM], FusedSAM], backend: str) -> None:
    params = leaves(9)
    opt = FusedSAM(params, rho=RHO, backend=backend, telemetry=True)
    opt.step(quadratic(params))
    copied = duplicate(opt)
    assert (copied.telemetry, copied.last) == (True, Report())
