"""Which base optimizers there may be: by class, name or callable, with groups and state of whatever kind."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import RHO, assert_bits_of_torch, assert_same_bits, leaves, quadratic, snapshot
from torch import Tensor

from fused_sam import FusedSAM


def train(params: list[Tensor], opt: torch.optim.Optimizer, steps: int) -> None:
    """Plain steps, or SAM's in two calls."""
    for _ in range(steps):
        opt.zero_grad()
        quadratic(params)()
        if isinstance(opt, FusedSAM):
            opt.first_step(zero_grad=True)
            quadratic(params)()
        opt.step()


@pytest.mark.parametrize(
    "base",
    [
        "torch.optim.AdamW",
        "AdamW",
        functools.partial(torch.optim.AdamW, betas=(0.9, 0.999)),
        lambda params, **options: torch.optim.AdamW(params, **options),
    ],
    ids=["name", "short name", "partial", "lambda"],
)
def test_a_base_is_a_class_its_name_or_what_makes_it(base: Any, backend: str) -> None:
    params = leaves(67, 5)
    twins = [p.detach().clone().requires_grad_() for p in params]
    opt = FusedSAM(params, base, rho=RHO, backend=backend, lr=0.013, weight_decay=0.17)
    twin = FusedSAM(twins, torch.optim.AdamW, rho=RHO, backend=backend, lr=0.013, weight_decay=0.17)
    train(params, opt, 3)
    train(twins, twin, 3)
    assert_same_bits(params, twins)
    assert opt.state[params[0]].keys() == twin.state[twins[0]].keys()
    copy.deepcopy(opt)


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (7, TypeError, "Invalid base_optimizer=7. Must be a subclass"),
        (torch.nn.Linear, TypeError, "Must be a subclass of torch.optim.Optimizer, its name"),
        ("AdamX", ValueError, "Invalid base_optimizer='AdamX'. Must be a name as 'torch.optim.AdamW'"),
        ("nowhere.AdamW", ValueError, "No module named 'nowhere'"),
        (lambda params: 7, TypeError, "Must return a torch.optim.Optimizer: 7"),
    ],
    ids=["number", "class", "name", "module", "callable"],
)
def test_what_makes_no_base_is_refused(base: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FusedSAM(leaves(3), base)


class Housekeeper(torch.optim.SGD):
    """Has its groups and its state in places of its own, adds groups its own way, and keeps more than dicts."""

    def __init__(self, params: Any, **options: Any) -> None:
        self.home: dict[str, Any] = {}
        super().__init__(params, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        param_group["slowness"] = 0.5 + len(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.state["made"] = self.state.get("made", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state.get(p, 0.0) * group["momentum"] + p.grad
                    p.sub_(group["lr"] / group["slowness"] * self.state[p])


class Sublet(Housekeeper):
    """Its groups and its state cannot be set."""

    @property
    def param_groups(self) -> Any:
        return self.home.setdefault("groups", [])

    @property
    def state(self) -> Any:
        return self.home.setdefault("state", {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("param_groups", "state"):  # which torch sets in its constructor
            super().__setattr__(name, value)
        elif name in vars(self) or self.home:
            raise AttributeError(name)


@pytest.mark.parametrize("base", [Housekeeper, Sublet])
def test_a_base_arranges_groups_and_state_its_own_way(base: Any, backend: str) -> None:
    """With rho = 0 a step is the base's own, in what it keeps, too, whatever that is."""
    params, more = leaves(9, 5), leaves(7)
    twins, more_twins = ([p.detach().clone().requires_grad_() for p in ps] for ps in (params, more))
    for opt, ps, extra in (
        (FusedSAM(params, base, rho=0.0, backend=backend, lr=0.13, momentum=0.8), params, more),
        (Housekeeper(twins, lr=0.13, momentum=0.8), twins, more_twins),
    ):
        train(ps, opt, 2)
        opt.add_param_group({"params": extra, "lr": 0.07})
        train([*ps, *extra], opt, 2)
        restored = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(restored)
        train([*ps, *extra], opt, 2)
        assert (opt.state["made"], opt.param_groups[1]["slowness"]) == (6, 2.5)
    assert_bits_of_torch([*params, *more], [*twins, *more_twins])


class Foreign(torch.optim.SGD):
    """Counts its steps outside of torch's state, and writes checkpoints in a format of its own."""

    made = 0

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.made += 1
        for group in self.param_groups:
            group["lr"] = 0.13 / self.made
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made, "torch's": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.made = state_dict["made"]
        super().load_state_dict(state_dict["torch's"])


def test_a_base_has_checkpoints_of_its_own(backend: str) -> None:
    params = leaves(9, 5)
    opt = FusedSAM(params, Foreign, rho=RHO, backend=backend, lr=0.13, momentum=0.8, interval=2)
    train(params, opt, 1)
    twins = [p.detach().clone().requires_grad_() for p in params]
    twin = FusedSAM(twins, Foreign, rho=0.9, backend=backend, lr=0.3, momentum=0.8, interval=2)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    for ps, o in ((params, opt), (twins, twin)):
        for _ in range(3):
            o.step(quadratic(ps))
    assert_same_bits(params, twins)


def test_looksam_has_no_place_in_state_that_is_no_dict(backend: str) -> None:
    params = leaves(9, 5)
    looksam = {"interval": 2, "start": 1, "looksam_alpha": 0.7}
    opt = FusedSAM(params, Housekeeper, rho=RHO, backend=backend, lr=0.1, momentum=0.8, **looksam)
    quadratic(params)()
    opt.step()
    w = snapshot(params)
    with pytest.raises(ValueError, match=r"Invalid parameter 0 of group 0 .* keeps a Tensor as its state"):
        train(params, opt, 1)
    assert_same_bits(params, w)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_waits_for_its_shape(base: type[torch.optim.Optimizer], backend: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LazyLinear(3))
    opt = FusedSAM(model.named_parameters(), base, rho=RHO, backend=backend, lr=0.013, weight_decay=0.017)
    x = torch.linspace(-1, 1, 20).view(4, 5)
    model[0](x).square().sum().backward()  # the other has neither shape nor gradient
    opt.first_step(zero_grad=True)
    model[0](x).square().sum().backward()
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    model(x)
    twin = copy.deepcopy(model)
    other = FusedSAM(twin.named_parameters(), base, rho=RHO, backend=backend, lr=0.013, weight_decay=0.017)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for net, sam in ((model, opt), (twin, other)):
        sam.step(lambda net=net: net(x).square().sum().backward())
    assert_same_bits(model.parameters(), twin.parameters())


def tied() -> torch.nn.Sequential:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("make", [list, iter], ids=["list", "iterator"])
def test_a_parameter_that_is_there_twice_is_named(make: Any) -> None:
    p, q = leaves(3, 4)
    with pytest.raises(ValueError, match="Invalid parameter 2 of group 0: it is in its group twice, first as 0 of"):
        FusedSAM(make([p, q, p]), rho=RHO)
    with pytest.raises(ValueError, match="Invalid parameter 0 of group 1: it is in group 0 too, as 1 of group 0"):
        FusedSAM(make([{"params": make([p, q])}, {"params": q}]), rho=RHO)
    with pytest.raises(ValueError, match=r"Invalid parameter 1\.weight: it is in its group twice, first as 0\.weight"):
        FusedSAM(make(list(tied().named_parameters(remove_duplicate=False))), rho=RHO)
    opt = FusedSAM(make([p, q]), rho=RHO)
    with pytest.raises(ValueError, match="Invalid parameter 2 of group 1: it is in group 0 too, as 1 of group 0"):
        opt.add_param_group({"params": make([*leaves(2, 5), q])})
    with pytest.raises(ValueError, match=r"1 of group 0 of shape \[4\] and 0 of group 1 of shape \[3\] overlap"):
        opt.add_param_group({"params": [q.detach()[1:].requires_grad_()]})
    assert len(opt.param_groups) == 1
