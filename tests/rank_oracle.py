"""All ranks in one process, in float64, and what the tests of several processes share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from helpers import FLOAT64_RTOL, HYPER, RHO, batches, bits, closure_for, small_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

from fused_sam import FusedSAM, ReferenceSAM
from fused_sam.distributed import DataParallel, data_parallel

Batch = tuple[Tensor, Tensor]


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


class Oracle:
    """All ranks in one process, in float64: the definition of m-sharpness, over the reference's own SAM."""

    def __init__(self, net: nn.Module, ranks_per_e: int, **options: Any) -> None:
        self.net = copy.deepcopy(net)
        self.sam = ReferenceSAM(self.net.parameters(), **options)
        self.ranks_per_e = ranks_per_e
        self.displaced: list[list[Tensor]] = []  # w + e of each rank, in the last step
        self.backward: Callable[[Any], Any] = lambda batch: loss_of(self.net, batch).backward()

    def step(self, shards: Sequence[Sequence[Batch]], perturb: bool = True) -> None:
        """One step with the micro-batches of each rank, whose gradients are summed."""
        seconds, self.displaced = [], []
        for start in range(0, len(shards), self.ranks_per_e):
            scope = shards[start : start + self.ranks_per_e]
            for _ in range(self.sam.ascent_steps if perturb else 0):
                self._set_grads([self._grads(shard) for shard in scope])
                self.sam.first_step()
            for shard in scope:
                self.displaced.append([p.detach().clone() for p in self.net.parameters()])
                seconds.append(self._grads(shard))
            if perturb:
                self.sam.restore()
        self._set_grads(seconds)
        if not perturb:
            self.sam._w = [p.detach().clone() for p in self.net.parameters()]
        self.sam.second_step()

    def _grads(self, shard: Sequence[Batch]) -> list[Tensor | None]:
        self.net.zero_grad()
        for examples in shard:
            self.backward(examples)
        return [p.grad for p in self.net.parameters()]

    def _set_grads(self, lists: Sequence[Sequence[Tensor | None]]) -> None:
        for p, *grads in zip(self.net.parameters(), *lists):
            present = [g for g in grads if g is not None]
            p.grad = torch.stack(present).sum(0) / len(lists) if present else None


WRAPS = ["ddp", "plain", "sharded"]
WRAP_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
}


def wrapped(net: nn.Module, wrap: str, **options: Any) -> nn.Module:
    return DistributedDataParallel(net, **options) if wrap == "ddp" else net


def joined(model: nn.Module, optimizer: FusedSAM, wrap: str, **options: Any) -> DataParallel:
    return data_parallel(model, optimizer, shard_state=wrap == "sharded", **options)


def pair_of(m: Any, base: str = "sgd", **options: Any) -> tuple[nn.Module, Oracle, FusedSAM]:
    """A network, the same on all ranks, with the oracle and the optimizer."""
    net, ranks_per_e = small_net(), {"rank": 1, "world": dist.get_world_size()}.get(m, m)
    options = {"rho": RHO, **(HYPER if base == "sgd" else {}), **options}
    oracle = Oracle(net, ranks_per_e, base=base, **{k: v for k, v in options.items() if k not in ("interval", "start")})
    return net, oracle, FusedSAM(net.parameters(), {"sgd": SGD, "adam": Adam}[base], **options)


def two_calls(opt: FusedSAM, backward: Callable[[], Any]) -> None:
    backward()
    while opt.perturb_next:
        opt.first_step(zero_grad=True)
        backward()
    opt.step()
    opt.zero_grad()


def squares_of(net: nn.Module, x: Tensor, y: Tensor | float = 0.0) -> Callable[[], Tensor]:
    """A closure that leaves the gradients of the mean square of net(x) - y."""

    def closure() -> Tensor:
        loss: Tensor = (net(x) - y).square().mean()
        loss.backward()
        return loss

    return closure


def steps(model: nn.Module, opt: FusedSAM, oracle: Oracle, numbers: range, size: int) -> None:
    """Steps on examples that are known by their number, as many as there are or were ranks."""
    for number in numbers:
        torch.manual_seed(number)
        shards = batches(size)
        oracle.step([[shard] for shard in shards])
        opt.step(closure_for(model, shards[dist.get_rank()]))
        close(list(model.parameters()), list(oracle.net.parameters()), f"w after step {number}")


def state_of(opt: Optimizer) -> list[bytes]:
    return [bits(v) for s in opt.state.values() for _, v in sorted(s.items()) if isinstance(v, Tensor)]


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str, atol: float = FLOAT64_RTOL) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=FLOAT64_RTOL, atol=atol, msg=lambda m, i=i: f"{what}, {i}: {m}")
