"""restore and the base steps: back to w, and the update with the gradient taken at w + e."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_sam.backends.interface import AccumulateGroup, AdamGroup, Journal, SGDGroup, TensorList
from fused_sam.ops.groups import require_sizes
from fused_sam.ops.journal import AdamStepEntry, bump_versions, copy, roll_back
from fused_sam.ops.lists import all_present, increment_version
from fused_sam.ops.routing import Part, contiguous, route, stand_ins

G = TypeVar("G", bound=Any)  # a group of one of the ops


def restore(params: TensorList, backups: TensorList, backend: str | None = None) -> None:
    """Write w = backup for every parameter that has one, bit for bit.

    Raises:
        InvalidTensor, ValueError: for a backup that does not match its parameter; nothing has been changed then.
    """
    for part in route(backend, [], params, None, backups):
        if part.batch is not None:
            part.batch.restore()
            continue
        copy(part.take(backups), part.take(params))
    bump_versions(params, backups)


def restore_accumulate(
    means: TensorList,
    grads: TensorList,
    groups: list[AccumulateGroup],
    journal: Journal | None = None,
    backend: str | None = None,
) -> None:
    """Write w = backup wherever the journal says that w is displaced, and a running mean of gradients, in one pass:

        mean = mean + weight * (g - mean)        weight * g in groups that say ``first``, where g may be the mean itself

    computed as torch's lerp, 16-bit means in fp32. A mean without a gradient stays. The journal is cleared as soon as
    there is nothing left to undo.

    Raises:
        InvalidTensor, ValueError: for a gradient that does not match its mean in device and shape, or in dtype as far
            as the two cannot mix, and for means that overlap; nothing has been changed then.
    """
    require_sizes(means, groups)
    journal = [] if journal is None else journal
    parts = route(backend, groups, means, grads)
    restored: Any = journal[0] if len(journal) == 1 and _joins(journal[0], parts) else None
    if restored is None:
        roll_back(journal)
    for part in parts:
        if part.batch is not None:
            part.batch.restore_accumulate(restored, part.groups, journal)
            continue
        with stand_ins(part.take(means)) as means_:
            batch = part.backend.batch(means_, contiguous(part.take(grads)))  # type: ignore[arg-type]
            batch.restore_accumulate(None, part.groups, [])
    if restored is not None:
        bump_versions(restored.params, restored)
    bump_versions(means, grads)


def _joins(entry: Any, parts: list[Part]) -> bool:
    """Return whether one call can restore what a journal entry says, and do the parts."""
    if len(parts) != 1 or parts[0].index is not None or parts[0].batch is None:
        return False
    alike = type(entry) is type(parts[0].batch) and entry.joins_update
    return alike and entry.params[0].device == parts[0].device


def sgd_update(
    params: TensorList,
    grads: TensorList,
    backups: TensorList | Any | None,
    momentum_buffers: TensorList | None,
    groups: list[SGDGroup],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
    journal: Journal | None = None,
    masters: TensorList | None = None,
) -> None:
    """Write w = backup (w itself where there is none), then make one step of SGD with the gradients given, in one pass.

        d = (-g if maximize else g) + weight_decay * w
        m = d if first else momentum * m + (1 - dampening) * d
        w = w - lr * (d + momentum * m if nesterov else m if momentum else d)

    Parameters without a gradient are only restored. Momentum buffers are written in place. With ``grad_scale`` (a
    GradScaler's, shape []) the gradients are divided by it in place first; with a nonzero ``found_inf`` (shape [])
    every parameter is only restored. ``backups`` may be `joint_backup` of a journal. ``journal`` is cleared as
    soon as there is nothing left to undo. For a parameter that has a master w is that, and state is fp32 as it is;
    the parameter becomes the master, rounded.

    Raises:
        InvalidTensor, ValueError: as `Ascent`, and for a missing or mismatched momentum buffer; nothing has been
            changed then.
    """
    require_sizes(params, groups)
    _require_state("momentum_buffers", grads, momentum_buffers, groups, lambda group: group.momentum != 0)

    scalars = grad_scale, found_inf, backend, [] if journal is None else journal
    _descend("sgd_update", params, grads, backups, (momentum_buffers,), groups, *scalars, masters)


def adam_update(
    params: TensorList,
    grads: TensorList,
    backups: TensorList | Any | None,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    max_exp_avg_sqs: TensorList | None,
    steps: TensorList,
    groups: list[AdamGroup],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
    journal: Journal | None = None,
    capturable: bool = False,
    masters: TensorList | None = None,
) -> None:
    """Write w = backup (w itself where there is none), then make step t of Adam with the gradients given, in one pass.

        g = -g if maximize else g
        w = (1 - lr * weight_decay) * w    if decoupled,  else  g = g + weight_decay * w
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g^2
        u = max(u, v) if amsgrad else v
        w = w - lr / (1 - beta1^t) * m / (sqrt(u) / sqrt(1 - beta2^t) + eps)

    m, v and u are the entries of ``exp_avgs``, ``exp_avg_sqs`` and ``max_exp_avg_sqs``, 0 in groups that say ``first``,
    and are written in place. ``steps`` hold t - 1 for every parameter, a tensor of one element each, and then t. They
    are read by the host, which also waits for ``found_inf`` then; with ``capturable`` they are float32, on the device
    of their parameters, and nothing waits. Otherwise as `sgd_update`.

    Raises:
        InvalidTensor, ValueError: as `sgd_update`; nothing has been changed then.
    """
    require_sizes(params, groups)
    averages = exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    _require_state("exp_avgs", grads, exp_avgs, groups)
    _require_state("exp_avg_sqs", grads, exp_avg_sqs, groups)
    _require_state("max_exp_avg_sqs", grads, max_exp_avg_sqs, groups, lambda group: group.amsgrad)
    _require_state("steps", grads, steps, groups)
    counts = _counted(steps, params, grads, capturable)
    journal = [] if journal is None else journal
    lists = "adam_update", params, grads, backups, averages
    if capturable:
        _descend(*lists, groups, grad_scale, found_inf, backend, journal, masters, steps)
        return
    skipped = found_inf if found_inf is not None and bool(found_inf) else None
    before = [None if g is None else t.item() for t, g in zip(steps, grads)]
    done = [t for t in before if t is not None]
    with _advanced(counts if skipped is None else [], done, journal):
        _descend(*lists, _by_step(groups, before), grad_scale, skipped, backend, journal, masters)


def _counted(steps: TensorList, params: TensorList, grads: TensorList, capturable: bool) -> list[Tensor]:
    """Return the counts of the parameters with a gradient; refuse what cannot count."""
    advanced = [(t, p) for t, p, g in zip(steps, params, grads) if g is not None]
    if not all(isinstance(t, Tensor) and t.numel() == 1 and t.is_floating_point() for t, _ in advanced):
        raise ValueError("Invalid steps. Must be floating tensors of one element.")
    if capturable and any(t.dtype != torch.float32 or t.device != p.device for t, p in advanced):
        raise ValueError("Invalid steps. Must be float32 and on the device of their parameters if capturable.")
    return [t for t, _ in advanced]


@contextlib.contextmanager
def _advanced(counts: list[Tensor], before: list[float], journal: Journal) -> Iterator[None]:
    """Count t + 1 on the host, and back to ``before`` if what is done within fails."""
    entry = AdamStepEntry(counts, before)
    try:
        if counts:
            journal.append(entry)
            _advance(counts, None)
        yield
    except BaseException:
        if entry in journal:
            entry.restore()
            journal.remove(entry)
        raise


def _by_step(groups: list[AdamGroup], steps: list[float | None]) -> list[AdamGroup]:
    """Return the groups cut into runs of one step, with the corrections of the step that now begins.

    ``steps``: those done before; None for a parameter without a gradient, which is only restored, in any step.
    """
    runs: list[AdamGroup] = []
    start = 0
    for group in groups:
        current, size = None, 0
        for before in steps[start : start + group.size]:
            step = None if before is None else before + 1
            if current is not None and step is not None and step != current:
                runs.append(group.at(size, current))
                current, size = step, 0
            current = current if step is None else step
            size += 1
        runs.append(group.at(size, 1.0 if current is None else current))
        start += group.size
    return runs


def _advance(steps: TensorList, found_inf: Tensor | None) -> None:
    """Count t + 1, unless the step is skipped, which only the device knows."""
    if not steps:
        return
    one: Any = 1 if found_inf is None else (found_inf == 0).to(steps[0])
    if found_inf is None and steps[0].is_cpu:
        one = torch.ones((), device="cpu")  # of a number torch would make one for every step
    torch._foreach_add_(steps, one)


def _descend(
    name: str,
    params: TensorList,
    grads: TensorList,
    backups: TensorList | Any | None,
    states: Sequence[TensorList | None],
    groups: list[Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None,
    journal: Journal,
    masters: TensorList | None,
    steps: TensorList | None = None,
) -> None:
    """Restore w and call the update of that name on every part; advance ``steps`` that are on the device."""
    any_state = name == "sgd_update"
    parts = route(backend, groups, params, grads, backups, states, masters, any_state=any_state)
    at_once = len(parts) == 1 and parts[0].batch is not None and parts[0].index is None
    written = [grads, backups]
    if backups is not None and not at_once:
        # Only a single call can restore and update as one; elsewhere all of w comes back before any of it is updated.
        if isinstance(backups, list):
            restore(params, backups, backend)
        else:
            backups.restore()
            bump_versions(params, backups)
        written = [grads]
        parts = route(backend, groups, params, grads, None, states, masters, any_state=any_state)
    for part in parts:
        scale = None if grad_scale is None else grad_scale.to(part.device)
        skip = None if found_inf is None else found_inf.to(part.device)
        # Of several calls none may say that there is nothing left to undo.
        done = journal if at_once else []
        on_device = None if steps is None else part.take(steps)
        arguments = (scale, skip, done) if name == "sgd_update" else (on_device, scale, skip, done)
        if part.batch is not None:
            getattr(part.batch, name)(part.groups, *arguments)
        else:
            _update_stand_ins(part, name, arguments, masters, params, grads, *states)
        if on_device is not None:
            _advance([t for t, g in zip(on_device, part.take(grads)) if g is not None], skip)
    if not at_once:
        journal.clear()
    if all_present(grads):
        increment_version(params)
    else:
        bump_versions(params, *written)


def _update_stand_ins(part: Part, name: str, arguments: tuple[Any, ...], *lists: TensorList | None) -> None:
    """Call the update of that name on stand-ins for the masters, parameters, gradients and state of a part."""
    with contextlib.ExitStack() as stack:
        copies: list[Any] = [stack.enter_context(stand_ins(part.take_any(x))) for x in lists]
        masters, params, grads, *states = copies
        batch = part.backend.batch(params, grads, None, *states, masters=masters)
        getattr(batch, name)(part.groups, *arguments)


def _require_state(
    name: str,
    grads: TensorList,
    states: TensorList | None,
    groups: Sequence[G],
    needs: Callable[[G], bool] = lambda group: True,
) -> None:
    """Refuse a list of state that lacks an entry for a gradient of a group that needs one."""
    if states is not None and len(states) != len(grads):
        raise ValueError(f"Invalid list of {len(states)} tensors. Must be as long as params: {len(grads)}.")
    if states is not None and all_present(states):
        return
    start = 0
    for group in groups:
        stop = start + group.size
        if needs(group) and (
            states is None or any(states[i] is None and grads[i] is not None for i in range(start, stop))
        ):
            raise ValueError(f"Invalid {name}. There must be one for every gradient.")
        start = stop
