"""rho that follows the learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import leaves, quadratic, through_a_file
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from fused_sam import FusedSAM, RhoTiedToLR


def groups(device: str = "cpu") -> list[dict[str, Any]]:
    params = leaves(5, 7, 3, device=device)
    return [{"params": params[:1], "rho": 0.4}, {"params": params[1:2], "lr": 0.3}, {"params": params[2:], "rho": 0.0}]


def expected(group: dict[str, Any], rho_max: float, lr_max: float, rho_min: float, lr_min: float) -> float:
    share = min(max((float(group["lr"]) - lr_min) / (lr_max - lr_min), 0.0), 1.0)
    return rho_min + (rho_max - rho_min) * share


@pytest.mark.parametrize(("rho_min", "lr_min"), [(0.0, 0.0), (0.01, 0.02)])
def test_rho_of_each_group_is_linear_in_its_lr(rho_min: float, lr_min: float) -> None:
    opt = FusedSAM(groups(), rho=0.1, lr=0.2)
    scheduler = CosineAnnealingLR(opt, T_max=10, eta_min=0.005)
    tied = RhoTiedToLR(opt, rho_min=rho_min, lr_min=lr_min)
    seen = []
    for _ in range(12):
        for group, rho_max, lr_max in zip(opt.param_groups, (0.4, 0.1, 0.0), (0.2, 0.3, 0.2)):
            assert group["rho"] == pytest.approx(expected(group, rho_max, lr_max, rho_min, lr_min), abs=1e-15)
        seen.append(opt.param_groups[0]["rho"])
        opt.step(quadratic([p for g in opt.param_groups for p in g["params"]]))
        scheduler.step()
        tied.step()
    assert seen[0] == pytest.approx(0.4)
    assert min(seen) == pytest.approx(rho_min, abs=0.011)


def test_a_warm_up_starts_below_and_does_not_exceed_rho_max() -> None:
    opt = FusedSAM(groups(), rho=0.1, lr=0.2)
    scheduler = LambdaLR(opt, lambda step: min((step + 1) / 4, 1.5))
    tied = RhoTiedToLR(opt)
    assert opt.param_groups[0]["rho"] == pytest.approx(0.1)
    for _ in range(6):
        opt.step(quadratic([p for g in opt.param_groups for p in g["params"]]))
        scheduler.step()
        tied.step()
    assert opt.param_groups[0]["rho"] == 0.4


def test_a_checkpoint_of_the_optimizer_carries_it_along() -> None:
    opt = FusedSAM(groups(), rho=0.1, lr=0.2)
    tied = RhoTiedToLR(opt)
    opt.param_groups[0]["lr"] = 0.05
    tied.step()
    saved = through_a_file(opt.state_dict())
    for made_before in (False, True):
        resumed = FusedSAM(groups(), rho=0.1, lr=0.2)
        again = RhoTiedToLR(resumed) if made_before else None
        resumed.load_state_dict(saved)
        again = again or RhoTiedToLR(resumed)
        resumed.param_groups[0]["lr"] = 0.1
        again.step()
        assert resumed.param_groups[0]["rho"] == pytest.approx(0.2)


def test_groups_added_later_are_tied_too() -> None:
    opt = FusedSAM(groups(), rho=0.1, lr=0.2)
    tied = RhoTiedToLR(opt)
    opt.add_param_group({"params": leaves(4), "rho": 0.6, "lr": 0.3})
    tied.step()
    opt.param_groups[-1]["lr"] = 0.15
    tied.step()
    assert opt.param_groups[-1]["rho"] == pytest.approx(0.3)


def test_tensors_are_written_in_place() -> None:
    opt = FusedSAM(leaves(5), rho=torch.tensor(0.4), lr=torch.tensor(0.2))
    rho = opt.param_groups[0]["rho"]
    tied = RhoTiedToLR(opt)
    opt.param_groups[0]["lr"].fill_(0.05)
    tied.step()
    assert opt.param_groups[0]["rho"] is rho
    assert float(rho) == pytest.approx(0.1)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_values_out_of_range_are_refused(value: float) -> None:
    opt = FusedSAM(groups(), rho=0.1, lr=0.2)
    with pytest.raises(ValueError, match="Invalid rho_min="):
        RhoTiedToLR(opt, rho_min=value)
    with pytest.raises(ValueError, match="Invalid lr_min="):
        RhoTiedToLR(opt, lr_min=value)
    assert all("initial_rho" not in g for g in opt.param_groups)


def test_what_cannot_be_tied_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid lr_min=0\.2\. Must be below the learning rate of group 0"):
        RhoTiedToLR(FusedSAM(groups(), rho=0.1, lr=0.2), lr_min=0.2)
    with pytest.raises(ValueError, match=r"Invalid optimizer=SGD\. Its group 0 has no rho"):
        RhoTiedToLR(torch.optim.SGD(leaves(5), lr=0.1))
