"""MSAM in a training loop that cannot be changed: the model's own forward moves the weights to w + e."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fused_sam.integrations.passes import sam_of
from fused_sam.optimizer import FusedSAM
from fused_sam.step import Step, untraced


class AscendOnForward:
    """Handle of `ascend_on_forward`; ``remove()`` undoes it. A copy of the model is free of it."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        self._step: Step | None = step
        step.forwards = 0
        self._hooks = [model.register_forward_pre_hook(self._before)]
        # On each module: checkpoints may be made of a wrapped one, and loaded into it.
        for module in model.modules():
            self._hooks.append(module.register_state_dict_pre_hook(self._go_to_w))
            self._hooks.append(module.register_load_state_dict_pre_hook(self._go_to_w))

    def _before(self, module: nn.Module, args: object) -> None:
        self._move(module.training and torch.is_grad_enabled())

    def _go_to_w(self, *args: object) -> None:
        self._move(False)

    @untraced
    def _move(self, trains: bool) -> None:
        step = self._step
        if step is not None and not trains:
            step.restore()
        elif step is not None and step.is_ascent_due:
            step.ascend(take_grads=False)
            step.forwards = (step.forwards or 0) + 1

    def remove(self) -> None:
        """Take the hooks off the model and go back to w: ``first_step()`` is then to be called again."""
        for hook in self._hooks:
            hook.remove()
        if self._step is not None:
            self._step.restore()
            self._step.forwards = None

    def __getstate__(self) -> dict[str, Any]:
        # The hooks travel with a model that is copied or pickled. The optimizer does not: it steps another model.
        return {"_step": None, "_hooks": []}


def ascend_on_forward(model: nn.Module, optimizer: FusedSAM) -> AscendOnForward:
    """Let the first training forward of each step move the weights to w + e, so that ``step()`` is all a loop calls.

    One line at set-up, for a loop that cannot be changed; a step takes one gradient (MSAM, Becker et al. 2024)::

        optimizer = FusedSAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.05, direction="momentum")
        fused_sam.ascend_on_forward(model, optimizer)

    A forward is of training if the model is in training mode and gradients are recorded. Any other, and
    ``model.state_dict()``, goes back to w first: evaluation and checkpoints see w, and the step goes on with the
    gradients that there are. So do the optimizer's ``state_dict()``, ``load_state_dict()`` and copies.

    Args:
        model: called by the loop as it is, or inside a wrapper (DistributedDataParallel).
        optimizer: with ``direction="momentum"``, or a wrapper that has it as its ``optimizer``. SAM itself needs a
            second pass, which such a loop does not make.

    Raises:
        TypeError: if there is no FusedSAM.
        ValueError: for another direction.
    """
    optimizer = sam_of(optimizer)
    if optimizer.direction != "momentum":
        raise ValueError(
            f"Invalid direction={optimizer.direction!r} with ascend_on_forward(). Must be 'momentum': SAM's first "
            "gradient needs a pass of its own."
        )
    return AscendOnForward(model, optimizer._step)
