"""Norms of the CUDA kernels to the bit, recorded on the emulator: a GPU adds in the same order."""

from __future__ import annotations

import torch
from helpers import ascent_groups
from torch import Tensor

from fused_sam import ops

SIZES = [0, 1, 3, 16, 67, 129, 1009, 4099, 20011, *(k % 5 for k in range(1500))]  # of several launches
BITS: dict[tuple[torch.dtype, bool], str] = {}


def numbers(size: int, step: int) -> Tensor:
    """Return fp64 numbers of so many sizes that each order of their sum has a rounding of its own."""
    k = torch.arange(size, dtype=torch.float64)
    return (k * step % 2003 - 1001) / 1009 * 2 ** (k % 31 - 15)


def norm_bits(dtype: torch.dtype, adaptive: bool, backend: str, device: str) -> str:
    """Return the norm of gradients that are the same on every machine."""
    params, grads = ([numbers(n, step).to(device, dtype) for n in SIZES] for step in (7919, 104729))
    return ops.norm(params, grads, ascent_groups(len(SIZES), adaptive=adaptive), backend=backend).item().hex()
