"""Mistakes of the loop around a step that can be seen without waiting for the device. Each is warned of once."""

from __future__ import annotations

import functools
import sys
import types
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler

from fused_sam.backends.interface import TensorList

_LIBRARIES = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))
NO_FIRST = (
    "No parameter has a gradient at first_step(): the weights stay at w, and the step is one of the base optimizer. "
    "Call loss.backward() before it, or in the closure."
)
NO_SECOND = (
    "No parameter has a gradient at w + e: the step updates nothing. Call loss.backward() between first_step() and "
    "step(), too."
)
SUM = (
    "The second gradients seem to have been added to the first: each was written as often as in one pass. The step "
    "then takes g1 + g2. Call first_step(zero_grad=True), or zero_grad() after it."
)
NO_FORWARD = (
    "No training forward of the model has moved the weights since the last step, which is one of the base optimizer "
    "then. ascend_on_forward() must be given the model that the loop calls."
)
SCALED = (
    "step(closure) with a GradScaler: the closure seems to scale its loss, and nothing unscales the gradients, so that "
    "the step is too long by the scale. Use first_step() and then scaler.step(optimizer); bf16 needs no scaler."
)


class First(NamedTuple):
    """The gradients of the first pass: a parameter that had one, and all that were left in p.grad.

    ``left`` has the identity and the version of each of these. It does not hold them: their memory may be wanted.
    """

    param: Tensor
    left: list[tuple[int, int] | None]


def first_of(tensors: list[Tensor], grads: TensorList, left: bool) -> First | None:
    """Return what `look_at_second` compares with; None without any gradient."""
    for p, grad in zip(tensors, grads):
        if grad is not None:
            return First(p, [None if g is None else (id(g), g._version) for g in grads] if left else [])
    return None


def look_at_second(first: First | None, groups: list[dict[str, Any]]) -> str | None:
    """Return what to warn of in the gradients of the second pass; None where there is nothing."""
    if first is None or first.param.grad is None:
        return None if any(p.grad is not None for group in groups for p in group["params"]) else NO_SECOND
    if not first.left:
        return None
    grads = [p.grad for group in groups for p in group["params"]]
    pairs = [(g, *there) for g, there in zip(grads, first.left) if there is not None]
    if any(g is None or id(g) != identity for g, identity, _ in pairs):
        return None
    # The first of k backwards makes a gradient, some with version 0, and the others write to it. Then k more backwards
    # write k times, and clearing in place would write once more.
    passes = {1, 1 + min(version for _, _, version in pairs)}
    writes = {g._version - version for g, _, version in pairs}
    return SUM if len(writes) == 1 and writes <= passes else None


def scales_loss(closure: Any) -> bool:
    """Return whether a closure seems to call ``scale`` of an enabled GradScaler: by the names in it, without a call."""
    while isinstance(closure, functools.partial):
        closure = closure.func
    names = getattr(getattr(closure, "__code__", None), "co_names", ())
    if "scale" not in names:
        return False
    function = getattr(closure, "__func__", closure)
    known = [getattr(closure, "__self__", None), *(function.__defaults__ or ())]
    known += [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    known += [function.__globals__.get(name) for name in names]
    known += [vars(x).get(name) for x in known if hasattr(x, "__dict__") for name in names]
    return any(isinstance(x, GradScaler) and x.is_enabled() for x in known)


def require_unscaled_second(passes: set[bool]) -> None:
    """Refuse gradients of which a GradScaler thinks that it has unscaled them: it does so once in a step.

    ``passes``: whether the weights were perturbed when it did. Where it was not seen nothing is refused.
    """
    if passes == {False}:
        raise RuntimeError(
            "The second gradients are still scaled: scaler.unscale_(optimizer) was called before first_step(). Call it "
            "after the second backward only: the perturbation does not depend on the scale."
        )


class Once:
    """Warnings that have been given; ``looked``: whether a closure has been looked into."""

    def __init__(self) -> None:
        self.given: set[str] = set()
        self.looked = False

    def warn(self, message: str) -> None:
        """Give a warning at the line that has called us, also by way of torch; unless it has been given."""
        if message in self.given:
            return
        self.given.add(message)
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, stacklevel=level)
