"""norm and perturb: from w to w + e."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.interface import AscentGroup, Journal, TensorList
from fused_sam.backends.memory import two_norm
from fused_sam.ops.groups import dual_exponent, require_sizes
from fused_sam.ops.journal import Copies, bump_versions
from fused_sam.ops.lists import all_present, increment_version
from fused_sam.ops.routing import Part, contiguous, route, stand_ins


class Ascent:
    """The first half of a SAM step: `norm` and `perturb` with one look at the tensors.

    ``masters`` are fp32 copies of 16-bit parameters, None for the others: w is read there, and T is that of them.

    Raises:
        InvalidTensor: for a sparse, complex, integer or mismatched tensor.
        ValueError: if lists and groups differ in length.
    """

    def __init__(
        self,
        params: TensorList,
        grads: TensorList,
        groups: list[AscentGroup],
        backend: str | None = None,
        p: float = 2,
        masters: TensorList | None = None,
    ) -> None:
        require_sizes(params, groups)
        self.q = 2.0 if p == 2 else dual_exponent(p)
        self.params = params
        self.grads = grads
        self.groups = groups
        self.masters = masters
        self._choice = backend, p, masters
        self._parts = route(backend, groups, params, grads, masters=masters, q=self.q)

    def of(self, index: set[int]) -> Ascent:
        """Return the ascent of some of the tensors: the others count as without a gradient."""
        grads = [g if i in index else None for i, g in enumerate(self.grads)]
        return Ascent(self.params, grads, self.groups, *self._choice)

    def norm(self) -> Tensor | None:
        """Return ||T g||_q as a float64 tensor of shape [] on the device of the first gradient; None for p = inf, which
        needs none. For p = 1 of shape [3]: the largest |T g|, the index of its tensor, and its place in that tensor."""
        if self.q == 1:
            return None
        norms = []
        for part in self._parts:
            batch = self._on_stand_ins(part) if part.batch is None else part.batch
            norm: Tensor = batch.norm(part.groups, self.q)
            norms.append(norm if part.index is None else part.to_list_index(norm))
        if not norms:
            return torch.zeros(3 if self.q == math.inf else (), dtype=torch.float64)
        if len(norms) == 1:
            return norms[0]
        return joint_norm([n.to(norms[0].device) for n in norms], self.q, holds_fp64(self.params))

    def perturb(
        self, norm: Tensor | None, journal: Journal, backups: TensorList | None = None, owned: bool = False
    ) -> None:
        """Move w to w + e in place, with w kept in ``backups``, or in memory found here.

        With ``owned``, the gradients are the caller's to give: one whose memory nothing else can reach comes to hold
        its parameter (the in-place swap: no memory is taken and none stays behind). Nothing but the list given to the
        constructor may refer to it then. Backups of small tensors share one allocation instead.
        """
        for part in self._parts:
            there = norm if norm is None or norm.device == part.device else norm.to(part.device)
            if there is not None and part.index is not None:
                there = part.to_part_index(there)
            kept = None if backups is None else part.take(backups)
            if part.batch is not None:
                if kept is None:
                    part.batch.make_backups(owned)
                else:
                    part.batch.set_backups(kept)
                part.batch.perturb(there, part.groups, self.q, journal)
                continue
            p, g = part.take(self.params), part.take(self.grads)
            p_: Any
            memory = [
                torch.empty_like(w) if b is None and x is not None else b
                for w, x, b in zip(p, g, kept or [None] * len(p))
            ]
            journal.append(Copies(p, memory))
            with stand_ins(p) as p_:
                batch = part.backend.batch(p_, contiguous(g), masters=self._masters_of(part))
                batch.make_backups(owned=False)
                batch.perturb(there, part.groups, self.q, [])
        if all_present(self.grads):
            increment_version(self.params)
        else:
            bump_versions(self.params, self.grads)

    def _on_stand_ins(self, part: Part) -> Any:
        p, g = contiguous(part.take(self.params)), contiguous(part.take(self.grads))
        return part.backend.batch(p, g, masters=self._masters_of(part))

    def _masters_of(self, part: Part) -> TensorList | None:
        """Return the masters for a call on stand-ins; an ascent only reads them."""
        return None if self.masters is None else contiguous(part.take(self.masters))


def holds_fp64(params: TensorList) -> bool:
    """Return whether there are gradients whose norm squared may leave the range of fp64."""
    return any(p.dtype == torch.float64 for p in params)


def joint_norm(norms: list[Tensor], q: float, far: bool) -> Tensor:
    """Return the norm of all parts from those of each, as `Ascent.norm` returns them; ``far``: of `holds_fp64`."""
    values = torch.stack(norms)
    if q == 2:
        return two_norm([values], far)
    if q == math.inf:
        peak = values[:, 0].amax()
        first = torch.where(values[:, 0] == peak, values[:, 1], math.inf).argmin()
        return torch.cat([peak.reshape(1), values[first, 1:]])
    peak = values.amax()
    return torch.where(torch.isfinite(peak) & (peak > 0), peak * ((values / peak) ** q).sum() ** (1 / q), peak)


def norm(
    params: TensorList,
    grads: TensorList,
    groups: list[AscentGroup],
    backend: str | None = None,
    p: float = 2,
    masters: TensorList | None = None,
) -> Any:
    """Return ||T g||_q over the gradients of all groups, accumulated in fp64. Returns and raises as `Ascent`."""
    return Ascent(params, grads, groups, backend, p, masters).norm()


def perturb(
    params: TensorList,
    grads: TensorList,
    backups: TensorList,
    norm: Tensor | None,
    groups: list[AscentGroup],
    backend: str | None = None,
    journal: Journal | None = None,
    p: float = 2,
    masters: TensorList | None = None,
) -> None:
    """Write backup = w and w = w + e, in place, for every parameter with a gradient; ``norm`` is as `norm` returns it.

    A parameter that has a master has no other backup: it becomes master + e, rounded, and the master stays.

    A norm that is zero or not finite leaves w as it is (decided on the device). ``backups[i] is grads[i]`` swaps in
    place. ``journal`` receives an entry when, and as soon as, there is something to restore.

    Raises:
        InvalidTensor, ValueError: as `Ascent`, and for a missing or mismatched backup; nothing has been changed then.
    """
    route(backend, [], params, grads, backups, masters=masters, q=dual_exponent(p))
    needed = [g is not None and m is None for g, m in zip(grads, masters or [None] * len(grads))]
    if any(need == (b is None) for need, b in zip(needed, backups)):
        raise ValueError("Invalid backups. Must be there for exactly the parameters that have a gradient, no master.")
    shape = None if p == math.inf else (3,) if p == 1 else ()
    if shape != (None if norm is None else norm.shape):
        given = None if norm is None else f"of shape {list(norm.shape)}"
        raise ValueError(f"Invalid norm {given} for {p=}. Must be what ops.norm returns.")
    others = {id(g): i for i, g in enumerate(grads) if g is not None}
    if any(others.get(id(b), i) != i for i, b in enumerate(backups)):
        raise ValueError("Invalid backups. A gradient may hold no parameter but its own.")
    ascent = Ascent(params, grads, groups, backend, p, masters)
    ascent.perturb(norm, [] if journal is None else journal, backups)
