"""Steps of ranks that average gradients, as bench.ranks.counts counts and bench.ranks.overlap times them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.speed.rivals import EagerSAM
from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel

OPTIONS = {"rho": 0.05, "lr": 0.01, "momentum": 0.9}

Batch = tuple[Tensor, Tensor]
Step = Callable[[Sequence[Batch]], None]


def backward(model: nn.Module, batch: Batch) -> Tensor:
    """Take the gradient of a batch's loss, and return that."""
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def eager(net: nn.Module, bucket_mb: float) -> Step:
    """Return a step of the recipe in common use, which averages both gradients during backward, whatever it says."""
    model = DistributedDataParallel(net, bucket_cap_mb=bucket_mb)
    opt = EagerSAM(net.parameters(), **OPTIONS)

    def step(batches: Sequence[Batch]) -> None:
        backward(model, batches[0])
        opt.first_step(zero_grad=True)
        backward(model, batches[0])
        opt.second_step(zero_grad=True)

    return step


def ours(
    net: nn.Module, bucket_mb: float, ddp: bool = False, late: bool = False, closures: int = 1, **options: Any
) -> Step:
    """Return a step of FusedSAM.

    Args:
        net: the model.
        bucket_mb: size of a bucket of gradients.
        ddp: let DistributedDataParallel average the second gradient.
        late: let nothing leave before backward has ended.
        closures: of a step, each with a batch.
        options: of `data_parallel`.
    """
    opt = FusedSAM(net.parameters(), **OPTIONS)
    model = DistributedDataParallel(net, bucket_cap_mb=bucket_mb) if ddp else net
    handle = data_parallel(model, opt, bucket_cap_mb=bucket_mb, **options)

    def gradient(batch: Batch) -> Tensor:
        with handle.no_sync() if late else contextlib.nullcontext():
            return backward(model, batch)

    def step(batches: Sequence[Batch]) -> None:
        made = [lambda batch=batch: gradient(batch) for batch in batches[:closures]]
        opt.step(made if closures > 1 else made[0])

    return step
