r"""Steps of the ascent after the first: projected gradient ascent (Foret et al. 2021, appendix C.6).

    e <- P(e + rho_k T sign(x) (|x| / ||x||_q)^(q-1)),    x = T g,    g = grad L(w + e),    T as at w

P brings e back into the ball ||e / (rho T)||_p <= 1: element by element for p = inf, else along the ray to 0, which for
p = 2 leads to the nearest point. On fp64 copies, for study: a step costs a gradient, beside which this is little.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.backends.memory import ordered_sum
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
    """Make one step.

    ``backups[i]`` holds w of a parameter that is displaced, and is filled in for one that now becomes it; a master that
    there is holds w instead.

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
    weights = [(p if k is None else k).double() for p, k in zip(params, kept)]
    norm, ahead = _stepped(weights, grads, groups, backend, p)
    moved = [i for i, k in enumerate(kept) if k is not None]
    es = [params[i].double() - weights[i] + (ahead[i] - weights[i]) for i in moved]
    sizes = [_half_axes(weights[i], of_tensor[i]) for i in moved]
    for i, e in zip(moved, project(es, sizes, p)):
        params[i].copy_(weights[i] + e)
    return norm


def _stepped(
    weights: list[Tensor], grads: list[Any], groups: list[ops.AscentGroup], backend: str | None, p: float
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the norm of the gradients, and w + rho T sign(x) (|x| / ||x||_q)^(q-1), all in fp64."""
    ahead = [w.clone() for w in weights]
    ascent = ops.Ascent(ahead, [None if g is None else g.double() for g in grads], groups, backend, p)
    norm = ascent.norm()
    ascent.perturb(norm, [])
    return norm, ahead


def _half_axes(w: Tensor, group: ops.AscentGroup) -> Tensor:
    """Return rho T of the ball that a group's displacement stays in."""
    t = w.abs() + group.eta if group.adaptive else torch.ones_like(w)
    return group.on(w.device, group.size).distance * t


def _keep_newcomers(
    params: list[Tensor], grads: list[Any], backups: list[Any], masters: list[Any], journal: ops.Journal
) -> None:
    """Back up the parameters whose first gradient comes only now. One with a new master is restored from a copy, too:
    what the journal restores from masters was entered before."""
    new: list[Any] = [None] * len(params)
    restored = {id(p) for entry in journal for p, backup in zip(entry.params, entry.has_backup) if backup is not None}
    for i, (p, g) in enumerate(zip(params, grads)):
        if g is not None and id(p) not in restored:
            new[i] = torch.empty_like(p)
    if any(b is not None for b in new):
        journal.append(Copies(params, new))
        for i, b in enumerate(new):
            if b is not None and masters[i] is None:
                backups[i] = b


def project(es: list[Tensor], sizes: list[Tensor], p: float) -> list[Tensor]:
    """Return each e in the ball ||e / size||_p <= 1 of all tensors together, ``sizes`` >= 0 of the shapes of ``es``.

    The nearest point, in terms of e / size, for p = 2 and inf; else that on the ray to 0. 0 where the size is.
    """
    if p == math.inf:
        return [torch.clamp(e, -size, size) for e, size in zip(es, sizes)]
    # No e is larger than two radii, so that no power overflows that matters.
    powers = [ordered_sum(torch.where(size > 0, e / size, 0.0).abs() ** p) for e, size in zip(es, sizes)]
    if not powers:
        return es
    length = (torch.stack([x.to(powers[0].device) for x in powers]).sum() ** (1 / p)).clamp(min=1.0)
    return [torch.where(size > 0, e / length.to(e.device), 0.0) for e, size in zip(es, sizes)]
