"""What only a GPU can show: launches, streams, CUDA graphs, devices, memory, the CPU's bits. See `make gpu`."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from helpers import (
    DTYPES,
    FEW_SIZES,
    HYPER,
    RHO,
    Lists,
    ascent_groups,
    assert_same_bits,
    ids,
    scalar,
    sgd_groups,
    snapshot,
)
from norm_bits import BITS, norm_bits
from torch import Tensor

from fused_sam import FusedSAM, backends, ops
from fused_sam.backends.interface import can_mix

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

CUDA = "cuda"
MOST_LAUNCHES = {"native": 3, "triton": 4}
# Of a ResNet's kind: a few large tensors among many small ones.
SHAPES = [(64, 3, 7, 7), *[(64,), (64,), (256, 64, 3, 3)] * 40, (1000, 513), (1000,)]


@pytest.fixture(params=["native", "triton"])
def compiled(request: pytest.FixtureRequest) -> str:
    """A compiled backend; skipped with its own reason where it does not work."""
    state = backends.available(CUDA).get(request.param, "not part of this build")
    if state != "ok":
        pytest.skip(f"backend {request.param}: {state}")
    return request.param


def make_params(shapes: list[tuple[int, ...]] = SHAPES, device: str = CUDA) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def closure_of(params: list[Tensor], factors: list[Tensor]) -> Callable[[], Tensor]:
    """Gradients that depend on the weights, by elementwise operations: the same bits captured or not."""

    def closure() -> Tensor:
        loss = sum((f * p * p).sum() for p, f in zip(params, factors, strict=True))
        loss.backward()
        return loss

    return closure


def factors_of(params: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(p.shape, generator=generator).to(p.device) for p in params]


def set_grads(params: list[Tensor], seed: int = 1) -> None:
    for p, f in zip(params, factors_of(params, seed), strict=True):
        p.grad = f.clone()


def step(optimizer: FusedSAM, params: list[Tensor]) -> None:
    set_grads(params)
    optimizer.first_step(zero_grad=True)
    set_grads(params, 2)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("direction", ["gradient", "momentum"], ids=["SAM", "MSAM"])
def test_a_step_is_few_launches(direction: str, compiled: str) -> None:
    params = make_params()
    optimizer = FusedSAM(params, rho=RHO, **HYPER, direction=direction, backend=compiled)
    for _ in range(3):
        step(optimizer, params)
    launches = []
    for half in (lambda: optimizer.first_step(zero_grad=True), optimizer.step):
        set_grads(params)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            half()
            torch.cuda.synchronize()
        events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        launches += [name for name in events if not name.startswith(("Memcpy", "Memset"))]
    if not launches:
        pytest.skip("the profiler records no kernels on this machine")
    assert len(launches) <= MOST_LAUNCHES[compiled], launches


@pytest.mark.parametrize("zero_grad", [False, True], ids=["backup", "swap"])
def test_a_step_never_waits_for_the_device(compiled: str, zero_grad: bool) -> None:
    params = make_params()
    rho, lr = torch.tensor(RHO, device=CUDA), torch.tensor(0.1, device=CUDA)
    optimizer = FusedSAM(params, rho=rho, lr=lr, momentum=0.9, backend=compiled, foreach=False)
    step(optimizer, params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.first_step(zero_grad=zero_grad)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_run_on_the_current_stream(compiled: str) -> None:
    """Gradients that arrive late on a side stream are waited for, because the kernels are on that stream."""
    params, twins = make_params(), make_params()
    ours, reference = (FusedSAM(ps, rho=RHO, **HYPER, backend=compiled) for ps in (params, twins))
    step(reference, twins)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        step(ours, params)
    side.synchronize()
    assert_same_bits(params, twins, "weight")


def test_threads_on_streams_of_their_own(compiled: str) -> None:
    def train(params: list[Tensor]) -> None:
        optimizer = FusedSAM(params, rho=RHO, **HYPER, backend=compiled)
        for _ in range(20):
            step(optimizer, params)
        torch.cuda.current_stream().synchronize()

    def on_a_stream(params: list[Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            train(params)

    expected, together = make_params(), [make_params() for _ in range(4)]
    train(expected)
    torch.cuda.synchronize()
    threads = [threading.Thread(target=on_a_stream, args=(params,)) for params in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for params in together:
        assert_same_bits(params, expected, "weight")


@pytest.mark.parametrize("form", ["closure", "two calls"])
@pytest.mark.parametrize("count", [1, 40], ids=["one launch", "several launches"])
@pytest.mark.parametrize(
    ("base", "direction"),
    [(torch.optim.SGD, "gradient"), (torch.optim.AdamW, "gradient"), (torch.optim.SGD, "momentum")],
    ids=["SGD", "AdamW", "MSAM"],
)
def test_a_captured_iteration_replays_as_the_eager_one(
    compiled: str, form: str, count: int, base: type[torch.optim.Optimizer], direction: str
) -> None:
    """With rho and lr changed between the replays."""
    shapes = [(5, 7), (1009,), (33, 3, 3)] if count == 1 else [(k % 9 + 1,) for k in range(1100)]
    params = make_params(shapes)
    rho, lr = torch.tensor(RHO, device=CUDA), torch.tensor(0.1, device=CUDA)
    options = {"weight_decay": 0.01, "backend": compiled, "capturable": True, "foreach": False, "direction": direction}
    options |= {"momentum": 0.9} if base is torch.optim.SGD else {"amsgrad": True}
    optimizer = FusedSAM(params, base, rho=rho, lr=lr, **options)
    factors = factors_of(params, 1)

    def iterate(optimizer: FusedSAM, params: list[Tensor], factors: list[Tensor]) -> None:
        closure = closure_of(params, factors)
        if form == "closure":
            optimizer.step(closure)
            return
        optimizer.zero_grad()
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step(zero_grad=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            iterate(optimizer, params, factors)
    torch.cuda.current_stream().wait_stream(side)
    twins, twin_optimizer = copy.deepcopy((params, optimizer))
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        iterate(optimizer, params, factors)
    assert_same_bits(params, twins, "weight")  # capturing runs nothing
    for k in range(4):
        for f, new in zip(factors, factors_of(params, 10 + k), strict=True):
            f.copy_(new)
        for group, twin_group in zip(optimizer.param_groups, twin_optimizer.param_groups, strict=True):
            for key, value in (("rho", RHO / (k + 1)), ("lr", 0.1 / (k + 1))):
                group[key].fill_(value), twin_group[key].fill_(value)
        graph.replay()
        iterate(twin_optimizer, twins, factors)
        assert_same_bits(params, twins, f"replay {k}: weight")
        states = [
            [x for p in ps for x in o.state[p].values()] for o, ps in ((optimizer, params), (twin_optimizer, twins))
        ]
        assert_same_bits(*states, f"replay {k}: state")


def test_capturing_is_refused_with_the_reason(compiled: str) -> None:
    for options, sentence in (({}, "capturable=True"), ({"capturable": True}, "step once before capturing")):
        params = make_params([(9,)])
        optimizer = FusedSAM(params, lr=0.1, momentum=0.9, backend=compiled, **options)
        closure, before = closure_of(params, factors_of(params, 1)), snapshot(params)
        closure()  # so that nothing of autograd is made for the first time while capturing
        with pytest.raises(RuntimeError, match=sentence), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step(closure)
        torch.cuda.synchronize()
        assert snapshot(params) == before
        assert not optimizer.perturbed


@pytest.mark.parametrize("other", ["cuda:1", "cpu"])
def test_parameters_on_several_devices_share_one_norm(other: str, compiled: str) -> None:
    if other != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    together = make_params([(9,), (1009,), (5, 7)])
    spread = [p.detach().to(other if i % 2 else CUDA).requires_grad_() for i, p in enumerate(together)]
    step(FusedSAM(spread, rho=RHO, **HYPER, backend=None if other == "cpu" else compiled), spread)
    step(FusedSAM(together, rho=RHO, **HYPER, backend=compiled), together)
    for a, b in zip(spread, together, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-6, atol=1e-7)


def test_another_device_is_current_afterwards_as_before(compiled: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = make_params([(1009,)], "cuda:1")
    step(FusedSAM(params, rho=RHO, **HYPER, backend=compiled), params)
    assert torch.cuda.current_device() == 0
    assert torch.empty(1, device=CUDA).device.index == 0


def test_no_memory_is_asked_of_the_driver_in_steady_state(compiled: str) -> None:
    params = make_params()
    optimizer = FusedSAM(params, rho=RHO, **HYPER, backend=compiled)
    for _ in range(3):
        step(optimizer, params)
    torch.cuda.synchronize()
    gc.collect()
    keys = ("segment.all.allocated", "allocated_bytes.all.current")
    before = [torch.cuda.memory_stats()[key] for key in keys]
    for _ in range(20):
        step(optimizer, params)
    torch.cuda.synchronize()
    assert [torch.cuda.memory_stats()[key] for key in keys] == before


def test_a_step_takes_no_memory_beside_the_gradients(compiled: str) -> None:
    """The first gradients' memory holds w: one gradient-sized buffer over plain SGD, and only between the passes."""
    params = make_params([(1 << 20,)] * 8)
    size = 4 * sum(p.numel() for p in params)
    optimizer = FusedSAM(params, rho=RHO, **HYPER, backend=compiled)
    step(optimizer, params)
    for p in params:
        p.grad = torch.ones_like(p)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    with_gradients = torch.cuda.memory_allocated()
    optimizer.first_step(zero_grad=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - with_gradients <= 1.01 * size
    assert torch.cuda.memory_allocated() - with_gradients <= 0.01 * size


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("grad_dtype", [None, torch.float32, torch.bfloat16], ids=["same", "fp32", "bf16"])
def test_the_gpu_computes_the_bits_of_the_cpu(
    dtype: torch.dtype, grad_dtype: torch.dtype | None, compiled: str
) -> None:
    grad_dtype = grad_dtype or dtype
    if not can_mix(dtype, grad_dtype):
        pytest.skip("these do not mix")
    results = []
    for backend, device in (("native", "cpu"), (compiled, CUDA)):
        torch.manual_seed(0)
        lists = Lists([*FEW_SIZES, *[k % 5 for k in range(1500)]], dtype, device)
        grads = [g.to(grad_dtype) for g in lists.grads]
        count = len(grads)
        rounds = []
        for adaptive in (False, True):
            groups = ascent_groups(count, adaptive=adaptive)
            ops.perturb(lists.params, grads, lists.backups, scalar(2.9, device), groups, backend)
            rounds.append(snapshot(lists.params))
            descent = sgd_groups(count, **HYPER, dampening=0.3)
            ops.sgd_update(lists.params, grads, lists.backups, lists.momentum, descent, backend=backend)
            rounds += [snapshot(lists.params), snapshot(lists.momentum)]
        results.append(rounds)
    assert results[0] == results[1]


def test_micro_batches_give_the_bits_of_the_cpu(compiled: str) -> None:
    """A running mean beside the restore, in one launch."""
    results = []
    for backend, device in (("native", "cpu"), (compiled, CUDA)):
        params = make_params([(9,), (1009,), (33, 3, 3)], device)
        factors = [factors_of(params, k) for k in range(3)]
        optimizer = FusedSAM(params, rho=0.0, **HYPER, backend=backend)
        for _ in range(2):
            optimizer.step([closure_of(params, f) for f in factors])
        results.append(snapshot(params))
    assert results[0] == results[1]


@pytest.mark.parametrize(("dtype", "adaptive"), BITS, ids=str)
def test_the_norm_has_the_bits_of_the_emulator(dtype: torch.dtype, adaptive: bool, compiled: str) -> None:
    if compiled != "native":
        pytest.skip("Triton adds in another order")
    assert norm_bits(dtype, adaptive, "native", CUDA) == BITS[dtype, adaptive]


def test_250_runs_give_the_same_bits(compiled: str) -> None:
    seen = set()
    for _ in range(250):
        params = make_params(SHAPES[:20])
        step(FusedSAM(params, rho=RHO, **HYPER, backend=compiled), params)
        seen.add(tuple(snapshot(params)))
    assert len(seen) == 1


def test_more_elements_than_int32_in_one_tensor(compiled: str) -> None:
    count = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 6 * 2 * count:
        pytest.skip("needs 26 GB of free memory")
    w = torch.zeros(count, dtype=torch.bfloat16, device=CUDA)
    g = torch.full_like(w, 2.0)
    backup, m = torch.empty_like(w), torch.empty_like(w)
    norm = ops.norm([w], [g], ascent_groups(1, rho=1.0), backend=compiled)
    assert norm.item() == pytest.approx(2.0 * count**0.5, rel=1e-7)
    ops.perturb([w], [g], [backup], norm * 0 + 2.0, ascent_groups(1, rho=0.5), compiled)
    assert bool((w == 0.5).all())
    ops.sgd_update([w], [g], [backup], [m], sgd_groups(1, first=True, lr=0.25, momentum=0.5), backend=compiled)
    assert bool((w == -0.5).all())
    assert bool((m == 2.0).all())
