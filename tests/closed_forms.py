"""The formulas in numpy's extended precision, independent of fused_sam.reference, and errors counted in ulps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def exact(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def exact_norm(pairs: Iterable[tuple[Tensor, Tensor | None, bool]]) -> float:
    """||T g|| over (param, grad, adaptive) triples, T = |w| where adaptive, 1 elsewhere."""
    values: list[float] = []
    for w, g, adaptive in pairs:
        if g is not None:
            scaled = g.detach().double() * w.detach().double() if adaptive else g.detach().double()
            values.extend(scaled.reshape(-1).tolist())
    return math.hypot(*values)  # whose squares overflow nowhere


def exact_ascent(w: Array, g: Array, norm: float, rho: float, adaptive: bool) -> Array:
    """e = rho T^2 g / ||T g||"""
    return rho * (w * w * g if adaptive else g) / np.longdouble(norm)


def exact_sgd(
    w: Array,
    g: Array,
    m: Array | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """torch.optim.SGD's documented update: (w', m', largest operand behind w', the same behind m')."""
    d = (-g if maximize else g) + weight_decay * w
    size = np.abs(g) + weight_decay * np.abs(w)
    buffer, buffer_size = d, size
    if m is not None:
        buffer = momentum * m + (1 - dampening) * d
        buffer_size = momentum * np.abs(m) + (1 - dampening) * size
    step, step_size = d, size
    if momentum != 0:
        step, step_size = (d + momentum * buffer, size + momentum * buffer_size) if nesterov else (buffer, buffer_size)
    updated = w - lr * step
    return updated, buffer, np.maximum(np.maximum(np.abs(w), np.abs(updated)), lr * step_size), buffer_size


def exact_adam(
    w: Array,
    g: Array,
    state: tuple[Array, Array, Array] | None,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, Array, Array, Array]]:
    """torch.optim.Adam's documented update: (w', m', v', largest v), and the largest operand behind each."""
    m, v, u = state if state is not None else (np.zeros_like(w),) * 3
    beta1, beta2 = betas
    d = -g if maximize else g
    size = np.abs(d)
    if not decoupled:
        d, size = d + weight_decay * w, size + weight_decay * np.abs(w)
    decayed = (1 - lr * weight_decay) * w if decoupled else w
    m, m_size = beta1 * m + (1 - beta1) * d, np.maximum(np.abs(m), size)
    v, v_size = beta2 * v + (1 - beta2) * d * d, np.maximum(beta2 * v, (1 - beta2) * size * size)
    u = np.maximum(u, v)
    # The corrections in float64, as torch computes them.
    scale = lr / (1 - beta1**t) / (np.sqrt((u if amsgrad else v) / (1 - beta2**t)) + eps)
    updated = decayed - scale * m
    w_size = np.maximum(np.maximum(np.abs(w), np.abs(updated)), scale * m_size)
    return (updated, m, v, u), (w_size, m_size, v_size, np.maximum(v_size, u))


def ulp(magnitude: Array, dtype: torch.dtype) -> Array:
    """Distance to the next number of `dtype` at each magnitude."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.abs(magnitude))
    spacing = np.where(magnitude == 0, 0, np.ldexp(np.longdouble(info.eps), exponent - 1))
    return np.maximum(spacing, np.longdouble(info.smallest_normal) * info.eps)


def assert_within_ulp(
    actual: Tensor,
    expected: Array,
    magnitude: Array,
    limit: float,
    what: str,
    dtype: torch.dtype | None = None,
) -> None:
    """|actual - expected| <= limit ulps of the tensor's dtype (or of `dtype`) at `magnitude`."""
    got = exact(actual)
    assert got.shape == expected.shape
    if got.size == 0:
        return
    assert np.isfinite(got).all(), f"{what}: non-finite values"
    error = np.abs(got - expected) / ulp(magnitude, dtype or actual.dtype)
    worst = int(error.argmax())
    assert error.max() <= limit, (
        f"{what}, shape {tuple(actual.shape)}, {actual.dtype}: element {worst} is {float(error.max()):.3g} "
        f"ulp off (limit {limit}): {got.reshape(-1)[worst]!r}, expected {expected.reshape(-1)[worst]!r}"
    )
