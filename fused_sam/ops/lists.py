"""What every step looks up or sets for each of its parameters, in C++ where the native core loads.

No backend is concerned: these go over lists of tensors, whatever device they are on.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fused_sam.backends.interface import TensorList


class Gradients(list[Any]):
    """p.grad of every parameter, as they were when this was made. The native core's is no list, but used as one."""

    def __init__(self, params: TensorList) -> None:
        super().__init__(p.grad for p in params)


def has_grad(param: Tensor) -> bool:
    """Return whether p.grad is not None. The native core's makes no Python object for it."""
    return param.grad is not None


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


def first_present(tensors: TensorList) -> int | None:
    """Return the index of the first entry that is not None; None without any."""
    return next((i for i, x in enumerate(tensors) if x is not None), None)


def presence(tensors: TensorList) -> TensorList:
    """Return a list with None where there is none: the entries themselves, or True for those of `Gradients`."""
    return tensors


def increment_version(tensors: TensorList) -> None:
    """Tell autograd that the tensors have been written."""
    torch.autograd.graph.increment_version(tensors)


def read_through_aten() -> str | None:
    """Have the native core read tensors through ATen from now on; return why it cannot, None where it does."""
    try:
        import fused_sam._aten as _aten
        import fused_sam._native as _native
    except ImportError as error:
        return f"{error} (an install that finds this torch compiles it: docs/performance.md)"
    if _aten.torch_version != torch.__version__:
        return f"fused_sam._aten was compiled for torch {_aten.torch_version}, and this is {torch.__version__}"
    try:
        _native.read_through(_aten.access)
    except ValueError as error:
        return str(error)
    return None


LISTS: tuple[type[list[Any]], ...] = (list,)  # the types of what has an entry for each parameter
# Why tensors are read through Python and DLPack, at several times the cost; None where they are not.
why_not_aten: str | None = "the native core does not load, or is out of date"

if not TYPE_CHECKING:
    with contextlib.suppress(Exception):  # whatever a broken build raises
        import fused_sam._native as _native

        # All or, where a core is out of date, none.
        names = ["Gradients", "all_present", "clear_grads", "first_present", "has_grad"]
        names += ["increment_version", "lookup", "presence"]
        globals().update({name: getattr(_native, name) for name in names})
        LISTS = list, Gradients
        why_not_aten = read_through_aten()


def is_list(x: Any) -> TypeGuard[TensorList]:
    """Return whether there is an entry for each parameter: in a list, or in `Gradients`."""
    return isinstance(x, LISTS)
