"""fp32 gradients beside 16-bit weights, and the reverse: computed in fp32, each stored in its own dtype."""

from __future__ import annotations

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
