"""``max_grad_norm``, and clip_grad_norm_ called by the training loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import assert_within_ulp, exact
from helpers import (
    CLIP_RTOL,
    DTYPES,
    FLOAT64_RTOL,
    HYPER,
    LARGE,
    RHO,
    ROUNDED_ONCE_ULP,
    SIXTEEN_BIT,
    UPDATE_ULP,
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
    state_tensors,
)
from torch import Tensor, nn
from torch.amp import GradScaler

from fused_sam import FusedSAM, ReferenceSAM, ops

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, HYPER),
    "Adam": (torch.optim.Adam, {"lr": 0.013, "weight_decay": 0.017, "eps": 0.3}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.013, "weight_decay": 0.017, "eps": 0.3}),  # steps by itself
}
every_base = pytest.mark.parametrize("base", BASES)
MAX_NORM = 0.37


def make(params: Any, base: str, backend: str, **options: Any) -> FusedSAM:
    base_class, base_options = BASES[base]
    return FusedSAM(params, base_class, rho=RHO, backend=backend, **base_options, **options)


def factor(grads: list[Tensor], max_norm: float) -> float:
    """min(1, max_norm / (||g|| + 1e-6)), in Python floats."""
    norm = math.sqrt(math.fsum(x for g in grads for x in g.double().square().flatten().tolist()))
    return min(1.0, max_norm / (norm + 1e-6))


@pytest.mark.parametrize(("base", "clips"), [*((base, True) for base in BASES), ("SGD", False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_second_gradient_is_clipped_and_the_base_steps_with_it(
    base: str, dtype: torch.dtype, clips: bool, backend: str, device: str
) -> None:
    """p.grad is the clipped gradient; an optimizer that is given it makes the same step, bit for bit.

    But for 16-bit SGD and Adam: their kernels round the clipped gradient for p.grad only, and go on with it in fp32.
    """
    params = leaves(9, 67, LARGE, device=device, dtype=dtype)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, plain = make(params, base, backend, max_grad_norm=MAX_NORM if clips else 1e6), make(twins, base, backend)
    for _ in range(3):
        first, second = ([torch.randn(p.shape).to(p) for p in params] for _ in range(2))
        for o, tensors in ((opt, params), (plain, twins)):
            set_grads(tensors, first)
            o.first_step(zero_grad=True)
        set_grads(params, second)
        opt.step()
        c = factor(second, MAX_NORM if clips else 1e6)
        assert (c < 1) == clips
        for p, g in zip(params, second, strict=True):
            if dtype in (torch.float32, torch.float64) and clips:
                torch.testing.assert_close(p.grad, g * c, rtol=CLIP_RTOL + torch.finfo(dtype).eps, atol=0)
            elif clips:
                assert_within_ulp(p.grad, exact(g) * c, abs(exact(g) * c), ROUNDED_ONCE_ULP, "clipped gradient")
            else:
                assert_same_bits([p.grad], [g], "gradient below the bound")
        set_grads(twins, [p.grad for p in params])
        plain.step()
        if dtype in SIXTEEN_BIT and base != "NAdam":
            for p, q, g in zip(params, twins, second, strict=True):
                size = np.maximum(abs(exact(q)), abs(exact(g)))
                assert_within_ulp(p, exact(q), size, UPDATE_ULP, "updated weight")
                q.data.copy_(p)
            continue
        assert_same_bits(params, twins)
        assert_same_bits(state_tensors(opt), state_tensors(plain), "state")


@pytest.mark.parametrize("by_caller", [False, True], ids=["max_grad_norm", "clip_grad_norm_"])
def test_clipping_matches_the_float64_reference(by_caller: bool, backend: str, device: str) -> None:
    """torch's clip_grad_norm_ on the reference, and on ours: called between backward and step, it stays right."""
    net, data = small_net(device=device), batches(5, device=device)
    twin = copy.deepcopy(net)
    options: dict[str, Any] = {"rho": 0.4, "adaptive": True, **HYPER}
    optimizer = FusedSAM(net.parameters(), backend=backend, max_grad_norm=None if by_caller else MAX_NORM, **options)
    reference = ReferenceSAM(twin.parameters(), **options)
    for batch in data:
        for model, opt in ((net, optimizer), (twin, reference)):
            model.zero_grad()
            closure_for(model, batch)()
            opt.first_step(zero_grad=True)
            closure_for(model, batch)()
            if by_caller or opt is reference:
                assert float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)) > MAX_NORM
            opt.second_step()
    # The factor is in fp32; the network passes its rounding on.
    rtol = FLOAT64_RTOL if by_caller else 10 * CLIP_RTOL
    for p, w in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, w, rtol=rtol, atol=rtol)
    for m, expected in zip(buffers(optimizer), buffers(reference), strict=True):
        torch.testing.assert_close(m, expected, rtol=rtol, atol=rtol)


def test_one_norm_over_all_groups_of_which_an_adaptive_one_is_no_exception(backend: str, device: str) -> None:
    params = leaves(9, LARGE, 67, device=device)
    groups = [{"params": params[:1], "adaptive": True}, {"params": params[1:], "rho": 0.0}]
    opt = FusedSAM(groups, backend=backend, max_grad_norm=MAX_NORM, lr=0.13)
    second = [torch.randn(p.shape, device=device) for p in params[:2]]
    opt.zero_grad()
    quadratic(params)()
    opt.first_step(zero_grad=True)
    set_grads(params, [*second, None])
    opt.step()
    assert params[2].grad is None
    for p, g in zip(params, second):
        torch.testing.assert_close(p.grad, g * factor(second, MAX_NORM), rtol=3 * CLIP_RTOL, atol=0)


@every_base
@pytest.mark.parametrize("unscaled_by_caller", [False, True])
def test_under_a_scaler_the_norm_of_the_unscaled_gradient_counts(
    base: str, unscaled_by_caller: bool, backend: str, device: str
) -> None:
    """A loss scale that is a power of two changes no bit."""
    net, data = small_net(torch.float32, device), batches(4, torch.float32, device)
    twin = copy.deepcopy(net)
    opt = make(net.parameters(), base, backend, max_grad_norm=MAX_NORM)
    plain = make(twin.parameters(), base, backend, max_grad_norm=MAX_NORM)
    scaler = GradScaler(device, init_scale=2.0**10)
    for batch in data:
        for _ in range(2):
            scaler.scale(nn.functional.cross_entropy(net(batch[0]), batch[1])).backward()
            if not opt.perturbed:
                opt.first_step(zero_grad=True)
        if unscaled_by_caller:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        plain.step(closure_for(twin, batch))
        assert_same_bits((p.grad for p in net.parameters()), [p.grad for p in twin.parameters()], "p.grad")
        opt.zero_grad()
    assert_same_bits(net.parameters(), snapshot(twin.parameters()))
    assert_same_bits(state_tensors(opt), state_tensors(plain), "state")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_a_norm_that_is_not_finite_does_what_it_does_in_torch(bad: float, backend: str, device: str) -> None:
    """Infinite: its own gradient NaN, all others 0. NaN: all NaN."""
    params = leaves(9, LARGE, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, max_grad_norm=MAX_NORM, lr=0.13)
    quadratic(params)()
    opt.first_step(zero_grad=True)
    for tensors in (params, twins):
        set_grads(tensors, [torch.ones_like(p) for p in params])
        tensors[1].grad[500] = bad
    nn.utils.clip_grad_norm_(twins, MAX_NORM)
    opt.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


def test_fp64_gradients_whose_squares_leave_its_range_are_clipped(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device, dtype=torch.float64)
    opt = FusedSAM(params, rho=RHO, backend=backend, max_grad_norm=3e155, lr=0.13)
    for half in (opt.first_step, opt.step):
        set_grads(params, [torch.randn_like(p) * 1e160 for p in params])
        before = torch.cat([p.grad.flatten() for p in params])
        half()
    length = math.hypot(*before.tolist())
    after = torch.cat([p.grad.flatten() for p in params])
    torch.testing.assert_close(after, before / length * 3e155, rtol=CLIP_RTOL, atol=0)


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_no_gradients_and_zero_gradients_are_left_alone(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, max_grad_norm=MAX_NORM, lr=0.13)
    w = snapshot(params)
    for second in (None, torch.zeros(9)):
        set_grads(params, [torch.ones(9)])
        opt.first_step(zero_grad=True)
        set_grads(params, [second])
        opt.step()
        assert_same_bits(params, w)


def test_it_takes_one_norm_more_and_off_it_costs_nothing_as_telemetry(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused_sam.ascent.gradient.Probe", None)  # what measures for telemetry
    norm, calls = ops.Ascent.norm, []
    monkeypatch.setattr(ops.Ascent, "norm", lambda self: calls.append(1) or norm(self))
    for max_grad_norm, expected in ((None, 1), (MAX_NORM, 2)):
        params = leaves(9, 67, device=device)
        calls.clear()
        FusedSAM(params, backend=backend, max_grad_norm=max_grad_norm, lr=0.13).step(quadratic(params))
        assert len(calls) == expected


def test_a_gradient_refused_by_the_norm_restores_the_weights(backend: str, device: str) -> None:
    params = leaves(9, 67, device=device)
    named = [("fine", params[0]), ("culprit", params[1])]
    opt = FusedSAM(named, rho=RHO, backend=backend, max_grad_norm=MAX_NORM, **HYPER)
    w = snapshot(params)
    quadratic(params)()
    opt.first_step(zero_grad=True)
    params[0].grad, params[1].grad = torch.ones(9, device=device), torch.ones(67, device=device).to_sparse()
    with pytest.raises(ValueError, match="culprit"):
        opt.step()
    assert_same_bits(params, w)
    assert not opt.perturbed


EXPANDED = [*((base, {"max_grad_norm": MAX_NORM}) for base in BASES), ("SGD", {"interval": 2, "looksam_alpha": 0.37})]


@pytest.mark.parametrize(("base", "options"), EXPANDED, ids=str)
def test_an_expanded_gradient_is_used_like_any_other(
    base: str, options: dict[str, Any], backend: str, device: str
) -> None:
    """It cannot be written; the base steps with the new one all the same, and the other gradients are written."""
    params = leaves(9, 67, LARGE, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, plain = (make(x, base, backend, **options) for x in (params, twins))
    for _ in range(4):
        passes = (["first_step"] if opt.perturb_next else []) + ["step"]
        for call in passes:
            for p, q in zip(params, twins, strict=True):
                p.grad = torch.randn(1).to(device).expand(p.shape) if len(p) == 67 else torch.randn(len(p)).to(device)
                q.grad = p.grad.clone(memory_format=torch.contiguous_format)
            for o in (opt, plain):
                getattr(o, call)()
        assert_same_bits(params, twins)
        assert_same_bits(state_tensors(opt), state_tensors(plain), "state")
        assert_same_bits([params[0].grad, params[2].grad], [twins[0].grad, twins[2].grad], "gradient")
