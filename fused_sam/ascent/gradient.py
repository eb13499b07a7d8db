"""The way to w + e along the gradient at w: SAM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sam import ops
from fused_sam.ascent import projected
from fused_sam.ascent.displacement import Displacement
from fused_sam.backends.interface import AscentGroup, TensorList
from fused_sam.mistakes import first_of
from fused_sam.ops.lists import clear_grads
from fused_sam.options import Options
from fused_sam.parameters import Parameters
from fused_sam.peers import Peers
from fused_sam.report import Probe


class AlongGradient:
    """e from the gradients in ``p.grad``: in ``ascents`` steps (`fused_sam.ascent.projected`), each with its own."""

    takes_gradient = True

    def __init__(self, options: Options) -> None:
        self.ascents = int(options.ascent_steps)
        self.options = options

    def displace(self, parameters: Parameters, displacement: Displacement, peers: Peers, take_grads: bool) -> None:
        """Make one step of the ascent; with ``take_grads`` the gradients become None, and their memory may hold w."""
        tensors = parameters.tensors()
        grads = parameters.gradients(tensors)
        displacement.first = displacement.first or first_of(tensors, grads, left=not take_grads)
        unperturbed = parameters.blank_unperturbed(grads)
        groups = parameters.perturbed_groups()
        masters = None if parameters.masters is None else parameters.masters_of(tensors, grads)
        if displacement.ascents:
            self._go_on(parameters, displacement, tensors, grads, groups, masters, take_grads)
            return
        options = self.options
        weights, slopes, copies = parameters.on_this_rank(tensors, grads, masters)
        ascent = ops.Ascent(weights, slopes, groups, parameters.backend, options.p, copies)
        norm = peers.norm(ascent, tensors)
        if norm is not None:
            displacement.norms.append(norm)
        if options.telemetry or options.looksam_alpha is not None or self.ascents > 1:
            self._keep(displacement, tensors, grads, masters)
        try:
            if take_grads:
                clear_grads(tensors)
            ascent.perturb(norm, displacement.journal, displacement.backups, owned=take_grads)
            if masters is not None:
                parameters.enter_masters(tensors, masters)
            if displacement.probe is not None:
                displacement.probe.measure_radius(final=self.ascents == 1)
            displacement.ascents = 1
        except BaseException:
            if not displacement.journal:  # else the gradients' memory has held w
                for i, p in enumerate(tensors):
                    p.grad = unperturbed.get(i, grads[i])
            raise

    def _keep(
        self, displacement: Displacement, tensors: list[Tensor], grads: TensorList, masters: TensorList | None
    ) -> None:
        """Keep what later passes need: copies of w and of the gradients, memory for w that can be read."""
        if self.options.telemetry:
            displacement.probe = Probe(tensors, grads)
        if self.options.looksam_alpha is not None:
            displacement.grads = [None if g is None else g.detach().clone() for g in grads]
        if self.ascents > 1:
            displacement.backups = [
                None if g is None or m is not None else torch.empty_like(p)
                for p, g, m in zip(tensors, grads, masters or [None] * len(tensors))
            ]

    def _go_on(
        self,
        parameters: Parameters,
        displacement: Displacement,
        tensors: list[Tensor],
        grads: TensorList,
        groups: list[AscentGroup],
        masters: TensorList | None,
        take_grads: bool,
    ) -> None:
        """Make a step after the first."""
        backups: Any = displacement.backups
        backend, p = parameters.backend, self.options.p
        norm = projected.advance(tensors, grads, backups, masters, groups, backend, p, displacement.journal)
        parameters.enter_masters(tensors, masters)
        if norm is not None:
            displacement.norms.append(norm)
        displacement.ascents += 1
        if displacement.probe is not None:
            displacement.probe.measure_radius(final=displacement.ascents == self.ascents)
        if take_grads:
            clear_grads(tensors)
