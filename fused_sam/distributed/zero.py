"""Ranks that all have the whole model, and each a part of the base optimizer's state: ZeRO stage 1.

    Rajbhandari et al. 2020, section 5: a rank gets its share of the mean of the gradients (reduce-scatter), updates its
    share of the weights with its share of the state, and sends it to all (all-gather).

A share is a slice of a flat bucket, not a number of whole parameters: every rank has as many elements of each bucket,
however unlike the layers are, and the collectives need no padding to the largest. For a base step that goes element by
element the slices are tensors like any others.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam import ops
from fused_sam.backends.interface import AscentGroup, Journal
from fused_sam.backends.memory import is_dense
from fused_sam.distributed import state_slices
from fused_sam.distributed.backward_hooks import BackwardHooks
from fused_sam.distributed.ranks import all_gather
from fused_sam.distributed.replicas import Replicas
from fused_sam.distributed.slices import Piece, SlicedBucket, SlicedLayout
from fused_sam.options import SHARDED_STATE, Options, refuse
from fused_sam.parameters import Parameters
from fused_sam.peers import gathered

Staged = list[tuple[SlicedBucket, Tensor]]


class ShardedState(Replicas):
    """Data parallel ranks that each update the share of the weights that ``layout`` says. Otherwise as `Replicas`."""

    def __init__(
        self,
        names: dict[Tensor, str],
        group: dist.ProcessGroup,
        scope: dist.ProcessGroup | None,
        cap_bytes: float,
        check_every: int,
        averager: BackwardHooks,
        layout: SlicedLayout,
    ) -> None:
        super().__init__(names, group, scope, cap_bytes, check_every, averager)
        self._slices = layout
        self._whole = False  # while the state is put together

    def add_parameters(self, params: list[Tensor]) -> None:
        for i, p in enumerate(params):
            require_dense(p, f"{len(self._names) + i} of the optimizer")
        super().add_parameters(params)
        self._slices.add(params)

    def require_supported(self, options: Options) -> None:
        require_sliceable(options, self._names)

    def grad_norm(self, parameters: Parameters) -> Tensor:
        """Return the norm over all shares: one fp64 number from each rank."""
        grads = [g for g in map(_grad, self._slices.pieces(self._slices.rank).values()) if g is not None]
        norm: Any = ops.norm(grads, grads, [AscentGroup(len(grads), 0.0, False)], parameters.backend)
        params = parameters.tensors()  # the same on all ranks, as the norm must be
        return gathered(norm.to(params[0].device), self._group, 2.0, ops.holds_fp64(params))

    @contextlib.contextmanager
    def stage(self, parameters: Parameters, journal: Journal) -> Iterator[tuple[Parameters, Journal]]:
        """Yield copies of this rank's share of weights and state, and take them over once all ranks have sent theirs.

        What fails before that, a lost rank included, leaves the weights at w and the state as it was.
        """
        ops.restore_weights(journal)
        staged: Staged = []
        for bucket in self._slices.trained:
            size = bucket.share * bucket.ranks
            staged.append((bucket, torch.empty(size, dtype=bucket.weight_dtype, device=bucket.device)))
        share, whose = _share(parameters, staged, self._slices.rank)
        yield share, []
        works = [all_gather(flat, b.part(flat, self._slices.rank), self._group) for b, flat in staged]
        for work in works:
            work.wait()
        try:
            _take_over(parameters, staged, share, whose)
        except BaseException:
            # An interrupt. The other ranks make this step, and to do it twice does no harm.
            _take_over(parameters, staged, share, whose)
            raise
        finally:
            journal.clear()

    def loaded(self, parameters: Parameters) -> None:
        state_slices.cut(parameters.state, self._slices)

    def require_whole_state(self, what: str) -> None:
        if not self._whole:
            raise RuntimeError(
                f"{what} with shard_state=True: this rank has a part of the state. Call, on all ranks, "
                "consolidate_state_dict() of the handle that data_parallel() returned, or its remove()."
            )

    def consolidate(
        self, parameters: Parameters, state_dict: Callable[[], dict[str, Any]], to: int | None
    ) -> dict[str, Any] | None:
        """Return ``state_dict()`` with the state of all ranks, on the CPU of rank ``to``, or of all."""
        if to is not None and to not in range(self._slices.ranks):
            raise ValueError(f"Invalid {to=}. Must be a rank of the process group, or None.")
        whole = state_slices.whole(parameters.state, self._slices, to)
        if whole is None:
            return None
        parts, parameters.state = parameters.state, whole
        self._whole = True
        try:
            return state_dict()
        finally:
            parameters.state, self._whole = parts, False

    def make_whole(self, parameters: Parameters) -> None:
        """Write the state of all ranks into that of the optimizer, on all of them."""
        whole: dict[Tensor, Any] = state_slices.whole(parameters.state, self._slices, None) or {}
        for group in parameters.groups:
            for p in (p for p in group["params"] if p in whole):
                step_device = p.device if group.get("fused") else torch.device("cpu")  # as torch.optim.Adam has it
                parameters.state[p] = {
                    key: x.to(step_device if key == state_slices.STEP else p.device) if isinstance(x, Tensor) else x
                    for key, x in whole[p].items()
                }


def _share(parameters: Parameters, staged: Staged, rank: int) -> tuple[Parameters, dict[Tensor, Tensor]]:
    """Return what a rank updates: one tensor for each piece of a parameter, and of which parameter each is a piece.

    They are copies, as are their entries of state.
    """
    whose: dict[Tensor, Tensor] = {}
    parts: dict[Tensor, Tensor] = {}
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for bucket, flat in staged:
        for piece in bucket.pieces(rank):
            part = piece.in_flat(flat).copy_(piece.of(piece.param))
            grad = _grad(piece)
            if grad is not None and grad.dtype != part.dtype:
                part.grad_dtype = grad.dtype
            part.grad = grad
            parts[piece.param], whose[part] = part, piece.param
            if entries := parameters.state.get(piece.param):
                state[part] = {k: x.clone() if isinstance(x, Tensor) else x for k, x in entries.items()}
    groups = [{**group, "params": [parts[p] for p in group["params"] if p in parts]} for group in parameters.groups]
    return Parameters(groups, state, parameters.backend), whose


def _take_over(parameters: Parameters, staged: Staged, share: Parameters, whose: dict[Tensor, Tensor]) -> None:
    """Write the weights of all ranks, and this rank's part of the state."""
    params = [p for bucket, _ in staged for p in bucket.params]
    if params:
        torch._foreach_copy_(params, [view for bucket, flat in staged for view in bucket.views(flat)])
    parameters.state.update({whose[part]: entries for part, entries in share.state.items() if entries})


def _grad(piece: Piece) -> Tensor | None:
    """Return what of the mean is there; a parameter that is frozen has none."""
    p = piece.param
    return piece.of(p.grad) if p.requires_grad and p.grad is not None else None


def require_sliceable(options: Options, names: dict[Tensor, str]) -> None:
    """Refuse options that need more of the state than a rank has.

    Raises:
        ValueError: naming the option, or the parameter.
    """
    refuse(options, SHARDED_STATE)
    for p, name in names.items():
        require_dense(p, name)


def require_dense(p: Tensor, name: str) -> None:
    """Refuse a parameter that has no elements ``start`` to ``stop`` in memory."""
    if p.layout != torch.strided or not is_dense(p):
        raise ValueError(f"Invalid parameter {name} (shape {list(p.shape)}) with shard_state=True. Must have no gaps.")
