"""The closure form of a step: one closure for the whole batch, or a list of them, each with an e of its own.

The second is m-sharpness (Foret et al. 2021, section 4.1) on one device: with k closures of m examples,

    g = 1/k sum_i grad L_i(w + e_i),    e_i = rho grad L_i(w) / ||grad L_i(w)||_2

and one base step at w with g. Like `fused_sam.bases`, it works closely with `FusedSAM`.
"""

from __future__ import annotations

import itertools
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fused_sam import descents, ops, rng, second_order
from fused_sam.dynamo import untraced
from fused_sam.telemetry import Report, measured, stacked

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM

Closure: TypeAlias = Callable[[], Any]
Closures: TypeAlias = Closure | Sequence[Closure]


def step(optimizer: FusedSAM, closure: Closures, ascent: Closures | None = None) -> Any:
    """A whole step; arguments, result and errors are those of `FusedSAM.step`."""
    _check(optimizer, closure, ascent)
    if optimizer.perturbed:
        raise RuntimeError("step(closure) after first_step(): finish with step() without a closure, or restore().")
    if getattr(optimizer, "found_inf", None) is not None:
        raise RuntimeError(
            "step(closure) under a GradScaler: it has looked at the gradients before the closure made any. Use "
            "first_step() and then scaler.step(optimizer)."
        )
    _warn_of_lost(optimizer)
    try:
        first: Any = closure if ascent is None else ascent
        if callable(closure):
            loss, report = _gradient(optimizer, closure, first)
        else:
            loss, report = _mean_gradient(optimizer, list(zip(closure, first)))
        descents.descend(optimizer, report)
    except BaseException:
        optimizer.restore()
        raise
    finally:
        optimizer._cleared = False
    return loss


def _warn_of_lost(optimizer: FusedSAM) -> None:
    """Once: gradients that a backward outside of the closure has left take no part in the step."""
    if not optimizer._cleared or optimizer._warned or all(p.grad is None for p in optimizer._flat_params()):
        return
    optimizer._warned = True
    warnings.warn(
        "step(closure) starts without gradients: what a backward before it has left is lost. To accumulate, put every "
        "backward into the closure, or give step a list of closures. (Lightning: accumulate_grad_batches must be 1.)",
        stacklevel=6,
    )


def _check(optimizer: FusedSAM, closure: Any, ascent: Any) -> None:
    _check_one("closure", closure)
    if not callable(closure) and len(closure) > 1 and optimizer.reuse is not None:
        raise ValueError(f"Invalid list of {len(closure)} closures with reuse={optimizer.reuse}. Must be one closure.")
    if ascent is None:
        return
    _check_one("ascent", ascent)
    if optimizer.direction == "momentum":
        raise ValueError("Invalid ascent with direction='momentum', which takes no gradient at w. Must be None.")
    if callable(closure) != callable(ascent) or (not callable(closure) and len(closure) != len(ascent)):
        raise ValueError(f"Invalid {ascent=}. Must be one callable for one closure, or a list as long as theirs.")


def _check_one(name: str, closure: Any) -> None:
    if callable(closure):
        return
    if not isinstance(closure, list | tuple) or not all(map(callable, closure)):
        raise TypeError(f"Invalid {name}={closure!r}. Must be a callable, or a list or tuple of callables.")
    if not closure:
        raise ValueError(f"Invalid {name}={closure!r}. Must hold a callable for each group of examples.")


def _gradient(optimizer: FusedSAM, closure: Closure, ascent: Closure) -> tuple[Any, Report]:
    """Both passes: the gradient at w + e in p.grad, with the weights still there. Also the loss at w.

    In a step that is not perturbed one pass, and all at w.
    """
    optimizer.zero_grad()
    if not optimizer.perturb_next:
        loss = _run(closure)
        return loss, measured(optimizer, loss)
    if optimizer.direction == "momentum":
        optimizer._ascend(take_grads=False)
        loss = _run(closure)
        return loss, measured(optimizer, None, loss)
    state = rng.capture({p.device for p in optimizer._flat_params()}) if optimizer.replay_rng else None
    loss = _run(ascent)
    if optimizer.second_order:
        loss_perturbed = second_order.second_pass(optimizer, lambda: _run(closure, state))
        return loss, measured(optimizer, loss, loss_perturbed)
    optimizer._ascend(take_grads=True)
    while optimizer.perturb_next:
        _run(ascent, state)
        optimizer._ascend(take_grads=True)
    loss_perturbed = _run(closure, state)
    return loss, measured(optimizer, loss, loss_perturbed)


def _run(closure: Closure, state: Any = None) -> Any:
    """What the closure returns; from a random state, if given."""
    if state is not None:
        rng.replay(state)
    with torch.enable_grad():
        return closure()


def _mean_gradient(optimizer: FusedSAM, pairs: Sequence[tuple[Closure, Closure]]) -> tuple[Any, Report]:
    """The mean of the closures' second gradients in p.grad. Also the mean loss.

    With several closures the weights are at w + e of the last one then, for the base step to restore in its own pass.
    """
    if len(pairs) == 1:
        loss, report = _gradient(optimizer, *pairs[0])
        return _mean([loss]), stacked([report])
    means: dict[Tensor, Tensor] = {}
    losses, reports = [], []
    for number, (closure, ascent) in enumerate(pairs, start=1):
        with optimizer._peers.deferred():
            loss, report = _gradient(optimizer, closure, ascent)
        losses.append(loss.detach() if isinstance(loss, Tensor) else loss)  # a graph would keep memory
        reports.append(report)
        if number < len(pairs):
            _average(optimizer, means, number, optimizer._ascent.journal if optimizer._ascent else None)
            optimizer.restore()
        else:
            _average(optimizer, means, number, None)
    for p in optimizer._flat_params():
        p.grad = means.get(p)
    return _mean(losses), stacked(reports)


@untraced
def _average(optimizer: FusedSAM, means: dict[Tensor, Tensor], count: int, journal: ops.Journal | None) -> None:
    """The mean of the gradients of ``count`` closures from that of all but the last one, whose p.grad is there now.

        mean_k = mean_(k-1) + (g_k - mean_(k-1)) / k

    No pass divides a sum at the end, no sum overflows in 16 bits, and the mean of equal gradients is theirs exactly.
    The first gradient is copied, and not taken: it may be a view of a buffer into which the next backward writes. In
    the same pass what the journal holds is undone.
    """
    optimizer._peers.place_grads(optimizer)
    places, grads, kinds = [], [], []
    for i, p in enumerate(params := optimizer._flat_params()):
        mean, grad, kind = means.get(p), p.grad, (1 / count, False)
        if grad is None:
            if mean is None:
                continue
            grad, kind = mean, ((count - 1) / count, True)  # the gradient is zero
        elif mean is None:
            means[p], kind = torch.empty_like(grad), (1 / count, True)
        places.append(i)
        grads.append(grad)
        kinds.append(kind)
    groups = [ops.MeanGroup(len(list(run)), *kind) for kind, run in itertools.groupby(kinds)]
    local = optimizer._peers.local
    try:
        ops.restore_accumulate(
            local([means[params[i]] for i in places]), local(grads), groups, journal, optimizer.backend
        )
    except ops.InvalidTensor as error:
        raise optimizer._named(ops.InvalidTensor(places[error.index], error.reason)) from None


def _mean(losses: list[Any]) -> Any:
    """The mean of numbers, or of tensors of one element, as a tensor; anything else as it is."""
    if all(isinstance(x, Tensor) and x.numel() == 1 for x in losses):
        return torch.stack([x.detach().reshape(()) for x in losses]).mean()
    if all(isinstance(x, numbers.Real) for x in losses):
        return sum(losses) / len(losses)
    return losses
