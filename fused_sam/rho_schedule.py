r"""rho that follows the learning rate, as in GSAM (Zhuang et al. 2022): both decay together.

.. math:: \rho_t = \rho_{min} + (\rho_{max} - \rho_{min}) \frac{lr_t - lr_{min}}{lr_{max} - lr_{min}}
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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

    def __init__(self, optimizer: Optimizer, *, rho_min: float = 0.0, lr_min: float = 0.0) -> None:
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
        self.optimizer = optimizer
        self.rho_min = float(rho_min)
        self.lr_min = float(lr_min)
        for group in optimizer.param_groups:
            self._adopt(group)
        self.step()

    def step(self) -> None:
        """rho of every group from its lr. A rho that is a tensor is written in place, where a CUDA graph reads it."""
        for group in self.optimizer.param_groups:
            self._adopt(group)  # groups may have been added
            rho_max, lr_max = group["initial_rho"], float(group["initial_lr"])
            share = (group["lr"] - self.lr_min) / (lr_max - self.lr_min)
            share = share.clamp(0.0, 1.0) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)
            rho = self.rho_min + (rho_max - self.rho_min) * share
            if isinstance(group["rho"], Tensor):
                group["rho"].copy_(torch.as_tensor(rho))
            else:
                group["rho"] = rho.clone() if isinstance(rho, Tensor) else rho

    @staticmethod
    def _adopt(group: dict[str, Any]) -> None:
        group.setdefault("initial_rho", float(group["rho"]))
        group.setdefault("initial_lr", float(group["lr"]))
