"""What FusedSAM does with all its options, on the functions of the reference: for the random calls of calls.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_sam import ReferenceSAM, reference


class Twin:
    """`ReferenceSAM` with what it leaves to its caller: which steps are perturbed, LookSAM, MSAM, clipping.

    ``made`` counts the steps; ``parts`` hold LookSAM's g_v.
    """

    def __init__(
        self,
        sam: ReferenceSAM,
        interval: int = 1,
        start: int = 0,
        direction: str = "gradient",
        looksam_alpha: float | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.sam, self.interval, self.start = sam, interval, start
        self.direction, self.looksam_alpha, self.max_grad_norm = direction, looksam_alpha, max_grad_norm
        self.made = self.ascended = 0
        self.first: dict[Tensor, Tensor] = {}
        self.parts: dict[Tensor, Tensor] = {}

    @property
    def params(self) -> list[Tensor]:
        return self.sam._flat()

    @property
    def due(self) -> bool:
        """Whether an ascent comes next."""
        if self.ascended:
            return self.ascended < self.sam.ascent_steps
        return self.made >= self.start and (self.made - self.start) % self.interval == 0

    def clear(self) -> None:
        for p in self.params:
            p.grad = None

    def ascend(self, zero_grad: bool = False) -> None:
        if self.direction == "momentum":
            self.sam.first_step_along_momentum()
        else:
            moves = zip(self.params, self.sam._flat("perturb"))
            self.first = {p: p.grad.clone() for p, moved in moves if moved and p.grad is not None}
            self.sam.first_step()
        self.ascended += 1
        if zero_grad:
            self.clear()

    def restore(self) -> None:
        if self.ascended:
            self.sam.restore()
        self.ascended = 0

    def descend(self) -> None:
        """From the gradients there are to the base step."""
        if self.looksam_alpha is not None and self.ascended:
            self._keep()
        elif self.looksam_alpha is not None:
            self._reuse()
        if self.max_grad_norm is not None:
            self._clip()
        if not self.ascended:
            self.sam._w = [p.clone() for p in self.params]
        self.sam.second_step()
        self.made, self.ascended = self.made + 1, 0

    def _keep(self) -> None:
        both = [p for p in self.params if p in self.first and p.grad is not None]
        first, second = [self.first[p] for p in both], [p.grad for p in both]
        if any(bool(g.any()) for g in first):
            self.parts.update(zip(both, reference.orthogonal_part(first, second)))
        else:
            for p in both:
                self.parts.setdefault(p, torch.zeros_like(p))

    def _reuse(self) -> None:
        both = [p for p in self.params if p in self.parts and p.grad is not None]
        parts = [self.parts[p] for p in both]
        if any(bool(v.any()) for v in parts):
            mixed = reference.with_reused([p.grad for p in both], parts, self.looksam_alpha)
            for p, g in zip(both, mixed):
                p.grad = g

    def _clip(self) -> None:
        """As `torch.nn.utils.clip_grad_norm_`, with the factor rounded to fp32 as a GradScaler's scale is."""
        grads = [p.grad for p in self.params if p.grad is not None]
        if not grads:
            return
        norm = reference.dual_norm(grads, 2.0)
        scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0).float()
        for p in self.params:
            if p.grad is not None:
                p.grad = p.grad * scale.double().reciprocal().float().double()

    def step(self, closures: list[Callable[[], Any]]) -> None:
        """The closure form; several closures have a perturbation each."""
        grads = []
        for run in closures:
            self.clear()
            while self.due and self.direction == "gradient":
                run()
                self.ascend(zero_grad=True)
            if self.due:
                self.ascend()
            run()
            grads.append([p.grad for p in self.params])
            if len(closures) > 1:
                self.restore()
        if len(closures) > 1:
            for p, *gs in zip(self.params, *grads):
                present = [g for g in gs if g is not None]
                p.grad = torch.stack(present).sum(0) / len(closures) if present else None
        self.descend()
