"""What FusedSAM asks of the other processes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam import ops
from fused_sam.ops import lists

if TYPE_CHECKING:
    from fused_sam.backends.interface import TensorList
    from fused_sam.optimizer import FusedSAM


class Peers:
    """The points of a step at which ranks may have to do something together. Here they do nothing.

    They are called on all ranks in the same order, and none of them waits for the device where a subclass does not say
    so.
    """

    def adopt(self, params: list[Tensor]) -> Peers:
        """Parameters have come to the optimizer: the peers to go on with."""
        return self

    def require_supported(self, optimizer: FusedSAM) -> None:
        """Refuse options that do not go with them.

        Raises:
            ValueError: naming the option.
        """

    def copied(self) -> Peers:
        """The peers of a copy of the optimizer, which steps another model."""
        return self

    def local(self, tensors: TensorList) -> TensorList:
        """What this rank has of each tensor."""
        return tensors

    def place_grads(self, optimizer: FusedSAM) -> None:
        """p.grad = itself, laid out over the ranks as p is."""

    def average_first(self, optimizer: FusedSAM) -> None:
        """p.grad = its mean over those ranks that share one e. Before the norm."""

    def norm(self, ascent: ops.Ascent, params: list[Tensor]) -> Tensor | None:
        """`ops.Ascent.norm`, over what all ranks have of the parameters."""
        return ascent.norm()

    def average_second(self, optimizer: FusedSAM) -> None:
        """p.grad = its mean over all ranks, unless it is that already. At w + e, before the base step."""

    def any_overflow(self, found_inf: Tensor | None, optimizer: FusedSAM) -> Tensor | None:
        """The flag of a GradScaler, nonzero if it is on any rank."""
        return found_inf

    def grad_norm(self, optimizer: FusedSAM) -> Tensor:
        """||g||_2 over the second gradients, fp64, shape [].

        Raises:
            InvalidTensor: as `ops.norm`.
        """
        params = optimizer._flat_params()
        grads = lists.get_grads(params)
        groups = [ops.AscentGroup(len(params), 0.0, False)]
        norm: Any = self.norm(ops.Ascent(self.local(params), self.local(grads), groups, optimizer.backend), params)
        return norm

    def base_step(
        self, optimizer: FusedSAM, journal: ops.Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Back to w as the journal says, and the step of the base optimizer."""
        optimizer._base.step(optimizer, journal, grad_scale, found_inf)

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        """While several second gradients are summed: a context in which none is averaged, if that can wait."""
        return contextlib.nullcontext()

    def after_step(self, optimizer: FusedSAM) -> None:
        """A step has been made, and the weights are at w."""

    def cleared(self) -> None:
        """The gradients have been thrown away."""

    def reset(self) -> None:
        """Forget what was begun in a step that has ended, whichever way."""

    def loaded(self, optimizer: FusedSAM) -> None:
        """The optimizer has loaded a checkpoint."""

    def require_whole_state(self, what: str) -> None:
        """Refuse what cannot be done with the state that one rank has.

        Raises:
            RuntimeError: saying what to do instead.
        """


def gathered(norm: Tensor, group: dist.ProcessGroup, q: float) -> Tensor:
    """The joint norm of the ranks of a group, in one order on all of them: no power overflows."""
    norms = [torch.empty_like(norm) for _ in range(dist.get_world_size(group))]
    dist.all_gather(norms, norm.contiguous(), group=group)
    return ops.joint_norm(norms, q)


def any_of(flag: Tensor | None, device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """The largest of the ranks' flags, fp32 of shape []; None counts as 0."""
    largest = torch.zeros((), device=device)
    if flag is not None:
        largest.copy_(flag.detach().reshape(()))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest
