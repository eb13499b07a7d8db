"""Hyperparameters, step hooks and learning rate schedulers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import RHO, assert_as_torch, assert_bits_of_torch, leaves, quadratic, snapshot
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_sam import FusedSAM

BAD: dict[type[torch.optim.Optimizer], list[dict[str, Any]]] = {
    torch.optim.SGD: [{"lr": -0.1}, {"momentum": -0.9}, {"weight_decay": -1e-4}, {"momentum": 0.0, "nesterov": True}],
    torch.optim.Adam: [{"lr": -0.1}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"differentiable": True}],
    torch.optim.AdamW: [{"eps": -1e-8}, {"weight_decay": -0.1}],
}


@pytest.mark.parametrize("base", BAD, ids=lambda base: base.__name__)
def test_bad_base_options_are_refused_as_torch_does(base: type[torch.optim.Optimizer], backend: str) -> None:
    for options in BAD[base]:
        with pytest.raises(ValueError, match=r"Invalid|Nesterov"):
            FusedSAM(leaves(3), base, backend=backend, **options)


def test_unknown_options_are_refused_by_name(backend: str) -> None:
    for base in (torch.optim.SGD, torch.optim.Adam):
        with pytest.raises(TypeError, match="momentun"):
            FusedSAM(leaves(3), base, backend=backend, momentun=0.9)
    with pytest.raises(ValueError, match="empty parameter list"):
        FusedSAM([], backend=backend)
    with pytest.raises((ValueError, RuntimeError), match="abacus"):
        FusedSAM(leaves(3), backend="abacus")


def test_defaults_are_those_of_the_paper_and_of_torch() -> None:
    group = FusedSAM(leaves(3)).param_groups[0]
    assert (group["rho"], group["adaptive"], group["decay_in_ascent"]) == (0.05, False, False)
    for key, value in torch.optim.SGD(leaves(3)).defaults.items():
        assert group[key] == value or key in ("foreach", "fused")


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_hooks_run_once_a_step(base: type[torch.optim.Optimizer], backend: str, device: str) -> None:
    """Also those on all optimizers: the base optimizer, if there is one, is no optimizer of the user's."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, base, rho=RHO, backend=backend, lr=0.13)
    seen: list[tuple[str, bool]] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o.perturbed)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o.perturbed)))
    of_all: list[object] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: of_all.append(o)),
        register_optimizer_step_post_hook(lambda o, args, kwargs: of_all.append(o)),
    ]
    try:
        opt.step(quadratic(params))
    finally:
        for handle in handles:
            handle.remove()
    assert [o is opt for o in of_all] == [True, True]
    assert seen == [("pre", False), ("post", False)]
    seen.clear()
    opt.zero_grad()
    quadratic(params)()
    opt.first_step(zero_grad=True)
    assert seen == []
    quadratic(params)()
    opt.second_step()
    assert seen == [("pre", True), ("post", False)]


class Subclass(FusedSAM):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("optimizer", [FusedSAM, Subclass])
def test_a_profiler_sees_one_step_by_the_name_of_its_class(optimizer: type[FusedSAM]) -> None:
    params = leaves(9)
    opt = optimizer(params, rho=RHO, lr=0.13)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), torch.profiler.profile() as profile:
            opt.step(quadratic(params))
            assert torch.is_grad_enabled() == recorded
        names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
        assert names == [f"Optimizer.step#{optimizer.__name__}.step"]


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.7**epoch),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.4, total_steps=9),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_schedulers_drive_the_base_step_without_warning(
    scheduler: str, base: type[torch.optim.Optimizer], backend: str, device: str, ieee_roots: None
) -> None:
    """With rho = 0, so that torch's own optimizer under the same schedule says what is right."""
    options = {"lr": 0.13, "momentum": 0.87} if base is torch.optim.SGD else {"lr": 0.13}
    params = leaves(67, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, plain = FusedSAM(params, base, rho=0.0, backend=backend, **options), base(twins, **options)
    ours, theirs = SCHEDULERS[scheduler](opt), SCHEDULERS[scheduler](plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            opt.zero_grad()
            if step % 2:
                opt.step(quadratic(params))
            else:
                quadratic(params)()
                opt.first_step(zero_grad=True)
                quadratic(params)()
                opt.second_step()
            plain.zero_grad()
            quadratic(twins)()
            plain.step()
            ours.step()
            theirs.step()
            assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
            (assert_bits_of_torch if base is torch.optim.SGD else assert_as_torch)(params, twins)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam], ids=["SGD", "Adam", "NAdam"])
def test_a_learning_rate_reaches_the_base_after_a_checkpoint_too(
    base: type[torch.optim.Optimizer], backend: str, device: str
) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, base, rho=RHO, backend=backend, lr=0.13)
    opt.step(quadratic(params))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    w = snapshot(params)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(quadratic(params))
    assert snapshot(params) == w
    opt.param_groups[0]["lr"] = 0.5
    opt.step(quadratic(params))
    assert snapshot(params) != w
