"""What the ops ask of their groups and of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.interface import TensorList


def is_capturing(params: TensorList) -> bool:
    """Return whether what is launched now for these parameters goes into a CUDA graph."""
    return bool(params) and params[0].is_cuda and torch.cuda.is_current_stream_capturing()


def host_number(value: Any) -> float | Tensor:
    """Return a number, or the tensor itself where reading it would wait for its device."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def dual_exponent(p: float) -> float:
    """Return q of 1/p + 1/q = 1.

    Raises:
        ValueError: unless 1 <= p <= inf.
    """
    if not p >= 1:
        raise ValueError(f"Invalid {p=}. Must be >= 1, possibly inf.")
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def require_sizes(params: TensorList, groups: Sequence[Any]) -> None:
    """Refuse groups that do not cover the parameters."""
    covered = least = 0
    for group in groups:
        covered += group.size
        least = min(least, group.size)
    if covered != len(params) or least < 0:
        raise ValueError(f"Invalid groups, of {covered} tensors. Must cover len(params)={len(params)}, each size >= 0.")
