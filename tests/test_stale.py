"""Whatever is changed between two steps, or at w + e, the next half reads anew: no pointer outlives what it led to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import HYPER, LARGE, RHO, snapshot
from torch import Tensor, nn

from fused_sam import FusedSAM
from fused_sam.backends.interface import AscentGroup

SHAPES = [(3, 4, 5, 2), (9,), (LARGE // 7, 7), ()]


def made(backend: str, device: str) -> tuple[nn.ParameterList, FusedSAM]:
    generator = torch.Generator().manual_seed(3)
    params = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES).to(device)
    groups = [{"params": params[:2]}, {"params": params[2:], "rho": 3 * RHO, "weight_decay": 0.21}]
    return params, FusedSAM(groups, rho=RHO, backend=backend, **HYPER)


def backward(params: nn.ParameterList) -> None:
    terms = [(p.double() * (1 + 0.3 * p.double()) * (k + 1)).sum() for k, p in enumerate(params) if p.requires_grad]
    sum(terms).backward()


def step(params: nn.ParameterList, opt: FusedSAM, within: Callable[[], None] = lambda: None) -> None:
    backward(params)
    opt.first_step(zero_grad=True)
    within()
    backward(params)
    opt.second_step(zero_grad=True)


def buffers(params: nn.ParameterList, opt: FusedSAM) -> list[Tensor]:
    return [opt.state[p]["momentum_buffer"] for p in params]


def replace_state(params: nn.ParameterList, opt: FusedSAM) -> None:
    for k, p in enumerate(params):
        opt.state[p] = {"momentum_buffer": torch.full_like(p, 0.3 * k)}


def reverse_a_group(params: nn.ParameterList, opt: FusedSAM) -> None:
    opt.param_groups[0]["params"].reverse()


def exchange_a_parameter(params: nn.ParameterList, opt: FusedSAM) -> None:
    params[1] = opt.param_groups[0]["params"][1] = nn.Parameter(torch.full_like(params[1], 0.7))


def set_memory(params: nn.ParameterList, opt: FusedSAM) -> None:
    whole = torch.linspace(-1, 1, 2 * params[0].numel(), device=params[0].device)
    params[0].data.set_(whole[params[0].numel() :].view(SHAPES[0]))


def swap(params: nn.ParameterList, opt: FusedSAM) -> None:
    torch.utils.swap_tensors(params[2], nn.Parameter(params[2].detach() * 0.3))


def freeze_and_thaw(params: nn.ParameterList, opt: FusedSAM) -> None:
    params[1].requires_grad_(False)
    step(params, opt)
    params[1].requires_grad_(True)


def replace_gradient(params: nn.ParameterList, opt: FusedSAM) -> None:
    def other(p: Tensor) -> None:
        p.grad = 0.3 * p.grad.clone()

    for p in params:
        p.register_hook(lambda g: g * 1.7)
        p.register_post_accumulate_grad_hook(other)


BETWEEN: dict[str, Callable[[nn.ParameterList, FusedSAM], object]] = {
    "p.data is a copy": lambda params, opt: [setattr(p, "data", p.data.clone()) for p in params],
    "p.data has other strides": lambda params, opt: setattr(
        params[0], "data", params[0].data.contiguous(memory_format=torch.channels_last)
    ),
    "p.data has other strides on the same memory": lambda params, opt: setattr(
        params[0], "data", params[0].data.reshape(5, 2, 3, 4).permute(2, 3, 0, 1)
    ),
    "p.data is not dense": lambda params, opt: setattr(params[1], "data", torch.ones(18).to(params[1])[::2]),
    "to another dtype": lambda params, opt: (params.double(), opt.load_state_dict(opt.state_dict())),
    "set_": set_memory,
    "swap_tensors": swap,
    "state is replaced": replace_state,
    "state is written": lambda params, opt: [m.mul_(0.3) for m in buffers(params, opt)],
    "state has other memory": lambda params, opt: [m.set_(m.clone()) for m in buffers(params, opt)],
    "state is gone": lambda params, opt: opt.state.clear(),
    "numbers of a group": lambda params, opt: opt.param_groups[1].update(lr=0.031, momentum=0.3, rho=0.5),
    "order of a group": reverse_a_group,
    "a parameter of a group": exchange_a_parameter,
    "thawed": freeze_and_thaw,
    "zeros for gradients": lambda params, opt: (backward(params), opt.zero_grad(set_to_none=False)),
    "hooks": replace_gradient,
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=BETWEEN.keys())
def test_what_changes_between_steps_is_seen(
    change: Callable[[nn.ParameterList, FusedSAM], object], backend: str, device: str
) -> None:
    """The oracle is torch, operation by operation, under the same treatment."""
    results = []
    for name in (backend, "eager"):
        params, opt = made(name, device)
        step(params, opt)
        change(params, opt)
        step(params, opt)
        step(params, opt)
        results.append([*params, *buffers(params, opt)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def free(p: Tensor) -> None:
    p.untyped_storage().resize_(0)


REFUSED: dict[str, tuple[Callable[[nn.ParameterList, FusedSAM], object], str]] = {
    "a freed parameter": (lambda params, opt: free(params[2]), "the memory of a tensor of shape"),
    "freed state": (lambda params, opt: free(buffers(params, opt)[2]), "the memory of a tensor of shape"),
    "state of another shape": (lambda params, opt: buffers(params, opt)[1].resize_(3, 3), "shape"),
    "state that is no tensor": (lambda params, opt: opt.state[params[1]].update(momentum_buffer=[0.0]), "list is not"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_step_can_be_made_with_is_refused(
    change: Callable[[nn.ParameterList, FusedSAM], object], message: str, backend: str, device: str
) -> None:
    params, opt = made(backend, device)
    step(params, opt)
    backward(params)
    gradients = [p.grad for p in params]
    change(params, opt)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    kept = [k for k, p in enumerate(params) if p.untyped_storage().nbytes()]
    before = snapshot(params[k] for k in kept)
    with pytest.raises(ValueError, match=message):
        _ = opt.first_step(), opt.second_step()
    assert not opt.perturbed
    assert snapshot(params[k] for k in kept) == before


@pytest.mark.parametrize("half", ["second_step", "restore"])
def test_a_parameter_replaced_at_the_perturbed_weights_is_refused(half: str, backend: str, device: str) -> None:
    if backend == "eager":
        pytest.skip("torch's operations write through the parameter, whatever its memory")
    params, opt = made(backend, device)
    backward(params)
    opt.first_step(zero_grad=True)
    backward(params)
    there = copy.copy(params[2].data)
    params[2].data = torch.zeros(7, LARGE // 7, device=device).t()
    with pytest.raises(ValueError, match="Parameter 2 has been replaced, or has changed"):
        getattr(opt, half)()
    params[2].data = there
    opt.restore()
    assert not opt.perturbed


def test_what_holds_w_lasts_as_long_as_whoever_restores_it() -> None:
    _native = pytest.importorskip("fused_sam._native")
    params = [torch.arange(64.0) + i for i in range(40)]
    grads, before = [torch.ones_like(p) for p in params], [p.clone() for p in params]
    norm, groups = torch.full((), 3.0, dtype=torch.float64), [AscentGroup(len(params), 0.5, False)]
    ascent = _native.Batch(params, grads, None, (), None, 1, 0, False)
    ascent.make_backups(False)
    ascent.perturb(norm, groups, 2.0, 1, [], None)
    descent = _native.Batch(params, grads, ascent, (), None, 1, 0, False)
    ascent.make_backups(False)  # must not free what `descent` reads
    del ascent
    others = [torch.zeros(64 * 80) for _ in range(200)]  # would get that memory if it were free
    assert not torch.equal(params[3], before[3])
    descent.restore(len(params), 1)
    assert all(map(torch.equal, params, before))
    assert not any(x.any() for x in others)
