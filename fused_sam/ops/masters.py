"""fp32 master copies of 16-bit parameters (Micikevicius et al. 2018, section 3.1), in the optimizer's state.

The master is w. The parameter, which the model computes with, is w or w + e rounded, so that SAM needs no other copy of
the weights. What somebody else writes into a parameter between two steps becomes the master: a checkpoint of the model
may be loaded at any time.
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.interface import SIXTEEN_BIT, TensorList
from fused_sam.ops.groups import is_capturing

MASTER = "master"


class Masters:
    """Makes masters, and notices where a parameter was written since.

    The versions that autograd counts tell, and the address; an assignment through ``p.data[...] = x``, which neither
    shows, does not count. Copies know of no versions: they compare all once.
    """

    def __init__(self) -> None:
        self._params: TensorList = []  # as they were last noted, and
        self._marks: list[tuple[int, int]] = []  # how
        self._fresh: list[int] = []  # which of the last masters asked for are in no state yet

    def __reduce__(self) -> tuple[type[Masters], tuple[()]]:
        return Masters, ()

    def find_or_make(self, found: TensorList, params: TensorList, grads: TensorList) -> TensorList:
        """Return the master of every 16-bit parameter that has one, as ``found`` in the state, or takes part for the
        first time; else None.

        Raises:
            RuntimeError: if one would have to be made while a CUDA graph is captured.
        """
        masters = [m if p.dtype in SIXTEEN_BIT else None for p, m in zip(params, found)]
        self._fresh = [
            i for i, g in enumerate(grads) if masters[i] is None and g is not None and params[i].dtype in SIXTEEN_BIT
        ]
        if self._fresh and is_capturing(params):
            raise RuntimeError("Masters would be made in every replay: step once before capturing a CUDA graph.")
        for i in self._fresh:
            masters[i] = params[i].detach().float()
        return masters

    def enter(self, state: dict[Tensor, dict[str, Any]], params: TensorList, masters: TensorList) -> None:
        """Enter those that have come into being in the state."""
        for i in self._fresh:
            state[params[i]][MASTER] = masters[i]
        self._fresh = []

    def refresh(self, params: TensorList, masters: TensorList) -> None:
        """Write elements that no longer are their master rounded into the master. To be called at w."""
        known = len(self._params) == len(params) and all(map(operator.is_, self._params, params))
        seen = self._marks if known else [None] * len(params)
        for p, master, mark, last in zip(params, masters, _marks(params), seen):
            if master is None or mark == last or p.dtype not in SIXTEEN_BIT:
                continue
            if master.shape == p.shape and master.device == p.device:  # else the op refuses it
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))

    def note(self, params: TensorList) -> None:
        """Remember each parameter as its rounded master."""
        self._params, self._marks = params, _marks(params)


def _marks(params: TensorList) -> list[tuple[int, int]]:
    return [(p._version, p.data_ptr()) for p in params]


def load(
    masters: Masters | None, state_dict: dict[str, Any], state: dict[Tensor, dict[str, Any]], param_groups: list[dict]
) -> None:
    """Read a checkpoint's fp32 state, which torch has loaded in each parameter's dtype, as it was saved.

    Without masters, drop those of the checkpoint.
    """
    if masters is None:
        for entries in state.values():
            if isinstance(entries, dict):  # a base may keep anything
                entries.pop(MASTER, None)
        return
    masters.note([])
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in param_groups)
    for index, p in zip(saved_ids, params):
        if p.dtype not in SIXTEEN_BIT:
            continue
        for key, value in state_dict["state"].get(index, {}).items():
            if key != "step" and isinstance(value, Tensor) and value.is_floating_point():
                state[p][key] = value.to(p.device, torch.float32, copy=True)
