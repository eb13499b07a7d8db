"""FusedSAM around torch.optim.Adam and AdamW: torch's bits, the reference's trajectory, state, checkpoints, faults."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import assert_within_ulp, exact
from helpers import (
    ADAM_CONFIGS,
    ADAM_ULP,
    FLOAT64_RTOL,
    RHO,
    ROOT_ULP,
    assert_as_torch,
    assert_same_bits,
    batches,
    closure_for,
    gradient_stream,
    ids,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
    state_tensors,
    torch_fuses,
    two_calls,
    zeroing,
)

from fused_sam import FusedSAM, ReferenceSAM, backends
from fused_sam.descent import FusedAdam

Base = type[torch.optim.Optimizer]
BASES: dict[str, Base] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
every_base = pytest.mark.parametrize("base", BASES)
CONFIGS = {name: ADAM_CONFIGS[name] for name in ("plain", "betas", "decay", "amsgrad", "all")}
SHAPES = [(n,) for n in (*range(36), 67, 130, 1009, 16385, 32769)] + [(5, 3, 3, 3)]


def is_fused(opt: FusedSAM) -> bool:
    return isinstance(opt._step.base, FusedAdam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize(
    ("base", "name"), [*(("adam", name) for name in CONFIGS), ("adamw", "plain"), ("adamw", "all")]
)
def test_rho_zero_is_torch_adam_bit_for_bit(
    dtype: torch.dtype, base: str, name: str, backend: str, device: str, ieee_roots: None
) -> None:
    """Four steps, weights and state, but for the square root: torch's is not rounded correctly on the CPU."""
    config = CONFIGS[name]
    params = [torch.randn(s, dtype=dtype, device=device) for s in SHAPES]
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    theirs = [p.clone() for p in params]
    opt = FusedSAM(params, BASES[base], rho=0.0, backend=backend, **config)
    plain = BASES[base](theirs, foreach=False, **config)
    assert is_fused(opt)
    for first, second in gradient_stream(SHAPES, 4, dtype):
        two_calls(opt, params, first, second)
        set_grads(theirs, second)
        plain.step()
    assert_as_torch(params, theirs, "param")
    assert_as_torch(state_tensors(opt), state_tensors(plain), "state")
    for p, q in zip(params, theirs, strict=True):
        ours, torchs = opt.state[p], plain.state[q]
        assert list(ours) == list(torchs)
        for key in ours:
            mine, other = ours[key], torchs[key]
            assert (mine.dtype, mine.device, mine.shape) == (other.dtype, other.device, other.shape), key
            assert mine.stride() == other.stride(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@every_base
def test_rho_zero_with_torchs_own_root(dtype: torch.dtype, base: str, backend: str, device: str) -> None:
    """One step from the same weights and state: the averages bit for bit, weights within the bound of the root."""
    config = CONFIGS["amsgrad"]
    params = [torch.randn(s, dtype=dtype, device=device) for s in SHAPES[:-1]]
    theirs = [p.clone() for p in params]
    opt = FusedSAM(params, BASES[base], rho=0.0, backend=backend, **config)
    plain = BASES[base](theirs, foreach=False, **config)
    for first, second in gradient_stream(SHAPES[:-1], 4, dtype):
        old = [p.clone() for p in params]
        two_calls(opt, params, first, second)
        set_grads(theirs, second)
        plain.step()
        assert_as_torch(state_tensors(opt), state_tensors(plain), "state")
        for p, q, w in zip(params, theirs, old, strict=True):
            if not p.is_cuda and not torch_fuses():  # then the averages are not the same bits either
                assert_as_torch([p], [q], "w")
                continue
            # torch's root is an ulp off, which may be two of the quotient; then the sum may round the other way.
            size = np.maximum(np.maximum(np.abs(exact(w)), np.abs(exact(q))), np.abs(exact(q) - exact(w)))
            assert_within_ulp(p, exact(q), size, ROOT_ULP if not p.is_cuda else ADAM_ULP, "w")
            p.copy_(q)


@every_base
@pytest.mark.parametrize(("adaptive", "config"), [("sam", name) for name in CONFIGS] + [("asam", "all")])
def test_network_matches_the_reference(base: str, adaptive: str, config: str, backend: str, device: str) -> None:
    """In float64, where the second gradient depends on the perturbation and nothing hides behind rounding."""
    net, data = small_net(device=device), batches(8, device=device)
    twin = copy.deepcopy(net)
    options = dict(CONFIGS[config])
    opt = FusedSAM(net.parameters(), BASES[base], rho=0.3, adaptive=adaptive == "asam", backend=backend, **options)
    if base == "adamw":
        options.setdefault("weight_decay", 0.01)
    reference = ReferenceSAM(twin.parameters(), rho=0.3, adaptive=adaptive == "asam", base=base, **options)
    for batch in data:
        opt.step(closure_for(net, batch))
        reference.step(zeroing(twin, closure_for(twin, batch)))
    for p, w in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, w, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
        expected = reference.adam_states[w]
        assert float(opt.state[p]["step"]) == expected.t
        torch.testing.assert_close(opt.state[p]["exp_avg"], expected.m, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
        torch.testing.assert_close(opt.state[p]["exp_avg_sq"], expected.v, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


@every_base
def test_a_parameter_without_a_gradient_keeps_its_own_step(
    base: str, backend: str, device: str, ieee_roots: None
) -> None:
    """State comes into being with its first gradient, and bias corrections are each parameter's own."""
    params = [torch.randn(n, device=device) for n in (9, 33, 67, 5)]
    theirs = [p.clone() for p in params]
    opt = FusedSAM(params, BASES[base], rho=0.0, backend=backend, **CONFIGS["decay"])
    plain = BASES[base](theirs, foreach=False, **CONFIGS["decay"])
    for step, (first, second) in enumerate(gradient_stream([p.shape for p in params], 6, torch.float32)):
        present: list[Any] = [g if (step + i) % (i + 1) == 0 and i < 3 else None for i, g in enumerate(second)]
        two_calls(opt, params, first, present)
        set_grads(theirs, present)
        plain.step()
    assert_as_torch(params, theirs)
    assert_as_torch(state_tensors(opt), state_tensors(plain), "state")
    assert len({float(opt.state[p]["step"]) for p in params[:3]}) > 1
    assert params[3] not in opt.state


def test_capturable_on_the_cpu_is_refused_as_torch_does(backend: str) -> None:
    for options in ({"capturable": True}, {}):
        params = leaves(9)
        opt = FusedSAM(params, torch.optim.Adam, rho=RHO, backend=backend, lr=0.1, **options)
        opt.param_groups[0]["capturable"] = True
        w = snapshot(params)
        with pytest.raises((AssertionError, RuntimeError), match="capturable"):
            opt.step(quadratic(params))
        assert snapshot(params) == w
        assert not opt.perturbed


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": True}, {"betas": (torch.tensor(0.8), torch.tensor(0.97))}, {"lr": torch.tensor(0.1)}],
    ids=["foreach", "fused", "tensor betas", "tensor lr"],
)
def test_options_that_choose_a_way_of_computing(options: dict[str, Any], backend: str, device: str) -> None:
    """The result is Adam's whichever is asked for. torch's fused kernel contracts as it likes."""
    params = [torch.randn(33, device=device, dtype=torch.float64)]
    theirs = [p.clone() for p in params]
    opt = FusedSAM(params, torch.optim.Adam, rho=0.0, backend=backend, **options)
    plain_options = {k: v for k, v in options.items() if k not in ("foreach", "fused")}
    plain = torch.optim.Adam(theirs, foreach=False, **plain_options)
    for first, second in gradient_stream([(33,)], 3, torch.float64):
        two_calls(opt, params, first, second)
        set_grads(theirs, second)
        plain.step()
    rtol = 1e-7 if "lr" in options else FLOAT64_RTOL  # torch divides a tensor lr in its own dtype, fp32
    torch.testing.assert_close(params, theirs, rtol=rtol, atol=rtol)


def test_a_backend_without_adam_lets_it_step_by_itself(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.randn(33, device=device) for _ in range(2)]
    theirs = [p.clone() for p in params]
    opt = FusedSAM(params, torch.optim.Adam, rho=0.0, backend=backend, foreach=False, lr=0.013)
    plain = torch.optim.Adam(theirs, foreach=False, lr=0.013)
    monkeypatch.setattr(backends.for_device(device, backend), "BASE_STEPS", ("sgd_update",))
    for first, second in gradient_stream([(33,)] * 2, 3, torch.float32):
        two_calls(opt, params, first, second)
        set_grads(theirs, second)
        plain.step()
    assert_same_bits(params, theirs)
    assert_same_bits(state_tensors(opt), state_tensors(plain), "state")


class OwnAdam(torch.optim.Adam):
    """A subclass may step in ways of its own."""


@pytest.mark.parametrize("base", [OwnAdam, torch.optim.NAdam, torch.optim.Adamax], ids=lambda x: x.__name__)
def test_subclasses_and_relatives_are_not_fused(base: Base) -> None:
    assert not is_fused(FusedSAM(leaves(3), base, lr=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@every_base
def test_16_bit_state_has_the_dtype_of_the_weights(dtype: torch.dtype, base: str, backend: str, device: str) -> None:
    params = [torch.randn(130, device=device).to(dtype)]
    wide = [p.double() for p in params]
    opt = FusedSAM(params, BASES[base], rho=RHO, backend=backend, **CONFIGS["decay"])
    reference = ReferenceSAM(wide, rho=RHO, base=base, **CONFIGS["decay"])
    for first, second in gradient_stream([(130,)], 5, dtype):
        two_calls(opt, params, first, second)
        set_grads(wide, first)
        reference.first_step(zero_grad=True)
        set_grads(wide, second)
        reference.second_step()
    assert opt.state[params[0]]["exp_avg"].dtype == dtype
    assert opt.state[params[0]]["step"].dtype == torch.float32
    # Each of the five steps rounds w once: half an ulp at |w| < 4, and the averages' roundings move a step less.
    tolerance = 5 * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(params[0].double(), wide[0], rtol=0, atol=tolerance)
