"""Mistakes of the loop around a step that can be seen without waiting for the device. Each is warned of once."""

from __future__ import annotations

import dis
import functools
import itertools
import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from fused_sam.backends.interface import TensorList
from fused_sam.callers import warn
from fused_sam.ops.lists import first_present, has_grad

NO_FIRST = (
    "No parameter has a gradient at first_step(): the weights stay at w, and the step is one of the base optimizer. "
    "Call loss.backward() before it, or in the closure."
)
NO_SECOND = (
    "No parameter has a gradient at w + e: the step updates nothing. Call loss.backward() between first_step() and "
    "step(), too."
)
SUM = (
    "The second gradients seem to have been added to the first: nothing has cleared them between. The step then "
    "takes g1 + g2. Call first_step(zero_grad=True), or zero_grad() after it."
)
NO_FORWARD = (
    "No training forward of the model has moved the weights since the last step, which is one of the base optimizer "
    "then. ascend_on_forward() must be given the model that the loop calls."
)
SCALED = (
    "step(closure) with a GradScaler: the closure seems to scale its loss, and nothing unscales the gradients, so that "
    "the step is too long by the scale. Use first_step() and then scaler.step(optimizer); bf16 needs no scaler."
)


@dataclass
class First:
    """What is remembered of the first gradients: a parameter that had one, and whether the second was added to it.

    Not the gradient, whose memory may be wanted.
    """

    param: Tensor
    is_sum: bool = False
    hook: Any = None

    def watch(self, grad: Tensor) -> None:
        """Look at the next backward that comes to this gradient, which was left in p.grad."""
        identity, version = id(grad), grad._version
        seen = False

        def look(p: Tensor) -> None:
            nonlocal seen
            # Cleared in place it would have been written twice.
            if not seen and p.grad is not None:
                self.is_sum = id(p.grad) == identity and p.grad._version == version + 1
            seen = True

        if self.param.requires_grad and self.param.is_leaf:
            self.hook = self.param.register_post_accumulate_grad_hook(look)

    def forget(self) -> None:
        """Look no more."""
        self.hook.remove()
        self.hook = None


def first_of(tensors: list[Tensor], grads: TensorList, left: bool) -> First | None:
    """Return what `look_at_second` compares with; None without any gradient."""
    index = first_present(grads)
    if index is None:
        return None
    first = First(tensors[index])
    if left:
        first.watch(grads[index])
    return first


def look_at_second(first: First | None, groups: list[dict[str, Any]]) -> str | None:
    """Return what to warn of in the gradients of the second pass; None where there is nothing."""
    if first is None or not has_grad(first.param):
        return None if any(has_grad(p) for group in groups for p in group["params"]) else NO_SECOND
    return SUM if first.is_sum else None


def scales_loss(closure: Any) -> bool:
    """Return whether a closure asks an enabled GradScaler for its ``scale``: by its code, without a call."""
    while isinstance(closure, functools.partial):
        closure = closure.func
    code = getattr(closure, "__code__", None)
    if code is None or "scale" not in code.co_names:
        return False
    function = getattr(closure, "__func__", closure)
    cells = zip(code.co_freevars, function.__closure__ or ())
    arguments = code.co_varnames[code.co_argcount - len(function.__defaults__ or ()) : code.co_argcount]
    known = [(name, function.__globals__.get(name)) for name in code.co_names]
    known += [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]
    known += zip(arguments, function.__defaults__ or ())
    owners = [getattr(closure, "__self__", None), *(x for _, x in known)]
    known += [(name, vars(x).get(name)) for x in owners if hasattr(x, "__dict__") for name in code.co_names]
    scalers = {name for name, x in known if isinstance(x, GradScaler) and x.is_enabled()}
    read = [instruction.argval for instruction in dis.get_instructions(code) if instruction.argval is not None]
    return any(attribute == "scale" and name in scalers for name, attribute in itertools.pairwise(read))


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
        """Give a warning, unless it has been given."""
        if message not in self.given:
            self.given.add(message)
            warn(message)
