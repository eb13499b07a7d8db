"""The whole gradient of L(w + e(w)), ``second_order`` (section 2 and appendix C.4 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import HYPER, LARGE, RHO, assert_all_close, assert_same_bits, leaves, snapshot
from torch import Tensor, nn

from fused_sam import FusedSAM
from fused_sam.batchnorm import first_pass_only
from fused_sam.reference import sam_gradient, sgd_update

# torch warns of the cycle between a parameter and a gradient with a graph; the optimizer breaks it.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")

Loss = Callable[[list[Tensor]], Tensor]
NORMS = [1.0, 1.3, 2.0, 3.0, math.inf]


def bent(params: list[Tensor]) -> Tensor:
    """A loss whose Hessian is neither constant nor diagonal, and couples the tensors."""
    flat = torch.cat([p.flatten() for p in params])
    return (flat.sin() * flat.roll(1).exp()).sum() + (flat.roll(2) * flat).square().sum()


def closure_of(loss: Loss, params: list[Tensor], calls: list[int] | None = None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        if calls is not None:
            calls.append(1)
        value = loss(params)
        value.backward(create_graph=True)
        return value

    return closure


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradient_and_step_are_those_of_the_chain_rule(p: float, adaptive: bool, backend: str, device: str) -> None:
    params = leaves(1, 9, 5, device=device, dtype=torch.float64)
    w = [x.detach().clone() for x in params]
    options = {"rho": 0.2, "adaptive": adaptive, "eta": 0.013, "p": p, **HYPER}
    opt = FusedSAM(params, second_order=True, backend=backend, **options)
    calls: list[int] = []
    loss = opt.step(closure_of(bent, params, calls))
    assert len(calls) == 2
    expected = sam_gradient(bent, w, [0.2] * 3, [adaptive] * 3, p, 0.013, True)
    assert_all_close([loss.detach()], [bent(w)])
    assert_all_close([x.grad.detach() for x in params], expected)
    assert_all_close([x.detach() for x in params], [sgd_update(x, g, None, **HYPER)[0] for x, g in zip(w, expected)])
    first_order = sam_gradient(bent, w, [0.2] * 3, [adaptive] * 3, p, 0.013, False)
    if 1 < p < math.inf or adaptive:
        distance = max(float((a - b).abs().max()) for a, b in zip(expected, first_order))
        assert distance > 1e-3  # else this test could not tell them apart


def test_a_trajectory_with_groups_and_one_that_stays(backend: str, device: str) -> None:
    params = leaves(4, 9, 5, device=device, dtype=torch.float64)
    twins = [x.detach().clone() for x in params]
    groups = [{"params": params[:1], "rho": 0.3}, {"params": params[1:2], "rho": 0.1}]
    opt = FusedSAM([*groups, {"params": params[2:], "perturb": False}], second_order=True, backend=backend, lr=0.013)
    for _ in range(4):
        opt.step(closure_of(bent, params))

        def of_moved(moved: list[Tensor]) -> Tensor:
            return bent([*moved, twins[2]])  # noqa: B023

        expected = sam_gradient(of_moved, twins[:2], [0.3, 0.1], [False] * 2)
        # The parameter that stays gets the gradient at w + e, and what e contributes through its own dependence on it.
        whole = [x.clone().requires_grad_() for x in twins]
        g = torch.autograd.grad(bent(whole), whole, create_graph=True)
        length = torch.sqrt(g[0].square().sum() + g[1].square().sum())
        moved = [whole[0] + 0.3 * g[0] / length, whole[1] + 0.1 * g[1] / length, whole[2]]
        gradient = torch.autograd.grad(bent(moved), whole)
        assert_all_close(gradient[:2], expected)
        assert_all_close([x.grad for x in params], gradient)
        twins = [x - 0.013 * y for x, y in zip(twins, gradient)]
        assert_all_close([x.detach() for x in params], twins)


def test_weight_decay_in_the_ascent_is_differentiated_too(backend: str, device: str) -> None:
    params = leaves(4, 9, device=device, dtype=torch.float64)
    w = [x.detach().clone() for x in params]
    opt = FusedSAM(params, rho=0.3, second_order=True, decay_in_ascent=True, backend=backend, **HYPER)
    opt.step(closure_of(bent, params))
    whole = [x.clone().requires_grad_() for x in w]
    g = torch.autograd.grad(bent(whole), whole, create_graph=True)
    g = [a + HYPER["weight_decay"] * b for a, b in zip(g, whole)]
    length = torch.sqrt(sum(x.square().sum() for x in g))
    expected = torch.autograd.grad(bent([a + 0.3 * b / length for a, b in zip(whole, g)]), whole)
    assert_all_close([x.grad for x in params], expected)


def test_a_zero_gradient_and_one_that_is_none(backend: str, device: str) -> None:
    params = leaves(4, 9, device=device, dtype=torch.float64)
    w = [x.detach().clone() for x in params]
    opt = FusedSAM(params, rho=0.3, second_order=True, backend=backend, lr=0.13)
    opt.step(closure_of(lambda xs: (0.0 * xs[0]).square().sum(), params))
    assert_same_bits(params, w)
    assert params[1].grad is None


def test_networks_with_batchnorm_and_large_layers(backend: str, device: str) -> None:
    """Against the gradient by differences of L(w + e(w)) along a direction; statistics count each batch once."""
    net = nn.Sequential(nn.Linear(181, 182), nn.BatchNorm1d(182), nn.Tanh(), nn.Linear(182, 3)).to(device).double()
    x, y = torch.randn(7, 181, device=device).double(), torch.randint(3, (7,), device=device)
    params = list(net.parameters())
    assert params[0].numel() == LARGE
    w = [p.detach().clone() for p in params]
    names = [name for name, _ in net.named_parameters()]
    along = [torch.randn_like(p) for p in w]

    def at(ws: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(net, dict(zip(names, ws)), (x,)), y)

    def sharp(distance: float) -> float:
        ws = [(a + distance * b).requires_grad_() for a, b in zip(w, along)]
        g = torch.autograd.grad(at(ws), ws)
        length = torch.cat([v.flatten() for v in g]).norm()
        with torch.no_grad():
            return float(at([a + 0.3 * b / length for a, b in zip(ws, g)]))

    expected = (sharp(1e-6) - sharp(-1e-6)) / 2e-6
    net[1].reset_running_stats()
    opt = FusedSAM(params, rho=0.3, second_order=True, backend=backend, lr=0.0)
    first_pass_only(net, opt)
    opt.step(closure_of(lambda _: nn.functional.cross_entropy(net(x), y), params))
    assert int(net[1].num_batches_tracked) == 1
    got = sum(float((p.grad * b).sum()) for p, b in zip(params, along))
    assert got == pytest.approx(expected, rel=1e-6)
    assert_same_bits(params, w)


def test_lists_of_closures_average_whole_gradients(backend: str, device: str) -> None:
    params = leaves(4, 9, device=device, dtype=torch.float64)
    w = [x.detach().clone() for x in params]
    losses: list[Loss] = [bent, lambda xs: (xs[0].sum() * xs[1].exp().sum()).cos()]
    opt = FusedSAM(params, rho=0.3, second_order=True, backend=backend, lr=0.13)
    opt.step([closure_of(loss, params) for loss in losses])
    each = [sam_gradient(loss, w, [0.3] * 2, [False] * 2) for loss in losses]
    assert_all_close([x.grad for x in params], [(a + b) / 2 for a, b in zip(*each)])


def test_autograd_still_sees_the_update(backend: str, device: str) -> None:
    """Only the excursion to w + e is hidden from it."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, second_order=True, backend=backend, lr=0.13)
    stale = params[0].square().sum()  # keeps the parameter itself
    opt.step(closure_of(bent, params))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_what_cannot_work_is_refused(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    w = snapshot(params)
    opt = FusedSAM(params, rho=RHO, second_order=True, backend=backend, lr=0.13)
    with pytest.raises(RuntimeError, match=r"calls loss.backward\(create_graph=True\)"):
        opt.step(lambda: bent(params).backward())
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="needs the closure form"):
        opt.first_step()
    assert_same_bits(params, w)
