"""The base optimizer's state, a part of it on each rank: bits, size, checkpoints, interrupts, what is refused."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CLIP_RTOL, HYPER, RHO, batches, bits, closure_for, small_net, snapshot
from rank_oracle import Oracle, close, loss_of, squares_of, steps
from ranks import Ranks, on_four, on_pair
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from fused_sam import FusedSAM
from fused_sam.distributed import data_parallel, zero

BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "plain": (SGD, {"lr": 0.13, "weight_decay": 0.017}),
    "nesterov": (SGD, HYPER | {"nesterov": True}),
    "dampening": (SGD, HYPER | {"dampening": 0.3}),
    "amsgrad": (Adam, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.017, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.013, "weight_decay": 0.17}),
    # Not fused: torch's own step, on the same pieces.
    "tensor betas": (Adam, {"lr": 0.013, "betas": (torch.tensor(0.8), torch.tensor(0.97)), "foreach": False}),
}
SMALL = 0.0005  # MiB: several buckets
State = dict[str, Any]


def flat_state(state_dict: State) -> dict[tuple[int, str], Any]:
    return {
        (i, key): (bits(x), x.shape, x.dtype) if isinstance(x, Tensor) else x
        for i, entries in state_dict["state"].items()
        for key, x in entries.items()
    }


def elements(opt: FusedSAM) -> int:
    """Return how many elements the state has, counts of steps aside."""
    return sum(x.numel() for s in opt.state.values() for key, x in s.items() if key != "step")


def optimizer_for(net: nn.Module, base: str) -> FusedSAM:
    kind, options = BASES[base]
    return FusedSAM(net.parameters(), kind, rho=RHO, **options)


ORACLES = {"nesterov": {"base": "sgd"}, "amsgrad": {"base": "adam"}}


def oracle_for(net: nn.Module, base: str) -> Oracle:
    return Oracle(net, 1, rho=RHO, **ORACLES[base], **BASES[base][1])


class Odd(nn.Module):
    """Parameters of none, one and many elements, of two dtypes, transposed and in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(0,), (), (1,), (3,), (17, 5), (61, 41), (7,)]
        self.ps = nn.ParameterList([torch.randn(s) for s in shapes])
        self.ps.append(torch.randn(9, 4).t())
        self.ps.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.ps.append(torch.randn(29, 3).bfloat16())

    def forward(self, factors: list[Tensor]) -> Tensor:
        return sum(((f * p * p).sum().float() for p, f in zip(self.ps, factors)), torch.zeros(()))


@pytest.mark.parametrize(
    ("base", "m", "cap"),
    [
        *((base, "rank", SMALL) for base in BASES),
        *((base, "rank", cap) for base in ("nesterov", "amsgrad") for cap in (1e-5, 25.0)),
        ("nesterov", "world", 1e-5),
    ],
)
@on_pair
def test_weights_and_state_have_the_bits_of_whole_state(base: str, m: Any, cap: float) -> None:
    """Whole and sharded state after the same steps."""
    kind, options = BASES[base]
    seen = []
    for shard in (False, True):
        torch.manual_seed(0)
        net = Odd()
        ascent = {"rho": RHO, "adaptive": True, "eta": 0.01, "interval": 2}
        opt = FusedSAM(net.parameters(), kind, **ascent, **copy.deepcopy(options))
        handle = data_parallel(net, opt, m_sharpness=m, bucket_cap_mb=cap, check_replicas_every=1, shard_state=shard)
        for step in range(5):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            factors = [torch.rand(p.shape, generator=generator).to(p.dtype) for p in net.ps]
            opt.step(lambda factors=factors, net=net: net(factors).backward())
        saved = handle.consolidate_state_dict(to=1) if shard else opt.state_dict()
        assert (saved is not None) == (not shard or dist.get_rank() == 1)
        seen.append((snapshot(net.parameters()), saved))
    assert seen[0][0] == seen[1][0]
    if seen[1][1] is not None:
        assert flat_state(seen[0][1]) == flat_state(seen[1][1])
        groups = [saved["param_groups"] for _, saved in seen]
        assert groups[0] == groups[1]


def holds(ranks_per_e: Any) -> tuple[int, int]:
    net = nn.Sequential(nn.Linear(61, 541), nn.Tanh(), nn.Linear(541, 3))
    opt = FusedSAM(net.parameters(), Adam, rho=RHO, lr=0.013)
    data_parallel(net, opt, m_sharpness=ranks_per_e, shard_state=True, bucket_cap_mb=0.01)
    for _ in range(2):
        opt.step(squares_of(net, torch.randn(4, 61)))
    return elements(opt), 2 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_has_its_part_of_the_state(size: int, pair: Ranks, four: Ranks) -> None:
    """Adam's two averages, one weight matrix of which is 95% of all: whole parameters could not be shared out."""
    held = (pair if size == 2 else four).run(holds, 2)
    (total,) = {total for _, total in held}
    assert sum(n for n, _ in held) == total
    padding = 2 * 2 * 4  # of two buckets, two averages, to blocks of four elements
    assert max(n for n, _ in held) <= math.ceil(total / size) + padding


def saves(path: str, base: str, shard: bool) -> None:
    net = small_net()
    opt = optimizer_for(net, base)
    handle = data_parallel(net, opt, shard_state=shard, bucket_cap_mb=SMALL)
    steps(net, opt, oracle_for(net, base), range(3), 4)
    saved = handle.consolidate_state_dict() if shard else opt.state_dict()
    if dist.get_rank() == 0:
        torch.save({"net": net.state_dict(), "opt": saved}, path)
    dist.barrier()


def goes_on(path: str, base: str, shard: bool, first_loads: bool) -> None:
    size, net = dist.get_world_size(), small_net()
    oracle = oracle_for(net, base)
    for number in range(3):
        torch.manual_seed(number)
        oracle.step([[shard] for shard in batches(4)])
    nn.init.zeros_(net[0].weight)
    saved = torch.load(path, weights_only=True)
    opt = optimizer_for(net, base)
    net.load_state_dict(saved["net"])
    if first_loads:
        opt.load_state_dict(saved["opt"])
    data_parallel(net, opt, shard_state=shard, bucket_cap_mb=SMALL, check_replicas_every=1)
    if not first_loads:
        opt.load_state_dict(saved["opt"])
    steps(net, opt, oracle, range(3, 6), size)


@pytest.mark.parametrize(
    ("before", "after", "base"),
    [
        (True, True, "nesterov"),
        (True, True, "amsgrad"),
        (True, False, "amsgrad"),
        (False, True, "nesterov"),
        (False, False, "nesterov"),
    ],
)
def test_resuming_with_another_number_of_ranks(
    before: bool, after: bool, base: str, four: Ranks, pair: Ranks, tmp_path: Path
) -> None:
    path = str(tmp_path / "saved.pt")
    torch.manual_seed(0)
    four.run(saves, path, base, before)
    for first_loads in (False, True):
        pair.run(goes_on, path, base, after, first_loads)


@on_pair
def test_whole_again() -> None:
    """remove() hands the state out; both ways of going on agree."""
    net = small_net()
    opt, oracle = optimizer_for(net, "nesterov"), oracle_for(net, "nesterov")
    handle = data_parallel(net, opt, shard_state=True, bucket_cap_mb=SMALL)
    steps(net, opt, oracle, range(2), 2)
    w = snapshot(net.parameters())
    loss_of(net, batches(1)[0]).backward()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"^remove\(\) while the weights are perturbed"):
        handle.remove()
    opt.restore()
    assert snapshot(net.parameters()) == w
    for attempt in (opt.state_dict, functools.partial(copy.deepcopy, opt)):
        with pytest.raises(RuntimeError, match=r"with shard_state=True: .* consolidate_state_dict\(\)"):
            attempt()
    handle.remove()
    assert len(opt.state_dict()["state"]) == len(list(net.parameters()))
    copy.deepcopy(opt)
    with pytest.raises(RuntimeError, match="without shard_state"):
        handle.consolidate_state_dict()
    data_parallel(net, opt, check_replicas_every=1)
    steps(net, opt, oracle, range(2, 4), 2)


@pytest.mark.parametrize("scaled", [False, True])
@on_four
def test_clipping(scaled: bool) -> None:
    """max_grad_norm is of the gradient of all ranks' parts; unscale_ finds what it divides."""
    size, rank, seen = dist.get_world_size(), dist.get_rank(), []
    for shard in (False, True):
        torch.manual_seed(0)
        net = small_net()
        opt = FusedSAM(net.parameters(), rho=RHO, max_grad_norm=0.05, **HYPER)
        data_parallel(net, opt, shard_state=shard, bucket_cap_mb=SMALL, check_replicas_every=1)
        scaler = GradScaler("cpu", init_scale=2.0**7, enabled=scaled)
        norms = []
        for step in range(3):
            torch.manual_seed(step)
            batch = batches(size)[rank]
            scaler.scale(loss_of(net, batch)).backward()
            opt.first_step(zero_grad=True)
            scaler.scale(loss_of(net, batch)).backward()
            if step == 1:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            assert opt.last.second_grad_norm is not None
            norms.append(opt.last.second_grad_norm)
        seen.append(([p.detach().clone() for p in net.parameters()], norms))
    for a, b in zip(*(norms for _, norms in seen)):
        assert a > 0.05
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)
    for a, b in zip(*(params for params, _ in seen)):
        torch.testing.assert_close(a, b, rtol=CLIP_RTOL, atol=CLIP_RTOL)


@pytest.mark.parametrize("group", ["all", "one"])
@on_four
def test_a_rank_without_a_share(group: str) -> None:
    """Three weights, which make one share: other ranks update nothing, but take part. Or a group of one rank."""
    rank, size, weights = dist.get_rank(), dist.get_world_size(), []
    alone = [dist.new_group([r]) for r in range(size)]
    for shard in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(3, 1, bias=False)
        opt = FusedSAM(net.parameters(), AdamW, rho=RHO, lr=0.013, max_grad_norm=0.05)
        options = {"process_group": alone[rank]} if group == "one" else {"check_replicas_every": 1}
        handle = data_parallel(net, opt, shard_state=shard, **options)  # type: ignore[arg-type]
        scaler = GradScaler("cpu", init_scale=2.0**7)
        for step in range(4):
            x = torch.randn(5, 3)
            for number in (1, 2):
                factor = math.inf if (step, number) == (2, 2) and rank in (1, 2) else 1.0
                (scaler.scale(net(x + rank).square().mean()) * factor).backward()
                if number == 1:
                    opt.first_step(zero_grad=True)
            if step == 3:
                with pytest.raises(RuntimeError, match=r"while the weights are perturbed"):
                    handle.consolidate_state_dict() if shard else opt.state_dict()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        owner = not shard or rank == 0 or group == "one"
        assert elements(opt) == (6 if owner else 0)
        handle.remove()
        assert elements(opt) == 6
        weights.append((net.weight.detach().clone(), scaler.get_scale()))
    torch.testing.assert_close(*(w for w, _ in weights), rtol=CLIP_RTOL, atol=CLIP_RTOL)
    assert weights[0][1] == weights[1][1] == (2.0**7 if group == "one" and rank not in (1, 2) else 2.0**6)


@on_pair
def test_what_is_in_p_grad() -> None:
    """p.grad is the mean in this rank's part and 0 elsewhere: parts of all ranks make the mean."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = small_net()
    opt = FusedSAM(net.parameters(), rho=RHO, start=1, **HYPER)
    data_parallel(net, opt, shard_state=True, bucket_cap_mb=SMALL)
    shards = batches(size)
    means = []
    for batch in shards:
        loss_of(twin := copy.deepcopy(net), batch).backward()
        means.append([p.grad for p in twin.parameters()])
    loss_of(net, shards[rank]).backward()
    for p, *grads in zip(net.parameters(), *means):
        mean, joined = torch.stack(grads).mean(0), p.grad.clone()
        assert bool(((p.grad == 0) | ((p.grad - mean).abs() < 1e-14)).all())
        dist.all_reduce(joined)
        torch.testing.assert_close(joined, mean)
    with pytest.raises(RuntimeError, match=r"^Invalid second backward before a step .* no_sync\(\)"):
        loss_of(net, shards[rank]).backward()
    opt.restore()  # of what this backward has begun
    opt.zero_grad()
    w = snapshot(net.parameters())
    for _ in range(2):  # what is left in place and set to zero is not taken for a part of a mean
        loss_of(net, shards[rank]).backward()
        opt.step() if not opt.perturb_next else opt.first_step(zero_grad=True)
        opt.zero_grad(set_to_none=False)
    opt.restore()
    assert snapshot(net.parameters()) != w


def sends_frozen() -> list[int]:
    """The backbone is frozen, then thawed: elements that a step scatters and gathers."""
    from bench.ranks.counts import count

    net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 4, bias=False))
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, shard_state=True, bucket_cap_mb=1e-5)
    seen = []
    for trained in (False, True):
        net[0].requires_grad_(trained)
        w = bits(net[0].weight)
        counted = count(lambda: opt.step(closure_for(net, (torch.ones(2, 16), torch.tensor([0, 1])))))
        assert (bits(net[0].weight) == w) is not trained
        seen.append(sum(size for name, (_, size) in counted.items()))
    return seen


def test_frozen_buckets_are_not_sent(pair: Ranks) -> None:
    for frozen, thawed in pair.run(sends_frozen):
        assert thawed > frozen + 2 * 16 * 32 / 2
        assert frozen < 16 * 32


# What is interrupted, and whether the step is made nevertheless.
MOMENTS = {"all_gather": False, "_take_over": True}


@pytest.mark.parametrize("moment", MOMENTS)
@on_pair
def test_a_step_is_made_wholly_or_not_at_all(moment: str) -> None:
    """All ranks are interrupted once: weights and state are as before the step, or after it, and later steps right."""
    size, net = dist.get_world_size(), small_net()
    opt, oracle = optimizer_for(net, "amsgrad"), oracle_for(net, "amsgrad")
    handle = data_parallel(net, opt, shard_state=True, bucket_cap_mb=SMALL, check_replicas_every=1)
    there, calls = getattr(zero, moment), 0

    def once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt("mishap")
        return there(*args)

    for first in (0, 3):  # without state and with some
        before = snapshot(net.parameters()), flat_state(handle.consolidate_state_dict(to=None) or {})
        setattr(zero, moment, once)
        calls = 0
        torch.manual_seed(first)
        shards = batches(size)
        with pytest.raises(KeyboardInterrupt, match="mishap"):
            opt.step(closure_for(net, shards[dist.get_rank()]))
        setattr(zero, moment, there)
        assert not opt.perturbed
        after = snapshot(net.parameters()), flat_state(handle.consolidate_state_dict(to=None) or {})
        assert (before != after) is MOMENTS[moment]
        if MOMENTS[moment]:
            oracle.step([[shard] for shard in shards])
            close(list(net.parameters()), list(oracle.net.parameters()), "w after the interrupt")
        steps(net, opt, oracle, range(first + 1, first + 3), size)
