"""Kernels of the 2-norm, the way to w + e, and the way back."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends.triton.tiles import (
    chunk,
    in_full_tiles,
    load,
    narrowed,
    number,
    pointer,
    scalar,
    store,
    sum_of_lanes,
    widened,
)


@triton.jit
def terms_of(ascent, groups, row):
    """Return (entry of the table, flags, whether adaptive, eta, decay) of a tensor."""
    entry = ascent + tl.load(groups + row) * 5
    flags = tl.load(entry + 2)
    return entry, flags, (flags & 2) != 0, number(tl.load(entry + 3)), number(tl.load(entry + 4))


@triton.jit
def scaled(w_, g_, start, count, adaptive, eta, decay, C: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr):
    """Return x = T (g + decay w) of a tile in fp64, zeros beyond the end. w is read only where x depends on it."""
    x = widened(load(g_, start, count, True, TILE, FULL), C).to(tl.float64)
    if adaptive | (decay != 0):
        w = widened(load(w_, start, count, True, TILE, FULL), C).to(tl.float64)
        x = tl.where(decay != 0, tl.fma(w, tl.broadcast_to(decay, [TILE]), x), x)
        x = x * tl.where(adaptive, tl.abs(w) + eta, 1.0)
    return x


@triton.jit
def _far_scale(norm):
    """Return far_scale of csrc/powers.h: what a norm is taken again in units of, 0 where its squares are in range."""
    return tl.where(norm == float("inf"), 2.0**600, tl.where(norm < 2.0**-480, 2.0**-600, 0.0))


@triton.jit(
    do_not_specialize=["chunks", "sizes", "groups", "weights", "grads", "ascent", "partials", "norm", "first"]
)  # fmt: skip
def norm_partials(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    ascent,
    partials,
    norm,
    first,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Write partials[chunk] = sum of x^2 over the chunk in float64; element i of it goes to lane i % TILE.

    ``AGAIN``: of x in other units, where the norm found before is far out; elsewhere nothing is read.
    """
    index = first + tl.program_id(0)
    row, begin, count = chunk(chunks, sizes, index, CHUNK)
    if AGAIN:
        scale = _far_scale(tl.load(norm))
        count = tl.where(scale > 0, count, 0)
    _, _, adaptive, eta, decay = terms_of(ascent, groups, row)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    full = in_full_tiles(w_address | g_address, count, TILE)
    acc = tl.zeros([TILE], tl.float64)
    for start in range(0, full, TILE):
        x = scaled(w, g, start, count, adaptive, eta, decay, C, TILE, True)
        if AGAIN:
            x = x / scale
        acc = tl.fma(x, x, acc)
    for start in range(full, count, TILE):
        x = scaled(w, g, start, count, adaptive, eta, decay, C, TILE, False)
        if AGAIN:
            x = x / scale
        acc = tl.fma(x, x, acc)
    tl.store(partials + index, sum_of_lanes(acc, TILE))


@triton.jit(do_not_specialize=["partials", "out", "count"])
def norm_total(partials, out, count, TILE: tl.constexpr, AGAIN: tl.constexpr):
    """Write out = sqrt(sum of partials), a float64, by one program: partial i goes to lane i % TILE. ``AGAIN`` as in
    `norm_partials`."""
    # Before the sum, whose barrier keeps the threads that read it from the one that writes it.
    before = tl.load(out) if AGAIN else 0.0
    acc = tl.zeros([TILE], tl.float64)
    lane = tl.arange(0, TILE)
    for start in range(0, count, TILE):
        acc += tl.load(partials + start + lane, mask=start + lane < count, other=0.0)
    norm = tl.sqrt(sum_of_lanes(acc, TILE))
    if AGAIN:
        scale = _far_scale(before)
        norm = tl.where(scale > 0, scale * norm, before)
    tl.store(out, norm)


@triton.jit
def _ascent_factors(rho, norm, C: tl.constexpr):
    """Return (pre, post, active): e = post * (pre * g) where active; pre, a power of two, keeps post in range."""
    double: tl.constexpr = C.primitive_bitwidth == 64
    limit: tl.constexpr = 2.0**900 if double else 2.0**100
    shift: tl.constexpr = 2.0**512 if double else 2.0**64
    active = (rho != 0) & (norm > 0) & (norm < float("inf"))
    norm = tl.where(active, norm, 1.0)
    scale = rho / norm
    size = tl.abs(scale)  # rho < 0 leads the other way
    far = (size > limit) | (size < 1.0 / limit)
    pre = tl.where(far, tl.where(size > 1.0, shift, 1.0 / shift), 1.0).to(tl.float64)
    # rho / norm overflows in fp64 when the norm is subnormal, so the norm is scaled, not the quotient.
    post = tl.where(far, rho / (norm * pre), scale)
    return pre.to(C), post.to(C), active


@triton.jit
def _perturb_tile(
    w_,
    g_,
    b_,
    start,
    count,
    pre,
    post,
    active,
    element,
    adaptive,
    eta,
    decay,
    C: tl.constexpr,
    SIGN: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    raw = load(w_, start, count, True, TILE, FULL)
    w = widened(raw, C)
    # Read before the backup is written: they may be the same memory.
    g = widened(load(g_, start, count, active, TILE, FULL), C)
    g = tl.where(decay != 0, tl.fma(w, tl.broadcast_to(decay, [TILE]), g), g)
    t = tl.abs(w) + eta
    if SIGN:
        step = tl.where(g > 0, post, tl.where(g < 0, post * -1.0, post * 0.0))
        if element is None:
            moved = tl.where(adaptive, tl.fma(t, step, w), w + step)
        else:
            moved = tl.where(start + tl.arange(0, TILE) == element, w + tl.where(adaptive, t, 1.0) * step, w)
    else:
        g = g * pre
        if adaptive:
            moved = tl.fma(t, t * g * post, w)
        else:
            moved = tl.fma(g, tl.broadcast_to(post, [TILE]), w)
    store(b_, raw, start, count, True, TILE, FULL)
    store(w_, narrowed(moved, raw.dtype), start, count, active, TILE, FULL)


@triton.jit(
    do_not_specialize=[
        "chunks", "sizes", "groups", "weights", "grads", "backups", "ascent", "moved", "norm", "last"
    ]
)  # fmt: skip
def perturb(
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
    """Set backup = w, w = w + e; without a norm, the e of p = inf, and with PEAK that of p = 1: rho T at the largest
    element. moved[tensor] = where the backup is, now that it is one.

    From the last chunk to the first: the cache still holds what the norm read last.
    """
    row, begin, count = chunk(chunks, sizes, last - tl.program_id(0), CHUNK)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    b_address, b = pointer(backups, row, begin, P)
    entry, flags, adaptive, eta, decay = terms_of(ascent, groups, row)
    rho = scalar(tl.load(entry), tl.load(entry + 1), (flags & 1) != 0)
    SIGN: tl.constexpr = PEAK or norm is None
    if PEAK:
        largest = tl.load(norm)
        active = (rho != 0) & (largest > 0) & (largest < float("inf")) & (tl.load(norm + 1) == row.to(tl.float64))
        pre, post, element = 1.0, rho.to(C), tl.load(norm + 2).to(tl.int64) - begin
    elif SIGN:
        pre, post, active, element = 1.0, rho.to(C), rho != 0, None
    else:
        pre, post, active = _ascent_factors(rho, tl.load(norm), C)
        element = None
    eta, decay = eta.to(C), decay.to(C)
    full = in_full_tiles(w_address | g_address | b_address, count, TILE)
    for start in range(0, full, TILE):
        _perturb_tile(w, g, b, start, count, pre, post, active, element, adaptive, eta, decay, C, SIGN, TILE, True)
    for start in range(full, count, REST):
        _perturb_tile(w, g, b, start, count, pre, post, active, element, adaptive, eta, decay, C, SIGN, REST, False)
    tl.store(moved + row, b_address)


@triton.jit(do_not_specialize=["chunks", "sizes", "weights", "backups", "first"])
def restore(
    chunks, sizes, weights, backups, first, P: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, REST: tl.constexpr
):
    """Set w = backup where there is one."""
    row, begin, count = chunk(chunks, sizes, first + tl.program_id(0), CHUNK)
    w_address, w = pointer(weights, row, begin, P)
    b_address, b = pointer(backups, row, begin, P)
    count = tl.where(b_address == 0, 0, count)
    full = in_full_tiles(w_address | b_address, count, TILE)
    for start in range(0, full, TILE):
        store(w, load(b, start, count, True, TILE, True), start, count, True, TILE, True)
    for start in range(full, count, REST):
        store(w, load(b, start, count, True, REST, False), start, count, True, REST, False)
