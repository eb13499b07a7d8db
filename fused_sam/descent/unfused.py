"""Any other torch.optim.Optimizer: restored by us, stepped by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from fused_sam import ops
from fused_sam.backends.interface import Journal
from fused_sam.descent import clipping, looksam
from fused_sam.parameters import Parameters


class AnyBase:
    """A base optimizer that shares our groups and state, and takes in checkpoints its own way."""

    elementwise = False

    def __init__(self, inner: Optimizer) -> None:
        closure = inspect.signature(inner.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"Invalid base_optimizer={type(inner).__name__}. Must not need a closure of its own: SAM fixes the two "
                "points at which the loss is evaluated."
            )
        self.inner = inner

    @property
    def has_format(self) -> bool:
        """Return whether checkpoints are in a format of the base's own, which it both writes and reads."""
        torchs = Optimizer.state_dict, Optimizer.load_state_dict
        return type(self.inner).state_dict is not torchs[0] and type(self.inner).load_state_dict is not torchs[1]

    def is_decoupled(self, group: dict[str, Any]) -> bool:
        """Return whether the weight decay of a group is no part of the gradient, as in AdamW."""
        # Before torch 2.7 the groups do not say, and an AdamW is one whatever checkpoint it has loaded.
        return isinstance(self.inner, AdamW) or bool(group.get("decoupled_weight_decay", False))

    def shared(self, parameters: Parameters) -> Optimizer:
        """Return the base optimizer, on the groups and the state that there are now."""
        inner: Any = self.inner
        try:
            inner.param_groups = parameters.groups
        except AttributeError:  # a property of its class, which is what has the groups
            inner.param_groups[:] = parameters.groups
            parameters.groups = inner.param_groups
        try:
            inner.state = parameters.state
        except AttributeError:
            if inner.state is not parameters.state:  # a checkpoint's
                inner.state.clear()
                inner.state.update(parameters.state)
                parameters.state = inner.state
        return self.inner

    def add_param_group(self, parameters: Parameters, group: dict[str, Any]) -> None:
        """Let the base add a group its own way: it knows its defaults, and may keep more beside them."""
        inner = self.shared(parameters)
        type(inner).add_param_group(inner, group)
        parameters.groups = inner.param_groups

    def exposed(
        self,
        parameters: Parameters,
        plain_step: Callable[[], Any],
        load_state_dict: Callable[[dict[str, Any]], Any],
        add_param_group: Callable[[dict[str, Any]], Any],
    ) -> Optimizer:
        """Return the base optimizer for users, who may step it, load into it or add to it: by the methods given."""
        inner: Any = self.shared(parameters)
        if "step" not in vars(inner):

            def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
                with torch.enable_grad():
                    loss = None if closure is None else closure()
                plain_step()
                return loss

            inner.step = MethodType(step, inner)
            inner.load_state_dict, inner.add_param_group = load_state_dict, add_param_group
            inner._step_supports_amp_scaling = False  # a GradScaler then unscales, and skips, by itself
            inner._opt_called = True  # a scheduler built on it does not see SAM's steps, and would warn of none
        return cast(Optimizer, inner)

    def state_dict(self, parameters: Parameters) -> dict[str, Any] | None:
        """Return the base's checkpoint in a format of its own; None where it is torch's."""
        return type(self.inner).state_dict(self.shared(parameters)) if self.has_format else None

    def require_loadable(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that the base would misread: none, as far as is known here."""

    def load(self, parameters: Parameters, state_dict: dict[str, Any]) -> None:
        """Let the base take in a checkpoint, where its class has its own way: torch's casts all state to the weights'
        dtype.
        """
        if type(self.inner).load_state_dict is not Optimizer.load_state_dict:
            inner = self.shared(parameters)
            type(inner).load_state_dict(inner, state_dict)
            parameters.groups, parameters.state = inner.param_groups, inner.state

    def update(
        self, parameters: Parameters, journal: Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Restore w, unscale or skip as a GradScaler would, and let the base make its step."""
        ops.restore_weights(journal)
        if found_inf is not None and bool(found_inf):
            journal.clear()
            return
        if grad_scale is not None:
            clipping.unscale(parameters, grad_scale)
        inner = self.shared(parameters)
        step: Any = type(inner).step
        # torch wraps `step` to call the hooks; they fire once per SAM step, for the FusedSAM around this optimizer.
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        with looksam.out_of_sight(parameters):
            step(inner)
        journal.clear()
