"""The same random numbers in both passes, where asked for."""

from __future__ import annotations

import pytest
import torch
from helpers import RHO, bits, leaves
from torch import Tensor

from fused_sam import FusedSAM, rng


def dropout_closure(p: Tensor, masks: list[bytes]) -> object:
    def closure() -> Tensor:
        mask = torch.nn.functional.dropout(torch.ones_like(p), 0.4)
        masks.append(bits(mask))
        loss = (mask * p).square().sum()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("replay", [False, True])
def test_both_passes_see_one_mask_where_asked_for(replay: bool, backend: str, device: str) -> None:
    """And a step with replay draws as much as a single pass: a plain run sees the same masks at every step."""
    (p,) = leaves(200, device=device)
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.013, replay_rng=replay)
    masks: list[bytes] = []
    alone: list[bytes] = []
    torch.manual_seed(7)
    for _ in range(3):
        opt.step(dropout_closure(p, masks))
    torch.manual_seed(7)
    for _ in range(3):
        dropout_closure(p, alone)()
    assert len(set(masks)) == (3 if replay else 6)
    assert (masks[0::2] == masks[1::2] == alone) is replay


def test_capture_and_replay_serve_the_two_call_form(backend: str, device: str) -> None:
    (p,) = leaves(200, device=device)
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.013)
    masks: list[bytes] = []
    closure = dropout_closure(p, masks)
    state = rng.capture(devices=[device])
    closure()
    opt.first_step(zero_grad=True)
    rng.replay(state)
    closure()
    opt.step()
    closure()
    assert masks[0] == masks[1] != masks[2]


def test_capture_takes_nothing_from_the_generator_and_replays_many_times() -> None:
    torch.manual_seed(11)
    expected = torch.rand(5)
    torch.manual_seed(11)
    state = rng.capture()
    assert bits(torch.rand(5)) == bits(expected)
    for _ in range(2):
        rng.replay(state)
        assert bits(torch.rand(5)) == bits(expected)
