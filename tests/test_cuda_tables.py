"""How tensor lists are cut into launches and units for the CUDA kernels, and why these cannot be used."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_sam import backends

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
