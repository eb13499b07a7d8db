"""The specification itself, against closed forms written out in extended precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import exact, exact_adam, exact_ascent, exact_norm, exact_sgd
from helpers import (
    ADAM_CONFIGS,
    DTYPES,
    FLOAT64_RTOL,
    RHO,
    SGD_CONFIGS,
    gradient_stream,
    ids,
    quadratic,
    set_grads,
    snapshot,
)
from torch import Tensor

from fused_sam import ReferenceSAM, reference

SHAPES = [(7,), (3, 5), (), (0,), (33,)]


def tensors() -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64) for s in SHAPES]


def assert_close(actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(exact(actual), expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_norm_and_perturb_of_the_reference(adaptive: bool) -> None:
    params, grads = tensors(), tensors()
    rho = [0.07, 0.0, 0.3, 0.1, 0.02]
    flags = [adaptive] * len(params)
    norm = exact_norm(zip(params, grads, flags, strict=True))
    assert float(reference.norm(params, grads, flags)) == pytest.approx(norm, rel=1e-14)
    for w, g, r, moved in zip(params, grads, rho, reference.perturb(params, grads, rho, flags), strict=True):
        assert_close(moved, exact(w) + exact_ascent(exact(w), exact(g), norm, r, adaptive))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf], ids=str)
def test_the_reference_does_not_perturb_without_a_positive_finite_norm(bad: float) -> None:
    params = tensors()
    grads = [torch.zeros_like(p) for p in params]
    grads[1][0, 0] = bad
    moved = reference.perturb(params, grads, [RHO] * 5, [False] * 5)
    assert snapshot(moved) == snapshot(params)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("config", SGD_CONFIGS.values(), ids=SGD_CONFIGS.keys())
def test_the_reference_update_is_torch_sgd(config: dict[str, Any], first: bool) -> None:
    w, g, m = (torch.randn(33, dtype=torch.float64) for _ in range(3))
    updated, buffer = reference.sgd_update(w, g, None if first else m, **config)
    expected, expected_buffer, _, _ = exact_sgd(exact(w), exact(g), None if first else exact(m), **config)
    assert_close(updated, expected)
    assert (buffer is None) == ("momentum" not in config)
    if buffer is not None:
        assert_close(buffer, expected_buffer)

    p = w.clone().requires_grad_()
    sgd = torch.optim.SGD([p], foreach=False, **config)
    if not first and "momentum" in config:
        sgd.state[p]["momentum_buffer"] = m.clone()
    p.grad = g
    sgd.step()
    torch.testing.assert_close(updated, p.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("config", SGD_CONFIGS.values(), ids=SGD_CONFIGS.keys())
def test_trajectory_of_the_reference(config: dict[str, Any], adaptive: bool) -> None:
    params = tensors()
    w: list[Any] = [exact(p) for p in params]
    m: list[Any] = [None] * len(params)
    sam = ReferenceSAM(params, rho=RHO, adaptive=adaptive, **config)
    rho = -RHO if config.get("maximize") else RHO  # where the objective is worst
    for first, second in gradient_stream(SHAPES, 6, torch.float64):
        set_grads(params, first)
        norm = exact_norm((p, g, adaptive) for p, g in zip(params, first, strict=True))
        sam.first_step(zero_grad=True)
        for i, (p, g) in enumerate(zip(params, first, strict=True)):
            assert p.grad is None
            assert_close(p, w[i] + exact_ascent(w[i], exact(g), norm, rho, adaptive))
        set_grads(params, second)
        sam.second_step()
        for i, (p, g) in enumerate(zip(params, second, strict=True)):
            w[i], m[i], _, _ = exact_sgd(w[i], exact(g), m[i], **config)
            assert_close(p, w[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_reference_keeps_the_dtype_of_its_arguments(dtype: torch.dtype) -> None:
    p = torch.randn(9).to(dtype).requires_grad_()
    sam = ReferenceSAM([p], rho=RHO, **SGD_CONFIGS["nesterov-decay"])

    def closure() -> Tensor:
        p.grad = None
        return quadratic([p])()

    w = p.detach().clone()
    loss = sam.step(closure)
    assert p.dtype == dtype
    assert float(loss.detach()) == pytest.approx(float(1.5 * (w * w).sum()))
    assert not torch.equal(p.detach(), w)


def test_none_gradients_in_the_reference() -> None:
    params = tensors()[:2]
    start = snapshot(params)
    sam = ReferenceSAM(params, rho=RHO, lr=0.13, momentum=0.87)
    set_grads(params, [torch.ones(7), None])
    sam.first_step(zero_grad=True)
    assert snapshot(params)[1] == start[1]
    set_grads(params, [None, torch.ones(3, 5)])
    sam.second_step()
    assert snapshot(params)[0] == start[0]
    assert snapshot(params)[1] != start[1]


@pytest.mark.parametrize("config", ADAM_CONFIGS.values(), ids=ADAM_CONFIGS.keys())
def test_adam_update_of_the_reference(config: dict[str, Any]) -> None:
    """The first step and the third, from state that is not its own making."""
    for t, w in [(t, w) for t in (1, 3) for w in tensors()]:
        g = torch.randn_like(w)
        state = reference.AdamState.zeros(w)
        if t > 1:
            state = reference.AdamState(t - 1, torch.randn_like(w), torch.rand_like(w), torch.rand_like(w))
        updated, after = reference.adam_update(w, g, state, **config)
        expected, _ = exact_adam(exact(w), exact(g), (exact(state.m), exact(state.v), exact(state.v_max)), t, **config)
        for x, e in zip((updated, after.m, after.v, after.v_max), expected, strict=True):
            assert_close(x, e)
        assert after.t == t


def test_the_reference_refuses_a_base_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="Invalid base='lion'"):
        ReferenceSAM(tensors(), base="lion")
