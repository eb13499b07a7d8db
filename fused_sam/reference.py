"""The specification: SAM in readable torch, one formula per line, in the dtype of its arguments.

Equation and algorithm numbers are those of Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for
Efficiently Improving Generalization", ICLR 2021. Every backend is tested against this file in float64. It shares no
code with the rest of the package, saves no memory and skips no work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def scaling(w: Tensor, adaptive: bool) -> Tensor:
    """T_w: the elementwise scale of the neighbourhood, 1 (SAM) or |w| (ASAM, Kwon et al. 2021, eq. 4)."""
    return w.abs() if adaptive else torch.ones_like(w)


def norm(params: Sequence[Tensor], grads: Sequence[Tensor | None], adaptive: Sequence[bool]) -> Tensor:
    """||T g||_2 over all tensors that have a gradient; shape []."""
    squares = [((scaling(w, a) * g) ** 2).sum() for w, g, a in zip(params, grads, adaptive) if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    rho: Sequence[float],
    adaptive: Sequence[bool],
) -> list[Tensor]:
    """w + e with e = rho T^2 g / ||T g||_2: eq. 2 with p = 2 (footnote 2). A zero or non-finite norm gives e = 0."""
    total = norm(params, grads, adaptive)
    if not (torch.isfinite(total) and total > 0):
        return [w.clone() for w in params]
    return [
        w.clone() if g is None or r == 0 else w + r * scaling(w, a) ** 2 * (g / total)
        for w, g, r, a in zip(params, grads, rho, adaptive)
    ]


def sgd_update(
    w: Tensor,
    g: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One step of SGD as `torch.optim.SGD` defines it: the new w, and the new momentum buffer or None."""
    d = (-g if maximize else g) + weight_decay * w
    if momentum == 0:
        return w - lr * d, None
    m = d if momentum_buffer is None else momentum * momentum_buffer + (1 - dampening) * d
    return w - lr * (d + momentum * m if nesterov else m), m


class ReferenceSAM:
    """Algorithm 1 with SGD as the base step. Groups are as for `torch.optim.SGD`, plus ``rho`` and ``adaptive``."""

    def __init__(
        self,
        params: Iterable[Any],
        rho: float = 0.05,
        adaptive: bool = False,
        **sgd_options: float | bool,
    ) -> None:
        items = list(params)
        groups = items if items and isinstance(items[0], dict) else [{"params": items}]
        defaults = {"rho": rho, "adaptive": adaptive, "lr": 1e-3, **sgd_options}
        self.param_groups: list[dict[str, Any]] = [
            {**defaults, **group, "params": list(group["params"])} for group in groups
        ]
        self.momentum_buffers: dict[Tensor, Tensor] = {}
        self._w: list[Tensor] = []

    def _flat(self, key: str | None = None) -> list:
        return [p if key is None else group[key] for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """w -> w + e (Algorithm 1, line 5)."""
        params = self._flat()
        self._w = [p.clone() for p in params]
        perturbed = perturb(params, [p.grad for p in params], self._flat("rho"), self._flat("adaptive"))
        for p, w_perturbed in zip(params, perturbed):
            p.copy_(w_perturbed)
            if zero_grad:
                p.grad = None

    @torch.no_grad()
    def restore(self) -> None:
        """Back to w."""
        for p, w in zip(self._flat(), self._w):
            p.copy_(w)
        self._w = []

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back to w, then the base step with the gradient taken at w + e (Algorithm 1, lines 6 and 7)."""
        self.restore()
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key not in ("params", "rho", "adaptive")}
            for p in group["params"]:
                if p.grad is not None:
                    w, m = sgd_update(p, p.grad, self.momentum_buffers.get(p), **options)
                    p.copy_(w)
                    if m is not None:
                        self.momentum_buffers[p] = m.clone()
                if zero_grad:
                    p.grad = None

    def step(self, closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]]) -> Tensor:
        """Both passes: the closure zeroes the gradients, runs forward and backward and returns the loss.

        With a list of closures, m-sharpness (section 4.1): each has an e of its own, gradients and losses are averaged.
        """
        closures = [closure] if callable(closure) else list(closure)
        losses, grads = [], []
        for run in closures:
            losses.append(run())
            self.first_step(zero_grad=True)
            run()
            self.restore()
            grads.append([p.grad for p in self._flat()])
        for p, *gs in zip(self._flat(), *grads):
            present = [g for g in gs if g is not None]
            p.grad = torch.stack(present).sum(0) / len(closures) if present else None
        self.second_step()
        return torch.stack(losses).mean()
