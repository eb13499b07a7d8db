r"""The part of SAM's gradient that the steps between can use again: LookSAM (Liu et al. 2022).

In a perturbed step, with g the gradient at w and g_s the one at w + e, over all perturbed parameters together,

.. math:: g_v = g_s - \frac{\langle g, g_s \rangle}{\lVert g \rVert^2} g,

and in the steps until the next one, which take the gradient g at w only, the base optimizer gets

.. math:: g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert} g_v.

g_v is kept in the optimizer's state, as ``orthogonal_grad``. Its length does not matter, so a GradScaler may change its
scale between the steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.backends.interface import AscentGroup, Journal, TensorList
from fused_sam.backends.memory import ordered_sum, overlaps_itself, wide
from fused_sam.ops.masters import MASTER
from fused_sam.ops.routing import require_match
from fused_sam.parameters import Parameters

KEY = "orthogonal_grad"


class LookSAMEntry(ops.StateEntry):
    """A journal entry for the g_v of these parameters."""

    def __init__(self, state: dict[Tensor, dict[str, Any]], params: list[Tensor]) -> None:
        self.state = state
        self.before = [(p, state[p].get(KEY)) for p in params]

    def restore(self) -> None:
        """Put back what was there."""
        for p, part in self.before:
            if part is not None:
                self.state[p][KEY] = part
            else:
                self.state[p].pop(KEY, None)


def keep(parameters: Parameters, firsts: TensorList, found_inf: Tensor | None, journal: Journal) -> None:
    """Put g_v into the state, after the second gradient. Where a norm is zero or not finite the last g_v stays.

    ``firsts`` are the first gradients, ``found_inf`` is the base step's, and ``journal`` where g_v is entered until
    that is made.

    Raises:
        InvalidTensor: for a gradient or a g_v in the state that does not match its parameter.
    """
    params, state = parameters.tensors(), parameters.state
    second: list[Any] = [p.grad for p in params]
    first: list[Any] = [None if gs is None else g for g, gs in zip(firsts, second)]
    both = [i for i, g in enumerate(first) if g is not None]
    if not both:
        return
    for i in both:
        require_match(i, params[i], second[i], any_dtype=True)
    lasts = {i: _last_part(state[params[i]], i, params[i]) for i in both}
    if found_inf is not None and any(KEY not in state[params[i]] for i in both) and bool(found_inf):
        return  # state that is skipped must not come into being, and only the host can see to that
    device = params[both[0]].device
    square = _norm(parameters, params, first).to(device) ** 2
    dots = [ordered_sum(wide(first[i]) * wide(second[i])).to(device) for i in both]
    factor = torch.stack(dots).sum() / square
    usable = torch.isfinite(factor) & (square > 0)
    journal.append(LookSAMEntry(state, [params[i] for i in both]))
    for i, last in lasts.items():
        p, g = params[i], wide(first[i])
        part = wide(second[i]) - factor.to(p.device, g.dtype) * g
        state[p][KEY] = torch.where(usable.to(p.device), part.to(last.dtype), last)


def _last_part(state: dict[str, Any], index: int, param: Tensor) -> Tensor:
    """Return g_v of a parameter; zeros where there is none yet."""
    if not isinstance(state, dict):
        raise ops.InvalidTensor(index, f"the base keeps a {type(state).__name__} as its state: no place for {KEY}")
    like = state.get(MASTER, param)  # as all state of a parameter that has an fp32 master
    last = state.get(KEY)
    if last is None:
        return torch.zeros_like(param, dtype=like.dtype)
    require_match(index, param, last, any_dtype=True)
    if last.dtype != like.dtype:
        raise ops.InvalidTensor(index, f"dtype {last.dtype} of {KEY} does not match {like.dtype}")
    return last


def apply(parameters: Parameters, alpha: float) -> None:
    """Write g + alpha ||g|| / ||g_v|| g_v to ``p.grad``, in a step between; in place but for an expanded gradient.

    Raises:
        InvalidTensor: as `keep`.
    """
    params = parameters.tensors()
    found = parameters.entries(params, KEY)
    parts = [part if p.grad is not None else None for p, part in zip(params, found)]
    grads: list[Any] = [p.grad if part is not None else None for p, part in zip(params, parts)]
    if not any(part is not None for part in parts):
        return
    length, of_parts = _norm(parameters, params, grads), _norm(parameters, params, parts)
    ratio = torch.where(of_parts > 0, alpha * length / of_parts, 0.0)
    for p, g, part in zip(params, grads, parts):
        if g is None or part is None:
            continue
        if overlaps_itself(g):
            p.grad = g = g.contiguous()
        g.copy_(wide(g) + ratio.to(g.device, wide(g).dtype) * wide(part))


@contextlib.contextmanager
def out_of_sight(parameters: Parameters) -> Iterator[None]:
    """Take g_v out of the state meanwhile: most optimizers take a parameter that has state for one that has theirs."""
    states = [state for state in parameters.state.values() if isinstance(state, dict) and KEY in state]
    hidden = [(state, state.pop(KEY)) for state in states]
    try:
        yield
    finally:
        for state, part in hidden:
            state[KEY] = part


def _norm(parameters: Parameters, params: list[Tensor], tensors: list[Any]) -> Tensor:
    norm: Any = ops.norm(params, tensors, [AscentGroup(len(params), 0.0, False)], parameters.backend)
    return norm
