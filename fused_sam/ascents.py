"""The first half of a step, from w to w + e: along the gradient at w (SAM), or along the momentum (MSAM).

Like `fused_sam.bases`, the other half, these work closely with `FusedSAM`, whose state machine they drive.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fused_sam import masters, ops, param_groups, projected
from fused_sam.ops import lists
from fused_sam.telemetry import Probe

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


@dataclass
class Displacement:
    """What is known between the passes. The weights are at w + e exactly where the journal says so.

    Attributes:
        norms: what the steps of the ascent were scaled by, the last one last; nothing for p = inf.
        of_gradients: whether they are norms of gradients.
        probe: what telemetry measures; None without.
        grads: a copy of the first gradients, where they are wanted after the second pass; None otherwise.
        backups: where w is, if later steps of the ascent have to read it.
        steps: how many steps of the ascent have been made.
        journal: what there is to undo.
    """

    norms: list[Tensor] = field(default_factory=list)
    of_gradients: bool = True
    probe: Probe | None = None
    grads: list[Any] | None = None
    backups: list[Any] | None = None
    steps: int = 0
    journal: ops.Journal = field(default_factory=list)

    def overflow(self) -> Tensor | None:
        """1 where a gradient of the ascent was not finite, else 0; float32, shape []. None where there is no norm.

        e does not depend on the loss scale, so these gradients are never unscaled: their norm tells.
        """
        if not self.norms or not self.of_gradients:
            return None
        values = [norm.flatten()[0] for norm in self.norms]
        return (~torch.isfinite(values[0] if len(values) == 1 else torch.stack(values).sum())).float()


DIRECTIONS = ("gradient", "momentum")


def make_ascent(
    base: Optimizer,
    direction: str,
    ascent_steps: int,
    second_order: bool,
    reuse: float | None,
    p: float,
    interval: int,
    decay_in_ascent: bool,
) -> AlongGradient | AlongMomentum:
    """The ascent that the options ask for.

    Raises:
        TypeError, ValueError: for a value out of range, or values that contradict each other.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"Invalid {direction=}. Must be one of {list(DIRECTIONS)}.")
    if not isinstance(ascent_steps, numbers.Integral) or isinstance(ascent_steps, bool) or ascent_steps < 1:
        raise ValueError(f"Invalid {ascent_steps=}. Must be an integer >= 1.")
    if not isinstance(second_order, bool):
        raise ValueError(f"Invalid {second_order=}. Must be True or False.")
    if second_order and ascent_steps > 1:
        raise ValueError(f"Invalid {second_order=} with {ascent_steps=}. The term is that of a single step.")
    if second_order and reuse is not None:
        raise ValueError(f"Invalid {second_order=} with {reuse=}. LookSAM takes SAM's own gradient apart.")
    if reuse is not None and interval == 1:
        raise ValueError(f"Invalid {reuse=} with {interval=}. Must have interval > 1: there is no step between.")
    if direction == "gradient":
        return AlongGradient(int(ascent_steps), keep_grads=reuse is not None)
    if ascent_steps > 1 or second_order or reuse is not None:
        raise ValueError(
            f"Invalid {direction=} with {ascent_steps=}, {second_order=}, {reuse=}. They need the gradient at w."
        )
    if p != 2:
        raise ValueError(f"Invalid {direction=} with {p=}. Must be p = 2.")
    if decay_in_ascent:
        raise ValueError(f"Invalid {direction=} with {decay_in_ascent=}. The momentum holds the weight decay already.")
    if isinstance(base, SGD) and not any(group["momentum"] for group in base.param_groups):
        raise ValueError(f"Invalid {direction=} with momentum=0. There must be a momentum to follow.")
    return AlongMomentum()


class AlongGradient:
    """e from the gradients in ``p.grad``: in ``steps`` steps (`fused_sam.projected`), each with its own."""

    direction = "gradient"

    def __init__(self, steps: int = 1, keep_grads: bool = False) -> None:
        self.steps = steps
        self.keep_grads = keep_grads

    def step(self, optimizer: FusedSAM, params: list[Tensor], take_grads: bool) -> None:
        """One step of the ascent; with ``take_grads`` the gradients become None, and their memory may hold w."""
        optimizer._peers.average_first(optimizer)
        if optimizer._ascent is None:
            self._first(optimizer, params, take_grads)
        else:
            self._next(optimizer, params, optimizer._ascent, take_grads)

    def _first(self, optimizer: FusedSAM, params: list[Tensor], take_grads: bool) -> None:
        local = optimizer._peers.local
        grads = lists.get_grads(params)
        left_out = param_groups.take_out(optimizer.param_groups, grads)
        groups = param_groups.ascent_groups(optimizer.param_groups)
        copies = masters.of(optimizer, params, grads)
        ascent = ops.Ascent(local(params), local(grads), groups, optimizer.backend, optimizer.p, _local(local, copies))
        norm = optimizer._peers.norm(ascent, params)
        state = Displacement(
            [] if norm is None else [norm], probe=Probe(params, grads) if optimizer.telemetry else None
        )
        if self.keep_grads:
            state.grads = [None if g is None else g.detach().clone() for g in grads]
        if self.steps > 1:
            state.backups = [
                None if g is None or m is not None else torch.empty_like(p)
                for p, g, m in zip(params, grads, copies or [None] * len(params))
            ]
        optimizer._ascent = state
        try:
            if take_grads:
                lists.clear_grads(params)
            ascent.perturb(norm, state.journal, state.backups, owned=take_grads)
            masters.enter(optimizer, params, copies)
            if state.probe is not None:
                state.probe.measure_radius(final=self.steps == 1)
            state.steps = 1
        except BaseException:
            if not state.journal:  # else the gradients' memory has held w
                for i, p in enumerate(params):
                    p.grad = left_out.get(i, grads[i])
            optimizer.restore()
            raise

    def _next(self, optimizer: FusedSAM, params: list[Tensor], state: Displacement, take_grads: bool) -> None:
        grads = lists.get_grads(params)
        param_groups.take_out(optimizer.param_groups, grads)
        groups = param_groups.ascent_groups(optimizer.param_groups)
        assert state.backups is not None
        copies = masters.of(optimizer, params, grads)
        norm = projected.advance(
            params, grads, state.backups, copies, groups, optimizer.backend, optimizer.p, state.journal
        )
        masters.enter(optimizer, params, copies)
        if norm is not None:
            state.norms.append(norm)
        state.steps += 1
        if state.probe is not None:
            state.probe.measure_radius(final=state.steps == self.steps)
        if take_grads:
            lists.clear_grads(params)


class AlongMomentum:
    """e = -rho T^2 m / ||T m||_2 with the momentum m of the base optimizer: MSAM (Becker et al. 2024).

    That is where the momentum is about to take the weights, and no gradient is needed to know it: a step takes one
    gradient, at w + e. Parameters that have no momentum yet stay at w.
    """

    direction = "momentum"
    steps = 1
    KEYS = ("momentum_buffer", "exp_avg")

    def step(self, optimizer: FusedSAM, params: list[Tensor], take_grads: bool) -> None:
        """The ascent; ``take_grads`` sets the gradients to None."""
        momenta = self._momenta(optimizer, params)
        param_groups.take_out(optimizer.param_groups, momenta)
        groups = [
            group._replace(rho=-group.distance, decay=0.0)
            for group in param_groups.ascent_groups(optimizer.param_groups)
        ]
        local = optimizer._peers.local
        copies = masters.of(optimizer, params, momenta)
        ascent = ops.Ascent(
            local(params), local(momenta), groups, optimizer.backend, optimizer.p, _local(local, copies)
        )
        norm = optimizer._peers.norm(ascent, params)
        assert norm is not None
        state = Displacement([norm], of_gradients=False)
        if optimizer.telemetry:
            state.probe = Probe(params, momenta)
        optimizer._ascent = state
        try:
            if take_grads:
                lists.clear_grads(params)
            ascent.perturb(norm, state.journal)
            masters.enter(optimizer, params, copies)
            if state.probe is not None:
                state.probe.measure_radius()
            state.steps = 1
        except BaseException:
            optimizer.restore()
            raise

    def _momenta(self, optimizer: FusedSAM, params: list[Tensor]) -> list[Any]:
        for key in self.KEYS:
            found = lists.lookup(optimizer.state, params, key)
            if any(m is not None for m in found):
                return found
        if any(optimizer.state.values()):
            raise RuntimeError(f"direction='momentum' needs a base optimizer that keeps one of {list(self.KEYS)}.")
        return [None] * len(params)


def _local(local: Callable[[Any], Any], copies: list[Any] | None) -> list[Any] | None:
    return None if copies is None else local(copies)
