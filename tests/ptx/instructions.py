"""The emulator itself, on PTX written by hand: values against torch's, and each of its checks.

Run by test_ptx.py with the plugin; named so that pytest finds it nowhere else.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ptx.plugin import EMULATOR
from torch import Tensor

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel({parameters})
{{
    .reg .pred %p<4>;
    .reg .b16 %h<4>;
    .reg .b32 %r<10>;
    .reg .b64 %d<10>;
    .reg .f32 %f<4>;
    .reg .f64 %fd<4>;
    .shared .align 8 .b8 room[64];
    {loads}
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    cvt.u64.u32 %d9, %r3;
    {body}
    ret;
}}
"""


def load(body: str, count: int) -> int | None:
    """Return a kernel whose %d0, %d1, ... are addresses, %d9 and %r3 the thread's number, %r0 that in its block."""
    names = [f"kernel_param_{k}" for k in range(count)]
    parameters = ", ".join(f".param .u64 {name}" for name in names)
    loads = "\n".join(f"ld.param.u64 %d{k}, [{name}];" for k, name in enumerate(names))
    text = HEAD.format(parameters=parameters, loads=loads, body=body)
    return EMULATOR.library.emulator_load(text.encode(), b"kernel")


def run(body: str, *tensors: Tensor, blocks: int = 1, threads: int = 32) -> bool:
    """Run it on tensors, the only memory that it may touch; False where it was stopped."""
    kernel = load(body, len(tensors))
    assert kernel, EMULATOR.take_reports()
    EMULATOR.library.emulator_forget()
    for x in tensors:
        EMULATOR.library.emulator_register(x.data_ptr(), x.numel() * x.element_size())
    arguments = (ctypes.c_uint64 * len(tensors))(*(x.data_ptr() for x in tensors))
    return EMULATOR.library.emulator_launch(kernel, (ctypes.c_uint32 * 3)(blocks, 1, 1), threads, 0, arguments)


@pytest.fixture(autouse=True)
def _with_bounds() -> Iterator[None]:
    EMULATOR.configure(bounds=1)
    yield
    EMULATOR.configure()


def mapped(values: Tensor, into: torch.dtype, instructions: str) -> Tensor:
    """Return what instructions make of each value: from %{in} to %{out} of the registers of their types."""
    result = torch.zeros(values.shape, dtype=into)
    kind = {torch.float32: ("f32", "%f"), torch.float64: ("f64", "%fd"), torch.int64: ("s64", "%d")}
    (load_as, x), (store_as, y) = kind.get(values.dtype, ("b16", "%h")), kind.get(into, ("b16", "%h"))
    body = f"""
        mul.lo.u64 %d7, %d9, {values.element_size()};
        add.s64 %d7, %d7, %d0;
        ld.global.{load_as} {x}2, [%d7];
        {instructions.format(x=f"{x}2", y=f"{y}3")}
        mul.lo.u64 %d8, %d9, {result.element_size()};
        add.s64 %d8, %d8, %d1;
        st.global.{store_as} [%d8], {y}3;
    """
    blocks = -(-values.numel() // 256)
    assert values.numel() % 256 == 0
    assert run(body, values, result, blocks=blocks, threads=256), EMULATOR.take_reports()
    return result


def same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_floats_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same(mapped(every, torch.float32, f"cvt.f32.{name} {{y}}, {{x}};"), every.float())
    finite = every.float()[every.isfinite()]
    halfway = (finite.double() + finite.roll(1).double()) / 2
    for values in (torch.randn(2**12) * torch.logspace(-9, 6, 2**12), halfway[: 2**15].float()):
        rounded = mapped(values, dtype, f"cvt.rn.{name}.f32 {{y}}, {{x}};")
        assert same(rounded, values.to(dtype))


def root(x: Tensor) -> Tensor:
    """Return the rounded root; torch's is that of MKL, one ulp off now and then."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(x.numpy()))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("cvt.rn.f32.f64", lambda x: x.float()),
        ("cvt.rzi.s64.f64", lambda x: x.trunc().long()),
        ("cvt.rni.s64.f64", lambda x: x.round().long()),
        ("sqrt.rn.f64", root),
        ("abs.f64", lambda x: x.abs()),
        ("rcp.rn.f64", lambda x: 1 / x),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_fp64_is_rounded_as_its_name_says(instruction: str, expected: object) -> None:
    values = torch.randn(1024, dtype=torch.float64) * torch.logspace(-12, 12, 1024, dtype=torch.float64)
    values[:4] = torch.tensor([0.5, 1.5, -2.5, 0.0], dtype=torch.float64)
    wanted = expected(values)
    assert same(mapped(values, wanted.dtype, f"{instruction} {{y}}, {{x}};"), wanted)


def test_fma_is_rounded_once_and_subnormal_numbers_are_kept() -> None:
    x = torch.randn(256) * 1e-30
    once = (x.double() * x.double() + x.double()).float()
    assert same(mapped(x, torch.float32, "fma.rn.f32 {y}, {x}, {x}, {x};"), once)
    tiny = torch.full((256,), 2e-40)
    assert same(mapped(tiny, torch.float32, "add.rn.f32 {y}, {x}, {x};"), tiny + tiny)
    assert same(mapped(tiny, torch.float32, "add.ftz.f32 {y}, {x}, {x};"), torch.zeros(256))


@pytest.mark.parametrize(
    ("instruction", "named"),
    [
        ("wmma.load.a.sync.aligned.m16n16k16.f16 %r4, [%d0];", "unknown instruction wmma.load"),
        ("add.cc.s32 %r4, %r4, %r4;", "unknown .cc of instruction add.cc.s32"),
        ("add.rz.f32 %f1, %f1, %f1;", "unknown .rz of instruction add.rz.f32"),
        ("ld.volatile.global.u32 %r4, [%d0];", "unknown .volatile of instruction ld.volatile.global.u32"),
        ("mov.u32 %r4, %clock;", "unknown operand %clock"),
        ("bra nowhere;", "no label nowhere"),
    ],
)
def test_what_is_not_known_is_refused_by_name(instruction: str, named: str) -> None:
    assert load(instruction, 1) is None
    (report,) = EMULATOR.take_reports()
    assert named in report


WRITE_AND_READ = """
    mov.u64 %d5, room;
    mov.u32 %r4, room;
    shl.b32 %r5, %r0, 2;
    and.b32 %r5, %r5, 63;
    add.s32 %r5, %r5, %r4;
    setp.lt.u32 %p1, %r0, 16;
    @%p1 st.shared.u32 [%r5], %r0;
    {between}
    xor.b32 %r6, %r5, 4;
    @%p1 ld.shared.u32 %r7, [%r6];
"""
ADD_UP = """
    add.s64 %d4, %d0, 8;
    shl.b64 %d5, %d9, 2;
    add.s64 %d5, %d5, %d1;
    st.global.u32 [%d5], %r3;
    {before}
    atom.global.add.u32 %r4, [%d0], 1;
    setp.ne.u32 %p1, %r4, 7;
    @%p1 bra DONE;
    {after}
    ld.global.u32 %r5, [%d1];
    ld.global.u32 %r6, [%d1+28];
    add.s32 %r7, %r5, %r6;
    st.global.u32 [%d4], %r7;
DONE:
"""


@pytest.mark.parametrize(("between", "is_race"), [("", True), ("bar.warp.sync -1;", False), ("bar.sync 0;", False)])
def test_a_race_in_shared_memory_is_seen(between: str, is_race: bool) -> None:
    assert run(WRITE_AND_READ.format(between=between), torch.zeros(1))
    assert bool([x for x in EMULATOR.take_reports() if x.startswith("race")]) == is_race


@pytest.mark.parametrize(("before", "after"), [(True, True), (False, True), (True, False), (False, False)])
def test_blocks_that_pass_on_what_they_wrote_need_a_fence_on_both_sides(before: bool, after: bool) -> None:
    fences = {"before": "membar.gl;" * before, "after": "membar.gl;" * after}
    counter, written = torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    assert run(ADD_UP.format(**fences), counter, written, blocks=8, threads=1)
    assert counter.tolist() == [8, 0, 7, 0]
    assert bool(EMULATOR.take_reports()) != (before and after)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("shl.b64 %d5, %d9, 2; add.s64 %d5, %d5, %d0; ld.global.u32 %r4, [%d5+4];", "read out of bounds: 4 bytes"),
        ("st.global.u32 [%d0+-4], %r0;", "write out of bounds: 4 bytes"),
        ("ld.global.v2.u32 {%r4, %r5}, [%d0+4];", "misaligned: 8 bytes"),
        ("mov.u64 %d5, 0; ld.global.u32 %r4, [%d5];", "null: 4 bytes"),
        ("mov.u32 %r4, room; ld.shared.u32 %r5, [%r4+64];", "shared memory out of bounds"),
        ("bar.warp.sync 7;", "a lane is not in its own mask"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 exit; bar.warp.sync -1;", "a mask names a lane that has exited"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 bar.sync 1; @!%p1 bar.sync 0;", "wait at different barriers"),
        ("setp.eq.u32 %p1, %r0, 3; @%p1 bar.warp.sync -1; @!%p1 bar.sync 0;", "deadlock"),
        ("trap;", "trap"),
    ],
)
def test_what_stops_a_kernel_is_said(body: str, said: str) -> None:
    assert not run(body, torch.zeros(32, dtype=torch.int32))
    assert said in EMULATOR.take_reports()[0]


def test_what_was_never_written_is_poison() -> None:
    x = torch.zeros(32)
    assert run("st.global.f32 [%d0], %f1; @%p2 add.s32 %r4, %r4, 1;", x, threads=1)
    assert math.isclose(x[0].item(), -431602080.0)  # 0xcdcdcdcd
    assert "an undefined predicate is read" in EMULATOR.take_reports()[0]
