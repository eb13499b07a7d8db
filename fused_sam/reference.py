"""The specification: SAM in readable torch, one formula per line, in the dtype of its arguments.

Equation and algorithm numbers are those of Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for
Efficiently Improving Generalization", ICLR 2021. Every backend is tested against this file in float64. It shares no
code with the rest of the package, saves no memory and skips no work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def scaling(w: Tensor, adaptive: bool, eta: float = 0.0) -> Tensor:
    """Return T_w, the elementwise scale of the neighbourhood, 1 (SAM) or |w| + eta (ASAM, Kwon et al. 2021, eq. 4)."""
    return w.abs() + eta if adaptive else torch.ones_like(w)


def dual_norm(xs: Sequence[Tensor], p: float) -> Tensor:
    """Return ||x||_q of all tensors together, 1/p + 1/q = 1; shape []."""
    flat = torch.cat([x.flatten() for x in xs]) if any(x.numel() for x in xs) else torch.zeros(1)
    q = math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)
    largest = flat.detach().abs().max()  # the unit in which no power overflows
    unit = largest if 0 < largest < math.inf else 1.0
    return unit * torch.linalg.vector_norm(flat / unit, ord=q)


def direction(xs: Sequence[Tensor], p: float) -> list[Tensor]:
    """Return sign(x) |x|^(q-1) / (||x||_q^q)^(1/p): eq. 2 without rho, of length 1 in the p-norm.

    p = 1 is the limit: all of it at the largest |x|, of equal ones at the first.
    """
    if p == math.inf:
        return [x.sign() for x in xs]
    if p > 1:
        total, power = dual_norm(xs, p), 1 / (p - 1)  # q - 1
        return [x.sign() * (x.abs() / total) ** power for x in xs]
    flat = torch.cat([x.flatten() for x in xs])
    at = flat.abs().argmax()
    peak = torch.zeros_like(flat)
    peak[at] = flat[at].sign()
    return [piece.view_as(x) for piece, x in zip(peak.split([x.numel() for x in xs]), xs)]


def norm(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    adaptive: Sequence[bool],
    p: float = 2.0,
    eta: float = 0.0,
) -> Tensor:
    """Return ||T g||_q over all tensors that have a gradient; shape []."""
    return dual_norm([scaling(w, a, eta) * g for w, g, a in zip(params, grads, adaptive) if g is not None], p)


def perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    rho: Sequence[float],
    adaptive: Sequence[bool],
    p: float = 2.0,
    eta: float = 0.0,
) -> list[Tensor]:
    """Return w + e with e = rho T direction(T g), which is rho T^2 g / ||T g||_2 for p = 2 (eq. 2, footnote 2).

    A zero or non-finite norm gives e = 0.
    """
    total = norm(params, grads, adaptive, p, eta)
    if not (torch.isfinite(total) and total > 0):
        return [w.clone() for w in params]
    scales = [scaling(w, a, eta) for w, a in zip(params, adaptive)]
    scaled = {i: scales[i] * g for i, g in enumerate(grads) if g is not None}
    directions = dict(zip(scaled, direction(list(scaled.values()), p)))
    return [
        w + r * t * directions[i] if i in directions and r != 0 else w.clone()
        for i, (w, r, t) in enumerate(zip(params, rho, scales))
    ]


def project(es: Sequence[Tensor], rho: Sequence[float], scales: Sequence[Tensor], p: float) -> list[Tensor]:
    """Return e moved into the ball ||e / (rho T)||_p <= 1: element by element for p = inf, else along the ray to 0.

    For p = 2 and T = 1 that is the nearest point of the ball. Where rho T = 0, e is 0.
    """
    sizes = [abs(r) * t for r, t in zip(rho, scales)]
    if p == math.inf:
        return [torch.clamp(e, -s, s) for e, s in zip(es, sizes)]
    ratios = [torch.where(s > 0, e / torch.where(s > 0, s, 1), 0.0).flatten() for e, s in zip(es, sizes)]
    length = torch.linalg.vector_norm(torch.cat(ratios), ord=p)
    return [torch.where(s > 0, e / torch.clamp(length, min=1.0), 0.0) for e, s in zip(es, sizes)]


def sam_gradient(
    loss: Callable[[list[Tensor]], Tensor],
    params: Sequence[Tensor],
    rho: Sequence[float],
    adaptive: Sequence[bool],
    p: float = 2.0,
    eta: float = 0.0,
    second_order: bool = True,
) -> list[Tensor]:
    """Return the gradient of L(w + e(w)) with respect to w, by the chain rule (section 2, and appendix C.4).

    Without ``second_order`` e is held constant, which leaves the gradient of L at w + e (eq. 3).
    """
    ws = [w.detach().clone().requires_grad_() for w in params]
    grads = torch.autograd.grad(loss(ws), ws, create_graph=second_order)
    moved = perturb(ws, grads, rho, adaptive, p, eta)
    if not second_order:
        moved = ws = [w.detach().requires_grad_() for w in moved]
    return list(torch.autograd.grad(loss(moved), ws))


def orthogonal_part(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Return g_v = g_s - <g, g_s> / ||g||^2 g over all tensors together: LookSAM (Liu et al. 2022)."""
    dot = sum((a * b).sum() for a, b in zip(first, second))
    square = sum((a * a).sum() for a in first)
    return [b - dot / square * a for a, b in zip(first, second)]


def with_reused(grads: Sequence[Tensor], orthogonal: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """Return g + alpha ||g|| / ||g_v|| g_v: LookSAM, in the steps between."""
    ratio = dual_norm(grads, 2.0) / dual_norm(orthogonal, 2.0)
    return [g + alpha * ratio * v for g, v in zip(grads, orthogonal)]


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
    """Make one step of SGD as `torch.optim.SGD` defines it. Return the new w, and the new momentum buffer or None."""
    d = (-g if maximize else g) + weight_decay * w
    if momentum == 0:
        return w - lr * d, None
    m = d if momentum_buffer is None else momentum * momentum_buffer + (1 - dampening) * d
    return w - lr * (d + momentum * m if nesterov else m), m


class AdamState(NamedTuple):
    """m, v and the largest v of Adam, after t steps."""

    t: int
    m: Tensor
    v: Tensor
    v_max: Tensor

    @classmethod
    def zeros(cls, w: Tensor) -> AdamState:
        """Return the state before the first step."""
        return cls(0, *(torch.zeros_like(w) for _ in range(3)))


def adam_update(
    w: Tensor,
    g: Tensor,
    state: AdamState,
    *,
    decoupled: bool = False,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, AdamState]:
    """Make one step of Adam (Kingma and Ba 2015, Algorithm 1), as `torch.optim.Adam` does. Return the new w and state.

    ``decoupled``: weight decay as in AdamW (Loshchilov and Hutter 2019, Algorithm 2). ``amsgrad``: Reddi et al. 2018.
    """
    g = -g if maximize else g
    if decoupled:
        w = w - lr * weight_decay * w
    else:
        g = g + weight_decay * w
    t = state.t + 1
    m = betas[0] * state.m + (1 - betas[0]) * g
    v = betas[1] * state.v + (1 - betas[1]) * g**2
    v_max = torch.maximum(state.v_max, v)
    m_hat = m / (1 - betas[0] ** t)
    v_hat = (v_max if amsgrad else v) / (1 - betas[1] ** t)
    return w - lr * m_hat / (v_hat.sqrt() + eps), AdamState(t, m, v, v_max)


def decayed(w: Tensor, g: Tensor, weight_decay: float) -> Tensor:
    """Return the gradient of L + weight_decay / 2 ||w||^2: what the authors' own code ascends by."""
    return g + weight_decay * w


OWN_KEYS = ("params", "rho", "adaptive", "perturb", "decay_in_ascent")


class ReferenceSAM:
    """Algorithm 1 with SGD, Adam or AdamW as the base step. Groups are as in torch, plus ``rho`` and ``adaptive``.

    ``adaptive="weights"`` scales tensors of two and more dimensions only; groups with ``perturb=False`` are left out.
    ``decay_in_ascent`` has weight decay in the first gradient, of the sign that it has in the objective.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rho: float = 0.05,
        adaptive: bool | str = False,
        p: float = 2.0,
        eta: float = 0.0,
        base: str = "sgd",
        ascent_steps: int = 1,
        **base_options: Any,
    ) -> None:
        if base not in ("sgd", "adam", "adamw"):
            raise ValueError(f"Invalid base={base!r}. Must be 'sgd', 'adam' or 'adamw'.")
        self.base, self.p, self.eta, self.ascent_steps = base, p, eta, ascent_steps
        items = list(params)
        groups = items if items and isinstance(items[0], dict) else [{"params": items}]
        defaults = {"rho": rho, "adaptive": adaptive, "perturb": True, "lr": 1e-3, "decay_in_ascent": False}
        defaults |= base_options
        self.param_groups: list[dict[str, Any]] = [
            {**defaults, **group, "params": list(group["params"])} for group in groups
        ]
        self.momentum_buffers: dict[Tensor, Tensor] = {}
        self.adam_states: dict[Tensor, AdamState] = {}
        self._w: list[Tensor] = []

    def _flat(self, key: str | None = None) -> list:
        return [p if key is None else group[key] for group in self.param_groups for p in group["params"]]

    def _decay(self, group: dict[str, Any]) -> float:
        if not group["decay_in_ascent"]:
            return 0.0
        return -group["weight_decay"] if group.get("maximize") else group["weight_decay"]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Go from w to w + e (Algorithm 1, line 5); from w + e, make one more ascent step and project it."""
        params = self._flat()
        # The worst point of an objective to be maximised is where it is least.
        rho = [-g["rho"] if g.get("maximize") else g["rho"] for g in self.param_groups for _ in g["params"]]
        again = bool(self._w)
        if not again:
            self._w = [p.clone() for p in params]
        grads = [p.grad if moves else None for p, moves in zip(params, self._flat("perturb"))]
        adaptive = [p.dim() > 1 if a == "weights" else a for p, a in zip(params, self._flat("adaptive"))]
        decays = [self._decay(group) for group in self.param_groups for _ in group["params"]]
        grads = [None if g is None else decayed(p, g, decay) for p, g, decay in zip(params, grads, decays)]
        stepped = perturb(self._w, grads, rho, adaptive, self.p, self.eta)
        if again:
            es = [p - w + (x - w) for p, w, x in zip(params, self._w, stepped)]
            scales = [scaling(w, a, self.eta) for w, a in zip(self._w, adaptive)]
            stepped = [w + e for w, e in zip(self._w, project(es, rho, scales, self.p))]
        for p, w_perturbed in zip(params, stepped):
            p.copy_(w_perturbed)
            if zero_grad:
                p.grad = None

    @torch.no_grad()
    def first_step_along_momentum(self) -> None:
        """Go from w to w - rho m / ||m||: MSAM (Becker et al. 2024), Algorithm 1, with m of SGD or of Adam."""
        grads = [p.grad for p in self._flat()]
        for group in self.param_groups:
            for p in group["params"]:
                m = (
                    self.momentum_buffers.get(p)
                    if self.base == "sgd"
                    else self.adam_states.get(p, AdamState.zeros(p)).m
                )
                p.grad = m if m is None or group.get("maximize") else -m
        self.first_step()
        for p, g in zip(self._flat(), grads):
            p.grad = g

    @torch.no_grad()
    def restore(self) -> None:
        """Restore w."""
        for p, w in zip(self._flat(), self._w):
            p.copy_(w)
        self._w = []

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore w, then make the base step with the gradient at w + e (Algorithm 1, lines 6 and 7)."""
        self.restore()
        for group in self.param_groups:
            options = {key: value for key, value in group.items() if key not in OWN_KEYS}
            for p in group["params"]:
                if p.grad is not None and self.base == "sgd":
                    w, m = sgd_update(p, p.grad, self.momentum_buffers.get(p), **options)
                    p.copy_(w)
                    if m is not None:
                        self.momentum_buffers[p] = m.clone()
                elif p.grad is not None:
                    state = self.adam_states.get(p, AdamState.zeros(p))
                    w, state = adam_update(p, p.grad, state, decoupled=self.base == "adamw", **options)
                    p.copy_(w)
                    self.adam_states[p] = state
                if zero_grad:
                    p.grad = None

    def step(self, closure: Callable[[], Tensor] | Sequence[Callable[[], Tensor]]) -> Tensor:
        """Make both passes: the closure zeroes the gradients, runs forward and backward and returns the loss.

        With a list of closures, m-sharpness (section 4.1): each has its own perturbation, and gradients and losses are
        averaged.
        """
        closures = [closure] if callable(closure) else list(closure)
        losses, grads = [], []
        for run in closures:
            losses.append(run())
            for _ in range(self.ascent_steps):
                self.first_step(zero_grad=True)
                run()
            self.restore()
            grads.append([p.grad for p in self._flat()])
        for p, *gs in zip(self._flat(), *grads):
            present = [g for g in gs if g is not None]
            p.grad = torch.stack(present).sum(0) / len(closures) if present else None
        self.second_step()
        return torch.stack(losses).mean()
