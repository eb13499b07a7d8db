"""General p (eq. 2 of the paper), eta of ASAM, and groups that stay at w, on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import Array, assert_within_ulp, exact
from emulated_tests import NATIVE
from helpers import (
    DTYPES,
    FEW_SIZES,
    HYPER,
    LARGE,
    PERTURB_ULP,
    RHO,
    ROUNDED_ONCE_ULP,
    SIXTEEN_BIT,
    Lists,
    assert_all_close,
    assert_same_bits,
    batches,
    bits,
    buffers,
    closure_for,
    ids,
    leaves,
    scalar,
    small_net,
    snapshot,
    strided_pairs,
    zeroing,
)
from torch import Tensor

from fused_sam import FusedSAM, ReferenceSAM, ops
from fused_sam.ops import AscentGroup

every_p = pytest.mark.parametrize("p", [1.0, 1.05, 1.5, 2.0, 3.0, 10.0, math.inf], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
ETA = 0.03


def dual(p: float) -> float:
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def scales(params: list[Tensor], adaptive: bool, eta: float) -> list[Array]:
    return [np.abs(exact(w)) + eta if adaptive else np.ones_like(exact(w)) for w in params]


def exact_q_norm(xs: list[Array], q: float) -> float:
    flat = np.abs(np.concatenate([x.reshape(-1) for x in xs]))
    peak = flat.max(initial=0)
    if q == math.inf or peak == 0:
        return float(peak)
    return float(peak * ((flat / peak) ** np.longdouble(q)).sum() ** (1 / np.longdouble(q)))


def exact_displacement(xs: list[Array], ts: list[Array], rho: float, p: float, total: float) -> list[Array]:
    """With the norm as it was computed: in fp64 its own error would be most of what is seen."""
    q = dual(p)
    if p == math.inf:
        return [rho * t * np.sign(x) for x, t in zip(xs, ts, strict=True)]
    if p > 1:
        power = np.longdouble(q) - 1
        return [rho * t * np.sign(x) * (np.abs(x) / total) ** power for x, t in zip(xs, ts, strict=True)]
    result = [np.zeros(x.shape, dtype=np.longdouble) for x in xs]
    i = int(np.argmax([np.abs(x).max(initial=0) for x in xs]))
    at = int(np.abs(xs[i]).argmax())
    result[i].reshape(-1)[at] = rho * ts[i].reshape(-1)[at] * np.sign(xs[i].reshape(-1)[at])
    return result


@pytest.mark.parametrize("p", [1.0, 1.05, 1.5, 3.0, 10.0, math.inf], ids=str)  # 2: test_ops.py
@every_dtype
@pytest.mark.parametrize(("adaptive", "swap"), [(False, False), (True, True)], ids=["sam-backup", "asam-swap"])
def test_norm_and_perturb(p: float, dtype: torch.dtype, adaptive: bool, swap: bool, backend: str, device: str) -> None:
    lists = Lists(FEW_SIZES, dtype, device)
    groups = [AscentGroup(len(FEW_SIZES), RHO, adaptive, ETA)]
    ts = scales(lists.params, adaptive, ETA)
    xs = [exact(g) * t for g, t in zip(lists.grads, ts, strict=True)]
    norm = ops.norm(lists.params, lists.grads, groups, backend=backend, p=p)
    if p == math.inf:
        assert norm is None
    else:
        assert float(norm.flatten()[0]) == pytest.approx(exact_q_norm(xs, dual(p)), rel=1e-12)
    old, old_bits = [exact(w) for w in lists.params], snapshot(lists.params)
    grads = snapshot(lists.grads)
    backups = lists.grads if swap else lists.backups
    ops.perturb(lists.params, lists.grads, backups, norm, groups, backend=backend, p=p)
    assert_same_bits(backups, old_bits, "backup")
    if not swap:
        assert snapshot(lists.grads) == grads
    limit = ROUNDED_ONCE_ULP if dtype in SIXTEEN_BIT else PERTURB_ULP
    if dtype == torch.float64 and 1 < p < 2:
        limit += dual(p) / 2  # half an ulp of |x| / norm, raised to the power like it
    displacement = exact_displacement(xs, ts, RHO, p, 0 if norm is None else norm.flatten()[0].item())
    for w, w_old, e in zip(lists.params, old, displacement, strict=True):
        largest = np.maximum(np.maximum(np.abs(w_old), np.abs(w_old + e)), np.abs(e))
        assert_within_ulp(w, w_old + e, largest, limit, "w + e")
    lists.check_neighbours()


@every_p
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300], ids=str)
def test_the_displacement_has_length_rho_in_the_p_norm(p: float, scale: float, backend: str, device: str) -> None:
    """From w = 0, for gradients of any scale: powers of 21 of 1e30 overflow nowhere."""
    grads = [(torch.randn(n, dtype=torch.float64) * scale).to(device) for n in (1009, 3, 130)]
    params = [torch.zeros_like(g) for g in grads]
    groups = [AscentGroup(3, RHO, False)]
    norm = ops.norm(params, grads, groups, backend=backend, p=p)
    ops.perturb(params, grads, [torch.empty_like(w) for w in params], norm, groups, backend=backend, p=p)
    assert exact_q_norm([exact(w) for w in params], p) == pytest.approx(RHO, rel=1e-12)


def test_p_1_moves_the_first_of_the_largest(backend: str, device: str) -> None:
    grads = [torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, -5.0, 5.0]), torch.tensor([-5.0, 1.0])]
    grads = [g.to(device) for g in grads]
    params = [torch.zeros_like(g) for g in grads]
    groups = [AscentGroup(1, 0.1, False), AscentGroup(2, 0.3, False)]
    norm = ops.norm(params, grads, groups, backend=backend, p=1)
    assert norm.tolist() == [5.0, 1.0, 1.0]
    ops.perturb(params, grads, [torch.empty_like(w) for w in params], norm, groups, backend=backend, p=1)
    expected = [torch.zeros(3), torch.tensor([0.0, -0.3, 0.0]), torch.zeros(2)]
    assert_same_bits(params, expected)


def test_p_1_over_tensors_of_several_layouts(backend: str, device: str) -> None:
    """The calls for each layout count their own tensors, and one element of one of them moves."""
    for position in range(3):
        params = [torch.zeros(9, device=device), torch.zeros(6, 4, device=device)[:, 1], torch.zeros(7, device=device)]
        grads = [torch.rand(w.shape, device=device) for w in params]
        grads[position][2] = -3.0
        groups = [AscentGroup(3, RHO, False)]
        norm = ops.norm(params, grads, groups, backend=backend, p=1)
        ops.perturb(params, grads, [torch.empty_like(w) for w in params], norm, groups, backend=backend, p=1)
        for i, w in enumerate(params):
            assert w.tolist() == [
                -scalar(RHO, device).float().item() * (i == position and k == 2) for k in range(len(w))
            ]


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_of_an_objective_to_be_maximised_e_leads_down(p: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """The bits of minimising its negative: e, weights and momentum."""
    params = leaves(9, LARGE, 67, 0, device=device, dtype=dtype)
    twins = [w.detach().clone().requires_grad_() for w in params]
    options = {"rho": 0.3, "p": p, "adaptive": True, "eta": ETA, "decay_in_ascent": True, "backend": backend, **HYPER}
    upwards, downwards = FusedSAM(params, maximize=True, **options), FusedSAM(twins, **options)
    for _ in range(2):
        for step in ("first_step", "step"):
            for w, twin in zip(params, twins, strict=True):
                w.grad = torch.randn_like(w)
                twin.grad = -w.grad
            getattr(upwards, step)()
            getattr(downwards, step)()
            assert_same_bits(params, twins)
    assert_same_bits(*([m for m in buffers(opt) if m is not None] for opt in (upwards, downwards)))


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0], ids=str)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf], ids=str)
def test_nothing_moves_without_a_positive_finite_norm(p: float, bad: float, backend: str, device: str) -> None:
    lists = Lists(FEW_SIZES, torch.float32, device)
    if bad == 0.0:
        for g in lists.grads:
            g.zero_()
    else:
        lists.grads[4][7] = bad
    old = snapshot(lists.params)
    groups = [AscentGroup(len(FEW_SIZES), RHO, False)]
    norm = ops.norm(lists.params, lists.grads, groups, backend=backend, p=p)
    assert not 0 < float(norm.flatten()[0]) < math.inf
    ops.perturb(lists.params, lists.grads, lists.backups, norm, groups, backend=backend, p=p)
    assert_same_bits(lists.params, old, "param")
    assert_same_bits(lists.backups, old, "backup")


def test_p_inf_moves_neither_zeros_nor_nan(backend: str, device: str) -> None:
    w = torch.ones(40, device=device)
    g = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -3.0] + [2.0] * 33, device=device)
    ops.perturb([w], [g], [torch.empty_like(w)], None, [AscentGroup(1, 0.25, False)], backend=backend, p=math.inf)
    assert w.tolist() == [1.0, 1.0, 1.0, 1.25, 0.75, 1.25, 0.75] + [1.25] * 33


@pytest.mark.parametrize("p", [1.0, 1.5, math.inf], ids=str)
def test_strided_tensors(p: float, backend: str, device: str) -> None:
    for name, w, g in strided_pairs(torch.float32, device):
        if "expanded" in name and p == 1:
            continue  # all elements are equally large, and which is the first depends on the layout
        old, old_bits = exact(w), bits(w)
        groups = [AscentGroup(1, RHO, True, ETA)]
        ts = scales([w], True, ETA)
        norm, backup = ops.norm([w], [g], groups, backend=backend, p=p), torch.empty_like(w)
        (e,) = exact_displacement([exact(g) * ts[0]], ts, RHO, p, 0 if norm is None else norm.flatten()[0].item())
        ops.perturb([w], [g], [backup], norm, groups, backend=backend, p=p)
        assert_within_ulp(w, old + e, np.abs(old) + np.abs(e), PERTURB_ULP, name)
        ops.restore([w], [backup], backend=backend)
        assert bits(w) == old_bits


def test_a_norm_that_is_not_of_this_p_is_refused(backend: str, device: str) -> None:
    w, g = torch.ones(3, device=device), torch.ones(3, device=device)
    groups = [AscentGroup(1, RHO, False)]
    for p, norm in (
        (1, scalar(1.0, device)),
        (2, None),
        (2, torch.ones(3, dtype=torch.float64)),
        (math.inf, scalar(1.0, device)),
    ):
        with pytest.raises(ValueError, match="Invalid norm"):
            ops.perturb([w], [g], [torch.empty_like(w)], norm, groups, backend=backend, p=p)
    assert w.tolist() == [1.0] * 3


@pytest.mark.parametrize("p", [1.0, 1.5, 4.0, math.inf], ids=str)  # 2: test_parity.py
@pytest.mark.parametrize("adaptive", [False, "weights"], ids=str)
def test_trajectories_follow_the_reference(p: float, adaptive: bool | str, backend: str, device: str) -> None:
    net, twin = small_net(device=device), small_net(device=device)
    twin.load_state_dict(net.state_dict())
    options: dict[str, Any] = {"rho": RHO, "adaptive": adaptive, "p": p, "eta": ETA, **HYPER}
    ours, reference = FusedSAM(net.parameters(), backend=backend, **options), ReferenceSAM(twin.parameters(), **options)
    for batch in batches(6, device=device):
        ours.step(closure_for(net, batch))
        reference.step(zeroing(twin, closure_for(twin, batch)))
    assert_all_close([*net.parameters(), *buffers(ours)], [*twin.parameters(), *buffers(reference)])


@pytest.mark.parametrize("p", [2.0, math.inf, 1.5], ids=str)
@pytest.mark.parametrize("zero_grad", [False, True], ids=["backup", "swap"])
def test_groups_that_stay_at_w(p: float, zero_grad: bool, backend: str, device: str) -> None:
    """They count in no norm; their gradients of pass 2 update them like all others."""
    sizes = (7, LARGE, 33, LARGE)
    start = leaves(*sizes, device=device, dtype=torch.float64)
    ours, theirs = ([w.detach().clone().requires_grad_() for w in start] for _ in range(2))

    def groups(ps: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": ps[:1]}, {"params": ps[1:3], "perturb": False}, {"params": ps[3:], "rho": 0.2}]

    options = {"rho": RHO, "p": p, **HYPER}
    optimizer, reference = FusedSAM(groups(ours), backend=backend, **options), ReferenceSAM(groups(theirs), **options)
    for _ in range(4):
        for o, ps in ((optimizer, ours), (reference, theirs)):
            for w in ps:
                w.grad = 3 * w.detach()
            before = snapshot(ps[1:3])
            o.first_step(zero_grad=zero_grad)
            assert snapshot(ps[1:3]) == before
            assert all((w.grad is None) == zero_grad for w in ps)
            for w in ps:
                w.grad = 3 * w.detach()
            o.second_step(zero_grad=True)
    assert_all_close([*ours, *buffers(optimizer)], [*theirs, *buffers(reference)])


def test_gradients_of_groups_that_stay_come_back_when_the_ascent_fails(backend: str, device: str) -> None:
    params = leaves(9, 130, device=device)
    optimizer = FusedSAM([{"params": params[:1], "perturb": False}, {"params": params[1:]}], lr=0.1, backend=backend)
    for w in params:
        w.grad = torch.ones_like(w)
    grads = [w.grad for w in params]
    params[1].grad = torch.ones_like(params[1]).to_sparse()
    grads[1] = params[1].grad
    with pytest.raises(ValueError, match="layout"):
        optimizer.first_step(zero_grad=True)
    assert all(w.grad is g for w, g in zip(params, grads, strict=True))
    assert not optimizer.perturbed


@pytest.mark.parametrize("backend", [*NATIVE, "eager"])
@pytest.mark.parametrize(("p", "n", "x"), [(1.3, 16384, 0.7), (1.05, 20_000, 0.97)])
def test_small_powers_are_not_lost_beside_a_large_one(backend: str, p: float, n: int, x: float) -> None:
    """e is (|x| / norm)^(q-1): an error of the norm grows q - 1 times, to 2,052 ulp where terms were just added."""
    g = torch.full((n,), x, dtype=torch.float64)
    g[0] = 1.0
    found = ops.norm([torch.zeros_like(g)], [g], [AscentGroup(1, RHO, False)], backend, p).item()
    q = dual(p)
    exactly = math.fsum([1.0, *[x**q] * (n - 1)]) ** (1 / q)
    assert found == pytest.approx(exactly, rel=8e-16)
