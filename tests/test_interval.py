"""Steps that are not perturbed: ``interval``, ``start``, ``stop`` and ``perturb_next``."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    FLOAT64_RTOL,
    HYPER,
    LARGE,
    RHO,
    assert_all_close,
    assert_bits_of_torch,
    assert_same_bits,
    batches,
    buffers,
    closure_for,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
    through_a_file,
)
from torch import Tensor
from torch.amp import GradScaler

from fused_sam import FusedSAM, ReferenceSAM

# Options, and the steps of the first twelve that they perturb.
SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every": ({}, list(range(12))),
    "third": ({"interval": 3}, [0, 3, 6, 9]),
    "from": ({"start": 5}, [5, 6, 7, 8, 9, 10, 11]),
    "until": ({"stop": 2}, [0, 1]),
    "third from until": ({"interval": 3, "start": 2, "stop": 9}, [2, 5, 8]),
}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, HYPER),
    "Adam": (torch.optim.Adam, {"lr": 0.013, "weight_decay": 0.017}),
}


def by_closure(opt: FusedSAM, closure: Callable[[], Any]) -> None:
    opt.step(closure)


def by_list(opt: FusedSAM, closure: Callable[[], Any]) -> None:
    opt.step([closure])


def by_two_calls(opt: FusedSAM, closure: Callable[[], Any]) -> None:
    opt.zero_grad()
    closure()
    if opt.perturb_next:
        opt.first_step(zero_grad=True)
        assert not opt.perturb_next
        closure()
    opt.step()


def counted(closure: Callable[[], Any], calls: list[int]) -> Callable[[], Any]:
    def counting() -> Any:
        calls.append(1)
        return closure()

    return counting


@pytest.mark.parametrize(
    ("name", "form"), [*((name, by_closure) for name in SCHEDULES), ("third", by_list), ("until", by_two_calls)]
)
def test_the_scheduled_steps_are_perturbed_and_the_others_are_plain_sgd(
    name: str, form: Callable[..., None], backend: str, device: str
) -> None:
    """Against the float64 reference, with rho = 0 where a step is not perturbed; and no pass is made in vain."""
    options, perturbed = SCHEDULES[name]
    net, data = small_net(device=device), batches(12, device=device)
    twin = copy.deepcopy(net)
    opt = FusedSAM(net.parameters(), rho=0.4, backend=backend, **options, **HYPER)
    reference = ReferenceSAM(twin.parameters(), rho=0.4, **HYPER)
    for step, batch in enumerate(data):
        calls: list[int] = []
        assert opt.perturb_next == (step in perturbed)
        form(opt, counted(closure_for(net, batch), calls))
        assert len(calls) == 1 + (step in perturbed)
        reference.param_groups[0]["rho"] = 0.4 if step in perturbed else 0.0
        reference.step(lambda batch=batch: (twin.zero_grad(), closure_for(twin, batch)())[1])
        for p, w in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, w.grad, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
    assert_all_close(net.parameters(), twin.parameters())
    assert_all_close(buffers(opt), buffers(reference))


@pytest.mark.parametrize(
    ("base", "form"), [("SGD", by_closure), ("SGD", by_list), ("SGD", by_two_calls), ("Adam", by_closure)]
)
def test_unperturbed_steps_are_the_base_optimizers_bit_for_bit(
    base: str, form: Callable[..., None], backend: str, device: str, ieee_roots: None
) -> None:
    base_class, options = BASES[base]
    params = leaves(9, LARGE, 67, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt = FusedSAM(params, base_class, rho=RHO, start=100, backend=backend, **options)
    plain = base_class(twins, foreach=False, **options)
    for _ in range(4):
        form(opt, quadratic(params))
        plain.zero_grad()
        quadratic(twins)()
        plain.step()
    assert_bits_of_torch(params, twins)
    assert_bits_of_torch((p.grad for p in params), [p.grad for p in twins], "gradient")


def test_several_micro_batches_in_an_unperturbed_step_are_averaged(backend: str, device: str) -> None:
    params = leaves(9, device=device, dtype=torch.float64)
    w, calls = params[0].detach().clone(), []
    opt = FusedSAM(params, rho=RHO, start=1, backend=backend, lr=0.13)
    opt.step([counted(quadratic(params), calls), lambda: params[0].sum().backward()])
    assert len(calls) == 1
    torch.testing.assert_close(params[0].detach(), w - 0.13 * (3 * w + 1) / 2)


def test_the_wrong_call_is_refused_and_loses_nothing(backend: str, device: str) -> None:
    """A step() that wants first_step() before it, and a first_step() whose second pass would double the gradient."""
    params = leaves(9, LARGE, device=device)
    opt = FusedSAM(params, rho=RHO, interval=2, backend=backend, lr=0.13)
    w, gradient = snapshot(params), [torch.randn(p.shape, device=device) for p in params]
    set_grads(params, gradient)
    with pytest.raises(RuntimeError, match=r"step\(\) needs first_step\(\) before it"):
        opt.step()
    opt.first_step()
    opt.step()
    w = snapshot(params)
    for zero_grad in (False, True):
        with pytest.raises(RuntimeError, match=r"first_step\(\) in a step that is not perturbed \(.*interval=2.*step"):
            opt.first_step(zero_grad=zero_grad)
    assert_same_bits(params, w)
    assert_same_bits([p.grad for p in params], gradient, "gradient")
    assert not opt.perturbed
    opt.second_step(zero_grad=True)
    assert all(p.grad is None for p in params)
    assert opt.perturb_next


def test_what_is_not_finished_is_not_counted(backend: str, device: str) -> None:
    """An exception, a restore and a refused gradient leave the step to be made again."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, interval=2, backend=backend, lr=0.13)

    def failing() -> None:
        raise KeyError

    for expected in (True, False):
        assert opt.perturb_next == expected
        for closure in (failing, [quadratic(params), failing]):
            with pytest.raises(KeyError):
                opt.step(closure)
            assert opt.perturb_next == expected
        quadratic(params)()
        if expected:
            opt.first_step()
            opt.restore()
        params[0].grad = torch.ones(9, device=device).to_sparse()
        with pytest.raises(ValueError, match="sparse"):
            opt.first_step() if expected else opt.step()
        assert opt.perturb_next == expected
        opt.step(quadratic(params))
    assert opt.perturb_next


def sgd_and_back(opt: FusedSAM, params: list[Tensor]) -> dict[str, Any]:
    plain = torch.optim.SGD([p.detach().clone() for p in params], lr=0.5)
    plain.load_state_dict(opt.state_dict())
    return plain.state_dict()


@pytest.mark.parametrize("by_sgd", [False, True], ids=["file", "torch.optim.SGD"])
def test_a_resumed_run_goes_on_in_the_phase_it_was_in(by_sgd: bool, backend: str, device: str) -> None:
    params = leaves(9, 67, device=device)
    opt = FusedSAM(params, rho=RHO, interval=3, backend=backend, **HYPER)
    for _ in range(2):
        opt.step(quadratic(params))
    twins = [p.detach().clone().requires_grad_() for p in params]
    resumed = FusedSAM(twins, rho=0.9, interval=3, backend=backend, lr=0.5)
    resumed.load_state_dict(through_a_file(sgd_and_back(opt, params) if by_sgd else opt.state_dict()))
    for _ in range(5):
        assert resumed.perturb_next == opt.perturb_next
        opt.step(quadratic(params))
        resumed.step(quadratic(twins))
    assert_same_bits(twins, params)
    assert_same_bits(buffers(resumed), buffers(opt), "momentum")


def test_only_a_schedule_leaves_a_trace_in_checkpoints_and_none_is_needed_in_them(backend: str) -> None:
    params = leaves(9)
    every, third = FusedSAM(params, backend=backend), FusedSAM(params, interval=3, backend=backend)
    third.add_param_group({"params": leaves(3)})
    third.step(quadratic(params))
    assert "sam_step" not in every.state_dict()["param_groups"][0]
    assert [g.get("sam_step") for g in third.state_dict()["param_groups"]] == [1, None]
    plain = torch.optim.SGD([{"params": params}, {"params": leaves(3)}])
    third.load_state_dict(plain.state_dict())
    assert third.param_groups[0]["sam_step"] == 1
    # An optimizer without a schedule of its own goes on counting for the next that has one.
    third.param_groups.pop()
    every.load_state_dict(third.state_dict())
    for _ in range(2):
        assert every.perturb_next
        every.step(quadratic(params))
    assert every.param_groups[0]["sam_step"] == 3


@pytest.mark.parametrize("factor", [1.0, math.inf], ids=str)
def test_under_a_scaler_unperturbed_steps_are_unscaled_or_skipped(factor: float, backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt = FusedSAM(params, rho=RHO, interval=2, backend=backend, **HYPER)
    plain = FusedSAM(twins, rho=RHO, interval=2, backend=backend, **HYPER)
    scaler = GradScaler(device, init_scale=2.0**10)
    for step in range(4):
        opt.zero_grad()
        for _ in range(1 + opt.perturb_next):
            scaler.scale(sum(1.5 * p.square().sum() for p in params)).backward()
            if opt.perturb_next:
                opt.first_step(zero_grad=True)
        params[1].grad[500] *= factor if step == 1 else 1.0
        scaler.step(opt)
        scaler.update()
        if step == 1 and factor != 1.0:
            plain.param_groups[0]["sam_step"] += 1
            assert scaler.get_scale() == 2.0**9
        else:
            plain.step(quadratic(twins))
        assert_same_bits(params, twins)
    assert opt.param_groups[0]["sam_step"] == 4


@pytest.mark.parametrize(("interval", "start", "stop"), list(itertools.product([1, 2, 5], [0, 3], [None, 4, 11])))
def test_the_schedule_is_what_its_definition_says(interval: int, start: int, stop: int | None) -> None:
    params = leaves(3)
    opt = FusedSAM(params, rho=RHO, interval=interval, start=start, stop=stop, lr=0.1)
    expected = set(range(start, 20 if stop is None else stop, interval))
    for step in range(20):
        assert opt.perturb_next == (step in expected)
        opt.step(quadratic(params))
