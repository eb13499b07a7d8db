"""Memory that others know of: addresses, views, autograd's version counters, every pattern of bits."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HYPER,
    RHO,
    batches,
    closure_for,
    set_grads,
    small_net,
)
from torch import Tensor, nn

from fused_sam import FusedSAM


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam], ids=["SGD", "Adam", "NAdam"])
def test_addresses_and_strides_never_change(base: type[torch.optim.Optimizer], backend: str, device: str) -> None:
    net, data = small_net(torch.float32, device), batches(4, torch.float32, device)
    opt = FusedSAM(net.parameters(), base, rho=RHO, backend=backend, lr=0.13)

    def layout() -> list[tuple[int, tuple[int, ...], int]]:
        return [(p.data_ptr(), p.stride(), p.untyped_storage().data_ptr()) for p in net.parameters()]

    before, state = layout(), None
    for batch in data:
        closure = closure_for(net, batch)
        opt.zero_grad()
        closure()
        opt.first_step(zero_grad=True)
        assert layout() == before
        closure()
        opt.step()
        assert layout() == before
        opt.step(closure)
        assert layout() == before
        now = [v.data_ptr() for s in opt.state.values() for v in s.values() if isinstance(v, Tensor)]
        assert state in (None, now)
        state = now


def test_views_of_a_flat_buffer_follow_every_write_and_their_neighbours_none(backend: str, device: str) -> None:
    """Adjacent slices of one buffer, as flat-parameter libraries make them."""
    memory = torch.full((3 + 37 + 130 + 9 + 7,), 42.0, device=device)
    flat = memory[3:-7].normal_()
    start = flat.clone()
    params = [nn.Parameter(flat[:37]), nn.Parameter(flat[37:167].view(13, 10)), nn.Parameter(flat[167:])]
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13)
    set_grads(params, [torch.randn(p.shape) for p in params])
    opt.first_step(zero_grad=True)
    assert float((flat - start).norm()) == pytest.approx(RHO, rel=1e-5)
    second = torch.randn(flat.shape, device=device)
    set_grads(params, [second[:37], second[37:167].view(13, 10), second[167:]])
    opt.step()
    torch.testing.assert_close(flat, start - 0.13 * second)
    assert bool((memory[:3] == 42).all())
    assert bool((memory[-7:] == 42).all())


@pytest.mark.parametrize("phase", ["first_step", "step", "restore"])
def test_backward_through_a_stale_graph_raises(phase: str, backend: str, device: str) -> None:
    p = torch.randn(9, device=device).requires_grad_()
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.13)
    stale = (p * p).sum()
    (p * p).sum().backward()
    opt.first_step()
    if phase != "first_step":
        stale = (p * p).sum()
        opt.step() if phase == "step" else opt.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero_grad", [False, True], ids=["backup", "swap"])
def test_every_pattern_of_16_bits_comes_back(dtype: torch.dtype, zero_grad: bool, backend: str, device: str) -> None:
    """Signalling NaN too, which any conversion makes a quiet one."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)
    param, moved = patterns.view(dtype).clone(), torch.zeros(67, device=device, dtype=dtype)
    opt = FusedSAM([param, moved], rho=RHO, backend=backend, **HYPER)
    for finish in (opt.restore, opt.step):
        param.grad, moved.grad = torch.ones_like(param), torch.ones_like(moved)
        opt.first_step(zero_grad=zero_grad)
        assert not torch.equal(param.view(torch.int16), patterns)
        param.grad, moved.grad = None, torch.ones_like(moved)  # which the step restores, and which it updates
        finish()
        assert torch.equal(param.view(torch.int16), patterns)
    assert moved.count_nonzero() == moved.numel()
