"""Which ranks share one perturbation."""

from __future__ import annotations

import numbers
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def ranks_per_e(m_sharpness: Any, world_size: int) -> int:
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
