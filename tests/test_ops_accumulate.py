"""restore_accumulate: a running mean of gradients, and the way back to w, in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import assert_within_ulp, exact
from helpers import (
    DTYPES,
    FEW_SIZES,
    SIXTEEN_BIT,
    SIZES,
    Carved,
    ascent_groups,
    assert_bits_of_torch,
    assert_same_bits,
    bits,
    ids,
    sgd_groups,
    snapshot,
    strided_pairs,
)
from torch import Tensor

from fused_sam import backends, ops
from fused_sam.ops import AccumulateGroup, InvalidTensor

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
WEIGHTS = [1.0, 1 / 2, 1 / 3, 1 / 7, 6 / 7]
# Difference, product and sum, of which the last two are rounded as one; the weight.
MEAN_ULP = 2.0


@pytest.fixture(autouse=True)
def _two_threads(_reproducible: None) -> None:
    torch.set_num_threads(2)


def random_(carved: Carved) -> list[Tensor]:
    for x in carved.tensors:
        x.copy_(torch.randn(x.shape))
    return carved.tensors


@every_dtype
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_a_mean_takes_in_a_gradient(dtype: torch.dtype, weight: float, first: bool, backend: str, device: str) -> None:
    sizes = SIZES if weight == WEIGHTS[2] else FEW_SIZES
    carved = [Carved(sizes, dtype, device) for _ in range(2)]
    means, grads = map(random_, carved)
    old = [(exact(m), exact(g)) for m, g in zip(means, grads, strict=True)]
    if first:
        for m in means:
            m.fill_(torch.nan)  # uninitialised memory: written, never read
    kept = snapshot(grads)
    ops.restore_accumulate(means, grads, [AccumulateGroup(len(sizes), weight, first)], backend=backend)
    for m, (before, g) in zip(means, old, strict=True):
        expected = g * weight if first else before + weight * (g - before)
        assert_within_ulp(m, expected, abs(before) + abs(g), MEAN_ULP, "mean")
    assert_same_bits(grads, kept, "gradient")
    for c in carved:
        c.check()


@every_dtype
@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_has_the_bits_of_torchs_lerp(dtype: torch.dtype, weight: float, backend: str, device: str) -> None:
    means, grads = (random_(Carved(FEW_SIZES, dtype, device)) for _ in range(2))
    twins = [m.clone() for m in means]
    ops.restore_accumulate(means, grads, [AccumulateGroup(len(means), weight, False)], backend=backend)
    torch._foreach_lerp_(twins, grads, weight)
    assert_bits_of_torch(means, twins, "mean")
    ops.restore_accumulate(means, grads, [AccumulateGroup(len(means), weight, True)], backend=backend)
    assert_same_bits(means, torch._foreach_mul(grads, weight), "product")


@every_dtype
def test_without_a_gradient_a_mean_is_scaled_by_itself_or_stays(dtype: torch.dtype, backend: str, device: str) -> None:
    means = random_(carved := Carved([17, 1009, 67], dtype, device))
    expected = [means[0] * (2 / 3), means[1] * (2 / 3), means[2].clone()]
    groups = [AccumulateGroup(2, 2 / 3, True), AccumulateGroup(1, 0.5, False)]
    ops.restore_accumulate(means, [*means[:2], None], groups, backend=backend)
    assert_same_bits(means, expected)
    carved.check()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=ids)
@pytest.mark.parametrize("wide_mean", [False, True], ids=["fp32 gradient", "fp32 mean"])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_dtypes_that_mix(dtype: torch.dtype, wide_mean: bool, first: bool, backend: str, device: str) -> None:
    """Computed in fp32 and rounded once."""
    dtypes = (torch.float32, dtype) if wide_mean else (dtype, torch.float32)
    means, grads = (random_(Carved(FEW_SIZES, x, device)) for x in dtypes)
    wide = [m.float() for m in means]
    group = [AccumulateGroup(len(means), 1 / 3, first)]
    ops.restore_accumulate(wide, [g.float() for g in grads], group, backend=backend)
    ops.restore_accumulate(means, grads, group, backend=backend)
    assert_same_bits(means, [x.to(dtypes[0]) for x in wide])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_strided_tensors(dtype: torch.dtype, backend: str, device: str) -> None:
    for name, mean, g in strided_pairs(dtype, device):
        expected, strides, kept = torch.lerp(mean, g, 0.3), mean.stride(), bits(g)
        ops.restore_accumulate([mean], [g], [AccumulateGroup(1, 0.3, False)], backend=backend)
        torch.testing.assert_close(mean, expected, msg=name)
        assert (mean.stride(), bits(g)) == (strides, kept), name


def test_every_dtype_and_group_in_one_call(backend: str, device: str) -> None:
    means = [torch.randn(n).to(device, t) for t in DTYPES for n in (3, 1, 17)]
    grads, twins = [torch.randn_like(m) for m in means], [m.clone() for m in means]
    groups = [AccumulateGroup(i % 3, 1 / (i + 2), i % 2 == 0) for i in range(13)]
    ops.restore_accumulate(means, grads, groups, backend=backend)
    start = 0
    for group in groups:
        for m, g in zip(twins[start : start + group.size], grads[start:]):
            one = [group._replace(size=1)]
            ops.restore_accumulate([m], [g], one, backend=backend)
        start += group.size
    assert_same_bits(means, twins)


class Perturbed:
    """Parameters of several sizes and dtypes at w + e, one of them without a gradient in the first pass."""

    def __init__(self, backend: str, device: str, owned: bool, master_of: torch.dtype | None = None) -> None:
        dtypes = [master_of] if master_of else DTYPES
        self.params = [torch.randn(n).to(device, t) for t in dtypes for n in (5, 181 * 182, 0, 67)]
        self.masters = [torch.randn(p.shape, device=device) for p in self.params] if master_of else None
        for p, master in zip(self.params, self.masters or []):
            p.copy_(master)
        self.before = snapshot(self.params)
        grads: list[Any] = [torch.randn_like(p) for p in self.params]
        grads[-1] = None
        self.journal: ops.Journal = []
        groups = ascent_groups(len(self.params), rho=3.0)
        ascent = ops.Ascent(self.params, grads, groups, backend, masters=self.masters)
        ascent.perturb(ascent.norm(), self.journal, owned=owned)
        del ascent, grads
        assert snapshot(self.params[:2]) != self.before[:2]

    def check(self) -> None:
        assert self.journal == []
        assert snapshot(self.params) == self.before


@pytest.mark.parametrize("owned", [False, True], ids=["backup", "swap"])
@pytest.mark.parametrize("master_of", [None, *SIXTEEN_BIT], ids=str)
def test_what_the_journal_holds_is_undone_in_the_same_call(
    owned: bool, master_of: torch.dtype | None, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturbed = Perturbed(backend, device, owned, master_of)
    means = [torch.randn_like(p) for p in perturbed.params[1:]]
    grads, twins = [torch.randn_like(m) for m in means], [m.clone() for m in means]
    groups = [AccumulateGroup(len(means), 1 / 3, False)]
    versions = [x._version for x in (*perturbed.params[:2], *means)]
    entry = perturbed.journal[0]
    if backend != "eager" and perturbed.masters is None:
        monkeypatch.setattr(type(entry), "restore", None)
    ops.restore_accumulate(means, grads, groups, perturbed.journal, backend)
    perturbed.check()
    ops.restore_accumulate(twins, grads, groups, backend=backend)
    assert_same_bits(means, twins, "mean")
    assert all(x._version > v for x, v in zip((*perturbed.params[:2], *means), versions))


def test_without_any_mean_it_only_restores(backend: str, device: str) -> None:
    perturbed = Perturbed(backend, device, owned=False)
    ops.restore_accumulate([], [], [], perturbed.journal, backend)
    perturbed.check()


def test_parameters_moved_by_several_calls_all_come_back(backend: str, device: str) -> None:
    """Beside a mean that is strided."""
    first, second = (Perturbed(backend, device, owned=False) for _ in range(2))
    journal = [*first.journal, *second.journal]
    mean = torch.zeros(37, 5, device=device)[:, 2]
    ops.restore_accumulate([mean], [torch.ones_like(mean)], [AccumulateGroup(1, 0.25, False)], journal, backend)
    assert journal == []
    for perturbed in (first, second):
        perturbed.journal.clear()
        perturbed.check()
    assert mean.tolist() == [0.25] * 37


@pytest.mark.parametrize(
    ("mean", "grad", "error", "sentence"),
    [
        (torch.ones(9), torch.ones(8), InvalidTensor, "shape"),
        (torch.ones(9), torch.ones(9, dtype=torch.float64), InvalidTensor, "dtype"),
        (torch.ones(9), torch.ones(9).to_sparse(), InvalidTensor, "layout"),
        (torch.ones(9, dtype=torch.int32), torch.ones(9, dtype=torch.int32), InvalidTensor, "dtype"),
        (torch.ones(1).expand(9), torch.ones(9), InvalidTensor, "overlaps itself"),
    ],
    ids=["shape", "dtype", "sparse", "integers", "expanded"],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(
    mean: Tensor, grad: Tensor, error: type[Exception], sentence: str, backend: str, device: str
) -> None:
    perturbed = Perturbed(backend, device, owned=False)
    moved, fine = snapshot(perturbed.params), torch.ones(9, device=device)
    groups = [AccumulateGroup(2, 1 / 3, False)]
    with pytest.raises(error, match=sentence):
        ops.restore_accumulate(
            [fine, mean.to(device)], [fine.clone() * 2, grad.to(device)], groups, perturbed.journal, backend
        )
    with pytest.raises(ValueError, match="Must cover"):
        ops.restore_accumulate([fine], [fine], groups, perturbed.journal, backend)
    with pytest.raises(ValueError, match="overlap"):
        ops.restore_accumulate([fine, fine[2:]], [fine, fine[2:]], groups, perturbed.journal, backend)
    assert snapshot(perturbed.params) == moved
    assert bits(fine) == bits(torch.ones(9))
    ops.roll_back(perturbed.journal)
    perturbed.check()


def test_a_parameter_replaced_meanwhile_is_refused(backend: str, device: str) -> None:
    if backend == "eager":
        pytest.skip("torch copies into whatever fits")
    params = [torch.randn(67, device=device) for _ in range(2)]
    journal: ops.Journal = []
    ops.Ascent(params, [torch.ones_like(p) for p in params], ascent_groups(2), backend).perturb(
        torch.ones((), dtype=torch.float64, device=device), journal
    )
    moved, mean = snapshot(params), torch.zeros(9, device=device)
    params[1].data = params[1].data.double()
    with pytest.raises(ValueError, match="while perturbed"):
        ops.restore_accumulate([mean], [torch.ones_like(mean)], [AccumulateGroup(1, 0.5, False)], journal, backend)
    assert (snapshot(params[:1]), mean.tolist(), len(journal)) == (moved[:1], [0.0] * 9, 1)


@every_dtype
def test_the_kernels_have_the_bits_of_the_cpu(dtype: torch.dtype, backend: str, device: str) -> None:
    if backends.available()["native"] != "ok":
        pytest.skip("the native core is not built")
    results = []
    for which in ("native", backend):
        torch.manual_seed(0)
        means, grads = (random_(Carved([*FEW_SIZES, *[k % 5 for k in range(300)]], dtype, device)) for _ in range(2))
        for weight, first in ((1.0, True), (0.5, False), (1 / 3, False)):
            ops.restore_accumulate(means, grads, [AccumulateGroup(len(means), weight, first)], backend=which)
            grads = [g + 1 for g in grads]
        results.append(means)
        if device != "cpu":
            break
    (assert_bits_of_torch if backend == "eager" else assert_same_bits)(results[-1], results[0])


def test_a_master_is_no_mean(backend: str, device: str) -> None:
    """Restoring those of a journal with masters, whose gradients mix with them."""
    perturbed = Perturbed(backend, device, owned=False, master_of=torch.bfloat16)
    masters = snapshot(perturbed.masters or [])
    means = [torch.zeros(p.shape, device=device) for p in perturbed.params]
    grads = [torch.ones_like(m) for m in means]
    ops.restore_accumulate(means, grads, [AccumulateGroup(len(means), 0.5, False)], perturbed.journal, backend)
    perturbed.check()
    assert snapshot(perturbed.masters or []) == masters
    assert all(float(m.min()) == 0.5 for m in means if m.numel())


def test_after_it_the_base_step_starts_from_w(backend: str, device: str) -> None:
    perturbed = Perturbed(backend, device, owned=True)
    p = perturbed.params[0]
    mean = torch.empty_like(p)
    ops.restore_accumulate([mean], [torch.ones_like(p)], [AccumulateGroup(1, 1.0, True)], perturbed.journal, backend)
    perturbed.check()
    w = p.clone()
    ops.sgd_update([p], [mean], None, None, sgd_groups(1, lr=0.25), backend=backend)
    assert_same_bits([p], [w - 0.25])
