"""Where tensors lie in memory, whether they meet themselves or another; and how torch sums and widens them."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Return whether a strided tensor's elements fill the memory between its first and its last, in any order."""
    expected = 1
    for stride, size in _steps(x):
        if stride != expected:
            return False
        expected *= size
    return True


def require_disjoint(tensors: list[Tensor], names: list[str] | None = None) -> None:
    """Refuse tensors on the same memory: they would be written twice, in no particular order.

    Raises:
        ValueError: if two of the tensors share an element. (Slices may well interleave.)
    """
    named = zip(tensors, names or ["a tensor"] * len(tensors))
    places = sorted(_Place.of(x, name) for x, name in named if x.numel() > 0 and x.device.type != "meta")
    active: list[_Place] = []
    for place in places:
        active = [a for a in active if a.device == place.device and a.end > place.begin]
        for a in active:
            if _share_memory(a, place):
                raise ValueError(
                    f"Invalid memory layout: {a.name} of shape {list(a.shape)} and {place.name} of shape "
                    f"{list(place.shape)} overlap. Parameters, backups and state must be disjoint."
                )
        active.append(place)


class _Place(NamedTuple):
    """Where a strided tensor lies: addresses and strides in bytes."""

    device: str
    begin: int
    end: int
    item: int
    dense: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    name: str

    @classmethod
    def of(cls, x: Tensor, name: str) -> _Place:
        item, begin = x.element_size(), x.data_ptr()
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        strides = tuple(item * stride for stride in x.stride())
        return cls(str(x.device), begin, begin + item * (last + 1), item, is_dense(x), tuple(x.shape), strides, name)

    def addresses(self) -> Tensor:
        a = torch.tensor([self.begin], device="cpu")
        for size, stride in zip(self.shape, self.strides):
            a = (a[:, None] + stride * torch.arange(size, device="cpu")).flatten()
        return a


@functools.lru_cache(maxsize=256)
def _share_memory(a: _Place, b: _Place) -> bool:
    """Return whether two tensors whose spans overlap share a byte. Cached: geometry rarely changes between steps."""
    if a.dense and b.dense:
        return True
    begins = torch.cat([a.addresses(), b.addresses()])
    ends = torch.cat([a.addresses() + a.item, b.addresses() + b.item])
    order = begins.argsort()
    return bool((begins[order][1:] < ends[order][:-1]).any())


def overlaps_itself(x: Tensor) -> bool:
    """Return whether two indices of a strided tensor may share an address (in expanded tensors they do)."""
    reach = 0
    for stride, size in _steps(x):
        if stride <= reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def _steps(x: Tensor) -> list[tuple[int, int]]:
    """Return (stride, size) of the dimensions that have more than one index, innermost first."""
    return sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1)


def wide(x: Tensor) -> Tensor:
    """Return fp32 for 16-bit tensors, others as they are: a factor in a tensor would be rounded to their 16 bits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def ordered_sum(x: Tensor) -> Tensor:
    """Return the sum in fp64, of shape [], in an order by index alone: torch deals a long one out to its threads."""
    x = x.double().flatten()
    while x.numel() > _ROW:
        whole = x.numel() // _ROW * _ROW
        x = torch.cat([x[:whole].view(-1, _ROW).sum(1), x[whole:].sum().reshape(1)])
    return x.sum()


def two_norm(tensors: list[Tensor], far: bool) -> Tensor:
    """Return ||x||_2 over all tensors in fp64, shape [].

    With ``far`` also of numbers whose squares leave the range of fp64: those are looked at again in other units, which
    change no bit of others. Only on a CPU can the host see, without a wait, that there is no need.
    """
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in tensors]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if not far or (norm.is_cpu and not (norm == math.inf or norm < _LEAST)):
        return norm
    scale = torch.where(norm == math.inf, 2.0**600, torch.where(norm < _LEAST, 2.0**-600, torch.ones_like(norm)))
    return scale * two_norm([x.double() / scale for x in tensors], far=False)


_LEAST = 2.0**-480  # below, squares that matter may be subnormal
_ROW = 4096  # far fewer than torch adds up with several threads
