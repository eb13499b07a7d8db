"""What goes wrong on one rank: overflow, exceptions, a rank that is lost."""

from __future__ import annotations

import functools
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, RHO, batches, closure_for, small_net, snapshot
from rank_oracle import WRAPS, joined, loss_of, pair_of, state_of, steps, two_calls, wrapped
from ranks import Ranks, on_pair
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel, zero


@pytest.mark.parametrize(
    ("wrap", "m", "base", "failing_pass", "p"),
    [
        ("ddp", "rank", "sgd", 1, 2.0),
        ("ddp", "rank", "adamw", 2, 2.0),
        ("plain", "rank", "adamw", 1, 2.0),
        ("plain", "rank", "sgd", 2, 2.0),
        ("sharded", "rank", "sgd", 1, 2.0),
        ("sharded", "rank", "sgd", 2, 2.0),
        ("sharded", "rank", "adamw", 2, 2.0),
        ("plain", "world", "sgd", 1, 2.0),  # ranks share an e
        ("plain", "rank", "sgd", 2, math.inf),  # there is no norm
    ],
)
@on_pair
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    wrap: str, m: str, base: str, failing_pass: int, p: float
) -> None:
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


@pytest.mark.parametrize("wrap", ["plain", "sharded"])
@on_pair
def test_a_rank_without_a_second_gradient_under_a_scaler(wrap: str) -> None:
    """Under a scaler rank 0 has no gradient in pass 2 and nothing to look at; in the second step the mean overflows."""
    rank = dist.get_rank()
    net = small_net(torch.float32)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    joined(net, opt, wrap, check_replicas_every=1)
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


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("failing_pass", [1, 2])
@on_pair
def test_a_gradient_that_is_not_finite(wrap: str, failing_pass: int) -> None:
    """Without a scaler: a first gradient that is NaN moves nothing on its rank; a second one makes all ranks NaN."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net, _, opt = pair_of("rank")
    model = wrapped(net, wrap)
    joined(model, opt, wrap, check_replicas_every=1)
    batch, seen = batches(size)[rank], []

    def closure() -> Tensor:
        seen.append(snapshot(net.parameters()))
        loss = loss_of(model, batch) * (math.nan if rank == 1 and len(seen) == failing_pass else 1.0)
        loss.backward()
        return loss

    opt.step(closure)
    assert (seen[0] == seen[1]) is (rank == 1 and failing_pass == 1)
    assert snapshot(net.parameters()) != seen[0]
    for p in net.parameters():
        assert p.isfinite().all() if failing_pass == 1 else p.isnan().all()


@pytest.mark.parametrize(
    ("wrap", "m", "moment"),
    [
        ("plain", "rank", "after backward"),
        ("plain", "world", "in backward"),
        ("sharded", "rank", "after backward"),
        ("sharded", "rank", "in backward"),
    ],
)
@on_pair
def test_an_exception_on_all_ranks(wrap: str, m: str, moment: str) -> None:
    """All ranks raise in pass 2; weights come back, and later steps follow the oracle, which made no such step."""
    size = dist.get_world_size()
    net, oracle, opt = pair_of(m)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, m_sharpness=m, check_replicas_every=1, bucket_cap_mb=1e-4)
    seen = 0

    def failing(grad: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == 2:
            raise KeyboardInterrupt("mishap")
        return grad

    before, run = snapshot(net.parameters()), closure_for(model, batches(size)[dist.get_rank()])

    def unlucky() -> Tensor:
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
    steps(model, opt, oracle, range(3), size)


def loses_a_rank(wrap: str, form: str, moment: str, path: str) -> None:
    """Rank 1 dies in the second step; rank 0 raises with weights and state as before, saves, and loads."""
    rank, net = dist.get_rank(), small_net()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, bucket_cap_mb=0.0005)
    opt.step(closure_for(model, batches(2)[rank]))
    before, calls, batch = (snapshot(net.parameters()), state_of(opt)), 0, batches(2)[rank]

    def dies(*args: Any) -> Any:
        os._exit(1)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and moment == f"pass {calls}":
            dies()
        return closure_for(model, batch)()

    if rank == 1 and moment == "gather":
        zero.all_gather = dies
    step = functools.partial(opt.step if form == "closure" else functools.partial(two_calls, opt), closure)
    with pytest.raises(RuntimeError, match="by peer"):  # not a timeout: it does not wait for the dead
        step()
    if form == "two calls":
        opt.restore()
    assert not opt.perturbed
    assert (snapshot(net.parameters()), state_of(opt)) == before
    if wrap != "sharded":  # whose state each rank has a part of
        torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, path)
        saved, twin = torch.load(path, weights_only=True), small_net()
        twin_opt = FusedSAM(twin.parameters(), rho=RHO, **HYPER)
        twin.load_state_dict(saved["net"])
        twin_opt.load_state_dict(saved["opt"])
        assert (snapshot(twin.parameters()), state_of(twin_opt)) == before


@pytest.mark.parametrize(
    ("wrap", "form", "moment"),
    [
        ("plain", "closure", "pass 2"),
        ("plain", "two calls", "pass 1"),
        ("ddp", "closure", "pass 1"),
        ("sharded", "closure", "pass 2"),
        ("sharded", "closure", "gather"),
    ],
)
def test_a_rank_that_dies(wrap: str, form: str, moment: str, pair: Ranks, tmp_path: Path) -> None:
    (ok, error), (lost, _) = pair.outcomes(loses_a_rank, wrap, form, moment, str(tmp_path / "saved.pt"))
    assert ok, error
    assert not lost


@pytest.mark.parametrize("m", ["rank", "world"])
@on_pair
def test_a_rank_that_does_not_come(m: str) -> None:
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
