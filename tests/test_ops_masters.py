"""Ops on fp32 masters of 16-bit parameters: what they do to fp32 tensors, rounded once into the parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import (
    ADAM_CONFIGS,
    FEW_SIZES,
    NORM_RTOL,
    RHO,
    SGD_CONFIGS,
    SIXTEEN_BIT,
    Carved,
    adam_groups,
    assert_same_bits,
    ids,
    sgd_groups,
    snapshot,
    strided_pairs,
)
from torch import Tensor

from fused_sam import backends, ops
from fused_sam.ops import AscentGroup, InvalidTensor

every_dtype = pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=ids)
# Of gradients: that of the parameters, or fp32.
every_width = pytest.mark.parametrize("wide", [False, True], ids=["16-bit grad", "fp32 grad"])


class Problem:
    """Misaligned 16-bit parameters with masters, and the same in fp32 with nothing behind it."""

    def __init__(self, dtype: torch.dtype, wide: bool, device: str, states: int = 1) -> None:
        self.carved = [Carved(FEW_SIZES, dtype, device)]
        self.carved.append(Carved(FEW_SIZES, torch.float32 if wide else dtype, device))
        self.carved += [Carved(FEW_SIZES, torch.float32, device) for _ in range(1 + states)]
        self.params, self.grads, self.masters, *self.states = (c.tensors for c in self.carved)
        for p, g, m, *states_ in zip(self.params, self.grads, self.masters, *self.states, strict=True):
            m.copy_(torch.randn(m.shape))
            p.copy_(m)
            g.copy_(torch.randn(g.shape))
            for x in states_:
                x.copy_(torch.rand(x.shape) + 0.01)
        self.weights = [m.clone() for m in self.masters]
        self.wide_grads = [g.to(torch.float32, copy=True) for g in self.grads]
        self.wide_states = [[x.clone() for x in xs] for xs in self.states]
        self.nothing: list[Tensor | None] = [None] * len(self.params)

    def check(self) -> None:
        """Masters and state as the fp32 tensors, and the parameters those rounded."""
        assert_same_bits(self.masters, self.weights, "master")
        self.check_params(self.weights)
        for ours, theirs in zip(self.states, self.wide_states, strict=True):
            assert_same_bits(ours, theirs, "state")

    def check_params(self, weights: list[Tensor]) -> None:
        assert_same_bits(self.params, [w.to(self.params[0].dtype) for w in weights], "param")
        for carved in self.carved:
            carved.check()

    def ascend(self, groups: list[AscentGroup], p: float, backend: str, twin: str) -> tuple[ops.Journal, ops.Journal]:
        """Both to w + e, with the norm of the fp32 tensors. The journals that lead back."""
        norm = ops.norm(self.weights, self.wide_grads, groups, twin, p)
        ours = ops.norm(self.params, self.grads, groups, backend, p, self.masters)
        assert (norm is None) == (ours is None)
        if norm is not None:
            torch.testing.assert_close(ours, norm, rtol=NORM_RTOL[torch.float32], atol=0)
        journals: tuple[ops.Journal, ops.Journal] = ([], [])
        backups = [torch.empty_like(w) for w in self.weights]
        ops.perturb(self.weights, self.wide_grads, backups, norm, groups, twin, journals[1], p)
        ops.perturb(self.params, self.grads, self.nothing, norm, groups, backend, journals[0], p, self.masters)
        return journals


@pytest.fixture
def twin(backend: str, device: str) -> str:
    """The backend that works on the masters of this one, for the fp32 tensors beside it."""
    return backend if backends.for_device(device, backend).TAKES_MASTERS else "eager"


def groups_of(adaptive: bool, decay: float) -> list[AscentGroup]:
    """The first two tensors do not move."""
    return [AscentGroup(2, 0.0, True), AscentGroup(5, RHO, adaptive, 0.03, decay), AscentGroup(1, 0.3, adaptive, 0.03)]


@every_dtype
@every_width
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf], ids=str)
@pytest.mark.parametrize(("adaptive", "decay"), [(False, 0.0), (True, 0.0), (True, 0.37)], ids=str)
def test_w_plus_e_is_rounded_into_the_parameter_and_the_master_stays(
    dtype: torch.dtype, wide: bool, p: float, adaptive: bool, decay: float, backend: str, device: str, twin: str
) -> None:
    problem = Problem(dtype, wide, device)
    masters, params = snapshot(problem.masters), snapshot(problem.params)
    journals = problem.ascend(groups_of(adaptive, decay), p, backend, twin)
    problem.check_params(problem.weights)
    assert snapshot(problem.params) != params
    assert snapshot(problem.masters) == masters
    versions = [x._version for x in problem.params]
    ops.roll_back(journals[0])
    assert snapshot(problem.params) == params
    assert snapshot(problem.masters) == masters
    assert all(x._version > before for x, before in zip(problem.params, versions, strict=True) if x.numel())


@every_dtype
@every_width
@pytest.mark.parametrize(
    ("config", "perturbed"), [*((config, True) for config in SGD_CONFIGS), ("nesterov-decay", False)]
)
def test_sgd(
    dtype: torch.dtype, wide: bool, config: str, perturbed: bool, backend: str, device: str, twin: str
) -> None:
    problem = Problem(dtype, wide, device)
    journals: tuple[ops.Journal, ops.Journal] = ([], [])
    if perturbed:
        journals = problem.ascend(groups_of(False, 0.0), 2.0, backend, twin)
    count = len(problem.params)
    groups = sgd_groups(count, **SGD_CONFIGS[config])
    scale = torch.tensor(0.125, device=device)  # of which no fp16 gradient becomes subnormal
    for journal, params, grads, state, masters, by in (
        (journals[0], problem.params, problem.grads, problem.states[0], problem.masters, backend),
        (journals[1], problem.weights, problem.wide_grads, problem.wide_states[0], None, twin),
    ):
        backups = ops.joint_backup(journal, count)
        ops.sgd_update(params, grads, backups, state, groups, scale, None, by, journal, masters)
        assert journal == []
    problem.check()
    assert_same_bits(problem.grads, [g.to(problem.grads[0].dtype) for g in problem.wide_grads], "unscaled gradient")


@every_dtype
@every_width
@pytest.mark.parametrize("config", ADAM_CONFIGS)
def test_adam(dtype: torch.dtype, wide: bool, config: str, backend: str, device: str, twin: str) -> None:
    problem = Problem(dtype, wide, device, states=3)
    journals = problem.ascend(groups_of(True, 0.0), 2.0, backend, twin)
    count = len(problem.params)
    groups = adam_groups(count, **ADAM_CONFIGS[config])
    for journal, params, grads, states, masters, by in (
        (journals[0], problem.params, problem.grads, problem.states, problem.masters, backend),
        (journals[1], problem.weights, problem.wide_grads, problem.wide_states, None, twin),
    ):
        steps = [torch.tensor(6.0) for _ in params]
        lists = params, grads, ops.joint_backup(journal, count), *states, steps
        ops.adam_update(*lists, groups, backend=by, journal=journal, masters=masters)
        assert [float(t) for t in steps] == [7.0] * count
    problem.check()


@every_dtype
def test_found_inf_only_restores(dtype: torch.dtype, backend: str, device: str, twin: str) -> None:
    problem = Problem(dtype, False, device)
    before = [snapshot(x) for x in (problem.params, problem.masters, problem.states[0])]
    journal, _ = problem.ascend(groups_of(False, 0.0), 2.0, backend, twin)
    count = len(problem.params)
    inf = torch.tensor(1.0, device=device)
    groups = sgd_groups(count, **SGD_CONFIGS["momentum"])
    backups = ops.joint_backup(journal, count)
    lists = problem.params, problem.grads, backups, problem.states[0]
    ops.sgd_update(*lists, groups, None, inf, backend, journal, problem.masters)
    assert [snapshot(x) for x in (problem.params, problem.masters, problem.states[0])] == before


def test_missing_gradients_and_parameters_without_masters(backend: str, device: str) -> None:
    """One list of 16-bit, fp32 and fp64 parameters; one with a gradient in each pass only, one in neither."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bfloat16]
    params = [torch.randn(67).to(device, t) for t in dtypes]
    masters = [p.float() + 1e-6 if p.dtype in SIXTEEN_BIT else None for p in params]
    old, old_masters = snapshot(params), snapshot(m for m in masters if m is not None)
    first: list[Tensor | None] = [torch.randn_like(p) for p in params]
    second: list[Tensor | None] = [torch.randn_like(p) for p in params]
    first[2] = first[5] = second[3] = second[5] = None
    journal: ops.Journal = []
    groups = [AscentGroup(6, RHO, False)]
    ascent = ops.Ascent(params, first, groups, backend, masters=masters)
    ascent.perturb(ascent.norm(), journal)
    assert [a == b for a, b in zip(snapshot(params), old, strict=True)] == [False, False, True, False, False, True]
    backups = ops.joint_backup(journal, 6)
    lists = params, second, backups, [None] * 6
    ops.sgd_update(*lists, sgd_groups(6, lr=0.13), None, None, backend, journal, masters)
    assert [a == b for a, b in zip(snapshot(params), old, strict=True)] == [False, False, False, True, False, True]
    moved = [a != b for a, b in zip(snapshot(m for m in masters if m is not None), old_masters, strict=True)]
    assert moved == [True, True, False, False]


@every_dtype
def test_strided_parameters(dtype: torch.dtype, backend: str, device: str, twin: str) -> None:
    """Their masters are dense; both are worked on as contiguous copies."""
    for name, p, g in strided_pairs(dtype, device):
        master, strides = p.float() + 1e-6, p.stride()
        p.copy_(master)
        weight, before = master.clone(), p.clone()
        groups, config = [AscentGroup(1, RHO, True, 0.03)], sgd_groups(1, lr=0.13, momentum=0.87)
        norm = ops.norm([p], [g], groups, backend, masters=[master])
        assert float(norm) == pytest.approx(float(ops.norm([weight], [g.float()], groups, twin)), rel=1e-12), name
        journal: ops.Journal = []
        ops.Ascent([p], [g], groups, backend, masters=[master]).perturb(norm, journal)
        ops.perturb([weight], [g.float()], [torch.empty_like(weight)], norm, groups, twin)
        assert_same_bits([p], [weight.to(dtype)], name)
        ops.roll_back(journal)
        assert_same_bits([p], [before], name)
        weight, momentum = master.clone(), torch.randn_like(master)
        wide_momentum = momentum.clone()
        ops.sgd_update([weight], [g.float()], None, [wide_momentum], config, backend=twin)
        ops.sgd_update([p], [g], None, [momentum], config, backend=backend, masters=[master])
        assert_same_bits([master, momentum, p], [weight, wide_momentum, weight.to(dtype)], name)
        assert p.stride() == strides, name


def tensors(**changed: Any) -> dict[str, Any]:
    p, g = torch.ones(9, dtype=torch.bfloat16), torch.ones(9, dtype=torch.bfloat16)
    return {"p": p, "g": g, "master": torch.ones(9), "momentum": torch.ones(9), "backup": None, **changed}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"master": torch.ones(8)}, "shape"),
        ({"master": torch.ones(9, dtype=torch.float64)}, "dtype torch.float64 of the master"),
        ({"master": torch.ones(9, dtype=torch.bfloat16)}, "dtype torch.bfloat16 of the master"),
        ({"p": torch.ones(9), "g": torch.ones(9)}, "a master is of a 16-bit parameter"),
        ({"g": torch.ones(9, dtype=torch.float16)}, "dtype torch.float16 does not match"),
        ({"momentum": torch.ones(9, dtype=torch.bfloat16)}, "dtype torch.bfloat16 does not match"),
        ({"backup": torch.ones(9, dtype=torch.bfloat16)}, "and its backup"),
    ],
    ids=["shape", "fp64", "bf16", "of fp32", "gradient", "momentum", "backup"],
)
def test_what_does_not_match_is_refused(changed: dict[str, Any], sentence: str, backend: str, device: str) -> None:
    t = {k: None if x is None else x.to(device) for k, x in tensors(**changed).items()}
    before = snapshot(x for x in t.values() if x is not None)
    with pytest.raises(InvalidTensor, match=sentence):
        ops.sgd_update(
            [t["p"]],
            [t["g"]],
            [t["backup"]],
            [t["momentum"]],
            sgd_groups(1, lr=0.13, momentum=0.87),
            backend=backend,
            masters=[t["master"]],
        )
    assert snapshot(x for x in t.values() if x is not None) == before


def test_a_master_on_the_memory_of_another_is_refused(backend: str, device: str) -> None:
    params = [torch.ones(9, dtype=torch.bfloat16, device=device) for _ in range(2)]
    masters = [torch.ones(9, device=device)] * 2
    with pytest.raises(ValueError, match="overlap"):
        ops.sgd_update(
            params, [p.clone() for p in params], None, None, sgd_groups(2, lr=0.1), masters=masters, backend=backend
        )


def test_a_master_replaced_between_the_passes_is_refused(device: str) -> None:
    p, g, master = torch.ones(9, dtype=torch.bfloat16), torch.ones(9, dtype=torch.bfloat16), torch.ones(9)
    journal: ops.Journal = []
    ascent = ops.Ascent([p], [g], [AscentGroup(1, RHO, False)], "native", masters=[master])
    ascent.perturb(ascent.norm(), journal)
    lists = [p], [g], journal[0], None, sgd_groups(1, lr=0.1)
    for replaced in (master.clone(), None):
        with pytest.raises(ValueError, match="while perturbed"):
            ops.sgd_update(*lists, journal=journal, backend="native", masters=[replaced])
    ops.roll_back(journal)
    assert_same_bits([p], [torch.ones_like(p)])
