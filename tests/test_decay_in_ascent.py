"""Weight decay in the first gradient, as where the L2 term is part of the loss: ops and optimizer, on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import Array, assert_within_ulp, exact
from helpers import (
    DTYPES,
    FEW_SIZES,
    FLOAT64_RTOL,
    HYPER,
    PERTURB_ULP,
    RHO,
    ROUNDED_ONCE_ULP,
    SIXTEEN_BIT,
    Lists,
    assert_all_close,
    assert_same_bits,
    batches,
    buffers,
    closure_for,
    ids,
    leaves,
    small_net,
    snapshot,
    zeroing,
)
from torch import Tensor, nn

from fused_sam import FusedSAM, ReferenceSAM, ops
from fused_sam.ops import AscentGroup

ETA = 0.03
# Of a size at which it changes every element, and of both signs (maximize).
DECAYS = [0.37, -0.21]


def exact_x(w: Tensor, g: Tensor, group: AscentGroup) -> tuple[Array, Array]:
    """T and x = T (g + decay w)."""
    t = np.abs(exact(w)) + group.eta if group.adaptive else np.ones_like(exact(w))
    return t, t * (exact(g) + np.longdouble(group.decay) * exact(w))


def assert_displaced(w: Tensor, old: Array, g: Tensor, t: Array, x: Array, group: AscentGroup, total: float) -> None:
    """w + e for p = 2, given the norm."""
    e = group.rho * t * x / np.longdouble(total)
    terms = group.rho * t * t * (np.abs(exact(g)) + abs(group.decay) * np.abs(old)) / total  # they may cancel
    largest = np.maximum(np.maximum(np.abs(old), np.abs(old + e)), terms)
    limit = ROUNDED_ONCE_ULP if w.dtype in SIXTEEN_BIT else PERTURB_ULP
    assert_within_ulp(w, old + e, largest, limit, "w + e")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("swap", [False, True], ids=["backup", "swap"])
def test_norm_and_perturb_match_the_closed_form(
    dtype: torch.dtype, adaptive: bool, swap: bool, backend: str, device: str
) -> None:
    """A third of the tensors each with decay, without, and with one of the other sign."""
    lists = Lists(FEW_SIZES * 3, dtype, device)
    groups = [AscentGroup(len(FEW_SIZES), RHO, adaptive, ETA, decay) for decay in (DECAYS[0], 0.0, DECAYS[1])]
    each = [group for group in groups for _ in FEW_SIZES]
    old, grads = [exact(w) for w in lists.params], [g.clone() for g in lists.grads]
    old_bits = snapshot(lists.params)
    scaled = [exact_x(w, g, group) for w, g, group in zip(lists.params, grads, each, strict=True)]
    norm = ops.norm(lists.params, lists.grads, groups, backend=backend)
    total = float(np.sqrt(sum((x * x).sum() for _, x in scaled)))
    assert float(norm) == pytest.approx(total, rel=1e-12)
    backups = lists.grads if swap else lists.backups
    ops.perturb(lists.params, lists.grads, backups, norm, groups, backend=backend)
    assert_same_bits(backups, old_bits, "backup")
    for w, w_old, g, (t, x), group in zip(lists.params, old, grads, scaled, each, strict=True):
        assert_displaced(w, w_old, g, t, x, group, float(norm))
    lists.check_neighbours()


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0, math.inf], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_other_norms(p: float, adaptive: bool, backend: str, device: str) -> None:
    """As without decay, of gradients to which it has been added."""
    lists = Lists(FEW_SIZES, torch.float64, device)
    decayed = [g + DECAYS[0] * w for w, g in zip(lists.params, lists.grads, strict=True)]
    results = []
    for grads, decay in ((lists.grads, DECAYS[0]), (decayed, 0.0)):
        params = [w.clone() for w in lists.params]
        groups = [AscentGroup(len(FEW_SIZES), RHO, adaptive, ETA, decay)]
        norm = ops.norm(params, grads, groups, backend=backend, p=p)
        ops.perturb(params, grads, [torch.empty_like(w) for w in params], norm, groups, backend=backend, p=p)
        results.append(params if norm is None else [norm, *params])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)


def test_the_norm_reads_no_weights_without_need(backend: str, device: str) -> None:
    lists = Lists([9, 1009], torch.float32, device)
    for w in lists.params:
        w.fill_(math.nan)
    groups = [AscentGroup(2, RHO, False)]
    assert math.isfinite(float(ops.norm(lists.params, lists.grads, groups, backend=backend)))
    assert math.isnan(float(ops.norm(lists.params, lists.grads, [groups[0]._replace(decay=0.1)], backend=backend)))


BASES: dict[str, tuple[type[torch.optim.Optimizer], str, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, "sgd", HYPER),
    "sgd-maximize": (torch.optim.SGD, "sgd", {**HYPER, "maximize": True, "lr": 0.03}),
    "adam": (torch.optim.Adam, "adam", {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.17}),
}
every_base = pytest.mark.parametrize("base", BASES)


@every_base
@pytest.mark.parametrize("adaptive", [False, "weights"], ids=str)
def test_trajectories_follow_the_reference(base: str, adaptive: bool | str, backend: str, device: str) -> None:
    """Each group with a decay of its own, and one whose ascent has none."""
    base_class, name, options = BASES[base]
    net, twin = small_net(device=device), small_net(device=device)
    twin.load_state_dict(net.state_dict())

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        first, second, *rest = net.parameters()
        return [
            {"params": [first]},
            {"params": [second], "decay_in_ascent": False},
            {"params": rest, "weight_decay": 0.4, "rho": 0.2},
        ]

    common = {"rho": RHO, "adaptive": adaptive, "decay_in_ascent": True, **options}
    ours = FusedSAM(groups(net), base_class, backend=backend, **common)
    reference = ReferenceSAM(groups(twin), base=name, **common)
    for batch in batches(6, device=device):
        ours.step(closure_for(net, batch))
        reference.step(zeroing(twin, closure_for(twin, batch)))
    assert_all_close(net.parameters(), twin.parameters())
    if name == "sgd":
        for a, b in zip(buffers(ours), buffers(reference), strict=True):
            torch.testing.assert_close(a, b, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_the_ascent_is_that_of_the_loss_with_its_decay_term(maximize: bool, backend: str, device: str) -> None:
    """The definition: e is that of a loss which holds the term itself."""
    params = leaves(7, 130, device=device, dtype=torch.float64)
    twins = [w.detach().clone().requires_grad_() for w in params]
    options = {"rho": RHO, "lr": 0.1, "maximize": maximize, "backend": backend}
    ours = FusedSAM(params, weight_decay=0.3, decay_in_ascent=True, **options)
    explicit = FusedSAM(twins, **options)
    quadratic_and_linear(params).backward()
    (quadratic_and_linear(twins) + (-0.15 if maximize else 0.15) * sum((w * w).sum() for w in twins)).backward()
    for optimizer in (ours, explicit):
        optimizer.first_step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    ours.restore()


def quadratic_and_linear(params: list[Tensor]) -> Tensor:
    """Its gradient is no multiple of w."""
    return sum(((1.5 * w + 0.7) * w).sum() for w in params)


@pytest.mark.parametrize(
    ("base", "options", "sentence"),
    [
        (torch.optim.Rprop, {}, "must have a weight_decay"),
        (torch.optim.AdamW, {}, "decoupled"),
        (torch.optim.NAdam, {"decoupled_weight_decay": True}, "decoupled"),
    ],
    ids=["no decay", "AdamW", "decoupled"],
)
def test_it_is_refused_where_decay_is_no_part_of_the_loss(
    base: type[torch.optim.Optimizer], options: dict[str, Any], sentence: str
) -> None:
    sentence = f"Invalid decay_in_ascent=True.*{sentence}"
    with pytest.raises(ValueError, match=sentence):
        FusedSAM(leaves(3), base, decay_in_ascent=True, **options)
    optimizer = FusedSAM(leaves(3), base, **options)
    with pytest.raises(ValueError, match=sentence):
        optimizer.add_param_group({"params": leaves(3), "decay_in_ascent": True})
    assert len(optimizer.param_groups) == 1


def test_a_grad_scaler_is_refused_with_the_weights_back(backend: str, device: str) -> None:
    params = leaves(9, 130, device=device)
    old = snapshot(params)
    optimizer = FusedSAM(params, lr=0.1, weight_decay=0.3, decay_in_ascent=True, backend=backend)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(quadratic_and_linear(params)).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(quadratic_and_linear(params)).backward()
    with pytest.raises(RuntimeError, match="decay_in_ascent under a GradScaler"):
        scaler.step(optimizer)
    assert snapshot(params) == old
    assert not optimizer.perturbed
