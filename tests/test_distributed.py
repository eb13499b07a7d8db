"""m-sharpness over processes: each rank's e from its own data, second gradients averaged, against one process."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, RHO, batches, bits, small_net
from rank_oracle import WRAP_OPTIONS, WRAPS, Batch, close, joined, loss_of, pair_of, squares_of, two_calls, wrapped
from ranks import Ranks, on_pair
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fused_sam import FusedSAM
from fused_sam.batchnorm import first_pass_only
from fused_sam.distributed import data_parallel

SAM_OPTIONS: dict[str, dict[str, Any]] = {
    "sam": {},
    "asam": {"adaptive": True, "eta": 0.01},
    "inf": {"p": float("inf")},
    "one": {"p": 1.0},
    "adam": {"base": "adam", "lr": 0.013, "weight_decay": 0.017},
    "three ascents": {"ascent_steps": 3},
    "interval": {"interval": 2, "start": 1},
    "interval from 0": {"interval": 2},
}
FORMS = ["closure", "two calls"]
TWO_RANKS: list[tuple[str, ...]] = [
    *product(WRAPS, ["rank", "world"], FORMS, ["default"], ["sam"]),
    *product(["ddp"], ["rank"], FORMS, [option for option in WRAP_OPTIONS if option != "default"], ["sam"]),
    *product(["ddp"], ["rank", "world"], FORMS, ["default"], ["three ascents"]),
    # Of the update a rank with a part of the state knows less, of the ascent as much.
    *product(["plain"], ["rank"], ["closure"], ["default"], ["asam", "inf", "one", "adam", "three ascents"]),
    *product(["plain"], ["world"], ["closure"], ["default"], ["inf", "three ascents"]),
    *product(["sharded"], ["rank"], ["closure"], ["default"], ["adam", "three ascents"]),
    # Steps that are not perturbed. A static graph is learnt in either kind of step.
    *product(WRAPS, ["rank"], ["two calls"], ["default"], ["interval"]),
    *product(["ddp"], ["rank"], ["two calls"], ["static"], ["interval", "interval from 0"]),
]


def follows_the_oracle(
    wrap: str, m: Any, form: str = "closure", wrap_option: str = "default", sam: str = "sam"
) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    net, oracle, opt = pair_of(m, **SAM_OPTIONS[sam])
    data = [batches(size) for _ in range(5)]
    if wrap != "ddp" and rank > 0:
        with torch.no_grad():  # to be replaced by those of rank 0
            for p in net.parameters():
                p.mul_(2)
    model = wrapped(net, wrap, **WRAP_OPTIONS[wrap_option])
    joined(model, opt, wrap, m_sharpness=m, check_replicas_every=2, bucket_cap_mb=0.0005)
    seen: list[Tensor] = []

    def backward(batch: Batch) -> Tensor:
        seen[:] = [p.detach().clone() for p in net.parameters()]
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    for step, shards in enumerate(data):
        oracle.step([[shard] for shard in shards], perturb=opt.perturb_next)
        run = functools.partial(backward, shards[rank])
        if form == "closure":
            opt.step(run)
        else:
            two_calls(opt, run)
        close(seen, oracle.displaced[rank], f"w + e of step {step}")
        close(list(net.parameters()), list(oracle.net.parameters()), f"w after step {step}")


@pytest.mark.parametrize(("wrap", "m", "form", "wrap_option", "sam"), TWO_RANKS)
def test_two_ranks_follow_one_process(wrap: str, m: str, form: str, wrap_option: str, sam: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, wrap, m, form, wrap_option, sam)


@pytest.mark.parametrize(
    ("wrap", "m"), [("ddp", 2), ("plain", 2), ("sharded", 2), ("sharded", "rank"), ("ddp", "world")]
)
def test_four_ranks_follow_one_process(wrap: str, m: Any, four: Ranks) -> None:
    four.run(follows_the_oracle, wrap, m)


def displacement(with_data_parallel: bool) -> tuple[bytes, int]:
    """What this rank adds to the weights, and how many warnings there were in three steps under DDP."""
    net, _, opt = pair_of("rank")
    model = DistributedDataParallel(net)
    if with_data_parallel:
        data_parallel(model, opt)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("fused_sam").addHandler(handler)
    try:
        for _ in range(3):
            w = torch.cat([p.detach().flatten() for p in net.parameters()])
            loss = loss_of(model, batches(dist.get_world_size())[dist.get_rank()])
            # The recipe that everybody copies has the forward outside.
            with contextlib.nullcontext() if with_data_parallel else model.no_sync():
                loss.backward()
            opt.first_step(zero_grad=True)
            e = torch.cat([p.detach().flatten() for p in net.parameters()]) - w
            opt.restore()
    finally:
        logging.getLogger("fused_sam").removeHandler(handler)
    return bits(e), sum(r.levelno == logging.WARNING and "data_parallel" in r.getMessage() for r in records)


def test_ranks_have_perturbations_of_their_own_but_by_the_usual_recipe_which_says_so(pair: Ranks) -> None:
    (a, warned_a), (b, warned_b) = pair.run(displacement, False)
    assert a == b
    assert warned_a == warned_b == 1
    (a, warned_a), (b, warned_b) = pair.run(displacement, True)
    assert a != b
    assert warned_a == warned_b == 0


@on_pair
def test_a_communication_hook_sees_second_gradients_only() -> None:
    """Calls of a hook that compresses, after each pass of three steps."""
    net = small_net(torch.float32)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = DistributedDataParallel(net)
    calls = [0]

    def compress(state, bucket):  # DDP reads annotations, and those of today as strings
        calls[0] += 1
        return fp16_compress_hook(state, bucket)

    model.register_comm_hook(None, compress)
    data_parallel(model, opt, check_replicas_every=1)
    seen = []
    for _ in range(3):
        batch = batches(dist.get_world_size(), torch.float32)[dist.get_rank()]
        loss_of(model, batch).backward()
        seen.append(calls[0])
        opt.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        seen.append(calls[0])
        seconds = [p.grad.clone() for p in net.parameters()]
        assert all(torch.equal(g, g.half().float()) for g in seconds), "not what the hook returns"
        opt.step()
        opt.zero_grad()
    assert seen == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("wrap", WRAPS)
@on_pair
def test_statistics_of_batchnorm_count_each_batch_once(wrap: str) -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=0.37), nn.Tanh(), nn.Linear(6, 3)).double()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap)
    joined(model, opt, wrap, check_replicas_every=1)
    first_pass_only(net, opt)

    for _ in range(4):
        x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
        once = copy.deepcopy(net)
        if wrap == "ddp":  # which broadcasts them before the first forward
            for b in once.buffers():
                dist.broadcast(b, 0)
        once(x)
        opt.step(squares_of(model, x))
        for a, b in zip(net.buffers(), once.buffers()):
            assert torch.equal(a, b)
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()


@on_pair
def test_a_forward_that_raises_leaves_the_model_as_it_was() -> None:
    net, _, opt = pair_of("rank")
    model = DistributedDataParallel(net)
    data_parallel(model, opt)
    with pytest.raises(RuntimeError, match=r"shape|size|channel"):
        model(torch.zeros(2, 9, dtype=torch.float64))
    assert model.require_backward_grad_sync
    loss_of(model, batches(1)[0]).backward()
    assert model.require_backward_grad_sync
