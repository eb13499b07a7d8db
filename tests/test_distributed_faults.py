"""What goes wrong on one rank: overflow, exceptions, a rank that is lost; and the resumption with fewer ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, RHO, batches, bits, closure_for, small_net, snapshot
from rank_oracle import WRAPS, Oracle, close, joined, loss_of, wrapped
from ranks import Ranks
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel


def state_of(opt: torch.optim.Optimizer) -> list[bytes]:
    return [bits(v) for s in opt.state.values() for _, v in sorted(s.items()) if isinstance(v, Tensor)]


def overflows(wrap: str, m: str, base: str, failing_pass: int, p: float) -> None:
    """Under a scaler rank 1's gradient is infinite, in the third of four steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = small_net(torch.float32)
    kind, options = {"sgd": (SGD, HYPER), "adamw": (AdamW, {"lr": 0.013, "fused": True})}[base]
    opt = FusedSAM(net.parameters(), kind, rho=RHO, p=p, **options)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1)
    scaler = GradScaler("cpu", init_scale=2.0**8)
    scales = []
    for step in range(4):
        batch = batches(size, torch.float32)[rank]
        before = snapshot(net.parameters()), state_of(opt)
        for number in (1, 2):
            factor = math.inf if (step, number, rank) == (2, failing_pass, 1) else 1.0
            (scaler.scale(loss_of(model, batch)) * factor).backward()
            if number == 1:
                opt.first_step(zero_grad=True)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        opt.zero_grad()
        assert (before == (snapshot(net.parameters()), state_of(opt))) == (step == 2)
    # Of the first pass the scaler does not know; what overflows there alone will not in the next step.
    assert scales == ([2.0**8, 2.0**8, 2.0**7, 2.0**7] if failing_pass == 2 else [2.0**8] * 4)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_an_overflow_on_one_rank_skips_the_step_on_all(wrap: str, base: str, failing_pass: int, pair: Ranks) -> None:
    pair.run(overflows, wrap, "rank", base, failing_pass, 2.0)


def test_an_overflow_where_ranks_share_an_e_or_take_no_norm(pair: Ranks) -> None:
    pair.run(overflows, "plain", "world", "sgd", 1, 2.0)
    pair.run(overflows, "plain", "rank", "sgd", 2, math.inf)


def scales_where_there_is_nothing(wrap: str, m: str) -> None:
    """Under a scaler rank 0 has no gradient in pass 2 and nothing to look at; in the second step the mean overflows."""
    rank = dist.get_rank()
    net = small_net(torch.float32)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    joined(net, opt, wrap, m_sharpness=m, check_replicas_every=1)
    scaler = GradScaler("cpu", init_scale=4.0)
    for step in range(2):
        before = snapshot(net.parameters())
        batch = batches(1, torch.float32)[0]
        scaler.scale(loss_of(net, batch)).backward()
        opt.first_step(zero_grad=True)
        if rank == 1:
            (scaler.scale(loss_of(net, batch)) * (1.0 if step == 0 else math.inf)).backward()
        scaler.step(opt)
        opt.zero_grad()
        assert (snapshot(net.parameters()) == before) == (step == 1)
        if rank == 1:
            scaler.update()
        scaler = GradScaler("cpu", init_scale=4.0)


@pytest.mark.parametrize("wrap", ["plain", "sharded"])
def test_a_rank_without_a_second_gradient_under_a_scaler(wrap: str, pair: Ranks) -> None:
    pair.run(scales_where_there_is_nothing, wrap, "rank")


def is_not_finite(wrap: str, failing_pass: int) -> None:
    """Without a scaler: a first gradient that is NaN moves nothing on its rank; a second one makes all ranks NaN."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = small_net()
    oracle = Oracle(net, 1, rho=RHO, **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, check_replicas_every=1)
    calls = [0]

    def backward(net: nn.Module, owner: int, batch: Any, number: int) -> Tensor:
        loss = loss_of(net, batch) * (math.nan if owner == 1 and number == failing_pass else 1.0)
        loss.backward()
        return loss

    shards = batches(size)
    numbers = dict.fromkeys(range(size), 0)

    def replay(item: tuple[int, Any]) -> None:
        numbers[item[0]] += 1
        backward(oracle.net, *item, numbers[item[0]])

    oracle.backward = replay
    oracle.step([[(r, shard)] for r, shard in enumerate(shards)])

    def closure() -> Tensor:
        calls[0] += 1
        return backward(model, rank, shards[rank], calls[0])

    opt.step(closure)
    if failing_pass == 1:
        close(list(net.parameters()), list(oracle.net.parameters()), "w")
    else:
        assert all(p.isnan().all() for p in net.parameters())


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_a_gradient_that_is_not_finite(wrap: str, failing_pass: int, pair: Ranks) -> None:
    pair.run(is_not_finite, wrap, failing_pass)


def raises_everywhere(wrap: str, m: str, moment: str) -> None:
    """All ranks raise in pass 2; weights come back, and later steps follow the oracle, which made no such step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = small_net()
    oracle = Oracle(net, size if m == "world" else 1, rho=RHO, **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1, bucket_cap_mb=1e-4)
    seen = 0

    def failing(grad: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt("mishap")
        return grad

    for step in range(4):
        shards = batches(size)
        run = closure_for(model, shards[rank])
        if step == 0:
            before = snapshot(net.parameters())

            def unlucky(run: Any = run) -> Any:
                if moment == "in backward":
                    net[0].weight.register_hook(failing)  # the last gradient that is made
                loss = run()
                if moment == "after backward":
                    failing(loss)
                return loss

            with pytest.raises(KeyboardInterrupt, match="mishap"):
                opt.step(unlucky)
            assert snapshot(net.parameters()) == before
            opt.zero_grad()
        else:
            oracle.step([[shard] for shard in shards])
            opt.step(run)
            close(list(net.parameters()), list(oracle.net.parameters()), f"w after step {step}")


@pytest.mark.parametrize(("wrap", "m"), [("plain", "rank"), ("plain", "world"), ("sharded", "rank")])
@pytest.mark.parametrize("moment", ["after backward", "in backward"])
def test_an_exception_on_all_ranks(wrap: str, m: str, moment: str, pair: Ranks) -> None:
    pair.run(raises_everywhere, wrap, m, moment)


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def loses_a_rank(wrap: str, form: str, failing_pass: int, path: str) -> None:
    """Rank 1 dies in a pass of the second step; rank 0 raises with its weights back, saves, and loads."""
    rank = dist.get_rank()
    net = small_net()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap)
    data_parallel(model, opt)
    opt.step(closure_for(model, batches(2)[rank]))
    w, calls, batch = snapshot(net.parameters()), 0, batches(2)[rank]

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(model, batch)
        if rank == 1 and calls == failing_pass:
            os._exit(1)
        loss.backward()
        return loss

    def step() -> None:
        if form == "closure":
            opt.step(closure)
            return
        try:
            closure()
            opt.first_step(zero_grad=True)
            closure()
            opt.step()
        except RuntimeError:
            opt.restore()
            raise

    with pytest.raises(RuntimeError, match="by peer"):  # not a timeout: it does not wait for the dead
        step()
    assert not opt.perturbed
    assert snapshot(net.parameters()) == w
    torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    twin = small_net()
    twin_opt = FusedSAM(twin.parameters(), rho=RHO, **HYPER)
    twin.load_state_dict(saved["net"])
    twin_opt.load_state_dict(saved["opt"])
    assert snapshot(twin.parameters()) == w
    assert state_of(twin_opt) == state_of(opt)


@pytest.mark.parametrize(
    ("wrap", "form", "failing_pass"), [("plain", "closure", 2), ("ddp", "closure", 1), ("plain", "two calls", 1)]
)
def test_a_rank_that_dies(wrap: str, form: str, failing_pass: int, doomed: Ranks, tmp_path: Path) -> None:
    (ok, error), (lost, _) = doomed.outcomes(loses_a_rank, wrap, form, failing_pass, str(tmp_path / "saved.pt"))
    assert ok, error
    assert not lost


def waits_for_a_rank(m: str) -> None:
    """Rank 1 does not come to the collectives of a step: rank 0 raises after the timeout of the group."""
    rank, group = dist.get_rank(), dist.new_group()
    net = small_net()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, m_sharpness=m, process_group=group)
    w = snapshot(net.parameters())
    if rank == 0:
        # From here on: before, rank 1 does come, however late a busy machine lets it.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
        with pytest.raises(RuntimeError, match="imed out"):
            opt.step(closure_for(net, batches(2)[rank]))
        assert snapshot(net.parameters()) == w
        assert not opt.perturbed
    dist.barrier()


@pytest.mark.parametrize("m", ["rank", "world"])
def test_a_rank_that_does_not_come(m: str, pair: Ranks) -> None:
    pair.run(waits_for_a_rank, m)


def shards_of(step: int, size: int) -> list[Any]:
    torch.manual_seed(step)
    return batches(size)


def trains_and_saves(path: str) -> None:
    net = small_net()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, m_sharpness=2)
    for step in range(3):
        opt.step(closure_for(net, shards_of(step, 4)[dist.get_rank()]))
    if dist.get_rank() == 0:
        torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, path)
    dist.barrier()


def resumes(path: str) -> None:
    net = small_net()
    oracle = Oracle(net, 2, rho=RHO, **HYPER)
    for step in range(3):
        oracle.step([[shard] for shard in shards_of(step, 4)])
    nn.init.zeros_(net[0].weight)
    saved = torch.load(path, weights_only=True)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    net.load_state_dict(saved["net"])
    opt.load_state_dict(saved["opt"])
    data_parallel(net, opt, m_sharpness="rank", check_replicas_every=1)
    oracle.ranks_per_e = 1
    for step in range(3, 6):
        shards = shards_of(step, 2)
        oracle.step([[shard] for shard in shards])
        opt.step(closure_for(net, shards[dist.get_rank()]))
        close(list(net.parameters()), list(oracle.net.parameters()), f"w after step {step}")


def test_resuming_with_another_number_of_ranks(four: Ranks, pair: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.pt")
    four.run(trains_and_saves, path)
    pair.run(resumes, path)
