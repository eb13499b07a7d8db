r"""The part of SAM's gradient that the steps between can use again: LookSAM (Liu et al. 2022).

In a perturbed step, with g the gradient at w and g_s the one at w + e, over all perturbed parameters together,

.. math:: g_v = g_s - \frac{\langle g, g_s \rangle}{\lVert g \rVert^2} g,

and in the steps until the next one, which take the gradient g at w only, the base optimizer gets

.. math:: g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert} g_v.

g_v is kept in the optimizer's state, as ``orthogonal_grad``. Its length does not matter, so a GradScaler may change its
scale between the steps.
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_sam import masters, ops
from fused_sam.ascents import Displacement
from fused_sam.backends.eager import wide
from fused_sam.memory import overlaps_itself

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM

KEY = "orthogonal_grad"


def checked(reuse: Any) -> float | None:
    """The option as given.

    Raises:
        TypeError: for what is neither a number nor None.
        ValueError: for a number that is not > 0 and finite.
    """
    if reuse is None:
        return None
    if not isinstance(reuse, numbers.Real) or isinstance(reuse, bool):
        raise TypeError(f"Invalid {reuse=}. Must be a number > 0, or None.")
    if not 0.0 < float(reuse) < math.inf:
        raise ValueError(f"Invalid {reuse=}. Must be > 0 and finite, or None.")
    return float(reuse)


def keep(optimizer: FusedSAM, ascent: Displacement) -> None:
    """After the second gradient: g_v into the state. Where a norm is zero or not finite the last g_v stays."""
    assert ascent.grads is not None
    both = zip(optimizer._flat_params(), ascent.grads)
    triples: list[tuple[Tensor, Any, Any]] = [(p, g, p.grad) for p, g in both if g is not None and p.grad is not None]
    if not triples:
        return
    device = triples[0][0].device
    square = _norm(optimizer, [p for p, _, _ in triples], [g for _, g, _ in triples]).to(device) ** 2
    dots = [torch.sum(wide(g) * wide(gs), dtype=torch.float64).to(device) for _, g, gs in triples]
    factor = torch.stack(dots).sum() / square
    usable = torch.isfinite(factor) & (square > 0)
    for p, g, gs in triples:
        part = wide(gs) - factor.to(p.device, wide(g).dtype) * wide(g)
        state = optimizer.state[p]
        last = state.get(KEY)
        if last is None:
            # As all state of a parameter that has an fp32 master.
            last = torch.zeros_like(p, dtype=torch.float32 if masters.KEY in state else p.dtype)
        state[KEY] = torch.where(usable.to(p.device), part.to(last.dtype), last)


def apply(optimizer: FusedSAM, alpha: float) -> None:
    """In a step between: g + alpha ||g|| / ||g_v|| g_v in ``p.grad``, in place but for an expanded gradient."""
    triples = []
    for p in optimizer._flat_params():
        part = optimizer.state[p].get(KEY) if p in optimizer.state else None
        if p.grad is not None and part is not None:
            triples.append((p, p.grad, part))
    if not triples:
        return
    params, grads, parts = (list(x) for x in zip(*triples))
    length, of_parts = _norm(optimizer, params, grads), _norm(optimizer, params, parts)
    ratio = torch.where(of_parts > 0, alpha * length / of_parts, 0.0)
    for p, g, part in triples:
        if overlaps_itself(g):
            p.grad = g = g.contiguous()
        g.copy_(wide(g) + ratio.to(g.device, wide(g).dtype) * wide(part))


def _norm(optimizer: FusedSAM, params: list[Tensor], tensors: list[Any]) -> Tensor:
    return ops.norm(params, tensors, [ops.AscentGroup(len(params), 0.0, False)], optimizer.backend)
