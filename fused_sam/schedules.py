r"""Which steps are perturbed, and by how much.

`Schedule`: every k-th step, from one step until another; the others are the base optimizer's alone. The number of steps
made is in the first parameter group, under a key of its own: there a checkpoint, also one that has been through
`torch.optim.SGD`, and every copy take it along.

`RhoTiedToLR`: rho follows the learning rate, as in GSAM (Zhuang et al. 2022): both decay together.

.. math:: \rho_t = \rho_{min} + (\rho_{max} - \rho_{min}) \frac{lr_t - lr_{min}}{lr_{max} - lr_{min}}
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam.backends.interface import Journal
from fused_sam.ops.journal import StateEntry

STEP = "sam_step"


@dataclass(frozen=True)
class Schedule:
    """Perturbs the steps start, start + interval, start + 2 interval, ... before ``stop``, counted from 0."""

    interval: int = 1
    start: int = 0
    stop: int | None = None

    @property
    def always(self) -> bool:
        """Return whether every step is perturbed, so that there is nothing to count."""
        return self == Schedule()

    def due(self, param_groups: list[dict[str, Any]]) -> bool:
        """Return whether the step that comes next is perturbed."""
        step = param_groups[0].get(STEP, 0) - self.start
        return step >= 0 and step % self.interval == 0 and (self.stop is None or step < self.stop - self.start)

    def is_over(self, param_groups: list[dict[str, Any]]) -> bool:
        """Return whether no step is perturbed any more."""
        return self.stop is not None and param_groups[0].get(STEP, 0) >= self.stop


class ScheduleEntry(StateEntry):
    """A journal entry for the count, which an interrupted step does not advance."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.group = group
        self.before = group[STEP]

    def restore(self) -> None:
        """Set it back."""
        self.group[STEP] = self.before


def count(param_groups: list[dict[str, Any]], journal: Journal) -> None:
    """Advance the step count, if this optimizer keeps one."""
    if STEP in param_groups[0]:
        journal.append(ScheduleEntry(param_groups[0]))
        param_groups[0][STEP] += 1


@dataclass(eq=False, repr=False)
class RhoTiedToLR:
    """Sets every group's ``rho`` from its ``lr``; call ``step()`` after the learning-rate scheduler's::

        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
        rho_schedule = fused_sam.RhoTiedToLR(optimizer, rho_min=0.01)
        for epoch in range(epochs):
            ...
            scheduler.step()
            rho_schedule.step()

    rho_max and lr_max are the group's values when this is made, or ``initial_rho`` and ``initial_lr`` where the group
    has them: there they are kept, so that a checkpoint of the optimizer carries them along and there is nothing else
    to save. rho is not extrapolated: below ``lr_min`` it is ``rho_min``, above lr_max it is rho_max.

    Args:
        optimizer: a `FusedSAM`.
        rho_min: rho at ``lr_min``, >= 0 and finite.
        lr_min: the learning rate at which rho is least, >= 0 and below every group's lr_max.

    Raises:
        ValueError: for a value out of range, or an optimizer whose groups have no rho.
    """

    optimizer: Optimizer
    _: KW_ONLY
    rho_min: float = 0.0
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        optimizer, rho_min, lr_min = self.optimizer, self.rho_min, self.lr_min
        if not 0.0 <= rho_min < math.inf:
            raise ValueError(f"Invalid {rho_min=}. Must be >= 0 and finite.")
        if not 0.0 <= lr_min < math.inf:
            raise ValueError(f"Invalid {lr_min=}. Must be >= 0 and finite.")
        for k, group in enumerate(optimizer.param_groups):
            if "rho" not in group:
                raise ValueError(f"Invalid optimizer={type(optimizer).__name__}. Its group {k} has no rho.")
            lr = float(group.get("initial_lr", group["lr"]))
            if not lr > lr_min:
                raise ValueError(f"Invalid {lr_min=}. Must be below the learning rate of group {k}, {lr}.")
        self.rho_min, self.lr_min = float(rho_min), float(lr_min)
        for group in optimizer.param_groups:
            self._keep_initial(group)
        self.step()

    def step(self) -> None:
        """Set rho of every group from its lr. A tensor is written in place, where a CUDA graph reads it."""
        for group in self.optimizer.param_groups:
            self._keep_initial(group)  # groups may have been added
            rho_max, lr_max = group["initial_rho"], float(group["initial_lr"])
            share = (group["lr"] - self.lr_min) / (lr_max - self.lr_min)
            share = share.clamp(0.0, 1.0) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)
            rho = self.rho_min + (rho_max - self.rho_min) * share
            if isinstance(group["rho"], Tensor):
                group["rho"].copy_(torch.as_tensor(rho))
            else:
                group["rho"] = rho.clone() if isinstance(rho, Tensor) else rho

    @staticmethod
    def _keep_initial(group: dict[str, Any]) -> None:
        group.setdefault("initial_rho", float(group["rho"]))
        group.setdefault("initial_lr", float(group["lr"]))
