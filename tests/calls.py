"""Any order of calls, also wrong ones, on FusedSAM and the reference side by side: state machines of Hypothesis."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import profiles  # noqa: F401
import pytest
import torch
from helpers import assert_same_bits, snapshot, through_a_file
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layouts import LAYOUTS, SEEDS, SHAPES, TENSORS, laid_out
from torch import Tensor
from twin import Twin

from fused_sam import FusedSAM, ReferenceSAM
from fused_sam.backends.memory import overlaps_itself

BASES = {
    "sgd": (torch.optim.SGD, {"momentum": 0.87, "dampening": 0.3, "weight_decay": 0.017}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.87, "nesterov": True, "weight_decay": 0.017}),
    "plain": (torch.optim.SGD, {"weight_decay": 0.017}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.017, "eps": 0.01}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.17, "eps": 0.01, "amsgrad": True}),
}
GRADIENTS = st.sampled_from(["none", "random", "laid out", "expanded", "zero", "tiny", "huge", "held"])
# Options of FusedSAM that go together, beside those that go with all.
MODES = st.sampled_from(
    [
        *[{}] * 3,
        {"ascent_steps": 2},
        {"interval": 2, "start": 1},
        {"interval": 2, "looksam_alpha": 0.4},
        {"direction": "momentum"},
        {"direction": "momentum", "interval": 2},
    ]
)


class Calls(RuleBasedStateMachine):
    """On float64 parameters."""

    backend = "native"
    ps = (1.0, 1.5, 2.0, 2.0, 2.0, 7.0, math.inf)
    dtypes = (torch.float64,)

    @initialize(
        tensors=TENSORS,
        seed=SEEDS,
        base=st.sampled_from(sorted(BASES)),
        data=st.data(),
        adaptive=st.sampled_from([False, True, "weights"]),
        maximize=st.booleans(),
        mode=MODES,
    )
    def make(
        self, tensors: Any, seed: int, base: str, data: st.DataObject, adaptive: Any, maximize: bool, mode: Any
    ) -> None:
        """Two groups, the second with options of its own, and a spare tensor for a group to come."""
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = data.draw(st.sampled_from(self.dtypes))
        params = [laid_out(*tensor, self.generator, self.dtype).requires_grad_() for tensor in tensors]
        self.params, self.twins = params, [self.double(x.detach()) for x in params]
        mode = {"direction": "gradient", **mode}
        if base == "plain":
            mode["direction"] = "gradient"
        along_momentum = mode["direction"] == "momentum"
        self.p = 2.0 if along_momentum else data.draw(st.sampled_from(self.ps))
        decays = base != "adamw" and not along_momentum and self.decays_in_ascent() and data.draw(st.booleans())
        self.base_class, base_options = BASES[base]
        self.base_options = {"lr": 0.013, "maximize": maximize, **base_options}
        self.options = {"rho": 0.07, "adaptive": adaptive, "p": self.p, "eta": 0.013, "decay_in_ascent": decays}
        self.mode = {"max_grad_norm": data.draw(self.clipping()), **mode}
        self.second = {"rho": 0.21, "adaptive": False, "weight_decay": 0.05, "perturb": data.draw(st.booleans())}
        self.optimizer = self.fused(self.groups(params))
        name = base if base in ("adam", "adamw") else "sgd"
        steps = self.mode.pop("ascent_steps", 1)
        sam = ReferenceSAM(self.groups(self.twins), **self.options, base=name, ascent_steps=steps, **self.base_options)
        self.twin = Twin(sam, **self.mode)
        self.mode["ascent_steps"] = steps
        self.held: list[tuple[Tensor, Tensor]] = []

    def decays_in_ascent(self) -> bool:
        return True

    def clipping(self) -> st.SearchStrategy[float | None]:
        return st.sampled_from([None, None, 0.7])

    @staticmethod
    def double(x: Tensor) -> Tensor:
        return x.to(torch.float64).clone(memory_format=torch.contiguous_format)

    def groups(self, tensors: list[Tensor]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": tensors[:2]}]
        if len(tensors) > 2:
            groups.append({"params": tensors[2:], **self.second})
        return groups

    def fused(self, groups: list[dict[str, Any]]) -> FusedSAM:
        options = {**self.options, **self.mode, **self.base_options}
        return FusedSAM(groups, self.base_class, backend=self.backend, **options)

    def scale_of(self, kind: str) -> float:
        return {"zero": 0.0, "tiny": 1e-90, "huge": 1e90}.get(kind, 1.0)

    def give_gradient(self, index: int, kind: str) -> None:
        p, twin = self.params[index], self.twins[index]
        if kind == "none":
            p.grad = twin.grad = None
            return
        shape = () if kind == "expanded" else p.shape
        g = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(p.dtype).expand(p.shape)
        if kind == "laid out" and p.dim() >= 2:
            strides = torch.empty(p.shape[::-1]).permute(*range(p.dim())[::-1]).stride()
            g = torch.empty_strided(p.shape, strides, dtype=p.dtype).copy_(g)
        if self.scale_of(kind) != 1.0:
            g = g * self.scale_of(kind)
        p.grad, twin.grad = g, self.double(g)
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
        self.twin.ascend(zero_grad)

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
            self.optimizer.step()
        self.descend()
        if second and zero_grad:
            assert all(p.grad is None for p in self.params)
            self.twin.clear()

    def descend(self) -> None:
        """The twin's base step; then what the two have rounded differently is made the same, or is forgotten."""
        self.twin.descend()
        self.settle()

    def settle(self) -> None:
        if self.writes_gradients():
            # As clip_grad_norm_ does. An expanded one cannot be written, and stays or is replaced.
            self.held = []
            for p, twin in zip(self.params, self.twins):
                if p.grad is not None and not overlaps_itself(p.grad):
                    torch.testing.assert_close(p.grad, twin.grad.to(p.grad), rtol=1e-9, atol=1e-9)
                twin.grad = None if p.grad is None else self.double(p.grad)
        # Of two parallel gradients, as all are that have one element, LookSAM keeps what the rounding left.
        parts = list(self.twin.parts.values())
        if parts and max(float(v.abs().max()) if v.numel() else 0.0 for v in parts) < 1e-3:
            for p, twin in zip(self.params, self.twins):
                if twin in self.twin.parts:
                    self.twin.parts[twin].zero_()
                    self.optimizer.state[p]["orthogonal_grad"].zero_()

    def writes_gradients(self) -> bool:
        return self.mode["max_grad_norm"] is not None or "looksam_alpha" in self.mode

    def has_huge(self) -> bool:
        return any(p.grad is not None and p.grad.numel() and float(p.grad.abs().max()) > 1e20 for p in self.params)

    def loss(self, leaves: list[Tensor], number: int) -> Tensor:
        """Of one of several batches."""
        return sum(((0.5 + i + number) * (x * x).sum() + (0.3 * x).sin().sum() for i, x in enumerate(leaves)))

    @precondition(lambda self: not self.has_huge())
    @rule(fails=st.sampled_from([None, None, 0, 1, 3]), count=st.sampled_from([1, 1, 2, 3]))
    def closure(self, fails: int | None, count: int) -> None:
        if self.optimizer.perturbed:
            with pytest.raises(RuntimeError, match="after first_step"):
                self.optimizer.step([lambda: None])
            return
        count = 1 if "looksam_alpha" in self.mode else count
        before = snapshot(self.params)
        calls: list[int] = []

        def run(tensors: list[Tensor], number: int) -> Tensor:
            if tensors is self.params:
                calls.append(1)
                if fails is not None and len(calls) > fails:
                    raise KeyboardInterrupt
            with torch.enable_grad():
                leaves = tensors if tensors is self.params else [t.detach().requires_grad_() for t in tensors]
                loss = self.loss(leaves, number)
                loss.backward()
            if leaves is not tensors:
                for t, leaf in zip(tensors, leaves):
                    t.grad = leaf.grad
            return loss.detach()

        of_params = [lambda k=k: run(self.params, k) for k in range(count)]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "step\\(closure\\)")  # of gradients that are there before
                self.optimizer.step(of_params if count > 1 else of_params[0])
        except KeyboardInterrupt:
            assert_same_bits(self.params, before)
            self.optimizer.zero_grad()
            self.twin.clear()
            return
        self.twin.step([lambda k=k: run(self.twins, k) for k in range(count)])
        self.settle()

    @rule()
    def restore(self) -> None:
        self.optimizer.restore()
        self.twin.restore()

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
            twin.grad = None if p.grad is None else self.double(p.grad)

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
    def save_and_load(self) -> None:
        saved = through_a_file(self.optimizer.state_dict())
        self.optimizer = self.fused([{"params": g["params"]} for g in self.optimizer.param_groups])
        self.optimizer.load_state_dict(saved)

    @precondition(lambda self: not self.optimizer.perturbed and len(self.params) < 8)
    @rule(tensor=st.tuples(SHAPES, LAYOUTS), rho=st.sampled_from([0.0, 0.11]))
    def add_group(self, tensor: Any, rho: float) -> None:
        p = laid_out(*tensor, self.generator, self.dtype).requires_grad_()
        twin = self.double(p.detach())
        self.params.append(p)
        self.twins.append(twin)
        self.optimizer.add_param_group({"params": [p], "rho": rho})
        groups = self.twin.sam.param_groups
        defaults = {**{k: v for k, v in groups[0].items() if k != "params"}, "adaptive": self.options["adaptive"]}
        groups.append({**defaults, "rho": rho, "params": [twin]})

    def started(self) -> bool:
        return hasattr(self, "held")

    @invariant()
    def agrees_with_the_reference(self) -> None:
        if not self.started():
            return
        for i, (p, twin) in enumerate(zip(self.params, self.twins)):
            if not torch.allclose(p.detach(), twin, rtol=1e-9, atol=1e-9):  # ten times cheaper than the next line
                torch.testing.assert_close(p.detach(), twin, rtol=1e-9, atol=1e-9, msg=lambda m, i=i: f"{i}: {m}")

    @invariant()
    def knows_what_comes_next(self) -> None:
        if self.started():
            assert self.optimizer.perturb_next == self.twin.due
            assert self.optimizer.perturbed == (self.twin.ascended > 0)

    @invariant()
    def held_gradients_are_untouched(self) -> None:
        for g, copy in getattr(self, "held", []):
            assert_same_bits([g], [copy])


class EagerCalls(Calls):
    """The same on torch operations."""

    backend = "eager"
