"""adam_update in every configuration of torch.optim.Adam and AdamW, against the documented formula."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from closed_forms import Array, assert_within_ulp, exact, exact_adam
from emulated_tests import NATIVE
from helpers import (
    ADAM_CONFIGS,
    ADAM_ULP,
    AVERAGE_ULP,
    DTYPES,
    FEW_SIZES,
    SIXTEEN_BIT,
    SIZES,
    AdamLists,
    adam_groups,
    assert_same_bits,
    bits,
    ids,
    scalar,
    snapshot,
    strided_pairs,
)
from torch import Tensor

from fused_sam import backends, ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@pytest.fixture(autouse=True)
def _two_threads(_reproducible: None) -> None:
    torch.set_num_threads(2)


def operands_of(lists: AdamLists) -> list[list[Array]]:
    """w, g and state of each tensor."""
    return [[exact(x) for x in xs] for xs in zip(lists.backups, lists.grads, *lists.states, strict=True)]


def assert_follows(
    w: Tensor, states: list[Tensor], old: list[Any], t: int, first: bool, config: dict[str, Any], what: str = ""
) -> None:
    """The formula, of w, g and state as they were."""
    w_old, g, *state = old
    expected, sizes = exact_adam(w_old, g, None if first else tuple(state), t, **config)
    assert_within_ulp(w, expected[0], sizes[0], ADAM_ULP, f"w {what}")
    for name, x, e, size in zip(STATES[: 3 if config.get("amsgrad") else 2], states, expected[1:], sizes[1:]):
        assert_within_ulp(x, e, size, AVERAGE_ULP, f"{name} {what}")


@every_dtype
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("name", ADAM_CONFIGS)
def test_adam_update_matches_the_closed_form(
    dtype: torch.dtype, first: bool, name: str, backend: str, device: str
) -> None:
    config = ADAM_CONFIGS[name]
    every_size = (name, first) in (("all-decoupled", True), ("all", False))
    lists = AdamLists(SIZES if every_size else FEW_SIZES, dtype, device, 0.0 if first else 6.0)
    old = operands_of(lists)
    for w in lists.params:
        w.fill_(math.nan)  # only the backup may be read
    if first:
        for x in itertools.chain(*lists.states):
            x.fill_(math.nan)  # uninitialised memory: written, never read
    grads, unused = snapshot(lists.grads), snapshot(lists.states[2])
    lists.update(adam_groups(len(old), first=first, **config), backend=backend)
    for w, *states, before in zip(lists.params, *lists.states, old, strict=True):
        assert_follows(w, states, before, 1 if first else 7, first, config)
    assert_same_bits(lists.grads, grads, "gradient")
    if not config.get("amsgrad"):
        assert_same_bits(lists.states[2], unused, "max_exp_avg_sq")
    assert {float(t) for t in lists.steps} == {1.0 if first else 7.0}
    lists.check_neighbours()


@every_dtype
@pytest.mark.parametrize("config", ADAM_CONFIGS.values(), ids=ADAM_CONFIGS.keys())
def test_the_backends_that_share_their_arithmetic_give_the_same_bits(
    dtype: torch.dtype, config: dict[str, Any]
) -> None:
    if backends.available()["native"] != "ok":
        pytest.skip("the native core is not built")
    sizes, results = [*FEW_SIZES, *(k % 5 for k in range(60))], []
    for backend, capturable in itertools.product(NATIVE, (False, True)):
        torch.manual_seed(0)
        lists = AdamLists(sizes, dtype, "cpu")
        lists.update(adam_groups(len(sizes), **config), backend=backend, capturable=capturable)
        results.append([snapshot(x) for x in (lists.params, *lists.states, lists.steps)])
    # The host's and the kernel's own root of 1 - beta2^t may differ in their last bit of fp64.
    for result in results[:: 2 if dtype == torch.float64 else 1]:
        assert result == results[0]


@every_dtype
@pytest.mark.parametrize("skip", [False, True], ids=["step", "overflow"])
def test_steps_read_by_the_kernel(dtype: torch.dtype, skip: bool, backend: str, device: str) -> None:
    """Different for every tensor, and advanced unless a GradScaler skips."""
    lists = AdamLists(FEW_SIZES, dtype, device)
    lists.steps = [torch.tensor(float(k), device=device) for k in range(len(FEW_SIZES))]
    old = operands_of(lists)
    kept = [snapshot(x) for x in (lists.backups, *lists.states)]
    found = torch.tensor(float(skip), device=device)
    config = ADAM_CONFIGS["all"]
    lists.update(adam_groups(len(old), **config), backend=backend, capturable=True, found_inf=found)
    assert [float(t) for t in lists.steps] == [k + 1 - skip for k in range(len(old))]
    if skip:
        assert [snapshot(x) for x in (lists.params, *lists.states)] == kept
        return
    for k, (w, *states, before) in enumerate(zip(lists.params, *lists.states, old, strict=True)):
        assert_follows(w, states, before, k + 1, False, config)


def test_each_group_and_each_step_has_its_own_numbers(backend: str, device: str) -> None:
    names = [name for name in ADAM_CONFIGS for _ in range(4)]
    lists = AdamLists([67] * len(names), torch.float64, device)
    lists.steps = [torch.tensor(float(k % 3 + k // 7)) for k in range(len(names))]
    before = [float(t) for t in lists.steps]
    old = operands_of(lists)
    lists.grads[5] = None
    groups = [adam_groups(4, first=i % 3 == 0, **config)[0] for i, config in enumerate(ADAM_CONFIGS.values())]
    lists.update(groups, backend=backend)
    for i, (name, w, *states, values) in enumerate(zip(names, lists.params, *lists.states, old, strict=True)):
        if i == 5:
            assert bits(w) == bits(lists.backups[i])
            assert [exact(x).tolist() for x in states] == [x.tolist() for x in values[2:]]
        else:
            assert_follows(w, states, values, int(before[i]) + 1, i // 4 % 3 == 0, ADAM_CONFIGS[name], name)
    assert [float(t) for t in lists.steps] == [t + (i != 5) for i, t in enumerate(before)]


@every_dtype
def test_without_backup_the_step_starts_from_the_parameter(dtype: torch.dtype, backend: str, device: str) -> None:
    with_backup, without = (AdamLists(SIZES, dtype, device) for _ in range(2))
    without.copy_(with_backup)
    for w, backup in zip(with_backup.params, with_backup.backups, strict=True):
        backup.copy_(w)
        w.fill_(math.nan)
    groups = adam_groups(len(SIZES), **ADAM_CONFIGS["all-decoupled"])
    with_backup.update(groups, backend=backend)
    without.update(groups, backups=False, backend=backend)
    assert_same_bits(without.params, with_backup.params, "param")
    for mine, other in zip(without.states, with_backup.states, strict=True):
        assert_same_bits(mine, other, "state")
    without.check_neighbours()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_strided_tensors(dtype: torch.dtype, backend: str, device: str) -> None:
    config = ADAM_CONFIGS["all"]
    for name, w, g in strided_pairs(dtype, device):
        backup, m, v, u = torch.randn_like(w), torch.randn_like(w), torch.rand_like(w), torch.rand_like(w)
        old, grad_bits, strides = [exact(x) for x in (backup, g, m, v, u)], bits(g), w.stride()
        step = [torch.tensor(6.0)]
        ops.adam_update([w], [g], [backup], [m], [v], [u], step, adam_groups(1, **config), backend=backend)
        assert_follows(w, [m, v, u], old, 7, False, config, name)
        assert (bits(g), w.stride(), float(step[0])) == (grad_bits, strides, 7.0), name


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=ids)
@pytest.mark.parametrize("wide", ["param", "grad"])
def test_gradients_of_another_precision(dtype: torch.dtype, wide: str, backend: str, device: str) -> None:
    config = ADAM_CONFIGS["all"]
    lists = AdamLists(FEW_SIZES, dtype if wide == "grad" else torch.float32, device)
    lists.grads = [g.to(torch.float32 if wide == "grad" else dtype) for g in lists.grads]
    old = operands_of(lists)
    grads = snapshot(lists.grads)
    lists.update(adam_groups(len(old), **config), backend=backend)
    for w, *states, before in zip(lists.params, *lists.states, old, strict=True):
        assert_follows(w, states, before, 7, False, config)
    assert_same_bits(lists.grads, grads, "gradient")


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=ids)
def test_a_learning_rate_on_the_device(kind: torch.dtype, backend: str, device: str) -> None:
    lr, results = torch.tensor(0.013, dtype=kind, device=device), []
    for value in (lr, lr.item()):
        torch.manual_seed(0)
        lists = AdamLists(FEW_SIZES, torch.float32, device)
        old = operands_of(lists)
        config = {**ADAM_CONFIGS["all-decoupled"], "lr": value}
        lists.update(adam_groups(len(FEW_SIZES), **config), backend=backend)
        for w, *states, before in zip(lists.params, *lists.states, old, strict=True):
            assert_follows(w, states, before, 7, False, {**config, "lr": lr.item()})
        results.append([snapshot(x) for x in (lists.params, *lists.states)])
    if backend != "eager":  # which divides a tensor in its own dtype
        assert results[0] == results[1]


def test_nan_in_the_second_moment_is_not_hidden_by_amsgrad(backend: str, device: str) -> None:
    """As torch.maximum: NaN on either side."""
    for dtype, where in itertools.product((torch.float32, torch.float64), (1, 2)):
        lists = AdamLists([67], dtype, device)
        lists.states[where][0][[3, 66]] = math.nan
        lists.update(adam_groups(1, **ADAM_CONFIGS["amsgrad"]), backend=backend)
        expected = torch.zeros(67, dtype=torch.bool, device=device)
        expected[[3, 66]] = True
        assert torch.equal(lists.states[2][0].isnan(), expected)
        assert torch.equal(lists.params[0].isnan(), expected)


SPOILT: dict[str, Any] = {
    "no average": lambda x: x.states[0].__setitem__(1, None),
    "no square": lambda x: x.states[1].__setitem__(1, None),
    "no largest square": lambda x: x.states[2].__setitem__(1, None),
    "no step": lambda x: x.steps.__setitem__(1, None),
    "a number for a step": lambda x: x.steps.__setitem__(1, 6.0),
    "two steps": lambda x: x.steps.__setitem__(1, torch.zeros(2)),
    "an integer step": lambda x: x.steps.__setitem__(1, torch.tensor(6)),
    "another dtype": lambda x: x.states[0].__setitem__(1, x.states[0][1].double()),
    "another shape": lambda x: x.states[1].__setitem__(1, x.states[1][1][1:]),
    "state on state": lambda x: x.states[2].__setitem__(1, x.states[1][1]),
    "state on a parameter": lambda x: x.states[0].__setitem__(1, x.params[0]),
    "a short list": lambda x: x.steps.pop(),
    "a short list of state": lambda x: x.states[2].pop(),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_state_that_does_not_fit_is_refused_and_nothing_changes(spoil: Any, backend: str, device: str) -> None:
    for capturable in (False, True):
        lists = AdamLists([67, 67], torch.float32, device)
        if capturable:
            lists.steps = [t.to(device) for t in lists.steps]
        kept = [c.buffer.clone() for c in lists.carved]
        first_step = lists.steps[0]
        spoil(lists)
        with pytest.raises(ValueError, match="Invalid") as refusal:
            lists.update(adam_groups(2, **ADAM_CONFIGS["all"]), backend=backend, capturable=capturable)
        assert "\n" not in str(refusal.value)
        assert_same_bits([c.buffer for c in lists.carved], kept)
        assert float(first_step) == 6.0


def test_capturable_steps_must_be_float32_beside_the_parameters(backend: str, device: str) -> None:
    lists = AdamLists([3], torch.float32, device)
    lists.steps = [scalar(6.0, device)]
    with pytest.raises(ValueError, match=r"Invalid steps.*float32"):
        lists.update(adam_groups(1, lr=0.1), backend=backend, capturable=True)
