"""One call at set-up that tells FusedSAM of the other ranks."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_sam.distributed import agreement, ranks
from fused_sam.distributed.backward_hooks import BackwardHooks
from fused_sam.distributed.buckets import AllReduce, cap_in_bytes
from fused_sam.distributed.ddp import LocalFirstPass
from fused_sam.distributed.replicas import Replicas, require_members
from fused_sam.distributed.slices import ReduceScatter, SlicedLayout
from fused_sam.distributed.zero import ShardedState, require_sliceable
from fused_sam.optimizer import FusedSAM
from fused_sam.options import DATA_PARALLEL, NOT_WORLD, refuse
from fused_sam.peers import SingleProcess
from fused_sam.step import Step


class DataParallel:
    """Handle of `data_parallel`; ``remove()`` undoes it."""

    def __init__(
        self,
        step: Step,
        state_dict: Callable[[], dict[str, Any]],
        averager: BackwardHooks | DistributedDataParallel,
        local_first: LocalFirstPass | None,
    ) -> None:
        self._step = step
        self._state_dict = state_dict
        self._averager = averager
        self._local_first = local_first

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Keep backwards inside the block from communicating: around all backwards of a pass but the last."""
        return self._averager.skipped() if isinstance(self._averager, BackwardHooks) else self._averager.no_sync()

    def consolidate_state_dict(self, to: int | None = 0) -> dict[str, Any] | None:
        """Return the optimizer's ``state_dict()`` as without ``shard_state``: any number of ranks can load it.

        To be called on all ranks; the state goes through their CPUs.

        Args:
            to: rank of the process group that gets it, the others get None; None: all get it.

        Raises:
            ValueError: if there is no such rank.
            RuntimeError: while the weights are perturbed, or without ``shard_state``: every rank has it then.
        """
        peers = self._step.peers
        if not isinstance(peers, ShardedState):
            raise RuntimeError("consolidate_state_dict() without shard_state=True. Call the optimizer's state_dict().")
        self._step.require_unperturbed("consolidate_state_dict()")
        return peers.consolidate(self._step.parameters, self._state_dict, to)

    def remove(self) -> None:
        """Take the hooks off; the optimizer is on its own again. With ``shard_state``, to be called on all ranks: each
        gets the whole state.

        Raises:
            RuntimeError: with ``shard_state``, while the weights are perturbed.
        """
        if isinstance(peers := self._step.peers, ShardedState):
            self._step.require_unperturbed("remove()")
            peers.make_whole(self._step.parameters)
        for hooks in (self._averager, self._local_first):
            if isinstance(hooks, BackwardHooks | LocalFirstPass):
                hooks.remove()
        self._step.peers = SingleProcess()


def data_parallel(
    model: nn.Module,
    optimizer: FusedSAM,
    *,
    m_sharpness: str | int = "rank",
    process_group: dist.ProcessGroup | None = None,
    bucket_cap_mb: float = 25.0,
    check_replicas_every: int = 0,
    shard_state: bool = False,
    timeout: timedelta | None = None,
) -> DataParallel:
    r"""Set up m-sharpness over the ranks of a process group (Foret et al. 2021, section 4.1).

    Each group of ranks has a perturbation of its own, made of the mean of its first gradients; the base step takes the
    mean of the second gradients of all R ranks:

    .. math:: g = \frac1R \sum_r \nabla L_r(w + \epsilon_{s(r)}), \qquad
        \epsilon_s = \rho \, \bar g_s / \lVert \bar g_s \rVert_2, \quad
        \bar g_s = \mathrm{mean}_{r \in s} \nabla L_r(w).

    One line at set-up, on all ranks; the closure form, lists of closures and the two-call form then need nothing more::

        optimizer = FusedSAM(model.parameters(), lr=0.1)
        model = DistributedDataParallel(model)
        fused_sam.distributed.data_parallel(model, optimizer)

    A DistributedDataParallel goes on averaging by itself, but in the first pass only if ``m_sharpness="world"``.
    Forwards must go through it, as always. The gradients of any other model are averaged here, in flat buckets that are
    sent while backward runs; its parameters and buffers become those of rank 0. A gradient that is None on some ranks
    counts as zero there. Norm, ``optimizer.last`` and e are those of a rank, or of ranks that share a perturbation; a
    GradScaler's overflow in either pass, on any rank, is one on all.

    Args:
        model: each rank has the whole of it.
        optimizer: the `FusedSAM` of its parameters.
        m_sharpness: which ranks share a perturbation: ``"rank"``, none; k, every k consecutive ones; ``"world"``, all.
        process_group: the ranks; None for all, or for those of the DistributedDataParallel.
        bucket_cap_mb: size in MiB from which on a bucket is full.
        check_replicas_every: compare the weights of all ranks after every so many steps; the host waits then. 0: never.
        shard_state: keep on each rank the R-th part of the base optimizer's state (momentum, averages of Adam) and
            let it update that part of the weights (ZeRO stage 1, Rajbhandari et al. 2020). ``p.grad`` is then the mean
            in this rank's part, and 0 elsewhere; checkpoints come from ``consolidate_state_dict`` of the handle. For
            SGD, Adam and AdamW, and not with a DistributedDataParallel.
        timeout: of the groups made for a number k of ranks; None for that of the backend.

    Raises:
        ValueError: on all ranks, if their parameters differ in number, names, shapes, strides, dtypes or
            ``requires_grad``; for an option out of range; for sharded parameters, or such as the
            DistributedDataParallel does not have; with ``second_order``, or ``looksam_alpha`` and another scope than
            "world".
        RuntimeError: without a process group, while the weights are perturbed, or for the second call;
            in a step, on all ranks, when ``check_replicas_every`` finds them to differ.
    """
    step = optimizer._step
    _require_ready(step)
    if not isinstance(check_replicas_every, numbers.Integral) or check_replicas_every < 0:
        raise ValueError(f"Invalid {check_replicas_every=}. Must be an integer >= 0.")
    if not isinstance(shard_state, bool):
        raise ValueError(f"Invalid {shard_state=}. Must be True or False.")
    cap_bytes = cap_in_bytes(bucket_cap_mb)
    ddp = model if isinstance(model, DistributedDataParallel) else None
    group = _group(ddp, process_group)
    world_size = dist.get_world_size(group)
    size = ranks.ranks_per_perturbation(m_sharpness, world_size)
    if shard_state and ddp is not None:
        raise ValueError(f"Invalid {shard_state=} with a DistributedDataParallel, which averages whole gradients.")
    refuse(step.options, DATA_PARALLEL, *([] if size == world_size else [NOT_WORLD]))
    names = _names(model if ddp is None else ddp.module, step.parameters.tensors())
    if shard_state:
        require_sliceable(step.options, names)
    first = f"m_sharpness={size}" + (", shard_state=True" if shard_state else "")
    mine: list[Any] = [first, *agreement.entries((name, p) for p, name in names.items())]
    agreement.require_same(mine, "parameters", group)
    if ddp is not None:
        require_members(names, ddp)
    ddp_averages_first = ddp is not None and size == world_size
    scope = ranks.scope_of_this_rank(size, group, timeout) if size > 1 and not ddp_averages_first else None
    common: Any = names, group, scope, cap_bytes, int(check_replicas_every)
    if ddp is not None:
        step.peers = Replicas(*common, ddp)
        local_first = None if ddp_averages_first else LocalFirstPass(ddp, lambda: step.is_gradient_due)
        return DataParallel(step, optimizer.state_dict, ddp, local_first)
    agreement.broadcast(dict.fromkeys([*model.parameters(), *model.buffers(), *names]), group)
    layout = SlicedLayout(list(names), cap_bytes, group) if shard_state else None
    averaging = AllReduce(cap_bytes, group) if layout is None else ReduceScatter(layout)
    averager = BackwardHooks(list(names), averaging, lambda: not step.is_gradient_due)
    peers = Replicas(*common, averager) if layout is None else ShardedState(*common, averager, layout)
    peers.loaded(step.parameters)
    step.peers = peers
    return DataParallel(step, optimizer.state_dict, averager, None)


def _require_ready(step: Step) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("data_parallel() needs torch.distributed.init_process_group() before it.")
    step.require_unperturbed("data_parallel()")
    if isinstance(step.peers, Replicas):
        raise RuntimeError("data_parallel() twice for one optimizer. Call remove() of the first handle before it.")
    if not isinstance(step.peers, SingleProcess):
        raise ValueError(
            "Invalid optimizer, of DTensor parameters. What has sharded them averages the gradients of both passes: "
            "FusedSAM needs no data_parallel() then."
        )


def _group(ddp: DistributedDataParallel | None, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group of ranks: the one given, the model's, or all ranks."""
    everyone: Any = dist.group.WORLD if ddp is None else ddp.process_group
    if process_group is None:
        return everyone
    if ddp is not None and process_group is not ddp.process_group:
        raise ValueError("Invalid process_group. Must be None, or that of the DistributedDataParallel.")
    if dist.get_rank(process_group) < 0:
        raise ValueError("Invalid process_group. This rank must belong to it.")
    return process_group


def _names(model: nn.Module, params: list[Tensor]) -> dict[Tensor, str]:
    """Return the parameters of the optimizer in its order, by the names they have in the model."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("Invalid model: FullyShardedDataParallel. Must be sharded by fully_shard, if at all.")
    known: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {p: known.get(p, f"{i} of the optimizer") for i, p in enumerate(params)}
