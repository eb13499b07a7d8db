r"""Steps of the ascent after the first: projected gradient ascent (Foret et al. 2021, appendix C.6).

    e <- P(e + rho_k T sign(x) (|x| / ||x||_q)^(q-1)),    x = T g,    g = grad L(w + e),    T as at w

P brings e back into the ball ||e / (rho T)||_p <= 1: element by element for p = inf, else along the ray to 0, which for
p = 2 leads to the nearest point. In plain torch and in fp64, for study: a step costs a gradient beside which this is
little.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.ops.journal import Copies


def advance(
    params: list[Tensor],
    grads: list[Any],
    backups: list[Any],
    masters: list[Any] | None,
    groups: list[ops.AscentGroup],
    backend: str | None,
    p: float,
    journal: ops.Journal,
) -> Tensor | None:
    """One step. ``backups[i]`` holds w of a parameter that is displaced, and is filled in for one that now becomes it;
    a master that there is holds w instead.

    Returns:
        The norm of the gradients, as `ops.norm` does. Where it is zero or not finite e stays.
    """
    masters = [None] * len(params) if masters is None else masters
    _keep_newcomers(params, grads, backups, masters, journal)
    of_tensor = [group for group in groups for _ in range(group.size)]
    # Weight decay is taken where the gradient was, at w + e.
    grads = [
        g if g is None or not group.decay else g + group.decay * w for w, g, group in zip(params, grads, of_tensor)
    ]
    groups = [group._replace(decay=0.0) for group in groups]
    kept = [b if m is None else m for b, m in zip(backups, masters)]
    norm = ops.norm([w if k is None else k for w, k in zip(params, kept)], grads, groups, backend, p)
    moved = [i for i, k in enumerate(kept) if k is not None]
    es, sizes = [], []
    for i in moved:
        w = kept[i].double()
        group = of_tensor[i].on(w.device, of_tensor[i].size)
        t = w.abs() + group.eta if group.adaptive else torch.ones_like(w)
        e = params[i].double() - w
        if grads[i] is not None:
            e = e + group.rho * t * _direction(t * grads[i].double(), norm, p, i)
        es.append(e)
        sizes.append(group.rho * t)
    for i, e in zip(moved, _project(es, sizes, p)):
        params[i].copy_(kept[i].double() + e)
    return norm


def _keep_newcomers(
    params: list[Tensor], grads: list[Any], backups: list[Any], masters: list[Any], journal: ops.Journal
) -> None:
    """Back up the parameters whose first gradient comes only now. One with a new master is restored from a copy, too:
    what the journal restores from masters was entered before."""
    new: list[Any] = [None] * len(params)
    restored = {id(p) for entry in journal for p, kept in zip(entry.params, entry.kept) if kept is not None}
    for i, (p, g) in enumerate(zip(params, grads)):
        if g is not None and id(p) not in restored:
            new[i] = torch.empty_like(p)
    if any(b is not None for b in new):
        journal.append(Copies(params, new))
        for i, b in enumerate(new):
            if b is not None and masters[i] is None:
                backups[i] = b


def _direction(x: Tensor, norm: Tensor | None, p: float, index: int) -> Tensor:
    """sign(x) (|x| / ||x||_q)^(q-1), 0 where the norm is zero or not finite."""
    if norm is None:
        return torch.nan_to_num(torch.sign(x), nan=0.0)
    norm = norm.to(x.device)
    value = norm[0] if p == 1 else norm
    active = torch.isfinite(value) & (value > 0)
    if p == 1:
        if x.numel() == 0:
            return x
        # Where in the tensor is asked again: backends count its elements in the order of memory or of indices.
        elements = torch.arange(x.numel(), device=x.device).view(x.shape)
        here = active & (norm[1] == index) & (elements == x.abs().argmax())
        return torch.where(here, torch.sign(x), 0.0)
    power = ops.dual_exponent(p) - 1
    return torch.where(active, torch.copysign((x.abs() / value) ** power, x), 0.0)


def _project(es: list[Tensor], sizes: list[Tensor], p: float) -> list[Tensor]:
    """Each e in the ball whose half axes are ``sizes`` = rho T."""
    if p == math.inf:
        return [torch.clamp(e, -size, size) for e, size in zip(es, sizes)]
    ratios = [torch.where(size > 0, e / size, 0.0) for e, size in zip(es, sizes)]
    lengths = [torch.linalg.vector_norm(ratio, ord=p) for ratio in ratios]
    if not lengths:
        return es
    length = torch.linalg.vector_norm(torch.stack([x.to(lengths[0].device) for x in lengths]), ord=p).clamp(min=1.0)
    return [e / length.to(e.device) for e in es]
