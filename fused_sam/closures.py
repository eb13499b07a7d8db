"""The closure form of a step: one closure for the whole batch, or a list, each with a perturbation of its own.

The second is m-sharpness (Foret et al. 2021, section 4.1) on one device: with k closures of m examples,

    g = 1/k sum_i grad L_i(w + e_i),    e_i = rho grad L_i(w) / ||grad L_i(w)||_2

and one base step at w with g.
"""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_sam import mistakes, ops, rng
from fused_sam.ascent import second_order
from fused_sam.backends.interface import AccumulateGroup, InvalidTensor, Journal
from fused_sam.options import ASCENT_CLOSURE, CLOSURES, USE_GRADIENTS, refuse
from fused_sam.report import Report, stacked
from fused_sam.step import Step, untraced

Closure: TypeAlias = Callable[[], Any]
Closures: TypeAlias = Closure | Sequence[Closure]


@torch.no_grad()
def run(
    step: Step,
    closure: Closures,
    zero_grad: Callable[[], Any],
    ascent: Closures | None = None,
    scaled: bool = False,
    use_gradients: bool = False,
) -> Any:
    """Make a whole step; arguments, result and errors are those of `FusedSAM.step`.

    At w + e only the second half: the closure is run once. ``zero_grad`` is the optimizer's, which a subclass may have
    its own of. ``scaled``: whether a GradScaler has looked at gradients.
    """
    _check(step, closure, ascent, use_gradients)
    if not step.once.looked:
        step.once.looked = True
        if any(map(mistakes.scales_loss, [closure] if callable(closure) else closure)):
            step.once.warn(mistakes.SCALED)
    if scaled:
        raise RuntimeError(
            "step(closure) under a GradScaler: it has looked at the gradients before the closure made any. Use "
            "first_step() and then scaler.step(optimizer)."
        )
    # Where forwards move the weights a closure makes the only pass, and gradients before it are of other micro-batches.
    second_half = step.displacement is not None or step.forwards is not None
    if step.displacement is not None and step.is_ascent_due:
        raise RuntimeError("step(closure) after first_step(): another first_step() is due. Or call restore().")
    if second_half and (ascent is not None or not callable(closure)):
        raise RuntimeError("step(closure) after first_step(): takes one closure, at w + e. Or call restore().")
    try:
        if second_half and callable(closure):  # without zeroing: wrappers pass a closure that does nothing
            loss, report = _call(closure), None
        elif use_gradients and callable(closure):
            loss, report = _second_gradient(step, closure)
        else:
            _look_for_lost(step, closure)
            first: Any = closure if ascent is None else ascent
            if callable(closure):
                loss, report = _gradient(step, closure, first, zero_grad)
            else:
                loss, report = _mean_gradient(step, list(zip(closure, first)), zero_grad)
        step.descend(seen=report)
    except BaseException:
        step.restore()
        raise
    finally:
        step.cleared = False
    return loss


def _look_for_lost(step: Step, closure: Any) -> None:
    """Warn, once, of gradients that a backward outside of the closure has left: they take no part in the step.

    Raises:
        RuntimeError: where Lightning's automatic optimization has left them, which accumulates there.
    """
    if not step.cleared or all(p.grad is None for p in step.parameters.tensors()):
        return
    innermost = closure.args[-1] if isinstance(closure, functools.partial) and closure.args else None
    if type(innermost).__module__.partition(".")[0] in ("lightning", "pytorch_lightning"):
        raise RuntimeError(
            "step(closure) starts without gradients, and those of earlier batches would be lost. Lightning's "
            "accumulate_grad_batches must be 1, or the module a fused_sam.integrations.lightning.SAMModule."
        )
    step.once.warn(
        "step(closure) starts without gradients: what a backward before it has left is lost. To make these the first "
        "gradients, call step(closure, use_gradients=True). To accumulate, put every backward into the closure, or "
        "give step a list of closures."
    )


def _check(step: Step, closure: Any, ascent: Any, use_gradients: bool) -> None:
    _check_one("closure", closure)
    if use_gradients:
        refuse(step.options, USE_GRADIENTS)
        if not callable(closure) or ascent is not None:
            raise ValueError(f"Invalid {use_gradients=}. Must be False with a list of closures, or one for the ascent.")
    if not callable(closure) and len(closure) > 1:
        refuse(step.options, CLOSURES)
    if ascent is None:
        return
    _check_one("ascent", ascent)
    refuse(step.options, ASCENT_CLOSURE)
    if callable(closure) != callable(ascent) or (not callable(closure) and len(closure) != len(ascent)):
        raise ValueError(f"Invalid {ascent=}. Must be one callable for one closure, or a list as long as theirs.")


def _check_one(name: str, closure: Any) -> None:
    if callable(closure):
        return
    if not isinstance(closure, list | tuple) or not all(map(callable, closure)):
        raise TypeError(f"Invalid {name}={closure!r}. Must be a callable, or a list or tuple of callables.")
    if not closure:
        raise ValueError(f"Invalid {name}={closure!r}. Must hold a callable for each group of examples.")


def _gradient(step: Step, closure: Closure, ascent: Closure, zero_grad: Callable[[], Any]) -> tuple[Any, Report]:
    """Make both passes: the gradient at w + e is in p.grad then, with the weights still there. Return the loss at w.

    In a step that is not perturbed one pass, and all at w.
    """
    zero_grad()
    if not step.is_ascent_due:
        loss = _call(closure)
        return loss, step.make_report(loss)
    if not step.perturbation.takes_gradient:
        step.ascend(take_grads=False)
        loss = _call(closure)
        return loss, step.make_report(None, loss)
    replays = step.options.replay_rng
    state = rng.capture({p.device for p in step.parameters.tensors()}) if replays else None
    loss = _call(ascent)
    if step.options.second_order:
        loss_perturbed = _second_order_pass(step, closure, state)
        return loss, step.make_report(loss, loss_perturbed)
    step.ascend(take_grads=True)
    while step.is_ascent_due:
        _call(ascent, state)
        step.ascend(take_grads=True)
    loss_perturbed = _call(closure, state)
    return loss, step.make_report(loss, loss_perturbed)


def _second_gradient(step: Step, closure: Closure) -> tuple[Any, Report]:
    """Go on from the gradient at w, which is in p.grad, to that at w + e. Return the loss there.

    In a step that is not perturbed there is nothing more to make, and no loss.
    """
    if not step.is_ascent_due:
        return None, step.make_report()
    step.ascend(take_grads=True)
    while step.is_ascent_due:
        _call(closure)
        step.ascend(take_grads=True)
    loss = _call(closure)
    return loss, step.make_report(None, loss)


def _second_order_pass(step: Step, closure: Closure, state: Any) -> Any:
    """Leave the whole gradient of L(w + e(w)) in p.grad, with the weights back at w. Return the loss at w + e."""
    tensors = step.parameters.tensors()
    es = second_order.displacements_of(step.parameters, step.options.p)
    with second_order.unseen(tensors):
        step.ascend(take_grads=True)
        loss = _call(closure, state)
        displacement = step.displacement
        step.restore()
    step.displacement = displacement  # which has been undone, for the report
    second_order.add_term(tensors, es)
    return loss


def _call(closure: Closure, state: Any = None) -> Any:
    """Return what the closure returns; from a random state, if given."""
    if state is not None:
        rng.replay(state)
    with torch.enable_grad():
        return closure()


def _mean_gradient(
    step: Step, pairs: Sequence[tuple[Closure, Closure]], zero_grad: Callable[[], Any]
) -> tuple[Any, Report]:
    """Leave the mean of the closures' second gradients in p.grad. Return the mean loss.

    With several closures the weights are at w + e of the last one then, for the base step to restore in its own pass.
    """
    if len(pairs) == 1:
        loss, report = _gradient(step, *pairs[0], zero_grad)
        return _mean([loss]), stacked([report])
    means: dict[Tensor, Tensor] = {}
    losses, reports = [], []
    for number, (closure, ascent) in enumerate(pairs, start=1):
        with step.peers.deferred():
            loss, report = _gradient(step, closure, ascent, zero_grad)
        losses.append(loss.detach() if isinstance(loss, Tensor) else loss)  # a graph would keep memory
        reports.append(report)
        if number < len(pairs):
            _average(step, means, number, step.displacement.journal if step.displacement else None)
            step.restore()
        else:
            _average(step, means, number, None)
    for p in step.parameters.tensors():
        p.grad = means.get(p)
    return _mean(losses), stacked(reports)


@untraced
def _average(step: Step, means: dict[Tensor, Tensor], count: int, journal: Journal | None) -> None:
    """Take in the gradients of the last of ``count`` closures, which are in p.grad, into the mean of those before it.

        mean_k = mean_(k-1) + (g_k - mean_(k-1)) / k

    No pass divides a sum at the end, no sum overflows in 16 bits, and the mean of equal gradients is theirs exactly.
    The first gradient is copied, and not taken: it may be a view of a buffer into which the next backward writes. In
    the same pass what the journal holds is undone.
    """
    parameters = step.parameters
    step.peers.place_grads(parameters)
    places, grads, kinds = [], [], []
    for i, p in enumerate(params := parameters.tensors()):
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
    groups = [AccumulateGroup(len(list(run)), *kind) for kind, run in itertools.groupby(kinds)]
    local = parameters.local
    of_places = local([means[params[i]] for i in places])
    try:
        ops.restore_accumulate(of_places, local(grads), groups, journal, parameters.backend)
    except InvalidTensor as error:
        raise parameters.named(InvalidTensor(places[error.index], error.reason)) from None


def _mean(losses: list[Any]) -> Any:
    """Return the mean of numbers, or of tensors of one element, as a tensor; anything else as it is."""
    if all(isinstance(x, Tensor) and x.numel() == 1 for x in losses):
        return torch.stack([x.detach().reshape(()) for x in losses]).mean()
    if all(isinstance(x, numbers.Real) for x in losses):
        return sum(losses) / len(losses)
    return losses
