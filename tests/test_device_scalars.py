"""lr and rho as tensors: read where the parameters are, so that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    FEW_SIZES,
    HYPER,
    Lists,
    ascent_groups,
    assert_same_bits,
    ids,
    quadratic,
    scalar,
    sgd_groups,
    snapshot,
    torch_fuses,
)

from fused_sam import FusedSAM, ops


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=ids)
def test_ops_give_the_same_bits_for_tensors_and_numbers(
    dtype: torch.dtype, kind: torch.dtype, backend: str, device: str
) -> None:
    rho, lr = (torch.tensor(x, dtype=kind, device=device) for x in (0.07, 0.13))
    results = []
    for rho_, lr_ in ((rho, lr), (rho.item(), lr.item())):
        torch.manual_seed(0)
        lists = Lists(FEW_SIZES, dtype, device)
        norm = scalar(2.9, device)
        ops.perturb(lists.params, lists.grads, lists.backups, norm, ascent_groups(len(FEW_SIZES), rho_), backend)
        displaced = snapshot(lists.params)
        groups = sgd_groups(len(FEW_SIZES), **{**HYPER, "lr": lr_})
        ops.sgd_update(lists.params, lists.grads, lists.backups, lists.momentum, groups, backend=backend)
        results.append((displaced, snapshot(lists.params), snapshot(lists.momentum)))
    if backend == "eager" and (dtype == torch.float64 or not torch_fuses()):
        # With a tensor for a factor the eager backend rounds once, but in fp64; with a number, where torch fuses.
        assert results[0][0] == results[1][0]
        return
    assert results[0] == results[1]


@pytest.mark.parametrize("on_host", [False, True], ids=["beside the parameters", "on the host"])
def test_a_tensor_is_read_anew_at_every_step(on_host: bool, backend: str, device: str) -> None:
    where = "cpu" if on_host else device
    start = torch.randn(9, device=device)
    params = [[start.clone().requires_grad_()] for _ in range(2)]
    rho, lr = torch.tensor(0.05, device=where), torch.tensor(0.1, device=where)
    by_tensor = FusedSAM(params[0], rho=rho, lr=lr, momentum=0.9, backend=backend, foreach=False)
    by_number = FusedSAM(params[1], rho=0.05, lr=0.1, momentum=0.9, backend=backend)
    for k in (1.0, 0.5, 0.25):
        rho.fill_(0.05 * k), lr.fill_(0.1 * k)
        for group in by_number.param_groups:
            group["rho"], group["lr"] = rho.item(), lr.item()
        for optimizer, p in zip((by_tensor, by_number), params, strict=True):
            optimizer.step(quadratic(p))
        assert_same_bits(params[0], params[1], "weight")
