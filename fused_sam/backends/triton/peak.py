"""Kernels for p = 1: the largest element, and its place."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends.triton.ascent import scaled, terms_of
from fused_sam.backends.triton.tiles import chunk, in_full_tiles, pointer


@triton.jit
def _higher(x, start, best, at, TILE: tl.constexpr):
    """Return (bits of the largest |x| so far, where), by lane: bits of numbers >= 0 are in their order, NaN above."""
    bits = tl.where(x == x, x, float("nan")).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    higher = bits > best
    return tl.where(higher, bits, best), tl.where(higher, start + tl.arange(0, TILE), at)


@triton.jit(
    do_not_specialize=["chunks", "sizes", "groups", "weights", "grads", "ascent", "peaks", "elements", "first"]
)  # fmt: skip
def peak_partials(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    ascent,
    peaks,
    elements,
    first,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write peaks[chunk] = the bits of the largest |x|, elements[chunk] = the first such element; -1 if all are 0."""
    index = first + tl.program_id(0)
    row, begin, count = chunk(chunks, sizes, index, CHUNK)
    _, _, adaptive, eta, decay = terms_of(ascent, groups, row)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    full = in_full_tiles(w_address | g_address, count, TILE)
    best = tl.zeros([TILE], tl.int64)
    at = tl.full([TILE], -1, tl.int32)
    for start in range(0, full, TILE):
        x = scaled(w, g, start, count, adaptive, eta, decay, C, TILE, True)
        best, at = _higher(x, start, best, at, TILE)
    for start in range(full, count, TILE):
        x = scaled(w, g, start, count, adaptive, eta, decay, C, TILE, False)
        best, at = _higher(x, start, best, at, TILE)
    peak = tl.max(best, axis=0)
    place = tl.min(tl.where(best == peak, at, CHUNK), axis=0)
    tl.store(peaks + index, peak)
    tl.store(elements + index, tl.where(place < 0, -1, begin + place))


@triton.jit(do_not_specialize=["chunks", "peaks", "elements", "out", "count"])
def peak_total(chunks, peaks, elements, out, count, TILE: tl.constexpr):
    """Write out = (largest, number of its tensor, its element), by one program; of equal ones the first in the list."""
    last: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    best = tl.zeros([TILE], tl.int64)
    entry = tl.full([TILE], last, tl.int64)
    at = tl.full([TILE], -1, tl.int64)
    lane = tl.arange(0, TILE)
    for start in range(0, count, TILE):
        inside = start + lane < count
        peak = tl.load(peaks + start + lane, mask=inside, other=0)
        where = tl.load(chunks + start + lane, mask=inside, other=last)
        # Tensors of other dtypes have chunks further down, so entries are compared, not places in the table.
        better = (peak > best) | ((peak == best) & (where < entry))
        at = tl.where(better, tl.load(elements + start + lane, mask=inside, other=-1), at)
        entry = tl.where(better, where, entry)
        best = tl.where(better, peak, best)
    peak = tl.max(best, axis=0)
    where = tl.min(tl.where(best == peak, entry, last), axis=0)
    element = tl.max(tl.where((best == peak) & (entry == where), at, -1), axis=0)
    tl.store(out, peak.to(tl.float64, bitcast=True))
    tl.store(out + 1, tl.where(element < 0, -1, where >> 32).to(tl.float64))
    tl.store(out + 2, element.to(tl.float64))
