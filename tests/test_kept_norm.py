"""MSAM's norm: that of the momentum an update leaves, from the update itself, and when it must be taken anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ADAM_CONFIGS,
    DTYPES,
    FEW_SIZES,
    HYPER,
    LARGE,
    SGD_CONFIGS,
    SIXTEEN_BIT,
    AdamLists,
    Lists,
    adam_groups,
    ascent_groups,
    assert_same_bits,
    bits,
    ids,
    leaves,
    quadratic,
    set_grads,
    sgd_groups,
    snapshot,
)
from torch import Tensor

from fused_sam import FusedSAM, ops
from fused_sam.kept_norm import KeptNorm

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
SIZES = [*FEW_SIZES, 255, 257, 40_000]


def measured(groups: list[Any]) -> list[Any]:
    return [group._replace(measured=True) for group in groups]


def norm_of(params: list[Tensor], momenta: list[Any], backend: str) -> Tensor:
    return ops.norm(params, momenta, ascent_groups(len(params)), backend)


# The op


@every_dtype
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("config", ["momentum-decay", "maximize-nesterov"])
def test_sgd_measures_the_momentum_that_it_writes(
    dtype: torch.dtype, first: bool, config: str, backend: str, device: str
) -> None:
    lists, plain = (Lists(SIZES, dtype, device) for _ in range(2))
    for one, other in zip(lists.carved, plain.carved, strict=True):
        other.buffer.copy_(one.buffer)
    groups = sgd_groups(len(SIZES), first=first, **SGD_CONFIGS[config])
    torch.set_num_threads(2)
    norm: Any = ops.sgd_update(
        lists.params, lists.grads, lists.backups, lists.momentum, measured(groups), backend=backend
    )
    torch.set_num_threads(1)
    ops.sgd_update(plain.params, plain.grads, plain.backups, plain.momentum, groups, backend=backend)
    for ours, theirs in zip(lists.carved, plain.carved, strict=True):
        assert bits(ours.buffer) == bits(theirs.buffer)
    assert_same_bits([norm], [norm_of(lists.params, lists.momentum, backend)], "norm")
    assert norm.device.type == device


@every_dtype
@pytest.mark.parametrize("config", ["decay", "all-decoupled"])
def test_adam_measures_its_averages(dtype: torch.dtype, config: str, backend: str, device: str) -> None:
    torch.manual_seed(5)
    lists = AdamLists(SIZES, dtype, device)
    torch.manual_seed(5)
    plain = AdamLists(SIZES, dtype, device)
    groups = adam_groups(len(SIZES), **ADAM_CONFIGS[config])
    everything = lists.params, lists.grads, lists.backups, *lists.states, lists.steps
    norm: Any = ops.adam_update(*everything, measured(groups), backend=backend)
    plain.update(groups, backend=backend)
    assert_same_bits(lists.params, plain.params, "param")
    for ours, theirs in zip(lists.states, plain.states, strict=True):
        assert_same_bits(ours, theirs, "state")
    assert_same_bits([norm], [norm_of(lists.params, lists.states[0], backend)], "norm")


@pytest.mark.parametrize("scale", [None, 8.0])
def test_only_momenta_that_count_are_measured(scale: float | None, backend: str, device: str) -> None:
    """Groups that are not measured, parameters without a gradient or momentum, dtypes and gradients that mix."""
    if backend == "eager":
        pytest.skip("without all gradients an update is a call of its own for those that have one")
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float32]
    params = [torch.randn(n).to(device, t) for n, t in zip([40_000, 300, 67, 0, 5000, 17_000, 9], dtypes)]
    grads: list[Any] = [torch.randn_like(p) for p in params]
    grads[1] = grads[1].float()
    grads[6] = grads[6].bfloat16()
    grads[2] = None
    momenta = [torch.randn_like(p) for p in params]
    groups = sgd_groups(2, **HYPER) + sgd_groups(2, **HYPER) + sgd_groups(1, lr=0.1) + sgd_groups(2, **HYPER)
    groups = [group._replace(measured=i in (1, 3)) for i, group in enumerate(groups)]
    scalar = None if scale is None else torch.tensor(scale, device=device)
    norm: Any = ops.sgd_update(params, grads, None, momenta, groups, scalar, backend=backend)
    counted = [None, None, None, momenta[3], None, *momenta[5:]]
    assert_same_bits([norm], [norm_of(params, counted, backend)])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=ids)
def test_with_masters_the_momentum_is_fp32(dtype: torch.dtype, backend: str, device: str) -> None:
    params = [torch.randn(n).to(device, dtype) for n in (40_000, 9, 300)]
    masters, momenta = [p.float() for p in params], [torch.randn(p.shape, device=device) for p in params]
    groups = measured(sgd_groups(3, **HYPER))
    grads = [torch.randn_like(p) for p in params]
    norm: Any = ops.sgd_update(params, grads, None, momenta, groups, backend=backend, masters=masters)
    assert_same_bits([norm], [ops.norm(params, momenta, ascent_groups(3), backend, masters=masters)])


def test_a_step_that_is_skipped_has_the_old_norm_or_none(backend: str, device: str) -> None:
    lists = Lists(SIZES, torch.float32, device)
    before = norm_of(lists.params, lists.momentum, backend)
    groups = measured(sgd_groups(len(SIZES), **HYPER))
    inf = torch.ones((), device=device)
    norm = ops.sgd_update(lists.params, lists.grads, lists.backups, lists.momentum, groups, None, inf, backend=backend)
    if norm is not None:
        assert_same_bits([norm], [before])


def test_of_several_calls_or_none_measured_there_is_no_norm(backend: str, device: str) -> None:
    p, g, m = (torch.randn(67, device=device) for _ in range(3))
    assert ops.sgd_update([p], [g], None, [m], sgd_groups(1, **HYPER), backend=backend) is None
    odd = torch.randn(37, 5, device=device)[:, 2]
    lists = [odd, p], [odd.clone(), g], None, [torch.zeros_like(odd), m]
    norm = ops.sgd_update(*lists, measured(sgd_groups(2, **HYPER)), backend=backend)
    assert norm is None or backend == "eager"


def test_without_momentum_there_is_nothing_to_measure(backend: str, device: str) -> None:
    p = torch.ones(9, device=device)
    with pytest.raises(ValueError, match="Invalid momentum_buffers"):
        ops.sgd_update([p], [p.clone()], None, None, measured(sgd_groups(1, lr=0.1)), backend=backend)
    assert p.tolist() == [1.0] * 9


# The optimizer

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, HYPER),
    "AdamW": (torch.optim.AdamW, {"lr": 0.013, "weight_decay": 0.17}),
}
every_base = pytest.mark.parametrize("base", BASES)


def make(params: Any, base: str, backend: str, **options: Any) -> FusedSAM:
    base_class, base_options = BASES[base]
    return FusedSAM(params, base_class, rho=0.4, direction="momentum", backend=backend, **base_options, **options)


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for every norm that is taken by a pass of its own."""
    taken: list[str] = []
    norm = ops.Ascent.norm

    def counted(self: ops.Ascent) -> Any:
        taken.append("norm")
        return norm(self)

    monkeypatch.setattr(ops.Ascent, "norm", counted)
    return taken


def first_step(opt: FusedSAM, norms: list[str]) -> int:
    """How many norms it takes."""
    norms.clear()
    opt.first_step()
    return len(norms)


@every_base
def test_from_the_second_step_on_no_pass_is_for_the_norm(
    base: str, backend: str, device: str, norms: list[str]
) -> None:
    if backend == "eager":
        pytest.skip("of tensors that torch looks at one by one an update may be several calls")
    params = leaves(9, LARGE, 67, device=device)
    opt = make(params, base, backend)
    taken = []
    for _ in range(4):
        norms.clear()
        opt.step(quadratic(params))
        taken.append(len(norms))
    assert taken == [1, 0, 0, 0]
    m = torch.cat([opt.state[p][opt._along.KEYS[base == "AdamW"]] for p in params])
    assert float(opt.last.grad_norm) != float(m.double().norm())  # that before the step


@every_base
@every_dtype
def test_a_trajectory_has_the_same_bits_with_norms_taken_anew(
    base: str, dtype: torch.dtype, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for kept in (True, False):
        torch.manual_seed(3)
        params = leaves(9, LARGE, 67, 2 * LARGE, device=device, dtype=dtype)
        opt = make(
            [{"params": params[:2]}, {"params": params[2:3], "perturb": False}, {"params": params[3:]}], base, backend
        )
        if not kept:
            monkeypatch.setattr(KeptNorm, "is_wanted", lambda self, optimizer: False)
        for _ in range(4):
            opt.first_step()
            moved = snapshot(params)
            set_grads(params, [torch.randn(p.shape) for p in params])
            opt.step()
        runs.append((moved, snapshot(params), bits(opt.last.grad_norm)))
    assert runs[0] == runs[1]


KEY = "momentum_buffer"


def edit(opt: FusedSAM) -> None:
    opt.state[opt.param_groups[0]["params"][1]][KEY].mul_(0.5)


def edit_all(opt: FusedSAM) -> None:
    torch._foreach_zero_([s[KEY] for s in opt.state.values()])
    opt.state[opt.param_groups[0]["params"][0]][KEY].add_(1.0)


def replace(opt: FusedSAM) -> None:
    state = opt.state[opt.param_groups[0]["params"][1]]
    state[KEY] = state[KEY] * 3


def remove(opt: FusedSAM) -> None:
    del opt.state[opt.param_groups[0]["params"][1]][KEY]


def load(opt: FusedSAM) -> None:
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry[KEY] *= 2
    opt.load_state_dict(state)


def scale_adaptively(opt: FusedSAM) -> None:
    opt.param_groups[0].update(adaptive=True, eta=0.01)


def hold_back(opt: FusedSAM) -> None:
    opt.param_groups[1]["perturb"] = False


def step_of_the_base(opt: FusedSAM) -> None:
    base = torch.optim.SGD(opt.param_groups[0]["params"], lr=0.1, momentum=0.5, foreach=False)
    base.state = opt.state
    base.step()


def exchange(opt: FusedSAM) -> None:
    groups = opt.param_groups
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]


def step_without_a_gradient(opt: FusedSAM) -> None:
    opt.first_step()
    opt.param_groups[0]["params"][0].grad = None
    opt.step()


@pytest.mark.parametrize(
    "event",
    [edit, edit_all, replace, remove, load, scale_adaptively, hold_back, step_of_the_base, exchange,
     step_without_a_gradient],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_happens_to_the_momentum_is_noticed(
    event: Callable[[FusedSAM], None], backend: str, device: str, norms: list[str]
) -> None:
    """e as of an optimizer that has kept nothing."""
    params = leaves(9, LARGE, 67, device=device, dtype=torch.float64)
    opt = make([{"params": params[:2]}, {"params": params[2:]}], "SGD", backend)
    for _ in range(2):
        opt.step(quadratic(params))
    event(opt)
    w = [p.detach().clone() for p in params]
    assert first_step(opt, norms) == 1
    e = [p.detach() - x for p, x in zip(params, w)]
    opt.restore()
    opt._along.kept.forget()
    opt.first_step()
    assert_same_bits([p.detach() - x for p, x in zip(params, w)], e)
    opt.restore()


def test_what_does_not_touch_the_momentum_changes_nothing(backend: str, device: str, norms: list[str]) -> None:
    if backend == "eager":
        pytest.skip("of tensors that torch looks at one by one an update may be several calls")
    params = leaves(9, LARGE, device=device)
    opt = make(params, "SGD", backend)
    opt.step(quadratic(params))
    opt.param_groups[0].update(rho=0.2, lr=0.01, eta=0.3)
    with torch.no_grad():
        params[0].mul_(2)
    opt.state_dict()
    for _ in range(2):
        assert first_step(opt, norms) == 0
        opt.restore()
    opt.load_state_dict(opt.state_dict())
    assert first_step(opt, norms) == 1
    opt.restore()


def test_new_parameters_have_no_part_in_it(backend: str, device: str, norms: list[str]) -> None:
    params = leaves(9, LARGE, device=device)
    opt = make(params, "SGD", backend)
    opt.step(quadratic(params))
    opt.add_param_group({"params": leaves(67, device=device)})
    assert first_step(opt, norms) == 1
    opt.restore()


def test_copies_take_their_own(backend: str, device: str, norms: list[str]) -> None:
    params = leaves(9, LARGE, device=device)
    opt = make(params, "SGD", backend)
    opt.step(quadratic(params))
    twin = copy.deepcopy(opt)
    assert twin._along.kept is not opt._along.kept
    assert first_step(twin, norms) == 1
    twin.restore()


def test_it_is_measured_only_where_the_next_step_wants_it(
    backend: str, device: str, norms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "eager":
        pytest.skip("of tensors that torch looks at one by one an update may be several calls")
    params = leaves(9, LARGE, device=device)
    opt = make(params, "SGD", backend, interval=3)
    found = []
    keep = KeptNorm.keep
    monkeypatch.setattr(KeptNorm, "keep", lambda self, norm, *rest: (found.append(norm), keep(self, norm, *rest)))
    taken = []
    for _ in range(7):
        norms.clear()
        opt.step(quadratic(params))
        taken.append(len(norms))
    assert [norm is not None for norm in found] == [False, False, True] * 2 + [False]
    assert taken == [1, 0, 0, 0, 0, 0, 0]


def test_a_graph_takes_it_anew(backend: str, device: str, norms: list[str]) -> None:
    """Nobody sees a replay change the momentum."""
    params = leaves(9, LARGE, device=device)
    opt = make(params, "SGD", backend, capturable=True)
    for _ in range(2):
        opt.step(quadratic(params))
    assert first_step(opt, norms) == 1
    opt.restore()


def test_momenta_made_in_inference_mode_have_no_versions(backend: str, device: str, norms: list[str]) -> None:
    if backend == "eager":
        pytest.skip("torch writes no tensor that was made there")
    params = leaves(9, LARGE, device=device)
    opt = make(params, "SGD", backend)
    opt.step(quadratic(params))
    for p in params:
        with torch.inference_mode():
            opt.state[p][KEY] = torch.ones(p.shape, device=device)
    opt.first_step()
    opt.step()
    assert first_step(opt, norms) == 1
    opt.restore()
