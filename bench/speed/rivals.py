"""What FusedSAM is measured against, behind one interface: first_step(zero_grad) and second_step(zero_grad).

`bytes_fp32` is what a variant's operations read and write per parameter, momentum and weight decay on, each
operand counted once per operation. Eager, term by term: gradient times 1.0 and its norm 12, copy of w 8,
two products 16, sum 12, then SGD's four operations 44.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

RHO = 0.05
SGD_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class TwoPass(Protocol):
    """The optimizer side of a SAM step."""

    def first_step(self, zero_grad: bool = False) -> None:
        """From w to w + e."""

    def second_step(self, zero_grad: bool = False) -> None:
        """Back to w, then the base optimizer's step with the gradient at w + e."""


class EagerSAM(Optimizer):
    """The formulation in widest use: a loop over parameters, one operation per term, restore by rebinding.

    For P parameters 6 P + 5 operations before those of the base optimizer. `rebind=False` copies the old value
    back instead, P operations more: in a CUDA graph, which knows addresses and no Python, nothing else works.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base_optimizer: type[Optimizer] = SGD,
        rho: float = RHO,
        rebind: bool = True,
        **base_options: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, **base_options})
        self.rebind = rebind
        self.base = base_optimizer(self.param_groups, **base_options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Displace every parameter by rho g / ||g||; the parameter's old value is cloned."""
        norm = self._gradient_norm()
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["weight"] = p.data.clone()
                displacement = 1.0 * p.grad * scale.to(p)
                p.add_(displacement)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Let every parameter point to its old value again, then step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.rebind:
                    p.data = self.state[p]["weight"]
                else:
                    p.copy_(self.state[p]["weight"])
        self.base.step()
        if zero_grad:
            self.zero_grad()

    def _gradient_norm(self) -> Tensor:
        device = self.param_groups[0]["params"][0].device
        norms = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    norms.append((1.0 * p.grad).norm(p=2).to(device))
        return torch.stack(norms).norm(p=2)


class ForeachSAM:
    """The best of torch's own multi-tensor operations: one call per term, lasting backup.

    With `sync` the host reads the norm, to pass the scale as a number. Without, the scale stays on the device,
    where torch has no operation that multiplies by it and adds at once: 8 bytes more, and no wait.
    """

    def __init__(self, params: Iterable[Tensor], rho: float = RHO, sync: bool = True, **base_options: Any) -> None:
        self.params = list(params)
        self.rho = rho
        self.sync = sync
        self.backup = [torch.empty_like(p) for p in self.params]
        self.base = SGD(self.params, **base_options)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Displace every parameter by rho g / ||g||."""
        grads = [p.grad for p in self.params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_copy_(self.backup, self.params)
        if self.sync:
            torch._foreach_add_(self.params, grads, alpha=self.rho / (norm.item() + 1e-12))
        else:
            torch._foreach_add_(self.params, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))
        del grads
        if zero_grad:
            self.base.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Copy the old values back, then step."""
        torch._foreach_copy_(self.params, self.backup)
        self.base.step()
        if zero_grad:
            self.base.zero_grad()


class PlainSGD:
    """One pass of torch.optim.SGD: no competitor, the size of the step that SAM adds to."""

    def __init__(self, params: Iterable[Tensor], **base_options: Any) -> None:
        self.base = SGD(params, **base_options)

    def first_step(self, zero_grad: bool = False) -> None:
        """Do nothing but zero_grad."""
        if zero_grad:
            self.base.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Make SGD's step."""
        self.base.step()
        if zero_grad:
            self.base.zero_grad()


class TwoSGDSteps(PlainSGD):
    """Two steps of torch.optim.SGD: no competitor, what as many passes cost without SAM."""

    def first_step(self, zero_grad: bool = False) -> None:
        """Make SGD's step."""
        self.second_step(zero_grad)


@dataclass(frozen=True)
class Variant:
    """One way to make the step. `needs`: the package it comes from."""

    title: str
    build: Callable[[list[Tensor]], TwoPass]
    bytes_fp32: int
    needs: str = "torch"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *SIXTEEN_BIT)

    def available(self) -> bool:
        """Return whether its package is installed."""
        return importlib.util.find_spec(self.needs) is not None

    def bytes_per_param(self, dtype: torch.dtype) -> float:
        """Return bytes its operations move per parameter."""
        return self.bytes_fp32 * dtype.itemsize / 4


def _fused_sam(params: list[Tensor], **options: Any) -> TwoPass:
    from fused_sam import FusedSAM

    return FusedSAM(params, SGD, rho=RHO, **SGD_OPTIONS, **options)


def _fused_adamw(params: list[Tensor]) -> TwoPass:
    from fused_sam import FusedSAM

    return FusedSAM(params, torch.optim.AdamW, rho=RHO, lr=1e-3, weight_decay=0.05)


def _pytorch_optimizer(params: list[Tensor], **options: Any) -> TwoPass:
    from pytorch_optimizer import SAM

    return SAM(params, SGD, rho=RHO, **SGD_OPTIONS, **options)


def eager_sam(**options: Any) -> Callable[[list[Tensor]], TwoPass]:
    """Return what builds the formulation in widest use around SGD."""
    return functools.partial(EagerSAM, base_optimizer=SGD, **SGD_OPTIONS, **options)


def foreach_sam(**options: Any) -> Callable[[list[Tensor]], TwoPass]:
    """Return what builds the one of multi-tensor operations."""
    return functools.partial(ForeachSAM, **SGD_OPTIONS, **options)


OURS = "fused_sam"
SCALE = "sgd_fused"
TWICE = "sgd_fused_twice"
FP32 = (torch.float32,)
VARIANTS: dict[str, Variant] = {
    OURS: Variant("FusedSAM", _fused_sam, 40, needs="fused_sam"),
    "eager_sgd": Variant("eager SAM + SGD", eager_sam(), 92),
    "eager_sgd_foreach": Variant("eager SAM + SGD(foreach)", eager_sam(foreach=True), 92),
    "eager_sgd_fused": Variant("eager SAM + SGD(fused)", eager_sam(fused=True), 68),
    "foreach_sgd_fused": Variant("foreach SAM + SGD(fused)", foreach_sam(fused=True), 52),
    # The best correct rival in 16 bit, where SGD(fused=True) is wrong (see check).
    "foreach_sgd_foreach": Variant("foreach SAM + SGD(foreach)", foreach_sam(foreach=True), 76, dtypes=SIXTEEN_BIT),
    "pytorch_optimizer": Variant("pytorch_optimizer.SAM", _pytorch_optimizer, 92, needs="pytorch_optimizer"),
    "pytorch_optimizer_foreach": Variant(
        "pytorch_optimizer.SAM(foreach)",
        functools.partial(_pytorch_optimizer, foreach=True),
        92,
        needs="pytorch_optimizer",
        dtypes=FP32,
    ),
    SCALE: Variant("SGD(fused) alone", functools.partial(PlainSGD, **SGD_OPTIONS, fused=True), 20),
    TWICE: Variant("SGD(fused) twice", functools.partial(TwoSGDSteps, **SGD_OPTIONS, fused=True), 40),
}
# What a variant must compute, where it is not the step of SAM.
ORACLES: dict[str, Callable[..., TwoPass]] = {SCALE: PlainSGD, TWICE: TwoSGDSteps}


# FusedSAM with other options than the rivals': no rivals of it, but each against the copy of its own bytes.
OPTIONS: dict[str, Variant] = {
    "fused_sam_asam": Variant("ASAM", functools.partial(_fused_sam, adaptive=True), 44, needs="fused_sam"),
    "fused_sam_decay": Variant(
        "decay in the ascent", functools.partial(_fused_sam, decay_in_ascent=True), 44, needs="fused_sam"
    ),
    "fused_sam_p_inf": Variant("p = inf", functools.partial(_fused_sam, p=math.inf), 36, needs="fused_sam"),
    "fused_sam_adamw": Variant("AdamW", _fused_adamw, 52, needs="fused_sam"),
    # The backup of w is memory of its own: the momentum is needed after the step.
    "fused_sam_msam": Variant("MSAM", functools.partial(_fused_sam, direction="momentum"), 40, needs="fused_sam"),
}


def find(name: str) -> Variant:
    """Return a variant by its name."""
    return VARIANTS.get(name) or OPTIONS[name]


def available(dtype: torch.dtype) -> dict[str, Variant]:
    """Return the installed variants that are defined for `dtype`."""
    return {name: v for name, v in VARIANTS.items() if v.available() and dtype in v.dtypes}


def check(name: str, dtype: torch.dtype) -> bool:
    """Return whether a variant computes the step on the CPU."""
    return computes_the_step(VARIANTS[name].build, dtype, oracle=ORACLES.get(name, EagerSAM))


def computes_the_step(
    build: Callable[[list[Tensor]], TwoPass],
    dtype: torch.dtype,
    device: str = "cpu",
    oracle: Callable[..., TwoPass] = EagerSAM,
) -> bool:
    """Compare two steps with the eager formulation in float64 on the CPU.

    Compared after each half: with given gradients the whole step would not show a wrong displacement.
    torch 2.13's SGD(fused=True) on the CPU leaves whole SIMD blocks of 16-bit tensors as they were
    (pytorch/pytorch#191763): such a variant is timed, and its rows say that it is wrong.
    """
    weights, first, second = small_problem(dtype)

    def run(build: Callable[[list[Tensor]], TwoPass], kind: torch.dtype, device: str) -> list[Tensor]:
        params = [w.to(device, kind, copy=True).requires_grad_() for w in weights]
        optimizer = build(params)
        seen = []
        for _ in range(2):
            for step, grads in ((optimizer.first_step, first), (optimizer.second_step, second)):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.to(device, kind, copy=True)
                step(zero_grad=True)
                seen += [p.detach().cpu().double().clone() for p in params]
        return seen

    expected = run(functools.partial(oracle, **SGD_OPTIONS), torch.float64, "cpu")
    return agree(run(build, dtype, device), expected, 16 * torch.finfo(dtype).eps)


def small_problem(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights and the gradients of both passes, some tensors of awkward sizes.

    The weights are as small as the displacement: beside larger ones it would vanish in 16-bit rounding.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[Tensor]:
        sizes = (1, 16, 33, 1000)
        return [torch.randn(n, generator=generator, dtype=torch.float64).mul_(scale).to(dtype) for n in sizes]

    return draw(1e-3), draw(1.0), draw(1.0)


def agree(got: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> bool:
    """Return whether each tensor is as expected, up to `tolerance` of its largest value."""
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(got, expected, strict=True))
