"""m-sharpness over processes: each rank's e from its own data, second gradients averaged, against one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import FLOAT64_RTOL, HYPER, RHO, batches, small_net
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_sam import FusedSAM, ReferenceSAM
from fused_sam.distributed import data_parallel

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


class Oracle:
    """All ranks in one process, in float64: the definition of m-sharpness, over the reference's own SAM."""

    def __init__(self, net: nn.Module, ranks_per_e: int, **options: Any) -> None:
        self.net = copy.deepcopy(net)
        self.sam = ReferenceSAM(self.net.parameters(), **options)
        self.ranks_per_e = ranks_per_e
        self.displaced: list[list[Tensor]] = []  # w + e of each rank, in the last step

    def step(self, shards: Sequence[Sequence[Batch]], perturb: bool = True) -> None:
        """One step with the micro-batches of each rank, whose gradients are summed."""
        seconds, self.displaced = [], []
        for start in range(0, len(shards), self.ranks_per_e):
            scope = shards[start : start + self.ranks_per_e]
            if perturb:
                self._set_grads([self._grads(shard) for shard in scope])
                self.sam.first_step()
            for shard in scope:
                self.displaced.append([p.detach().clone() for p in self.net.parameters()])
                seconds.append(self._grads(shard))
            if perturb:
                self.sam.restore()
        self._set_grads(seconds)
        if perturb:
            self.sam.second_step()
        else:
            self.sam._w = [p.detach().clone() for p in self.net.parameters()]
            self.sam.second_step()

    def _grads(self, shard: Sequence[Batch]) -> list[Tensor | None]:
        self.net.zero_grad()
        for batch in shard:
            loss_of(self.net, batch).backward()
        return [p.grad for p in self.net.parameters()]

    def _set_grads(self, lists: Sequence[Sequence[Tensor | None]]) -> None:
        for p, *grads in zip(self.net.parameters(), *lists):
            present = [g for g in grads if g is not None]
            p.grad = torch.stack(present).sum(0) / len(lists) if present else None


WRAPS = ["ddp", "plain"]
OPTIONS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
}


def wrapped(net: nn.Module, wrap: str, **options: Any) -> nn.Module:
    return net if wrap == "plain" else DistributedDataParallel(net, **options)


def two_calls(opt: FusedSAM, backwards: Callable[[], None]) -> None:
    backwards()
    if opt.perturb_next:
        opt.first_step(zero_grad=True)
        backwards()
    opt.step()
    opt.zero_grad()


def follows_the_oracle(wrap: str, m: Any, form: str = "closure", option: str = "ddp", **sam: Any) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    net = small_net()
    data = [batches(size) for _ in range(5)]
    ranks_per_e = {"rank": 1, "world": size}.get(m, m)
    oracle = Oracle(net, ranks_per_e, rho=RHO, **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER, **sam)
    if wrap == "plain" and rank > 0:
        with torch.no_grad():  # to be replaced by those of rank 0
            for p in net.parameters():
                p.mul_(2)
    model = wrapped(net, wrap, **OPTIONS[option])
    data_parallel(model, opt, m_sharpness=m, check_replicas_every=2, bucket_cap_mb=0.0005)
    seen: list[Tensor] = []

    def backward(batch: Batch) -> Tensor:
        seen[:] = [p.detach().clone() for p in net.parameters()]
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    for step, shards in enumerate(data):
        oracle.step([[shard] for shard in shards], perturb=opt.perturb_next)
        if form == "closure":
            opt.step(lambda shards=shards: backward(shards[rank]))
        else:
            two_calls(opt, lambda shards=shards: backward(shards[rank]))
        close(seen, oracle.displaced[rank], f"w + e of step {step}")
        close(list(net.parameters()), list(oracle.net.parameters()), f"w after step {step}")


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL, msg=lambda m, i=i: f"{what}, {i}: {m}")


@pytest.mark.parametrize("m", ["rank", "world"])
@pytest.mark.parametrize("form", ["closure", "two calls"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_two_ranks_follow_one_process(wrap: str, form: str, m: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, wrap, m, form)


@pytest.mark.parametrize("m", ["rank", 2, "world"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_four_ranks_follow_one_process(wrap: str, m: Any, four: Ranks) -> None:
    four.run(follows_the_oracle, wrap, m)


@pytest.mark.parametrize("option", ["bucket views", "unused", "static", "small buckets"])
@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_options_of_the_ddp(option: str, form: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, "ddp", "rank", form, option)


@pytest.mark.parametrize("wrap", WRAPS)
def test_steps_that_are_not_perturbed(wrap: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, wrap, "rank", "two calls", interval=2, start=1)
