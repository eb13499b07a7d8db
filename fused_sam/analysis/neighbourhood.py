"""The set in which the loss is maximised, and the way up in it: projected steepest ascent on the weights in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.analysis.objective import flat, split
from fused_sam.ascent import projected
from fused_sam.options import check_group
from fused_sam.parameters import Parameters


class Neighbourhood:
    """All e with ||e / T||_p <= rho, where T = |w| + eta in adaptive tensors and 1 elsewhere.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, rho: float, p: float = 2.0, adaptive: bool | str = False, eta: float = 0.0) -> None:
        # The loss is measured as it is: no weight decay is added to its gradient.
        self._options = {"rho": rho, "adaptive": adaptive, "eta": eta, "decay_in_ascent": False}
        check_group(self._options)
        ops.dual_exponent(p)
        self.rho, self.p, self.eta = float(rho), float(p), float(eta)

    def groups(self, params: list[Tensor], radius: float) -> list[ops.AscentGroup]:
        """Return what the ops need for a step of length ``radius`` from w."""
        return Parameters([{**self._options, "params": params, "rho": radius}], {}).perturbed_groups()

    def scale(self, params: list[Tensor]) -> Tensor:
        """Return T at w, fp64, all elements in one vector."""
        adaptive = [group.adaptive for group in self.groups(params, self.rho) for _ in range(group.size)]
        return flat([p.abs().double() + self.eta if a else torch.ones_like(p) for p, a in zip(params, adaptive)])

    def project(self, e: Tensor, scale: Tensor) -> Tensor:
        """Return e if it is in the neighbourhood, else a point of it: for p = 2 and inf the nearest by e / T; for
        any other p the one on the ray through e. Vectors of fp64; where T is 0, so is the result."""
        return projected.project([e], [self.rho * scale], self.p)[0]


class Climb:
    """One ascent from w: `start` goes to the e of eq. 2, `go_on` further, and `undo` back to w bit for bit.

    Args:
        params: w, moved in place.
        neighbourhood: where e has to stay.
        step_size: length of a step in the norm of the neighbourhood.
        backend: of the ops.
    """

    def __init__(
        self, params: list[Tensor], neighbourhood: Neighbourhood, step_size: float, backend: str | None = None
    ) -> None:
        self._params = params
        self._neighbourhood = neighbourhood
        self._step_size = step_size
        self._backend = backend
        self._backups = [torch.empty_like(p) for p in params]
        self._journal: ops.Journal = []

    def start(self, grads: list[Tensor]) -> None:
        """Go to w + e along the gradient at w. A step of eq. 2 is as long as the ball allows without any projection."""
        groups = self._neighbourhood.groups(self._params, min(self._step_size, self._neighbourhood.rho))
        ascent = ops.Ascent(self._params, grads, groups, self._backend, self._neighbourhood.p)
        ascent.perturb(ascent.norm(), self._journal, self._backups)

    def go_on(self, grads: list[Tensor]) -> None:
        """Go from w + e to w + e' with the gradient at w + e, in fp64, rounded once, to the dtype of the weights."""
        w = flat(self._backups)
        ahead = w.clone()
        views = split(ahead, self._params)
        groups = self._neighbourhood.groups(views, self._step_size)
        ascent = ops.Ascent(views, split(flat(grads), self._params), groups, self._backend, self._neighbourhood.p)
        ascent.perturb(ascent.norm(), [])
        e = flat(self._params) - w + (ahead - w)
        there = w + self._neighbourhood.project(e, self._neighbourhood.scale(self._backups))
        for p, x in zip(self._params, split(there, self._params)):
            p.copy_(x)

    def undo(self) -> None:
        """Restore w."""
        ops.roll_back(self._journal)
