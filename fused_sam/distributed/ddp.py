"""First passes of a DistributedDataParallel that stay on their rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


class LocalFirstPass:
    """While ``optimizer.perturb_next``, forwards of the model run as inside its ``no_sync()``.

    The forward decides whether its backward communicates, so that ``no_sync()`` around the backward alone, as in a
    recipe that is in common use, does nothing: all ranks get one perturbation.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: FusedSAM) -> None:
        self._optimizer: FusedSAM | None = optimizer
        self._silenced: list[bool] = []  # for each forward that runs: whether it is we who keep it silent
        self._first_grads = _FirstGrads(model) if model.static_graph else None
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._exit, always_call=True),
        ]

    def finish(self) -> None:
        """After a first pass: p.grad = the gradient of this rank, where it has been averaged nevertheless."""
        if self._first_grads is not None:
            self._first_grads.put_back()
            self._first_grads = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        if self._first_grads is not None:
            self._first_grads.remove()

    def _enter(self, model: Any, args: object) -> None:
        silent = (
            self._optimizer is not None
            and self._optimizer.perturb_next
            and self._first_grads is None
            and torch.is_grad_enabled()
            and model.require_backward_grad_sync  # else the user is inside no_sync()
        )
        self._silenced.append(silent)
        if silent:
            model.require_backward_grad_sync = False

    def _exit(self, model: Any, args: object, output: object) -> None:
        # An earlier pre-hook that raises means that _enter never ran.
        if self._silenced and self._silenced.pop():
            model.require_backward_grad_sync = True

    def __getstate__(self) -> dict[str, Any]:
        # The hooks travel with a model that is copied or pickled. The optimizer does not: it steps another model.
        return {"_optimizer": None, "_silenced": [], "_first_grads": None, "_hooks": []}


class _FirstGrads:
    """Copies of the gradients of the first backward of all, before the model averages them.

    With ``static_graph=True`` this one backward has to be averaged: the model learns from it how often each gradient is
    made, and would add the calls of a silent backward to those of the next.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._copies: dict[Tensor, Tensor] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._keep) for p in self._params]

    def _keep(self, param: Tensor) -> None:
        if param.grad is not None:
            self._copies[param] = param.grad.detach().clone()

    def put_back(self) -> None:
        self.remove()
        for p in self._params:
            p.grad = self._copies.get(p)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
