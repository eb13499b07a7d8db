"""Whole trajectories: against the float64 reference, torch.optim.SGD, other bases and between backends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import assert_within_ulp, exact, ulp
from helpers import (
    ADAM_CONFIGS,
    FEW_SIZES,
    FLOAT64_RTOL,
    HYPER,
    LARGE,
    LOW_PRECISION_FACTOR,
    MOMENTUM_ULP,
    PERTURB_ULP,
    RHO,
    SGD_CONFIGS,
    SIXTEEN_BIT,
    UPDATE_ULP,
    assert_all_close,
    assert_as_torch,
    assert_bits_of_torch,
    assert_same_bits,
    batches,
    buffers,
    closure_for,
    gradient_stream,
    ids,
    momentum_of,
    set_grads,
    small_net,
    state_tensors,
    strided_pairs,
    through_a_file,
    two_calls,
    zeroing,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, ReferenceSAM

STEPS = 12
GROUP_OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.13, "momentum": 0.87, "weight_decay": 0.017, "rho": 0.07},
    {"lr": 0.031, "momentum": 0.41, "dampening": 0.3, "rho": 0.21, "adaptive": True},
    {"lr": 0.27, "nesterov": True, "momentum": 0.6, "weight_decay": 0.003, "rho": 0.011},
    {"lr": 0.09, "momentum": 0.0, "maximize": True, "weight_decay": 0.05},
]


def grouped(params: list[Tensor]) -> list[dict[str, Any]]:
    """The parameters dealt out to four groups that share no hyperparameter."""
    return [{"params": params[i :: len(GROUP_OPTIONS)], **o} for i, o in enumerate(GROUP_OPTIONS)]


def assert_follows(actual: Tensor, reference: Tensor, magnitude: np.ndarray, limit: float, what: str) -> None:
    """In ulps, except in float64: there the reference's own norm is some ulps off."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, reference, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL, msg=what)
    else:
        assert_within_ulp(actual, exact(reference), magnitude, limit, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("scale", [1.0, 1e-6], ids=["unit", "small"])
def test_trajectory_of_four_groups_matches_the_float64_reference(
    dtype: torch.dtype, scale: float, backend: str, device: str
) -> None:
    """Perturbed weights, weights and momentum at every step, through a checkpoint in the middle."""
    start = [torch.randn(n).to(device=device, dtype=dtype) for n in FEW_SIZES]
    params, wide = [p.clone() for p in start], [p.double() for p in start]
    optimizer = FusedSAM(grouped(params), backend=backend, lr=0.5)
    reference = ReferenceSAM(grouped(wide), lr=0.5)
    largest = [np.abs(exact(p)) for p in start]
    largest_m = [np.zeros_like(x) for x in largest]
    for step, (first, second) in enumerate(gradient_stream([p.shape for p in start], STEPS, dtype, scale)):
        if step == 5:
            saved = through_a_file(optimizer.state_dict())
            optimizer = FusedSAM(grouped(params), backend=backend, lr=0.5)
            optimizer.load_state_dict(saved)
        set_grads(params, first)
        set_grads(wide, first)
        optimizer.first_step(zero_grad=True)
        reference.first_step(zero_grad=True)
        limit = UPDATE_ULP + MOMENTUM_ULP * step
        for p, w, size in zip(params, wide, largest, strict=True):
            np.maximum(size, np.abs(exact(w)), out=size)
            assert_follows(p, w, size, limit + PERTURB_ULP, f"w + e of step {step}")
        set_grads(params, second)
        set_grads(wide, second)
        optimizer.step()
        reference.second_step()
        limit += MOMENTUM_ULP
        for i, (p, w, g, size) in enumerate(zip(params, wide, second, largest, strict=True)):
            np.maximum(size, np.maximum(np.abs(exact(w)), np.abs(exact(g))), out=size)
            assert_follows(p, w, size, limit, f"w of step {step}")
            buffer, expected = momentum_of(optimizer, p), momentum_of(reference, w)
            assert (buffer is None) == (expected is None)
            if buffer is not None:
                np.maximum(largest_m[i], np.maximum(np.abs(exact(g)), np.abs(exact(expected))), out=largest_m[i])
                assert_follows(buffer, expected, largest_m[i], limit, f"momentum of step {step}")


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_network_matches_the_reference(adaptive: bool, form: str, backend: str, device: str) -> None:
    """In float64, where the second gradient depends on the perturbation and nothing hides behind rounding."""
    net, data = small_net(device=device), batches(STEPS, device=device)
    twin = copy.deepcopy(net)
    options: dict[str, Any] = {"rho": 0.4, "adaptive": adaptive, "nesterov": True, **HYPER}
    optimizer = FusedSAM(net.parameters(), backend=backend, **options)
    reference = ReferenceSAM(twin.parameters(), **options)
    for batch in data:
        for model, opt in ((net, optimizer), (twin, reference)):
            closure = closure_for(model, batch)
            if form == "closure":
                opt.step(closure if opt is optimizer else zeroing(model, closure))
                continue
            model.zero_grad()
            closure()
            opt.first_step(zero_grad=True)
            closure()
            opt.second_step(zero_grad=True)
    assert_all_close(net.parameters(), twin.parameters())
    assert_all_close(buffers(optimizer), buffers(reference))


def test_a_checkpoint_of_four_groups_changes_no_bit(backend: str, device: str) -> None:
    start = [torch.randn(n).to(device, torch.bfloat16) for n in (*FEW_SIZES, LARGE)]
    straight, resumed = [p.clone() for p in start], [p.clone() for p in start]
    one = FusedSAM(grouped(straight), backend=backend, lr=0.5)
    other = FusedSAM(grouped(resumed), backend=backend, lr=0.5)
    for step, (first, second) in enumerate(gradient_stream([p.shape for p in start], 4, torch.bfloat16)):
        if step == 2:
            resumed = [p.clone() for p in resumed]
            saved = through_a_file(other.state_dict())
            other = FusedSAM(grouped(resumed), backend=backend, lr=0.5)
            other.load_state_dict(saved)
        two_calls(one, straight, first, second)
        two_calls(other, resumed, first, second)
    assert_same_bits(resumed, straight, "param")
    kept = [[m for m in buffers(optimizer) if m is not None] for optimizer in (other, one)]
    assert_same_bits(*kept, "momentum")


class LoopSAM:
    """The eager per-tensor SAM people copy, in the dtype of its parameters, but with a norm in float64."""

    def __init__(self, params: list[Tensor], rho: float, **options: Any) -> None:
        self.params, self.rho = params, rho
        self.base = torch.optim.SGD(params, foreach=False, **options)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([p.grad.double().norm() for p in self.params]).norm()
        self.old = [p.clone() for p in self.params]
        for p in self.params:
            p.add_(p.grad * (self.rho / float(norm)))

    @torch.no_grad()
    def second_step(self) -> None:
        for p, old in zip(self.params, self.old, strict=True):
            p.copy_(old)
        self.base.step()


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=ids)
@pytest.mark.parametrize("name", ["plain", "momentum-decay", "maximize-nesterov"])
def test_16_bit_trajectories_stay_as_close_to_float64_as_torch_does(
    dtype: torch.dtype, name: str, backend: str, device: str
) -> None:
    config = SGD_CONFIGS[name]
    start = [torch.randn(n).to(device=device, dtype=dtype) for n in (3, 67, LARGE)]
    params, loop, wide = [p.clone() for p in start], [p.clone() for p in start], [p.double() for p in start]
    optimizers = [
        FusedSAM(params, rho=RHO, backend=backend, **config),
        LoopSAM(loop, RHO, **config),
        ReferenceSAM(wide, rho=RHO, **config),
    ]
    largest = [np.abs(exact(p)) for p in start]
    for first, second in gradient_stream([p.shape for p in start], STEPS, dtype):
        for opt, tensors in zip(optimizers, (params, loop, wide), strict=True):
            two_calls(opt, tensors, first, second)
        largest = [np.maximum(size, np.abs(exact(w))) for size, w in zip(largest, wide, strict=True)]
    for p, q, w, size in zip(params, loop, wide, largest, strict=True):
        truth, one_ulp = exact(w), ulp(size, dtype)
        ours, torchs = np.abs(exact(p) - truth), np.abs(exact(q) - truth)
        assert ours.max() <= LOW_PRECISION_FACTOR * torchs.max() + one_ulp.max()
        assert ours.mean() <= LOW_PRECISION_FACTOR * torchs.mean() + one_ulp.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize(("name", "adaptive"), [*((name, "sam") for name in SGD_CONFIGS), ("nesterov-decay", "asam")])
def test_rho_zero_is_torch_sgd_bit_for_bit(
    dtype: torch.dtype, name: str, adaptive: str, backend: str, device: str
) -> None:
    config = SGD_CONFIGS[name]
    shapes = [(n,) for n in (*range(36), 67, 130, 1009, 16385, 32769)] + [(5, 3, 3, 3)]
    params = [torch.randn(s, dtype=dtype, device=device) for s in shapes]
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    theirs = [p.clone() for p in params]
    optimizer = FusedSAM(params, rho=0.0, adaptive=adaptive == "asam", backend=backend, **config)
    sgd = torch.optim.SGD(theirs, foreach=False, **config)
    for first, second in gradient_stream(shapes, 3, dtype):
        two_calls(optimizer, params, first, second)
        set_grads(theirs, second)
        sgd.step()
    assert_bits_of_torch(params, theirs, "param")
    if "momentum" in config:
        assert_bits_of_torch(buffers(optimizer), buffers(sgd), "momentum")


STRIDED: list[Any] = [
    (torch.optim.SGD, torch.float32, SGD_CONFIGS["nesterov-decay"]),
    (torch.optim.SGD, torch.float64, SGD_CONFIGS["nesterov-decay"]),
    (torch.optim.Adam, torch.float32, ADAM_CONFIGS["all"]),
    (torch.optim.AdamW, torch.float64, ADAM_CONFIGS["all"]),
]


@pytest.mark.parametrize(("base", "dtype", "options"), STRIDED, ids=["SGD", "SGD-double", "Adam", "AdamW-double"])
def test_rho_zero_is_torchs_own_on_strided_parameters(
    base: type[torch.optim.Optimizer],
    dtype: torch.dtype,
    options: dict[str, Any],
    backend: str,
    device: str,
    ieee_roots: None,
) -> None:
    cases = strided_pairs(dtype, device)
    params, theirs = [w for _, w, _ in cases], [w.clone() for _, w, _ in cases]
    optimizer = FusedSAM(params, base, rho=0.0, backend=backend, **options)
    plain = base(theirs, foreach=False, **options)
    for _ in range(3):
        for (_, w, g), other in zip(cases, theirs, strict=True):
            w.grad = other.grad = g
        optimizer.first_step()
        optimizer.step()
        plain.step()
    same = assert_bits_of_torch if base is torch.optim.SGD else assert_as_torch
    same(params, theirs, "param")
    same(state_tensors(optimizer), state_tensors(plain), "state")


class SignDescent(torch.optim.Optimizer):
    """A base optimizer that exists nowhere but here: the sign of a running mean."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["beta"])
                p.add_(mean.sign(), alpha=-group["lr"])


BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.017}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.17, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.017}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.013, "alpha": 0.9, "momentum": 0.7, "centered": True}),
    "user-defined": (SignDescent, {"lr": 0.013, "beta": 0.8}),
}


def manual_sam_step(net: nn.Module, base: torch.optim.Optimizer, rho: float, closure: Callable[[], Tensor]) -> None:
    base.zero_grad()
    closure()
    params = [p for p in net.parameters() if p.grad is not None]
    norm = torch.sqrt(sum(p.grad.square().sum() for p in params))
    old = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p += rho * p.grad / norm
    base.zero_grad()
    closure()
    with torch.no_grad():
        for p, w in zip(params, old, strict=True):
            p.copy_(w)
    base.step()


@pytest.mark.parametrize(("name", "form"), [*((name, "closure") for name in BASES), ("user-defined", "two calls")])
def test_any_base_optimizer_equals_manual_sam_around_it(name: str, form: str, backend: str, device: str) -> None:
    base_class, options = BASES[name]
    net, data = small_net(device=device), batches(STEPS, device=device)
    twin = copy.deepcopy(net)
    optimizer = FusedSAM(net.parameters(), base_class, rho=0.3, backend=backend, **options)
    base = base_class(twin.parameters(), **options)
    for batch in data:
        closure = closure_for(net, batch)
        if form == "closure":
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        manual_sam_step(twin, base, 0.3, closure_for(twin, batch))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
        assert optimizer.state[p].keys() == base.state[q].keys()
        for key, value in base.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
