"""MSAM: the perturbation along the momentum, ``direction="momentum"``, with one gradient in a step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    HYPER,
    LARGE,
    LENGTH_RTOL,
    RHO,
    assert_all_close,
    assert_bits_of_torch,
    assert_same_bits,
    batches,
    closure_for,
    ids,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, ReferenceSAM

BASES: dict[str, tuple[type[torch.optim.Optimizer], str, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, "sgd", HYPER),
    "Nesterov": (torch.optim.SGD, "sgd", {**HYPER, "nesterov": True}),
    "maximize": (torch.optim.SGD, "sgd", {**HYPER, "maximize": True, "dampening": 0.3}),
    "AdamW": (torch.optim.AdamW, "adamw", {"lr": 0.013, "weight_decay": 0.17}),
}
every_base = pytest.mark.parametrize("base", BASES)


def make(params: Any, base: str, backend: str, **options: Any) -> FusedSAM:
    base_class, _, base_options = BASES[base]
    return FusedSAM(params, base_class, direction="momentum", backend=backend, **base_options, **options)


@every_base
@pytest.mark.parametrize(("form", "adaptive"), [("closure", False), ("two calls", True)])
def test_a_trajectory_matches_the_float64_reference(
    base: str, form: str, adaptive: bool, backend: str, device: str
) -> None:
    net, data = small_net(device=device), batches(6, device=device)
    twin = copy.deepcopy(net)
    opt = make(net.parameters(), base, backend, rho=0.3, adaptive=adaptive)
    _, name, options = BASES[base]
    reference = ReferenceSAM(twin.parameters(), rho=0.3, adaptive=adaptive, base=name, **options)
    for batch in data:
        calls: list[int] = []

        def closure(batch: Any = batch, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return closure_for(net, batch)()

        if form == "closure":
            loss = opt.step(closure)
        else:
            opt.first_step()
            opt.zero_grad()
            loss = closure()
            opt.step()
        assert len(calls) == 1
        reference.first_step_along_momentum()
        twin.zero_grad()
        assert_all_close([loss.detach()], [closure_for(twin, batch)().detach()])  # the loss at w + e
        reference.second_step()
        assert_all_close(net.parameters(), twin.parameters())


@pytest.mark.parametrize(
    ("dtype", "scale"), [*((dtype, 1.0) for dtype in DTYPES), (torch.float32, 1e-35), (torch.float32, 1e35)], ids=ids
)
def test_e_leads_against_the_momentum_and_has_length_rho(
    dtype: torch.dtype, scale: float, backend: str, device: str
) -> None:
    """Also of a momentum near the ends of fp32."""
    params = [torch.zeros(n, device=device, dtype=dtype).requires_grad_() for n in (9, LARGE, 67)]
    opt = FusedSAM(params, rho=0.4, direction="momentum", backend=backend, lr=0.0, momentum=0.9)
    g = [torch.randn_like(x) * scale for x in params]
    set_grads(params, g)
    opt.first_step()
    assert all(not x.any() for x in params)  # no momentum yet
    opt.step()
    opt.first_step(zero_grad=True)
    assert all(x.grad is None for x in params)
    e = torch.cat([x.detach().double() for x in params])
    m = torch.cat([x.double() for x in g])
    assert float(e.norm()) == pytest.approx(0.4, rel=LENGTH_RTOL[dtype])
    assert float(torch.dot(e, m) / e.norm() / m.norm()) == pytest.approx(-1, abs=1e-5)
    opt.restore()
    assert all(not x.any() for x in params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_with_masters_a_trajectory_is_that_of_fp32_weights(dtype: torch.dtype, backend: str, device: str) -> None:
    params = leaves(9, LARGE, 67, device=device, dtype=dtype)
    twins = [x.detach().float() for x in params]
    options = {"rho": 0.4, "direction": "momentum", "backend": backend, **HYPER}
    opt, wide = FusedSAM(params, master_weights=True, **options), FusedSAM(twins, **options)
    for _ in range(3):
        opt.first_step()
        wide.first_step()
        assert_same_bits(params, [x.to(dtype) for x in twins])
        g = [torch.randn_like(x) for x in params]
        for optimizer, tensors in ((opt, params), (wide, twins)):
            set_grads(tensors, g)
            optimizer.step()
        assert_same_bits(params, [x.to(dtype) for x in twins])


def test_a_group_without_momentum_and_one_that_stays_are_not_moved(backend: str, device: str) -> None:
    params = leaves(9, 67, 5, device=device, dtype=torch.float64)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "momentum": 0.0},
        {"params": params[2:], "perturb": False},
    ]
    opt = FusedSAM(groups, rho=0.4, direction="momentum", backend=backend, lr=0.13, momentum=0.9)
    opt.step(quadratic(params))
    w = [x.detach().clone() for x in params]
    opt.first_step()
    assert float((params[0].detach() - w[0]).norm()) == pytest.approx(0.4, rel=1e-9)
    assert_same_bits(params[1:], w[1:])
    opt.restore()
    assert_same_bits(params, w)


def test_an_infinite_momentum_moves_nothing(backend: str, device: str) -> None:
    """No scaler lets it happen, and it is no overflow of a gradient."""
    params = leaves(9, LARGE, device=device)
    opt = FusedSAM(params, rho=0.4, direction="momentum", backend=backend, lr=0.13, momentum=0.9)
    opt.step(quadratic(params))
    w = snapshot(params)
    opt.state[params[0]]["momentum_buffer"].fill_(math.inf)
    opt.first_step()
    assert_same_bits(params, w)
    opt.restore()


def test_the_last_report(backend: str, device: str) -> None:
    params = leaves(9, device=device, dtype=torch.float64)
    options = {"direction": "momentum", "backend": backend, "lr": 0.13, "momentum": 0.9, "telemetry": True}
    opt = FusedSAM(params, rho=RHO, **options)
    opt.step(quadratic(params))
    m = opt.state[params[0]]["momentum_buffer"].clone()
    loss = opt.step(quadratic(params))
    assert opt.last.loss is None
    assert float(opt.last.loss_perturbed) == float(loss.detach())
    assert float(opt.last.grad_norm) == pytest.approx(float(m.norm()), rel=1e-12)
    assert float(opt.last.radius) == pytest.approx(RHO, rel=1e-9)
    assert float(opt.last.cosine) == pytest.approx(1, abs=1e-3)  # the quadratic's gradient hardly turns


def test_with_interval_it_is_the_base_in_between(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device)
    twins = [x.detach().clone().requires_grad_() for x in params]
    opt = FusedSAM(params, rho=0.4, direction="momentum", interval=3, backend=backend, **HYPER)
    plain = torch.optim.SGD(twins, foreach=False, **HYPER)
    for _ in range(3):  # the first is perturbed, by nothing
        opt.step(quadratic(params))
        plain.zero_grad()
        quadratic(twins)()
        plain.step()
    assert_bits_of_torch(params, twins)
    assert opt.perturb_next


def test_another_base_with_momentum_and_one_without(backend: str, device: str) -> None:
    net, data = small_net(device=device), batches(2, device=device)
    opt = FusedSAM(net.parameters(), torch.optim.NAdam, direction="momentum", backend=backend, lr=0.013)
    for batch in data:
        opt.step(closure_for(net, batch))
    w = [x.detach().clone() for x in net.parameters()]
    opt.first_step()
    assert any(not torch.equal(x, y) for x, y in zip(net.parameters(), w))
    opt.restore()
    layer = nn.Linear(3, 2, device=device)
    opt = FusedSAM(layer.parameters(), torch.optim.Adagrad, direction="momentum", backend=backend, lr=0.013)
    with pytest.raises(RuntimeError, match="needs a base optimizer that keeps one of"):
        opt.step(lambda: layer(torch.ones(3, device=device)).sum().backward())
