"""Random call orders, layouts, options and gradients, against the float64 reference (Hypothesis).

``make soak`` runs the same for hours: HYPOTHESIS_PROFILE=soak.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import profiles  # noqa: F401
import pytest
import torch
from helpers import DTYPES, assert_same_bits, snapshot
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from fused_sam import FusedSAM, ReferenceSAM, backends

# Sizes around the edges of vectors, of the memory that small backups share, and of blocks.
DIMENSIONS = st.sampled_from([0, 1, 2, 3, 7, 8, 17, 31])
SHAPES = st.one_of(
    st.lists(DIMENSIONS, min_size=0, max_size=4).filter(lambda s: math.prod(s) <= 2000),
    st.sampled_from([[1009], [67, 71], [3, 5, 8, 8], [16385], [129, 131]]),
)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "odd offset", "strided", "channels_last", "reversed"])


def laid_out(shape: list[int], layout: str, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers in a tensor of that shape which lies in memory as the layout says."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed" and len(shape) >= 2:
        home = torch.empty([*shape[:-2], shape[-1], shape[-2]], dtype=dtype).transpose(-1, -2)
    elif layout == "odd offset":
        home = torch.empty(values.numel() + 3, dtype=dtype)[3:].view(shape)
    elif layout == "strided" and len(shape) >= 1:
        home = torch.empty([*shape[:-1], 2 * shape[-1] + 1], dtype=dtype)[..., 1::2]
    elif layout == "channels_last" and len(shape) == 4:
        home = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    elif layout == "reversed" and shape:
        home = torch.empty(list(reversed(shape)), dtype=dtype).permute(*reversed(range(len(shape))))
    else:
        home = torch.empty(shape, dtype=dtype)
    return home.copy_(values)


TENSORS = st.lists(st.tuples(SHAPES, LAYOUTS), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)
BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.87, "dampening": 0.3, "weight_decay": 0.017}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.87, "nesterov": True, "weight_decay": 0.017}),
    "plain": (torch.optim.SGD, {"weight_decay": 0.017}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.017, "eps": 0.01}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.17, "eps": 0.01, "amsgrad": True}),
}
GRADIENTS = st.sampled_from(["none", "random", "laid out", "expanded", "zero", "tiny", "huge", "held"])


class Calls(RuleBasedStateMachine):
    """Any order of calls, also wrong ones, on FusedSAM and the reference side by side."""

    backend = "native"

    @initialize(
        tensors=TENSORS,
        seed=SEEDS,
        base=st.sampled_from(sorted(BASES)),
        p=st.sampled_from([1.0, 1.5, 2.0, 2.0, 2.0, 7.0, math.inf]),
        adaptive=st.sampled_from([False, True, "weights"]),
        maximize=st.booleans(),
        steps=st.sampled_from([1, 1, 1, 2]),
    )
    def make(self, tensors: Any, seed: int, base: str, p: float, adaptive: Any, maximize: bool, steps: int) -> None:
        """Two groups, the second with options of its own, and a spare tensor for a group to come."""
        self.generator = torch.Generator().manual_seed(seed)
        params = [laid_out(shape, layout, self.generator).requires_grad_() for shape, layout in tensors]
        self.params, self.p = params, p
        self.twins = [x.detach().clone(memory_format=torch.contiguous_format) for x in params]
        base_class, base_options = BASES[base]
        self.base_options = {"lr": 0.013, "maximize": maximize, **base_options}
        self.options = {"rho": 0.07, "adaptive": adaptive, "p": p, "eta": 0.013, "ascent_steps": steps}
        self.base_class = base_class
        name = base if base in ("adam", "adamw") else "sgd"
        reference = {**self.options, "base": name, **self.base_options}
        self.optimizer = self.fused(self.groups(params))
        self.reference = ReferenceSAM(self.groups(self.twins), **reference)
        self.calls = 0
        self.held: list[tuple[Tensor, Tensor]] = []

    def groups(self, tensors: list[Tensor]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": tensors[:2]}]
        if len(tensors) > 2:
            groups.append({"params": tensors[2:], "rho": 0.21, "adaptive": False, "weight_decay": 0.05})
        return groups

    def fused(self, groups: list[dict[str, Any]]) -> FusedSAM:
        return FusedSAM(groups, self.base_class, backend=self.backend, **self.options, **self.base_options)

    def give_gradient(self, index: int, kind: str) -> None:
        p, twin = self.params[index], self.twins[index]
        g = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
        if kind == "none":
            p.grad = twin.grad = None
            return
        if kind == "laid out" and p.dim() >= 2:
            g = (
                torch.empty_strided(p.shape, torch.empty(p.shape[::-1]).permute(*range(p.dim())[::-1]).stride())
                .to(g)
                .copy_(g)
            )
        if kind == "expanded" and p.dim() >= 1:
            g = torch.randn((), generator=self.generator, dtype=p.dtype).expand(p.shape)
        g = g * {"zero": 0.0, "tiny": 1e-90, "huge": 1e90}.get(kind, 1.0)
        p.grad, twin.grad = g, g.clone(memory_format=torch.contiguous_format)
        if kind == "held":
            self.held.append((g, g.clone()))

    @rule(kinds=st.lists(GRADIENTS, min_size=6, max_size=6))
    def gradients(self, kinds: list[str]) -> None:
        if "huge" in kinds and any(k in kinds for k in ("tiny", "random", "laid out", "expanded", "held")):
            kinds = [k if k in ("none", "huge", "zero") else "huge" for k in kinds]
        if self.optimizer.perturbed and "huge" in kinds:
            kinds = ["random"] * 6  # the update would leave the range in which the two can be compared
        for i in range(len(self.params)):
            self.give_gradient(i, kinds[i % 6])

    @precondition(lambda self: self.optimizer.perturb_next and not self.not_comparable())
    @rule(zero_grad=st.booleans())
    def first_step(self, zero_grad: bool) -> None:
        self.optimizer.first_step(zero_grad=zero_grad)
        self.reference.first_step(zero_grad=zero_grad)
        self.calls += 1

    def not_comparable(self) -> bool:
        # With p = 1 equal elements are a tie that the next rounding decides.
        return self.p == 1.0 and any(
            p.grad is not None and p.grad.numel() > 1 and p.grad.stride() == (0,) * p.dim() for p in self.params
        )

    @precondition(lambda self: not self.optimizer.perturb_next and not self.has_huge())
    @rule(second=st.booleans(), zero_grad=st.booleans())
    def step(self, second: bool, zero_grad: bool) -> None:
        if second:
            self.optimizer.second_step(zero_grad=zero_grad)
        else:
            zero_grad = False
            self.optimizer.step()
        self.reference.second_step(zero_grad=zero_grad)
        self.calls = 0

    def has_huge(self) -> bool:
        return any(p.grad is not None and p.grad.numel() and float(p.grad.abs().max()) > 1e50 for p in self.params)

    @precondition(lambda self: not self.has_huge())
    @rule(fails=st.sampled_from([None, None, 0, 1]))
    def closure(self, fails: int | None) -> None:
        if self.optimizer.perturbed:
            with pytest.raises(RuntimeError, match="after first_step"):
                self.optimizer.step(lambda: None)
            return
        before = snapshot(self.params)
        calls: list[int] = []

        def run(tensors: list[Tensor]) -> Tensor:
            if tensors is self.params:
                calls.append(1)
                if fails is not None and len(calls) > fails:
                    raise KeyboardInterrupt
            with torch.enable_grad():
                leaves = tensors if tensors is self.params else [t.detach().requires_grad_() for t in tensors]
                loss = sum(((0.5 + i) * (x * x).sum() + (0.3 * x).sin().sum() for i, x in enumerate(leaves)))
                loss.backward()
            if leaves is not tensors:
                for t, leaf in zip(tensors, leaves):
                    t.grad = leaf.grad
            return loss.detach()

        try:
            self.optimizer.step(lambda: run(self.params))
        except KeyboardInterrupt:
            assert_same_bits(self.params, before)
            self.optimizer.zero_grad()
            for twin in self.twins:
                twin.grad = None
            return
        self.reference.step(lambda: run(self.twins))

    @rule()
    def restore(self) -> None:
        self.optimizer.restore()
        if self.reference._w:
            self.reference.restore()
        self.calls = 0

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        for _, copy in self.held:
            copy.zero_()
        self.held = [(g, c) for g, c in self.held if to_none is False and any(p.grad is g for p in self.params)]
        with contextlib.suppress(RuntimeError):  # an expanded gradient cannot be zeroed in place
            self.optimizer.zero_grad(set_to_none=to_none)
        if not to_none and any(p.grad is not None and bool(p.grad.any()) for p in self.params):
            self.optimizer.zero_grad(set_to_none=True)
        for p, twin in zip(self.params, self.twins):
            twin.grad = None if p.grad is None else p.grad.clone(memory_format=torch.contiguous_format)

    @rule()
    def wrong_calls(self) -> None:
        before = snapshot(self.params)
        if self.optimizer.perturb_next:
            with pytest.raises(RuntimeError, match="needs first_step"):
                self.optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="first_step"):
                self.optimizer.first_step()
        if self.optimizer.perturbed:
            with pytest.raises(RuntimeError, match="while the weights are perturbed"):
                self.optimizer.state_dict()
        assert_same_bits(self.params, before)

    @precondition(lambda self: not self.optimizer.perturbed)
    @rule()
    def through_a_file(self) -> None:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        self.optimizer = self.fused([{"params": g["params"]} for g in self.optimizer.param_groups])
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))

    @precondition(lambda self: not self.optimizer.perturbed and len(self.params) < 8)
    @rule(tensor=st.tuples(SHAPES, LAYOUTS), rho=st.sampled_from([0.0, 0.11]))
    def add_group(self, tensor: Any, rho: float) -> None:
        p = laid_out(*tensor, self.generator).requires_grad_()
        twin = p.detach().clone(memory_format=torch.contiguous_format)
        self.params.append(p)
        self.twins.append(twin)
        self.optimizer.add_param_group({"params": [p], "rho": rho})
        last = self.reference.param_groups[0]
        defaults = {**{k: v for k, v in last.items() if k != "params"}, "adaptive": self.options["adaptive"]}
        self.reference.param_groups.append({**defaults, "rho": rho, "params": [twin]})

    @invariant()
    def agrees_with_the_reference(self) -> None:
        if not hasattr(self, "optimizer"):
            return
        for i, (p, twin) in enumerate(zip(self.params, self.twins)):
            torch.testing.assert_close(p.detach(), twin, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"parameter {i}: {m}")

    @invariant()
    def held_gradients_are_untouched(self) -> None:
        for g, copy in getattr(self, "held", []):
            assert_same_bits([g], [copy])


class InterpretedCalls(Calls):
    """The same on the CUDA kernels, interpreted."""

    backend = "interpreted"


class EagerCalls(Calls):
    """The same on torch operations."""

    backend = "eager"


def machine(cls: type[Calls]) -> Any:
    """A test of a machine; skipped where its backend is not built."""
    case = cls.TestCase
    state = backends.available("cpu").get(cls.backend, "not part of this build")
    return pytest.mark.skipif(state != "ok", reason=f"backend {cls.backend}: {state}")(case)


TestNative = machine(Calls)
TestInterpreted = machine(InterpretedCalls)
TestEager = machine(EagerCalls)


@given(
    tensors=TENSORS,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    present=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=SEEDS,
    base=st.sampled_from(sorted(BASES)),
    adaptive=st.booleans(),
    zero_grad=st.booleans(),
)
def test_every_backend_gives_the_bits_of_the_native_kernels(
    tensors: Any, dtypes: list[torch.dtype], present: list[bool], seed: int, base: str, adaptive: bool, zero_grad: bool
) -> None:
    """Two steps on lists of any dtypes and layouts, with p = inf, where no sum's order matters."""
    results = []
    names = [name for name in ("native", "interpreted") if backends.available("cpu").get(name) == "ok"]
    for name in names:
        generator = torch.Generator().manual_seed(seed)
        params = [laid_out(*t, generator, dtype).requires_grad_() for t, dtype in zip(tensors, dtypes)]
        base_class, options = BASES[base]
        opt = FusedSAM(params, base_class, rho=0.07, adaptive=adaptive, p=math.inf, lr=0.013, backend=name, **options)
        seen: list[bytes] = []
        for step in range(2):
            for half in range(2):
                for i, p in enumerate(params):
                    g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                    p.grad = g if present[(i + 6 * half + 3 * step) % 12] else None
                if half == 0:
                    opt.first_step(zero_grad=zero_grad)
                else:
                    opt.step()
                seen += snapshot(params)
        results.append(seen)
    for other in results[1:]:
        assert other == results[0]
