"""state_dict, copies and pickles: what is saved, what is refused, what moves between optimizers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    HYPER,
    RHO,
    assert_as_torch,
    assert_bits_of_torch,
    assert_same_bits,
    batches,
    closure_for,
    leaves,
    quadratic,
    small_net,
    snapshot,
    state_tensors,
    through_a_file,
)
from torch import Tensor, nn

from fused_sam import FusedSAM

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, HYPER),
    "Adam": (torch.optim.Adam, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.017}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.17, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.017}),
}
every_base = pytest.mark.parametrize("base", BASES)


def trained(base: str, backend: str, device: str, **options: Any) -> tuple[nn.Module, FusedSAM, list[Any]]:
    """A network and its optimizer after two steps, and batches for more."""
    base_class, base_options = BASES[base]
    net, data = small_net(torch.float32, device), batches(6, torch.float32, device)
    opt = FusedSAM(net.parameters(), base_class, rho=RHO, backend=backend, **base_options, **options)
    for batch in data[:2]:
        opt.step(closure_for(net, batch))
    return net, opt, data[2:]


@every_base
def test_state_dict_is_that_of_the_base_plus_rho_and_adaptive(base: str, backend: str, device: str) -> None:
    net, opt, _ = trained(base, backend, device)
    base_class, options = BASES[base]
    plain = base_class(net.parameters(), **options)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    plain.step()
    ours, theirs = opt.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, entry in theirs["state"].items():
        assert ours["state"][index].keys() == entry.keys()
    for group, expected in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert group.keys() == expected.keys() | {"rho", "adaptive", "eta", "perturb", "decay_in_ascent"}


@every_base
def test_resuming_from_a_file_changes_no_bit(base: str, backend: str, device: str) -> None:
    """Weights, state, learning rate schedule and rho, into objects built with other values."""
    net, opt, data = trained(base, backend, device)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=9)
    opt.step(closure_for(net, data[0]))
    schedule.step()
    saved = through_a_file({"net": net.state_dict(), "opt": opt.state_dict(), "lr": schedule.state_dict()})

    other = small_net(torch.float32, device)
    resumed = FusedSAM(other.parameters(), BASES[base][0], rho=0.9, backend=backend, lr=0.5)
    other_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, T_max=9)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    other_schedule.load_state_dict(saved["lr"])
    assert resumed.param_groups[0]["rho"] == RHO
    for batch in data[1:]:
        for model, o, s in ((net, opt, schedule), (other, resumed, other_schedule)):
            o.step(closure_for(model, batch))
            s.step()
    assert_same_bits(other.parameters(), snapshot(net.parameters()))
    assert_same_bits(state_tensors(resumed), state_tensors(opt), "state")


@every_base
def test_checkpoints_move_to_the_base_optimizer(base: str, backend: str, device: str, ieee_roots: None) -> None:
    net, opt, data = trained(base, backend, device)
    base_class, options = BASES[base]
    twin = copy.deepcopy(net)
    plain = base_class(twin.parameters(), lr=0.5, foreach=False)
    plain.load_state_dict(through_a_file(opt.state_dict()))
    assert plain.param_groups[0]["lr"] == options["lr"]
    opt.param_groups[0]["rho"] = 0.0
    for batch in data:
        opt.step(closure_for(net, batch))
        plain.zero_grad()
        closure_for(twin, batch)()
        plain.step()
    same = assert_bits_of_torch if base == "SGD" else assert_as_torch
    same(twin.parameters(), net.parameters())
    same(state_tensors(plain), state_tensors(opt), "state")


@every_base
def test_checkpoints_come_from_the_base_optimizer(base: str, backend: str, device: str, ieee_roots: None) -> None:
    """Old ones too, which lack keys. rho and adaptive, unknown to the checkpoint, stay what they are."""
    base_class, options = BASES[base]
    net, data = small_net(torch.float32, device), batches(5, torch.float32, device)
    plain = base_class(net.parameters(), foreach=False, **options)
    for batch in data[:2]:
        plain.zero_grad()
        closure_for(net, batch)()
        plain.step()
    saved = through_a_file(plain.state_dict())
    del saved["param_groups"][0]["maximize"]
    twin = copy.deepcopy(net)
    opt = FusedSAM(twin.parameters(), base_class, rho=0.0, adaptive=True, backend=backend, lr=0.5)
    opt.load_state_dict(saved)
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["adaptive"]) == (0.0, True)
    assert opt.param_groups[0]["lr"] == options["lr"]
    for batch in data[2:]:
        opt.step(closure_for(twin, batch))
        plain.zero_grad()
        closure_for(net, batch)()
        plain.step()
    same = assert_bits_of_torch if base == "SGD" else assert_as_torch
    same(twin.parameters(), net.parameters())
    same(state_tensors(opt), state_tensors(plain), "state")


def test_each_group_keeps_its_rho_when_the_checkpoint_has_none(backend: str, device: str) -> None:
    params = leaves(5, 9, device=device)
    groups = [{"params": params[:1]}, {"params": params[1:], "rho": 0.3, "adaptive": True}]
    opt = FusedSAM(groups, rho=0.02, backend=backend, lr=0.13)
    plain = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.27)
    opt.load_state_dict(plain.state_dict())
    assert [(g["rho"], g["adaptive"], g["lr"]) for g in opt.param_groups] == [
        (0.02, False, 0.27),
        (0.3, True, 0.27),
    ]


@pytest.mark.parametrize(("base", "how"), [("SGD", "deepcopy"), ("AdamW", "pickle")])
def test_a_copy_continues_bit_for_bit_and_on_its_own(base: str, how: str, backend: str, device: str) -> None:
    """With all other options: test_promises.py."""
    net, opt, data = trained(base, backend, device, replay_rng=True)
    twin, copied = copy.deepcopy((net, opt)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, opt)))
    assert type(copied) is FusedSAM
    assert (copied.backend, copied.perturbed) == (backend, False)
    assert copied.replay_rng is True
    start = snapshot(net.parameters())
    for batch in data:
        copied.step(closure_for(twin, batch))
    assert snapshot(net.parameters()) == start
    for batch in data:
        opt.step(closure_for(net, batch))
    assert_same_bits(twin.parameters(), snapshot(net.parameters()))
    assert_same_bits(state_tensors(copied), state_tensors(opt), "state")


def test_a_copy_can_be_made_with_a_scheduler_attached(backend: str, device: str) -> None:
    params = leaves(9, device=device)
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    opt.step(quadratic(params))
    schedule.step()
    copied = copy.deepcopy(opt)
    assert copied.param_groups[0]["lr"] == HYPER["lr"] / 2
    twins = copied.param_groups[0]["params"]
    opt.step(quadratic(params))
    copied.step(quadratic(twins))
    assert_same_bits(twins, params)


REFUSED_WHILE_PERTURBED: list[Callable[[FusedSAM], Any]] = [
    lambda opt: opt.state_dict(),
    lambda opt: opt.load_state_dict({"state": {}, "param_groups": []}),
    copy.deepcopy,
    pickle.dumps,
]


def test_nothing_is_saved_or_loaded_while_perturbed(backend: str, device: str) -> None:
    net, opt, data = trained("SGD", backend, device)
    w = snapshot(net.parameters())
    opt.zero_grad()
    closure_for(net, data[0])()
    opt.first_step(zero_grad=True)
    for act in REFUSED_WHILE_PERTURBED:
        with pytest.raises(RuntimeError, match="perturbed"):
            act(opt)
    opt.restore()
    assert_same_bits(net.parameters(), w)
    opt.state_dict()


def test_a_checkpoint_of_other_groups_is_refused(backend: str, device: str) -> None:
    _, opt, _ = trained("SGD", backend, device)
    before = snapshot(state_tensors(opt))
    with pytest.raises(ValueError, match="group"):
        opt.load_state_dict(FusedSAM(leaves(3), backend=backend).state_dict())
    assert snapshot(state_tensors(opt)) == before


MALFORMED: dict[str, Callable[[Tensor], Any]] = {
    "short": lambda m: m[:-1].clone(),
    "long": lambda m: torch.cat([m, m[:1]]),
    "empty": lambda m: m[:0].clone(),
    "another dtype": lambda m: m.double(),
    "integer": lambda m: m.int(),
    "complex": lambda m: m.to(torch.complex64),
    "sparse": lambda m: m.to_sparse(),
    "another device": lambda m: m.to("meta"),
    "overlapping itself": lambda m: m[:1].expand_as(m),
    "list": lambda m: m.tolist(),
    "number": lambda m: 1.0,
    "gone": lambda m: None,
}


# The base whose step reads each key.
KEYS = {"momentum_buffer": "SGD", "exp_avg": "Adam", "exp_avg_sq": "Adam", "max_exp_avg_sq": "AdamW"}
# torch makes one that is None anew, and goes on with one of another dtype.
SPOILT = [("momentum_buffer", kind) for kind in MALFORMED if kind not in ("gone", "another dtype")]
SPOILT += [(key, kind) for key in KEYS for kind in ("short", "another dtype", "sparse", "list", "gone") if "avg" in key]
SPOILT.append(("exp_avg", "overlapping itself"))


@pytest.mark.parametrize(("key", "kind"), SPOILT)
def test_malformed_state_is_refused_at_the_step(key: str, kind: str, backend: str, device: str) -> None:
    """State can be edited in place at any time, and the kernels take raw pointers."""
    params = leaves(67, 130, device=device)
    base_class, options = BASES[KEYS[key]]
    opt = FusedSAM(params, base_class, rho=RHO, backend=backend, **options)
    opt.step(quadratic(params))
    good = opt.state[params[1]][key]
    others = snapshot(v for v in opt.state[params[0]].values() if isinstance(v, Tensor))
    opt.state[params[1]][key] = MALFORMED[kind](good)
    w = snapshot(params)
    with pytest.raises((TypeError, ValueError)):
        opt.step(quadratic(params))
    assert not opt.perturbed
    assert_same_bits(params, w)
    opt.zero_grad()
    quadratic(params)()
    opt.first_step(zero_grad=True)
    quadratic(params)()
    with pytest.raises((TypeError, ValueError)):
        opt.step()
    assert not opt.perturbed
    assert_same_bits(params, w)
    assert snapshot(v for v in opt.state[params[0]].values() if isinstance(v, Tensor)) == others
    opt.state[params[1]][key] = good
    opt.step(quadratic(params))


def test_a_strided_momentum_buffer_is_used_right(backend: str, device: str) -> None:
    """As a checkpoint edited by hand may hold: same shape, other strides."""
    params, twins = leaves(67, device=device), None
    opt = FusedSAM(params, rho=RHO, backend=backend, **HYPER)
    opt.step(quadratic(params))
    copied = copy.deepcopy(opt)
    twins = copied.param_groups[0]["params"]
    wide = torch.full((67, 3), 42.0, device=device)
    wide[:, 1] = opt.state[params[0]]["momentum_buffer"]
    opt.state[params[0]]["momentum_buffer"] = wide[:, 1]
    for _ in range(2):
        opt.step(quadratic(params))
        copied.step(quadratic(twins))
    assert_same_bits(params, twins)
    assert bool((wide[:, [0, 2]] == 42).all())
    assert_same_bits([wide[:, 1]], [copied.state[twins[0]]["momentum_buffer"]], "momentum")
