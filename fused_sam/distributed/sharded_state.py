"""Ranks that all have the whole model, and each a part of the base optimizer's state: ZeRO stage 1.

    Rajbhandari et al. 2020, section 5: a rank gets its share of the mean of the gradients (reduce-scatter), updates its
    share of the weights with its share of the state, and sends it to all (all-gather).

A share is a slice of a flat bucket, not a number of whole parameters: every rank has as many elements of each bucket,
however unlike the layers are, and the collectives need no padding to the largest. For a base step that goes element by
element the slices are tensors like any others.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam import ops
from fused_sam.backends.memory import is_dense
from fused_sam.distributed import state_slices
from fused_sam.distributed.collectives import all_gather
from fused_sam.distributed.overlap import Overlap
from fused_sam.distributed.peers import Peers, gathered
from fused_sam.distributed.replicas import Replicas
from fused_sam.distributed.slices import Piece, SlicedBucket, SlicedLayout

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM

Staged = list[tuple[SlicedBucket, Tensor]]


class ShardedState(Replicas):
    """Data parallel ranks of which each updates a share of the weights. Beside what `Replicas` takes, ``layout`` says
    which."""

    def __init__(
        self,
        names: dict[Tensor, str],
        group: dist.ProcessGroup,
        scope: dist.ProcessGroup | None,
        cap_bytes: float,
        check_every: int,
        averager: Overlap,
        layout: SlicedLayout,
    ) -> None:
        super().__init__(names, group, scope, cap_bytes, check_every, averager)
        self._slices = layout
        self._whole = False  # while the state is put together

    def adopt(self, params: list[Tensor]) -> Peers:
        for i, p in enumerate(params):
            require_dense(p, f"{len(self._names) + i} of the optimizer")
        super().adopt(params)
        self._slices.add(params)
        return self

    def require_supported(self, optimizer: FusedSAM) -> None:
        require_sliceable(optimizer, self._names)

    def grad_norm(self, optimizer: FusedSAM) -> Tensor:
        """Of all shares: one fp64 number from each rank."""
        grads = [g for g in map(_grad, self._slices.pieces(self._slices.rank).values()) if g is not None]
        norm = ops.norm(grads, grads, [ops.AscentGroup(len(grads), 0.0, False)], optimizer.backend)
        return gathered(norm.to(optimizer._flat_params()[0].device), self._group, 2.0)

    def base_step(
        self, optimizer: FusedSAM, journal: ops.Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Update copies of this rank's share of weights and state, and take them over once all ranks have sent theirs.

        What fails before that, a lost rank included, leaves the weights at w and the state as it was.
        """
        ops.restore_weights(journal)
        staged: Staged = []
        for bucket in self._slices.trained:
            size = bucket.share * bucket.ranks
            staged.append((bucket, torch.empty(size, dtype=bucket.weight_dtype, device=bucket.device)))
        own: Any = Share(optimizer, staged, self._slices.rank)
        optimizer._base.step(own, [], grad_scale, found_inf)
        works = [all_gather(flat, b.part(flat, self._slices.rank), self._group) for b, flat in staged]
        for work in works:
            work.wait()
        try:
            _take_over(optimizer, staged, own)
        except BaseException:
            # An interrupt. The other ranks make this step, and to do it twice does no harm.
            _take_over(optimizer, staged, own)
            raise
        finally:
            journal.clear()

    def loaded(self, optimizer: FusedSAM) -> None:
        state_slices.cut(optimizer.state, self._slices)

    def require_whole_state(self, what: str) -> None:
        if not self._whole:
            raise RuntimeError(
                f"{what} with shard_state=True: this rank has a part of the state. Call, on all ranks, "
                "consolidate_state_dict() of the handle that data_parallel() returned, or its remove()."
            )

    def consolidate(self, optimizer: FusedSAM, to: int | None) -> dict[str, Any] | None:
        """`FusedSAM.state_dict` with the state of all ranks, on the CPU of rank ``to``, or of all."""
        if to is not None and to not in range(self._slices.ranks):
            raise ValueError(f"Invalid {to=}. Must be a rank of the process group, or None.")
        optimizer._require_unperturbed("consolidate_state_dict()")
        whole = state_slices.whole(optimizer.state, self._slices, to)
        if whole is None:
            return None
        parts, optimizer.state = optimizer.state, whole
        self._whole = True
        try:
            return optimizer.state_dict()
        finally:
            optimizer.state, self._whole = parts, False

    def make_whole(self, optimizer: FusedSAM) -> None:
        """The state of all ranks into that of the optimizer, on all of them."""
        optimizer._require_unperturbed("remove()")
        whole: dict[Tensor, Any] = state_slices.whole(optimizer.state, self._slices, None) or {}
        for group in optimizer.param_groups:
            for p in (p for p in group["params"] if p in whole):
                step_device = p.device if group.get("fused") else torch.device("cpu")  # as torch.optim.Adam has it
                optimizer.state[p] = {
                    key: x.to(step_device if key == state_slices.STEP else p.device) if isinstance(x, Tensor) else x
                    for key, x in whole[p].items()
                }


class Share:
    """What the base step sees of an optimizer: one tensor for each piece of a parameter that is this rank's to update.

    They are copies, as are their entries of state.
    """

    def __init__(self, optimizer: FusedSAM, staged: Staged, rank: int) -> None:
        self.backend = optimizer.backend
        self._masters = None
        self._peers = Peers()
        self._parameter: dict[Tensor, Tensor] = {}  # of which each tensor is a piece
        parts: dict[Tensor, Tensor] = {}
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for bucket, flat in staged:
            for piece in bucket.pieces(rank):
                part = piece.in_flat(flat).copy_(piece.of(piece.param))
                grad = _grad(piece)
                if grad is not None and grad.dtype != part.dtype:
                    part.grad_dtype = grad.dtype
                part.grad = grad
                parts[piece.param], self._parameter[part] = part, piece.param
                if entries := optimizer.state.get(piece.param):
                    self.state[part] = {k: x.clone() if isinstance(x, Tensor) else x for k, x in entries.items()}
        self.param_groups = [
            {**group, "params": [parts[p] for p in group["params"] if p in parts]} for group in optimizer.param_groups
        ]

    def _flat_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_by_parameter(self) -> dict[Tensor, dict[str, Any]]:
        """The entries there are, as the optimizer keeps them."""
        return {self._parameter[part]: entries for part, entries in self.state.items() if entries}


def _take_over(optimizer: FusedSAM, staged: Staged, own: Share) -> None:
    """The weights of all ranks, and this rank's part of the state."""
    params = [p for bucket, _ in staged for p in bucket.params]
    if params:
        torch._foreach_copy_(params, [view for bucket, flat in staged for view in bucket.views(flat)])
    optimizer.state.update(own.state_by_parameter())


def _grad(piece: Piece) -> Tensor | None:
    """What of the mean is there; a parameter that is frozen has none."""
    p = piece.param
    return piece.of(p.grad) if p.requires_grad and p.grad is not None else None


def require_sliceable(optimizer: FusedSAM, names: dict[Tensor, str]) -> None:
    """Refuse options that need more of the state than a rank has.

    Raises:
        ValueError: naming the option, or the parameter.
    """
    base = getattr(optimizer._base, "inner", None)
    for option, asked, reason in (
        ("direction='momentum'", optimizer.direction == "momentum", "e follows the momentum of all parameters"),
        ("reuse", optimizer.reuse is not None, "what is reused is added to the gradients of all parameters"),
        ("master_weights=True", optimizer._masters is not None, "w + e is made of the masters of all parameters"),
        ("telemetry=True", optimizer.telemetry, "it looks at whole gradients"),
        ("capturable=True", optimizer.capturable, "a step works on memory of its own"),
        (
            f"base_optimizer={type(base).__name__}",
            type(optimizer._base) not in state_slices.ELEMENTWISE,
            "only SGD, Adam and AdamW are known to go element by element",
        ),
    ):
        if asked:
            raise ValueError(
                f"Invalid {option} with shard_state=True. Each rank has a part of the state, and {reason}."
            )
    for p, name in names.items():
        require_dense(p, name)


def require_dense(p: Tensor, name: str) -> None:
    """Refuse a parameter that has no elements ``start`` to ``stop`` in memory."""
    if p.layout != torch.strided or not is_dense(p):
        raise ValueError(f"Invalid parameter {name} (shape {list(p.shape)}) with shard_state=True. Must have no gaps.")
