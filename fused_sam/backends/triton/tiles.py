"""What all kernels are made of: chunks, tiles, scalars from tables, sums in an order of their own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk(chunks, sizes, index, CHUNK: tl.constexpr):
    """Return (tensor, first element, elements) of a chunk. The table takes one load, where a search takes ten."""
    entry = tl.load(chunks + index)
    row = entry >> 32
    begin = (entry & 0xFFFFFFFF) * CHUNK
    return row, begin, tl.minimum(tl.load(sizes + row) - begin, CHUNK).to(tl.int32)


@triton.jit
def pointer(addresses, row, begin, T: tl.constexpr):
    """Return (address, pointer to element `begin`) of a tensor."""
    address = tl.load(addresses + row)
    return address, address.to(tl.pointer_type(T)) + begin


@triton.jit
def source_of(w_address, backups, row, begin, P: tl.constexpr):
    """Return (address of the backup, pointer to w: the backup where there is one)."""
    b_address = tl.load(backups + row)
    return b_address, tl.where(b_address == 0, w_address, b_address).to(tl.pointer_type(P)) + begin


@triton.jit
def in_full_tiles(address, count, TILE: tl.constexpr):
    """Return how many elements fit vectors of 16 bytes: whole tiles, if all the addresses that were or-ed allow it."""
    return tl.where((address & 15) == 0, count // TILE * TILE, 0)


@triton.jit
def _tile(pointer, start, TILE: tl.constexpr, FULL: tl.constexpr):
    """Return pointers to the elements of a tile. The hint must follow the cast to a pointer, or it is lost."""
    first = pointer + start
    if FULL:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, TILE)


@triton.jit
def load(pointer, start, count, wanted, TILE: tl.constexpr, FULL: tl.constexpr):
    """Load a tile of a tensor, zeros where unwanted. A mask that is the same for all elements keeps the vectors."""
    if FULL:
        return tl.load(_tile(pointer, start, TILE, FULL), mask=wanted, other=0.0)
    inside = start + tl.arange(0, TILE) < count
    return tl.load(_tile(pointer, start, TILE, FULL), mask=inside & wanted, other=0.0)


@triton.jit
def store(pointer, value, start, count, wanted, TILE: tl.constexpr, FULL: tl.constexpr):
    """Store a tile of a tensor where it is wanted."""
    if FULL:
        tl.store(_tile(pointer, start, TILE, FULL), value, mask=wanted)
    else:
        inside = start + tl.arange(0, TILE) < count
        tl.store(_tile(pointer, start, TILE, FULL), value, mask=inside & wanted)


@triton.jit
def widened(x, C: tl.constexpr):
    """Convert a tile to a wider dtype; 16-bit data goes by way of fp32."""
    if x.dtype != C:
        x = x.to(tl.float32)
    return x.to(C)


@triton.jit
def narrowed(x, T: tl.constexpr):
    """Round a tile to a narrower dtype; 16-bit data goes by way of fp32."""
    if T.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(T)


@triton.jit
def number(bits):
    """Return the float64 of these bits."""
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def scalar(bits, address, wide):
    """Return a float64: the number itself, or what is in device memory."""
    value = number(bits)
    if address != 0:
        if wide:
            value = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def sum_of_lanes(x, SIZE: tl.constexpr):
    """Add neighbours until one number is left: the same additions in whatever layout a target keeps the tile."""
    n: tl.constexpr = SIZE // 2
    x = tl.sum(tl.reshape(x, [n, 2]), axis=1)
    if n > 1:
        return sum_of_lanes(x, n)
    return tl.sum(x, axis=0)
