"""Kernels of the base steps."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_sam.backends.triton.tiles import (
    chunk,
    in_full_tiles,
    load,
    number,
    pointer,
    scalar,
    source_of,
    store,
    widened,
)


@triton.jit
def _is_live(g_address, found_inf):
    """Return whether there is an update after the restore."""
    live = g_address != 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    return live


@triton.jit
def _multiplier(grad_scale, C: tl.constexpr):
    """Return float32(1 / float64(scale)), which is what a GradScaler multiplies by, in the type of the arithmetic.

    Of a float32 the quotient in float32 is the same number: float64 has more than twice the digits, so that rounding
    twice rounds as once.
    """
    inverse = tl.full([], 1.0, tl.float32)
    if grad_scale is not None:
        scale = tl.load(grad_scale)
        if scale.dtype == tl.float64:
            inverse = (1.0 / scale).to(tl.float32)
        else:
            inverse = tl.div_rn(inverse, scale.to(tl.float32))
    return inverse.to(C)


@triton.jit
def _sgd_tile(
    w_,
    source,
    g_,
    m_,
    start,
    count,
    live,
    multiplier,
    sign,
    minus_lr,
    momentum,
    undamped,
    decay,
    flags,
    C: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Do the operations of torch.optim.SGD's for-loop, in its order: ``x.add(y, alpha=a)`` is fma(y, a, x) there."""
    has_momentum = (flags & 16) != 0
    first = (flags & 8) != 0
    scaled = live & (multiplier != 1.0)
    raw = load(source, start, count, True, TILE, FULL)
    stored = load(g_, start, count, live, TILE, FULL)
    m = widened(load(m_, start, count, live & has_momentum & (first == 0), TILE, FULL), C)
    w = widened(raw, C)
    g = widened(stored, C) * multiplier
    d = g * sign
    d = tl.where((flags & 32) != 0, tl.fma(w, tl.broadcast_to(decay, [TILE]), d), d)
    m = tl.where(first, d, tl.fma(d, tl.broadcast_to(undamped, [TILE]), m * momentum))
    ahead = tl.fma(m, tl.broadcast_to(momentum, [TILE]), d)
    d = tl.where(has_momentum, tl.where((flags & 2) != 0, ahead, m), d)
    updated = tl.fma(d, tl.broadcast_to(minus_lr, [TILE]), w).to(raw.dtype)
    store(g_, g.to(stored.dtype), start, count, scaled, TILE, FULL)
    store(m_, m.to(raw.dtype), start, count, live & has_momentum, TILE, FULL)
    store(w_, tl.where(live, updated, raw), start, count, True, TILE, FULL)


@triton.jit(
    do_not_specialize=[
        "chunks", "sizes", "groups", "weights", "grads", "backups", "momenta", "sgd", "grad_scale", "found_inf",
        "first",
    ]
)  # fmt: skip
def sgd_update(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    backups,
    momenta,
    sgd,
    grad_scale,
    found_inf,
    first,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,
):
    """Set w = backup where there is one, then do SGD where there is a gradient and found_inf is 0."""
    row, begin, count = chunk(chunks, sizes, first + tl.program_id(0), CHUNK)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    b_address, source = source_of(w_address, backups, row, begin, P)
    m_address, m = pointer(momenta, row, begin, P)
    live = _is_live(g_address, found_inf)
    entry = sgd + tl.load(groups + row) * 6
    flags = tl.load(entry + 5)
    # Triton's own negation is a subtraction from zero, which loses the sign of a zero.
    minus_lr = scalar(tl.load(entry), tl.load(entry + 4), (flags & 1) != 0).to(C) * -1.0
    sign = tl.where((flags & 4) != 0, -1.0, 1.0).to(C)
    momentum = number(tl.load(entry + 1)).to(C)
    undamped = number(tl.load(entry + 2)).to(C)
    decay = number(tl.load(entry + 3)).to(C)
    k = _multiplier(grad_scale, C)
    full = in_full_tiles(w_address | g_address | b_address | m_address, count, TILE)
    for i in range(0, full, TILE):
        _sgd_tile(w, source, g, m, i, count, live, k, sign, minus_lr, momentum, undamped, decay, flags, C, TILE, True)
    for i in range(full, count, REST):
        _sgd_tile(w, source, g, m, i, count, live, k, sign, minus_lr, momentum, undamped, decay, flags, C, REST, False)


@triton.jit
def _divided(x, y):
    """Return x / y, rounded once, which Triton's own fp32 division is not."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _root(x):
    """Return the square root, rounded once."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _product(x, x_low, y, y_low):
    """Return the product of two fp64 numbers, each given as a sum of two, as such a sum."""
    high = x * y
    low = tl.fma(x, y, high * -1.0) + (x * y_low + x_low * y)
    total = high + low
    return total, low - (total - high)


@triton.jit
def _power(x, n):
    """Return x^n of an fp64 number and an integer, rounded once: the same bits on every GPU, of which no two vendors
    have one pow."""
    zero = tl.full([], 0.0, tl.float64)
    high, low = zero + 1.0, zero
    x_low = zero
    while n > 0:
        if (n & 1) != 0:
            high, low = _product(high, low, x, x_low)
        x, x_low = _product(x, x_low, x, x_low)
        n = n >> 1
    return high


@triton.jit
def _adam_corrections(entry, steps, row):
    """Return (1 - beta1^t, sqrt(1 - beta2^t)) as float64, from the table, or of the step after the last one."""
    correction1 = number(tl.load(entry + 5))
    correction2_root = number(tl.load(entry + 6))
    address = tl.load(steps + row)
    if (correction1 == 0) & (address != 0):
        t = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.int64) + 1
        correction1 = 1.0 - _power(number(tl.load(entry + 1)), t)
        correction2_root = tl.sqrt(1.0 - _power(number(tl.load(entry + 2)), t))
    return correction1, correction2_root


@triton.jit
def _adam_numbers(entry, flags, steps, row, C: tl.constexpr):
    """Return what a step multiplies by, computed in float64 and rounded once to C."""
    sign = tl.where((flags & 4) != 0, -1.0, 1.0).to(C)
    lr = scalar(tl.load(entry), tl.load(entry + 7), (flags & 1) != 0)
    correction1, correction2_root = _adam_corrections(entry, steps, row)
    minus_step_size = (lr / correction1).to(C) * -1.0
    decay = number(tl.load(entry + 4))
    kept = (1.0 - lr * decay).to(C)
    weight1 = (1.0 - number(tl.load(entry + 1))).to(C)
    near = weight1 < 0.5
    weight1 = tl.where(near, weight1, weight1 - 1.0)
    beta2 = number(tl.load(entry + 2))
    weight2 = (1.0 - beta2).to(C)
    eps = number(tl.load(entry + 3)).to(C)
    return sign, minus_step_size, kept, decay.to(C), weight1, near, beta2.to(C), weight2, correction2_root.to(C), eps


@triton.jit
def _adam_averages(m, v, u, d, weight1, near, beta2, weight2, amsgrad, TILE: tl.constexpr):
    """Return m, v and u after a step along d."""
    away = d - m
    m = tl.fma(tl.broadcast_to(weight1, [TILE]), away, tl.where(near, m, d))
    v = tl.fma(weight2 * d, d, v * beta2)
    return m, v, tl.where(amsgrad & ((u > v) | (u != u)), u, v)


@triton.jit
def _adam_tile(
    w_,
    source,
    g_,
    m_,
    v_,
    u_,
    start,
    count,
    live,
    multiplier,
    sign,
    minus_step_size,
    kept,
    decay,
    weight1,
    near,
    beta2,
    weight2,
    root,
    eps,
    flags,
    C: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Do the operations of torch.optim.Adam's for-loop, in its order; see AdamMath in csrc/arithmetic.h."""
    remembers = live & ((flags & 8) == 0)
    amsgrad = (flags & 64) != 0
    decoupled = (flags & 128) != 0
    decays = (flags & 32) != 0
    raw = load(source, start, count, True, TILE, FULL)
    stored = load(g_, start, count, live, TILE, FULL)
    m = widened(load(m_, start, count, remembers, TILE, FULL), C)
    v = widened(load(v_, start, count, remembers, TILE, FULL), C)
    u = widened(load(u_, start, count, remembers & amsgrad, TILE, FULL), C)
    w = widened(raw, C)
    g = widened(stored, C) * multiplier
    d = g * sign
    d = tl.where(decays & (decoupled == 0), tl.fma(w, tl.broadcast_to(decay, [TILE]), d), d)
    w = tl.where(decays & decoupled, w * kept, w)
    m, v, u = _adam_averages(m, v, u, d, weight1, near, beta2, weight2, amsgrad, TILE)
    denominator = _divided(_root(u), tl.broadcast_to(root, [TILE])) + eps
    updated = (w + _divided(minus_step_size * m, denominator)).to(raw.dtype)
    store(g_, g.to(stored.dtype), start, count, live & (multiplier != 1.0), TILE, FULL)
    store(m_, m.to(raw.dtype), start, count, live, TILE, FULL)
    store(v_, v.to(raw.dtype), start, count, live, TILE, FULL)
    store(u_, u.to(raw.dtype), start, count, live & amsgrad, TILE, FULL)
    store(w_, tl.where(live, updated, raw), start, count, True, TILE, FULL)


@triton.jit(
    do_not_specialize=[
        "chunks", "sizes", "groups", "weights", "grads", "backups", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs",
        "steps", "adam", "grad_scale", "found_inf", "first",
    ]
)  # fmt: skip
def adam_update(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    backups,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    steps,
    adam,
    grad_scale,
    found_inf,
    first,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,
):
    """Set w = backup where there is one, then do Adam where there is a gradient and found_inf is 0."""
    row, begin, count = chunk(chunks, sizes, first + tl.program_id(0), CHUNK)
    w_address, w = pointer(weights, row, begin, P)
    g_address, g = pointer(grads, row, begin, G)
    b_address, source = source_of(w_address, backups, row, begin, P)
    m_address, m = pointer(exp_avgs, row, begin, P)
    v_address, v = pointer(exp_avg_sqs, row, begin, P)
    u_address, u = pointer(max_exp_avg_sqs, row, begin, P)
    live = _is_live(g_address, found_inf)
    k = _multiplier(grad_scale, C)
    entry = adam + tl.load(groups + row) * 9
    flags = tl.load(entry + 8)
    sign, step, kept, decay, weight1, near, beta2, weight2, root, eps = _adam_numbers(entry, flags, steps, row, C)
    full = in_full_tiles(w_address | g_address | b_address | m_address | v_address | u_address, count, TILE)
    for i in range(0, full, TILE):
        _adam_tile(
            w, source, g, m, v, u, i, count, live, k, sign, step, kept, decay, weight1, near, beta2, weight2, root, eps,
            flags, C, TILE, True,
        )  # fmt: skip
    for i in range(full, count, REST):
        _adam_tile(
            w, source, g, m, v, u, i, count, live, k, sign, step, kept, decay, weight1, near, beta2, weight2, root, eps,
            flags, C, REST, False,
        )  # fmt: skip
