r"""The gradient of L(w + e(w)) with the term that SAM drops (Foret et al. 2021, section 2 and appendix C.4).

.. math:: \nabla_w L(w + e(w)) = v + \Big(\frac{\partial e}{\partial w}\Big)^{\!\top} v, \qquad
    v = \nabla L(w + e)

The second term holds the Hessian at w. Autograd takes it as one Hessian-vector product through the graph of the first
backward, which is alive as long as the closure makes it: ``loss.backward(create_graph=True)``. For study: that takes
the memory of a double backward and the time of about two more gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_sam import ops, param_groups

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


def second_pass(optimizer: FusedSAM, closure: Callable[[], Any]) -> Any:
    """With the first gradients in ``p.grad``, their graph alive and the weights at w: the whole gradient in ``p.grad``.

    The weights are back at w then. Returns what the closure returned at w + e.

    Raises:
        RuntimeError: if the gradients have no graph.
    """
    params = optimizer._flat_params()
    grads = [p.grad for p in params]
    if not any(g is not None and g.requires_grad for g in grads):
        raise RuntimeError("second_order=True needs a closure that calls loss.backward(create_graph=True).")
    param_groups.take_out(optimizer.param_groups, grads)
    groups = param_groups.ascent_groups(optimizer.param_groups)
    with torch.enable_grad():
        es = displacements(params, grads, groups, optimizer.p)
    # The weights come back bit for bit, so that what autograd has kept of them is true again: it need not see that they
    # were away.
    with contextlib.ExitStack() as unseen:
        for p in params:  # torch 2.6 takes one tensor
            unseen.enter_context(torch.autograd._unsafe_preserve_version_counter(p))
        optimizer._ascend(take_grads=True)
        with torch.enable_grad():
            result = closure()
        ascent = optimizer._ascent
        optimizer.restore()
    # The report that the caller makes is of the ascent that has just been undone.
    optimizer._ascent = ascent
    _add_term(params, es)
    return result


def _add_term(params: list[Tensor], es: list[Any]) -> None:
    """p.grad + (de/dw)^T v in p.grad, with v the gradients that are there."""
    second = [None if p.grad is None else p.grad.detach() for p in params]
    outputs = [(e, v) for e, v in zip(es, second) if e is not None and e.requires_grad and v is not None]
    terms: tuple[Any, ...] = (None,) * len(params)
    if outputs:
        wanted = [p for p in params if p.requires_grad]
        found = torch.autograd.grad(
            [e for e, _ in outputs], wanted, [v.to(e.dtype) for e, v in outputs], allow_unused=True
        )
        by_param = dict(zip(wanted, found))
        terms = tuple(by_param.get(p) for p in params)
    for p, v, term in zip(params, second, terms):
        p.grad = v if term is None else term.detach() if v is None else v + term


def displacements(params: list[Tensor], grads: list[Any], groups: list[ops.AscentGroup], p: float) -> list[Any]:
    """e as a function that autograd can differentiate of the weights and of their gradients, None without gradient."""
    of_tensor = [group for group in groups for _ in range(group.size)]
    scales = [w.abs() + group.eta if group.adaptive else torch.ones_like(w) for w, group in zip(params, of_tensor)]
    there = [(i, w, g, of_tensor[i].decay) for i, (w, g) in enumerate(zip(params, grads)) if g is not None]
    xs = {i: scales[i] * (g + decay * w if decay else g) for i, w, g, decay in there}
    es: list[Any] = [None] * len(params)
    for i, direction in zip(xs, _directions(list(xs.values()), ops.dual_exponent(p))):
        es[i] = of_tensor[i].rho * scales[i] * direction
    return es


def _directions(xs: list[Tensor], q: float) -> list[Tensor]:
    """sign(x) (|x| / ||x||_q)^(q-1) of all tensors together, and 0 where the norm is zero or not finite."""
    if q == 1:
        return [x.sign() for x in xs]
    device = xs[0].device if xs else torch.device("cpu")
    flat = torch.cat([x.flatten().double().to(device) for x in xs]) if xs else torch.zeros(0)
    if flat.numel() == 0:
        return xs
    if q == math.inf:
        at = flat.abs().argmax()
        unit = torch.zeros_like(flat).index_fill(0, at.reshape(1), 1.0) * flat.sign()
        return [u.view_as(x).to(x) for u, x in zip(unit.split([x.numel() for x in xs]), xs)]
    norm = torch.linalg.vector_norm(flat, ord=q)
    usable = torch.isfinite(norm) & (norm > 0)
    safe = torch.where(usable, norm, 1.0)
    directions = []
    for x in xs:
        ratio = x.double() / safe.to(x.device)
        # |0|^(q-1) has no derivative for q < 2: a zero stays out of the power.
        size = torch.where(ratio == 0, 1.0, ratio).abs() ** (q - 1)
        kept = usable.to(x.device) & (ratio != 0)
        directions.append(torch.where(kept, ratio.sign() * size, 0.0).to(x.dtype))
    return directions
