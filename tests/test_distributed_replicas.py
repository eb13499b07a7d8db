"""That replicas stay the same to the bit, that a difference is found, and that unlike models are refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HYPER, RHO, bits, buffers, small_net
from rank_oracle import WRAP_OPTIONS, WRAPS, Oracle, joined, squares_of, steps, wrapped
from ranks import Ranks, on_pair
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adagrad

from fused_sam import FusedSAM
from fused_sam.distributed import agreement, data_parallel
from fused_sam.distributed.buckets import Layout, Mean

STEPS = 60


def trains(wrap: str, m: Any, dtype: torch.dtype) -> list[bytes]:
    """Weights and momentum after many steps, with examples of its own on each rank."""
    # One tensor is so large that its w is kept in its gradient, the others are of odd sizes.
    net = nn.Sequential(nn.Linear(61, 541), nn.Tanh(), nn.Linear(541, 3)).to(dtype)
    opt = FusedSAM(net.parameters(), rho=RHO, **(HYPER | {"lr": 0.03}))
    model = wrapped(net, wrap, **WRAP_OPTIONS["bucket views" if wrap == "ddp" else "default"])
    handle = joined(model, opt, wrap, m_sharpness=m)
    start = bits(net[0].weight)
    torch.manual_seed(dist.get_rank())
    for _ in range(STEPS):
        x = torch.randn(5, 61, dtype=dtype)
        opt.step(squares_of(model, x, x[:, :3].sin()))
    assert all(p.isfinite().all() for p in net.parameters())
    assert bits(net[0].weight) != start
    if wrap == "sharded":
        handle.remove()
    return [bits(x) for x in [*net.parameters(), *buffers(opt)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("wrap", "m"), [("plain", "rank"), ("plain", "world"), ("ddp", "rank"), ("sharded", "rank")])
def test_two_replicas_keep_the_same_bits(wrap: str, m: str, dtype: torch.dtype, pair: Ranks) -> None:
    a, b = pair.run(trains, wrap, m, dtype)
    assert a == b


@pytest.mark.parametrize("wrap", ["plain", "sharded"])
def test_four_replicas_keep_the_same_bits(wrap: str, four: Ranks) -> None:
    a, *others = four.run(trains, wrap, 2, torch.bfloat16)
    assert others == [a] * 3


def goes_astray(dtype: torch.dtype) -> str:
    """One weight of rank 1 is off by an ulp before the third step; the message of the step that finds it."""
    net = small_net(dtype)
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    data_parallel(net, opt, check_replicas_every=2)
    for step in range(3):
        if step == 2 and dist.get_rank() == 1:
            with torch.no_grad():
                w = net[3].weight[2, 3]
                w.copy_(torch.nextafter(w, w + 1) if dtype != torch.bfloat16 else w * (1 + 2.0**-7))
        opt.step(squares_of(net, torch.randn(2, 3, 4, 4, dtype=dtype)))
    with pytest.raises(RuntimeError) as error:
        opt.step(squares_of(net, torch.randn(2, 3, 4, 4, dtype=dtype)))
    assert not opt.perturbed
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_replica_that_differs_is_found_on_all_ranks(dtype: torch.dtype, pair: Ranks) -> None:
    a, b = pair.run(goes_astray, dtype)
    assert a == b
    assert "after step 4: parameter 3.weight and" in a


@on_pair
def test_what_counts_as_different() -> None:
    """What a checksum may miss."""
    rank, world = dist.get_rank(), dist.group.WORLD
    w = torch.randn(3, 4)
    swapped = w.clone()
    swapped[0, 0], swapped[0, 1] = w[0, 1], w[0, 0]
    compensated = torch.tensor([1, 3, 5, 7]).view(torch.float64)
    other = torch.tensor([2, 2, 5, 7]).view(torch.float64)
    pairs = [
        (w, w.t().contiguous().t()),  # the same, in another order in memory
        (w, swapped),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])),
        (compensated, other),
        (torch.zeros(0), torch.zeros(0)),
        (torch.full((257,), -1.0, dtype=torch.bfloat16), torch.full((257,), -1.0, dtype=torch.bfloat16)),
        (torch.ones(9, dtype=torch.float16), torch.ones(9, dtype=torch.float16) + torch.eye(9)[8].half() * 2**-10),
    ]
    assert agreement.differing([p[rank] for p in pairs], world) == [1, 2, 4, 7]
    assert agreement.differing([], world) == []


@pytest.mark.parametrize(
    ("dtype", "cap_bytes"),
    [
        (torch.float32, 1),
        (torch.float32, 100),
        (torch.float32, 2**20),
        (torch.bfloat16, 100),
        (torch.float16, 2**20),
    ],
    ids=str,
)
@on_pair
def test_the_mean_in_buckets(dtype: torch.dtype, cap_bytes: float) -> None:
    """Parameters and gradients of awkward sizes and layouts, some of them None, against the mean by hand."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sizes = [0, 1, 2, 3, 7, 16, 17, 1009]
    params = [torch.zeros(n, dtype=dtype) for n in sizes]
    params += [torch.zeros(5, 7, dtype=dtype).t(), torch.zeros(9, 4, dtype=dtype)[:, 1], torch.zeros((), dtype=dtype)]
    params += [torch.zeros(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)]
    params += [torch.zeros(13), torch.zeros(3, dtype=torch.float64)]  # of other dtypes
    for p in params:
        p.requires_grad_()
    grads = [[torch.randn(p.shape).to(p.dtype) for p in params] for _ in range(size)]
    grads[0][3] = grads[1][4] = grads[0][5] = grads[1][5] = grads[0][12] = None
    params[7].requires_grad_(False)
    for p, g in zip(params, grads[rank]):
        p.grad = g
    before = [None if g is None else g.clone() for g in grads[rank]]
    group: Any = dist.group.WORLD
    Mean(Layout(cap_bytes).of(params), group).finish()
    for i, (p, *gs) in enumerate(zip(params, *grads)):
        present = [g for g in gs if g is not None]
        if i == 7:
            assert p.grad is grads[rank][7], "frozen"
        elif not present:
            assert p.grad is None
        else:
            expected = sum(g / size for g in present)
            assert torch.equal(p.grad, expected), i
            assert p.dim() < 2 or p.grad.stride() == p.stride()
            assert p.numel() == 0 or p.grad.data_ptr() % 16 == 0
    for g, old in zip(grads[rank], before):
        assert g is None or torch.equal(g, old), "a gradient that others may hold was written"


def refusal(models: list[nn.Module], ms: list[Any]) -> str:
    net = models[dist.get_rank()]
    w = [bits(p) for p in net.parameters()]
    opt = FusedSAM(net.parameters(), **HYPER)
    with pytest.raises(ValueError, match=r"^Invalid parameters: number ") as error:
        data_parallel(net, opt, m_sharpness=ms[dist.get_rank()])
    assert w == [bits(p) for p in net.parameters()], "changed before it was refused"
    return str(error.value)


def frozen(net: nn.Module) -> nn.Module:
    net[0].bias.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    return net


UNLIKE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (lambda: nn.Sequential(nn.Linear(3, 5)), "number 1 is 0.weight (shape [5, 3]"),
    "missing": (lambda: nn.Sequential(nn.Linear(3, 4, bias=False)), "number 2 is missing on rank 1, and 0.bias"),
    "more": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "number 3 is 1.weight"),
    "name": (lambda: nn.ModuleDict({"first": nn.Linear(3, 4)}), "number 1 is first.weight"),
    "dtype": (lambda: nn.Sequential(nn.Linear(3, 4)).double(), "torch.float64) on rank 1, and 0.weight"),
    "scope": (lambda: nn.Sequential(nn.Linear(3, 4)), "m_sharpness=2 on rank 1, and m_sharpness=1 on rank 0"),
    "frozen": (lambda: frozen(nn.Sequential(nn.Linear(3, 4))), "number 2 is 0.bias"),
}


@pytest.mark.parametrize("difference", UNLIKE)
def test_unlike_models_are_refused_on_all_ranks(difference: str, pair: Ranks) -> None:
    make, message = UNLIKE[difference]
    a, b = pair.run(
        refusal, [nn.Sequential(nn.Linear(3, 4)), make()], ["rank", "world" if difference == "scope" else "rank"]
    )
    assert a == b
    assert message in a
    assert "\n" not in a


@on_pair
def test_what_is_refused() -> None:
    net = nn.Linear(3, 2)
    opt = FusedSAM(net.parameters(), **HYPER)
    for m in (0, -1, 3, True, 1.0, "ranks", None, [1]):
        with pytest.raises(ValueError, match=r"^Invalid m_sharpness="):
            data_parallel(net, opt, m_sharpness=m)  # type: ignore[arg-type]
    for every in (-1, 1.5, None):
        with pytest.raises(ValueError, match=r"^Invalid check_replicas_every="):
            data_parallel(net, opt, check_replicas_every=every)  # type: ignore[arg-type]
    for cap in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^Invalid bucket_cap_mb="):
            data_parallel(net, opt, bucket_cap_mb=cap)
    other = dist.new_group(timeout=timedelta(seconds=30))
    ddp = DistributedDataParallel(net)
    with pytest.raises(ValueError, match=r"^Invalid process_group"):
        data_parallel(ddp, opt, process_group=other)
    alien = FusedSAM([*net.parameters(), nn.Parameter(torch.ones(2))], **HYPER)
    with pytest.raises(ValueError, match=r"^Invalid parameter 2 of the optimizer \(shape \[2\]\)"):
        data_parallel(ddp, alien)
    net(torch.ones(1, 3)).sum().backward()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="perturbed"):
        data_parallel(net, opt)
    opt.restore()
    handle = data_parallel(ddp, opt, process_group=ddp.process_group)
    with pytest.raises(RuntimeError, match="twice"):
        data_parallel(ddp, opt)
    with pytest.raises(ValueError, match=r"^Invalid parameter 2 of the optimizer"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(opt.param_groups) == 1
    handle.remove()
    data_parallel(net, opt).remove()


@on_pair
def test_what_is_refused_with_shards_of_the_state() -> None:
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
    saved: Any = handle.consolidate_state_dict(to=None) or {}
    saved["state"][0]["momentum_buffer"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"^Invalid momentum_buffer of shape \[2\]"):
        opt.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^Invalid to=7\. Must be"):
        handle.consolidate_state_dict(to=7)


def test_without_a_process_group() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        data_parallel(net, FusedSAM(net.parameters(), **HYPER))


def parts() -> list[bytes]:
    """A copy of model and optimizer, and both after remove(), step on their own."""
    net = small_net()
    opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
    handle = data_parallel(net, opt)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))

    twin, twin_opt = copy.deepcopy((net, opt))
    twin_opt.step(squares_of(twin, x))
    handle.remove()
    opt.step(squares_of(net, x))
    assert bits(net[0].weight) == bits(twin[0].weight)
    return [bits(p) for p in net.parameters()]


@pytest.mark.parametrize("wrap", WRAPS)
@on_pair
def test_models_and_optimizers_are_collected(wrap: str) -> None:
    def train() -> list[Any]:
        net = small_net()
        opt = FusedSAM(net.parameters(), rho=RHO, **HYPER)
        model = wrapped(net, wrap)
        handle = joined(model, opt, wrap, check_replicas_every=1)
        opt.step(squares_of(model, torch.randn(2, 3, 4, 4, dtype=torch.float64)))
        return [weakref.ref(thing) for thing in (net, opt, handle, net[0].weight)]

    references = train()
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_copies_and_removal(pair: Ranks) -> None:
    a, b = pair.run(parts)
    assert a != b
