"""How tensor lists are cut into launches, units and packs for the CUDA kernels, run on the CPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import (
    DTYPES,
    FEW_SIZES,
    HYPER,
    Lists,
    ascent_groups,
    ids,
    scalar,
    sgd_groups,
    snapshot,
)

from fused_sam import backends, ops

if backends.available()["native"] != "ok":
    pytest.skip("the native core is not built", allow_module_level=True)

from fused_sam import _native

LISTS = {
    "empty tensors": [0, 0, 0],
    "one element": [1],
    "empty between": [0, 5, 0, 0, 1009, 0],
    "unit edges": [255, 256, 257, 511, 512, 513, 16383, 16384, 16385],
    "ten thousand": [k % 7 for k in range(10_000)],
    "more than int32": [3, 2**31 + 5, 1],
    "more than uint32": [3, 2**33 + 5, 1],
    "more than int32 in all": [2**30 + 1] * 5,
    "ResNet-50-like": [64 * 3 * 49, 64, 64, 2048 * 1000, 1000] + [512 * 512 * 9, 512, 512] * 40,
}


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "a group each"])
@pytest.mark.parametrize("numels", LISTS.values(), ids=LISTS.keys())
def test_units_cover_every_element_once_and_in_order(numels: list[int], grouped: bool) -> None:
    units = _native.cuda.units(numels, grouped)
    by_tensor = {i: list(group) for i, group in itertools.groupby(units, key=lambda unit: unit[1])}
    assert list(by_tensor) == [i for i, n in enumerate(numels) if n]
    for i, group in by_tensor.items():
        end = 0
        for _, _, begin, count in group:
            assert begin == end
            assert begin % 256 == 0  # so that alignment at the tensor's begin is alignment at the unit's
            assert 1 <= count <= 16384
            end = begin + count
        assert end == numels[i]
    launches = [unit[0] for unit in units]
    assert launches == sorted(launches)
    assert set(launches) == set(range(launches[-1] + 1 if launches else 0))


def test_a_thousand_tensors_fit_one_launch_and_every_gpu_has_enough_to_do() -> None:
    for count, launches in ((1, 1), (1016, 1), (1020, 2), (10_000, 10)):
        assert len({unit[0] for unit in _native.cuda.units([3] * count, False)}) == launches
    # A block is eight units, which small tensors share: one of up to 256 elements is one unit.
    assert len(_native.cuda.units([256] * 800, False)) == 800
    # At least eight units for each of the 4 x 8 warps that 160 multiprocessors run, from a million elements on.
    for exponent in range(20, 29):
        assert 4000 <= len(_native.cuda.units([2**exponent], False)) <= 33_000


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
    for backend in ("native", "interpreted"):
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
    ops.sgd_update([updated], [torch.zeros_like(w)], None, None, sgd_groups(1, lr=1.0), backend="interpreted")
    nan = w.isnan()
    assert torch.equal(updated.isnan(), nan)
    assert torch.equal(updated[~nan].view(torch.int16), w[~nan].view(torch.int16))
    values = torch.randn(2**16) * torch.logspace(-9, 5, 2**16)
    target = torch.zeros(2**16, dtype=dtype)
    # 0 + (-1) * (-values): fp32 gradients, rounded to the parameter's dtype once
    ops.sgd_update([target], [-values], None, None, sgd_groups(1, lr=1.0), backend="interpreted")
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
        norms.add(ops.norm(params, grads, ascent_groups(len(sizes)), backend="interpreted").item())
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(math.sqrt(sum(v.double().square().sum() for v in values)), rel=1e-13)


def test_the_norm_has_the_same_bits_however_its_list_is_cut() -> None:
    """Into several launches; with a group for each tensor, a launch takes about a third of the tensors."""
    grads = [torch.randn(k % 11 if k % 3 else 1 + 37 * k % 700) for k in range(5000)]
    params = [torch.ones_like(g) for g in grads]
    cuts = [ascent_groups(len(grads)), ascent_groups(1) * len(grads)]
    norms = {ops.norm(params, grads, groups, backend="interpreted").item() for groups in cuts}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(ops.norm(params, grads, cuts[0], backend="native").item(), rel=1e-14)


def test_means_and_parameters_to_restore_take_several_launches() -> None:
    sizes, results = [k % 9 for k in range(1300)], []
    for backend in ("native", "interpreted"):
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


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (0, "no NVIDIA driver is loaded on this machine"),
        (
            12040,
            "the NVIDIA driver supports CUDA 12.4, but the kernels were built with CUDA 13.0: update the driver, or "
            "rebuild with an nvcc of CUDA 12",
        ),
        (13000, ""),
        (13020, ""),
        (14000, ""),
    ],
)
def test_a_driver_that_does_not_go_with_the_build_is_named(driver: int, sentence: str) -> None:
    assert _native.cuda.driver_why_not(driver, 13000) == sentence


def test_a_gpu_that_the_build_has_no_code_for_is_named_with_the_remedy() -> None:
    assert _native.cuda.architecture_why_not("sm_80, sm_90 and newer than sm_90", "70", 1) == (
        "the kernels were built for sm_80, sm_90 and newer than sm_90, not for sm_70 of device 1: reinstall with "
        "FUSED_SAM_CUDA_ARCHITECTURES=70"
    )


def test_without_a_driver_cuda_tensors_are_refused_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    assert "CUDA" in backends.available("cuda")["native"] or "driver" in backends.available("cuda")["native"]
    with pytest.raises(RuntimeError, match=r"'native'.*cannot take cuda tensors: .*(driver|CUDA)"):
        backends.for_device("cuda", "native")
