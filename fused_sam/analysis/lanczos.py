"""Lanczos' method, for the quadrature that `density` needs. Eigenvalues are scipy's: see `eigenvalues`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tridiagonal(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Return T of H Q = Q T, with Q an orthonormal basis of span(v, H v, ..., H^(k-1) v) for v = ``start``.

    With full reorthogonalisation, in two sweeps: without it rounding brings converged eigenvalues back as ghosts, each
    with weight of its own in the density.

    Args:
        matvec: H v for a vector of shape [n], fp64, with H symmetric.
        start: v, shape [n], fp64, not zero.
        steps: k, >= 1; fewer are made where the space is exhausted.

    Returns:
        T, shape [k, k], fp64, on the device of ``start``.
    """
    basis = start.new_empty((steps, start.numel()))
    t = start.new_zeros((steps, steps))
    q = start / torch.linalg.vector_norm(start)
    for i in range(steps):
        basis[i] = q
        r = matvec(q)
        length = torch.linalg.vector_norm(r)
        t[i, i] = r @ q
        for _ in range(2):
            r = r - basis[: i + 1].T @ (basis[: i + 1] @ r)
        beta = torch.linalg.vector_norm(r)
        # What is left of H q is rounding: q and those before it span an invariant space.
        if i + 1 == steps or beta <= 1e-10 * length:
            return t[: i + 1, : i + 1]
        t[i, i + 1] = t[i + 1, i] = beta
        q = r / beta
    raise AssertionError("the last step returns")
