"""What follows at w + e: what changes the gradients, and base steps at w."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fused_sam.backends.interface import Journal
from fused_sam.descent.adam import FusedAdam
from fused_sam.descent.inner import Maker, make_inner
from fused_sam.descent.sgd import FusedSGD
from fused_sam.descent.unfused import AnyBase
from fused_sam.parameters import Parameters

__all__ = ["AnyBase", "Base", "FusedAdam", "FusedSGD", "Maker", "make_base", "make_inner"]


class Base(Protocol):
    """The base step of SAM: what is done at w with the gradient taken at w + e."""

    @property
    def inner(self) -> Optimizer:
        """Return the base optimizer itself."""

    @property
    def elementwise(self) -> bool:
        """Return whether it goes element by element, so that ranks may each update a slice."""

    def is_decoupled(self, group: dict[str, Any]) -> bool:
        """Return whether the weight decay of a group is no part of the gradient, as in AdamW."""

    def shared(self, parameters: Parameters) -> Optimizer:
        """Return the base optimizer, on the groups and the state that there are now."""

    def add_param_group(self, parameters: Parameters, group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, and so to the parameters."""

    def exposed(
        self,
        parameters: Parameters,
        plain_step: Callable[[], Any],
        load_state_dict: Callable[[dict[str, Any]], Any],
        add_param_group: Callable[[dict[str, Any]], Any],
    ) -> Optimizer:
        """Return the base optimizer for users, who may step it, load into it or add to it: by the methods given."""

    @property
    def has_format(self) -> bool:
        """Return whether checkpoints are in a format of the base's own, which it both writes and reads."""

    def state_dict(self, parameters: Parameters) -> dict[str, Any] | None:
        """Return the base's checkpoint in a format of its own; None where it is torch's."""

    def require_loadable(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that the base would misread.

        Raises:
            ValueError: nothing has been changed then.
        """

    def load(self, parameters: Parameters, state_dict: dict[str, Any]) -> None:
        """Take in a checkpoint where the class of the base has a way of its own."""

    def update(
        self, parameters: Parameters, journal: Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Bring the weights back to w as the journal says, and update them; clear the journal when that is done.

        Gradients are divided by ``grad_scale``, and with a nonzero ``found_inf`` the weights are only restored.
        """


def make_base(inner: Optimizer) -> Base:
    """Return the fused counterpart of an optimizer where there is one. Subclasses may step in ways of their own."""
    fused: dict[type[Optimizer], type[AnyBase]] = {SGD: FusedSGD, Adam: FusedAdam, AdamW: FusedAdam}
    return fused.get(type(inner), AnyBase)(inner)
