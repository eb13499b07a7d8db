"""Ctrl-C at any moment of a step: the weights are those before it or those after it, and the state goes with them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import HYPER, LARGE, RHO, bits
from modes import MODES
from torch import Tensor

import fused_sam
from fused_sam import FusedSAM

PACKAGE = str(Path(fused_sam.__file__).parent)
ADAM = {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.017}
# Of these, too, what eager has done to the state by then stays done, as with torch.optim's own for-loop.
ALL_OR_NOTHING = ("native", "emulated")


# An interrupt in the last lines of step(closure) leaves gradients, of which the next one speaks.
pytestmark = pytest.mark.filterwarnings("ignore:step.closure. starts without gradients:UserWarning")


class InterruptAt:
    """A trace function that raises KeyboardInterrupt when line or call number ``n`` of the package is reached."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.where: str | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> InterruptAt | None:
        code = frame.f_code
        # Python ignores what is raised while it closes a generator expression that has not run to its end.
        if not code.co_filename.startswith(PACKAGE) or code.co_name == "<genexpr>":
            return None
        if event in ("line", "call"):
            if self.left == 0:
                self.where = f"{Path(code.co_filename).name}:{frame.f_lineno}"
                self.left -= 1
                raise KeyboardInterrupt
            self.left -= 1
        return self


class Training:
    """An optimizer on small parameters and a large one, stepped with gradients known in advance."""

    def __init__(
        self, base: type[torch.optim.Optimizer], options: dict[str, Any], form: str, backend: str, small: int = 1
    ) -> None:
        generator = torch.Generator().manual_seed(11)
        sizes = [5] * small + [LARGE]
        dtype = torch.bfloat16 if "master_weights" in options else torch.float32
        self.params = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in sizes]
        self.grads = [[torch.randn(n, generator=generator).to(dtype) for n in sizes] for _ in range(2)]
        self.opt = FusedSAM(self.params, base, rho=RHO, backend=backend, **options)
        self.form = form

    def backward(self, which: int) -> Tensor:
        for p, g in zip(self.params, self.grads[which], strict=True):
            p.grad = g.clone()
        return torch.tensor(0.7)

    def step(self) -> None:
        closure = lambda: self.backward(int(self.opt.perturbed))  # noqa: E731
        if self.form == "closure":
            self.opt.step(closure)
            return
        if self.form == "micro-batches":
            self.opt.step([closure, closure])
            return
        self.backward(0)
        self.opt.first_step(zero_grad=True)
        self.backward(1)
        self.opt.step()

    def interrupted(self, n: int) -> str | None:
        """One step with an interrupt; where it came, None if the step was over before."""
        at = InterruptAt(n)
        before = sys.gettrace()
        sys.settrace(at)
        try:
            self.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # off where the interrupt came between a function's end and torch's call
        return at.where

    @property
    def weights(self) -> list[bytes]:
        return [bits(p) for p in self.params]

    @property
    def state(self) -> list[dict[str, bytes]]:
        entries = [self.opt.state.get(p, {}) for p in self.params]
        return [{key: bits(value) for key, value in entry.items()} for entry in entries]


@pytest.mark.parametrize(
    ("base", "options", "form", "before"),
    [
        (torch.optim.SGD, HYPER, "closure", 0),
        (torch.optim.SGD, HYPER, "two calls", 1),
        (torch.optim.AdamW, ADAM, "closure", 1),
        (torch.optim.AdamW, ADAM, "two calls", 0),
        (torch.optim.SGD, HYPER, "micro-batches", 1),
        (torch.optim.SGD, {**HYPER, **MODES["interval"]}, "closure", 1),
        (torch.optim.SGD, {**HYPER, **MODES["interval"]}, "closure", 2),
        (torch.optim.AdamW, {**ADAM, **MODES["LookSAM"]}, "closure", 1),
        (torch.optim.SGD, {**HYPER, **MODES["LookSAM"]}, "closure", 2),
        (torch.optim.SGD, {**HYPER, **MODES["MSAM"]}, "closure", 1),
        (torch.optim.SGD, {**HYPER, **MODES["clipping"]}, "closure", 1),
        (torch.optim.SGD, {**HYPER, **MODES["p=1"]}, "closure", 1),
        (torch.optim.AdamW, {**ADAM, "master_weights": True}, "closure", 1),
    ],
    ids=[
        *(
            "SGD first",
            "SGD",
            "AdamW",
            "AdamW first",
            "micro-batches",
            "interval",
            "at w",
            "LookSAM between",
            "LookSAM",
            "MSAM",
        ),
        *("clipping", "p=1", "masters"),
    ],
)
def test_an_interrupt_anywhere_in_a_step_leaves_it_made_or_not_made(
    base: type[torch.optim.Optimizer], options: dict[str, Any], form: str, before: int, backend: str, device: str
) -> None:
    if backend not in (*ALL_OR_NOTHING, "eager") or device != "cpu":
        pytest.skip("at every line of Python: on the backends of the CPU")
    new = options not in (HYPER, ADAM)
    straight = Training(base, options, form, backend)
    trajectory, has_copy = [], backend in ALL_OR_NOTHING
    for step in range(before + 3):
        # Of w, that is, while eager goes through the update in many calls.
        has_copy |= step == before and straight.opt.perturb_next and "master_weights" not in options
        trajectory.append((straight.weights, straight.state))
        straight.step()
    not_made, made = trajectory[before : before + 2]
    outcomes = set()
    each = not new and (backend == "native" or (backend == "eager" and form == "closure"))
    n, stride = 0, 1 if each or os.environ.get("FUSED_SAM_SOAK") else 7
    while True:
        training = Training(base, options, form, backend)
        for _ in range(before):
            training.step()
        where = training.interrupted(n)
        if where is None:
            break
        training.opt.restore()
        assert not training.opt.perturbed, where
        assert not has_copy or training.weights in (not_made[0], made[0]), where
        is_made = training.weights == made[0]
        if backend in ALL_OR_NOTHING:
            assert training.state == (made if is_made else not_made)[1], where
            training.step()
            assert (training.weights, training.state) == trajectory[before + 1 + is_made], where
        outcomes.add(is_made)
        n += stride
    assert outcomes == {False, True}


def test_new_state_goes_if_the_update_fails(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a step at w, where there is nothing else to undo."""
    params = [torch.randn(n, device=device).requires_grad_() for n in (5, LARGE)]
    for base, options in ((torch.optim.SGD, HYPER), (torch.optim.AdamW, ADAM)):
        opt = FusedSAM(params, base, rho=RHO, backend=backend, start=9, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        w = [bits(p) for p in params]
        with monkeypatch.context() as patch:

            def fail(*arguments: object, **options: object) -> None:
                raise MemoryError

            patch.setattr("fused_sam.ops.descent.route", fail)
            with pytest.raises(MemoryError):
                opt.step()
        assert not opt.state
        assert [bits(p) for p in params] == w
        opt.step()
        assert [bits(p) for p in params] != w
        assert len(opt.state) == 2
