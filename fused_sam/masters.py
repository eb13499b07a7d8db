"""fp32 master copies of 16-bit parameters (Micikevicius et al. 2018, section 3.1), in the optimizer's state.

The master is w. The parameter, which the model computes with, is w or w + e rounded, so that SAM needs no other copy of
the weights. What somebody else writes into a parameter between two steps becomes the master: a checkpoint of the model
may be loaded at any time.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.routing import SIXTEEN_BIT, TensorList

KEY = "master"


class Masters:
    """Makes masters, and notices where a parameter was written since.

    The versions that autograd counts tell, and the address; an assignment through ``p.data[...] = x``, which neither
    shows, does not count. Copies know of no versions: they compare all once.
    """

    def __init__(self) -> None:
        self._seen: dict[Tensor, tuple[int, int]] = {}

    def __reduce__(self) -> tuple[type[Masters], tuple[()]]:
        return Masters, ()

    def of(self, state: dict[Tensor, dict[str, Any]], params: TensorList, grads: TensorList) -> TensorList:
        """The master of every parameter that has one in the state, or takes part for the first time; else None.

        Raises:
            RuntimeError: if one would have to be made while a CUDA graph is captured.
        """
        masters = [state[p].get(KEY) if p.dtype in SIXTEEN_BIT and p in state else None for p in params]
        missing = [i for i, (p, m) in enumerate(zip(params, masters)) if m is None and p.dtype in SIXTEEN_BIT]
        fresh = [i for i in missing if grads[i] is not None]
        if fresh and ops.is_capturing(params):
            raise RuntimeError("Masters would be made in every replay: step once before capturing a CUDA graph.")
        for i in fresh:
            masters[i] = params[i].detach().float()
        return masters

    def refresh(self, params: TensorList, masters: TensorList) -> None:
        """To be called at w: elements that no longer are their master rounded become the master."""
        for p, master in zip(params, masters):
            if master is None or self._seen.get(p) == _mark(p):
                continue
            if master.shape == p.shape and master.device == p.device:  # else the op refuses it
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))

    def note(self, params: TensorList) -> None:
        """The parameters are as their masters say."""
        self._seen = {p: _mark(p) for p in params if p.dtype in SIXTEEN_BIT}


def _mark(p: Tensor) -> tuple[int, int]:
    return p._version, p.data_ptr()


def enter(state: dict[Tensor, dict[str, Any]], params: TensorList, masters: TensorList | None) -> None:
    """Masters that have come into being become part of the state."""
    for p, master in zip(params, masters or []):
        if master is not None:
            state[p][KEY] = master


def load(
    masters: Masters | None, state_dict: dict[str, Any], state: dict[Tensor, dict[str, Any]], param_groups: list[dict]
) -> None:
    """After torch has loaded a checkpoint, all state in its parameter's dtype: in fp32 as it was saved where there are
    masters, and no masters where there are none."""
    if masters is None:
        for entries in state.values():
            entries.pop(KEY, None)
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
