"""FusedSAM(master_weights=True): 16-bit parameters that train as in fp32, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import assert_within_ulp, exact
from helpers import (
    FEW_SIZES,
    HYPER,
    LARGE,
    MOMENTUM_ULP,
    PERTURB_ULP,
    RHO,
    SIXTEEN_BIT,
    UPDATE_ULP,
    assert_as_torch,
    assert_same_bits,
    batches,
    bits,
    buffers,
    closure_for,
    gradient_stream,
    ids,
    leaves,
    quadratic,
    set_grads,
    small_net,
    snapshot,
    state_tensors,
    through_a_file,
)
from torch import Tensor
from torch.optim import SGD, Adam, AdamW

from fused_sam import FusedSAM, ReferenceSAM

every_dtype = pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=ids)
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {**HYPER, "nesterov": True}),
    "Adam": (Adam, {"lr": 0.013, "weight_decay": 0.017, "amsgrad": True}),
    "AdamW": (AdamW, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.17}),
}
every_base = pytest.mark.parametrize("base", BASES)


def make(params: Any, base: str, backend: str, **options: Any) -> FusedSAM:
    base_class, base_options = BASES[base]
    return FusedSAM(
        params, base_class, backend=backend, **{"rho": RHO, "master_weights": True, **base_options, **options}
    )


def masters_of(optimizer: FusedSAM) -> list[Tensor]:
    return [optimizer.state[p]["master"] for group in optimizer.param_groups for p in group["params"]]


def assert_rounded(optimizer: FusedSAM) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert_same_bits(params, [m.to(p.dtype) for p, m in zip(params, masters_of(optimizer), strict=True)], "param")


@pytest.mark.parametrize(("dtype", "adaptive"), [(torch.bfloat16, True), (torch.float16, False)], ids=ids)
def test_masters_follow_the_float64_reference_as_fp32_weights_do(
    dtype: torch.dtype, adaptive: bool, backend: str, device: str
) -> None:
    """In ulps of fp32, for 16-bit gradients; momentum too. Perturbed parameters are theirs, rounded once."""
    start = [torch.randn(n).to(device=device, dtype=dtype) for n in FEW_SIZES]
    params, wide = [p.clone() for p in start], [p.double() for p in start]
    options = {"rho": RHO, "adaptive": adaptive, **HYPER}
    optimizer = FusedSAM(params, backend=backend, master_weights=True, **options)
    reference = ReferenceSAM(wide, **options)
    largest = [np.abs(exact(p)) for p in start]
    largest_m = [np.zeros_like(x) for x in largest]
    for step, (first, second) in enumerate(gradient_stream([p.shape for p in start], 5, dtype)):
        set_grads(params, first)
        set_grads(wide, first)
        optimizer.first_step(zero_grad=True)
        reference.first_step(zero_grad=True)
        limit = UPDATE_ULP + MOMENTUM_ULP * step
        rounding = 0.5 + (limit + PERTURB_ULP) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        for p, w, size in zip(params, wide, largest, strict=True):
            np.maximum(size, np.abs(exact(w)), out=size)
            assert_within_ulp(p, exact(w), size, rounding, f"w + e of step {step}")
        set_grads(params, second)
        set_grads(wide, second)
        optimizer.step()
        reference.second_step()
        limit += MOMENTUM_ULP
        triples = zip(masters_of(optimizer), buffers(optimizer), wide, buffers(reference), second, strict=True)
        for i, (master, m, w, m_wide, g) in enumerate(triples):
            np.maximum(largest[i], np.maximum(np.abs(exact(w)), np.abs(exact(g))), out=largest[i])
            np.maximum(largest_m[i], np.maximum(np.abs(exact(g)), np.abs(exact(m_wide))), out=largest_m[i])
            assert master.dtype == m.dtype == torch.float32
            assert_within_ulp(master, exact(w), largest[i], limit, f"master of step {step}")
            assert_within_ulp(m, exact(m_wide), largest_m[i], limit, f"momentum of step {step}")
        assert_rounded(optimizer)


@every_base
@every_dtype
def test_with_rho_zero_it_is_torchs_own_on_fp32_weights(
    base: str, dtype: torch.dtype, backend: str, device: str, ieee_roots: None
) -> None:
    """Bit for bit: gradients at the rounded weights, the update in fp32."""
    net = small_net(dtype, device)
    weights = [p.detach().float().requires_grad_() for p in net.parameters()]
    base_class, options = BASES[base]
    if base == "Adam":
        options = {**options, "weight_decay": 0.0}  # which would feed back what the root of eager differs by
    ours = make(net.parameters(), base, backend, rho=0.0, **options)
    theirs = base_class(weights, foreach=False, **options)
    for batch in batches(6, dtype, device):
        ours.step(closure_for(net, batch))
        for w, p in zip(weights, net.parameters(), strict=True):
            w.grad = p.grad.float()
        theirs.step()
        assert_as_torch(masters_of(ours), weights, "master")
        assert_rounded(ours)


def test_steps_too_small_for_16_bits_add_up(backend: str, device: str) -> None:
    """What masters are for: a hundredth of a bf16 ulp at a time."""
    w = torch.ones(9, dtype=torch.bfloat16, device=device)
    stuck, moving = w.clone(), w.clone()
    for p, master_weights in ((stuck, False), (moving, True)):
        optimizer = FusedSAM([p], rho=RHO, lr=1e-4, backend=backend, master_weights=master_weights)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.first_step(zero_grad=True)
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert_same_bits([stuck], [w])
    torch.testing.assert_close(moving, torch.full_like(w, 0.98), rtol=0, atol=0.002)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("SGD", {"interval": 3, "start": 1}),
        ("SGD", {"max_grad_norm": 0.3}),
        ("Adam", {"max_grad_norm": 0.3, "interval": 2}),
        ("AdamW", {"p": 1.5, "adaptive": "weights", "eta": 0.01}),
        ("SGD", {"p": float("inf"), "telemetry": True}),
    ],
    ids=str,
)
def test_other_options_go_on_working(base: str, options: dict[str, Any], backend: str, device: str) -> None:
    """With gradients given, masters go where fp32 weights do, and parameters are never further off than by rounding."""
    params = leaves(*FEW_SIZES, device=device, dtype=torch.bfloat16)
    weights = [p.detach().float().requires_grad_() for p in params]
    ours, theirs = make(params, base, backend, **options), make(weights, base, backend, **options)
    rounding = {"rtol": 2.0**-8 + 1e-6, "atol": 1e-6}
    for first, second in gradient_stream([p.shape for p in params], 6, torch.bfloat16):
        for optimizer, ps in ((ours, params), (theirs, weights)):
            if optimizer.perturb_next:
                set_grads(ps, first)
                optimizer.first_step(zero_grad=True)
        assert ours.perturbed == theirs.perturbed
        torch.testing.assert_close([p.float() for p in params], weights, **rounding)
        for optimizer, ps in ((ours, params), (theirs, weights)):
            set_grads(ps, second)
            optimizer.step()
        torch.testing.assert_close(masters_of(ours), weights, rtol=1e-6, atol=1e-7)
        assert_rounded(ours)
    assert all("master" not in entry for entry in theirs.state.values())


def test_groups_of_all_dtypes_and_parameters_without_gradients(backend: str, device: str) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16]
    params = [torch.randn(67, device=device).to(t).requires_grad_() for t in dtypes]
    frozen = leaves(9, device=device, dtype=torch.bfloat16)[0].requires_grad_(False)
    optimizer = make([*params[:4], frozen], "SGD", backend)
    optimizer.step(quadratic(params[:4]))
    optimizer.add_param_group({"params": params[4:], "rho": 0.3, "lr": 0.01})
    optimizer.step(quadratic(params))
    assert ["master" in optimizer.state[p] for p in params] == [True, False, True, False, True]
    assert frozen not in optimizer.state
    for p in params:
        assert optimizer.state[p]["momentum_buffer"].dtype == (
            torch.float64 if p.dtype == torch.float64 else torch.float32
        )


@pytest.mark.parametrize("first", ["net", "optimizer"])
def test_a_resumed_run_changes_no_bit_whichever_is_loaded_first(first: str, backend: str, device: str) -> None:
    net, data = small_net(torch.bfloat16, device), batches(6, torch.bfloat16, device)
    optimizer = make(net.parameters(), "AdamW", backend)
    for batch in data[:3]:
        optimizer.step(closure_for(net, batch))
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    assert all(v.dtype == torch.float32 for s in saved["optimizer"]["state"].values() for v in s.values())
    other = small_net(torch.bfloat16, device)
    resumed = make(other.parameters(), "AdamW", backend, lr=0.5)
    resumed.step(closure_for(other, data[0]))  # what it has learned is forgotten
    for what in (first, "optimizer" if first == "net" else "net"):
        (other if what == "net" else resumed).load_state_dict(saved[what])
    for batch in data[3:]:
        optimizer.step(closure_for(net, batch))
        resumed.step(closure_for(other, batch))
    assert_same_bits(other.parameters(), snapshot(net.parameters()))
    assert snapshot(state_tensors(resumed)) == snapshot(state_tensors(optimizer))
    assert_rounded(resumed)


def test_loading_a_checkpoint_leaves_it_as_it_was(backend: str, device: str) -> None:
    params = leaves(9, device=device, dtype=torch.bfloat16)
    optimizer = make(params, "SGD", backend)
    optimizer.step(quadratic(params))
    saved = through_a_file(optimizer.state_dict())
    before = [bits(v) for v in saved["state"][0].values()]
    optimizer.load_state_dict(saved)
    optimizer.step(quadratic(params))
    assert [bits(v) for v in saved["state"][0].values()] == before


def test_checkpoints_without_masters_and_into_runs_without(backend: str, device: str) -> None:
    """Masters are made of the weights; where there are none, torch's keys alone remain."""
    params = leaves(9, 130, device=device, dtype=torch.bfloat16)
    plain = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    plain.step(quadratic(params))
    with_masters = make(params, "SGD", backend)
    with_masters.load_state_dict(through_a_file(plain.state_dict()))
    for p in params:
        buffer = with_masters.state[p]["momentum_buffer"]
        assert buffer.dtype == torch.float32
        assert_same_bits([buffer.bfloat16()], [plain.state[p]["momentum_buffer"]])
    old = [p.detach().float() for p in params]
    set_grads(params, [torch.ones_like(p) for p in params])
    with_masters.first_step()
    assert_same_bits(masters_of(with_masters), old)
    with_masters.step()
    plain.load_state_dict(through_a_file(with_masters.state_dict()))
    assert all(plain.state[p].keys() == {"momentum_buffer"} for p in params)
    assert all(plain.state[p]["momentum_buffer"].dtype == torch.bfloat16 for p in params)
    plain.step(quadratic(params))


@pytest.mark.parametrize("rebound", [False, True], ids=["overwritten", "rebound"])
@pytest.mark.parametrize("options", [{}, {"start": 9}], ids=["perturbed", "not perturbed"])
def test_weights_written_between_steps_become_the_masters(
    rebound: bool, options: dict[str, Any], backend: str, device: str
) -> None:
    """Where they changed: other elements keep what their parameter has no bits for."""
    net, data = small_net(torch.bfloat16, device), batches(3, torch.bfloat16, device)
    optimizer = make(net.parameters(), "SGD", backend, lr=1e-3, **options)
    for batch in data[:2]:
        optimizer.step(closure_for(net, batch))
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    expected = [m.clone() for m in masters_of(optimizer)]
    assert any(bool((m != p).any()) for m, p in zip(expected, net.parameters(), strict=True))
    for v, m in zip(values.values(), expected, strict=True):
        v[0] += 1.0
        m[0] = v[0].float()
    if rebound:
        for name, p in net.named_parameters():
            p.data = values[name].clone()
    else:
        net.load_state_dict(values)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that the step shows w
    optimizer.step(closure_for(net, data[2]))
    assert_same_bits(masters_of(optimizer), expected)
    assert_rounded(optimizer)


def test_masters_may_be_given(backend: str, device: str) -> None:
    """Weights that were trained in fp32 lose nothing: they enter the state before the first step."""
    weights = [torch.randn(n, device=device) for n in (9, 130)]
    params = [w.bfloat16().requires_grad_() for w in weights]
    optimizer = make(params, "SGD", backend, lr=0.0)
    for p, w in zip(params, weights, strict=True):
        optimizer.state[p]["master"] = w.clone()
    optimizer.step(quadratic(params))
    assert_same_bits(masters_of(optimizer), weights)


def test_betas_as_tensors_are_refused_at_the_step(backend: str, device: str) -> None:
    params = leaves(3, device=device, dtype=torch.bfloat16)
    optimizer = make(params, "AdamW", backend, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.99)))
    old = snapshot(params)
    with pytest.raises(RuntimeError, match="master_weights=True needs betas"):
        optimizer.step(quadratic(params))
    assert snapshot(params) == old


def test_fp32_parameters_have_no_masters(backend: str, device: str) -> None:
    params = leaves(9, LARGE, device=device)
    twins = [p.detach().clone().requires_grad_() for p in params]
    ours, theirs = make(params, "SGD", backend), make(twins, "SGD", backend, master_weights=False)
    for _ in range(2):
        ours.step(quadratic(params))
        theirs.step(quadratic(twins))
    assert_same_bits(params, twins)
    assert all(entry.keys() == {"momentum_buffer"} for entry in ours.state.values())
