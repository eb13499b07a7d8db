"""That all ranks have the same parameters: by name before training, by value at its start and during it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Entry(NamedTuple):
    """What ranks must agree on, one for each parameter."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def __str__(self) -> str:
        frozen = "" if self.requires_grad else ", frozen"
        return f"{self.name} (shape {list(self.shape)}, strides {list(self.strides)}, {self.dtype}{frozen})"


def entries(named: Iterable[tuple[str, Tensor]]) -> list[Entry]:
    """Return an entry for each parameter, in their order."""
    return [Entry(name, tuple(p.shape), p.stride(), p.dtype, p.requires_grad) for name, p in named]


def require_same(mine: list[Any], what: str, group: dist.ProcessGroup) -> None:
    """Compare lists over the ranks.

    Raises:
        ValueError: on all ranks, saying where the first difference is.
    """
    lists: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(lists, mine, group=group)
    for rank, theirs in enumerate(lists):
        for i, (a, b) in enumerate(zip_longest(lists[0], theirs)):
            if a != b:
                raise ValueError(
                    f"Invalid {what}: number {i} is {b or 'missing'} on rank {rank}, and {a or 'missing'} on rank 0. "
                    "Must be the same on all ranks."
                )


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Return rank 0's values on all ranks of the group."""
    source = dist.get_global_rank(group, 0)
    for x in tensors:
        sent = x.detach().contiguous()  # x itself where it is
        dist.broadcast(sent, source, group=group)
        if sent.data_ptr() != x.data_ptr():
            x.copy_(sent)


@torch.no_grad()
def differing(tensors: list[Tensor], group: dist.ProcessGroup) -> list[int]:
    """Return which tensors differ in a bit between ranks, alike on all ranks. Waits for the device."""
    if not tensors:
        return []
    sums = torch.stack([_checksum(x).to(tensors[0].device) for x in tensors])
    # The largest of x and, as ~ turns the order round, the smallest.
    extremes = torch.stack([sums, ~sums])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    return torch.nonzero(extremes[0] != ~extremes[1]).flatten().tolist()


def _checksum(x: Tensor) -> Tensor:
    """Return sum_i (2 i + 1) bits_i modulo 2^64, int64 of shape []: other bits or another order change it."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = torch.view_as_real(x).flatten() if x.is_complex() else x.detach().contiguous().flatten()
    bits = flat.view(integers[flat.element_size()]).long()
    return (bits * torch.arange(1, 2 * bits.numel() + 1, 2, device=x.device)).sum()
