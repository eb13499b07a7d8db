"""What the Triton kernels compile to, for targets that need not be here: accesses, arithmetic, barriers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton_tests import KERNELS, WRITERS, compiled, needs_triton

F32, F64, BF16, F16 = "fp32", "fp64", "bf16", "fp16"
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (BF16, F32), (F32, BF16)]


def kernel_of(name: str) -> Any:
    """ "perturb of p = 1" is `perturb`, which this p has compiled with other constants."""
    from fused_sam.backends.triton import kernels

    return getattr(kernels, name.partition(" ")[0])


def assembly(name: str, dtypes: tuple[str, str], target: tuple[str, Any, int], amp: bool = False) -> dict[str, Any]:
    """Return what a kernel compiles to for a target that need not be here: {"ttgir": ..., "ptx": ...}."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_sam.backends.triton import kernels

    kinds = {F32: tl.float32, F64: tl.float64, BF16: tl.bfloat16, F16: tl.float16}
    param, grad = (kinds[d] for d in dtypes)
    peak = name.endswith("of p = 1")
    constants = {"P": param, "G": grad, "C": tl.float64 if peak or param == tl.float64 else tl.float32}
    kernel = kernel_of(name)
    total = name.endswith("_total")
    constants |= {"CHUNK": kernels.CHUNK, "PEAK": peak, "AGAIN": F64 in dtypes, **kernels.tiles_of(kernel)}
    if total:
        constants["TILE"] = kernels.PEAK_TOTAL_TILE if name == "peak_total" else kernels.TOTAL_TILE
    if not amp:
        constants |= {"grad_scale": None, "found_inf": None}
    kinds_of = {"first": "i32", "last": "i32", "count": "i32", "norm": "*fp64", "partials": "*fp64", "out": "*fp64"}
    kinds_of |= {"grad_scale": "*fp32", "found_inf": "*fp32"}
    constants = {p.name: constants[p.name] for p in kernel.params if p.name in constants}
    signature = {p.name: "constexpr" if p.name in constants else kinds_of.get(p.name, "*i64") for p in kernel.params}
    options = kernels.TOTAL_OPTIONS if total else kernels.OPTIONS
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget(*target), options=dict(options)).asm


FP64 = re.compile(r"\b(add|sub|mul|fma|mad|div|rcp|sqrt)\S*\.f64")
every_gpu = pytest.mark.parametrize("arch", [80, 90])
# All pairs for one architecture, and one for the other: its code differs in nothing that is looked for.
TARGETS = [(80, PAIRS[0]), *((90, pair) for pair in PAIRS)]
every_target = pytest.mark.parametrize(("arch", "dtypes"), TARGETS, ids=[f"{a}-{p}-{g}" for a, (p, g) in TARGETS])


def ptx_of(name: str, dtypes: tuple[str, str], arch: int, amp: bool = False) -> str:
    return assembly(name, dtypes, ("cuda", arch, 32), amp)["ptx"]


def vectors(ptx: str, op: str) -> int:
    """Accesses of 16 bytes."""
    return len(re.findall(rf"\b{op}\.global\.(?:v4\.b32|v2\.b64)", ptx))


@needs_triton
@compiled
@every_target
@pytest.mark.parametrize(
    ("name", "operands", "written"),
    [
        ("perturb", 2, 2),
        ("restore_accumulate", 2, 1),
        ("sgd_update", 3, 2),
        ("adam_update", 5, 4),
        ("perturb of p = 1", 2, 2),
    ],
)
def test_memory_is_read_and_written_in_vectors(
    name: str, operands: int, written: int, dtypes: tuple[str, str], arch: int
) -> None:
    """Every operand of a full tile, each element once, and nothing through local or shared memory."""
    from fused_sam.backends.triton import kernels

    ptx = ptx_of(name, dtypes, arch)
    per_thread = kernels.tiles_of(kernel_of(name))["TILE"] // (32 * kernels.OPTIONS["num_warps"])
    size = {F32: 4, F64: 8, BF16: 2, F16: 2}
    param, grad = (size[d] * per_thread // 16 for d in dtypes)
    assert vectors(ptx, "ld") == param * (operands - 1) + grad
    assert vectors(ptx, "st") == param * written
    assert ".local" not in ptx


@needs_triton
@compiled
@every_target
@pytest.mark.parametrize("name", ["norm_partials", "peak_partials"])
def test_the_norm_reads_vectors_and_adds_in_fp64(name: str, dtypes: tuple[str, str], arch: int) -> None:
    ptx = ptx_of(name, dtypes, arch)
    assert vectors(ptx, "ld") >= 2
    assert name == "peak_partials" or "fma.rn.f64" in ptx
    assert ".local" not in ptx
    assert not re.search(r"\b(add|fma|mul)\S*\.f32", ptx)


@needs_triton
@compiled
@every_gpu
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids="-".join)
def test_the_update_computes_nothing_in_fp64(dtypes: tuple[str, str], amp: bool, arch: int) -> None:
    """Hyperparameters are stored in it and rounded once; all the rest is fp32, with subnormals."""
    ptx = ptx_of("sgd_update", dtypes, arch, amp)
    assert not FP64.search(ptx)
    assert "fma.rn.f32" in ptx
    assert ".ftz" not in ptx


def loops_over_elements(ptx: str) -> list[str]:
    """Return the code of the innermost loops that read memory: from each label to the branch back to it."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    branches = [(labels[m[1]], m.start()) for m in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx) if m[1] in labels]
    reading = [ptx[begin:end] for begin, end in branches if "ld.global" in ptx[begin:end]]
    return [code for code in reading if not any(other != code and other in code for other in reading)]


@needs_triton
@compiled
@every_gpu
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids="-".join)
def test_elements_of_adam_are_computed_in_fp32(dtypes: tuple[str, str], amp: bool, arch: int) -> None:
    """fp64 is for what a program computes once; in the loops division and root are rounded as IEEE demands."""
    ptx = ptx_of("adam_update", dtypes, arch, amp)
    loops = loops_over_elements(ptx)
    assert len(loops) == 2  # full tiles, and the rest
    for code in loops:
        assert not FP64.search(code)
        for instruction in ("fma.rn.f32", "div.rn.f32", "sqrt.rn.f32"):
            assert instruction in code
    assert FP64.search(ptx)
    assert ".ftz" not in ptx


@needs_triton
@compiled
@pytest.mark.parametrize("name", [*WRITERS, "perturb of p = 1"])
@pytest.mark.parametrize("dtypes", PAIRS[:4], ids="-".join)
def test_a_thread_writes_the_elements_that_it_has_read(name: str, dtypes: tuple[str, str]) -> None:
    """In the swap the backup is written where the gradient was read; another thread might not have read it yet."""
    code = assembly(name, dtypes, ("cuda", 90, 32), amp=True)
    assert "convert_layout" not in code["ttgir"]
    assert "bar.sync" not in code["ptx"]


@needs_triton
@compiled
@pytest.mark.parametrize("name", [*KERNELS, "perturb of p = 1"])
@pytest.mark.parametrize(
    ("arch", "dtypes"), [("gfx942", PAIRS[0]), ("gfx942", PAIRS[1]), ("gfx1100", PAIRS[0])], ids=str
)
def test_it_compiles_for_amd(name: str, dtypes: tuple[str, str], arch: str) -> None:
    code = assembly(name, dtypes, ("hip", arch, 64 if arch.startswith("gfx9") else 32), amp=True)["amdgcn"]
    if name.partition(" ")[0] in WRITERS:
        # Half a tile of bf16 is 8 bytes for each of 256 threads.
        narrow = "x2" if name == "adam_update" and arch == "gfx942" and BF16 in dtypes else "x4"
        assert re.search(rf"store_(dword{narrow}|b128)", code)
    assert re.search(r"scratch_(load|store)", code) is None
