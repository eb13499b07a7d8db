"""Sharded state: interrupts, ranks that are lost, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, batches, bits, closure_for, small_net, snapshot
from rank_oracle import Oracle, close
from ranks import Ranks
from sharded_subjects import SMALL, State, flat_state, optimizer_for, oracle_for, steps
from torch import Tensor, nn
from torch.optim import Adagrad

from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel, sharded_state

MOMENTS = {
    "gathering": (sharded_state, "all_gather", False),
    "taking over": (sharded_state, "_take_over", True),
}


def is_interrupted(moment: str) -> None:
    """All ranks are interrupted once: weights and state are as before the step, or after it, and later steps right."""
    size, net = dist.get_world_size(), small_net()
    owner, name, made = MOMENTS[moment]
    opt, oracle = optimizer_for(net, "amsgrad"), oracle_for(net, "amsgrad")
    handle = data_parallel(net, opt, shard_state=True, bucket_cap_mb=SMALL, check_replicas_every=1)
    there, calls = getattr(owner, name), 0

    def once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt("mishap")
        return there(*args)

    for first in (0, 3):  # without state and with some
        before = snapshot(net.parameters()), flat_state(handle.consolidate_state_dict(to=None) or {})
        setattr(owner, name, once)
        calls = 0
        torch.manual_seed(first)
        shards = batches(size)
        with pytest.raises(KeyboardInterrupt, match="mishap"):
            opt.step(closure_for(net, shards[dist.get_rank()]))
        setattr(owner, name, there)
        assert not opt.perturbed
        after = snapshot(net.parameters()), flat_state(handle.consolidate_state_dict(to=None) or {})
        assert (before != after) is made
        if made:
            oracle.step([[shard] for shard in shards])
            close(list(net.parameters()), list(oracle.net.parameters()), "w after the interrupt")
        steps(net, opt, oracle, range(first + 1, first + 3), size)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_step_is_made_wholly_or_not_at_all(moment: str, pair: Ranks) -> None:
    pair.run(is_interrupted, moment)


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def loses_a_rank(moment: str) -> None:
    """Rank 1 dies in the second step; rank 0 raises with weights and its part of the state as before."""
    rank, net = dist.get_rank(), small_net()
    opt = optimizer_for(net, "nesterov")
    data_parallel(net, opt, shard_state=True, bucket_cap_mb=SMALL)
    opt.step(closure_for(net, batches(2)[rank]))
    w, state = snapshot(net.parameters()), [bits(s["momentum_buffer"]) for s in opt.state.values()]
    calls, batch = 0, batches(2)[rank]

    def dies(*args: Any) -> Any:
        os._exit(1)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and moment == f"pass {calls}":
            dies()
        return closure_for(net, batch)()

    if rank == 1 and moment == "gather":
        sharded_state.all_gather = dies
    with pytest.raises(RuntimeError, match="by peer"):  # not a timeout: it does not wait for the dead
        opt.step(closure)
    assert not opt.perturbed
    assert snapshot(net.parameters()) == w
    assert [bits(s["momentum_buffer"]) for s in opt.state.values()] == state


@pytest.mark.parametrize("moment", ["pass 1", "pass 2", "gather"])
def test_a_rank_that_dies(moment: str, doomed: Ranks) -> None:
    (ok, error), (lost, _) = doomed.outcomes(loses_a_rank, moment)
    assert ok, error
    assert not lost


def refuses() -> None:
    net = small_net()
    for options, match in (
        ({"direction": "momentum", **HYPER}, "direction='momentum' with shard_state"),
        ({"looksam_alpha": 0.5, "interval": 2, **HYPER}, "looksam_alpha=0.5 with shard_state"),
        ({"master_weights": True, **HYPER}, "master_weights=True with shard_state"),
        ({"telemetry": True, **HYPER}, "telemetry=True with shard_state"),
        ({"capturable": True, **HYPER}, "capturable=True with shard_state"),
        ({"base_optimizer": Adagrad}, "base_optimizer=Adagrad with shard_state"),
    ):
        opt = FusedSAM(net.parameters(), **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"^Invalid {match}"):
            data_parallel(net, opt, m_sharpness="world", shard_state=True)
    opt = FusedSAM(net.parameters(), **HYPER)
    with pytest.raises(ValueError, match=r"^Invalid shard_state=1\. Must be"):
        data_parallel(net, opt, shard_state=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Invalid shard_state=True with a DistributedDataParallel"):
        data_parallel(nn.parallel.DistributedDataParallel(net), opt, shard_state=True)
    gappy = nn.Parameter(torch.zeros(9, 4)[:, 1])
    with pytest.raises(ValueError, match=r"^Invalid parameter 0 of the optimizer \(shape \[9\]\) with shard_state"):
        data_parallel(net, FusedSAM([gappy], **HYPER), shard_state=True)
    with pytest.raises(ValueError, match=r"^Invalid parameters: number 0 is m_sharpness=1"):
        data_parallel(net, opt, shard_state=dist.get_rank() == 1)
    handle = data_parallel(net, opt, shard_state=True)
    with pytest.raises(ValueError, match=r"^Invalid parameter 6 of the optimizer"):
        opt.add_param_group({"params": [gappy]})
    steps(net, opt, Oracle(net, 1, rho=0.05, **HYPER), range(1), 2)
    saved: State = handle.consolidate_state_dict(to=None) or {}
    saved["state"][0]["momentum_buffer"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"^Invalid momentum_buffer of shape \[2\]"):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^Invalid to=7\. Must be"):
        handle.consolidate_state_dict(to=7)


def test_what_is_refused(pair: Ranks) -> None:
    pair.run(refuses)
