"""sgd_update in every configuration of torch.optim.SGD, against its documented formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closed_forms import assert_within_ulp, exact, exact_sgd
from helpers import (
    ADAM_CONFIGS,
    DTYPES,
    FEW_SIZES,
    ROUNDED_ONCE_ULP,
    SGD_CONFIGS,
    SIXTEEN_BIT,
    SIZES,
    UPDATE_ULP,
    AdamLists,
    Lists,
    adam_groups,
    assert_same_bits,
    bits,
    ids,
    sgd_groups,
    snapshot,
    strided_pairs,
)

from fused_sam import ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
# What is true of both updates: the operands, the groups and their hyperparameters.
UPDATES: dict[str, Any] = {
    "sgd": (Lists, sgd_groups, SGD_CONFIGS["momentum-decay"]),
    "adam": (AdamLists, adam_groups, ADAM_CONFIGS["all"]),
}
every_update = pytest.mark.parametrize("update", UPDATES)


@pytest.fixture(autouse=True)
def _two_threads(_reproducible: None) -> None:
    torch.set_num_threads(2)


@every_dtype
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("name", SGD_CONFIGS)
def test_sgd_update_matches_the_closed_form(
    dtype: torch.dtype, first: bool, name: str, backend: str, device: str
) -> None:
    config = SGD_CONFIGS[name]
    every_size = (name, first) in (("maximize-nesterov", True), ("momentum-decay", False))
    lists = Lists(SIZES if every_size else FEW_SIZES, dtype, device)
    has_momentum = config.get("momentum", 0) != 0
    for w, backup in zip(lists.params, lists.backups, strict=True):
        backup.copy_(w)
        w.fill_(math.nan)  # only the backup may be read
    if first:
        for m in lists.momentum:
            m.fill_(math.nan)  # uninitialised memory: written, never read
    old = [(exact(b), exact(g), exact(m)) for b, g, m in zip(lists.backups, lists.grads, lists.momentum)]
    grads = snapshot(lists.grads)
    if not has_momentum:
        lists.momentum = [None] * len(lists.params)
    lists.update(sgd_groups(len(lists.params), first=first, **config), backend=backend)
    for w, m, (w_old, g, m_old) in zip(lists.params, lists.momentum, old, strict=True):
        expected, m_expected, largest, m_largest = exact_sgd(w_old, g, None if first else m_old, **config)
        assert_within_ulp(w, expected, largest, UPDATE_ULP, "w")
        if has_momentum:
            assert_within_ulp(m, m_expected, m_largest, UPDATE_ULP, "momentum")
    assert_same_bits(lists.grads, grads, "gradient")
    lists.check_neighbours()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=ids)
@pytest.mark.parametrize("config", ["plain", "decay", "maximize"])
def test_16_bit_updates_are_computed_wide_and_rounded_once(
    dtype: torch.dtype, config: str, backend: str, device: str
) -> None:
    lists = Lists(FEW_SIZES, dtype, device)
    old = [(exact(w), exact(g)) for w, g in zip(lists.params, lists.grads, strict=True)]
    lists.momentum = [None] * len(FEW_SIZES)
    lists.update(sgd_groups(len(FEW_SIZES), **SGD_CONFIGS[config]), backups=False, backend=backend)
    for w, (w_old, g) in zip(lists.params, old, strict=True):
        expected, _, largest, _ = exact_sgd(w_old, g, None, **SGD_CONFIGS[config])
        assert_within_ulp(w, expected, largest, ROUNDED_ONCE_ULP, "w")


@every_dtype
def test_sgd_update_without_backup_starts_from_the_parameter(dtype: torch.dtype, backend: str, device: str) -> None:
    with_backup, without = Lists(SIZES, dtype, device), Lists(SIZES, dtype, device)
    without.copy_(with_backup)
    for w, backup in zip(with_backup.params, with_backup.backups, strict=True):
        backup.copy_(w)
        w.fill_(math.nan)
    groups = sgd_groups(len(SIZES), **SGD_CONFIGS["momentum-decay"])
    with_backup.update(groups, backend=backend)
    without.update(groups, backups=False, backend=backend)
    assert_same_bits(without.params, with_backup.params, "param")
    assert_same_bits(without.momentum, with_backup.momentum, "momentum")
    without.check_neighbours()


@every_dtype
def test_sgd_update_without_gradient_only_restores(dtype: torch.dtype, backend: str, device: str) -> None:
    lists = Lists([17, 1009], dtype, device)
    kept = snapshot(lists.backups), snapshot(lists.momentum), snapshot(lists.params)
    groups = sgd_groups(2, **SGD_CONFIGS["momentum-decay"])
    ops.sgd_update(lists.params, [None, None], [lists.backups[0], None], lists.momentum, groups, backend=backend)
    assert bits(lists.params[0]) == kept[0][0]
    assert bits(lists.params[1]) == kept[2][1]
    assert_same_bits(lists.momentum, kept[1], "momentum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_sgd_update_of_strided_tensors(dtype: torch.dtype, backend: str, device: str) -> None:
    config = SGD_CONFIGS["nesterov-decay"]
    for name, w, g in strided_pairs(dtype, device):
        backup, m = torch.randn_like(w), torch.randn_like(w)
        expected, m_expected, largest, m_largest = exact_sgd(exact(backup), exact(g), exact(m), **config)
        grad_bits, strides = bits(g), w.stride()
        ops.sgd_update([w], [g], [backup], [m], sgd_groups(1, **config), backend=backend)
        assert_within_ulp(w, expected, largest, UPDATE_ULP, name)
        assert_within_ulp(m, m_expected, m_largest, UPDATE_ULP, name)
        assert (bits(g), w.stride()) == (grad_bits, strides), name


def test_each_group_has_its_own_hyperparameters(backend: str, device: str) -> None:
    names = list(SGD_CONFIGS)
    params = [torch.randn(67, dtype=torch.float64, device=device) for _ in names]
    grads, momentum = [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]
    old = [(exact(w), exact(g), exact(m)) for w, g, m in zip(params, grads, momentum, strict=True)]
    groups = [sgd_groups(1, first=i % 3 == 0, **SGD_CONFIGS[n])[0] for i, n in enumerate(names)]
    ops.sgd_update(params, grads, [None] * len(names), momentum, groups, backend=backend)
    for i, (name, w, values) in enumerate(zip(names, params, old, strict=True)):
        w_old, g, m_old = values
        expected, _, largest, _ = exact_sgd(w_old, g, None if i % 3 == 0 else m_old, **SGD_CONFIGS[name])
        assert_within_ulp(w, expected, largest, UPDATE_ULP, name)


def test_a_call_over_all_dtypes_equals_a_call_for_each(backend: str, device: str) -> None:
    """Sizes so small that tensors of different dtypes share a unit of work."""
    sizes, config = [3, 1, 17], SGD_CONFIGS["nesterov-decay"]
    apart = [Lists(sizes, dtype, device) for dtype in DTYPES]
    together = [Lists(sizes, dtype, device) for dtype in DTYPES]
    for one, other in zip(apart, together, strict=True):
        other.copy_(one)
        one.update(sgd_groups(3, **config), backend=backend)
    lists = [[t for x in together for t in getattr(x, k)] for k in ("params", "grads", "backups", "momentum")]
    ops.sgd_update(*lists, sgd_groups(12, **config), backend=backend)
    for one, other in zip(apart, together, strict=True):
        assert_same_bits(other.params, one.params, "param")
        assert_same_bits(other.momentum, one.momentum, "momentum")
        other.check_neighbours()


@every_dtype
@every_update
def test_grad_scale_divides_the_gradient(dtype: torch.dtype, update: str, backend: str, device: str) -> None:
    """By a power of two exactly: the bits, p.grad's too, of gradients that were never scaled."""
    kind, groups_of, config = UPDATES[update]
    scaled, plain = (kind(FEW_SIZES, dtype, device) for _ in range(2))
    scaled.copy_(plain)
    for g in scaled.grads:
        g.mul_(64)
    groups = groups_of(len(FEW_SIZES), **config)
    scale, no_inf = torch.tensor(64.0, device=device), torch.tensor(0.0, device=device)
    scaled.update(groups, backend=backend, grad_scale=scale, found_inf=no_inf)
    plain.update(groups, backend=backend)
    for mine, other in zip((scaled.params, scaled.grads, *scaled.states), (plain.params, plain.grads, *plain.states)):
        assert_same_bits(mine, other)
    scaled.check_neighbours()


def test_grad_scale_need_not_be_a_power_of_two(backend: str, device: str) -> None:
    lists = Lists(FEW_SIZES, torch.float32, device)
    old = [(exact(w), exact(g)) for w, g in zip(lists.params, lists.grads, strict=True)]
    scale = torch.tensor(3.0, device=device)
    groups = sgd_groups(len(FEW_SIZES), lr=0.13, weight_decay=0.017)
    lists.update(groups, backups=False, grad_scale=scale, backend=backend)
    for w, (w_old, g) in zip(lists.params, old, strict=True):
        expected, _, largest, _ = exact_sgd(w_old, g / 3, None, lr=0.13, weight_decay=0.017)
        assert_within_ulp(w, expected, largest, UPDATE_ULP, "w")


@every_dtype
@every_update
def test_found_inf_restores_and_leaves_the_state_alone(
    dtype: torch.dtype, update: str, backend: str, device: str
) -> None:
    kind, groups_of, config = UPDATES[update]
    found, scale = torch.tensor(1.0, device=device), torch.tensor(64.0, device=device)
    for first in (False, True):
        lists = kind(FEW_SIZES, dtype, device)
        kept = [snapshot(x) for x in (lists.backups, *lists.states, getattr(lists, "steps", []))]
        groups = groups_of(len(FEW_SIZES), first=first, **config)
        lists.update(groups, backend=backend, grad_scale=scale, found_inf=found)
        assert [snapshot(x) for x in (lists.params, *lists.states, getattr(lists, "steps", []))] == kept
