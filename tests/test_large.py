"""Calls on more memory than the last-level cache holds, where the native kernels store past the cache.

Exceeding a server's cache would take gigabytes, so the machine is made to look as if it had a small one. Exceeding what
32 bits can count does take them: that test is part of ``make soak``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    DTYPES,
    PATIENCE,
    SGD_CONFIGS,
    SIXTEEN_BIT,
    Carved,
    ascent_groups,
    assert_same_bits,
    lacks_isa,
    scalar,
    sgd_groups,
)
from torch import Tensor

from fused_sam import FusedSAM, backends, ops

CACHE = 1 << 20
TENSORS = 2 * len(DTYPES)
USED = "the small cache was believed"
SMALL_CACHE = f"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
FILE* fopen(const char* path, const char* mode) {{
  FILE* (*real)(const char*, const char*) = (FILE* (*)(const char*, const char*))dlsym(RTLD_NEXT, "fopen");
  if (strstr(path, "/cache/index3/size") == NULL) return real(path, mode);
  fputs("{USED}", stderr);
  return fmemopen("{CACHE >> 10}K\\n", {len(f"{CACHE >> 10}K") + 1}, "r");
}}
"""


def build() -> dict[str, list[Tensor]]:
    """Tensors of each dtype, aligned and at an odd offset: larger than the cache together, far smaller each."""
    generator = torch.Generator().manual_seed(17)
    roles: dict[str, list[Tensor]] = {"params": [], "first": [], "second": [], "backups": [], "momentum": []}
    for dtype in DTYPES:
        size = CACHE // (TENSORS - 1) // dtype.itemsize + 5
        noise = torch.randn(size + 2 * len(roles), generator=generator)
        for k, tensors in enumerate(roles.values()):
            for odd in (0, 1):
                tensors.append(Carved([size], dtype, "cpu").tensors[0] if odd else torch.empty(size, dtype=dtype))
                tensors[-1].copy_(noise[2 * k + odd :][:size])
    return roles


def sam_step(x: dict[str, list[Tensor]], swap: bool, calls: list[slice]) -> list[list[Tensor]]:
    """One step in the given calls of each op; what it wrote at each stage."""
    norm, config = scalar(41.7, "cpu"), SGD_CONFIGS["nesterov-decay"]
    kept = x["first"] if swap else x["backups"]
    for i in calls:
        groups = ascent_groups(len(x["params"][i]))
        ops.perturb(x["params"][i], x["first"][i], kept[i], norm, groups, backend="native")
    perturbed, old = [p.clone() for p in x["params"]], [b.clone() for b in kept]
    for i in calls:
        arguments = (x["params"][i], x["second"][i], kept[i], x["momentum"][i])
        ops.sgd_update(*arguments, sgd_groups(len(x["params"][i]), **config), backend="native")
    return [perturbed, old, x["params"], x["momentum"]]


def master_step(calls: list[slice]) -> list[list[Tensor]]:
    """One step on masters, which writes parameters and reads none; what there is at each stage, and after a restore."""
    generator = torch.Generator().manual_seed(19)
    lists: dict[str, list[Tensor]] = {"params": [], "grads": [], "masters": [], "momentum": []}
    for dtype in SIXTEEN_BIT:
        size = CACHE // 3 // torch.float32.itemsize + 5
        for odd in (0, 1):
            for name, tensors in lists.items():
                kind = dtype if name in ("params", "grads") else torch.float32
                tensors.append(Carved([size], kind, "cpu").tensors[0] if odd else torch.empty(size, dtype=kind))
                tensors[-1].copy_(torch.randn(size, generator=generator))
    seen: list[list[Tensor]] = []
    for restored in (True, False):
        for i in calls:
            p, g, masters, momentum = (tensors[i] for tensors in lists.values())
            journal: ops.Journal = []
            ascent = ops.Ascent(p, g, ascent_groups(len(p)), "native", masters=masters)
            ascent.perturb(scalar(41.7, "cpu"), journal)
            seen.append([x.clone() for x in p])
            if restored:
                ops.roll_back(journal)
                seen.append([x.clone() for x in p])
                continue
            groups = sgd_groups(len(p), **SGD_CONFIGS["nesterov-decay"])
            ops.sgd_update(p, g, journal[0], momentum, groups, backend="native", journal=journal, masters=masters)
            seen.append([*p, *masters, *momentum])
    return seen


def check() -> None:
    """Runs where the cache looks small: one call beyond it and calls within it must give the same bits."""
    torch.set_num_threads(2)
    together, apart = master_step([slice(None)]), master_step([slice(i, i + 1) for i in range(4)])
    for stage, at in enumerate(together):
        pieces = apart[(stage // 2) * 8 + stage % 2 : (stage // 2 + 1) * 8 : 2]
        expected = [x for role in zip(*pieces, strict=True) for x in role]
        assert_same_bits(at, expected, f"masters, stage {stage}")
    for swap in (False, True):
        together = sam_step(build(), swap, [slice(None)])
        apart = sam_step(build(), swap, [slice(i, i + 1) for i in range(TENSORS)])
        for stage, expected, what in zip(together, apart, ("w + e", "backup", "w", "momentum"), strict=True):
            assert_same_bits(stage, expected, f"swap={swap}: {what}")


@pytest.mark.skipif(backends.available().get("native") != "ok", reason="the native backend is not built")
@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and cc")
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_calls_beyond_the_cache_equal_calls_within_it(isa: str, tmp_path: Path) -> None:
    if lacks_isa(isa):
        pytest.skip(f"this machine has no {isa}")
    shim = tmp_path / "small_cache.so"
    compile_shim = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(shim), "-ldl"]
    subprocess.run(compile_shim, input=SMALL_CACHE, text=True, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", "import test_large; test_large.check()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"LD_PRELOAD": str(shim), "FUSED_SAM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert USED in done.stderr


def gib(key: str, file: str) -> float:
    """A line of a file of /proc."""
    return next(int(line.split()[1]) / 2**20 for line in Path(file).read_text().splitlines() if line.startswith(key))


@pytest.mark.slow
@pytest.mark.skipif(backends.available().get("native") != "ok", reason="the native backend is not built")
@pytest.mark.skipif("FUSED_SAM_SOAK" not in os.environ, reason="takes 13 GB and a minute: make soak")
def test_a_parameter_of_more_elements_than_32_bits_count() -> None:
    """Right everywhere, and with no memory but that of the parameter and of the two gradients."""
    if gib("MemAvailable", "/proc/meminfo") < 16:
        pytest.skip("needs 16 GiB of free memory")
    size = 2**31 + 2**16 + 3
    places = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, size - 1])
    values = torch.arange(1.0, 1.0 + len(places), dtype=torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")
    before = gib("VmRSS", "/proc/self/status")
    p = torch.zeros(size, dtype=torch.bfloat16)
    opt = FusedSAM([p], rho=0.5, lr=0.25, backend="native")
    # Memory of zeros is not taken before it is written.
    p.grad = torch.zeros_like(p).index_put_((places,), values)
    opt.first_step(zero_grad=True)
    length = float(values.double().norm())
    torch.testing.assert_close(p[places], (0.5 * values.double() / length).bfloat16())
    p.grad = torch.zeros_like(p).index_put_((places,), -8 * values)
    opt.step()
    assert gib("VmHWM", "/proc/self/status") - before < 3 * 2 * size / 2**30 + 0.5
    torch.testing.assert_close(p[places], 2 * values, rtol=0, atol=0)
    assert int(p.count_nonzero()) == len(places)
