"""Kernels for p other than 2 and inf, in fp64: x^y, the largest element, norms of powers, and the way to w + e."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends.triton.ascent import scaled, terms_of
from fused_sam.backends.triton.tiles import (
    chunk,
    in_full_tiles,
    load,
    number,
    pointer,
    scalar,
    store,
    sum_of_lanes,
    widened,
)


@triton.jit
def _log2(x):
    """log2(x) of a positive fp64 number as a sum of two: to 2^-58 times the part that is no integer.

    x = 2^k m with m between sqrt(1/2) and sqrt(2), and ln(m) = 2 atanh(s) of s = (m - 1) / (m + 1), |s| < 0.172. The
    terms of atanh beyond the first are at most a hundredth of it, so they need no second number; after s^25 they end.
    """
    subnormal = x < 2.0**-1022
    bits = tl.where(subnormal, x * 2.0**54, x).to(tl.int64, bitcast=True)
    k = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    k = tl.where(subnormal, k - 54, k).to(tl.float64)
    above = m + 1.0
    inverse = 1.0 / above
    s = (m - 1.0) * inverse
    s_low = (tl.fma(s, above * -1.0, m - 1.0) - s * (m - (above - 1.0))) * inverse
    z = s * s
    series = z * (1.0 / 25.0) + 1.0 / 23.0
    for i in tl.static_range(10):
        series = tl.fma(series, z, 1.0 / (21 - 2 * i))
    tail = tl.fma(z, tl.fma(s, series, s_low), s_low)
    high = s * 2.8853900817779268  # 2 / ln(2)
    low = tl.fma(s, 2.8853900817779268, high * -1.0) + tl.fma(s, 4.0710547481862066e-17, tail * 2.8853900817779268)
    total = k + high
    low += high - (total - k)
    log = total + low
    return log, low - (log - total)


@triton.jit
def _exp2(high, low):
    """2^(high + low) in fp64, to 0.6 ulp; |low| is a rounding error of high.

    2^n e^g with |g| < 0.347, of which 1 + g is taken in two numbers and the series, at most 0.06, ends after g^15.
    """
    high = tl.minimum(tl.maximum(high, -1200.0), 1200.0)
    n = tl.floor(high + 0.5)
    part = high - n
    g = part * 0.6931471805599453  # ln(2)
    g_low = tl.fma(part, 0.6931471805599453, g * -1.0) + tl.fma(part, 2.3190468138462996e-17, low * 0.6931471805599453)
    series = tl.fma(g, 1.0 / 15.0, 1.0)
    for i in tl.static_range(12):
        series = tl.fma(g * (1.0 / (14 - i)), series, 1.0)
    series = series * (g * g * 0.5)
    near = 1.0 + g
    value = near + (tl.fma(g_low, near + series, series) + (g - (near - 1.0)))
    # By two powers of two: one alone would overflow where the result is subnormal or nearly the largest number.
    n = n.to(tl.int64)
    half = n >> 1
    first = ((half + 1023) << 52).to(tl.float64, bitcast=True)
    second = ((n - half + 1023) << 52).to(tl.float64, bitcast=True)
    return value * first * second


@triton.jit
def power(x, y):
    """x^y of fp64 x >= 0 and y > 0, to 0.6 ulp and y 2^-6 more: the same bits on every GPU, of which no two vendors
    have one pow."""
    high, low = _log2(x)
    product = high * y
    error = tl.fma(high, y, product * -1.0) + low * y
    result = _exp2(product, error)
    return tl.where(x > 0, tl.where(x < float("inf"), result, x), x)  # 0, inf and NaN stay


@triton.jit
def _higher(x, start, best, at, TILE: tl.constexpr):
    """(bits of the largest |x| so far, where) in every lane: bits of numbers >= 0 are in their order, NaN above."""
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
    """peaks[chunk] = the bits of the largest |x|, elements[chunk] = the first such element; -1 if all are 0."""
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
    """out = (largest, number of its tensor, its element), by one program; of equal ones the first in the list."""
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


@triton.jit(do_not_specialize=["chunks", "sizes", "groups", "weights", "grads", "ascent", "peak", "partials", "first"])
def power_partials(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    ascent,
    peak,
    partials,
    first,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """partials[chunk] = sum of (|x| / peak)^q over the chunk; element i of it goes to lane i % TILE."""
    index = first + tl.program_id(0)
    row, begin, count = chunk(chunks, sizes, index, CHUNK)
    entry, _, adaptive, eta, decay = terms_of(ascent, groups, row)
    q = number(tl.load(entry + 4))
    scale = tl.load(peak)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    full = in_full_tiles(w_address | g_address, count, TILE)
    acc = tl.zeros([TILE], tl.float64)
    for start in range(0, full, TILE):
        acc += power(tl.abs(scaled(w, g, start, count, adaptive, eta, decay, C, TILE, True)) / scale, q)
    for start in range(full, count, TILE):
        acc += power(tl.abs(scaled(w, g, start, count, adaptive, eta, decay, C, TILE, False)) / scale, q)
    tl.store(partials + index, sum_of_lanes(acc, TILE))


@triton.jit(do_not_specialize=["partials", "peak", "ascent", "out", "count"])
def power_total(partials, peak, ascent, out, count, TILE: tl.constexpr):
    """out = peak * (sum of partials)^(1/q), by one program; a peak that is zero or not finite is the norm itself."""
    acc = tl.zeros([TILE], tl.float64)
    lane = tl.arange(0, TILE)
    for start in range(0, count, TILE):
        acc += tl.load(partials + start + lane, mask=start + lane < count, other=0.0)
    scale = tl.load(peak)
    norm = scale * power(sum_of_lanes(acc, TILE), 1.0 / number(tl.load(ascent + 4)))
    tl.store(out, tl.where((scale > 0) & (scale < float("inf")), norm, scale))


@triton.jit
def _with_sign(size, x):
    """|size| with the sign of x, of a zero or NaN too."""
    magnitude = size.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    negative = x.to(tl.int64, bitcast=True) & -0x8000000000000000
    return (magnitude | negative).to(tl.float64, bitcast=True)


@triton.jit
def _displaced_tile(
    w_,
    g_,
    b_,
    start,
    count,
    rho,
    norm,
    exponent,
    active,
    element,
    adaptive,
    eta,
    decay,
    C: tl.constexpr,
    PEAK: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    raw = load(w_, start, count, True, TILE, FULL)
    w = widened(raw, C).to(tl.float64)
    # Read before the backup is written: they may be the same memory.
    g = widened(load(g_, start, count, active, TILE, FULL), C).to(tl.float64)
    t = tl.where(adaptive, tl.abs(w) + eta, 1.0)
    x = t * tl.where(decay != 0, tl.fma(w, tl.broadcast_to(decay, [TILE]), g), g)
    size = rho * t
    if PEAK:
        size = tl.where(start + tl.arange(0, TILE) == element, size, 0.0)
    else:
        size = size * power(tl.abs(x) / norm, exponent)
    moved = tl.where(size != 0, w + _with_sign(size, x), w)
    store(b_, raw, start, count, True, TILE, FULL)
    store(w_, moved.to(C).to(raw.dtype), start, count, active, TILE, FULL)


@triton.jit(
    do_not_specialize=[
        "chunks", "sizes", "groups", "weights", "grads", "backups", "ascent", "moved", "norm", "last"
    ]
)  # fmt: skip
def perturb_by_powers(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    backups,
    ascent,
    moved,
    norm,
    last,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,
    PEAK: tl.constexpr,
):
    """backup = w, w = w + rho T sign(x) (|x| / norm)^(q-1), or with PEAK all of rho T at the one largest element.

    moved[tensor] = where the backup is, as in `ascent.perturb`.
    """
    row, begin, count = chunk(chunks, sizes, last - tl.program_id(0), CHUNK)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    b_address, b = pointer(backups, row, begin, P)
    entry, flags, adaptive, eta, decay = terms_of(ascent, groups, row)
    rho = scalar(tl.load(entry), tl.load(entry + 1), (flags & 1) != 0)
    value = tl.load(norm)
    active = (rho != 0) & (value > 0) & (value < float("inf"))
    element = tl.full([], -1, tl.int64)
    if PEAK:
        active = active & (tl.load(norm + 1) == row.to(tl.float64))
        element = tl.load(norm + 2).to(tl.int64) - begin
    exponent = number(tl.load(entry + 4)) - 1.0
    full = in_full_tiles(w_address | g_address | b_address, count, TILE)
    for i in range(0, full, TILE):
        _displaced_tile(
            w, g, b, i, count, rho, value, exponent, active, element, adaptive, eta, decay, C, PEAK, TILE, True
        )
    for i in range(full, count, REST):
        _displaced_tile(
            w, g, b, i, count, rho, value, exponent, active, element, adaptive, eta, decay, C, PEAK, REST, False
        )
    tl.store(moved + row, b_address)
