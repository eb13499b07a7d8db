"""fp32 gradients beside 16-bit weights, and the reverse: computed in fp32, each stored in its own dtype."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import assert_within_ulp, exact, exact_ascent, exact_norm, exact_sgd
from helpers import (
    FEW_SIZES,
    HYPER,
    LARGE,
    NORM_RTOL,
    RHO,
    ROUNDED_ONCE_ULP,
    SIXTEEN_BIT,
    UPDATE_ULP,
    Carved,
    ascent_groups,
    assert_same_bits,
    ids,
    scalar,
    sgd_groups,
    snapshot,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, ops

PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
every_pair = pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS, ids=ids)


def carve(dtype: torch.dtype, device: str) -> list[Tensor]:
    tensors = Carved(FEW_SIZES, dtype, device).tensors
    for t in tensors:
        t.copy_(torch.randn(t.shape))
    return tensors


@every_pair
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_norm_and_perturb(
    dtype: torch.dtype, grad_dtype: torch.dtype, adaptive: bool, backend: str, device: str
) -> None:
    params, grads, backups = carve(dtype, device), carve(grad_dtype, device), carve(dtype, device)
    groups = ascent_groups(len(params), adaptive=adaptive)
    expected = exact_norm((w, g, adaptive) for w, g in zip(params, grads, strict=True))
    norm = ops.norm(params, grads, groups, backend=backend)
    assert float(norm) == pytest.approx(expected, rel=NORM_RTOL[torch.float32], abs=0)
    old, bits_before = [exact(w) for w in params], (snapshot(params), snapshot(grads))
    ops.perturb(params, grads, backups, norm, groups, backend=backend)
    assert (snapshot(backups), snapshot(grads)) == bits_before
    limit = ROUNDED_ONCE_ULP if dtype in SIXTEEN_BIT else 3.0
    for w, w_old, g in zip(params, old, grads, strict=True):
        e = exact_ascent(w_old, exact(g), expected, RHO, adaptive)
        assert_within_ulp(w, w_old + e, abs(w_old) + abs(e), limit, "w + e")


@every_pair
def test_sgd_update(dtype: torch.dtype, grad_dtype: torch.dtype, backend: str, device: str) -> None:
    params, grads = carve(dtype, device), carve(grad_dtype, device)
    backups, momentum = carve(dtype, device), carve(dtype, device)
    old = [(exact(b), exact(g), exact(m)) for b, g, m in zip(backups, grads, momentum, strict=True)]
    config = {**HYPER, "dampening": 0.3, "nesterov": False}
    ops.sgd_update(params, grads, backups, momentum, sgd_groups(len(params), **config), backend=backend)
    limit = ROUNDED_ONCE_ULP if dtype in SIXTEEN_BIT else UPDATE_ULP
    for w, m, (w_old, g, m_old) in zip(params, momentum, old, strict=True):
        w_new, m_new, w_size, m_size = exact_sgd(w_old, g, m_old, **config)
        assert_within_ulp(m, m_new, m_size, limit, "momentum")
        assert_within_ulp(w, w_new, w_size, limit, "weight")


@every_pair
def test_a_scaled_gradient_is_unscaled_in_its_own_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, backend: str, device: str
) -> None:
    params, grads = carve(dtype, device), carve(grad_dtype, device)
    expected = [(g.float() * 0.25).to(grad_dtype) for g in grads]
    scale = torch.tensor(4.0, device=device)
    ops.sgd_update(params, grads, None, None, sgd_groups(len(params), lr=0.1), scale, backend=backend)
    assert_same_bits(grads, expected, "gradient")


@every_pair
def test_the_gradients_memory_is_no_backup(
    dtype: torch.dtype, grad_dtype: torch.dtype, backend: str, device: str
) -> None:
    """It is of another size, or of another format."""
    params, grads = carve(dtype, device), carve(grad_dtype, device)
    before = snapshot(params), snapshot(grads)
    with pytest.raises(ValueError, match="Invalid"):
        ops.perturb(params, grads, grads, scalar(1.3, device), ascent_groups(len(params)), backend=backend)
    assert (snapshot(params), snapshot(grads)) == before


def test_fp64_mixes_with_nothing(backend: str, device: str) -> None:
    w, g = torch.ones(5, device=device), torch.ones(5, device=device, dtype=torch.float64)
    for params, grads in (([w], [g]), ([g], [w])):
        with pytest.raises(ValueError, match=r"float\d\d does not match the parameter"):
            ops.norm(params, grads, ascent_groups(1), backend=backend)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")
def test_the_optimizer_takes_fp32_gradients_of_bf16_weights(backend: str, device: str) -> None:
    """Against the same steps with weights that hold the same values in fp32, rounded where the others are."""
    start = [torch.randn(n, device=device).bfloat16() for n in (7, LARGE)]
    ours = [nn.Parameter(w.clone()) for w in start]
    for p in ours:
        p.grad_dtype = torch.float32
    exact_ones = [nn.Parameter(w.float()) for w in start]
    options = {"rho": RHO, "lr": 0.13, "backend": backend}
    pairs = [(FusedSAM(ours, **options), ours), (FusedSAM(exact_ones, **options), exact_ones)]
    gradients = [[torch.randn(p.shape, device=device) for p in ours] for _ in range(2)]
    for optimizer, params in pairs:
        for half, grads in zip((optimizer.first_step, optimizer.second_step), gradients, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            half(zero_grad=True)
    assert_same_bits(ours, [p.bfloat16() for p in exact_ones], "weight")


CASTS = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float16),
]
every_cast = pytest.mark.parametrize(("before", "after"), CASTS, ids=ids)
# Beside one ulp of a weight: torch rounds decay and momentum by themselves in 16 bits, which count for less.
CAST_ULP = 2


def both_steps(optimizer: torch.optim.Optimizer, params: list[Tensor], backend: str | None) -> None:
    """A step with the same second gradients for torch's optimizer, and for ours from w + e."""
    generator = torch.Generator().manual_seed(sum(p.numel() for p in params))
    firsts, seconds = ([torch.randn(p.shape, generator=generator) for p in params] for _ in range(2))
    if backend is not None:
        for p, g in zip(params, firsts, strict=True):
            p.grad = g.to(p)
        optimizer.first_step(zero_grad=True)  # type: ignore[attr-defined]
    for p, g in zip(params, seconds, strict=True):
        p.grad = g.to(p)
    optimizer.step()


@every_cast
@pytest.mark.parametrize("rho", [0.0, RHO])
def test_after_a_model_has_got_another_dtype_sgd_steps_as_torchs(
    before: torch.dtype, after: torch.dtype, rho: float, backend: str, device: str
) -> None:
    """The buffers of the steps before keep their dtype, a parameter that comes to them later has none."""
    ours = nn.ParameterList(torch.randn(n, device=device, dtype=before) for n in (7, LARGE, 9)).requires_grad_(True)
    torchs = nn.ParameterList(p.detach().clone() for p in ours)
    config = {"lr": 0.13, "momentum": 0.87, "nesterov": True, "weight_decay": 0.017}
    opt, plain = FusedSAM(ours, rho=rho, backend=backend, **config), torch.optim.SGD(torchs, foreach=False, **config)
    for model, optimizer in ((ours, opt), (torchs, plain)):
        both_steps(optimizer, list(model)[:2], backend if optimizer is opt else None)
        model.to(after)
        for _ in range(2):
            both_steps(optimizer, list(model), backend if optimizer is opt else None)
    for p, q in zip(ours, torchs, strict=True):
        buffer, expected = opt.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"]
        assert (p.dtype, buffer.dtype) == (after, expected.dtype)
        for value, other in ((p.detach(), q.detach()), (buffer, expected)):
            narrowest = min((before, after), key=lambda dtype: -torch.finfo(dtype).eps)
            tolerance = CAST_ULP * torch.finfo(narrowest).eps
            torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)


def test_after_a_model_has_got_another_dtype_adam_refuses_as_torchs(backend: str, device: str) -> None:
    """By name, before anything is changed; loading its own state is the way on."""
    net = nn.Linear(3, 2).to(device)
    opt = FusedSAM(net.named_parameters(), torch.optim.AdamW, rho=RHO, lr=0.013, backend=backend)
    both_steps(opt, list(net.parameters()), backend)
    net.half()
    weights, state = snapshot(net.parameters()), snapshot(opt.state[net.weight].values())
    with pytest.raises(ValueError, match=r"Invalid parameter weight .*float32 .*float16 .*load_state_dict"):
        both_steps(opt, list(net.parameters()), backend)
    assert (snapshot(net.parameters()), snapshot(opt.state[net.weight].values())) == (weights, state)
    opt.load_state_dict(opt.state_dict())
    both_steps(opt, list(net.parameters()), backend)
    assert opt.state[net.weight]["exp_avg"].dtype == torch.float16
    assert opt.state[net.weight]["step"] == 2


@every_cast
def test_after_a_model_has_got_another_dtype_its_momentum_still_leads(
    before: torch.dtype, after: torch.dtype, backend: str, device: str
) -> None:
    p = nn.Parameter(torch.randn(67, device=device, dtype=before))
    holder = nn.ParameterList([p])
    opt = FusedSAM([p], rho=30.0, direction="momentum", momentum=0.9, lr=0.1, backend=backend)
    opt.first_step()  # which stays: there is no momentum yet
    p.grad = torch.randn_like(p)
    opt.step()
    holder.to(after)
    w, m = p.detach().double().clone(), opt.state[p]["momentum_buffer"].double()
    opt.first_step()
    e = p.detach().double() - w
    torch.testing.assert_close(e, -30.0 * m / math.hypot(*m.tolist()), rtol=0, atol=8 * torch.finfo(after).eps)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_model_made_smaller_gets_masters_where_they_are_asked_for(
    base: type[torch.optim.Optimizer], backend: str, device: str
) -> None:
    """Its fp32 state is theirs: the bits of going on in fp32, rounded."""
    start = [torch.randn(n, device=device).half() for n in (7, LARGE)]
    ours, exact_ones = (nn.ParameterList(w.float() for w in start) for _ in range(2))
    config = {"rho": RHO, "lr": 0.013, "master_weights": True, "backend": backend}
    config |= {"momentum": 0.9} if base is torch.optim.SGD else {}
    for model in (ours, exact_ones):
        opt = FusedSAM(model, base, **config)
        for step in range(2):
            if step == 1:
                with torch.no_grad():
                    for p in model:
                        p.copy_(p.half())
                if model is ours:
                    model.half()
            for half in (opt.first_step, opt.step):
                for k, p in enumerate(model):
                    p.grad = torch.linspace(-1, 1 + k, p.numel(), device=device).half().to(p.dtype)
                half(zero_grad=True) if half == opt.first_step else half()
    assert_same_bits(ours, [p.half() for p in exact_ones], "weight")
