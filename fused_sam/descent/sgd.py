"""torch.optim.SGD, restore and step in one pass over the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.backends.interface import Journal, SGDGroup, TensorList
from fused_sam.descent.state import enter_state, runs, skip_at_first, weights_of
from fused_sam.descent.unfused import AnyBase
from fused_sam.ops.groups import host_number
from fused_sam.ops.lists import all_present
from fused_sam.parameters import Parameters

MOMENTUM = "momentum_buffer"


class FusedSGD(AnyBase):
    """One `ops.sgd_update` over all groups; new momentum buffers stay in the state only if it is made."""

    elementwise = True

    def update(
        self, parameters: Parameters, journal: Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Restore and step."""
        tensors = parameters.tensors()
        grads = parameters.gradients(tensors)
        masters = None if parameters.masters is None else parameters.masters_of(tensors, grads)
        momenta: TensorList | None = None
        fresh: set[int] = set()
        for group in parameters.groups:
            if group["momentum"]:
                momenta = parameters.entries(tensors, MOMENTUM)
                break
        if momenta is not None and not all_present(momenta):
            fresh = _make_momenta(parameters.groups, weights_of(tensors, masters), grads, momenta)
        if fresh and skip_at_first(tensors, found_inf, journal, "A momentum buffer"):
            return
        backups = ops.joint_backup(journal, len(tensors))
        if momenta is not None and fresh:
            enter_state(parameters, tensors, fresh, {MOMENTUM: momenta}, journal)
        groups, backend = _groups(parameters.groups, fresh), parameters.backend
        weights, grads, momenta, copies = parameters.on_this_rank(tensors, grads, momenta, masters)
        ops.sgd_update(weights, grads, backups, momenta, groups, grad_scale, found_inf, backend, journal, copies)
        if masters is not None:
            parameters.enter_masters(tensors, masters)


def _make_momenta(
    groups: list[dict[str, Any]], weights: TensorList, grads: TensorList, momenta: TensorList
) -> set[int]:
    """Fill in an uninitialised buffer for every parameter that needs one; return the indices of those."""
    factors = [group["momentum"] for group in groups for _ in group["params"]]
    fresh = {i for i, m in enumerate(factors) if m != 0 and momenta[i] is None and grads[i] is not None}
    for i in fresh:
        momenta[i] = torch.empty_like(weights[i])
    return fresh


def _groups(groups: list[dict[str, Any]], fresh: set[int]) -> list[SGDGroup]:
    """Return hyperparameters as the op takes them, each of its type: a checkpoint may hold anything."""
    converted, start = [], 0
    for group in groups:
        lr, size = group["lr"], len(group["params"])
        same = (
            lr if type(lr) is float else host_number(lr),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            bool(group["maximize"]),
        )
        for length, first in runs(size, start, fresh) if fresh else ((size, False),):
            converted.append(SGDGroup(length, *same, first))
        start += size
    return converted
