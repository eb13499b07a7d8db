"""What all kernels are made of: chunks, tiles, scalars from tables, sums in an order of their own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk(chunks, sizes, index, CHUNK: tl.constexpr):
    """(tensor, first element, elements) of a chunk. The table answers in one load what a search takes ten for."""
    entry = tl.load(chunks + index)
    row = entry >> 32
    begin = (entry & 0xFFFFFFFF) * CHUNK
    return row, begin, tl.minimum(tl.load(sizes + row) - begin, CHUNK).to(tl.int32)


@triton.jit
def pointer(addresses, row, begin, T: tl.constexpr):
    """(address, pointer to element `begin`) of a tensor."""
    address = tl.load(addresses + row)
    return address, address.to(tl.pointer_type(T)) + begin


@triton.jit
def source_of(w_address, backups, row, begin, P: tl.constexpr):
    """(address of the backup, pointer to w: the backup where there is one)."""
    b_address = tl.load(backups + row)
    return b_address, tl.where(b_address == 0, w_address, b_address).to(tl.pointer_type(P)) + begin


@triton.jit
def in_full_tiles(address, count, TILE: tl.constexpr):
    """Elements that can be taken in vectors of 16 bytes: whole tiles, if all the addresses that were or-ed allow it."""
    return tl.where((address & 15) == 0, count // TILE * TILE, 0)


@triton.jit
def _tile(pointer, start, TILE: tl.constexpr, FULL: tl.constexpr):
    """Pointers to the elements of a tile. The hint must follow the cast to a pointer, or it is lost."""
    first = pointer + start
    if FULL:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, TILE)


@triton.jit
def load(pointer, start, count, wanted, TILE: tl.constexpr, FULL: tl.constexpr):
    """A tile of a tensor, zeros where it is not wanted. A mask that is the same for all elements keeps the vectors."""
    if FULL:
        return tl.load(_tile(pointer, start, TILE, FULL), mask=wanted, other=0.0)
    inside = start + tl.arange(0, TILE) < count
    return tl.load(_tile(pointer, start, TILE, FULL), mask=inside & wanted, other=0.0)


@triton.jit
def store(pointer, value, start, count, wanted, TILE: tl.constexpr, FULL: tl.constexpr):
    """A tile of a tensor, where it is wanted."""
    if FULL:
        tl.store(_tile(pointer, start, TILE, FULL), value, mask=wanted)
    else:
        inside = start + tl.arange(0, TILE) < count
        tl.store(_tile(pointer, start, TILE, FULL), value, mask=inside & wanted)


@triton.jit
def widened(x, C: tl.constexpr):
    """16-bit data by way of fp32."""
    if x.dtype != C:
        x = x.to(tl.float32)
    return x.to(C)


@triton.jit
def narrowed(x, T: tl.constexpr):
    """The inverse of `widened`, rounded: 16-bit data by way of fp32."""
    if T.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(T)


@triton.jit
def number(bits):
    """The float64 of these bits."""
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def scalar(bits, address, wide):
    """A float64: the number itself, or what is in device memory."""
    value = number(bits)
    if address != 0:
        if wide:
            value = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def sum_of_lanes(x, SIZE: tl.constexpr):
    """Neighbours are added until one number is left: the same additions in whatever layout a target keeps the tile."""
    n: tl.constexpr = SIZE // 2
    x = tl.sum(tl.reshape(x, [n, 2]), axis=1)
    if n > 1:
        return sum_of_lanes(x, n)
    return tl.sum(x, axis=0)
