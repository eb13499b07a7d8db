"""Backward, then step(closure, use_gradients=True): the gradients that there are make the perturbation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HYPER, RHO, assert_same_bits, leaves, quadratic, snapshot, state_tensors

from fused_sam import FusedSAM

FORMS: dict[str, dict[str, Any]] = {
    "SAM": {},
    "ASAM": {"adaptive": True, "max_grad_norm": 0.7},
    "two steps of ascent": {"ascent_steps": 2},
    "LookSAM": {"interval": 2, "looksam_alpha": 0.7},
    "every third": {"interval": 3, "start": 1},
    "AdamW": {"base_optimizer": torch.optim.AdamW, "lr": 0.013, "weight_decay": 0.17},
}


def optimizer(params: list[torch.Tensor], form: str, backend: str) -> FusedSAM:
    options = FORMS[form]
    return FusedSAM(params, rho=RHO, backend=backend, **({} if "base_optimizer" in options else HYPER), **options)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_two_call_form(form: str, backend: str, device: str) -> None:
    """Over micro-batches, too. The closure is called at w + e only, and not at all in a step without an ascent."""
    params = leaves(9, 130, 5, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt, twin = optimizer(params, form, backend), optimizer(twins, form, backend)
    for _ in range(4):
        calls: list[bool] = []

        def closure(calls: list[bool] = calls) -> torch.Tensor:
            calls.append(opt.perturbed)
            if len(calls) > 1:
                opt.zero_grad()
            loss = quadratic(params)()
            quadratic(params[1:])()
            return loss

        closure()
        del calls[:]
        loss = opt.step(closure, use_gradients=True)
        opt.zero_grad()

        quadratic(twins)()
        quadratic(twins[1:])()
        ascents, expected = 0, None
        while twin.perturb_next:
            twin.first_step(zero_grad=True)
            ascents += 1
            expected = quadratic(twins)()
            quadratic(twins[1:])()
        twin.step()
        twin.zero_grad()

        assert calls == [True] * ascents
        assert (loss is None) == (expected is None)
        if loss is not None:
            assert_same_bits([loss], [expected])
            assert opt.last.loss is None
            assert_same_bits([opt.last.loss_perturbed], [expected.detach()])
        assert_same_bits(params, twins)
        assert_same_bits(state_tensors(opt), state_tensors(twin))


class Counting(FusedSAM):
    calls = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().step(*args, **kwargs)


def test_hooks_and_subclasses_pass_it_on(backend: str) -> None:
    params = leaves(9, 5)
    opt, hooked = Counting(params, rho=RHO, backend=backend, **HYPER), []
    opt.register_step_post_hook(lambda *args: hooked.append(1))
    quadratic(params)()
    opt.step(quadratic(params), use_gradients=True)
    assert (opt.calls, len(hooked)) == (1, 1)
    plain = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    plain.register_step_post_hook(lambda opt, args, kwargs: hooked.append(kwargs))
    plain.step(quadratic(params), use_gradients=True)
    assert hooked[1:] == [{"use_gradients": True}]


def test_what_fails_leaves_the_weights_at_w(backend: str) -> None:
    params = leaves(9, 5)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    w = snapshot(params)

    def failing() -> None:
        quadratic(params)()
        raise KeyboardInterrupt

    quadratic(params)()
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing, use_gradients=True)
    assert_same_bits(params, w)
    opt.zero_grad()
    with pytest.warns(UserWarning, match="No parameter has a gradient at first_step"):
        opt.step(quadratic(params), use_gradients=True)


def test_what_it_does_not_go_with_is_refused(backend: str) -> None:
    params = leaves(9, 5)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    closure = quadratic(params)
    w = snapshot(params)
    for given, message in (
        (((None,), {}), "use_gradients=True without a closure"),
        ((([closure],), {}), "Must be False with a list of closures"),
        (((closure,), {"ascent": closure}), "Must be False with a list of closures"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.step(*given[0], use_gradients=True, **given[1])
    for option in ({"second_order": True}, {"direction": "momentum"}, {"replay_rng": True}):
        with pytest.raises(ValueError, match=f"Invalid {next(iter(option))}=.* with use_gradients=True"):
            FusedSAM(params, rho=RHO, backend=backend, **HYPER, **option).step(closure, use_gradients=True)
    assert_same_bits(params, w)
