"""One call at set-up that tells FusedSAM of the other ranks."""

from __future__ import annotations

import contextlib
import numbers
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_sam.distributed import agreement, scopes
from fused_sam.distributed.alone import Alone
from fused_sam.distributed.buckets import cap_in_bytes
from fused_sam.distributed.ddp import LocalFirstPass
from fused_sam.distributed.overlap import Overlap
from fused_sam.distributed.replicas import Replicas, require_members

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


class DataParallel:
    """Handle of `data_parallel`; ``remove()`` undoes it."""

    def __init__(
        self,
        optimizer: FusedSAM,
        averager: Overlap | DistributedDataParallel,
        local_first: LocalFirstPass | None,
    ) -> None:
        self._optimizer = optimizer
        self._averager = averager
        self._local_first = local_first

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """For gradient accumulation: backwards inside communicate nothing. Around all but the last of a pass."""
        return self._averager.skipped() if isinstance(self._averager, Overlap) else self._averager.no_sync()

    def remove(self) -> None:
        """Take the hooks off; the optimizer is on its own again."""
        for hooks in (self._averager, self._local_first):
            if isinstance(hooks, Overlap | LocalFirstPass):
                hooks.remove()
        self._optimizer._peers = Alone()


def data_parallel(
    model: nn.Module,
    optimizer: FusedSAM,
    *,
    m_sharpness: str | int = "rank",
    process_group: dist.ProcessGroup | None = None,
    bucket_cap_mb: float = 25.0,
    check_replicas_every: int = 0,
    timeout: timedelta | None = None,
) -> DataParallel:
    r"""m-sharpness over the ranks of a process group (Foret et al. 2021, section 4.1).

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
    counts as zero there. Norm, ``optimizer.last`` and e are those of a rank, or of ranks that share one e; a
    GradScaler's overflow in either pass, on any rank, is one on all.

    Args:
        model: of which each rank has the whole.
        optimizer: of its parameters.
        m_sharpness: which ranks share one e: ``"rank"``, none; a number k, every k consecutive ones; ``"world"``, all.
        process_group: the ranks; None for all, or for those of the DistributedDataParallel.
        bucket_cap_mb: size in MiB from which on a bucket is full.
        check_replicas_every: compare the weights of all ranks after every so many steps; the host waits then. 0: never.
        timeout: of the groups made for a number k of ranks; None for that of the backend.

    Raises:
        ValueError: on all ranks, if their parameters differ in number, names, shapes, strides, dtypes or
            ``requires_grad``; for an option out of range; for sharded parameters, or such as the
            DistributedDataParallel does not have; with ``second_order``, or ``reuse`` and another scope than "world".
        RuntimeError: without a process group, while the weights are perturbed, or for the second call;
            in a step, on all ranks, when ``check_replicas_every`` finds them to differ.
    """
    _require_ready(optimizer)
    if not isinstance(check_replicas_every, numbers.Integral) or check_replicas_every < 0:
        raise ValueError(f"Invalid {check_replicas_every=}. Must be an integer >= 0.")
    cap_bytes = cap_in_bytes(bucket_cap_mb)
    ddp = model if isinstance(model, DistributedDataParallel) else None
    group = _group(ddp, process_group)
    world_size = dist.get_world_size(group)
    size = scopes.ranks_per_e(m_sharpness, world_size)
    if optimizer.second_order:
        raise ValueError("Invalid optimizer with second_order=True. The averaging of gradients cuts their graph.")
    if optimizer.reuse is not None and size != world_size:
        raise ValueError(
            f"Invalid {m_sharpness=} with reuse={optimizer.reuse}. Must be 'world': what is reused must be the same on "
            "all ranks."
        )
    names = _names(model if ddp is None else ddp.module, optimizer)
    mine: list[Any] = [f"m_sharpness={size}", *agreement.entries((name, p) for p, name in names.items())]
    agreement.require_same(mine, "parameters", group)
    if ddp is not None:
        require_members(names, ddp)
    ddp_averages_first = ddp is not None and size == world_size
    scope = scopes.scope_of_this_rank(size, group, timeout) if size > 1 and not ddp_averages_first else None
    averager: Overlap | DistributedDataParallel
    local_first = None
    if ddp is None:
        agreement.broadcast(dict.fromkeys([*model.parameters(), *model.buffers(), *names]), group)
        averager = Overlap(list(names), group, cap_bytes, lambda: not optimizer.perturb_next)
    else:
        averager, local_first = ddp, None if ddp_averages_first else LocalFirstPass(ddp, optimizer)
    optimizer._peers = Replicas(names, group, scope, cap_bytes, averager, int(check_replicas_every))
    return DataParallel(optimizer, averager, local_first)


def _require_ready(optimizer: FusedSAM) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("data_parallel() needs torch.distributed.init_process_group() before it.")
    if optimizer.perturbed:
        raise RuntimeError("data_parallel() while the weights are perturbed. Call step() or restore() first.")
    if isinstance(optimizer._peers, Replicas):
        raise RuntimeError("data_parallel() twice for one optimizer. Call remove() of the first handle before it.")
    if not isinstance(optimizer._peers, Alone):
        raise ValueError(
            "Invalid optimizer, of DTensor parameters. What has sharded them averages the gradients of both passes: "
            "FusedSAM needs no data_parallel() then."
        )


def _group(ddp: DistributedDataParallel | None, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The ranks: those given, those of the model, or all there are."""
    everyone: Any = dist.group.WORLD if ddp is None else ddp.process_group
    if process_group is None:
        return everyone
    if ddp is not None and process_group is not ddp.process_group:
        raise ValueError("Invalid process_group. Must be None, or that of the DistributedDataParallel.")
    if dist.get_rank(process_group) < 0:
        raise ValueError("Invalid process_group. This rank must belong to it.")
    return process_group


def _names(model: nn.Module, optimizer: FusedSAM) -> dict[Tensor, str]:
    """The parameters of the optimizer in its order, by the names they have in the model."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("Invalid model: FullyShardedDataParallel. Must be sharded by fully_shard, if at all.")
    known: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {p: known.get(p, f"{i} of the optimizer") for i, p in enumerate(optimizer._flat_params())}
