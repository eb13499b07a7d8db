"""What a user writes, with annotations: test_typing.py runs it, and `make lint` checks it as mypy --strict does.

A `type: ignore` is a mistake that is to be found: where it is not, mypy says that the comment is unused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fused_sam
from fused_sam import FusedSAM, RhoTiedToLR, ascend_on_forward
from fused_sam.batchnorm import first_pass_only
from fused_sam.report import Report


class WarmedUp(FusedSAM):
    """A subclass with a method of its own."""

    def halve(self) -> None:
        for group in self.param_groups:
            group["lr"] /= 2


def train(model: nn.Module, x: Tensor, y: Tensor) -> float:
    rho = torch.tensor(0.05)
    optimizer = FusedSAM(
        model.parameters(), torch.optim.SGD, rho=rho, adaptive="weights", lr=0.1, momentum=0.9, dampening=0.1
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)

    def closure() -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = optimizer.step(closure)
    assert_type(loss, Tensor)
    schedule.step()
    optimizer.step([closure, closure])
    optimizer.step(closure, ascent=closure)
    closure()
    optimizer.first_step(zero_grad=True)
    assert_type(optimizer.perturbed, bool)
    closure()
    assert_type(optimizer.step(), None)
    optimizer.zero_grad()
    assert_type(optimizer.last, Report)
    optimizer.load_state_dict(optimizer.state_dict())
    return loss.item()


def prepared(model: nn.Module, optimizer: FusedSAM) -> nn.Module:
    """Not run: it imports torch's compiler, which takes seconds."""
    first_pass_only(model, optimizer)
    fused_sam.distributed.data_parallel(model, optimizer)
    return model


def others(model: nn.Module) -> list[str]:
    adam = WarmedUp([{"params": model.parameters(), "rho": 0.1}], torch.optim.AdamW, lr=1e-3, betas=(0.8, 0.9))
    adam.halve()
    named = FusedSAM(model.named_parameters(), "torch.optim.Adam", 0.1, p=float("inf"), backend="eager")
    along = FusedSAM(model.parameters(), lr=0.1, momentum=0.9, direction="momentum")
    RhoTiedToLR(adam, rho_min=0.01).step()
    ascend_on_forward(model, along).remove()
    return [repr(optimizer) for optimizer in (adam, named, along)]


def mistakes(model: nn.Module) -> None:
    optimizer = FusedSAM(model.parameters(), adaptive="bias")  # type: ignore[arg-type]
    FusedSAM(model.parameters(), backend="abacus")  # type: ignore[arg-type]
    FusedSAM(model.parameters(), direction="sideways")  # type: ignore[arg-type]
    FusedSAM(model.parameters(), rho="0.05")  # type: ignore[arg-type]
    optimizer.step(3)  # type: ignore[call-overload]
    optimizer.frist_step()  # type: ignore[attr-defined]


if __name__ == "__main__":
    net = nn.Linear(3, 2)
    train(net, torch.ones(5, 3), torch.zeros(5, 2))
    others(net)
