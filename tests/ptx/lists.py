"""Tensor lists cut into launches, units and packs: results do not show how.

Run by test_ptx.py with the plugin, as launches.py is.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    ADAM_CONFIGS,
    DTYPES,
    FEW_SIZES,
    HYPER,
    AdamLists,
    Lists,
    adam_groups,
    ascent_groups,
    ids,
    scalar,
    sgd_groups,
    snapshot,
)
from norm_bits import BITS, norm_bits

from fused_sam import ops


def run(backend: str, lists: Lists, groups: list[ops.SGDGroup]) -> list[list[bytes]]:
    norm = scalar(2.9, "cpu")
    ops.perturb(lists.params, lists.grads, lists.backups, norm, ascent_groups(len(lists.params)), backend)
    displaced = snapshot(lists.params)
    ops.sgd_update(lists.params, lists.grads, lists.backups, lists.momentum, groups, backend=backend)
    return [displaced, snapshot(lists.params), snapshot(lists.momentum), snapshot(lists.backups)]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
def test_the_kernels_compute_the_bits_of_the_cpu(dtype: torch.dtype, nesterov: bool) -> None:
    results = []
    for backend in ("native", "emulated"):
        torch.manual_seed(0)
        lists = Lists([*FEW_SIZES, *[k % 5 for k in range(1500)]], dtype, "cpu")
        dampening = 0.0 if nesterov else 0.3
        groups = sgd_groups(len(lists.params), **HYPER, nesterov=nesterov, dampening=dampening)
        results.append(run(backend, lists, groups))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_every_16_bit_number_is_read_and_written_like_torch_does(dtype: torch.dtype) -> None:
    """w - 1 * 0 = w through the kernel's conversions; NaN stays NaN."""
    w = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    updated = w.clone()
    ops.sgd_update([updated], [torch.zeros_like(w)], None, None, sgd_groups(1, lr=1.0), backend="emulated")
    nan = w.isnan()
    assert torch.equal(updated.isnan(), nan)
    assert torch.equal(updated[~nan].view(torch.int16), w[~nan].view(torch.int16))
    values = torch.randn(2**16) * torch.logspace(-9, 5, 2**16)
    target = torch.zeros(2**16, dtype=dtype)
    # 0 + (-1) * (-values): fp32 gradients, rounded to the parameter's dtype once
    ops.sgd_update([target], [-values], None, None, sgd_groups(1, lr=1.0), backend="emulated")
    assert torch.equal(target, values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_norm_has_the_same_bits_wherever_its_tensors_lie(dtype: torch.dtype) -> None:
    """Which lane adds what is decided by indices, not by addresses."""
    sizes = [1, 33, 1009, 16385]
    values = [torch.randn(n).to(dtype) for n in sizes]
    norms = set()
    for offset in range(9):
        buffers = [torch.empty(n + offset, dtype=dtype) for n in sizes]
        grads = [b[offset:].copy_(v) for b, v in zip(buffers, values, strict=True)]
        params = [torch.ones_like(g) for g in grads]
        norms.add(ops.norm(params, grads, ascent_groups(len(sizes)), backend="emulated").item())
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(math.sqrt(sum(v.double().square().sum() for v in values)), rel=1e-13)


@pytest.mark.parametrize(("dtype", "adaptive"), BITS, ids=str)
def test_the_norm_has_the_recorded_bits(dtype: torch.dtype, adaptive: bool) -> None:
    assert norm_bits(dtype, adaptive, "emulated", "cpu") == BITS[dtype, adaptive]


def test_the_norm_has_the_same_bits_however_its_list_is_cut() -> None:
    """Into several launches; with a group for each tensor, a launch takes about a third of the tensors."""
    grads = [torch.randn(k % 11 if k % 3 else 1 + 37 * k % 700) for k in range(5000)]
    params = [torch.ones_like(g) for g in grads]
    cuts = [ascent_groups(len(grads)), ascent_groups(1) * len(grads)]
    norms = {ops.norm(params, grads, groups, backend="emulated").item() for groups in cuts}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(ops.norm(params, grads, cuts[0], backend="native").item(), rel=1e-14)


def test_means_and_parameters_to_restore_take_several_launches() -> None:
    sizes, results = [k % 9 for k in range(1300)], []
    for backend in ("native", "emulated"):
        torch.manual_seed(0)
        params, means, grads = ([torch.randn(n) for n in sizes] for _ in range(3))
        before, journal = snapshot(params), []
        ascent = ops.Ascent(params, [torch.ones_like(p) for p in params], ascent_groups(len(sizes)), backend)
        ascent.perturb(scalar(2.9, "cpu"), journal)
        assert snapshot(params) != before
        ops.restore_accumulate(means, grads, [ops.AccumulateGroup(len(sizes), 1 / 3, False)], journal, backend)
        assert snapshot(params) == before
        results.append(snapshot(means))
    assert results[0] == results[1]


def test_more_tensors_than_one_launch_of_adam_takes() -> None:
    """Entries are wider than SGD's."""
    results = []
    for backend in ("native", "emulated"):
        torch.manual_seed(0)
        lists = AdamLists([3] * 1300, torch.float32, "cpu")
        groups = [adam_groups(650, **ADAM_CONFIGS[name])[0] for name in ("all", "decoupled")]
        lists.update(groups, backend=backend)
        results.append([snapshot(x) for x in (lists.params, *lists.states)])
    assert results[0] == results[1]
