"""What belongs to the base optimizer: its state, its checkpoints, its modes, its options, and plain steps of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HYPER, RHO, assert_bits_of_torch, assert_same_bits, leaves, quadratic, snapshot, state_tensors
from torch import Tensor

from fused_sam import FusedSAM

Params = list[Tensor]


class Codes(torch.optim.Optimizer):
    """Momentum in 8-bit codes, whose dtype only its own load_state_dict keeps; and where w began."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["start"] = p.detach().clone()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for p, entry in zip(params, copy.deepcopy(state_dict)["state"].values(), strict=True):
            self.state[p] = entry

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "codes" not in state:
                    state["codes"], state["unit"] = torch.zeros_like(p, dtype=torch.int8), torch.ones(())
                assert state["codes"].dtype == torch.int8
                m = state["codes"] * state["unit"] * group["momentum"] + p.grad
                state["unit"] = m.abs().max() / 127
                state["codes"] = (m / state["unit"]).round().to(torch.int8)
                p.sub_(group["lr"] * (m + 0.1 * (p - state["start"])))


class Averaged(torch.optim.SGD):
    """Steps in training mode only, as a Schedule-Free optimizer; evaluation is at other weights."""

    training = False

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert self.training
        super().step()


class Clipped(torch.optim.SGD):
    def __init__(self, params: Any, max_grad_norm: float = 7.0, **options: Any) -> None:
        super().__init__(params, **options)
        self.max_grad_norm = max_grad_norm


def train(params: Params, opt: torch.optim.Optimizer, steps: int) -> None:
    """Plain steps, or SAM's in two calls."""
    for _ in range(steps):
        opt.zero_grad()
        quadratic(params)()
        if isinstance(opt, FusedSAM):
            opt.first_step(zero_grad=True)
            quadratic(params)()
        opt.step()


OLD_KEYS = ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def as_torch_once_saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Counts of steps were numbers, and groups had fewer keys."""
    for entry in state_dict["state"].values():
        entry["step"] = int(entry["step"])
    for group in state_dict["param_groups"]:
        for key in OLD_KEYS:
            group.pop(key, None)
    return state_dict


BASES: dict[str, tuple[Any, dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "8-bit": (Codes, {"lr": 0.013}, lambda x: x),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.013}, lambda x: x),
    "old Adam": (
        torch.optim.Adam,
        {"lr": 0.013, "amsgrad": True, "weight_decay": 0.017, "foreach": False},
        as_torch_once_saved,
    ),
    "old AdamW": (torch.optim.AdamW, {"lr": 0.013, "betas": (0.8, 0.97), "foreach": False}, as_torch_once_saved),
    "old NAdam": (torch.optim.NAdam, {"lr": 0.013, "betas": (0.8, 0.97), "foreach": False}, as_torch_once_saved),
}


@pytest.mark.parametrize("name", BASES)
def test_a_checkpoint_of_a_base_resumes_as_in_the_base_itself(name: str, backend: str, ieee_roots: None) -> None:
    """With rho = 0 a step is the base's own; with the checkpoint of a FusedSAM, too."""
    base, options, aged = BASES[name]
    params = leaves(67, 5)
    first = base(params, **options)
    train(params, first, 3)
    saved, start = aged(copy.deepcopy(first.state_dict())), [p.detach().clone() for p in params]
    results = []
    for make in (base, FusedSAM, FusedSAM):
        with torch.no_grad():
            for p, w in zip(params, start, strict=True):
                p.copy_(w)
        ours = make is FusedSAM
        opt = FusedSAM(params, base, rho=0.0, backend=backend, **options) if ours else base(params, **options)
        opt.load_state_dict(copy.deepcopy(saved))
        if ours and len(results) == 2:
            again = FusedSAM(params, base, rho=0.0, backend=backend, **options)
            again.load_state_dict(opt.state_dict())
            opt = again
        train(params, opt, 2)
        results.append([t.clone() for t in (*params, *state_tensors(opt))])
    for tensors in results[1:]:
        assert [t.dtype for t in tensors] == [t.dtype for t in results[0]]
        same = assert_bits_of_torch if base in (torch.optim.Adam, torch.optim.AdamW) else assert_same_bits
        same(tensors, results[0])


def test_a_checkpoint_without_counts_of_steps_is_refused(backend: str, device: str) -> None:
    """apex keeps the count in the group; torch.optim's Adam cannot read that either."""
    params = leaves(9, device=device)
    opt = FusedSAM(params, torch.optim.AdamW, rho=RHO, backend=backend, lr=0.013)
    train(params, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        del entry["step"]
    w = snapshot(params)
    with pytest.raises(ValueError, match=r"Invalid state of parameter 0.* Must have a step"):
        opt.load_state_dict(saved)
    train(params, opt, 1)
    assert snapshot(params) != w


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.NAdam], ids=["SGD", "NAdam"])
def test_a_checkpoint_of_the_common_class_begins_without_its_copies_of_w(base: Any, backend: str) -> None:
    params = leaves(9, 5)
    opt, fresh = (FusedSAM(x, base, rho=RHO, backend=backend, lr=0.013) for x in (params, copy.deepcopy(params)))
    saved = opt.state_dict()
    saved["state"] = {i: {"old_p": torch.ones_like(p)} for i, p in enumerate(params)}
    opt.load_state_dict(saved)
    train(params, opt, 2)
    train(fresh.param_groups[0]["params"], fresh, 2)
    assert_same_bits(params, fresh.param_groups[0]["params"])
    assert not any("old_p" in entry for entry in opt.state.values())


def test_modes_of_a_base_are_its_own(backend: str) -> None:
    params = leaves(9)
    opt = FusedSAM(params, Averaged, rho=RHO, backend=backend, **HYPER)
    opt.train()
    held = opt.eval
    train(params, opt, 2)
    quadratic(params)()
    opt.first_step(zero_grad=True)
    opt.train()
    for evaluate in (held, opt.eval):
        with pytest.raises(RuntimeError, match=r"eval\(\) while the weights are perturbed"):
            evaluate()
    opt.restore()
    opt.eval()
    with pytest.raises(AssertionError):
        train(params, opt, 1)
    assert not opt.perturbed
    assert not hasattr(FusedSAM(leaves(3)), "train")


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_plain_steps_between_are_the_bases_own(base: Any, backend: str, device: str) -> None:
    """By name, and by the attribute that the common class has, on whose groups schedulers are built."""
    options = HYPER if base is torch.optim.SGD else {"lr": 0.013, "weight_decay": 0.017}
    params = leaves(67, 5, device=device)
    twins = copy.deepcopy(params)
    opt, plain = FusedSAM(params, base, rho=0.0, backend=backend, **options), base(twins, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt.base_optimizer, gamma=0.7)
    other = torch.optim.lr_scheduler.ExponentialLR(plain, gamma=0.7)
    assert opt.base_optimizer is opt.base_optimizer
    for step in (opt.plain_step, opt.base_optimizer.step):
        train(params, opt, 1)
        opt.zero_grad()
        quadratic(params)()
        step()
        train(twins, plain, 2)
        scheduler.step()
        other.step()
    assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    opt.first_step()
    for step in (opt.plain_step, opt.base_optimizer.step):
        with pytest.raises(RuntimeError, match="while the weights are perturbed"):
            step()
    copy.deepcopy(opt.restore() or opt).plain_step()


class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_a_base_without_a_rate() -> None:
    params = leaves(3)
    opt = FusedSAM(params, WithoutRate, rho=RHO)
    with pytest.raises(RuntimeError, match="needs first_step"):
        opt.step()
    w = snapshot(params)
    train(params, opt, 1)
    assert snapshot(params) != w


def test_what_is_done_to_the_base_optimizer_is_done_to_ours(backend: str) -> None:
    params, more = leaves(9, 5), leaves(4)
    opt = FusedSAM(params, rho=RHO, backend=backend, fused=True, **HYPER)
    train(params, opt, 1)
    other = FusedSAM(params, rho=RHO, backend=backend, fused=True, **{**HYPER, "lr": 0.7})
    other.base_optimizer.load_state_dict(opt.base_optimizer.state_dict())
    assert other.param_groups[0]["lr"] == HYPER["lr"]
    assert_same_bits(state_tensors(other), state_tensors(opt))
    opt.base_optimizer.add_param_group({"params": more})
    assert opt.param_groups[1]["rho"] == RHO
    train([*params, *more], opt, 1)
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append(opt.perturbed))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    assert opt.base_optimizer.step(quadratic([*params, *more])).item() > 0
    assert seen == [False]
    scheduler.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_steps_the_base_optimizer(fused: bool, backend: str) -> None:
    """It unscales, and skips a step that overflows."""
    params = leaves(9, 5)
    twins = copy.deepcopy(params)
    opt, plain = FusedSAM(params, rho=RHO, backend=backend, fused=fused, **HYPER), torch.optim.SGD(twins, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, math.inf):
        w = snapshot(params)
        opt.zero_grad()
        scaler.scale(factor * sum(1.5 * (p * p).sum() for p in params)).backward()
        scaler.step(opt.base_optimizer)
        scaler.update()
        assert (snapshot(params) == w) == (factor == math.inf)
    train(twins, plain, 1)
    torch.testing.assert_close(params, twins)


def test_options_of_one_name_are_told_apart_or_refused() -> None:
    opt = FusedSAM(leaves(3), Clipped, rho=RHO, max_grad_norm=0.3, base_options={"max_grad_norm": 0.5, "lr": 0.1})
    assert (opt.max_grad_norm, opt.base_optimizer.max_grad_norm, opt.param_groups[0]["lr"]) == (0.3, 0.5, 0.1)
    with pytest.raises(ValueError, match=r"Invalid lr=0\.1 and lr=0\.7\. Must be given once"):
        FusedSAM(leaves(3), rho=RHO, lr=0.1, base_options={"lr": 0.7})
    with pytest.raises(ValueError, match=r"Adadelta\. Must have no 'rho' in its groups"):
        FusedSAM(leaves(3), torch.optim.Adadelta, rho=RHO)


@pytest.mark.parametrize(
    "option", [{"lr": math.nan}, {"lr": torch.tensor(math.nan)}, {"weight_decay": math.nan}, {"momentum": math.nan}]
)
def test_what_is_no_number_is_refused(option: dict[str, float]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"Invalid {name}=nan"):
        FusedSAM(leaves(3), rho=RHO, **option)
    opt = FusedSAM(leaves(3), rho=RHO)
    with pytest.raises(ValueError, match=f"Invalid {name}=nan"):
        opt.add_param_group({"params": leaves(2), **option})
    assert len(opt.param_groups) == 1
    with pytest.raises(RuntimeError):
        opt.add_param_group({"params": leaves(2), "eta": torch.ones(2)})
    assert len(opt.param_groups) == 1


def test_another_default_device_changes_nothing(backend: str) -> None:
    params, twins = leaves(9), leaves(9)
    with torch.no_grad():
        twins[0].copy_(params[0])
    train(twins, FusedSAM(twins, torch.optim.AdamW, rho=RHO, backend=backend, lr=0.013), 2)
    with torch.device("meta"):
        train(params, FusedSAM(params, torch.optim.AdamW, rho=RHO, backend=backend, lr=0.013), 2)
    assert_same_bits(params, twins)
