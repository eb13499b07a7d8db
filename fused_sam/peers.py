"""What a step asks of the other processes."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam import ops
from fused_sam.backends.interface import AscentGroup, Journal
from fused_sam.options import Options
from fused_sam.parameters import Parameters


class Peers:
    """The points of a step at which ranks may have to do something together. Here they do nothing.

    They are called on all ranks in the same order, and none of them waits for the device where a subclass does not say
    so. Nothing here runs the base step.
    """

    def add_parameters(self, params: list[Tensor]) -> None:
        """Take in parameters that have come to the optimizer."""

    def require_supported(self, options: Options) -> None:
        """Refuse options that do not go with these peers.

        Raises:
            ValueError: naming the option.
        """

    def copied(self) -> Peers:
        """Return the peers of a copy of the optimizer, which steps another model."""
        return self

    def place_grads(self, parameters: Parameters) -> None:
        """Lay out p.grad over the ranks as p is."""

    def average_first(self, parameters: Parameters) -> None:
        """Write to p.grad its mean over the ranks that share one perturbation. Before the norm."""

    def norm(self, ascent: ops.Ascent, tensors: list[Tensor]) -> Tensor | None:
        """Return `ops.Ascent.norm`, over what all ranks have of the parameters."""
        return ascent.norm()

    def average_second(self, parameters: Parameters) -> None:
        """Write to p.grad its mean over all ranks, unless it is that already. At w + e, before the base step."""

    def any_overflow(self, found_inf: Tensor | None, parameters: Parameters) -> Tensor | None:
        """Return the flag of a GradScaler, nonzero if it is on any rank."""
        return found_inf

    def grad_norm(self, parameters: Parameters) -> Tensor:
        """Return ||g||_2 over the second gradients, fp64, shape [].

        Raises:
            InvalidTensor: as `ops.norm`.
        """
        tensors, local = parameters.tensors(), parameters.local
        grads, groups = parameters.gradients(tensors), [AscentGroup(len(tensors), 0.0, False)]
        norm: Any = self.norm(ops.Ascent(local(tensors), local(grads), groups, parameters.backend), tensors)
        return norm

    def stage(
        self, parameters: Parameters, journal: Journal
    ) -> contextlib.AbstractContextManager[tuple[Parameters, Journal]]:
        """Return a context of what this rank updates, and of the journal of its weights."""
        return contextlib.nullcontext((parameters, journal))

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which no second gradient is averaged, if that can wait: several are summed."""
        return contextlib.nullcontext()

    def finish(self, parameters: Parameters) -> None:
        """Do what is due after a step has been made, with the weights at w."""

    def cleared(self) -> None:
        """Forget what was begun with gradients that have been thrown away."""

    def reset(self) -> None:
        """Forget what was begun in a step that has ended, whichever way."""

    def loaded(self, parameters: Parameters) -> None:
        """Take in a checkpoint that the optimizer has loaded."""

    def require_whole_state(self, what: str) -> None:
        """Refuse what cannot be done with the state that one rank has.

        Raises:
            RuntimeError: saying what to do instead.
        """


class SingleProcess(Peers):
    """A single process. Warns at the first perturbed step if torch.distributed has several ranks."""

    def __init__(self) -> None:
        self._warned = False

    def add_parameters(self, params: list[Tensor]) -> None:
        if any(getattr(p, "_fsdp_flattened", False) for p in params):
            raise ValueError(
                "Invalid parameters of a FullyShardedDataParallel: a rank has a part of them and would take its norm. "
                "Must be sharded by torch.distributed.fsdp.fully_shard, which needs no further call."
            )
        if dist.is_available() and dist.is_initialized() and _is_within("ZeroRedundancyOptimizer"):
            raise ValueError(
                "Invalid optimizer_class=FusedSAM of ZeroRedundancyOptimizer: each rank would take the norm of its own "
                "parameters. Must be FusedSAM with distributed.data_parallel(..., shard_state=True)."
            )

    def copied(self) -> Peers:
        return SingleProcess()

    def average_first(self, parameters: Parameters) -> None:
        if self._warned:
            return
        self._warned = True
        if dist.is_available() and dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            logging.getLogger("fused_sam").warning(
                "There are %d ranks, and fused_sam.distributed.data_parallel(model, optimizer) has not been called: "
                "under DistributedDataParallel both gradients are averaged, so that all ranks share one perturbation; "
                "without it nothing is averaged.",
                ranks,
            )


def _is_within(name: str) -> bool:
    """Return whether a method of an object whose class has the name has led here."""
    frame = sys._getframe()
    while frame is not None:
        if name in (c.__name__ for c in type(frame.f_locals.get("self")).__mro__):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def gathered(norm: Tensor, group: dist.ProcessGroup, q: float, far: bool) -> Tensor:
    """Return the joint norm of the ranks of a group, in one order on all of them: no power overflows."""
    norms = [torch.empty_like(norm) for _ in range(dist.get_world_size(group))]
    dist.all_gather(norms, norm.contiguous(), group=group)
    return ops.joint_norm(norms, q, far)


def any_of(flag: Tensor | None, device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """Return the largest of the ranks' flags, fp32 of shape []; None counts as 0."""
    largest = torch.zeros((), device=device)
    if flag is not None:
        largest.copy_(flag.detach().reshape(()))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest
