"""What all who share an optimizer's step read and write of it, and how it is shown, copied and pickled."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_sam import backends
from fused_sam.options import Direction, Options
from fused_sam.report import Report
from fused_sam.step import Step


def _option(name: str) -> Any:
    """Return a property for an option, which all who share the step read and write."""
    return property(
        lambda self: getattr(self._step.options, name), lambda self, value: setattr(self._step.options, name, value)
    )


class SharedStep(Optimizer):
    """An optimizer that holds a `Step`, which its wrappers share.

    Some of them copy ``__dict__``, in which there is nothing but the step and what torch has put there.
    """

    _step: Step

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return torch.optim's groups of parameters."""
        # All that a GradScaler does with an optimizer when it unscales is to ask for these.
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code.co_name == "_unscale_grads_":
            self._step.unscaled.add(self.perturbed)
        return self._step.parameters.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._step.parameters.groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Return torch.optim's state of each parameter."""
        return self._step.parameters.state  # type: ignore[return-value]

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self._step.parameters.state = state

    p = _option("p")
    replay_rng = _option("replay_rng")
    capturable = _option("capturable")
    max_grad_norm = _option("max_grad_norm")
    second_order = _option("second_order")
    looksam_alpha = reuse = _option("looksam_alpha")
    telemetry = _option("telemetry")

    @property
    def last(self) -> Report:
        """Return what the last step saw, a `fused_sam.report.Report` of tensors on the device."""
        return self._step.last

    @last.setter
    def last(self, report: Report) -> None:
        self._step.last = report

    @property
    def perturbed(self) -> bool:
        """Return whether weights are at w + e: between ``first_step`` and ``step``, ``second_step`` or ``restore``."""
        return self._step.displacement is not None

    @property
    def perturb_next(self) -> bool:
        """Return whether ``first_step`` is due; with ``interval``, ``start`` or ``stop`` some steps have none.

        Where it is False a step takes one gradient: backward, then ``step()``, which calls a closure once.
        """
        return self._step.is_ascent_due

    @property
    def direction(self) -> Direction:
        """Return ``"gradient"`` or ``"momentum"``: what the perturbation follows."""
        return self._step.options.direction

    @property
    def backend(self) -> str | None:
        """Return the backend that was asked for; None: the best for each device."""
        return self._step.parameters.backend

    def __repr__(self) -> str:
        """Return torch's own, and before the groups what is none of theirs: the base, p, interval and backend."""
        options, head_and_groups = self._step.options, super().__repr__().partition("\n")
        shown = {"base": type(self._step.base.inner).__name__, "p": options.p, "interval": options.interval}
        shown["backend"] = self._backends()
        for field in dataclasses.fields(Options):
            value = getattr(options, field.name)
            if field.name != "base_optimizer" and value != field.default:
                shown[field.name] = value
        return "\n".join([head_and_groups[0], *(f"    {k}: {v}" for k, v in shown.items()), head_and_groups[2]])

    def _backends(self) -> str:
        """Return the name of the backend: the one that was asked for, else the best for each kind of device."""
        if self.backend is not None:
            return self.backend
        kinds = dict.fromkeys(p.device.type for p in self._step.parameters.tensors())
        return ", ".join(map(backends.chosen, kinds))

    if TYPE_CHECKING:  # by name, so that a typo in another one is found
        train: Callable[[], Any]
        eval: Callable[[], Any]
    else:

        def __getattr__(self, name: str) -> Any:
            """Return ``train`` or ``eval`` of a base that has them, as Schedule-Free's; the latter at w only."""
            if name in ("train", "eval") and hasattr(self._step.base.inner, name):
                return functools.partial(self._set_mode, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _set_mode(self, name: str) -> Any:
        if name == "eval":
            self._step.require_unperturbed("eval()")
        return getattr(self._step.base.shared(self._step.parameters), name)()

    def __getstate__(self) -> dict[str, Any]:
        self._step.require_unperturbed("Copying or pickling")
        self._step.peers.require_whole_state("Copying or pickling")
        return {**super().__getstate__(), "_step": self._step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch writes what it has loaded into __dict__, where the properties would hide it.
        ours: dict[str, Any] = {name: state[name] for name in ("param_groups", "state") if name in state}
        super().__setstate__({name: value for name, value in state.items() if name not in ours})
        for name, value in ours.items():
            setattr(self, name, value)
        if ours:  # older releases of torch kept some of it in other forms
            self._step.base.shared(self._step.parameters).__setstate__(ours)
