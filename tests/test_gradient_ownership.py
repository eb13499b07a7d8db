"""The first gradient's memory may hold w between the passes, but only where nobody else can see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def test_gradients_survive_first_step_without_zero_grad(backend: str, device: str) -> None:
    params, w, opt = prepared(backend, device, 9, LARGE)
    gradients = snapshot(p.grad for p in params)
    opt.first_step()
    assert_same_bits([p.grad for p in params], gradients, "gradient")
    descend(opt, params, w)


def test_a_second_backward_without_zero_grad_accumulates(backend: str, device: str) -> None:
    params, w, opt = prepared(backend, device, 9, LARGE)
    opt.first_step()
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
@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_a_gradient_that_the_caller_holds_is_never_written(
    hold: Callable[[Tensor], Any], form: str, backend: str, device: str
) -> None:
    params, w, opt = prepared(backend, device, 9, LARGE)
    held: list[Any] = []

    def values() -> list[bytes]:
        storages = (torch.empty(0).set_(h) if isinstance(h, torch.UntypedStorage) else h for h in held)
        return [bits(torch.as_tensor(h)) for h in storages]

    if form == "two calls":
        held.extend(hold(p.grad) for p in params)
        expected = values()
        opt.first_step(zero_grad=True)
        assert values() == expected
        descend(opt, params, w)
    else:
        seen: list[list[bytes]] = []

        def closure() -> Tensor:
            loss = quadratic(params)()
            if not held:
                held.extend(hold(p.grad) for p in params)
                seen.append(values())
            return loss

        opt.step(closure)
        expected = seen[0]
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


def test_a_gradient_that_is_a_view_of_the_backward_argument_is_never_written(backend: str, device: str) -> None:
    """p.view(...).backward(v) makes p.grad a tensor of its own on the memory of v."""
    p = torch.randn(LARGE, device=device).requires_grad_()
    v = torch.randn(181, 182, device=device)
    expected, w = bits(v), p.detach().clone()
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=LR)
    p.view(181, 182).backward(v)
    opt.first_step(zero_grad=True)
    assert bits(v) == expected
    descend(opt, [p], [w])
    assert bits(v) == expected


@zero_grad_or_not
def test_gradients_that_are_views_of_one_bucket(zero_grad: bool, backend: str, device: str) -> None:
    """As DistributedDataParallel's gradient_as_bucket_view makes them."""
    params = leaves(9, LARGE, device=device)
    w = [p.detach().clone() for p in params]
    bucket = torch.randn(9 + LARGE, device=device)
    expected = bits(bucket)
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    params[0].grad, params[1].grad = bucket[:9], bucket[9:]
    opt.first_step(zero_grad=zero_grad)
    assert bits(bucket) == expected
    descend(opt, params, w)


def test_bucket_views_that_nobody_holds_do_not_mix_up_the_weights(backend: str, device: str) -> None:
    """Two gradients keep one another's storage alive, whole and out of sight."""
    params = leaves(9, LARGE, device=device)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    bucket = torch.randn(LARGE + 100, device=device)
    params[0].grad, params[1].grad = torch.randn(9, device=device), bucket[51 : LARGE + 51]
    del bucket
    opt.first_step(zero_grad=True)
    descend(opt, params, w)


@zero_grad_or_not
@pytest.mark.parametrize("held", [False, True], ids=["dropped", "held"])
def test_one_tensor_as_gradient_of_two_parameters(zero_grad: bool, held: bool, backend: str, device: str) -> None:
    params = leaves(LARGE, LARGE, device=device)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    shared = torch.randn(LARGE, device=device)
    expected = bits(shared)
    params[0].grad = params[1].grad = shared
    if not held:
        del shared
    opt.first_step(zero_grad=zero_grad)
    length = torch.cat([p.detach() - start for p, start in zip(params, w, strict=True)]).norm()
    assert float(length) == pytest.approx(RHO, rel=1e-4)
    descend(opt, params, w)
    if held:
        assert bits(shared) == expected


@zero_grad_or_not
def test_two_tensors_on_one_memory_as_gradients_of_two_parameters(zero_grad: bool, backend: str, device: str) -> None:
    params = leaves(LARGE, LARGE, device=device)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    g = torch.randn(LARGE, device=device)
    params[0].grad, params[1].grad = g.detach(), g.detach()
    del g
    opt.first_step(zero_grad=zero_grad)
    descend(opt, params, w)


@zero_grad_or_not
def test_expanded_gradients(zero_grad: bool, backend: str, device: str) -> None:
    """One number in memory for many elements: it cannot hold w."""
    params = leaves(LARGE, device=device)
    w = [p.detach().clone() for p in params]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=LR)
    params[0].grad = torch.tensor(0.3, device=device).expand(LARGE)
    opt.first_step(zero_grad=zero_grad)
    torch.testing.assert_close(params[0].detach(), w[0] + RHO / LARGE**0.5)
    descend(opt, params, w)
    params[0].grad = torch.tensor(2.0, device=device).expand(LARGE)
    opt.first_step(zero_grad=zero_grad)
    params[0].grad = torch.tensor(3.0, device=device).expand(LARGE)
    opt.step()
    torch.testing.assert_close(params[0].detach(), w[0] - LR - 3 * LR)


def test_a_gradient_with_a_graph_of_its_own_is_never_written(backend: str, device: str) -> None:
    """As after backward(create_graph=True): the second derivative is still to be taken."""
    p = torch.randn(LARGE, device=device).requires_grad_()
    w = p.detach().clone()
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=LR)
    (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
    expected, held = bits(p.grad), p.grad
    opt.first_step(zero_grad=True)
    assert bits(held) == expected
    descend(opt, [p], [w])


def test_gradients_kept_by_a_hook_are_never_written(backend: str, device: str) -> None:
    params = leaves(LARGE, device=device)
    kept: list[Tensor] = []
    params[0].register_post_accumulate_grad_hook(lambda p: kept.append(p.grad))
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w = params[0].detach().clone()
    opt.step(quadratic(params))
    assert len(kept) == 2
    torch.testing.assert_close(kept[0], 3 * w)


def test_gradients_kept_by_a_tensor_hook_are_never_written(backend: str, device: str) -> None:
    """The hook sees the tensor from which p.grad takes its memory, not p.grad itself."""
    params = leaves(LARGE, device=device)
    kept: list[Tensor] = []
    params[0].register_hook(kept.append)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w = params[0].detach().clone()
    opt.step(quadratic(params))
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


def test_a_parameter_replaced_by_its_caller_between_the_passes_keeps_no_secret(backend: str, device: str) -> None:
    """Gradients assigned between the passes belong to the caller, whatever the first ones were used for."""
    params, w, opt = prepared(backend, device, LARGE)
    opt.first_step(zero_grad=True)
    mine = torch.full((LARGE,), 2.0, device=device)
    params[0].grad = mine
    opt.step()
    torch.testing.assert_close(params[0].detach(), w[0] - 2 * LR)
    assert bool((mine == 2).all())
