"""Which ranks share one perturbation, and the collectives on flat tensors under whichever name this torch has."""

from __future__ import annotations

import numbers
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 has renamed them. With gloo the first may be an all-reduce of which a rank keeps its part.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def ranks_per_perturbation(m_sharpness: Any, world_size: int) -> int:
    """Return how many consecutive ranks share a perturbation: 1 for ``"rank"``, all for ``"world"``, or the number.

    Raises:
        ValueError: for what is none of these, or a number that does not divide the number of ranks.
    """
    named = {"rank": 1, "world": world_size}
    if isinstance(m_sharpness, str) and m_sharpness in named:
        return named[m_sharpness]
    if not isinstance(m_sharpness, numbers.Integral) or isinstance(m_sharpness, bool) or m_sharpness < 1:
        raise ValueError(f"Invalid {m_sharpness=}. Must be 'rank', 'world' or a number of ranks >= 1.")
    if world_size % int(m_sharpness):
        raise ValueError(f"Invalid {m_sharpness=}. Must divide the number of ranks, {world_size}.")
    return int(m_sharpness)


def scope_of_this_rank(size: int, group: dist.ProcessGroup, timeout: timedelta | None) -> dist.ProcessGroup:
    """Return the group of this rank's ``size`` consecutive ranks of ``group``; ``group`` itself if that is all of them.

    Made by its members alone: ranks outside of ``group`` need not take part.
    """
    world_size = dist.get_world_size(group)
    if size == world_size:
        return group
    first = dist.get_rank(group) // size * size
    members = [dist.get_global_rank(group, r) for r in range(first, first + size)]
    return dist.new_group(members, timeout, dist.get_backend(group), use_local_synchronization=True)


def reduce_scatter(part: Tensor, flat: Tensor, group: dist.ProcessGroup) -> Any:
    """Start and return the collective that makes ``part`` this rank's share of the sum of ``flat`` over the ranks.

    Args:
        part: shape [n].
        flat: shape [R n], share r being elements r n to (r + 1) n.
    """
    return _reduce_scatter(part, flat, group=group, async_op=True)


def all_gather(flat: Tensor, part: Tensor, group: dist.ProcessGroup) -> Any:
    """Start and return the collective that makes share r of ``flat`` rank r's ``part``, which may be that share."""
    return _all_gather(flat, part, group=group, async_op=True)
