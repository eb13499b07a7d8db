"""The first gradient's memory may hold w between the passes, but only where nothing else can see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HYPER, LARGE, RHO, assert_same_bits, bits, leaves, quadratic, set_grads, snapshot
from torch import Tensor

from fused_sam import FusedSAM

LR = 0.13
zero_grad_or_not = pytest.mark.parametrize("zero_grad", [False, True])


def descend(opt: FusedSAM, params: list[Tensor], w: list[Tensor]) -> None:
    """Give ones as the second gradient and check that the step started from w."""
    set_grads(params, [torch.ones_like(p) for p in params])
    opt.step()
    for p, start in zip(params, w, strict=True):
        torch.testing.assert_close(p.detach(), start - LR)


def prepared(backend: str, device: str, *sizes: int) -> tuple[list[Tensor], list[Tensor], FusedSAM]:
    """Parameters that have a gradient, copies of them, and their optimizer."""
    params = leaves(*sizes, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    quadratic(params)()
    return params, [p.detach().clone() for p in params], opt


@pytest.mark.filterwarnings("ignore:The second gradients seem")
def test_a_second_backward_without_zero_grad_accumulates(backend: str, device: str) -> None:
    params, w, opt = prepared(backend, device, 9, LARGE)
    gradients = snapshot(p.grad for p in params)
    opt.first_step()
    assert_same_bits([p.grad for p in params], gradients, "gradient")
    for p in params:
        (3 * p).sum().backward()
    opt.step()
    for p, start in zip(params, w, strict=True):
        torch.testing.assert_close(p.detach(), start - LR * (3 * start + 3))


ZEROING: dict[str, Callable[[FusedSAM, list[Tensor]], Any]] = {
    "optimizer.zero_grad()": lambda opt, params: opt.zero_grad(),
    "optimizer.zero_grad(set_to_none=False)": lambda opt, params: opt.zero_grad(set_to_none=False),
    "p.grad.zero_()": lambda opt, params: [p.grad.zero_() for p in params if p.grad is not None],
    "p.grad = None": lambda opt, params: [setattr(p, "grad", None) for p in params],
    "p.grad.fill_(nan)": lambda opt, params: [p.grad.fill_(float("nan")) for p in params if p.grad is not None],
}


@pytest.mark.parametrize("zero", ZEROING.values(), ids=ZEROING.keys())
@zero_grad_or_not
def test_gradients_zeroed_between_the_passes_do_not_take_w_along(
    zero: Callable[..., Any], zero_grad: bool, backend: str, device: str
) -> None:
    params, w, opt = prepared(backend, device, 9, LARGE)
    opt.first_step(zero_grad=zero_grad)
    zero(opt, params)
    descend(opt, params, w)
    quadratic(params)()
    w = [p.detach().clone() for p in params]
    opt.first_step(zero_grad=zero_grad)
    zero(opt, params)
    opt.restore()
    assert_same_bits(params, w, "param")


HOLDING: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda g: g,
    "detached": lambda g: g.detach(),
    "view": lambda g: g.view(-1),
    "element": lambda g: g[3],
    "slice": lambda g: g[2:7],
    "numpy": lambda g: g.numpy(),
    "data": lambda g: g.data,
    "dlpack": lambda g: torch.from_dlpack(g),
    "storage": lambda g: g.untyped_storage(),
}


@pytest.mark.parametrize("hold", HOLDING.values(), ids=HOLDING.keys())
def test_a_gradient_that_the_caller_holds_is_never_written(
    hold: Callable[[Tensor], Any], backend: str, device: str
) -> None:
    params, w, opt = prepared(backend, device, 9, LARGE)
    held: list[Any] = []

    def values() -> list[bytes]:
        storages = (torch.empty(0).set_(h) if isinstance(h, torch.UntypedStorage) else h for h in held)
        return [bits(torch.as_tensor(h)) for h in storages]

    held.extend(hold(p.grad) for p in params)
    expected = values()
    opt.first_step(zero_grad=True)
    assert values() == expected
    descend(opt, params, w)
    held.clear()

    def closure() -> Tensor:
        loss = quadratic(params)()
        if not held:
            held.extend(hold(p.grad) for p in params)
            expected[:] = values()
        return loss

    opt.step(closure)
    assert values() == expected


def test_a_gradient_saved_by_autograd_is_never_written(backend: str, device: str) -> None:
    """No Python object holds the first gradient, but a graph that is yet to run backward does."""
    params, w, opt = prepared(backend, device, LARGE)
    q = torch.randn(LARGE, device=device).requires_grad_()
    loss = (params[0].grad * q).sum()
    expected = bits(params[0].grad)
    opt.first_step(zero_grad=True)
    descend(opt, params, w)
    loss.backward()
    assert bits(q.grad) == expected


def by_backward_on_a_view(params: list[Tensor]) -> list[Tensor]:
    """p.view(...).backward(v) makes p.grad a tensor of its own on the memory of v."""
    arguments = [torch.randn(181, 182, device=p.device) for p in params]
    for p, v in zip(params, arguments, strict=True):
        p.view(181, 182).backward(v)
    return arguments


def as_views_of_one_bucket(params: list[Tensor]) -> list[Tensor]:
    """As DistributedDataParallel's gradient_as_bucket_view makes them."""
    bucket = torch.randn(2 * LARGE, device=params[0].device)
    params[0].grad, params[1].grad = bucket[:LARGE], bucket[LARGE:]
    return [bucket]


def as_views_of_a_bucket_that_nobody_holds(params: list[Tensor]) -> list[Tensor]:
    """Two gradients keep one another's storage alive, whole and out of sight."""
    bucket = torch.randn(2 * LARGE + 100, device=params[0].device)
    params[0].grad, params[1].grad = bucket[51 : LARGE + 51], bucket[LARGE + 51 : -49]
    return []


def as_one_tensor(params: list[Tensor]) -> list[Tensor]:
    params[0].grad = params[1].grad = torch.randn(LARGE, device=params[0].device)
    return [params[0].grad]


def as_one_tensor_that_nobody_holds(params: list[Tensor]) -> list[Tensor]:
    as_one_tensor(params)
    return []


def as_two_tensors_on_one_memory(params: list[Tensor]) -> list[Tensor]:
    g = torch.randn(LARGE, device=params[0].device)
    params[0].grad, params[1].grad = g.detach(), g.detach()
    return []


def expanded(params: list[Tensor]) -> list[Tensor]:
    """One number in memory for many elements: it cannot hold w."""
    numbers = [torch.tensor(x, device=params[0].device) for x in (0.3, 2.0)]
    for p, x in zip(params, numbers, strict=True):
        p.grad = x.expand(LARGE)
    return numbers


def with_a_graph(params: list[Tensor]) -> list[Tensor]:
    """As after backward(create_graph=True): the second derivative is still to be taken."""
    for p in params:
        (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    return [p.grad for p in params]


WAYS = [
    by_backward_on_a_view,
    as_views_of_one_bucket,
    as_views_of_a_bucket_that_nobody_holds,
    as_one_tensor,
    as_one_tensor_that_nobody_holds,
    as_two_tensors_on_one_memory,
    expanded,
    with_a_graph,
]


@zero_grad_or_not
@pytest.mark.parametrize("give", WAYS, ids=lambda f: f.__name__)
def test_memory_that_others_may_see_is_never_written(
    give: Callable[[list[Tensor]], list[Tensor]], zero_grad: bool, backend: str, device: str
) -> None:
    params = leaves(LARGE, LARGE, device=device)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    watched = give(params)
    expected = snapshot(watched)
    opt.first_step(zero_grad=zero_grad)
    assert_same_bits(watched, expected)
    length = torch.cat([p.detach() - start for p, start in zip(params, w, strict=True)]).norm()
    assert float(length) == pytest.approx(RHO, rel=1e-4)
    descend(opt, params, w)
    assert_same_bits(watched, expected)


ELSEWHERE: dict[str, Callable[[Any], Tensor]] = {
    "numpy": torch.from_numpy,
    "a buffer": lambda array: torch.frombuffer(memoryview(array), dtype=torch.float32),
    "DLPack": torch.from_dlpack,
}


@zero_grad_or_not
@pytest.mark.parametrize("tensor_on", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_memory_that_torch_has_not_allocated_is_never_written(
    tensor_on: Callable[[Any], Tensor], zero_grad: bool, backend: str, device: str
) -> None:
    """A backward of numpy's, whose result is a buffer that the next one writes into."""
    if device != "cpu":
        pytest.skip("numpy's arrays are on the CPU")
    params = leaves(9, LARGE)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    arrays = [np.full(p.numel(), 0.3, dtype=np.float32) for p in params]
    set_grads(params, [tensor_on(array) for array in arrays])
    opt.first_step(zero_grad=zero_grad)
    assert all((array == np.float32(0.3)).all() for array in arrays)
    for array in arrays:
        array.fill(1)
    descend(opt, params, w)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradients_kept_by_a_hook_are_never_written(hook: str, backend: str, device: str) -> None:
    """One sees p.grad, the other the tensor from which p.grad takes its memory."""
    (p,) = leaves(LARGE, device=device)
    kept: list[Tensor] = []
    getattr(p, hook)(lambda x: kept.append(x.grad if x is p else x))
    opt = FusedSAM([p], rho=RHO, backend=backend, **HYPER)
    w = p.detach().clone()
    opt.step(quadratic([p]))
    assert len(kept) == 2
    torch.testing.assert_close(kept[0], 3 * w)


def test_gradients_of_both_passes_are_those_of_the_second_after_the_step(backend: str, device: str) -> None:
    """p.grad after a step is the gradient taken at w + e, not the memory that held w."""
    params, _, opt = prepared(backend, device, 9, LARGE)
    opt.first_step(zero_grad=True)
    quadratic(params)()
    at_perturbed = snapshot(p.grad for p in params)
    torch.testing.assert_close(params[1].grad, 3 * params[1].detach())
    opt.step()
    assert_same_bits([p.grad for p in params], at_perturbed, "second gradient")
