"""norm, perturb and restore on every backend and dtype, against closed forms in extended precision."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from closed_forms import assert_within_ulp, exact, exact_ascent, exact_norm
from helpers import (
    BLOCK,
    DTYPES,
    FEW_SIZES,
    LENGTH_RTOL,
    NORM_RTOL,
    PERTURB_ULP,
    RHO,
    ROUNDED_ONCE_ULP,
    SIXTEEN_BIT,
    SIZES,
    Lists,
    ascent_groups,
    assert_same_bits,
    bits,
    ids,
    scalar,
    sgd_groups,
    snapshot,
    strided_pairs,
)
from torch import Tensor

from fused_sam import ops
from fused_sam.ops import AscentGroup

adaptive_or_not = pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


@pytest.fixture(autouse=True)
def _two_threads(_reproducible: None) -> None:
    torch.set_num_threads(2)


@every_dtype
@adaptive_or_not
def test_norm_matches_an_exact_sum(dtype: torch.dtype, adaptive: bool, backend: str, device: str) -> None:
    lists = Lists(SIZES, dtype, device)
    before = snapshot(lists.grads), snapshot(lists.params)
    value = ops.norm(lists.params, lists.grads, ascent_groups(len(SIZES), adaptive=adaptive), backend=backend)
    assert (value.dtype, value.shape, value.device.type) == (torch.float64, torch.Size([]), device)
    expected = exact_norm((w, g, adaptive) for w, g in zip(lists.params, lists.grads, strict=True))
    assert float(value) == pytest.approx(expected, rel=NORM_RTOL[dtype], abs=0)
    assert (snapshot(lists.grads), snapshot(lists.params)) == before


@every_dtype
@pytest.mark.parametrize("size", [1, 17, 129, BLOCK - 1, BLOCK + 1])
def test_norm_of_one_tensor_at_an_odd_offset(dtype: torch.dtype, size: int, backend: str, device: str) -> None:
    buffer = torch.randn(size + 2).to(device=device, dtype=dtype)
    buffer[0] = buffer[-1] = math.nan  # a read outside the slice shows
    value = ops.norm([torch.zeros_like(buffer[1:-1])], [buffer[1:-1]], ascent_groups(1), backend=backend)
    expected = exact_norm([(buffer[1:-1], buffer[1:-1], False)])
    assert float(value) == pytest.approx(expected, rel=NORM_RTOL[dtype], abs=0)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *itertools.product([torch.float32, torch.float64, torch.bfloat16], [-30, -20, -12, 0, 20, 30]),
        *((torch.float64, exponent) for exponent in (-306, -170, -153, -140, 150, 160, 304)),
    ],
    ids=ids,
)
def test_norm_of_any_scale(dtype: torch.dtype, exponent: int, backend: str, device: str) -> None:
    grads = [(torch.randn(n, dtype=torch.float64) * 10.0**exponent).to(device=device, dtype=dtype) for n in (3, 1009)]
    params = [torch.ones_like(g) for g in grads]
    value = ops.norm(params, grads, ascent_groups(2), backend=backend)
    expected = exact_norm((w, g, False) for w, g in zip(params, grads, strict=True))
    assert float(value) == pytest.approx(expected, rel=NORM_RTOL[dtype], abs=0)


@pytest.mark.parametrize(
    ("dtype", "value", "count"), [(torch.float16, 300.0, 65537), (torch.bfloat16, 0.01, 100_000)], ids=ids
)
def test_norm_of_16_bit_gradients_beyond_16_bit_sums(
    dtype: torch.dtype, value: float, count: int, backend: str, device: str
) -> None:
    """The fp16 squares overflow, the bf16 running sum stalls: both need a wider accumulator."""
    g = torch.full((count,), value, dtype=dtype, device=device)
    expected = float(g[0].double()) * math.sqrt(count)
    computed = ops.norm([torch.zeros_like(g)], [g], ascent_groups(1), backend=backend)
    assert float(computed) == pytest.approx(expected, rel=NORM_RTOL[dtype], abs=0)


def test_norm_with_weights_and_gradients_whose_product_overflows_fp32(backend: str, device: str) -> None:
    w, g = torch.full((33,), 3e25, device=device), torch.full((33,), 7e24, device=device)
    value = ops.norm([w], [g], ascent_groups(1, adaptive=True), backend=backend)
    assert float(value) == pytest.approx(exact_norm([(w, g, True)]), rel=NORM_RTOL[torch.float32], abs=0)


def test_norm_over_groups_dtypes_and_missing_gradients(backend: str, device: str) -> None:
    """One norm over all groups, each adaptive or not, each tensor in its own dtype; None takes no part."""
    params = [torch.randn(n).to(device=device, dtype=t) for n, t in zip((5, 130, 1009, 64, 7), [*DTYPES, DTYPES[0]])]
    grads: list[Tensor | None] = [torch.randn_like(p) for p in params]
    grads[1] = None
    groups = [AscentGroup(2, 0.03, True), AscentGroup(0, 9.0, True), AscentGroup(3, 0.2, False)]
    adaptive = [True, True, False, False, False]
    expected = exact_norm(zip(params, grads, adaptive, strict=True))
    value = float(ops.norm(params, grads, groups, backend=backend))
    assert value == pytest.approx(expected, rel=NORM_RTOL[torch.float32], abs=0)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]], ids=str)
def test_norm_of_nothing_is_zero(sizes: list[int], backend: str, device: str) -> None:
    tensors = [torch.zeros(n, device=device) for n in sizes]
    assert float(ops.norm(tensors, tensors, ascent_groups(len(sizes)), backend=backend)) == 0.0
    assert float(ops.norm(tensors, [None] * len(sizes), ascent_groups(len(sizes)), backend=backend)) == 0.0


@every_dtype
@pytest.mark.parametrize(("bad", "where"), [(math.nan, 0), (math.inf, 40), (-math.inf, 1008), (math.nan, 1008)])
def test_norm_of_non_finite_gradients_is_not_finite(
    dtype: torch.dtype, bad: float, where: int, backend: str, device: str
) -> None:
    g = torch.ones(1009, dtype=dtype, device=device)
    g[where] = bad
    value = ops.norm([torch.ones_like(g)], [g], ascent_groups(1), backend=backend)
    assert str(float(value)) == str(abs(bad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
@adaptive_or_not
def test_norm_of_strided_tensors(dtype: torch.dtype, adaptive: bool, backend: str, device: str) -> None:
    for name, w, g in strided_pairs(dtype, device):
        value = float(ops.norm([w], [g], ascent_groups(1, adaptive=adaptive), backend=backend))
        assert value == pytest.approx(exact_norm([(w, g, adaptive)]), rel=NORM_RTOL[dtype], abs=0), name


@every_dtype
@adaptive_or_not
@pytest.mark.parametrize("swap", [False, True], ids=["backup", "swap"])
def test_perturb_matches_the_closed_form(
    dtype: torch.dtype, adaptive: bool, swap: bool, backend: str, device: str
) -> None:
    lists = Lists(SIZES, dtype, device)
    old = [exact(w) for w in lists.params]
    old_bits, grads = snapshot(lists.params), [g.clone() for g in lists.grads]
    norm = exact_norm(zip(lists.params, grads, [adaptive] * len(grads), strict=True))
    backups = lists.grads if swap else lists.backups
    ops.perturb(
        lists.params,
        lists.grads,
        backups,
        scalar(norm, device),
        ascent_groups(len(SIZES), adaptive=adaptive),
        backend=backend,
    )
    limit = ROUNDED_ONCE_ULP if dtype in SIXTEEN_BIT else PERTURB_ULP
    for w, w_old, g in zip(lists.params, old, grads, strict=True):
        e = exact_ascent(w_old, exact(g), norm, RHO, adaptive)
        largest = np.maximum(np.maximum(np.abs(w_old), np.abs(w_old + e)), np.abs(e))
        assert_within_ulp(w, w_old + e, largest, limit, "w + e")
    assert_same_bits(backups, old_bits, "backup")
    if not swap:
        assert_same_bits(lists.grads, grads, "gradient")
    lists.check_neighbours()


@pytest.mark.parametrize("exponent", [-300, -158, 153, 160, 300])
@adaptive_or_not
def test_norm_and_perturb_of_fp64_whose_squares_leave_its_range(
    adaptive: bool, exponent: int, backend: str, device: str
) -> None:
    """Two parts, one of them strided, have each a norm far out, and join to one."""
    lists = Lists(FEW_SIZES, torch.float64, device)
    params = [*lists.params, torch.randn(37, 5, dtype=torch.float64).to(device)[:, 2]]
    grads = [*lists.grads, torch.randn(37, dtype=torch.float64).to(device)]
    grads = [g.mul_(10.0**exponent) for g in grads]
    groups, old = ascent_groups(len(params), adaptive=adaptive), [exact(w) for w in params]
    expected = exact_norm((w, g, adaptive) for w, g in zip(params, grads, strict=True))
    value = ops.norm(params, grads, groups, backend=backend)
    assert float(value) == pytest.approx(expected, rel=NORM_RTOL[torch.float64], abs=0)
    ops.perturb(params, grads, [torch.empty_like(w) for w in params], value, groups, backend=backend)
    for w, w_old, g in zip(params, old, grads, strict=True):
        e = exact_ascent(w_old, exact(g), float(value), RHO, adaptive)
        assert_within_ulp(w, w_old + e, np.maximum(abs(w_old), abs(w_old + e)), PERTURB_ULP, "w + e")
    lists.check_neighbours()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e20, 1e37], ids=str)
def test_displacement_has_length_rho_for_gradients_of_any_scale(
    dtype: torch.dtype, scale: float, backend: str, device: str
) -> None:
    g = (torch.randn(1009, dtype=torch.float64) * scale).to(device=device, dtype=dtype)
    w = torch.zeros_like(g)
    norm = ops.norm([w], [g], ascent_groups(1), backend=backend)
    ops.perturb([w], [g], [torch.empty_like(w)], norm, ascent_groups(1), backend=backend)
    assert exact_norm([(w, w, False)]) == pytest.approx(RHO, rel=LENGTH_RTOL[dtype], abs=0)


@every_dtype
@pytest.mark.parametrize(("swap", "norm"), [(False, 0.0), (True, 0.0), (True, math.nan), (False, math.inf)], ids=str)
def test_nothing_is_perturbed_without_a_positive_finite_norm(
    dtype: torch.dtype, swap: bool, norm: float, backend: str, device: str
) -> None:
    lists = Lists(FEW_SIZES, dtype, device)
    lists.grads[4][3] = norm
    old = snapshot(lists.params)
    backups = lists.grads if swap else lists.backups
    groups = ascent_groups(len(FEW_SIZES))
    ops.perturb(lists.params, lists.grads, backups, scalar(norm, device), groups, backend=backend)
    assert_same_bits(lists.params, old, "param")
    assert_same_bits(backups, old, "backup")
    lists.check_neighbours()


def test_nothing_is_perturbed_with_rho_zero(backend: str, device: str) -> None:
    """Not even when rho * inf would be NaN."""
    lists = Lists(FEW_SIZES, torch.float32, device)
    old = snapshot(lists.params)
    lists.grads[3][0] = math.inf
    groups = ascent_groups(len(FEW_SIZES), rho=0.0)
    ops.perturb(lists.params, lists.grads, lists.backups, scalar(3.7, device), groups, backend=backend)
    assert_same_bits(lists.params, old, "param")
    assert_same_bits(lists.backups, old, "backup")


def test_each_group_is_displaced_by_its_own_rho(backend: str, device: str) -> None:
    params = [torch.zeros(n, dtype=torch.float64, device=device) for n in (5, 17, 130)]
    grads = [torch.randn_like(p) for p in params]
    groups = [AscentGroup(1, 0.03, False), AscentGroup(2, 0.2, False)]
    norm = ops.norm(params, grads, groups, backend=backend)
    ops.perturb(params, grads, [torch.empty_like(p) for p in params], norm, groups, backend=backend)
    for p, g, rho in zip(params, grads, (0.03, 0.2, 0.2), strict=True):
        torch.testing.assert_close(p, rho * g / norm, rtol=1e-14, atol=0)


def test_tensors_without_gradient_are_not_perturbed(backend: str, device: str) -> None:
    lists = Lists([9, 40], torch.float32, device)
    old = snapshot(lists.params)
    grads: list[Tensor | None] = [None, lists.grads[1]]
    backups: list[Tensor | None] = [None, lists.backups[1]]
    ops.perturb(lists.params, grads, backups, scalar(2.3, device), ascent_groups(2), backend=backend)
    assert bits(lists.params[0]) == old[0]
    assert bits(lists.params[1]) != old[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
@adaptive_or_not
def test_perturb_of_strided_tensors(dtype: torch.dtype, adaptive: bool, backend: str, device: str) -> None:
    for name, w, g in strided_pairs(dtype, device):
        old, old_bits = exact(w), bits(w)
        norm, backup, strides = exact_norm([(w, g, adaptive)]), torch.empty_like(w), w.stride()
        grad_bits = bits(g)
        groups = ascent_groups(1, adaptive=adaptive)
        ops.perturb([w], [g], [backup], scalar(norm, device), groups, backend=backend)
        e = exact_ascent(old, exact(g), norm, RHO, adaptive)
        largest = np.maximum(np.maximum(np.abs(old), np.abs(old + e)), np.abs(e))
        assert_within_ulp(w, old + e, largest, PERTURB_ULP, name)
        assert (bits(backup), bits(g), w.stride()) == (old_bits, grad_bits, strides), name
        ops.restore([w], [backup], backend=backend)
        assert bits(w) == old_bits, name


def test_ops_on_a_column_leave_the_other_columns_alone(backend: str, device: str) -> None:
    base = torch.full((37, 5), 42.0, device=device)
    w, g, backup = base[:, 2], torch.randn(37, device=device), torch.empty(37, device=device)
    ops.perturb([w], [g], [backup], scalar(1.9, device), ascent_groups(1), backend=backend)
    assert not bool((base[:, 2] == 42).any())
    ops.sgd_update([w], [g], [backup], [None], sgd_groups(1, lr=0.13), backend=backend)
    assert bool((base[:, [0, 1, 3, 4]] == 42).all())
    torch.testing.assert_close(base[:, 2], 42 - 0.13 * g)


@every_dtype
def test_restore_returns_the_same_bits(dtype: torch.dtype, backend: str, device: str) -> None:
    lists = Lists(SIZES, dtype, device)
    if lists.params[5].numel():
        lists.params[5][:3] = torch.tensor([math.nan, -0.0, math.inf], dtype=dtype)
    old = snapshot(lists.params)
    groups = ascent_groups(len(SIZES))
    ops.perturb(lists.params, lists.grads, lists.backups, scalar(2.9, device), groups, backend=backend)
    ops.restore(lists.params, lists.backups, backend=backend)
    assert_same_bits(lists.params, old, "param")
    lists.check_neighbours()


def test_restore_skips_tensors_without_backup(backend: str, device: str) -> None:
    params = [torch.ones(9, device=device), torch.ones(9, device=device)]
    ops.restore(params, [None, torch.full((9,), 7.0, device=device)], backend=backend)
    assert [float(p.sum()) for p in params] == [9.0, 63.0]
