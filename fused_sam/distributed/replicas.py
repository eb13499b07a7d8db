"""Ranks that all have the whole model, each with examples of its own."""

from __future__ import annotations

import contextlib

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fused_sam.distributed import agreement
from fused_sam.distributed.backward_hooks import BackwardHooks
from fused_sam.distributed.buckets import Layout, Mean
from fused_sam.dtensor import is_sharded
from fused_sam.parameters import Parameters
from fused_sam.peers import Peers, SingleProcess, any_of


class Replicas(Peers):
    """Data parallel ranks: they average the second gradients over all, the first over those that share a perturbation.

    Args:
        names: of the parameters of the optimizer.
        group: all ranks.
        scope: those whose first gradients are averaged by us; None if theirs are not.
        cap_bytes: size of a bucket.
        check_every: compare the weights of all ranks after every so many steps; 0 for never.
        averager: what averages the second gradients.
    """

    def __init__(
        self,
        names: dict[Tensor, str],
        group: dist.ProcessGroup,
        scope: dist.ProcessGroup | None,
        cap_bytes: float,
        check_every: int,
        averager: BackwardHooks | DistributedDataParallel,
    ) -> None:
        self._names = names
        self._group = group
        self._scope = scope
        self._layout = Layout(cap_bytes)
        self._averager = averager
        self._check_every = check_every
        self._steps = 0

    def add_parameters(self, params: list[Tensor]) -> None:
        if any(map(is_sharded, params)):
            raise ValueError("Invalid parameters: DTensors. Must be whole on every rank after data_parallel().")
        named = {p: f"{len(self._names) + i} of the optimizer" for i, p in enumerate(params)}
        if isinstance(self._averager, DistributedDataParallel):
            require_members(named, self._averager)
        agreement.require_same(agreement.entries((name, p) for p, name in named.items()), "parameters", self._group)
        if isinstance(self._averager, BackwardHooks):
            agreement.broadcast(params, self._group)
            self._averager.watch(params)
        self._names.update(named)

    def copied(self) -> Peers:
        return SingleProcess()

    def average_first(self, parameters: Parameters) -> None:
        if self._scope is not None:
            Mean(self._layout.of(parameters.tensors()), self._scope).finish()

    def average_second(self, parameters: Parameters) -> None:
        if isinstance(self._averager, BackwardHooks) and self._averager.pending:
            self._averager.finish()

    def any_overflow(self, found_inf: Tensor | None, parameters: Parameters) -> Tensor | None:
        return any_of(found_inf, parameters.tensors()[0].device, self._group)

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        # A DistributedDataParallel can only average what a backward has just made.
        return self._averager.skipped() if isinstance(self._averager, BackwardHooks) else contextlib.nullcontext()

    def finish(self, parameters: Parameters) -> None:
        self._steps += 1
        if not self._check_every or self._steps % self._check_every:
            return
        params = list(self._names)
        if places := agreement.differing(params, self._group):
            raise RuntimeError(
                f"Replicas differ after step {self._steps}: parameter {self._names[params[places[0]]]} and "
                f"{len(places) - 1} others. Gradients were not averaged, or weights or state were not equal before."
            )

    def cleared(self) -> None:
        if isinstance(self._averager, BackwardHooks):
            self._averager.abandon()

    def reset(self) -> None:
        if isinstance(self._averager, BackwardHooks):
            self._averager.reset()


def require_members(names: dict[Tensor, str], ddp: DistributedDataParallel) -> None:
    """Refuse parameters whose gradients the model does not average.

    Raises:
        ValueError: naming the first.
    """
    members = set(ddp.parameters())
    for p, name in names.items():
        if p.requires_grad and p not in members:
            raise ValueError(
                f"Invalid parameter {name} (shape {list(p.shape)}). Must belong to the DistributedDataParallel, which "
                "averages no others."
            )
