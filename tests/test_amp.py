"""torch.amp.GradScaler around FusedSAM, as training loops write it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    LARGE,
    RHO,
    assert_same_bits,
    batches,
    buffers,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
    state_tensors,
)
from torch import Tensor, nn
from torch.amp import GradScaler

from fused_sam import FusedSAM

SCALE = 2.0**10
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, HYPER),
    "Adam": (torch.optim.Adam, {"lr": 0.013, "weight_decay": 0.017}),
    "fused AdamW": (torch.optim.AdamW, {"lr": 0.013, "amsgrad": True, "fused": True}),
    "capturable Adam": (torch.optim.Adam, {"lr": 0.013, "capturable": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.013, "weight_decay": 0.017}),
}
every_base = pytest.mark.parametrize("base", BASES)


def scaler_for(device: str, scale: float = SCALE) -> GradScaler:
    return GradScaler(device, init_scale=scale, growth_interval=1_000_000)


def make(params: Any, base: str, backend: str, **options: Any) -> FusedSAM:
    base_class, base_options = BASES[base]
    params = list(params)
    if "capturable" in base_options and not params[0].is_cuda:
        pytest.skip("torch's Adam refuses capturable on the CPU")
    return FusedSAM(params, base_class, rho=RHO, backend=backend, **base_options, **options)


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@every_base
def test_a_power_of_two_scale_changes_no_bit(base: str, backend: str, device: str) -> None:
    net, data = small_net(torch.float32, device), batches(5, torch.float32, device)
    twin = copy.deepcopy(net)
    opt = make(net.parameters(), base, backend, adaptive=True)
    plain = make(twin.parameters(), base, backend, adaptive=True)
    scaler = scaler_for(device)
    for batch in data:
        scaler.scale(loss_of(net, batch)).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(loss_of(net, batch)).backward()
        scaler.step(opt)
        scaler.update()

        loss_of(twin, batch).backward()
        plain.first_step(zero_grad=True)
        loss_of(twin, batch).backward()
        plain.step()
        assert_same_bits((p.grad for p in net.parameters()), [p.grad for p in twin.parameters()], "p.grad")
        opt.zero_grad()
        plain.zero_grad()
    assert_same_bits(net.parameters(), snapshot(twin.parameters()))
    assert snapshot(state_tensors(opt)) == snapshot(state_tensors(plain))
    assert scaler.get_scale() == SCALE


def test_the_first_scale_of_a_default_scaler(backend: str, device: str) -> None:
    """GradScaler makes its scale tensor on the first scale(): no step before may be needed."""
    params = leaves(9, device=device)
    opt, scaler = make(params, "SGD", backend), GradScaler(device)
    w = [p.detach().clone() for p in params]
    for _ in range(2):
        scaler.scale(sum(p.sum() for p in params)).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(sum(p.sum() for p in params)).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    assert float((params[0].detach() - w[0]).abs().max()) > 0.1


# Each value, and the pairs that meet in the code: where w is kept with the pass, the steps before with the base.
OVERFLOWS = [
    ("swap", math.inf, 2, "pass 2"),
    ("swap", math.nan, 0, "pass 1"),
    ("backup", math.nan, 0, "both"),
    ("backup", math.inf, 2, "pass 1"),
    ("backup", math.nan, 2, "pass 2"),
    ("swap", math.inf, 0, "seen by unscale_"),
]


@every_base
@pytest.mark.parametrize(("keeps", "bad", "steps_before", "overflow"), OVERFLOWS)
def test_overflow_restores_the_weights_and_leaves_the_state_alone(
    base: str, keeps: str, bad: float, steps_before: int, overflow: str, backend: str, device: str
) -> None:
    """With all other options: test_promises.py."""
    params = leaves(9, LARGE, device=device)
    opt, scaler = make(params, base, backend), scaler_for(device)

    def both_passes(first: float = 1.0, second: float = 1.0) -> None:
        scaler.scale(sum((p * p).sum() for p in params)).backward()
        params[1].grad[500] *= first
        opt.first_step(zero_grad=keeps == "swap")
        opt.zero_grad()
        scaler.scale(sum((p * p).sum() for p in params)).backward()
        params[0].grad[3] *= second
        if overflow == "seen by unscale_":
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    for _ in range(steps_before):
        both_passes()
    w, state, undisturbed = snapshot(params), snapshot(state_tensors(opt)), copy.deepcopy(opt)
    both_passes(bad if overflow in ("pass 1", "both") else 1.0, bad if overflow != "pass 1" else 1.0)
    assert_same_bits(params, w)
    assert snapshot(state_tensors(opt)) == state
    assert not opt.perturbed
    if overflow != "pass 1":
        assert scaler.get_scale() == SCALE / 2
    both_passes()
    twins = undisturbed.param_groups[0]["params"]
    undisturbed.step(lambda: torch.autograd.backward(sum((p * p).sum() for p in twins)))
    assert_same_bits(params, twins)
    assert snapshot(state_tensors(opt)) == snapshot(state_tensors(undisturbed))


def test_the_scale_follows_the_schedule_it_has_with_plain_sgd(backend: str, device: str) -> None:
    """Halved on every overflow of the second pass, doubled after growth_interval good steps."""
    scales: list[list[float]] = []
    for ours in (True, False):
        params = [torch.ones(9, device=device).requires_grad_()]
        opt = make(params, "SGD", backend) if ours else torch.optim.SGD(params, foreach=False, **HYPER)
        scaler = GradScaler(device, init_scale=SCALE, growth_interval=2)
        scales.append([])
        for factor in (1.0, 1.0, math.inf, 1.0, math.nan, math.inf, 1.0, 1.0):
            if isinstance(opt, FusedSAM):
                scaler.scale(params[0].sum()).backward()
                opt.first_step(zero_grad=True)
            scaler.scale(params[0].sum()).backward()
            params[0].grad *= factor
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            scales[-1].append(scaler.get_scale())
    assert scales[0] == scales[1]
    assert len(set(scales[0])) > 2


def test_unscale_before_clipping(backend: str, device: str) -> None:
    """The clipped second gradient is what the base step sees, unscaled once and not twice."""
    params = leaves(67, 130, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, scaler = make(params, "SGD", backend), scaler_for(device)
    plain = make(twins, "SGD", backend)
    for _ in range(3):
        scaler.scale(sum((p * p).sum() for p in params)).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(sum((p * p).sum() for p in params)).backward()
        scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(params, 0.3)
        scaler.step(opt)
        scaler.update()

        sum((p * p).sum() for p in twins).backward()
        plain.first_step(zero_grad=True)
        sum((p * p).sum() for p in twins).backward()
        assert nn.utils.clip_grad_norm_(twins, 0.3) == norm
        plain.step()
        assert_same_bits([p.grad for p in params], [p.grad for p in twins], "p.grad")
        opt.zero_grad()
        plain.zero_grad()
    assert_same_bits(params, twins)
    assert_same_bits(buffers(opt), buffers(plain), "momentum")


@pytest.mark.parametrize("keyword", [True, False])
def test_a_closure_and_a_step_without_an_ascent_are_refused(keyword: bool, backend: str, device: str) -> None:
    """Passed by position GradScaler lets it through, with gradients that would never be unscaled."""
    params = leaves(9, device=device)
    opt, scaler = make(params, "SGD", backend), scaler_for(device)
    w = snapshot(params)
    closure = quadratic(params)
    scaler.scale(closure())
    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        scaler.step(opt, closure=closure) if keyword else scaler.step(opt, closure)
    with pytest.raises(RuntimeError, match="first_step"):
        scaler.step(opt)
    assert_same_bits(params, w)
    assert not opt.perturbed


def test_a_disabled_scaler_changes_nothing(backend: str, device: str) -> None:
    params = leaves(67, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, plain = make(params, "SGD", backend), make(twins, "SGD", backend)
    scaler = GradScaler(device, enabled=False)
    scaler.step(opt, quadratic(params))
    plain.step(quadratic(twins))
    opt.zero_grad()
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(sum((p * p).sum() for p in params)).backward()
    scaler.step(opt)
    scaler.update()
    plain.step(lambda: torch.autograd.backward(sum((p * p).sum() for p in twins)))
    assert_same_bits(params, twins)


@pytest.mark.parametrize("options", [{}, {"p": 1.0}, {"p": math.inf}, {"start": 1}], ids=str)
@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
def test_no_gradient_in_the_last_pass_restores_the_weights(options: dict[str, Any], backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt, scaler = make(params, "SGD", backend, **options), scaler_for(device)
    w = snapshot(params)
    scaler.scale((params[0] * params[0]).sum()).backward()
    if opt.perturb_next:
        opt.first_step(zero_grad=True)
    opt.zero_grad()
    scaler.step(opt)
    assert_same_bits(params, w)
    assert not opt.perturbed


def test_the_loss_scale_of_one_optimizer_leaves_the_next_alone(backend: str, device: str) -> None:
    """grad_scale and found_inf are set for one call only; a plain step() after it is unscaled."""
    params = leaves(9, device=device)
    opt, scaler = make(params, "SGD", backend), scaler_for(device)
    scaler.scale(params[0].sum()).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(params[0].sum()).backward()
    scaler.step(opt)
    scaler.update()
    plain = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    w = params[0].detach().clone()
    for o in (plain, opt):
        set_grads(params, [torch.ones(9)])
        o.first_step(zero_grad=True)
        set_grads(params, [torch.ones(9)])
        o.step()
    assert float((params[0].detach() - w).abs().max()) < 1.0


def test_under_bf16_autocast_a_step_is_that_of_the_gradients_which_are_fp32(device: str, backend: str) -> None:
    net, (batch,) = small_net(torch.float32, device), batches(1, torch.float32, device)
    opt = FusedSAM(net.parameters(), rho=RHO, backend=backend, lr=0.2, momentum=0.5)
    params = list(net.parameters())
    w, seen = [p.detach().clone() for p in params], []

    def closure() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            output = net(batch[0])
            loss = nn.functional.cross_entropy(output, batch[1])
        loss.backward()
        seen.append((output.dtype, [(p.detach() - x, p.grad.clone()) for p, x in zip(params, w, strict=True)]))
        return loss.detach()

    opt.step(closure)
    (first_dtype, first), (second_dtype, second) = seen
    assert first_dtype == second_dtype == torch.bfloat16
    norm = torch.cat([g.flatten() for _, g in first]).norm()
    for p, start, (_, g), (e, g_at_e) in zip(params, w, first, second, strict=True):
        assert p.dtype == g.dtype == torch.float32
        torch.testing.assert_close(e, RHO / norm * g)
        torch.testing.assert_close(p.detach(), start - 0.2 * g_at_e)


@pytest.mark.parametrize("form", ["two calls", "closure", "closures"])
def test_a_step_within_one_autocast_is_as_with_one_for_each_forward(form: str, backend: str, device: str) -> None:
    """Autocast keeps the 16-bit copies of the weights that it has made: those of w are none of w + e."""
    torch.manual_seed(5)
    start = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).to(device)
    x = torch.randn(8, 9, device=device)
    results = []
    for around in (torch.autocast(device, torch.bfloat16), contextlib.nullcontext()):
        net = copy.deepcopy(start)
        opt = FusedSAM(net.parameters(), rho=0.7, backend=backend, **HYPER)
        inside = contextlib.nullcontext() if not results else torch.autocast(device, torch.bfloat16)

        def closure(part: slice = slice(None), net: nn.Module = net, inside: Any = inside) -> None:
            with inside:
                loss = net(x[part]).square().mean()
            loss.backward()

        with around:
            for _ in range(3):
                if form == "two calls":
                    for half in (opt.first_step, opt.second_step):
                        closure()
                        half(zero_grad=True)
                else:
                    halves = [functools.partial(closure, slice(0, 4)), functools.partial(closure, slice(4, 8))]
                    opt.step(closure if form == "closure" else halves)
        results.append([p.detach().clone() for p in net.parameters()])
    assert_same_bits(*results)
