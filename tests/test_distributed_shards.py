"""DTensor parameters: FSDP2, hybrid sharding, tensor parallelism, against one process with all of the data."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CLIP_RTOL, FLOAT64_RTOL, HYPER, RHO, assert_same_bits, small_net, snapshot
from rank_oracle import Oracle, close, squares_of, two_calls
from ranks import Ranks, on_pair
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam

from fused_sam import FusedSAM, ReferenceSAM
from fused_sam.distributed import data_parallel

# Sizes that do not divide by the number of ranks, one that leaves a rank with nothing.
SIZES = (5, 8, 1, 3)


def network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(SIZES):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers, nn.LayerNorm(SIZES[-1])).double()


def sharded(net: nn.Sequential, how: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = dist.get_world_size()
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
    else:
        names = {"hsdp": ("replicate", "shard"), "tp": ("data", "tensor"), "fsdp+tp": ("data", "tensor")}[how]
        shape = (1, size) if how == "tp" else (2, size // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if "tp" in how:
        parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mesh = mesh["data"]
    if how != "tp":
        for layer in net:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def whole(tensors: Any) -> list[Tensor]:
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in tensors]


def closure_of(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return squares_of(net, x, x[:, :3])


def example_of(how: str, xs: list[Tensor]) -> Tensor:
    """The examples of this rank: those of one tensor-parallel group are the same."""
    rank = dist.get_rank()
    return xs[rank // 2 if how == "fsdp+tp" else 0 if how == "tp" else rank]


class OwnAdam(Adam):
    """Not fused: it steps by itself."""


BASES: dict[str, Any] = {
    "sgd": (SGD, HYPER),
    "adam": (Adam, {"lr": 0.013, "weight_decay": 0.017}),
    "own adam": (OwnAdam, {"lr": 0.013, "weight_decay": 0.017}),
}
CASES: dict[str, dict[str, Any]] = {
    "sam": {},
    "asam": {"adaptive": True, "eta": 0.01},
    "p=3": {"p": 3.0},
    "p=1.05": {"p": 1.05},
    "p=inf": {"p": math.inf},
    "p=1": {"p": 1.0},
    "p=1 asam": {"p": 1.0, "adaptive": True},
    "adam": {"base": "adam"},
    "own adam": {"base": "own adam"},
    "clipped": {"max_grad_norm": 0.01},
    "two calls": {"form": "two calls"},
    "micro-batches": {"form": "micro-batches"},
}


def follows_the_oracle(how: str, form: str = "closure", base: str = "sgd", **options: Any) -> None:
    groups = {"fsdp+tp": 2, "tp": 1}.get(how, dist.get_world_size())
    net = network()
    clip = options.get("max_grad_norm")
    kind, base_options = BASES[base]
    exact = {k: v for k, v in options.items() if k != "max_grad_norm"}
    oracle = Oracle(net, groups, rho=RHO, base=base.split()[-1], **base_options, **exact)
    atol = FLOAT64_RTOL
    if clip is not None:
        plain = oracle.sam.second_step

        def second_step() -> None:
            torch.nn.utils.clip_grad_norm_(oracle.net.parameters(), clip)
            plain()

        oracle.sam.second_step = second_step  # type: ignore[method-assign, assignment]
        # Four steps of at most lr / (1 - momentum) times the clipped gradient, whose factor is rounded to fp32.
        atol = 4 * HYPER["lr"] / (1 - HYPER["momentum"]) * clip * CLIP_RTOL
    model = sharded(net, how)
    opt = FusedSAM(model.parameters(), kind, rho=RHO, **base_options, **options)
    for step in range(4):
        xs = [torch.randn(4, 5, dtype=torch.float64) for _ in range(groups)]
        oracle.backward = lambda x: closure_of(oracle.net, x)()
        others = [torch.randn(4, 5, dtype=torch.float64) for _ in range(groups if form == "micro-batches" else 0)]
        oracle.step([[x] for x in (*xs, *others)])
        closure = closure_of(model, example_of(how, xs))
        if form == "micro-batches":
            opt.step([closure, closure_of(model, example_of(how, others))])
        elif form == "closure":
            opt.step(closure)
        else:
            two_calls(opt, closure)
        close(whole(model.parameters()), list(oracle.net.parameters()), f"w after step {step}", atol)
        for p, s in opt.state.items():
            assert all(type(v) is type(p.data) for k, v in s.items() if k != "step"), "state is not as its parameter"


@pytest.mark.parametrize(
    ("how", "case"),
    [
        *(("fsdp", case) for case in CASES),
        *(("tp", case) for case in ("sam", "p=1", "p=3", "clipped", "micro-batches")),
    ],
)
def test_two_ranks_follow_one_process(how: str, case: str, pair: Ranks) -> None:
    pair.run(follows_the_oracle, how, **CASES[case])


@pytest.mark.parametrize(
    ("how", "case"), [("hsdp", "sam"), ("hsdp", "p=3"), ("fsdp+tp", "sam"), ("fsdp+tp", "p=1"), ("fsdp", "p=1")]
)
def test_four_ranks_follow_one_process(how: str, case: str, four: Ranks) -> None:
    four.run(follows_the_oracle, how, **CASES[case])


@pytest.mark.parametrize("base", ["sgd", "adam"])
@on_pair
def test_along_the_momentum_of_all_shards(base: str) -> None:
    """MSAM: the norm is over all shards, of which a rank's update sees its own."""
    kind, base_options = BASES[base]
    exact, size = network(), dist.get_world_size()
    reference = ReferenceSAM(exact.parameters(), rho=0.3, base=base, **base_options)
    model = sharded(copy.deepcopy(exact), "fsdp")
    opt = FusedSAM(model.parameters(), kind, rho=0.3, direction="momentum", **base_options)
    for step in range(4):
        xs = [torch.randn(4, 5, dtype=torch.float64) for _ in range(size)]
        reference.first_step_along_momentum()
        exact.zero_grad()
        for x in xs:
            ((exact(x) - x[:, :3]).square().mean() / size).backward()
        reference.second_step()
        opt.step(closure_of(model, xs[dist.get_rank()]))
        close(whole(model.parameters()), list(exact.parameters()), f"w after step {step}")


@pytest.mark.parametrize(("p", "scale"), [(2.0, 1.0), (1.0, 1.0), (2.0, 1e160), (2.0, 1e-170)])
@on_pair
def test_partial_gradients_are_summed(p: float, scale: float) -> None:
    """A replicated parameter whose gradient is yet to be summed, beside one that is cut into shards.

    ``scale``: of first gradients whose squares leave the range of fp64.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    w, parts = [torch.randn(n, dtype=torch.float64) for n in (7, 5)], torch.randn(2, 2, 7, dtype=torch.float64)
    shards = torch.randn(2, 5, dtype=torch.float64)
    for gradients in (parts, shards):
        gradients[0] *= scale
    exact = [nn.Parameter(x.clone()) for x in w]
    params = [nn.Parameter(distribute_tensor(x.clone(), mesh, [how])) for x, how in zip(w, (Replicate(), Shard(0)))]
    reference = ReferenceSAM(exact, rho=RHO, p=p, **HYPER)
    opt = FusedSAM(params, rho=RHO, p=p, **HYPER)
    for number in (0, 1):
        exact[0].grad, exact[1].grad = parts[number].sum(0), shards[number]
        params[0].grad = DTensor.from_local(parts[number][rank], mesh, [Partial()])
        params[1].grad = distribute_tensor(shards[number].clone(), mesh, [Shard(0)])
        if number == 0:
            reference.first_step()
            opt.first_step(zero_grad=True)
            close(whole(params), exact, "w + e")
    reference.second_step()
    opt.step()
    close(whole(params), exact, "w")


@pytest.mark.parametrize("failing_pass", [1, 2])
@on_pair
def test_an_overflow_in_one_shard_skips_the_step_on_all_ranks(failing_pass: int) -> None:
    """Under a scaler rank 1's loss is infinite in the third of four steps."""
    model = sharded(network().float(), "fsdp")
    opt = FusedSAM(model.parameters(), rho=RHO, **HYPER)
    scaler = GradScaler("cpu", init_scale=2.0**8)

    def everything() -> list[bytes]:
        return snapshot(whole([*model.parameters(), *(v for s in opt.state.values() for v in s.values())]))

    for step in range(4):
        x, before = torch.randn(4, 5), everything()
        for number in (1, 2):
            bad = (step, number, dist.get_rank()) == (2, failing_pass, 1)
            (scaler.scale((model(x) - x[:, :3]).square().mean()) * (math.inf if bad else 1.0)).backward()
            if number == 1:
                opt.first_step(zero_grad=True)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert (everything() == before) == (step == 2)


@pytest.mark.parametrize("base", ["sgd", "adam"])
@on_pair
def test_distributed_checkpoints(base: str, tmp_path: Path) -> None:
    """Through torch.distributed.checkpoint: the steps after it have the bits of those that were never interrupted."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    kind, options = BASES[base]
    xs = [torch.randn(4, 5, dtype=torch.float64) for _ in range(6)]

    def make() -> tuple[nn.Module, FusedSAM]:
        model = sharded(network(), "fsdp")
        return model, FusedSAM(model.parameters(), kind, rho=RHO, interval=2, **options)

    def train(model: nn.Module, opt: FusedSAM, xs: list[Tensor]) -> None:
        for x in xs:
            opt.step(closure_of(model, x))
        opt.zero_grad()

    model, opt = make()
    train(model, opt, xs[:3])
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=tmp_path)
    train(model, opt, xs[3:])

    twin, twin_opt = make()
    train(twin, twin_opt, []) if base == "sgd" else train(twin, twin_opt, xs[5:])
    weights, state = get_state_dict(twin, twin_opt)
    loaded = {"model": weights, "opt": state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(twin, twin_opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    assert twin_opt.param_groups[0]["sam_step"] == 3
    train(twin, twin_opt, xs[3:])
    assert_same_bits(whole(twin.parameters()), whole(model.parameters()))


@on_pair
def test_what_sharded_parameters_are_refused() -> None:
    model = sharded(network(), "fsdp")
    opt = FusedSAM(model.parameters(), **HYPER)
    with pytest.raises(ValueError, match=r"^Invalid optimizer, of DTensor parameters"):
        data_parallel(model, opt)
    with pytest.raises(ValueError, match=r"^Invalid telemetry=True"):
        FusedSAM(model.parameters(), telemetry=True, **HYPER)


@pytest.mark.parametrize("use_orig_params", [False, True])
@on_pair
def test_shards_that_do_not_say_so_are_refused(use_orig_params: bool) -> None:
    """Each rank would take the norm of its own part: e would be longer than rho."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = small_net(torch.float32)
    net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel.* Must be sharded by .*fully_shard"):
        FusedSAM(net.parameters(), rho=RHO, **HYPER)
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer.* Must be FusedSAM with .*shard_state=True"):
        ZeroRedundancyOptimizer(small_net().parameters(), FusedSAM, rho=RHO, **HYPER)
