"""Flat buckets cut into equal shares, one for each rank: what of which parameter a rank updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_sam.distributed.buckets import Flat, Mean, aligned, grad_dtype, make_buckets
from fused_sam.distributed.ranks import reduce_scatter


class Piece(NamedTuple):
    """Elements ``start`` to ``stop`` of a parameter, counted in the order of its memory; those from ``offset`` on in
    its bucket."""

    param: Tensor
    start: int
    stop: int
    offset: int

    def of(self, x: Tensor) -> Tensor:
        """Return these elements of a tensor of the parameter's shape, 1-D: a view, or a copy for other strides."""
        if x.stride() != self.param.stride():
            x = torch.empty_like(self.param, dtype=x.dtype).copy_(x)
        return in_memory(x)[self.start : self.stop]

    def in_flat(self, flat: Tensor) -> Tensor:
        """Return these elements of the bucket, 1-D."""
        return flat[self.offset : self.offset + self.stop - self.start]


def in_memory(x: Tensor) -> Tensor:
    """Return a 1-D view of a tensor without gaps, in the order of memory."""
    return x.detach().as_strided((x.numel(),), (1,), x.storage_offset())


class SlicedBucket(Flat):
    """A bucket of which each of R ranks has one share, of the same size: the last one may be of padding."""

    def __init__(self, param: Tensor, ranks: int) -> None:
        super().__init__(grad_dtype(param), param.device)
        self.weight_dtype = param.dtype
        self.ranks = ranks

    @property
    def share(self) -> int:
        """Return the number of elements of a rank."""
        return aligned(-(-self.used // self.ranks), self.dtype)

    @property
    def trained(self) -> list[Tensor]:
        """Return the parameters that take a gradient now."""
        return [p for p in self.params if p.requires_grad]

    def pack(self) -> Tensor:
        """Copy the gradients of `trained` parameters to new memory."""
        return self.packed([p.grad if p.requires_grad else None for p in self.params], self.share * self.ranks)

    def part(self, flat: Tensor, rank: int) -> Tensor:
        """Return the share of a rank."""
        return flat[rank * self.share : (rank + 1) * self.share]

    def pieces(self, rank: int) -> list[Piece]:
        """Return what a rank's share has of the parameters; rank 0 has empty ones and keeps their state."""
        first, last = rank * self.share, (rank + 1) * self.share
        pieces = []
        for p, offset in zip(self.params, self.offsets):
            start, stop = max(first - offset, 0), max(min(last - offset, p.numel()), 0)
            if start < stop or (rank == 0 and not p.numel()):
                pieces.append(Piece(p, start, stop, offset + start))
        return pieces


class SlicedLayout:
    """The buckets of all parameters of an optimizer, frozen ones included: state stays on the rank where it is.

    A bucket of frozen parameters alone is not sent.
    """

    def __init__(self, params: list[Tensor], cap_bytes: float, group: dist.ProcessGroup) -> None:
        self._cap_bytes = cap_bytes
        self.group = group
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.buckets: list[SlicedBucket] = []
        self.add(params)

    def add(self, params: list[Tensor]) -> None:
        """Add parameters, in buckets of their own, which are sent first."""
        self.buckets = make_buckets(params, self._cap_bytes, lambda p: SlicedBucket(p, self.ranks)) + self.buckets

    @property
    def trained(self) -> list[SlicedBucket]:
        """Return the buckets with a parameter that takes a gradient now."""
        return [bucket for bucket in self.buckets if bucket.trained]

    def pieces(self, rank: int) -> dict[Tensor, Piece]:
        """Return what a rank updates: at most one piece of each parameter."""
        return {piece.param: piece for bucket in self.buckets for piece in bucket.pieces(rank)}


class ScatteredMean(Mean):
    """One averaging by reduce-scatter. Afterwards p.grad is the mean where this rank updates p. Elsewhere it is 0, or
    inf if the mean is not finite on some rank, so that the GradScalers of all see it.

    None on all ranks stays None, None on some counts as zero. One all-reduce of flags, one for each parameter and one
    for the rank, tells both; only a rank that misses a gradient waits to read them.
    """

    def __init__(self, layout: SlicedLayout, handed_out: dict[Tensor, Tensor]) -> None:
        super().__init__(layout.trained, layout.group)
        self._rank = layout.rank
        self._handed_out = handed_out

    def start(self, bucket: SlicedBucket) -> tuple[tuple[Tensor, Tensor], Any]:
        """Start the reduction of a bucket; return the bucket and this rank's share of its mean."""
        for p in bucket.trained:
            if p.grad is not None and self._handed_out.get(p) is p.grad:
                raise RuntimeError(
                    f"Invalid second backward before a step (parameter of shape {list(p.shape)}): its gradient has "
                    "been averaged, and with shard_state=True a rank has one part of the mean. Backwards that are "
                    "accumulated need no_sync() around all of them but the last."
                )
        flat = bucket.pack().div_(bucket.ranks)
        share = torch.empty(bucket.share, dtype=bucket.dtype, device=bucket.device)
        return (flat, share), reduce_scatter(share, flat, self.group)

    def hand_out(self, sent: list[tuple[Tensor, Tensor]]) -> None:
        """Put the shares back in their places."""
        if not sent:
            return
        trained = [p for bucket in self.buckets for p in bucket.trained]
        flags = self._flags(trained, [share for _, share in sent])
        missing = any(p.grad is None for p in trained)
        present = dict(zip(trained, flags.tolist() if missing else [1.0] * len(trained)))
        elsewhere = torch.where(flags[-1] > 0, torch.inf, 0.0)
        for bucket, (flat, share) in zip(self.buckets, sent):
            flat.copy_(elsewhere)
            bucket.part(flat, self._rank).copy_(share)
            for p, view in zip(bucket.params, bucket.views(flat)):
                if p in present:
                    p.grad = view if present[p] > 0 else None
                if p in present and p.grad is not None:
                    self._handed_out[p] = p.grad

    def _flags(self, trained: list[Tensor], shares: list[Tensor]) -> Tensor:
        """Return 1 for each parameter with a gradient on some rank, and for a mean not finite on some; else 0."""
        flags = torch.ones(len(trained) + 1, device=shares[0].device)
        for i, p in enumerate(trained):
            if p.grad is None:
                flags[i].zero_()
        finite = [torch.isfinite(share).all().to(flags.device) for share in shares]
        flags[-1].sub_(torch.stack(finite).all().float())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return flags


class ReduceScatter:
    """How gradients are averaged where each rank is to have a share of the mean."""

    def __init__(self, layout: SlicedLayout) -> None:
        self._layout = layout
        self._handed_out: dict[Tensor, Tensor] = {}

    def begin(self, params: list[Tensor]) -> ScatteredMean:
        """Begin to average the gradients of those parameters that take one now."""
        return ScatteredMean(self._layout, self._handed_out)

    def reset(self) -> None:
        """Prepare for the next step, to which all gradients from now on belong."""
        self._handed_out.clear()
