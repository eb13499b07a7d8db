"""Elements beyond 32 bits in the Triton kernels: where a chunk of a huge tensor begins, without the tensor."""

from __future__ import annotations

import os

import pytest
import torch
from triton_tests import STATE

if STATE != "ok":
    pytest.skip(STATE, allow_module_level=True)

import triton
import triton.language as tl

from fused_sam.backends.triton import kernels, tables, tiles

BF16 = 2 << 2 | 2  # the kind of bfloat16 parameters with gradients of their dtype
SIZES = (3, 2**33 + 5, 1)


@triton.jit
def places(chunks, sizes, addresses, out, T: tl.constexpr, CHUNK: tl.constexpr):
    """What a kernel knows of its chunk: tensor, first element, elements, and the address of the first."""
    index = tl.program_id(0)
    row, begin, count = tiles.chunk(chunks, sizes, index, CHUNK)
    address, first = tiles.pointer(addresses, row, begin, T)
    tl.store(out + 4 * index, row)
    tl.store(out + 4 * index + 1, begin)
    tl.store(out + 4 * index + 2, count)
    tl.store(out + 4 * index + 3, first.to(tl.int64) - address)


def test_the_plan_of_a_tensor_beyond_32_bits() -> None:
    plan = tables.plan(tables.column([BF16] * 3), tables.column(SIZES), (3,))
    entries = torch.frombuffer(bytearray(plan.chunks), dtype=torch.int64)
    whole = SIZES[1] // kernels.CHUNK
    assert plan.launches[0].programs == len(entries) == whole + 3
    assert entries[0] == 0
    assert entries[-1] == 2 << 32
    assert torch.equal(entries[1:-1], (1 << 32) + torch.arange(whole + 1))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py, in the interpreter")
def test_a_chunk_beyond_32_bits_is_where_it_should_be() -> None:
    number = [0, 1, 2**31 // kernels.CHUNK, 2**32 // kernels.CHUNK + 1, 2**33 // kernels.CHUNK]
    chunks = torch.tensor([(1 << 32) + k for k in number])
    out = torch.zeros(len(number), 4, dtype=torch.int64)
    addresses = torch.tensor([0, 2**47, 0])
    places[(len(number),)](chunks, torch.tensor(SIZES), addresses, out, T=tl.bfloat16, CHUNK=kernels.CHUNK)
    begins = [k * kernels.CHUNK for k in number]
    counts = [min(kernels.CHUNK, SIZES[1] - begin) for begin in begins]
    assert counts[-1] == 5
    assert out.tolist() == [[1, begin, count, 2 * begin] for begin, count in zip(begins, counts, strict=True)]
