"""What is promised of a step, with every option, base optimizer and backend. The other files look closer at each."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import LARGE, Carved, assert_as_torch, assert_bits_of_torch, set_grads, snapshot, through_a_file
from modes import BASES, COMBINED, MODES, after, dtype_of, every_mode, make, optimizer_of, step
from torch import Tensor

from fused_sam import FusedSAM

pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # create_graph, in second order


def params_of(opt: FusedSAM) -> list[Tensor]:
    return opt.param_groups[0]["params"]


def everything(opt: FusedSAM) -> list[bytes]:
    """Weights, then state by name, but for masters that hold what the weights do: those come with the first ascent."""
    entries = [(p, key, v) for p in params_of(opt) for key, v in sorted(opt.state.get(p, {}).items())]
    state = [
        v for p, key, v in entries if isinstance(v, Tensor) and not (key == "master" and torch.equal(v, p.float()))
    ]
    return [*snapshot(params_of(opt)), *snapshot(state)]


@every_mode
def test_an_exception_in_any_pass_leaves_weights_and_state(mode: str, base: str, backend: str, device: str) -> None:
    """Go through the first three steps, in each of which every pass fails once before it is made."""
    opt = make(mode, base, backend, device, LARGE)
    twin = copy.deepcopy(opt)
    batches, left = 1 if mode == "LookSAM" else 2, 0

    def fail() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    for _ in range(3):
        old = everything(opt)
        passes = step(twin, batches)
        for call in range(passes):
            left = call
            with pytest.raises(KeyboardInterrupt):
                step(opt, batches, fail)
            assert not opt.perturbed
            assert everything(opt) == old
        assert step(opt, batches) == passes >= batches
        assert everything(opt) == everything(twin) != old


@every_mode
def test_without_a_learning_rate_no_bit_changes(mode: str, base: str, backend: str, device: str) -> None:
    opt = make(mode, base, backend, device)
    w = snapshot(params_of(opt))
    opt.param_groups[0]["lr"] = 0.0
    moved: list[bool] = []
    for _ in range(5):
        step(opt, before=lambda: moved.append(snapshot(params_of(opt)) != w))
        assert snapshot(params_of(opt)) == w
    assert any(moved)


@every_mode
def test_a_run_goes_on_bit_for_bit(mode: str, base: str, backend: str, device: str) -> None:
    """From a file, a deepcopy and a pickle."""
    opt = make(mode, base, backend, device)
    after(opt, 3)
    resumed = optimizer_of([p.detach().clone().requires_grad_() for p in params_of(opt)], mode, base, backend)
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    others = [resumed, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    old = everything(opt)
    for _ in range(3):
        step(opt)
        for other in others:
            step(other)
    assert all(everything(other) == everything(opt) != old for other in others)


@every_mode
def test_storage_stays_neighbours_stay_and_autograd_is_told(mode: str, base: str, backend: str, device: str) -> None:
    carved = Carved([9, 67, 1009], dtype_of(mode), device)
    matrix = torch.full((37, 5), 0.5, dtype=dtype_of(mode), device=device)
    params = [x.requires_grad_() for x in (*carved.tensors, matrix[:, 2], matrix[:, 3:].t())]
    opt = optimizer_of(params, mode, base, backend)
    places = [(p.data_ptr(), p.stride()) for p in params]
    for _ in range(3):
        versions: list[list[int]] = [[p._version for p in params]]
        step(opt, before=lambda versions=versions: versions.append([p._version for p in params]))
        versions.append([p._version for p in params])
        assert versions[-1][:3] > versions[0][:3]
        if len(versions) > 3:  # perturbed, and more than one pass
            assert all(a < b for a, b in zip(versions[1][:3], versions[2][:3], strict=True))
    assert [(p.data_ptr(), p.stride()) for p in params] == places
    carved.check()
    assert bool((matrix[:, :2] == 0.5).all())
    assert not bool((matrix[:, 2] == 0.5).any())


SAME = [x for x in COMBINED if x.values[0] not in ("LookSAM", "clipping", "masters")]


@pytest.mark.parametrize(("mode", "base"), SAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_rho_zero_a_step_is_the_base_optimizers(
    mode: str, base: str, dtype: torch.dtype, backend: str, device: str, ieee_roots: None
) -> None:
    params = [torch.randn(n, dtype=dtype, device=device).requires_grad_() for n in (9, 130, 16385)]
    theirs = [p.detach().clone().requires_grad_() for p in params]
    opt = optimizer_of(params, mode, base, backend, rho=0.0)
    base_class, options = BASES[base]
    plain = base_class(theirs, foreach=False, **options)
    for _ in range(3):
        step(opt)
        plain.zero_grad()
        sum((0.3 + i) * (p * p).sum() + p.sin().sum() for i, p in enumerate(theirs[:-1])).backward()
        plain.step()
    (assert_as_torch if base.startswith("Adam") else assert_bits_of_torch)(params, theirs)


SCALED = [x for x in COMBINED if MODES[x.values[0]].keys().isdisjoint(("second_order", "decay_in_ascent"))]


@pytest.mark.parametrize(("mode", "base"), SCALED)
@pytest.mark.parametrize(("bad", "steps_before"), [(math.inf, 0), (math.nan, 3)], ids=str)
def test_an_overflow_in_any_pass_leaves_weights_and_state(
    mode: str, base: str, bad: float, steps_before: int, backend: str, device: str
) -> None:
    opt = make(mode, base, backend, device, LARGE)
    after(opt, steps_before)
    params, scaler = params_of(opt), torch.amp.GradScaler(device, init_scale=1024.0)

    def give(spoilt: bool) -> None:
        set_grads(params, [*(torch.randn(p.shape) * 1024 for p in params[:3]), None])
        if spoilt:
            params[2].grad[503] = bad

    def scaled_step(overflow: int | None) -> int:
        """How many passes there were."""
        number = 0
        while opt.perturb_next:
            give(number == overflow)
            opt.first_step(zero_grad=True)
            number += 1
        give(number == overflow)
        scaler.scale(torch.zeros((), device=device))  # which is what makes its scale
        scaler.step(opt)
        scaler.update()
        return number + 1

    passes = scaled_step(None) if steps_before else len_of(mode)
    # The ascent of MSAM reads no gradient, and that of p = inf its sign alone: neither can overflow.
    harmless = passes == 2 and mode in ("MSAM", "p=inf")
    for overflow in range(harmless, passes):
        if opt.perturb_next != (passes > 1):
            scaled_step(None)
        old = everything(opt)
        scaled_step(overflow)
        assert not opt.perturbed
        assert everything(opt) == old
    scaled_step(None)
    assert everything(opt)[: len(params) - 1] != old[: len(params) - 1]
    assert all(math.isfinite(float(p.detach().sum())) for p in params)


def len_of(mode: str) -> int:
    """The passes of the very first step."""
    options: dict[str, Any] = MODES[mode]
    return 1 if options.get("start") else options.get("ascent_steps", 1) + 1
