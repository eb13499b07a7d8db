"""Which gradients are averaged: accumulated, of micro-batches, missing, of parameters that come and freeze."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, RHO, batches, bits, closure_for, small_net, snapshot
from rank_oracle import (
    WRAP_OPTIONS,
    WRAPS,
    Batch,
    Oracle,
    close,
    joined,
    loss_of,
    pair_of,
    squares_of,
    steps,
    two_calls,
    wrapped,
)
from ranks import Ranks, on_pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel


@pytest.mark.parametrize("m", ["rank", "world"])
@pytest.mark.parametrize(
    ("wrap", "silent", "wrap_option"),
    [
        # What a DistributedDataParallel has not averaged stays as it is.
        ("ddp", "none", "default"),
        ("ddp", "all but the last", "default"),
        ("ddp", "none", "static"),
        *(("plain", silent, "default") for silent in ("none", "all", "all but the last", "all but the first")),
        *(("sharded", silent, "default") for silent in ("all", "all but the last")),
        # The backward of rank 0 makes no gradient at all, in either pass.
        *((wrap, "no examples", "default") for wrap in ("plain", "sharded")),
    ],
)
@on_pair
def test_accumulation(wrap: str, m: str, silent: str, wrap_option: str) -> None:
    rank, size, k = dist.get_rank(), dist.get_world_size(), 3
    net, oracle, opt = pair_of(m)
    model = wrapped(net, wrap, **WRAP_OPTIONS[wrap_option])
    handle = joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1)
    quiet = {"all": range(k), "all but the first": range(1, k), "none": ()}.get(silent, range(k - 1))

    def backwards(micro: Sequence[Batch]) -> None:
        for i, batch in enumerate(micro):
            with handle.no_sync() if i in quiet else contextlib.nullcontext():
                loss_of(model, batch).backward()

    for _ in range(3):
        shards = [batches(0 if silent == "no examples" and r == 0 else k) for r in range(size)]
        oracle.step(shards)
        two_calls(opt, functools.partial(backwards, shards[rank]))
        close(list(net.parameters()), list(oracle.net.parameters()), "w")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("m", ["rank", "world"])
@on_pair
def test_lists_of_closures(wrap: str, m: Any) -> None:
    rank, size, k = dist.get_rank(), dist.get_world_size(), 3
    net, oracle, opt = pair_of(m)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1)
    for _ in range(3):
        data = [batches(size) for _ in range(k)]
        oracle.step([[shard] for shards in data for shard in shards])
        opt.step([closure_for(model, shards[rank]) for shards in data])
        close(list(net.parameters()), list(oracle.net.parameters()), "w")


class TwoHeads(nn.Module):
    """The second head has a gradient where it is asked for, the third never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.first(x) + (self.second(x).tanh() if both else 0)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("m", ["rank", "world"])
@on_pair
def test_gradients_that_are_none_on_some_ranks(wrap: str, m: str) -> None:
    """Rank 0 has no gradient of the second head in odd steps, no rank has one in every fourth."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = TwoHeads().double()
    oracle = Oracle(net, size if m == "world" else 1, rho=RHO, **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap, find_unused_parameters=True) if wrap == "ddp" else net
    joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1, bucket_cap_mb=1e-5)
    third = copy.deepcopy(list(net.third.parameters()))

    def backward(net: nn.Module, x: Tensor, both: bool) -> Tensor:
        loss = net(x, both).square().sum()
        loss.backward()
        return loss

    for step in range(6):
        xs = [torch.randn(4, 5, dtype=torch.float64) for _ in range(size)]
        both = [step % 4 != 3 and (r > 0 or step % 2 == 0) for r in range(size)]
        oracle.backward = lambda shard: backward(oracle.net, *shard)
        oracle.step([[(x, b)] for x, b in zip(xs, both)])
        opt.step(lambda xs=xs, both=both: backward(model, xs[rank], both[rank]))
        close(list(net.parameters()), list(oracle.net.parameters()), f"w after step {step}")
    assert all(map(torch.equal, third, net.third.parameters())), "decayed without a gradient"


def trains_in_two_worlds(wrap: str) -> bytes:
    """Ranks 0, 1 and 2, 3 train apart from each other; the latter share a perturbation."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    net = small_net()
    oracle = Oracle(net, 1 if rank < 2 else 2, rho=RHO, **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    joined(net, opt, wrap, process_group=mine, m_sharpness=1 if rank < 2 else 2, check_replicas_every=1)
    for _ in range(3):
        shards = batches(4)
        first = rank // 2 * 2
        oracle.step([[shard] for shard in shards[first : first + 2]])
        opt.step(closure_for(net, shards[rank]))
        close(list(net.parameters()), list(oracle.net.parameters()), "w")
    return bits(net[0].weight)


@pytest.mark.parametrize("wrap", ["plain", "sharded"])
def test_a_process_group(wrap: str, four: Ranks) -> None:
    a, b, c, d = four.run(trains_in_two_worlds, wrap)
    assert a == b
    assert c == d
    assert a != c


@pytest.mark.parametrize("wrap", ["plain", "sharded"])
@on_pair
def test_parameters_that_come_and_freeze(wrap: str) -> None:
    """A group added between steps, of parameters that differ at first; another frozen and thawed."""
    net, head = small_net(), nn.Linear(4, 4).double()
    model = nn.Sequential(net, head)
    oracle = Oracle(model, 1, rho=RHO, **HYPER)
    if dist.get_rank():
        nn.init.zeros_(head.weight)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    joined(net, opt, wrap, check_replicas_every=1)
    opt.add_param_group({"params": head.parameters()})
    for step in range(4):
        for owner in (model, oracle.net):
            owner[0][3].requires_grad_(step % 2 == 0)
        steps(model, opt, oracle, range(step, step + 1), dist.get_world_size())


class Checkpointed(nn.Module):
    """Reentrant checkpoints run backwards inside of the backward."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(1 if shared else 2))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor, by_checkpoint: bool = True) -> Tensor:
        for i in range(2):
            layer = self.layers[i % len(self.layers)]
            x = checkpoint(layer, x, use_reentrant=True) if by_checkpoint else layer(x)
            x = x.tanh()
        return self.head(x)


@pytest.mark.parametrize("shared", [False, True])
@on_pair
def test_reentrant_checkpoints(shared: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    net = Checkpointed(shared).double()
    oracle = Oracle(net, 1, rho=RHO, **HYPER)
    oracle.backward = lambda x: oracle.net(x, by_checkpoint=False).square().mean().backward()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, check_replicas_every=1, bucket_cap_mb=1e-5)
    for _ in range(2):
        xs = [torch.randn(3, 5, dtype=torch.float64) for _ in range(size)]
        closure = squares_of(net, xs[rank].clone().requires_grad_())
        if shared:
            w = snapshot(net.parameters())
            with pytest.raises(RuntimeError, match="Invalid second gradient of a parameter"):
                opt.step(closure)
            assert snapshot(net.parameters()) == w
        else:
            oracle.step([[x] for x in xs])
            opt.step(closure)
            close(list(net.parameters()), list(oracle.net.parameters()), "w")


class Failing(nn.Module):
    """The identity, whose backward fails when it is told to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._hook)
        return x

    def _hook(self, grad: Tensor) -> None:
        if self.fails:
            raise KeyError("out of luck")


@pytest.mark.parametrize("sharded", [False, True])
@on_pair
def test_gradients_that_are_thrown_away_are_not_averaged(sharded: bool) -> None:
    """In a step that is not perturbed, when the gradients of the last layer are under way."""
    nets = [nn.Sequential(nn.Linear(5, 4), Failing(), nn.Linear(4, 3)).double() for _ in range(2)]
    opts = [FusedSAM(net.parameters(), rho=RHO, interval=2, **HYPER) for net in nets]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, opt in zip(nets, opts):
        data_parallel(net, opt, bucket_cap_mb=1e-5, check_replicas_every=1, shard_state=sharded)
    torch.manual_seed(dist.get_rank())
    for step in range(4):
        x, other = torch.randn(2, 3, 5, dtype=torch.float64)
        for net, opt in zip(nets, opts):
            if net is nets[0] and not opt.perturb_next:
                net[1].fails = True
                with pytest.raises(KeyError, match="out of luck"):
                    net(other).square().sum().backward()
                net[1].fails = False
                opt.zero_grad()
            two_calls(opt, squares_of(net, x))
        assert snapshot(nets[0].parameters()) == snapshot(nets[1].parameters()), step
