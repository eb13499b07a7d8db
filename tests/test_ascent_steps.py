"""Several steps of projected gradient ascent, ``ascent_steps`` (appendix C.6 of the paper)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    FEW_SIZES,
    HYPER,
    LARGE,
    RHO,
    assert_all_close,
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
    zeroing,
)
from torch import Tensor

from fused_sam import FusedSAM, ReferenceSAM

NORMS = [1.0, 1.5, 2.0, 3.0, math.inf]
NEIGHBOURHOODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adaptive": {"adaptive": True, "eta": 0.013},
    "weights": {"adaptive": "weights"},
    "decay": {"adaptive": True, "decay_in_ascent": True},
}


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize(("neighbourhood", "steps"), [*((name, 2) for name in NEIGHBOURHOODS), ("plain", 5)])
def test_a_trajectory_matches_the_float64_reference(
    p: float, neighbourhood: str, steps: int, backend: str, device: str
) -> None:
    net, data = small_net(device=device), batches(4, device=device)
    twin = copy.deepcopy(net)
    options = {"rho": 0.3, "p": p, "ascent_steps": steps, **NEIGHBOURHOODS[neighbourhood], **HYPER}
    opt = FusedSAM(net.parameters(), backend=backend, **options)
    reference = ReferenceSAM(twin.parameters(), **options)
    for batch in data:
        calls = []
        loss = opt.step(lambda batch=batch, calls=calls: calls.append(1) or closure_for(net, batch)())
        assert len(calls) == steps + 1
        expected = reference.step(zeroing(twin, closure_for(twin, batch)))
        assert_all_close([loss.detach()], [expected.detach()])
    assert_all_close(net.parameters(), twin.parameters())
    assert_all_close(buffers(opt), buffers(reference))


@pytest.mark.parametrize("p", NORMS)
def test_groups_of_their_own_radius_and_one_that_stays(p: float, backend: str, device: str) -> None:
    """Also a group with rho = 0, and the two-call form, which asks perturb_next."""

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [
            {"params": params[0:2], "rho": 0.3},
            {"params": params[2:4], "rho": 0.0},
            {"params": params[4:6], "rho": 0.11, "adaptive": True},
            {"params": params[6:], "perturb": False},
        ]

    start = [torch.randn(n, device=device, dtype=torch.float64) for n in FEW_SIZES]
    params, twins = [x.clone() for x in start], [x.clone() for x in start]
    opt = FusedSAM(groups(params), p=p, ascent_steps=3, backend=backend, **HYPER)
    reference = ReferenceSAM(groups(twins), p=p, **HYPER)
    for _ in range(2):
        while opt.perturb_next:
            g = [torch.randn(n, device=device, dtype=torch.float64) for n in FEW_SIZES]
            for optimizer, tensors in ((opt, params), (reference, twins)):
                set_grads(tensors, g)
                optimizer.first_step(zero_grad=True)
            assert_all_close(params, twins)
        g = [torch.randn(n, device=device, dtype=torch.float64) for n in FEW_SIZES]
        set_grads(params, g)
        set_grads(twins, g)
        opt.step()
        reference.second_step()
        assert_all_close(params, twins)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("p", [2.0, 3.0, math.inf])
def test_e_never_leaves_the_ball(dtype: torch.dtype, p: float, backend: str, device: str) -> None:
    """Three gradients of one direction, and the radius of one; as stored, which may be half an ulp of w off."""
    params = leaves(9, LARGE, 67, device=device, dtype=dtype)
    w = [x.detach().double().clone() for x in params]
    opt = FusedSAM(params, rho=3.0, p=p, ascent_steps=3, backend=backend, lr=0.13)
    for _ in range(3):
        set_grads(params, [torch.ones_like(x) for x in params])
        opt.first_step(zero_grad=True)
        e = torch.cat([x.detach().double() - y for x, y in zip(params, w)])
        rounding = torch.cat([x.detach().double().abs().maximum(y.abs()) for x, y in zip(params, w)])
        slack = float(torch.linalg.vector_norm(rounding * torch.finfo(dtype).eps, ord=p)) + 1e-6
        assert float(torch.linalg.vector_norm(e, ord=p)) == pytest.approx(3.0, abs=slack)
    opt.restore()


def test_gradients_that_come_and_go_between_the_steps(backend: str, device: str) -> None:
    """A parameter whose first gradient comes late moves from then on; one that loses it stays where it is."""
    start = [torch.randn(n, device=device, dtype=torch.float64) for n in (9, 67, LARGE)]
    params, twins = [x.clone() for x in start], [x.clone() for x in start]
    opt = FusedSAM(params, rho=0.4, ascent_steps=3, backend=backend, **HYPER)
    reference = ReferenceSAM(twins, rho=0.4, **HYPER)
    for pattern in ((0, 1), (0, 2), (1, 2)):
        g = [torch.randn_like(x) if i in pattern else None for i, x in enumerate(params)]
        for optimizer, tensors in ((opt, params), (reference, twins)):
            set_grads(tensors, g)
            optimizer.first_step(zero_grad=True)
        assert_all_close(params, twins)
    opt.restore()
    assert_same_bits(params, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_with_masters_it_is_the_ascent_of_fp32_weights(dtype: torch.dtype, backend: str, device: str) -> None:
    """Rounded after each step; a parameter of which the first gradient comes late, too."""
    params = leaves(9, LARGE, 67, device=device, dtype=dtype)
    twins = [x.detach().float() for x in params]
    w = snapshot(params)
    opt = FusedSAM(params, rho=0.4, ascent_steps=3, master_weights=True, backend=backend, lr=0.13)
    wide = FusedSAM(twins, rho=0.4, ascent_steps=3, backend=backend, lr=0.13)
    for pattern in ((0, 1), (0, 2), (1, 2)):
        g = [torch.randn_like(x) if i in pattern else None for i, x in enumerate(params)]
        for optimizer, tensors in ((opt, params), (wide, twins)):
            set_grads(tensors, g)
            optimizer.first_step(zero_grad=True)
        for x, y in zip(params, twins):
            # e is read back from the rounded weights, so that roundings of two steps may meet.
            torch.testing.assert_close(x.float(), y, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    opt.restore()
    assert_same_bits(params, w)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_norm_that_says_nothing_leaves_e_as_it_is(value: float, backend: str, device: str) -> None:
    params = leaves(9, 67, device=device)
    opt = FusedSAM(params, rho=0.4, ascent_steps=3, backend=backend, lr=0.13)
    set_grads(params, [torch.randn_like(x) for x in params])
    opt.first_step(zero_grad=True)
    moved = snapshot(params)
    set_grads(params, [torch.full_like(x, value) for x in params])
    opt.first_step(zero_grad=True)
    for x, before in zip(params, moved, strict=True):
        before = torch.frombuffer(bytearray(before), dtype=x.dtype).to(device)
        torch.testing.assert_close(x.detach(), before, rtol=1e-6, atol=1e-7)
    opt.restore()


def test_the_calls_of_a_step_are_counted(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, ascent_steps=2, backend=backend, lr=0.13)
    quadratic(params)()
    opt.first_step(zero_grad=True)
    assert opt.perturbed
    assert opt.perturb_next
    with pytest.raises(RuntimeError, match=r"step\(\) needs first_step\(\) before it"):
        opt.step()
    quadratic(params)()
    opt.first_step(zero_grad=True)
    assert not opt.perturb_next
    with pytest.raises(RuntimeError, match="perturbed already"):
        opt.first_step()
    quadratic(params)()
    opt.step()
    assert opt.perturb_next


def test_copies_and_the_last_report(backend: str, device: str) -> None:
    params = leaves(9, device=device, dtype=torch.float64)
    opt = copy.deepcopy(FusedSAM(params, rho=RHO, ascent_steps=2, backend=backend, lr=0.13, telemetry=True))
    params = opt.param_groups[0]["params"]
    opt.step(quadratic(params))
    w = float(params[0].detach().norm())
    assert float(opt.last.radius) == pytest.approx(RHO, rel=1e-9)
    assert float(opt.last.grad_norm) > 3 * w  # of the last step, taken at w + e
