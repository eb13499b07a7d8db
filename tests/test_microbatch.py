"""Several backward calls for one gradient, and lists of closures: a perturbation for each group of examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    FLOAT64_RTOL,
    HYPER,
    LARGE,
    RHO,
    assert_all_close,
    assert_same_bits,
    batches,
    buffers,
    closure_for,
    ids,
    leaves,
    quadratic,
    small_net,
    snapshot,
    state_tensors,
    zeroing,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, ReferenceSAM
from fused_sam.batchnorm import first_pass_only

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, HYPER),
    "Adam": (torch.optim.Adam, {"lr": 0.013, "weight_decay": 0.017, "eps": 0.01}),  # fp16 has no 1e-8
}
COUNTS = [2, 3, 7]


def make(params: Any, base: str, backend: str, **options: Any) -> FusedSAM:
    base_class, base_options = BASES[base]
    return FusedSAM(params, base_class, rho=RHO, backend=backend, **base_options, **options)


def one_by_one(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """A closure that goes through the batch an example at a time, with a backward for each."""

    def closure() -> Tensor:
        losses = [nn.functional.cross_entropy(net(x[None]), y[None]) / len(batch[0]) for x, y in zip(*batch)]
        for loss in losses:
            loss.backward()
        return sum(losses).detach()

    return closure


# Gradient accumulation


@pytest.mark.parametrize(("base", "form"), [("SGD", "closure"), ("SGD", "two calls"), ("Adam", "two calls, zeroed")])
def test_several_backward_calls_in_each_pass_equal_one_big_batch(
    base: str, form: str, backend: str, device: str
) -> None:
    net, data = small_net(device=device), batches(5, device=device)
    twin = copy.deepcopy(net)
    opt, plain = make(net.parameters(), base, backend), make(twin.parameters(), base, backend)
    for batch in data:
        accumulate = one_by_one(net, batch)
        if form == "closure":
            opt.step(accumulate)
        else:
            opt.zero_grad()
            accumulate()
            opt.first_step(zero_grad="zeroed" in form)
            opt.zero_grad()
            accumulate()
            opt.second_step()
        plain.step(closure_for(twin, batch))
    assert_all_close(net.parameters(), twin.parameters())
    assert_all_close(state_tensors(opt), state_tensors(plain))


# m-sharpness


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("count", COUNTS)
def test_a_list_of_closures_matches_the_reference(adaptive: bool, count: int, backend: str, device: str) -> None:
    net, data = small_net(device=device), batches(5 * count, device=device)
    twin = copy.deepcopy(net)
    options: dict[str, Any] = {"rho": 0.4, "adaptive": adaptive, "nesterov": True, **HYPER}
    optimizer = FusedSAM(net.parameters(), backend=backend, **options)
    reference = ReferenceSAM(twin.parameters(), **options)
    for start in range(0, len(data), count):
        groups = data[start : start + count]
        loss = optimizer.step([closure_for(net, batch) for batch in groups])
        expected = reference.step([zeroing(twin, closure_for(twin, batch)) for batch in groups])
        torch.testing.assert_close(loss, expected.detach(), rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
        assert_all_close((p.grad for p in net.parameters()), (p.grad for p in twin.parameters()))
    assert_all_close(net.parameters(), twin.parameters())
    assert_all_close(buffers(optimizer), buffers(reference))


def test_every_closure_has_an_e_of_its_own(backend: str, device: str) -> None:
    """Where the closures are called, and what their gradients make of w, by hand."""
    p = torch.zeros(2, dtype=torch.float64, device=device).requires_grad_()
    seen: list[list[float]] = []

    def along(axis: int) -> Callable[[], None]:
        def closure() -> None:
            seen.append(p.tolist())
            p.grad = torch.zeros_like(p)
            p.grad[axis] = 5.0 + p[axis].item()

        return closure

    FusedSAM([p], rho=0.5, backend=backend, lr=0.1).step([along(0), along(1)])
    assert seen == [[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.5]]
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.1 * 5.5 / 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("base", "options"), [("SGD", {}), ("SGD", {"max_grad_norm": 0.37}), ("Adam", {})], ids=str)
def test_a_list_of_one_is_the_closure_itself_bit_for_bit(
    dtype: torch.dtype, base: str, options: dict[str, Any], backend: str, device: str
) -> None:
    params = leaves(9, LARGE, device=device, dtype=dtype)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, plain = make(params, base, backend, **options), make(twins, base, backend, **options)
    for closures in (list, tuple, list):
        loss = opt.step(closures([quadratic(params)]))
        assert_same_bits([loss], [plain.step(quadratic(twins))], "loss")
        assert not loss.requires_grad
        assert_same_bits((p.grad for p in params), [p.grad for p in twins], "p.grad")
    assert_same_bits(params, twins)
    assert_same_bits(state_tensors(opt), state_tensors(plain), "state")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("base", "count"), [("SGD", 2), ("Adam", 3)])
def test_equal_groups_are_one_group_bit_for_bit(
    dtype: torch.dtype, base: str, count: int, backend: str, device: str
) -> None:
    """The mean of equal gradients is theirs, however many they are."""
    params = leaves(9, LARGE, device=device, dtype=dtype)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, plain = make(params, base, backend), make(twins, base, backend)
    for _ in range(3):
        opt.step([quadratic(params)] * count)
        plain.step(quadratic(twins))
    assert_same_bits(params, twins)
    assert_same_bits(state_tensors(opt), state_tensors(plain), "state")


def test_the_mean_of_fp16_gradients_neither_overflows_nor_vanishes(backend: str, device: str) -> None:
    params = leaves(2, device=device, dtype=torch.float16)
    grads = torch.tensor([40_000.0, 3 * 2.0**-24], dtype=torch.float16, device=device)  # the second is subnormal

    def closure() -> None:
        params[0].grad = grads.clone()

    FusedSAM(params, rho=0.0, lr=0.0, backend=backend).step([closure] * 4)
    assert_same_bits([params[0].grad], [grads])


def test_a_gradient_that_is_none_in_some_groups_is_zero_there(backend: str, device: str) -> None:
    params = leaves(9, LARGE, 67, device=device, dtype=torch.float64)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=0.0, backend=backend, lr=0.13)
    opt.step([quadratic(params[:1]), quadratic(params[:2]), quadratic(params[1:2])])
    torch.testing.assert_close(params[0].grad, 3 * w[0] * 2 / 3)
    torch.testing.assert_close(params[1].grad, 3 * w[1] * 2 / 3)
    assert params[2].grad is None
    torch.testing.assert_close(params[1].detach(), w[1] - 0.13 * 2 * w[1])
    assert_same_bits(params[2:], w[2:])


def test_gradients_that_the_caller_holds_are_never_written(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device)
    held: list[Tensor] = []
    expected: list[bytes] = []

    def closure() -> Tensor:
        loss = quadratic(params)()
        held.extend(p.grad for p in params)
        expected.extend(snapshot(p.grad for p in params))
        return loss

    FusedSAM(params, rho=RHO, backend=backend, **HYPER).step([closure] * 3)
    assert_same_bits(held, expected, "gradient")


def test_gradients_in_one_bucket_that_every_backward_overwrites(backend: str, device: str) -> None:
    """As DistributedDataParallel's gradient_as_bucket_view makes them: the sum must not live there."""
    params = leaves(9, LARGE, device=device)
    w = [p.detach().clone() for p in params]
    bucket = torch.empty(9 + LARGE, device=device)

    def filling(value: float) -> Callable[[], None]:
        def closure() -> None:
            bucket.fill_(value)
            params[0].grad, params[1].grad = bucket[:9], bucket[9:]

        return closure

    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    opt.step([filling(1.0), filling(2.0), filling(6.0)])
    assert bool((bucket == 6).all())
    for p, start in zip(params, w, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.13 * 3)


def test_clipping_is_of_the_mean_gradient(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device, dtype=torch.float64)
    opt = FusedSAM(params, rho=0.0, backend=backend, lr=0.13, max_grad_norm=0.37)
    w = [p.detach().clone() for p in params]
    opt.step([quadratic(params), quadratic(params[:1])])
    mean = [3 * w[0], 1.5 * w[1]]
    norm = float(torch.cat(mean).norm())
    for p, g in zip(params, mean, strict=True):
        torch.testing.assert_close(p.grad, g * (0.37 / (norm + 1e-6)), rtol=1e-6, atol=0)


def test_statistics_count_every_group_once(backend: str, device: str) -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).to(device=device, dtype=torch.float64)
    twin = copy.deepcopy(net)
    data = [torch.randn(6, 5, dtype=torch.float64, device=device) for _ in range(3)]
    opt = FusedSAM(net.parameters(), rho=0.3, backend=backend, lr=0.13)
    first_pass_only(net, opt)
    opt.step([lambda x=x: net(x).square().sum().backward() for x in data])
    for x in data:
        twin(x)
    assert int(net[1].num_batches_tracked) == 3
    assert_all_close([net[1].running_mean, net[1].running_var], [twin[1].running_mean, twin[1].running_var])


def test_replayed_random_numbers_are_the_same_in_both_passes_and_differ_between_groups(
    backend: str, device: str
) -> None:
    params, seen = leaves(9, device=device), []

    def closure() -> Tensor:
        seen.append(float(torch.rand(())))
        return quadratic(params)()

    FusedSAM(params, rho=RHO, backend=backend, lr=0.13, replay_rng=True).step([closure] * 3)
    assert seen[0::2] == seen[1::2]
    assert len(set(seen)) == 3


def returning(params: list[Tensor], *values: Any) -> list[Callable[[], Any]]:
    return [lambda value=value: (quadratic(params)(), value)[1] for value in values]


def test_the_mean_of_the_losses_is_returned_where_there_is_one(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    loss = opt.step(returning(params, torch.tensor(2.0, requires_grad=True), torch.tensor([5.0])))
    assert (loss.shape, loss.item(), loss.requires_grad) == ((), 3.5, False)
    assert opt.step(returning(params, 2, 5.0)) == 3.5
    assert opt.step(returning(params, None, 5.0)) == [None, 5.0]
    assert opt.step(returning(params, {"loss": 1})) == [{"loss": 1}]


@pytest.mark.parametrize("closures", [[], ()], ids=str)
def test_an_empty_list_is_refused(closures: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid closure=.*\. Must hold a callable for each group of examples\.$"):
        FusedSAM(leaves(3)).step(closures)


@pytest.mark.parametrize("closures", [[None], 3, "step", {int: int}, [[float]]], ids=str)
def test_what_cannot_be_called_is_refused(closures: Any) -> None:
    with pytest.raises(TypeError, match=r"Invalid closure=.*\. Must be a callable, or a list or tuple of callables\.$"):
        FusedSAM(leaves(3)).step(closures)


def test_a_list_is_refused_under_a_scaler(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    scaler = torch.amp.GradScaler(device)
    scaler.scale(quadratic(params)())
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(opt, [quadratic(params)] * 2)
