"""The way to w + e along the momentum of the base optimizer: MSAM (Becker et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.ascent.displacement import Displacement
from fused_sam.backends.interface import TensorList, can_mix
from fused_sam.ops.lists import clear_grads
from fused_sam.options import Options
from fused_sam.parameters import Parameters
from fused_sam.peers import Peers
from fused_sam.report import Probe

KEYS = ("momentum_buffer", "exp_avg")


class AlongMomentum:
    """e = -rho T^2 m / ||T m||_2 with the momentum m of the base optimizer.

    That is where the momentum is about to take the weights, and no gradient is needed to know it: a step takes one
    gradient, at w + e. Parameters that have no momentum yet stay at w.
    """

    ascents = 1
    takes_gradient = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def displace(self, parameters: Parameters, displacement: Displacement, peers: Peers, take_grads: bool) -> None:
        """Go to w + e; ``take_grads`` sets the gradients to None."""
        tensors = parameters.tensors()
        momenta = self._momenta(parameters, tensors)
        parameters.blank_unperturbed(momenta)
        groups = [group._replace(rho=-group.distance, decay=0.0) for group in parameters.perturbed_groups()]
        masters = None if parameters.masters is None else parameters.masters_of(tensors, momenta)
        weights, along, copies = parameters.on_this_rank(tensors, momenta, masters)
        ascent = ops.Ascent(weights, along, groups, parameters.backend, self.options.p, copies)
        norm = peers.norm(ascent, tensors)
        assert norm is not None
        displacement.norms.append(norm)
        displacement.of_gradients = False
        if self.options.telemetry:
            displacement.probe = Probe(tensors, momenta)
        if take_grads:
            clear_grads(tensors)
        ascent.perturb(norm, displacement.journal)
        parameters.enter_masters(tensors, masters)
        if displacement.probe is not None:
            displacement.probe.measure_radius()
        displacement.ascents = 1

    def _momenta(self, parameters: Parameters, tensors: list[Tensor]) -> TensorList:
        for key in KEYS:
            found = parameters.entries(tensors, key)
            if any(m is not None for m in found):
                return [m if m is None or m.dtype == p.dtype else _mixable(m, p) for m, p in zip(found, tensors)]
        if any(entry for entry in parameters.state.values() if isinstance(entry, dict)):
            raise RuntimeError(f"direction='momentum' needs a base optimizer that keeps one of {list(KEYS)}.")
        return [None] * len(tensors)


def _mixable(momentum: Tensor, p: Tensor) -> Tensor:
    """Return the momentum in a dtype that goes with the parameter's: it keeps its own where a model gets another."""
    if can_mix(p.dtype, momentum.dtype):
        return momentum
    return momentum.double() if p.dtype == torch.float64 else momentum.float()
