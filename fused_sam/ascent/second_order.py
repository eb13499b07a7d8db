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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.interface import AscentGroup
from fused_sam.ops.groups import dual_exponent
from fused_sam.parameters import Parameters


def displacements_of(parameters: Parameters, p: float) -> list[Any]:
    """Return e, as `displacements` does, of the gradients in ``p.grad``, whose graph must be alive.

    Raises:
        RuntimeError: if the gradients have no graph.
    """
    params = parameters.tensors()
    grads = [p.grad for p in params]
    if not any(g is not None and g.requires_grad for g in grads):
        raise RuntimeError("second_order=True needs a closure that calls loss.backward(create_graph=True).")
    parameters.blank_unperturbed(grads)
    with torch.enable_grad():
        return displacements(params, grads, parameters.perturbed_groups(), p)


@contextlib.contextmanager
def unseen(params: list[Tensor]) -> Iterator[None]:
    """Keep autograd from seeing that the weights are away meanwhile.

    They come back bit for bit, so that what it has kept of them is true again.
    """
    with contextlib.ExitStack() as kept:
        for p in params:  # torch 2.6 takes one tensor
            kept.enter_context(torch.autograd._unsafe_preserve_version_counter(p))
        yield


def add_term(params: list[Tensor], es: list[Any]) -> None:
    """Write p.grad + (de/dw)^T v to p.grad, with v the gradients that are there."""
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


def displacements(params: list[Tensor], grads: list[Any], groups: list[AscentGroup], p: float) -> list[Any]:
    """Return e as a function, which autograd can differentiate, of weights and gradients; None without gradient."""
    of_tensor = [group for group in groups for _ in range(group.size)]
    scales = [w.abs() + group.eta if group.adaptive else torch.ones_like(w) for w, group in zip(params, of_tensor)]
    there = [(i, w, g, of_tensor[i].decay) for i, (w, g) in enumerate(zip(params, grads)) if g is not None]
    xs = {i: scales[i] * (g + decay * w if decay else g) for i, w, g, decay in there}
    es: list[Any] = [None] * len(params)
    for i, direction in zip(xs, _directions(list(xs.values()), dual_exponent(p))):
        es[i] = of_tensor[i].rho * scales[i] * direction
    return es


def _directions(xs: list[Tensor], q: float) -> list[Tensor]:
    """Return sign(x) (|x| / ||x||_q)^(q-1) of all tensors together, and 0 where the norm is zero or not finite."""
    if q == 1:
        return [x.sign() for x in xs]
    device = xs[0].device if xs else torch.device("cpu")
    flat = torch.cat([x.flatten().double().to(device) for x in xs]) if xs else torch.zeros(0, device=device)
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
