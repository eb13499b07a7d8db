"""What every step looks up for its parameters: the same answers from C++ and from Python."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fused_sam.ops import lists as package_lists


def in_python(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where the native core does not load."""
    monkeypatch.setitem(sys.modules, "fused_sam._native", None)
    spec = importlib.util.find_spec("fused_sam.ops.lists")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["through ATen", "through DLPack", "in Python"])
def lists(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if request.param == "in Python":
        yield in_python(monkeypatch)
        return
    native = pytest.importorskip("fused_sam._native", reason="the native core is not built")
    assert package_lists.clear_grads is native.clear_grads
    if request.param == "through DLPack":
        native.read_through(None)
    elif package_lists.why_not_aten is not None:
        pytest.skip(package_lists.why_not_aten)
    yield package_lists
    package_lists.read_through_aten()


def some_params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(n)) for n in (3, 1, 0, 5, 2, 7)]


def test_gradients_are_read_and_cleared(lists: ModuleType) -> None:
    params = some_params()
    assert list(lists.Gradients(params)) == [None] * len(params)
    gradients = [torch.full_like(p, 0.5) for p in params]
    for p, g in list(zip(params, gradients, strict=True))[::2]:
        p.grad = g
    found = lists.Gradients(params)
    assert lists.is_list(found)
    assert len(found) == len(params)
    assert [x is not None for x in lists.presence(found)] == [True, False] * 3
    assert not lists.all_present(found)
    assert (lists.first_present(found), lists.first_present([None, 3]), lists.first_present([None])) == (0, 1, None)
    assert all(f is (None if i % 2 else gradients[i]) for i, f in enumerate(found))
    lists.clear_grads(params)
    assert all(p.grad is None for p in params)
    assert found[-2] is gradients[4]  # they are those of the moment at which they were asked for
    found[4] = None
    assert found[4] is None
    assert lists.all_present(lists.Gradients([]))
    with pytest.raises(IndexError):
        found[6]


def test_a_write_is_told_to_autograd(lists: ModuleType) -> None:
    params = some_params()
    before = [p._version for p in params]
    lists.increment_version(params[:4])
    assert [p._version - b for p, b in zip(params, before, strict=True)] == [1] * 4 + [0] * 2


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [1, 2, 4], [4, 0], []], ids=str)
@pytest.mark.parametrize("foreign", [False, True])
def test_state_is_found_whatever_its_order(lists: ModuleType, order: list[int], foreign: bool) -> None:
    params = some_params()
    state: dict[Any, Any] = defaultdict(dict)
    for i in order:
        if foreign:  # of a parameter that is not asked for
            state[nn.Parameter(torch.ones(1))] = {"x": "foreign"}
        state[params[i]] = {"x": i, "y": 7 * i} if i != 3 else {"y": 21}
    assert lists.lookup(state, params, "x") == [i if i in order and i != 3 else None for i in range(len(params))]
    assert lists.lookup(state, params, "y") == [7 * i if i in order else None for i in range(len(params))]
    assert len(state) == len(order) * (1 + foreign)  # nothing has been entered


def test_a_parameter_may_be_asked_for_twice(lists: ModuleType) -> None:
    params = some_params()
    state = {p: {"x": i} for i, p in enumerate(params)}
    again = [params[1], params[0], params[0], params[5], params[1]]
    assert lists.lookup(state, again, "x") == [1, 0, 0, 5, 1]


def test_presence_compares_no_tensors(lists: ModuleType) -> None:
    tensors: list[Any] = [torch.ones(2), torch.zeros(0), torch.ones(3, 3)]
    assert lists.all_present(tensors)
    assert lists.all_present([])
    for i in range(len(tensors) + 1):
        assert not lists.all_present([*tensors[:i], None, *tensors[i:]])
