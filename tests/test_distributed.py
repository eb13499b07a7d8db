"""m-sharpness over processes: each rank's e from its own data, second gradients averaged, against one process."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import FLOAT64_RTOL, HYPER, RHO, batches, bits, closure_for, small_net
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from fused_sam import FusedSAM, ReferenceSAM
from fused_sam.batchnorm import first_pass_only
from fused_sam.distributed import data_parallel

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


WRAPS = ["ddp", "plain"]
WRAP_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
}
SAM_OPTIONS: dict[str, dict[str, Any]] = {
    "asam": {"adaptive": True, "eta": 0.01},
    "inf": {"p": float("inf")},
    "one": {"p": 1.0},
    "adam": {"base": "adam", "lr": 0.013, "weight_decay": 0.017},
    "three ascents": {"ascent_steps": 3},
}


def wrapped(net: nn.Module, wrap: str, **options: Any) -> nn.Module:
    return net if wrap == "plain" else DistributedDataParallel(net, **options)


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


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str, atol: float = FLOAT64_RTOL) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, rtol=FLOAT64_RTOL, atol=atol, msg=lambda m, i=i: f"{what}, {i}: {m}")


def follows_the_oracle(
    wrap: str, m: Any, form: str = "closure", wrap_option: str = "default", sam: dict[str, Any] | None = None
) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    net, oracle, opt = pair_of(m, **(sam or {}))
    data = [batches(size) for _ in range(5)]
    if wrap == "plain" and rank > 0:
        with torch.no_grad():  # to be replaced by those of rank 0
            for p in net.parameters():
                p.mul_(2)
    model = wrapped(net, wrap, **WRAP_OPTIONS[wrap_option])
    data_parallel(model, opt, m_sharpness=m, check_replicas_every=2, bucket_cap_mb=0.0005)
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


@pytest.mark.parametrize("m", ["rank", "world"])
@pytest.mark.parametrize("form", ["closure", "two calls"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_two_ranks_follow_one_process(wrap: str, form: str, m: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, wrap, m, form)


@pytest.mark.parametrize("m", ["rank", 2, "world"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_four_ranks_follow_one_process(wrap: str, m: Any, four: Ranks) -> None:
    four.run(follows_the_oracle, wrap, m)


@pytest.mark.parametrize("option", [o for o in WRAP_OPTIONS if o != "default"])
@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_options_of_the_ddp(option: str, form: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, "ddp", "rank", form, option)


@pytest.mark.parametrize("option", SAM_OPTIONS)
@pytest.mark.parametrize("m", ["rank", "world"])
def test_options_of_sam(option: str, m: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, "plain", m, sam=SAM_OPTIONS[option])


@pytest.mark.parametrize("form", ["closure", "two calls"])
@pytest.mark.parametrize("m", ["rank", "world"])
def test_several_ascents_under_ddp(m: str, form: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, "ddp", m, form, sam=SAM_OPTIONS["three ascents"])


@pytest.mark.parametrize("wrap", WRAPS)
def test_steps_that_are_not_perturbed(wrap: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, wrap, "rank", "two calls", sam={"interval": 2, "start": 1})


@pytest.mark.parametrize("start", [0, 1])
def test_a_static_graph_learnt_in_either_kind_of_step(start: int, pair: Ranks) -> None:
    pair.run(follows_the_oracle, "ddp", "rank", "two calls", "static", {"interval": 2, "start": start})


def accumulates(wrap: str, m: str, silent: str, wrap_option: str = "default") -> None:
    rank, size, k = dist.get_rank(), dist.get_world_size(), 3
    net, oracle, opt = pair_of(m)
    model = wrapped(net, wrap, **WRAP_OPTIONS[wrap_option])
    handle = data_parallel(model, opt, m_sharpness=m, check_replicas_every=1)

    def backwards(micro: Sequence[Batch]) -> None:
        for i, batch in enumerate(micro):
            quiet = {"none": False, "all": True, "all but the last": i < k - 1, "all but the first": i > 0}[silent]
            with handle.no_sync() if quiet else contextlib.nullcontext():
                loss_of(model, batch).backward()

    for _ in range(3):
        shards = [batches(k) for _ in range(size)]
        oracle.step(shards)
        two_calls(opt, functools.partial(backwards, shards[rank]))
        close(list(net.parameters()), list(oracle.net.parameters()), "w")


@pytest.mark.parametrize(
    ("wrap", "silent"),
    # What a DistributedDataParallel has not averaged, nobody does.
    [(w, s) for w in WRAPS for s in ("none", "all but the last")] + [("plain", "all"), ("plain", "all but the first")],
)
@pytest.mark.parametrize("m", ["rank", "world"])
def test_accumulation(wrap: str, m: str, silent: str, pair: Ranks) -> None:
    pair.run(accumulates, wrap, m, silent)


def test_accumulation_in_a_static_graph(pair: Ranks) -> None:
    pair.run(accumulates, "ddp", "rank", "none", "static")


def steps_with_micro_batches(wrap: str, m: Any) -> None:
    rank, size, k = dist.get_rank(), dist.get_world_size(), 3
    net, oracle, opt = pair_of(m)
    model = wrapped(net, wrap)
    data_parallel(model, opt, m_sharpness=m, check_replicas_every=1)

    def backward(batch: Batch) -> Tensor:
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    for _ in range(3):
        data = [batches(size) for _ in range(k)]
        oracle.step([[shard] for shards in data for shard in shards])
        opt.step([functools.partial(backward, shards[rank]) for shards in data])
        close(list(net.parameters()), list(oracle.net.parameters()), "w")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("m", ["rank", "world"])
def test_lists_of_closures(wrap: str, m: str, pair: Ranks) -> None:
    pair.run(steps_with_micro_batches, wrap, m)


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


def test_the_usual_recipe_shares_one_perturbation_and_says_so(pair: Ranks) -> None:
    (a, warned_a), (b, warned_b) = pair.run(displacement, False)
    assert a == b
    assert warned_a == warned_b == 1


def test_ranks_have_perturbations_of_their_own(pair: Ranks) -> None:
    (a, warned_a), (b, warned_b) = pair.run(displacement, True)
    assert a != b
    assert warned_a == warned_b == 0


def counts_reductions() -> list[int]:
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
    return seen


def test_a_communication_hook_sees_second_gradients_only(pair: Ranks) -> None:
    assert pair.run(counts_reductions) == [[0, 1, 1, 2, 2, 3]] * 2


def updates_statistics(wrap: str) -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=0.37), nn.Tanh(), nn.Linear(6, 3)).double()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap)
    data_parallel(model, opt, check_replicas_every=1)
    first_pass_only(net, opt)

    def closure(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
        once = copy.deepcopy(net)
        if wrap == "ddp":  # which broadcasts them before the first forward
            for b in once.buffers():
                dist.broadcast(b, 0)
        once(x)
        opt.step(functools.partial(closure, x))
        for a, b in zip(net.buffers(), once.buffers()):
            assert torch.equal(a, b)
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()


@pytest.mark.parametrize("wrap", WRAPS)
def test_statistics_of_batchnorm_count_each_batch_once(wrap: str, pair: Ranks) -> None:
    pair.run(updates_statistics, wrap)


def raises_in_forward() -> None:
    net, _, opt = pair_of("rank")
    model = DistributedDataParallel(net)
    data_parallel(model, opt)
    with pytest.raises(RuntimeError, match=r"shape|size|channel"):
        model(torch.zeros(2, 9, dtype=torch.float64))
    assert model.require_backward_grad_sync
    loss_of(model, batches(1)[0]).backward()
    assert model.require_backward_grad_sync


def test_a_forward_that_raises_leaves_the_model_as_it_was(pair: Ranks) -> None:
    pair.run(raises_in_forward)


class TwoHeads(nn.Module):
    """The second head has a gradient where it is asked for, the third never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.first(x) + (self.second(x).tanh() if both else 0)


def misses_gradients(wrap: str, m: str) -> None:
    """Rank 0 has no gradient of the second head in odd steps, nobody has one in every fourth."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = TwoHeads().double()
    oracle = Oracle(net, size if m == "world" else 1, rho=RHO, **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    model = wrapped(net, wrap, find_unused_parameters=True) if wrap == "ddp" else net
    data_parallel(model, opt, m_sharpness=m, check_replicas_every=1, bucket_cap_mb=1e-5)
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


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("m", ["rank", "world"])
def test_gradients_that_are_none_on_some_ranks(wrap: str, m: str, pair: Ranks) -> None:
    pair.run(misses_gradients, wrap, m)


def has_nothing_to_learn_from(m: str) -> None:
    """The backward of rank 0 makes no gradient at all, in one pass or both."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net, oracle, opt = pair_of(m)
    data_parallel(net, opt, m_sharpness=m, check_replicas_every=1)
    for _ in range(3):
        shards = batches(size)
        oracle.step([[], *([shard] for shard in shards[1:])])

        def backward(shards: Sequence[Batch] = shards) -> None:
            if rank > 0:
                loss_of(net, shards[rank]).backward()

        two_calls(opt, backward)
        close(list(net.parameters()), list(oracle.net.parameters()), "w")


@pytest.mark.parametrize("m", ["rank", "world"])
def test_a_rank_without_examples(m: str, pair: Ranks) -> None:
    pair.run(has_nothing_to_learn_from, m)


def trains_in_two_worlds() -> bytes:
    """Ranks 0, 1 and 2, 3 train apart from each other; the latter share an e."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    net = small_net()
    oracle = Oracle(net, 1 if rank < 2 else 2, rho=RHO, **HYPER)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, process_group=mine, m_sharpness=1 if rank < 2 else 2, check_replicas_every=1)
    for _ in range(3):
        shards = batches(4)
        first = rank // 2 * 2
        oracle.step([[shard] for shard in shards[first : first + 2]])
        opt.step(lambda shards=shards: closure_for(net, shards[rank])())
        close(list(net.parameters()), list(oracle.net.parameters()), "w")
    return bits(net[0].weight)


def test_a_process_group(four: Ranks) -> None:
    a, b, c, d = four.run(trains_in_two_worlds)
    assert a == b
    assert c == d
    assert a != c


def grows_and_thaws(wrap: str) -> None:
    """A group added between steps, of parameters that differ at first; another frozen and thawed."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = small_net()
    head = nn.Linear(4, 4).double()
    model = nn.Sequential(net, head)
    oracle = Oracle(model, 1, rho=RHO, **HYPER)
    if rank:
        nn.init.zeros_(head.weight)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, check_replicas_every=1)
    opt.add_param_group({"params": head.parameters()})
    for step in range(4):
        for owner in (model, oracle.net):
            owner[0][3].requires_grad_(step % 2 == 0)
        shards = batches(size)
        oracle.step([[shard] for shard in shards])
        opt.step(closure_for(model, shards[rank]))
        close(list(model.parameters()), list(oracle.net.parameters()), f"w after step {step}")


def test_parameters_that_come_and_freeze(pair: Ranks) -> None:
    pair.run(grows_and_thaws, "plain")


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


def steps_through_checkpoints(shared: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    net = Checkpointed(shared).double()
    oracle = Oracle(net, 1, rho=RHO, **HYPER)
    oracle.backward = lambda x: oracle.net(x, by_checkpoint=False).square().sum().backward()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, check_replicas_every=1, bucket_cap_mb=1e-5)
    for _ in range(2):
        xs = [torch.randn(3, 5, dtype=torch.float64) for _ in range(size)]

        def closure(x: Tensor = xs[rank]) -> Tensor:
            loss = net(x.requires_grad_()).square().sum()
            loss.backward()
            return loss

        if shared:
            w = [bits(p) for p in net.parameters()]
            with pytest.raises(RuntimeError, match="Invalid second gradient of a parameter"):
                opt.step(closure)
            assert w == [bits(p) for p in net.parameters()]
        else:
            oracle.step([[x.detach()] for x in xs])
            opt.step(closure)
            close(list(net.parameters()), list(oracle.net.parameters()), "w")


@pytest.mark.parametrize("shared", [False, True])
def test_reentrant_checkpoints(shared: bool, pair: Ranks) -> None:
    pair.run(steps_through_checkpoints, shared)
