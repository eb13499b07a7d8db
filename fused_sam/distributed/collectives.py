"""Collectives on flat tensors under whichever name this torch has for them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 has renamed them. With gloo the first may be an all-reduce of which a rank keeps its part.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
