"""What is to be known of a tensor before kernels may have its address: where it lies, and who else can see it."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sam.routing import DTYPES, can_mix


class Seen(NamedTuple):
    """A strided tensor as a kernel would see it."""

    address: int
    traits: tuple[torch.dtype, torch.Size, torch.device, torch.layout]
    strides: tuple[int, ...]
    negated: bool

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.traits[1])

    def readable(self) -> bool:
        """Whether memory holds the values themselves, and is there."""
        return not self.negated and (self.address != 0 or self.numel == 0)


# What stands for an entry that is no strided tensor: nothing matches it.
UNREADABLE = Seen(0, (torch.bool, torch.Size(), torch.device("meta"), torch.strided), (), True)

_traits = operator.attrgetter("dtype", "shape", "device", "layout")
_readers: tuple[Callable[[Any], Any], ...] = (Tensor.data_ptr, _traits, Tensor.stride, Tensor.is_neg)


def look(tensors: Iterable[Any]) -> list[Any]:
    """What is seen of each entry, None of None."""
    tensors = list(tensors)
    there = [x for x in tensors if x is not None]
    try:
        seen = [Seen(*x) for x in zip(*(map(read, there) for read in _readers))]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        seen = [_look_at(x) for x in there]
    if len(there) == len(tensors):
        return seen
    each = iter(seen)
    return [None if x is None else next(each) for x in tensors]


def _look_at(x: Any) -> Seen:
    try:
        return Seen(*(read(x) for read in _readers))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return UNREADABLE


def is_param(x: Seen, device: torch.device) -> bool:
    """Whether the kernels can take a parameter as it lies in memory."""
    dtype, shape, on, layout = x.traits
    known = dtype in DTYPES and layout == torch.strided and on == device
    return known and x.readable() and _is_dense(shape, x.strides)


def matches(x: Seen | None, param: Seen, any_dtype: bool = False) -> bool:
    """Whether an operand, if any, lies as its parameter does; ``any_dtype``: or in one that can mix with its."""
    if x is None:
        return True
    if not x.readable():
        return False
    if x.traits != param.traits and not (
        any_dtype and x.traits[1:] == param.traits[1:] and can_mix(param.traits[0], x.traits[0])
    ):
        return False
    return x.strides == param.strides or _same_layout(x.traits[1], x.strides, param.strides)


@functools.lru_cache(maxsize=4096)
def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape) if size > 1):
        if stride != expected:
            return 0 in shape
        expected *= size
    return True


@functools.lru_cache(maxsize=4096)
def _same_layout(shape: torch.Size, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Strides of dimensions of one index do not matter."""
    return 0 in shape or all(x == y for x, y, size in zip(a, b, shape) if size != 1)


@functools.lru_cache(maxsize=64)
def require_disjoint(spans: tuple[tuple[int, int], ...]) -> None:
    """Refuse (address, bytes) that overlap: they would be written twice, in no particular order. Cached: weights stay.

    Raises:
        ValueError: if two do.
    """
    ordered = sorted((address, address + size) for address, size in spans if size > 0)
    if any(begin < end for (_, end), (begin, _) in itertools.pairwise(ordered)):
        raise ValueError("Invalid memory layout: parameters, backups and state must not overlap.")


# How often the Python tensor, the C++ tensor, its storage and the storage's Python object are referred to.
Uses = tuple[int, int, int, int]


def _uses(tensors: Sequence[Any], index: int) -> Uses:
    """Counted in one way only: by index, so that the caller adds the same references whatever the tensor."""
    storage = tensors[index].untyped_storage()
    return (
        sys.getrefcount(tensors[index]),
        tensors[index]._use_count(),
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
    )


@functools.cache
def _lone() -> Uses | None:
    """The counts of a tensor that a list and a tuple made of it hold, and nothing else. None: this torch cannot say."""
    if not hasattr(torch._C, "_storage_Use_Count") or not hasattr(Tensor, "_use_count"):
        return None
    tensors = [torch.empty(1)]
    return _uses(tuple(tensors), 0)


def is_sole_owner(tensors: tuple[Tensor, ...], index: int) -> bool:
    """Whether a tuple, and the list that it was made from, are the only ways to reach the memory of its tensor."""
    return _lone() is not None and _uses(tensors, index) == _lone()
