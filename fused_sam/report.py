"""What a step saw, as tensors on the device: nothing waits for it until they are read.

Losses and the norm of the ascent are there anyway. The rest takes copies and passes of its own, in plain torch and in
fp64, and is made with ``FusedSAM(telemetry=True)`` only.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Report(NamedTuple):
    """The last step that was made; None where there was nothing to see, or telemetry was off.

    Gradients are taken as backward left them: under a GradScaler they are those of the scaled loss, unless the caller
    has unscaled them. After ``step([closure_1, ..., closure_k])`` all but ``second_grad_norm`` have the shape [k]. With
    several steps of the ascent they are those of the last one, and the cosine is with the first gradient; along the
    momentum, the momentum stands in the first gradient's place.

    Attributes:
        grad_norm: the norm that e was scaled by, ||T g||_q of Foret et al. 2021, eq. 2; fp64, shape []. None for
            p = inf.
        loss: what the closure returned at w, if a tensor of one element (detached, not copied) or a number.
        loss_perturbed: the same at w + e.
        second_grad_norm: ||g||_2 of the gradient that the base step got, before ``max_grad_norm`` clipped it; fp64,
            shape []. With ``telemetry=True`` or ``max_grad_norm``.
        radius: ||w' - w||_2 of the weights as they were stored, after rounding; fp64, shape []. With
            ``telemetry=True``, as the next.
        cosine: of the angle between both gradients, NaN if one is zero or not finite; fp64, shape []. A gradient that
            is None counts as zero.
    """

    grad_norm: Tensor | None = None
    loss: Any = None
    loss_perturbed: Any = None
    second_grad_norm: Tensor | None = None
    radius: Tensor | None = None
    cosine: Tensor | None = None

    @property
    def loss_gap(self) -> Any:
        """Return L(w + e) - L(w), the sharpness of Foret et al. 2021, section 2; None without both."""
        if self.loss is None or self.loss_perturbed is None:
            return None
        return self.loss_perturbed - self.loss


class Probe:
    """Copies of w, until e is known, and of the gradient that it follows first."""

    def __init__(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        pairs = [(p, g) for p, g in zip(params, grads) if g is not None]
        self._weights = [(p, p.detach().clone()) for p, _ in pairs]
        self._grads = [(p, g.detach().clone()) for p, g in pairs]
        self.radius: Tensor | None = None

    def measure_radius(self, final: bool = True) -> None:
        """Measure ||w' - w|| at w + e; drop the copies of w if it is the ``final`` measurement of the step."""
        self.radius = _norm([p.double() - w.double() for p, w in self._weights])
        if final:
            self._weights.clear()

    def cosine(self, params: list[Tensor]) -> Tensor:
        """Return <g, g'> / (||g|| ||g'||) with g' the gradients that the parameters have now."""
        first, second = _norm([g for _, g in self._grads]), _norm([p.grad for p in params if p.grad is not None])
        products = [(g.double() * p.grad.double()).sum() for p, g in self._grads if p.grad is not None]
        device = first.device
        return _stack(products, device).sum() / (first * second.to(device))


def stacked(reports: list[Report]) -> Report:
    """Return one report of several pairs of passes, each field a tensor of shape [len(reports)] or None."""
    columns = []
    for values in zip(*reports):
        known = all(x is not None for x in values)
        columns.append(torch.stack([torch.as_tensor(x).reshape(()) for x in values]) if known else None)
    return Report(*columns)


def reported(loss: Any) -> Any:
    """Return what a closure returned if it is a number or a tensor of one element, detached; else None."""
    if loss is None:
        return None
    if isinstance(loss, Tensor):
        return loss.detach() if loss.numel() == 1 else None
    return loss if isinstance(loss, numbers.Real) else None


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return ||x||_2 over all tensors, in fp64 on the device of the first."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]
    return torch.linalg.vector_norm(_stack(norms, norms[0].device if norms else torch.device("cpu")))


def _stack(scalars: list[Tensor], device: torch.device) -> Tensor:
    return (
        torch.stack([x.to(device) for x in scalars]) if scalars else torch.zeros(1, dtype=torch.float64, device=device)
    )
