"""Arguments the op surface must refuse: it stands between user data and kernels over raw pointers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HYPER, ascent_groups, assert_same_bits, sgd_groups, snapshot

from fused_sam import ops
from fused_sam.backends.interface import InvalidTensor

Arguments = dict[str, Any]
REFUSED = (TypeError, ValueError)
NO_TENSOR = (*REFUSED, AttributeError)


def arguments(op: str, device: str = "cpu") -> Arguments:
    """A valid call of `op` on two tensors."""

    def tensors() -> list[torch.Tensor]:
        return [torch.randn(6, 4, device=device), torch.randn(9, device=device)]

    norm = torch.tensor(1.7, dtype=torch.float64, device=device)
    common: Arguments = {"params": tensors()}
    if op == "norm":
        return common | {"grads": tensors(), "groups": ascent_groups(2)}
    if op == "perturb":
        return common | {"grads": tensors(), "backups": tensors(), "norm": norm, "groups": ascent_groups(2)}
    if op == "restore":
        return common | {"backups": tensors()}
    lists = {"grads": tensors(), "backups": tensors(), "momentum_buffers": tensors()}
    return common | lists | {"groups": sgd_groups(2, **HYPER)}


OPS = ["norm", "perturb", "restore", "sgd_update"]
LISTS = [(op, key) for op in OPS for key in ("params", "grads", "backups", "momentum_buffers") if key in arguments(op)]


def assert_refused(op: str, kwargs: Arguments, backend: str, errors: tuple[type[Exception], ...] = REFUSED) -> None:
    before = [t.clone() for t in kwargs["params"] if isinstance(t, torch.Tensor) and t.device.type != "meta"]
    with pytest.raises(errors) as refusal:
        getattr(ops, op)(**kwargs, backend=backend)
    assert str(refusal.value)
    after = [t for t in kwargs["params"] if isinstance(t, torch.Tensor) and t.device.type != "meta"]
    assert_same_bits(after, snapshot(before), "param")


@pytest.mark.parametrize("op", OPS)
def test_the_unspoilt_call_is_accepted(op: str, backend: str, device: str) -> None:
    getattr(ops, op)(**arguments(op, device), backend=backend)


@pytest.mark.parametrize(("op", "key"), LISTS)
def test_lists_of_unequal_length_are_refused(op: str, key: str, backend: str, device: str) -> None:
    for spoil in (lambda tensors: tensors[:1], lambda tensors: [*tensors, tensors[0].clone()]):
        kwargs = arguments(op, device)
        kwargs[key] = spoil(kwargs[key])
        assert_refused(op, kwargs, backend)


@pytest.mark.parametrize("op", ["norm", "perturb", "sgd_update"])
@pytest.mark.parametrize("sizes", [[0], [1], [3], [-2], [3, -1]], ids=str)
def test_groups_that_do_not_cover_the_tensors_are_refused(op: str, sizes: list[int], backend: str, device: str) -> None:
    kwargs = arguments(op, device)
    kwargs["groups"] = [kwargs["groups"][0]._replace(size=size) for size in sizes]
    assert_refused(op, kwargs, backend)


SPOILT_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "fp64 among fp32": lambda t: t.double(),
    "bf16 among fp32": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex64": lambda t: t.to(torch.complex64),
    "too short": lambda t: t.reshape(-1)[:-1],
    "too long": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "sparse": lambda t: t.to_sparse(),
    "another device": lambda t: t.to("meta"),
    "numpy array": lambda t: np.zeros(t.shape, dtype=np.float32),
    "list": lambda t: t.tolist(),
}


@pytest.mark.parametrize(("op", "key"), LISTS)
def test_a_tensor_unlike_its_parameter_is_refused(op: str, key: str, backend: str, device: str) -> None:
    for kind, position in itertools.product(SPOILT_TENSORS, (0, 1)):
        kwargs = arguments(op, device)
        spoilt = kwargs[key][position] = SPOILT_TENSORS[kind](kwargs[key][position])
        if kind == "bf16 among fp32" and (key == "grads" or op == "norm"):
            continue  # a gradient may be of another precision: test_mixed_dtypes.py
        if "among" in kind and key == "momentum_buffers":
            continue  # and so may these: there, too
        if not isinstance(spoilt, torch.Tensor):
            assert_refused(op, kwargs, backend, NO_TENSOR)
        elif spoilt.device.type != device:  # a backend may say that it does not support the device
            assert_refused(op, kwargs, backend, (*REFUSED, RuntimeError))
        else:
            assert_refused(op, kwargs, backend)


@pytest.mark.parametrize(("op", "key"), [(op, key) for op, key in LISTS if op != "norm" and key != "grads"])
def test_a_written_tensor_that_overlaps_itself_is_refused(op: str, key: str, backend: str, device: str) -> None:
    """A copy would be updated, which cannot be put back."""
    for position in (0, 1):
        kwargs = arguments(op, device)
        t = kwargs[key][position]
        kwargs[key][position] = t[:1].expand_as(t)
        with pytest.raises(InvalidTensor, match=f"index {position}: the .* overlaps itself in memory"):
            getattr(ops, op)(**kwargs, backend=backend)


@pytest.mark.parametrize("op", OPS)
def test_lists_of_an_unsupported_kind_are_refused(op: str, backend: str, device: str) -> None:
    """Consistent with one another, but nothing the kernels can work on."""
    for kind in ("int32", "complex64", "bool", "sparse"):
        kwargs = arguments(op, device)
        for key in ("params", "grads", "backups", "momentum_buffers"):
            if key in kwargs:
                kwargs[key] = [SPOILT_TENSORS[kind](t) for t in kwargs[key]]
        with pytest.raises(REFUSED):
            getattr(ops, op)(**kwargs, backend=backend)


@pytest.mark.parametrize("op", ["perturb", "restore", "sgd_update"])
def test_overlapping_parameters_are_refused(op: str, backend: str, device: str) -> None:
    """Every write would be seen twice."""
    flat = torch.randn(20, device=device)
    for params in (
        [flat[:9], flat[:9]],
        [flat[:9], flat[8:17]],
        [flat[:1].expand(9), flat[10:19]],
        [flat[:18:2], flat[4:13]],
    ):
        kwargs = arguments(op, device)
        for key in ("grads", "backups", "momentum_buffers"):
            if key in kwargs:
                kwargs[key] = [torch.randn(9, device=device) for _ in range(2)]
        assert_refused(op, kwargs | {"params": params}, backend)


def test_interleaved_columns_do_not_overlap(backend: str, device: str) -> None:
    """Columns of one matrix share a span of memory but no element."""
    base = torch.zeros(9, 2, device=device)
    params = [base[:, 0], base[:, 1]]
    backups = [torch.full((9,), 3.0, device=device), torch.full((9,), 5.0, device=device)]
    ops.restore(params, backups, backend=backend)
    assert base.sum(dim=0).tolist() == [27.0, 45.0]


@pytest.mark.parametrize(
    ("op", "written", "other"),
    [
        ("perturb", "backups", "params"),
        ("sgd_update", "momentum_buffers", "params"),
        ("sgd_update", "momentum_buffers", "backups"),
    ],
)
def test_memory_with_two_roles_is_refused(op: str, written: str, other: str, backend: str, device: str) -> None:
    kwargs = arguments(op, device)
    kwargs[written][1] = kwargs[other][1]
    assert_refused(op, kwargs, backend)


@pytest.mark.parametrize("kind", ["one backup for two", "one gradient and backup for two", "gradients the other way"])
def test_a_backup_that_is_anothers_backup_or_gradient_is_refused(kind: str, backend: str, device: str) -> None:
    """The second parameter would overwrite what is kept of the first."""
    kwargs = arguments("perturb", device)
    params, grads, backups = ([torch.randn(9, device=device) for _ in range(2)] for _ in range(3))
    if kind == "gradients the other way":
        backups = grads[::-1]
    else:
        backups = [backups[0]] * 2
    if kind == "one gradient and backup for two":
        grads = backups
    assert_refused("perturb", kwargs | {"params": params, "grads": grads, "backups": backups}, backend)


@pytest.mark.parametrize(("op", "missing"), [("perturb", "backups"), ("sgd_update", "momentum_buffers")])
def test_what_has_a_gradient_needs_a_backup_and_a_momentum(op: str, missing: str, backend: str, device: str) -> None:
    kwargs = arguments(op, device)
    kwargs[missing][1] = None
    assert_refused(op, kwargs, backend)


@pytest.mark.parametrize("norm", [torch.ones(2, dtype=torch.float64), torch.ones(4), "1.0"], ids=str)
def test_a_norm_that_is_not_a_scalar_is_refused(norm: object, backend: str, device: str) -> None:
    errors = REFUSED if isinstance(norm, torch.Tensor) else NO_TENSOR
    assert_refused("perturb", arguments("perturb", device) | {"norm": norm}, backend, errors)


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_backend_is_refused_by_name(op: str) -> None:
    kwargs = arguments(op)
    before = snapshot(kwargs["params"])
    with pytest.raises((ValueError, RuntimeError), match="abacus"):
        getattr(ops, op)(**kwargs, backend="abacus")
    assert_same_bits(kwargs["params"], before)


@pytest.mark.parametrize(("op", "key"), [(op, key) for op, key in LISTS if key != "params"])
def test_a_tensor_whose_memory_was_freed_is_refused(op: str, key: str, backend: str, device: str) -> None:
    kwargs = arguments(op, device)
    kwargs[key][1].untyped_storage().resize_(0)
    assert_refused(op, kwargs, backend)


@pytest.mark.parametrize(("op", "key"), LISTS)
def test_a_tuple_is_no_list_of_tensors(op: str, key: str, backend: str, device: str) -> None:
    kwargs = arguments(op, device)
    kwargs[key] = tuple(kwargs[key])
    assert_refused(op, kwargs, backend)
