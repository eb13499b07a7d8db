"""The mean of gradients over ranks, in flat buckets of one all-reduce each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam.backends.memory import is_dense

ALIGNMENT = 16  # bytes, of every gradient in a bucket: what the widest loads of the kernels want


class Flat:
    """Where tensors of the kinds of some parameters stand in one flat tensor, one behind the other."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.params: list[Tensor] = []
        self.offsets: list[int] = []
        self.used = 0  # elements, with the padding between

    @property
    def nbytes(self) -> int:
        """Return the bytes of the gradients alone."""
        return self.used * self.dtype.itemsize

    def add(self, param: Tensor) -> None:
        """Make room for one more parameter."""
        self.params.append(param)
        self.offsets.append(self.used)
        self.used += aligned(param.numel(), self.dtype)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return a place for each parameter, with its strides where it has no gaps."""
        views = []
        for p, offset in zip(self.params, self.offsets):
            piece = flat[offset : offset + p.numel()]
            views.append(piece.as_strided(p.shape, p.stride()) if is_dense(p) else piece.view(p.shape))
        return views

    def packed(self, grads: list[Any], size: int) -> Tensor:
        """Copy the gradients to new memory of ``size`` elements, with 0 for missing ones.

        Raises:
            ValueError: for a sparse gradient.
        """
        flat = torch.zeros(size, dtype=self.dtype, device=self.device)
        present = [(view, g.detach()) for view, g in zip(self.views(flat), grads) if g is not None]
        for _, g in present:
            if g.layout != torch.strided:
                raise ValueError(f"Invalid gradient of layout {g.layout}, shape {list(g.shape)}. Must be strided.")
        if present:
            torch._foreach_copy_([view for view, _ in present], [g for _, g in present])
        return flat


def aligned(count: int, dtype: torch.dtype) -> int:
    """Return the number of elements, rounded up to whole blocks of memory."""
    step = max(ALIGNMENT // dtype.itemsize, 1)
    return -(-count // step) * step


class Bucket(Flat):
    """Gradients, and a flag for each behind them that says whether there is one.

    The flags make None everywhere stay None, and None on some ranks count as zero. They travel with the gradients, so
    that they cost no collective, and only a rank that misses a gradient waits to read them.
    """

    def pack(self) -> Tensor:
        """Copy the present gradients to new memory.

        Raises:
            ValueError: for a sparse gradient.
        """
        flat = self.packed([p.grad for p in self.params], self.used + len(self.params))
        flat[self.used :].fill_(1.0)
        for i, p in enumerate(self.params):
            if p.grad is None:
                flat[self.used + i].zero_()
        return flat

    def unpack(self, flat: Tensor) -> None:
        """Set p.grad to a view of what `pack` made. Old gradients are not written: others may hold them."""
        missing = any(p.grad is None for p in self.params)
        flags = flat[self.used :].tolist() if missing else [1.0] * len(self.params)
        for p, view, flag in zip(self.params, self.views(flat), flags):
            p.grad = view if flag > 0 else None


class Layout:
    """Buckets for a list of parameters, cut anew when some are added, frozen or thawed."""

    def __init__(self, cap_bytes: float) -> None:
        self._cap_bytes = cap_bytes
        self._for: list[int] = []
        self._buckets: list[Bucket] = []

    def of(self, params: list[Tensor]) -> list[Bucket]:
        """Return the buckets of those parameters that take a gradient now."""
        trained = [p for p in params if p.requires_grad]
        identities = list(map(id, trained))
        if identities != self._for:
            self._buckets = make_buckets(trained, self._cap_bytes, lambda p: Bucket(grad_dtype(p), p.device))
            self._for = identities
        return self._buckets


F = TypeVar("F", bound=Flat)


def make_buckets(params: list[Tensor], cap_bytes: float, make: Callable[[Tensor], F]) -> list[F]:
    """Make buckets, last parameters first as in backward, cut at the cap. A bucket has parameters of one kind:
    the same dtypes, on the same device.

    ``make`` is called for the first parameter of a bucket.
    """
    buckets: list[F] = []
    filling: dict[tuple[Any, ...], F] = {}
    for p in reversed(params):
        kind = grad_dtype(p), p.dtype, p.device
        bucket = filling.get(kind)
        if bucket is None or bucket.nbytes >= cap_bytes:
            bucket = filling[kind] = make(p)
            buckets.append(bucket)
        bucket.add(p)
    return buckets


def grad_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the gradient that a parameter has, or will have."""
    return getattr(p, "grad_dtype", None) or p.dtype


class Mean:
    """One averaging over the ranks of a group. Buckets are sent in their order, which is the same on all ranks."""

    def __init__(self, buckets: Sequence[Any], group: dist.ProcessGroup) -> None:
        self.buckets = buckets
        self.group = group
        self._sent: list[tuple[Any, Any]] = []

    @property
    def sent(self) -> int:
        """Return how many buckets are under way."""
        return len(self._sent)

    def send(self) -> None:
        """Pack the next bucket and start its collective."""
        self._sent.append(self.start(self.buckets[self.sent]))

    def finish(self) -> None:
        """Send what has not been sent, wait for all of it (on a GPU the current stream does), and hand it out."""
        while self.sent < len(self.buckets):
            self.send()
        for _, work in self._sent:
            work.wait()
        self.hand_out([sent for sent, _ in self._sent])

    def start(self, bucket: Any) -> tuple[Any, Any]:
        """Return what `hand_out` will need of a bucket, and the collective that makes it."""
        # Divided first, as DistributedDataParallel does: a sum of 16-bit numbers overflows.
        flat = bucket.pack().div_(dist.get_world_size(self.group))
        return flat, dist.all_reduce(flat, group=self.group, async_op=True)

    def hand_out(self, sent: list[Any]) -> None:
        """Set p.grad to what has arrived."""
        for bucket, flat in zip(self.buckets, sent):
            bucket.unpack(flat)


class AllReduce:
    """How gradients are averaged where every rank is to have all of the mean."""

    def __init__(self, cap_bytes: float, group: dist.ProcessGroup) -> None:
        self._layout = Layout(cap_bytes)
        self._group = group

    def begin(self, params: list[Tensor]) -> Mean:
        """Begin to average the gradients of those parameters that take one now."""
        return Mean(self._layout.of(params), self._group)

    def reset(self) -> None:
        """Prepare for the next step."""


def cap_in_bytes(bucket_cap_mb: float) -> float:
    """Return ``bucket_cap_mb`` of `fused_sam.distributed.data_parallel` in bytes.

    Raises:
        ValueError: unless it is > 0.
    """
    if not 0.0 < bucket_cap_mb <= math.inf:
        raise ValueError(f"Invalid {bucket_cap_mb=}. Must be > 0.")
    return bucket_cap_mb * 2**20
