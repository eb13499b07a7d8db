"""Annotations, the signature that command lines read, and what a user is shown: repr, log, labels in profiles."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typed_script
from helpers import RHO, leaves, quadratic, snapshot

from fused_sam import FusedSAM, backends, step
from fused_sam.ops import labels

ROOT = Path(__file__).parent.parent


def test_a_users_script_runs() -> None:
    net = torch.nn.Linear(3, 2)
    before = snapshot(list(net.parameters()))
    typed_script.train(net, torch.ones(5, 3), torch.zeros(5, 2))
    assert snapshot(list(net.parameters())) != before
    assert [text.split()[0] for text in typed_script.others(net)] == ["WarmedUp", "FusedSAM", "FusedSAM"]


# LightningCLI and jsonargparse make --optimizer.lr and its like from names in the signature.
USUAL: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"lr": 0.13, "momentum": 0.87, "weight_decay": 0.01, "nesterov": True},
    torch.optim.AdamW: {"lr": 0.13, "betas": (0.83, 0.97), "eps": 1e-5, "weight_decay": 0.02},
}


@pytest.mark.parametrize("base", USUAL, ids=lambda base: base.__name__)
def test_the_usual_options_of_a_base_are_in_the_signature(base: type[torch.optim.Optimizer]) -> None:
    """A command line gives all of them: None where a user has said nothing, or what the base has no such option for."""
    parameters = inspect.signature(FusedSAM).parameters
    unsaid = {name: parameters[name].default for options in USUAL.values() for name in options}
    assert set(unsaid.values()) == {None}
    group = FusedSAM(leaves(3), base, **(unsaid | USUAL[base])).param_groups[0]
    assert {name: group[name] for name in USUAL[base]} == USUAL[base]
    defaults = base(leaves(3)).defaults
    group = FusedSAM(leaves(3), base, **unsaid).param_groups[0]
    assert {name: group[name] for name in USUAL[base]} == {name: defaults[name] for name in USUAL[base]}
    with pytest.raises(ValueError, match=r"Invalid lr=0\.1 and lr=0\.2\. Must be given once"):
        FusedSAM(leaves(3), base, lr=0.1, base_options={"lr": 0.2})


def test_a_command_line_sets_them() -> None:
    """As LightningCLI, which hands the optimizer's options to jsonargparse."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(torch.optim.Optimizer, "optimizer", skip={"params"})
    line = "--optimizer=fused_sam.FusedSAM --optimizer.lr=0.3 --optimizer.momentum=0.9 --optimizer.adaptive=weights"
    options = parser.parse_args([*line.split(), "--optimizer.base_options.dampening=0.2"]).optimizer.init_args
    group = FusedSAM(leaves(3), **options.as_dict()).param_groups[0]
    assert [group[name] for name in ("lr", "momentum", "adaptive", "dampening")] == [0.3, 0.9, "weights", 0.2]
    with pytest.raises(jsonargparse.ArgumentError, match="direction"):
        parser.parse_args([*line.split(), "--optimizer.direction=sideways"])


def test_the_repr_says_what_groups_do_not(backend: str, device: str) -> None:
    params = leaves(3, device=device)
    opt = FusedSAM(params, torch.optim.AdamW, rho=RHO, p=3, interval=2, stop=7, backend=backend, lr=0.13)
    head, groups = repr(opt).split("Parameter Group 0\n")
    assert head == (f"FusedSAM (\n    base: AdamW\n    p: 3.0\n    interval: 2\n    backend: {backend}\n    stop: 7\n")
    assert groups == torch.optim.Optimizer.__repr__(opt).split("Parameter Group 0\n")[1]
    assert repr(copy.deepcopy(opt)) == repr(opt)
    unasked = FusedSAM(params, lr=0.13)
    assert f"    backend: {backends.chosen(device)}\n" in repr(unasked)


@pytest.mark.parametrize("form", ["closure", "two calls", "momentum"])
def test_a_profile_has_the_parts_of_a_step(form: str, backend: str) -> None:
    params = leaves(9, 5)
    direction = "momentum" if form == "momentum" else "gradient"
    opt = FusedSAM(params, rho=RHO, backend=backend, lr=0.13, momentum=0.87, direction=direction)
    closure = quadratic(params)
    opt.step(closure)
    with torch.profiler.profile() as profile:
        if form == "two calls":
            opt.first_step(zero_grad=True)
            closure()
            opt.step()
        else:
            opt.step(closure)
    parts = sorted((e for e in profile.events() if e.name.startswith("FusedSAM.")), key=lambda e: e.time_range.start)
    assert [e.name.removeprefix("FusedSAM.") for e in parts] == ["ascent", "norm", "perturb", "update"]
    ascent, *inside, update = (e.time_range for e in parts)
    assert all(ascent.start <= part.start <= part.end <= ascent.end for part in inside)
    assert update.start >= ascent.end


def test_labels_change_no_bit_and_cost_no_call_without_a_profiler() -> None:
    begin = leaves(9, 5)
    results = []
    calls: list[str] = []
    for profiled in (False, True):
        params = copy.deepcopy(begin)
        opt = FusedSAM(params, rho=RHO, lr=0.13, momentum=0.87, ascent_steps=2)
        with torch.profiler.profile() if profiled else contextlib.nullcontext():
            if not profiled:
                sys.setprofile(lambda frame, *_: calls.append(frame.f_code.co_filename))
            for _ in range(3):
                opt.step(quadratic(params))
            sys.setprofile(None)
        results.append((snapshot(params), snapshot([opt.state[p]["momentum_buffer"] for p in params])))
    assert results[0] == results[1]
    assert step.__file__ in calls
    assert labels.__file__ not in calls


@pytest.mark.filterwarnings("ignore:No parameter has a gradient")
@pytest.mark.parametrize("asked", [None, "eager"])
def test_the_backend_is_logged_once(asked: str | None, caplog: pytest.LogCaptureFixture) -> None:
    backends.for_device.cache_clear()
    with caplog.at_level(logging.INFO, logger="fused_sam"):
        for _ in range(3):
            opt = FusedSAM([torch.zeros(2, requires_grad=True)], lr=0.1, backend=asked)
            repr(opt)
            opt.step(lambda: None)
    said = "backend 'native' chosen for cpu tensors" if asked is None else "backend 'eager' taken for cpu tensors"
    assert [r.getMessage().partition(",")[0] for r in caplog.records if "backend" in r.getMessage()] == [said]
