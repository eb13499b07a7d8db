"""The kernel of running means of gradients, beside the way back to w."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends.triton.tiles import chunk, in_full_tiles, load, number, pointer, source_of, store, widened


@triton.jit
def _accumulate_tile(
    w_, source, g_, start, count, is_mean, first, weight, C: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr
):
    """Update the mean like torch's lerp; see Lerp in csrc/arithmetic.h. Where g is the mean, it is read first."""
    raw = load(source, start, count, (is_mean & first) == 0, TILE, FULL)
    g = widened(load(g_, start, count, is_mean, TILE, FULL), C)
    mean = widened(raw, C)
    near = weight < 0.5
    nearest = tl.where(near, weight, weight - 1.0)
    mixed = tl.fma(tl.broadcast_to(nearest, [TILE]), g - mean, tl.where(near, mean, g))
    mean = tl.where(first, g * weight, mixed).to(raw.dtype)
    store(w_, tl.where(is_mean, mean, raw), start, count, True, TILE, FULL)


@triton.jit(
    do_not_specialize=["chunks", "sizes", "groups", "weights", "grads", "backups", "means", "first"]
)  # fmt: skip
def restore_accumulate(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    backups,
    means,
    first,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,
):
    """Set w = w + weight * (g - w) where there is a gradient; w is its mean. Set w = backup where there is one."""
    row, begin, count = chunk(chunks, sizes, first + tl.program_id(0), CHUNK)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    b_address, source = source_of(w_address, backups, row, begin, P)
    entry = means + tl.load(groups + row) * 2
    weight = number(tl.load(entry)).to(C)
    begins = (tl.load(entry + 1) & 8) != 0
    is_mean = g_address != 0
    full = in_full_tiles(w_address | g_address | b_address, count, TILE)
    for start in range(0, full, TILE):
        _accumulate_tile(w, source, g, start, count, is_mean, begins, weight, C, TILE, True)
    for start in range(full, count, REST):
        _accumulate_tile(w, source, g, start, count, is_mean, begins, weight, C, REST, False)
