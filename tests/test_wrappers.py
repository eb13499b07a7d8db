"""Whoever wraps the optimizer, copies its attributes or overrides its step sees the state that it has itself."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from helpers import HYPER, assert_same_bits, leaves, quadratic, snapshot
from torch import Tensor

from fused_sam import FusedSAM

RHO = 0.4


class Wrapper:
    """Borrows the optimizer's methods with a copy of its attributes, and steps through it: Fabric's does."""

    def __init__(self, optimizer: FusedSAM) -> None:
        names = ("step", "state_dict")
        self.__dict__ = {name: x for name, x in optimizer.__dict__.items() if name not in names}
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})
        self.wrapped, self.steps = optimizer, 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return self.wrapped.step(closure or (lambda: None)) if self.wrapped.perturbed else self.wrapped.step(closure)


def make(params: Any, **options: Any) -> FusedSAM:
    return FusedSAM(params, rho=RHO, **HYPER, **options)


def weights(*sizes: int) -> list[Tensor]:
    torch.manual_seed(3)
    return leaves(*sizes)


def two_calls(opt: Any, params: list[Tensor]) -> None:
    quadratic(params)()
    opt.first_step(zero_grad=True)
    quadratic(params)()
    opt.second_step(zero_grad=True)


def trajectory(steps: int = 3, **options: Any) -> list[Tensor]:
    params = weights(9, 67)
    opt = make(params, **options)
    for _ in range(steps):
        two_calls(opt, params)
    return params


def test_a_copy_of_the_attributes_shares_the_step() -> None:
    params = weights(9, 67)
    opt = make(params)
    wrapper: Any = Wrapper(opt)
    for _ in range(3):
        two_calls(wrapper, params)
        assert not opt.perturbed
    assert_same_bits(params, trajectory())
    assert wrapper.steps == 3
    assert wrapper.last is opt.last
    quadratic(params)()
    wrapper.first_step()
    assert opt.perturbed
    opt.restore()
    assert not wrapper.perturbed


@pytest.mark.parametrize("through", ["wrapper", "optimizer"])
def test_a_resume_is_seen_by_all(through: str) -> None:
    """Into an optimizer that has stepped: the momentum and the groups that it had are no more."""
    start = weights(9, 67)
    first = make(start)
    for _ in range(2):
        two_calls(first, start)
    saved = copy.deepcopy(first.state_dict())
    two_calls(first, start)
    params = weights(9, 67)
    opt = make(params)
    wrapper: Any = Wrapper(opt)
    two_calls(wrapper, params)
    opt.param_groups[0].update(lr=0.5, momentum=0.1)
    (wrapper if through == "wrapper" else opt).load_state_dict(saved)
    for p, w in zip(params, trajectory(2), strict=True):
        p.data.copy_(w)
    assert opt.state is wrapper.state
    assert opt.param_groups is wrapper.param_groups
    two_calls(wrapper, params)
    assert_same_bits(params, start)


def test_state_and_groups_that_are_replaced_are_used() -> None:
    params = weights(9)
    opt = make(params)
    two_calls(opt, params)
    opt.state = copy.copy(opt.state)
    opt.state[params[0]] = {}
    opt.param_groups = [{**opt.param_groups[0], "lr": 0.0}]
    w = snapshot(params)
    two_calls(opt, params)
    assert snapshot(params) == w
    assert opt.state[params[0]]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_step_of_its_own(how: Any) -> None:
    params = weights(9)
    opt = make(params)
    two_calls(opt, params)
    params_of_copy, twin = how((params, opt))
    w = snapshot(params)
    two_calls(twin, params_of_copy)
    assert snapshot(params) == w
    two_calls(opt, params)
    assert_same_bits(params, params_of_copy)


class Mixin:
    """A step in two calls, from beside the optimizer's own classes."""

    def step(self, closure: Any) -> Any:
        loss = closure()
        self.first_step(zero_grad=True)
        closure()
        self.second_step(zero_grad=True)
        return loss


class Mixed(Mixin, FusedSAM):
    pass


class Whole(FusedSAM):
    step = Mixin.step  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Whole, Mixed])
def test_a_subclass_whose_step_makes_both_calls(kind: type[FusedSAM]) -> None:
    params = weights(9, 67)
    opt = kind(params, rho=RHO, **HYPER)
    calls: list[int] = []
    opt.register_step_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        opt.zero_grad()
        opt.step(quadratic(params))
    assert_same_bits(params, trajectory())
    assert len(calls) == 3
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    opt.step(quadratic(params))
    assert not opt.perturbed


class Counting(FusedSAM):
    steps = cleared = 0

    def step(self, closure: Any = None, **options: Any) -> Any:
        self.steps += 1
        return super().step(closure, **options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)


def test_the_outermost_step_and_zero_grad_are_called() -> None:
    params = weights(9, 67)
    opt = Counting(params, rho=RHO, **HYPER)
    two_calls(opt, params)
    assert opt.steps == 1
    opt.cleared = 0
    opt.step(quadratic(params))
    opt.step([quadratic(params)] * 2)
    assert opt.cleared == 3


class Decorated(FusedSAM):
    step = torch.no_grad()(FusedSAM.step)


class Wrapping(FusedSAM):
    @functools.wraps(FusedSAM.step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("optimizer", [Decorated, Wrapping])
def test_hooks_see_one_step_of_a_class_whose_step_looks_like_ours(optimizer: type[FusedSAM]) -> None:
    params = leaves(9)
    opt = optimizer(params, rho=RHO, lr=0.13)
    seen: list[int] = []
    opt.register_step_post_hook(lambda *_: seen.append(1))
    opt.step(quadratic(params))
    assert seen == [1]


def test_hooks_and_schedulers_see_second_step_once() -> None:
    params = weights(9, 67)
    opt = make(params)
    hooks: list[int] = []
    opt.register_step_post_hook(lambda *_: hooks.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)  # warns unless it sees a step before its own
    two_calls(opt, params)
    scheduler.step()
    assert len(hooks) == 1


def test_attributes_are_the_same_for_all() -> None:
    opt = make(weights(9))
    wrapper: Any = Wrapper(opt)
    wrapper.max_grad_norm = 0.25
    assert opt.max_grad_norm == 0.25
    opt.last = None
    assert wrapper.last is None


def test_the_old_name_of_looksam_alpha_warns() -> None:
    with pytest.warns(DeprecationWarning, match="looksam_alpha"):
        opt = make(weights(9), interval=2, reuse=0.3)
    assert opt.looksam_alpha == 0.3
