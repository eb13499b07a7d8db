"""step(closure, ascent=closure_on_a_part): e from a part of the examples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    LARGE,
    assert_all_close,
    assert_same_bits,
    batches,
    buffers,
    closure_for,
    leaves,
    quadratic,
    small_net,
    snapshot,
    zeroing,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, ReferenceSAM


def part_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0][:2], batch[1][:2]


@pytest.mark.parametrize("steps", [1, 2])
def test_e_comes_from_the_part_and_the_update_from_all(steps: int, backend: str, device: str) -> None:
    net, data = small_net(device=device), batches(4, device=device)
    twin = copy.deepcopy(net)
    opt = FusedSAM(net.parameters(), rho=0.3, ascent_steps=steps, backend=backend, **HYPER)
    reference = ReferenceSAM(twin.parameters(), rho=0.3, **HYPER)
    for batch in data:
        loss = opt.step(closure_for(net, batch), ascent=closure_for(net, part_of(batch)))
        expected = zeroing(twin, closure_for(twin, part_of(batch)))()
        for _ in range(steps):
            reference.first_step(zero_grad=True)
            zeroing(twin, closure_for(twin, part_of(batch)))()
        zeroing(twin, closure_for(twin, batch))()
        reference.second_step()
        assert_all_close([loss.detach()], [expected.detach()])
        assert_all_close(net.parameters(), twin.parameters())
    assert_all_close(buffers(opt), buffers(reference))


def test_each_of_several_closures_has_an_ascent_of_its_own(backend: str, device: str) -> None:
    net, data = small_net(device=device), batches(3, device=device)
    twin, single = copy.deepcopy(net), []
    opt = FusedSAM(net.parameters(), rho=0.3, backend=backend, **HYPER)
    w = [p.detach().clone() for p in net.parameters()]
    opt.step([closure_for(net, b) for b in data], ascent=[closure_for(net, part_of(b)) for b in data])
    for batch in data:
        reference = ReferenceSAM(twin.parameters(), rho=0.3, **HYPER)
        zeroing(twin, closure_for(twin, part_of(batch)))()
        reference.first_step(zero_grad=True)
        zeroing(twin, closure_for(twin, batch))()
        reference.restore()
        single.append([p.grad.clone() for p in twin.parameters()])
    assert_all_close([p.grad for p in net.parameters()], [sum(gs) / 3 for gs in zip(*single)])
    assert not any(torch.equal(p, x) for p, x in zip(net.parameters(), w))


def test_it_is_called_in_perturbed_steps_only(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    calls: list[str] = []

    def closure(name: str) -> Any:
        return lambda: calls.append(name) or quadratic(params)()

    opt = FusedSAM(params, interval=2, backend=backend, lr=0.13)
    for _ in range(3):
        opt.step(closure("all"), ascent=closure("part"))
    assert calls == ["part", "all", "all", "part", "all"]


def test_the_same_masks_in_both_passes_with_replay_rng(backend: str, device: str) -> None:
    layer, drop = nn.Linear(31, 1, device=device), nn.Dropout(0.5)
    x, seen = torch.randn(31, device=device), []

    def closure() -> None:
        masked = drop(x)
        seen.append(masked.detach().clone())
        layer(masked).sum().backward()

    FusedSAM(layer.parameters(), backend=backend, lr=0.1, replay_rng=True).step(closure, ascent=closure)
    assert torch.equal(*seen)


def test_an_exception_in_the_ascent_leaves_the_weights(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device)
    w = snapshot(params)
    opt = FusedSAM(params, ascent_steps=2, backend=backend, lr=0.13)
    calls: list[int] = []

    def failing() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        quadratic(params)()

    with pytest.raises(KeyboardInterrupt):
        opt.step(quadratic(params), ascent=failing)
    assert_same_bits(params, w)


def test_what_does_not_go_with_the_closure_is_refused() -> None:
    params = leaves(3)
    opt, run = FusedSAM(params, lr=0.13), quadratic(params)
    w = snapshot(params)
    with pytest.raises(ValueError, match="without a closure"):
        opt.step(ascent=run)
    for closure, ascent in ((run, [run]), ([run], run), ([run, run], [run]), ([run], [run, run])):
        with pytest.raises(ValueError, match="Invalid ascent="):
            opt.step(closure, ascent=ascent)
    with pytest.raises(ValueError, match=r"Invalid ascent=\[\]"):
        opt.step([run], ascent=[])
    for ascent in (3, [3], "x"):
        with pytest.raises(TypeError, match="Invalid ascent="):
            opt.step([run], ascent=ascent)
    assert_same_bits(params, w)
