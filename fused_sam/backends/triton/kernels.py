"""The kernels, in Triton: one program per chunk of a tensor, no matter how many tensors there are.

Every address is an int64 in a table in device memory, and so is every hyperparameter: only dtypes are compiled in.
What changes between steps changes a table, never the code. Arithmetic is that of ``csrc/arithmetic.h``: each product
and each fused multiply-add is written out, and the launches forbid the compiler to fuse any other (`OPTIONS`).

Tables (int64, one entry per tensor of the op unless said otherwise; an address of 0 stands for "there is none"):

    chunks      [chunks]     tensor << 32 | number of the chunk within it
    sizes       elements
    groups      index of the group
    weights, grads, backups, momenta
                addresses (of parameters: an argument called "params" clashes with the code that Triton generates)
    ascent      [groups, 4]  rho as the bits of a float64, or the address of a scalar, flags, eta as bits
    sgd         [groups, 6]  lr, momentum, 1 - dampening, weight_decay as bits, the address of lr or 0, and flags
"""

from __future__ import annotations

import triton
import triton.language as tl

# Elements per program. The norm has one fp64 partial per chunk, whatever the GPU and the grid: its bits depend on this
# number and on TILE, and on nothing else.
CHUNK = 8192
# Elements that a program has in flight at a time: 4 vectors of 16 bytes of each fp32 operand per thread.
TILE = 2048
# The same where vectors do not fit: at the end of a tensor, and all along a misaligned one. It must differ from TILE:
# the compiler gives accesses of one shape one distribution over threads, and stores of the other size another. In the
# swap a thread must write where it has read itself.
REST = 1024
# Elements that the program which adds up the partials reads at a time.
TOTAL_TILE = 8192
# fp64 must not be contracted either: bits would depend on the vendor's compiler.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
TOTAL_OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}

# Flags of a group.
WIDE = 1  # the scalar at the address is a float64, else a float32
ADAPTIVE = 2
NESTEROV = 2
MAXIMIZE = 4
FIRST = 8
MOMENTUM = 16
DECAY = 32


@triton.jit
def _chunk(chunks, sizes, index, CHUNK: tl.constexpr):
    """(tensor, first element, elements) of a chunk. The table answers in one load what a search takes ten for."""
    entry = tl.load(chunks + index)
    row = entry >> 32
    begin = (entry & 0xFFFFFFFF) * CHUNK
    return row, begin, tl.minimum(tl.load(sizes + row) - begin, CHUNK).to(tl.int32)


@triton.jit
def _pointer(addresses, row, begin, T: tl.constexpr):
    """(address, pointer to element `begin`) of a tensor."""
    address = tl.load(addresses + row)
    return address, address.to(tl.pointer_type(T)) + begin


@triton.jit
def _in_full_tiles(address, count, TILE: tl.constexpr):
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
def _load(pointer, start, count, wanted, TILE: tl.constexpr, FULL: tl.constexpr):
    """A tile of a tensor, zeros where it is not wanted. A mask that is the same for all elements keeps the vectors."""
    if FULL:
        return tl.load(_tile(pointer, start, TILE, FULL), mask=wanted, other=0.0)
    inside = start + tl.arange(0, TILE) < count
    return tl.load(_tile(pointer, start, TILE, FULL), mask=inside & wanted, other=0.0)


@triton.jit
def _store(pointer, value, start, count, wanted, TILE: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(_tile(pointer, start, TILE, FULL), value, mask=wanted)
    else:
        inside = start + tl.arange(0, TILE) < count
        tl.store(_tile(pointer, start, TILE, FULL), value, mask=inside & wanted)


@triton.jit
def _widened(x, C: tl.constexpr):
    """16-bit data by way of fp32."""
    if x.dtype != C:
        x = x.to(tl.float32)
    return x.to(C)


@triton.jit
def _number(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _scalar(bits, address, wide):
    """A float64: the number itself, or what is in device memory."""
    value = _number(bits)
    if address != 0:
        if wide:
            value = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def _sum(x, SIZE: tl.constexpr):
    """Neighbours are added until one number is left: the same additions in whatever layout a target keeps the tile."""
    n: tl.constexpr = SIZE // 2
    x = tl.sum(tl.reshape(x, [n, 2]), axis=1)
    if n > 1:
        return _sum(x, n)
    return tl.sum(x, axis=0)


@triton.jit
def _add_squares(acc, w, g, start, count, adaptive, eta, C: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr):
    x = _widened(_load(g, start, count, True, TILE, FULL), C).to(tl.float64)
    if adaptive:
        x = x * (tl.abs(_widened(_load(w, start, count, True, TILE, FULL), C).to(tl.float64)) + eta)
    return tl.fma(x, x, acc)


@triton.jit(do_not_specialize=["chunks", "sizes", "groups", "weights", "grads", "ascent", "partials", "first"])
def norm_partials(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    ascent,
    partials,
    first,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """partials[chunk] = sum of (T g)^2 over the chunk in float64; element i of it goes to lane i % TILE."""
    index = first + tl.program_id(0)
    row, begin, count = _chunk(chunks, sizes, index, CHUNK)
    entry = ascent + tl.load(groups + row) * 4
    adaptive = (tl.load(entry + 2) & 2) != 0
    eta = _number(tl.load(entry + 3))
    w_address, w = _pointer(weights, row, begin, P)
    g_address, g = _pointer(grads, row, begin, G)
    full = _in_full_tiles(w_address | g_address, count, TILE)
    acc = tl.zeros([TILE], tl.float64)
    for start in range(0, full, TILE):
        acc = _add_squares(acc, w, g, start, count, adaptive, eta, C, TILE, True)
    for start in range(full, count, TILE):
        acc = _add_squares(acc, w, g, start, count, adaptive, eta, C, TILE, False)
    tl.store(partials + index, _sum(acc, TILE))


@triton.jit(do_not_specialize=["partials", "out", "count"])
def norm_total(partials, out, count, TILE: tl.constexpr):
    """out = sqrt(sum of partials), a float64, by one program: partial i goes to lane i % TILE."""
    acc = tl.zeros([TILE], tl.float64)
    lane = tl.arange(0, TILE)
    for start in range(0, count, TILE):
        acc += tl.load(partials + start + lane, mask=start + lane < count, other=0.0)
    tl.store(out, tl.sqrt(_sum(acc, TILE)))


@triton.jit
def _ascent_factors(rho, norm, C: tl.constexpr):
    """(pre, post, active): e = post * (pre * g) where active, with pre a power of two that keeps post in range."""
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
    adaptive,
    eta,
    C: tl.constexpr,
    SIGN: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
):
    raw = _load(w_, start, count, True, TILE, FULL)
    w = _widened(raw, C)
    # Read before the backup is written: they may be the same memory.
    g = _widened(_load(g_, start, count, active, TILE, FULL), C)
    t = tl.abs(w) + eta
    if SIGN:
        step = tl.where(g > 0, post, tl.where(g < 0, post * -1.0, post * 0.0))
        moved = tl.where(adaptive, tl.fma(t, step, w), w + step)
    else:
        g = g * pre
        if adaptive:
            moved = tl.fma(t, t * g * post, w)
        else:
            moved = tl.fma(g, tl.broadcast_to(post, [TILE]), w)
    _store(b_, raw, start, count, True, TILE, FULL)
    _store(w_, moved.to(raw.dtype), start, count, active, TILE, FULL)


@triton.jit(do_not_specialize=["chunks", "sizes", "groups", "weights", "grads", "backups", "ascent", "norm", "last"])
def perturb(
    chunks,
    sizes,
    groups,
    weights,
    grads,
    backups,
    ascent,
    norm,
    last,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,
):
    """backup = w, w = w + e; without a norm, the e of p = inf.

    From the last chunk to the first: the cache still holds what the norm read last.
    """
    row, begin, count = _chunk(chunks, sizes, last - tl.program_id(0), CHUNK)
    w_address, w = _pointer(weights, row, begin, P)
    g_address, g = _pointer(grads, row, begin, G)
    b_address, b = _pointer(backups, row, begin, P)
    entry = ascent + tl.load(groups + row) * 4
    flags = tl.load(entry + 2)
    rho = _scalar(tl.load(entry), tl.load(entry + 1), (flags & 1) != 0)
    SIGN: tl.constexpr = norm is None
    if SIGN:
        pre, post, active = 1.0, rho.to(C), rho != 0
    else:
        pre, post, active = _ascent_factors(rho, tl.load(norm), C)
    adaptive = (flags & 2) != 0
    eta = _number(tl.load(entry + 3)).to(C)
    full = _in_full_tiles(w_address | g_address | b_address, count, TILE)
    for start in range(0, full, TILE):
        _perturb_tile(w, g, b, start, count, pre, post, active, adaptive, eta, C, SIGN, TILE, True)
    for start in range(full, count, REST):
        _perturb_tile(w, g, b, start, count, pre, post, active, adaptive, eta, C, SIGN, REST, False)


@triton.jit(do_not_specialize=["chunks", "sizes", "weights", "backups", "first"])
def restore(
    chunks, sizes, weights, backups, first, P: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, REST: tl.constexpr
):
    """w = backup."""
    row, begin, count = _chunk(chunks, sizes, first + tl.program_id(0), CHUNK)
    w_address, w = _pointer(weights, row, begin, P)
    b_address, b = _pointer(backups, row, begin, P)
    full = _in_full_tiles(w_address | b_address, count, TILE)
    for start in range(0, full, TILE):
        _store(w, _load(b, start, count, True, TILE, True), start, count, True, TILE, True)
    for start in range(full, count, REST):
        _store(w, _load(b, start, count, True, REST, False), start, count, True, REST, False)


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
    """The operations of torch.optim.SGD's for-loop, in its order: ``x.add(y, alpha=a)`` is fma(y, a, x) there."""
    has_momentum = (flags & 16) != 0
    first = (flags & 8) != 0
    scaled = live & (multiplier != 1.0)
    raw = _load(source, start, count, True, TILE, FULL)
    stored = _load(g_, start, count, live, TILE, FULL)
    m = _widened(_load(m_, start, count, live & has_momentum & (first == 0), TILE, FULL), C)
    w = _widened(raw, C)
    g = _widened(stored, C) * multiplier
    d = g * sign
    d = tl.where((flags & 32) != 0, tl.fma(w, tl.broadcast_to(decay, [TILE]), d), d)
    m = tl.where(first, d, tl.fma(d, tl.broadcast_to(undamped, [TILE]), m * momentum))
    ahead = tl.fma(m, tl.broadcast_to(momentum, [TILE]), d)
    d = tl.where(has_momentum, tl.where((flags & 2) != 0, ahead, m), d)
    updated = tl.fma(d, tl.broadcast_to(minus_lr, [TILE]), w).to(raw.dtype)
    _store(g_, g.to(stored.dtype), start, count, scaled, TILE, FULL)
    _store(m_, m.to(raw.dtype), start, count, live & has_momentum, TILE, FULL)
    _store(w_, tl.where(live, updated, raw), start, count, True, TILE, FULL)


@triton.jit
def _multiplier(grad_scale, C: tl.constexpr):
    """float32(1 / float64(scale)), which is what a GradScaler multiplies by, in the type of the arithmetic.

    Of a float32 the quotient in float32 is the same number: float64 has more than twice the digits, so that rounding
    twice rounds as once.
    """
    scale = tl.load(grad_scale)
    if scale.dtype == tl.float64:
        inverse = (1.0 / scale).to(tl.float32)
    else:
        inverse = tl.div_rn(tl.full([], 1.0, tl.float32), scale.to(tl.float32))
    return inverse.to(C)


@triton.jit(
    do_not_specialize=[
        "chunks", "sizes", "groups", "weights", "grads", "backups", "momenta", "sgd", "grad_scale", "found_inf", "first"
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
    """w = backup where there is one, then SGD where there is a gradient and found_inf is 0."""
    row, begin, count = _chunk(chunks, sizes, first + tl.program_id(0), CHUNK)
    w_address, w = _pointer(weights, row, begin, P)
    g_address, g = _pointer(grads, row, begin, G)
    b_address = tl.load(backups + row)
    m_address, m = _pointer(momenta, row, begin, P)
    source = tl.where(b_address == 0, w_address, b_address).to(tl.pointer_type(P)) + begin
    live = g_address != 0
    if found_inf is not None:
        live = live & (tl.load(found_inf) == 0)
    entry = sgd + tl.load(groups + row) * 6
    flags = tl.load(entry + 5)
    # Triton's own negation is a subtraction from zero, which loses the sign of a zero.
    minus_lr = _scalar(tl.load(entry), tl.load(entry + 4), (flags & 1) != 0).to(C) * -1.0
    sign = tl.where((flags & 4) != 0, -1.0, 1.0).to(C)
    momentum = _number(tl.load(entry + 1)).to(C)
    undamped = _number(tl.load(entry + 2)).to(C)
    decay = _number(tl.load(entry + 3)).to(C)
    k = tl.full([], 1.0, C)
    if grad_scale is not None:
        k = _multiplier(grad_scale, C)
    full = _in_full_tiles(w_address | g_address | b_address | m_address, count, TILE)
    for i in range(0, full, TILE):
        _sgd_tile(w, source, g, m, i, count, live, k, sign, minus_lr, momentum, undamped, decay, flags, C, TILE, True)
    for i in range(full, count, REST):
        _sgd_tile(w, source, g, m, i, count, live, k, sign, minus_lr, momentum, undamped, decay, flags, C, REST, False)
