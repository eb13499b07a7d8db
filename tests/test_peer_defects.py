"""Defects found in other SAM implementations, one test each, numbered as in a survey made before this project.

Not here: B1 (m-sharpness under DistributedDataParallel), B12 (LookSAM), B13 in its FriendlySAM and BSAM parts
and B26 (factor_sam), all algorithms or settings this package does not have, and B29 (argument parsing of an
example script).
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import (
    FLOAT64_RTOL,
    HYPER,
    LARGE,
    LENGTH_RTOL,
    RHO,
    assert_same_bits,
    batches,
    bits,
    buffers,
    closure_for,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
)
from torch import Tensor, nn

from fused_sam import FusedSAM
from fused_sam.batchnorm import first_pass_only, frozen_statistics


def displacement(params: list[Tensor], w: list[Tensor]) -> Tensor:
    return torch.cat([(p.detach() - start).double().reshape(-1) for p, start in zip(params, w, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_b02_restoring_is_exact(dtype: torch.dtype, backend: str, device: str) -> None:
    """Adding and subtracting e changed 62 % of the weights over 1000 steps at lr = 0."""
    params = leaves(67, LARGE, device=device, dtype=dtype)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.0)
    w = snapshot(params)
    for _ in range(1000):
        opt.step(quadratic(params))
    assert_same_bits(params, w)


def test_b03_state_dict_holds_the_momentum_and_no_scratch(backend: str, device: str) -> None:
    """A resumed run was off by 3.4 % after a step: the state held copies of the weights, not the momentum."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    opt.step(quadratic(params))
    state = opt.state_dict()["state"]
    assert list(state) == [0]
    assert list(state[0]) == ["momentum_buffer"]
    assert bits(state[0]["momentum_buffer"]) != bits(params[0])


def test_b04_storage_is_never_swapped(backend: str, device: str) -> None:
    """`p.data = old_p` gave 4 pointers in 3 steps and left flat-buffer views behind, perturbed."""
    flat = torch.randn(67, device=device)
    p = nn.Parameter(flat[:])
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.13)
    for _ in range(3):
        opt.step(quadratic([p]))
        assert p.data_ptr() == flat.data_ptr()
        assert bits(p) == bits(flat)


def test_b05_a_gradient_only_in_pass_1_is_restored(backend: str, device: str) -> None:
    """Such a parameter stayed at w + e."""
    params = leaves(LARGE, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w = snapshot(params)
    opt.step(lambda: quadratic(params if not opt.perturbed else params[:1])())
    assert bits(params[1]) == w[1]
    assert bits(params[0]) != w[0]


def test_b06_a_gradient_only_in_pass_2_gets_a_plain_step(backend: str, device: str) -> None:
    """It raised KeyError, or subtracted the e of an older step: 1.0 -> 0.796 -> 0.592."""
    params = leaves(LARGE, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    opt.step(quadratic(params))
    w = [p.detach().clone() for p in params]
    for _ in range(2):
        opt.step(lambda: quadratic(params if opt.perturbed else params[:1])())
    torch.testing.assert_close(params[1].detach(), w[1] * (1 - 3 * 0.13) ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_b07_zero_gradients_are_no_nan(dtype: torch.dtype, adaptive: bool, backend: str, device: str) -> None:
    """0 / 0; in fp16 also where 1e-12 was added, since it is 0 there."""
    params = leaves(9, device=device, dtype=dtype)
    opt = FusedSAM(params, rho=RHO, adaptive=adaptive, backend=backend, lr=0.13)
    w = snapshot(params)

    def closure() -> None:
        params[0].grad = torch.zeros_like(params[0])

    opt.step(closure)
    assert_same_bits(params, w)


@pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)
def test_b08_non_finite_gradients_do_not_destroy_the_weights(bad: float, backend: str, device: str) -> None:
    """w + inf - inf."""
    params = leaves(9, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    w = snapshot(params)
    quadratic(params)()
    params[1].grad[7] = bad
    opt.first_step(zero_grad=True)
    opt.restore()
    assert_same_bits(params, w)


def test_b09_both_passes_run_in_the_mode_of_the_model(backend: str, device: str) -> None:
    """The first pass ran in inference mode, the second updated the batch statistics."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(device)
    opt = FusedSAM(net.parameters(), rho=RHO, backend=backend, lr=0.13)
    modes: list[bool] = []

    def closure() -> Tensor:
        modes.append(net.training)
        loss = net(torch.randn(5, 3, device=device)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert modes == [True, True]


def test_b10_the_model_is_really_perturbed(backend: str, device: str) -> None:
    """The perturbed tensors were new objects that the model never saw: two passes for one of plain SGD."""
    net = small_net(device=device)
    (batch,) = batches(1, device=device)
    params, logits = list(net.parameters()), []
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)

    def closure() -> Tensor:
        out = net(batch[0])
        logits.append(out.detach())
        if opt.perturbed:
            lengths.append(float(displacement(params, w).norm()))
        loss = nn.functional.cross_entropy(out, batch[1])
        loss.backward()
        return loss

    lengths: list[float] = []
    opt.step(closure)
    assert lengths == [pytest.approx(RHO, rel=1e-9)]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-4


def test_b11_repeated_ascent_leaves_nothing_displaced(backend: str, device: str) -> None:
    """Accumulation by calling first_step again and again moved w by 0.098 at lr = 0."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.0)
    w = snapshot(params)
    for _ in range(4):
        quadratic(params)()
        if opt.perturbed:
            with pytest.raises(RuntimeError):
                opt.first_step()
        else:
            opt.first_step()
    opt.step()
    assert_same_bits(params, w)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam], ids=["SGD", "Adam", "NAdam"])
def test_b13_and_b27_one_set_of_groups_for_wrapper_and_base(
    base: type[torch.optim.Optimizer], backend: str, device: str
) -> None:
    """The schedule changed the wrapper's groups and never reached the base: no learning, or KeyError: lr."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, base, rho=RHO, backend=backend, lr=0.13)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: float(epoch == 0))
    opt.step(quadratic(params))
    schedule.step()
    w = snapshot(params)
    opt.step(quadratic(params))
    assert_same_bits(params, w)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.param_groups[0]["lr"] = 0.5
    opt.step(quadratic(params))
    assert snapshot(params) != w


def test_b14_the_radius_is_rho_however_many_tensors_there_are(backend: str, device: str) -> None:
    """Norms per tensor made the radius grow with the root of their number; adaptive had no norm at all."""
    for adaptive in (False, True):
        params = leaves(*[5] * 40, device=device, dtype=torch.float64)
        w = [p.detach().clone() for p in params]
        opt = FusedSAM(params, rho=RHO, adaptive=adaptive, backend=backend, lr=0.13)
        set_grads(params, [torch.randn(5, dtype=torch.float64) * 10.0**i for i in range(-20, 20)])
        opt.first_step()
        e = displacement(params, w)
        relative = e / torch.cat(w).abs() if adaptive else e
        assert float(relative.norm()) == pytest.approx(RHO, rel=1e-9)


def test_b15_a_closure_through_the_scaler_is_refused(backend: str, device: str) -> None:
    """The second, still scaled gradient was applied: a step of length 1.8e3 at lr 0.1."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    w = snapshot(params)

    def closure() -> Tensor:
        loss = scaler.scale(params[0].square().sum())
        loss.backward()
        return loss

    closure()
    with pytest.raises(RuntimeError):
        scaler.step(opt, closure)
    assert_same_bits(params, w)


def test_b16_overflow_of_pass_1_skips_the_step(backend: str, device: str) -> None:
    """Only the second pass was checked."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    w = snapshot(params)
    scaler.scale(params[0].square().sum()).backward()
    params[0].grad.fill_(math.inf)
    opt.first_step(zero_grad=True)
    scaler.scale(params[0].square().sum()).backward()
    scaler.step(opt)
    assert_same_bits(params, w)
    assert buffers(opt) == [None]


@pytest.mark.parametrize("momentum", [0.37, None], ids=["momentum", "cumulative"])
def test_b17_freezing_batchnorm_twice_loses_nothing(momentum: float | None, backend: str) -> None:
    """Freezing by momentum = 0 lost the momentum when nested and counted batches twice."""
    bn = nn.BatchNorm1d(3, momentum=momentum)
    opt = FusedSAM(bn.parameters(), rho=RHO, backend=backend, lr=0.13)
    first_pass_only(bn, opt)
    plain = copy.deepcopy(nn.BatchNorm1d(3, momentum=momentum))
    for _ in range(3):
        x = torch.randn(8, 3)
        opt.step(lambda x=x: bn(x).square().sum().backward())
        with frozen_statistics(bn), frozen_statistics(bn):
            bn(x)
        plain(x)
    assert bn.momentum == momentum
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(bn.named_buffers())[name], value, rtol=0, atol=0)


def test_b18_fp16_gradients_with_a_norm_beyond_fp16(backend: str, device: str) -> None:
    """A norm above 65504 was inf, and SAM silently plain SGD."""
    params = leaves(70_000, device=device, dtype=torch.float16)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=20.0, backend=backend, lr=0.13)
    params[0].grad = torch.full_like(params[0], 300.0)
    opt.first_step()
    assert float(displacement(params, w).norm()) == pytest.approx(20.0, rel=1e-2)


def test_b18_bf16_weights_move_as_far_as_bf16_can_say(backend: str, device: str) -> None:
    """Most elements cannot move; those that can must move to the nearest bf16 of w + e, not be truncated."""
    params = leaves(100_000, device=device, dtype=torch.bfloat16)
    params[0].data.mul_(0.05)
    w, g = params[0].detach().double(), torch.randn(100_000, device=device).bfloat16()
    opt = FusedSAM(params, rho=0.05, backend=backend, lr=0.13)
    params[0].grad = g.clone()
    opt.first_step()
    ideal = w + 0.05 * g.double() / g.double().norm()
    nearest = ideal.bfloat16()
    same = (params[0].detach() == nearest).double().mean()
    assert float(same) > 0.999  # ties that fp32 rounding decides the other way


@pytest.mark.parametrize("scale", [2e-12, 2e-25, 1e-30, 1e20, 1e30], ids=str)
def test_b19_no_epsilon_and_no_overflow_in_the_norm(scale: float, backend: str, device: str) -> None:
    """1e-12 added to a norm of 2e-12 gave 0.033 instead of 0.05; fp32 squares underflowed at 1e-25."""
    params = leaves(130, device=device)
    params[0].data.zero_()
    opt = FusedSAM(params, rho=0.05, backend=backend, lr=0.13)
    g = torch.randn(130)
    params[0].grad = (g * (scale / g.norm())).to(device)
    opt.first_step()
    assert float(params[0].detach().double().norm()) == pytest.approx(0.05, rel=LENGTH_RTOL[torch.float32])


def test_b20_an_exception_in_the_second_closure_leaves_w(backend: str, device: str) -> None:
    """The model stayed at w + e, and so it did when the loop skipped backward on a non-finite loss."""
    params = leaves(LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w = snapshot(params)

    def closure() -> Tensor | None:
        if opt.perturbed and raising:
            raise KeyboardInterrupt
        return None if opt.perturbed else quadratic(params)()

    raising = True
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_same_bits(params, w)
    raising = False
    opt.step(closure)
    assert_same_bits(params, w)


@pytest.mark.parametrize("already", [False, True], ids=["clean", "after a backward"])
def test_b21_each_pass_sees_its_gradient_once(already: bool, backend: str, device: str) -> None:
    """The documented loops of others ran backward before step(closure), and gradients came out doubled."""
    params = leaves(9, device=device, dtype=torch.float64)
    w = params[0].detach().clone()
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    if already:
        quadratic(params)()
    opt.step(quadratic(params))
    expected = w - 0.13 * 3 * (w + RHO * w / w.norm())
    torch.testing.assert_close(params[0].detach(), expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_b22_complex_parameters_are_refused(adaptive: bool, backend: str, device: str) -> None:
    """p^2 was taken for |p|^2: a cosine of 0.52 with the ascent direction. Refused until it is right."""
    p = torch.randn(9, dtype=torch.complex64, device=device)
    p.grad = torch.randn_like(p)
    w = bits(torch.view_as_real(p))
    with pytest.raises((TypeError, ValueError), match="complex"):
        FusedSAM([p], rho=RHO, adaptive=adaptive, backend=backend, lr=0.13).first_step()
    assert bits(torch.view_as_real(p)) == w


def test_b23_tensors_are_matched_by_identity_not_by_count(backend: str, device: str) -> None:
    """A running index over the tensors that have a gradient gave one tensor's e to another."""
    params = leaves(*[LARGE] * 4, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    w = [p.detach().clone() for p in params]
    set_grads(params, [None, torch.ones(LARGE), None, torch.ones(LARGE)])
    opt.first_step(zero_grad=True)
    set_grads(params, [torch.ones(LARGE), None, torch.ones(LARGE), None])
    opt.step()
    for p, start, stepped in zip(params, w, (True, False) * 2, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.13 * stepped, rtol=0 if not stepped else 1e-6, atol=1e-7)


def test_b24_rho_of_a_group_scales_its_share_of_one_global_norm(backend: str, device: str) -> None:
    """Two groups with rho 0.05 and 0.1 had radii 0.035 and 0.071, and nobody said why."""
    params = leaves(9, 130, device=device, dtype=torch.float64)
    groups: list[Any] = [{"params": params[:1], "rho": 0.05}, {"params": params[1:], "rho": 0.1}]
    opt = FusedSAM(groups, backend=backend, lr=0.13)
    w = [p.detach().clone() for p in params]
    quadratic(params)()
    norm = torch.cat(w).norm()
    opt.first_step()
    for p, start, rho in zip(params, w, (0.05, 0.1), strict=True):
        torch.testing.assert_close(p.detach() - start, rho * start / norm, rtol=1e-9, atol=1e-12)


def test_b25_frozen_parameters_are_not_touched_even_if_all_are(backend: str, device: str) -> None:
    """requires_grad was switched by the optimizer, which crashed with everything frozen."""
    params = [torch.randn(9, device=device) for _ in range(2)]
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w = snapshot(params)
    opt.step(lambda: 0.0)
    opt.first_step()
    opt.step()
    assert_same_bits(params, w)
    assert not any(p.requires_grad for p in params)


def test_b28_weights_are_at_w_between_steps_and_not_saved_in_between(backend: str, device: str) -> None:
    """Stored weights were perturbed between the steps, so evaluation gave another loss; one group only."""
    net, (batch,) = small_net(device=device), batches(1, device=device)
    params = list(net.parameters())
    opt = FusedSAM([{"params": params[:2]}, {"params": params[2:]}], rho=0.5, backend=backend, lr=0.0)
    w, at_w = snapshot(params), closure_for(net, batch)().item()
    for _ in range(3):
        opt.step(closure_for(net, batch))
        assert_same_bits(params, w)
        assert closure_for(net, batch)().item() == at_w
        opt.first_step(zero_grad=True)
        assert snapshot(params) != w
        with pytest.raises(RuntimeError, match="perturbed"):
            opt.state_dict()
        opt.step()
        assert_same_bits(params, w)
