"""What FusedSAM reads in parameter groups beside the base's options: ``rho``, ``adaptive``, ``eta``, ``perturb`` and
``decay_in_ascent``."""

from __future__ import annotations

import itertools
import math
import numbers
from typing import Any

from torch import Tensor

from fused_sam import ops


def ascent_groups(param_groups: list[dict]) -> list[ops.AscentGroup]:
    """Groups as the ops take them: runs of scaled and of unscaled tensors where only weights are adaptive."""
    groups = []
    for group in param_groups:
        check_ascent(group)
        rho, eta, adaptive = ops.host_number(group["rho"]), float(group["eta"]), group["adaptive"]
        if group.get("maximize"):
            rho = -rho  # the worst point of an objective to be maximised is where it is least
        decay = _decay(group) if group["decay_in_ascent"] else 0.0
        if adaptive != "weights":
            groups.append(ops.AscentGroup(len(group["params"]), rho, bool(adaptive), eta, decay))
            continue
        for scaled, run in itertools.groupby(p.dim() > 1 for p in group["params"]):
            groups.append(ops.AscentGroup(len(list(run)), rho, scaled, eta, decay))
    return groups


def _decay(group: dict) -> float:
    """What the ascent adds to the gradient for each unit of w.

    The base minimises L + weight_decay / 2 ||w||^2, or maximises L - weight_decay / 2 ||w||^2.
    """
    decay = float(group["weight_decay"])
    return -decay if group.get("maximize") else decay


def require_unscaled(param_groups: list[dict]) -> None:
    """Refuse gradients that a GradScaler has scaled where weight decay, which nobody has, was added to them."""
    if any(group["decay_in_ascent"] and group["weight_decay"] != 0 for group in param_groups):
        raise RuntimeError(
            "decay_in_ascent under a GradScaler: the first gradient was scaled, the weight decay added to it was not. "
            "bf16 needs no scaler."
        )


def take_out(param_groups: list[dict], grads: list[Any]) -> dict[int, Any]:
    """Take the gradients of the groups that stay at w out of the list; they by their place in it."""
    taken: dict[int, Any] = {}
    start = 0
    for group in param_groups:
        stop = start + len(group["params"])
        if not group["perturb"]:
            taken.update((i, grads[i]) for i in range(start, stop))
            grads[start:stop] = [None] * (stop - start)
        start = stop
    return taken


def check_ascent(group: dict) -> None:
    """Refuse values out of range."""
    _check_rho(group["rho"])
    adaptive, eta = group["adaptive"], group["eta"]
    if adaptive not in (False, True, "weights"):
        raise ValueError(f"Invalid {adaptive=}. Must be True, False or 'weights'.")
    if not 0.0 <= eta < math.inf:
        raise ValueError(f"Invalid {eta=}. Must be >= 0 and finite.")
    _check_decay(group)


def _check_decay(group: dict) -> None:
    decay_in_ascent = group["decay_in_ascent"]
    if not isinstance(decay_in_ascent, bool):
        raise ValueError(f"Invalid {decay_in_ascent=}. Must be True or False.")
    # Without "params" it is the constructor's defaults, before the base has added its own.
    if decay_in_ascent and "params" in group and "weight_decay" not in group:
        raise ValueError(f"Invalid {decay_in_ascent=}. The base optimizer must have a weight_decay.")


def _check_rho(rho: Any) -> None:
    if not isinstance(rho, float | Tensor | numbers.Real) or (isinstance(rho, Tensor) and rho.numel() != 1):
        raise TypeError(f"Invalid {rho=}. Must be a number, or a tensor of one element.")
    number = ops.host_number(rho)  # what is on another device is not waited for
    if isinstance(number, float) and not 0.0 <= number < math.inf:
        raise ValueError(f"Invalid {rho=}. Must be >= 0 and finite.")


def with_missing(state_dict: dict[str, Any], param_groups: list[dict]) -> dict[str, Any]:
    """The checkpoint with what its groups lack (rho, in one of a base optimizer) as our groups have it now."""
    groups = state_dict["param_groups"]
    if len(groups) != len(param_groups):
        return state_dict  # torch says what is wrong
    missing = [{k: v for k, v in ours.items() if k not in ("params", "param_names")} for ours in param_groups]
    return {**state_dict, "param_groups": [{**ours, **saved} for ours, saved in zip(missing, groups)]}
