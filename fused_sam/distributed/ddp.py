"""First passes of a DistributedDataParallel that stay on their rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel


class LocalFirstPass:
    """While ``perturb_next()``, forwards of the model run as inside its ``no_sync()``.

    The forward decides whether its backward communicates, so that ``no_sync()`` around the backward alone, as in a
    recipe that is in common use, does nothing: all ranks get one perturbation.
    """

    def __init__(self, model: DistributedDataParallel, perturb_next: Callable[[], bool]) -> None:
        self._perturb_next: Callable[[], bool] | None = perturb_next
        self._silenced: list[bool] = []  # for each forward that runs: whether it is we who keep it silent
        self._first_backward = _FirstBackward(model, perturb_next) if model.static_graph else None
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._exit, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        if self._first_backward is not None:
            self._first_backward.remove()

    def _enter(self, model: Any, args: object) -> None:
        if self._first_backward is not None and self._first_backward.done:
            self._first_backward.remove()
            self._first_backward = None
        silent = (
            self._perturb_next is not None
            and self._perturb_next()
            and self._first_backward is None
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
        return {"_perturb_next": None, "_silenced": [], "_first_backward": None, "_hooks": []}


class _FirstBackward:
    """Keeps the gradients of this rank through the first backward of all, if that is one of a first pass.

    With ``static_graph=True`` this backward has to be averaged: the model learns from it how often each gradient is
    made, and would add the calls of a silent backward to those of the next. It averages at the end of it.
    """

    def __init__(self, model: DistributedDataParallel, perturb_next: Callable[[], bool]) -> None:
        self.done = False
        self._perturb_next = perturb_next
        self._copies: dict[Tensor, Tensor] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._keep) for p in model.parameters() if p.requires_grad]

    def _keep(self, param: Tensor) -> None:
        if self.done or param.grad is None:
            return
        if not self._perturb_next():
            self.done = True
            return
        if not self._copies:
            Variable._execution_engine.queue_callback(self._put_back)  # after the model's own
        self._copies[param] = param.grad.detach().clone()

    def _put_back(self) -> None:
        for p, grad in self._copies.items():
            p.grad = grad
        self._copies.clear()
        self.done = True

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
