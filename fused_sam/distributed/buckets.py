"""The mean of gradients over ranks, in flat buckets of one all-reduce each."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam.memory import is_dense

ALIGNMENT = 16  # bytes, of every gradient in a bucket: what the widest loads of the kernels want


class Bucket:
    """Gradients of one dtype and device, one behind the other, and a flag for each that says whether there is one.

    The flags make None everywhere stay None, and None on some ranks count as zero. They travel with the gradients, so
    that they cost no collective, and only a rank that misses a gradient waits to read them.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.params: list[Tensor] = []
        self._offsets: list[int] = []
        self._flags = 0  # where they begin

    @property
    def nbytes(self) -> int:
        """Of the gradients alone."""
        return self._flags * self.dtype.itemsize

    def add(self, param: Tensor) -> None:
        """Make room for the gradient of one more parameter."""
        step = max(ALIGNMENT // self.dtype.itemsize, 1)
        self.params.append(param)
        self._offsets.append(self._flags)
        self._flags += -(-param.numel() // step) * step

    def pack(self) -> Tensor:
        """The gradients there are now, in new memory, with 0 for those that there are not.

        Raises:
            ValueError: for a sparse gradient.
        """
        flat = torch.zeros(self._flags + len(self.params), dtype=self.dtype, device=self.device)
        present = [(view, p.grad) for view, p in zip(self._views(flat), self.params) if p.grad is not None]
        for _, g in present:
            if g.layout != torch.strided:
                raise ValueError(f"Invalid gradient of layout {g.layout}, shape {list(g.shape)}. Must be strided.")
        flat[self._flags :].fill_(1.0)
        for i, p in enumerate(self.params):
            if p.grad is None:
                flat[self._flags + i].zero_()
        if present:
            torch._foreach_copy_([v for v, _ in present], [g.detach() for _, g in present])
        return flat

    def unpack(self, flat: Tensor) -> None:
        """p.grad = a view of what `pack` made. Gradients that there were are not written: others may hold them."""
        missing = any(p.grad is None for p in self.params)
        flags = flat[self._flags :].tolist() if missing else [1.0] * len(self.params)
        for p, view, flag in zip(self.params, self._views(flat), flags):
            p.grad = view if flag > 0 else None

    def _views(self, flat: Tensor) -> list[Tensor]:
        """A place for each gradient, with the strides of its parameter where it has no gaps."""
        views = []
        for p, offset in zip(self.params, self._offsets):
            piece = flat[offset : offset + p.numel()]
            views.append(piece.as_strided(p.shape, p.stride()) if is_dense(p) else piece.view(p.shape))
        return views


class Layout:
    """Buckets for a list of parameters, cut anew when some are added, frozen or thawed."""

    def __init__(self, cap_bytes: float) -> None:
        self._cap_bytes = cap_bytes
        self._for: list[int] = []
        self._buckets: list[Bucket] = []

    def of(self, params: list[Tensor]) -> list[Bucket]:
        """Those of the parameters that take a gradient now."""
        trained = [p for p in params if p.requires_grad]
        identities = list(map(id, trained))
        if identities != self._for:
            self._buckets, self._for = make_buckets(trained, self._cap_bytes), identities
        return self._buckets


def make_buckets(params: list[Tensor], cap_bytes: float) -> list[Bucket]:
    """Last parameters first, since backward comes to them first; cut at the cap."""
    buckets: list[Bucket] = []
    filling: dict[tuple[torch.dtype, torch.device], Bucket] = {}
    for p in reversed(params):
        kind = getattr(p, "grad_dtype", None) or p.dtype, p.device
        bucket = filling.get(kind)
        if bucket is None or bucket.nbytes >= cap_bytes:
            bucket = filling[kind] = Bucket(*kind)
            buckets.append(bucket)
        bucket.add(p)
    return buckets


class Mean:
    """One averaging over the ranks of a group. Buckets are sent in their order, which is the same on all ranks."""

    def __init__(self, buckets: list[Bucket], group: dist.ProcessGroup) -> None:
        self.buckets = buckets
        self._group = group
        self._sent: list[tuple[Tensor, Any]] = []

    @property
    def sent(self) -> int:
        """How many buckets are under way."""
        return len(self._sent)

    def send(self) -> None:
        """Pack the next bucket and start its all-reduce."""
        # Divided first, as DistributedDataParallel does: a sum of 16-bit numbers overflows.
        flat = self.buckets[self.sent].pack().div_(dist.get_world_size(self._group))
        self._sent.append((flat, dist.all_reduce(flat, group=self._group, async_op=True)))

    def finish(self) -> None:
        """Send what has not been sent, wait for all of it (on a GPU the current stream does), and hand it out."""
        while self.sent < len(self.buckets):
            self.send()
        for _, work in self._sent:
            work.wait()
        for bucket, (flat, _) in zip(self.buckets, self._sent):
            bucket.unpack(flat)


def cap_in_bytes(bucket_cap_mb: float) -> float:
    """The option of `fused_sam.distributed.data_parallel`.

    Raises:
        ValueError: unless it is > 0.
    """
    if not 0.0 < bucket_cap_mb <= math.inf:
        raise ValueError(f"Invalid {bucket_cap_mb=}. Must be > 0.")
    return bucket_cap_mb * 2**20
