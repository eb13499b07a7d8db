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


def test_both_passes_see_one_mask_with_replay(backend: str, device: str) -> None:
    (p,) = leaves(200, device=device)
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.013, replay_rng=True)
    masks: list[bytes] = []
    for _ in range(3):
        opt.step(dropout_closure(p, masks))
    assert masks[0::2] == masks[1::2]
    assert len(set(masks)) == 3


def test_the_passes_differ_without_replay(backend: str, device: str) -> None:
    (p,) = leaves(200, device=device)
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.013)
    masks: list[bytes] = []
    for _ in range(3):
        opt.step(dropout_closure(p, masks))
    assert len(set(masks)) == 6


def test_a_replayed_step_draws_as_much_as_a_single_pass(backend: str, device: str) -> None:
    """So a run with replay and a plain run see the same masks at every step."""
    (p,) = leaves(200, device=device)
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.013, replay_rng=True)
    torch.manual_seed(7)
    with_sam: list[bytes] = []
    for _ in range(3):
        opt.step(dropout_closure(p, with_sam))
    torch.manual_seed(7)
    alone: list[bytes] = []
    for _ in range(3):
        dropout_closure(p, alone)()
    assert with_sam[0::2] == alone


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


def test_an_exception_in_a_replayed_step_restores_the_weights(backend: str, device: str) -> None:
    (p,) = leaves(200, device=device)
    opt = FusedSAM([p], rho=RHO, backend=backend, lr=0.013, replay_rng=True)
    w, masks = bits(p), []
    closure = dropout_closure(p, masks)

    def failing() -> Tensor:
        if opt.perturbed:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        opt.step(failing)
    assert bits(p) == w
