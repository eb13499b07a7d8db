"""Ways from w to w + e."""

from __future__ import annotations

from typing import Protocol

from torch.optim import SGD, Optimizer

from fused_sam.ascent.displacement import Displacement
from fused_sam.ascent.gradient import AlongGradient
from fused_sam.ascent.momentum import AlongMomentum
from fused_sam.options import NO_MOMENTUM, Options, refuse
from fused_sam.parameters import Parameters
from fused_sam.peers import Peers

__all__ = ["Displacement", "Perturbation", "make_perturbation"]


class Perturbation(Protocol):
    """A way to w + e, in ``ascents`` steps."""

    ascents: int

    @property
    def takes_gradient(self) -> bool:
        """Return whether it follows a gradient at w, which ranks may have to average before."""

    def displace(self, parameters: Parameters, displacement: Displacement, peers: Peers, take_grads: bool) -> None:
        """Make one step of the ascent, and say in ``displacement`` what was done.

        What has moved the weights is in its journal; ``ascents`` counts the steps that are complete.
        """


def make_perturbation(options: Options, base: Optimizer) -> Perturbation:
    """Return the way that the options ask for.

    Raises:
        ValueError: for a base optimizer that does not go with it.
    """
    if isinstance(base, SGD) and not any(group["momentum"] for group in base.param_groups):
        refuse(options, NO_MOMENTUM)
    return AlongMomentum(options) if options.direction == "momentum" else AlongGradient(options)
