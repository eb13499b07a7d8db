"""The base optimizer's state, cut into what each rank updates, and put together again."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam.distributed.slices import SlicedLayout, in_memory

State = dict[Tensor, dict[str, Any]]
STEP = "step"  # one number for a parameter; all other entries of theirs are tensors of its shape


def cut(state: State, layout: SlicedLayout) -> None:
    """Cut entries of the parameters' shapes to this rank's pieces, 1-D, in memory of their own.

    Raises:
        ValueError: for an entry of another shape; nothing has been changed then.
    """
    for p, entries in state.items():
        for key, x in entries.items():
            if key != STEP and isinstance(x, Tensor) and x.shape != p.shape:
                raise ValueError(
                    f"Invalid {key} of shape {list(x.shape)}. Must be of its parameter's: {list(p.shape)}."
                )
    pieces = layout.pieces(layout.rank)
    for p in list(state):
        if p not in pieces:
            del state[p]
            continue
        for key, x in state[p].items():
            if key != STEP and isinstance(x, Tensor):
                state[p][key] = pieces[p].of(x).clone()


def whole(state: State, layout: SlicedLayout, to: int | None) -> State | None:
    """Return the state of all ranks, on the CPU: on rank ``to`` of the group (None elsewhere), or on all."""
    pieces = layout.pieces(layout.rank)
    numbers = {p: i for i, p in enumerate(_params(layout))}
    mine = {numbers[p]: _on_cpu(state[p]) for p in pieces if p in state}
    everyone: list[Any] = [None] * layout.ranks
    if to is None:
        dist.all_gather_object(everyone, mine, group=layout.group)
    else:
        there = everyone if to == layout.rank else None
        dist.gather_object(mine, there, dist.get_global_rank(layout.group, to), group=layout.group)
        if there is None:
            return None
    joined: State = defaultdict(dict)
    params = list(numbers)
    for rank, theirs in enumerate(everyone):
        places = layout.pieces(rank)
        for number, entries in theirs.items():
            p = params[number]
            for key, x in entries.items():
                if key == STEP or not isinstance(x, Tensor):
                    joined[p][key] = x
                    continue
                if key not in joined[p]:
                    joined[p][key] = torch.empty_like(p, dtype=x.dtype, device="cpu", requires_grad=False)
                in_memory(joined[p][key])[places[p].start : places[p].stop].copy_(x)
    return joined


def _params(layout: SlicedLayout) -> list[Tensor]:
    """Return all parameters, in an order that is the same on all ranks."""
    return [p for bucket in layout.buckets for p in bucket.params]


def _on_cpu(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: x.cpu() if isinstance(x, Tensor) else x for key, x in entries.items()}
