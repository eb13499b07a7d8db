"""What every step looks up or sets for each of its parameters, in C++ where the native core loads.

No backend is concerned: these go over Python's lists, whatever device the tensors are on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

__all__ = ["all_present", "clear_grads", "get_grads", "lookup"]

if TYPE_CHECKING:
    from fused_sam.backends.interface import TensorList


def get_grads(params: TensorList) -> TensorList:
    """Return p.grad of every parameter."""
    return [p.grad for p in params]


def clear_grads(params: TensorList) -> None:
    """Set p.grad to None for every parameter."""
    for p in params:
        p.grad = None


def lookup(state: dict[Tensor, dict[str, Any]], params: TensorList, key: str) -> TensorList:
    """Return the entry of each parameter's state, None where there is none, or where its state is no dict."""
    entries = [state.get(p) for p in params]
    return [entry.get(key) if isinstance(entry, dict) else None for entry in entries]


def all_present(tensors: TensorList) -> bool:
    """Return whether no entry is None. (``None in tensors`` would compare tensors.)"""
    return all(x is not None for x in tensors)


with contextlib.suppress(Exception):  # whatever a broken build raises
    from fused_sam._native import all_present, clear_grads, get_grads, lookup
