"""The op surface: checks every argument once, then hands it to the backend of the tensors' device.

All lists are parallel: entry i of each belongs to parameter i, and None in ``grads``, ``backups`` or a list of state
means that there is none. Groups cover the lists in order, ``size`` tensors each.

    norm        ||T g||_q over all groups, T = |w| + eta elementwise in adaptive groups, 1 elsewhere; 1/p + 1/q = 1
    perturb     backup = w, w = w + rho_k T sign(g) (|T g| / ||T g||_q)^(q-1) for the tensors of group k, which is
                rho_k T^2 g / ||T g||_2 for p = 2                                            (Foret et al. 2021, eq. 2)
    restore     w = backup
    sgd_update  w = backup, then SGD with momentum at w with the gradient taken at w + e     (Algorithm 1)
    adam_update w = backup, then Adam or AdamW likewise

fp32, fp64, bf16 and fp16 tensors; 16-bit data is computed in fp32 and the norm always in fp64.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fused_sam.routing import InvalidTensor, Part, TensorList, contiguous, route, stand_ins

__all__ = [
    "AdamGroup",
    "Ascent",
    "AscentGroup",
    "InvalidTensor",
    "SGDGroup",
    "adam_update",
    "norm",
    "perturb",
    "restore",
    "sgd_update",
]

# What perturb has done and restore or sgd_update have yet to undo: entries with ``params``, ``kept`` (None for each
# parameter that is not displaced), ``joins_update`` and ``restore()``. It is written by the code that touches the
# weights, at the moment it has: an interrupt finds it true.
Journal: TypeAlias = list[Any]

G = TypeVar("G", bound=Any)  # a group of one of the ops


class AscentGroup(NamedTuple):
    """How far the next ``size`` tensors are displaced. ``rho`` may be a tensor of one element, read on the device."""

    size: int
    rho: float | Tensor
    adaptive: bool
    eta: float = 0.0

    def on(self, device: torch.device, size: int) -> AscentGroup:
        """The same for ``size`` tensors on a device."""
        if size == self.size and not isinstance(self.rho, Tensor):
            return self
        return self._replace(size=size, rho=_scalar_on(device, self.rho))


class SGDGroup(NamedTuple):
    """torch.optim.SGD's hyperparameters for the next ``size`` tensors; ``first``: their buffers hold nothing yet.

    ``lr`` may be a tensor of one element, read on the device.
    """

    size: int
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first: bool

    def on(self, device: torch.device, size: int) -> SGDGroup:
        """The same for ``size`` tensors on a device."""
        if size == self.size and not isinstance(self.lr, Tensor):
            return self
        return self._replace(size=size, lr=_scalar_on(device, self.lr))


class AdamGroup(NamedTuple):
    """torch.optim.Adam's hyperparameters for the next ``size`` tensors; ``first``: their state holds nothing yet.

    ``lr`` may be a tensor of one element, read on the device. ``decoupled``: weight decay as in AdamW. The corrections,
    1 - beta1^t and sqrt(1 - beta2^t) at step t, are `adam_update`'s to fill in; 0 where the device reads the step.
    """

    size: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool
    first: bool
    correction1: float = 0.0
    correction2_root: float = 0.0

    def on(self, device: torch.device, size: int) -> AdamGroup:
        """The same for ``size`` tensors on a device."""
        if size == self.size and not isinstance(self.lr, Tensor):
            return self
        return self._replace(size=size, lr=_scalar_on(device, self.lr))

    def at(self, size: int, step: float) -> AdamGroup:
        """The same for ``size`` tensors at a step, with the corrections as torch.optim.Adam computes them."""
        root = (1 - self.beta2**step) ** 0.5
        return self._replace(size=size, correction1=1 - self.beta1**step, correction2_root=root)


def _scalar_on(device: torch.device, value: float | Tensor) -> float | Tensor:
    return value.detach().reshape(()).to(device) if isinstance(value, Tensor) else value


def is_capturing(params: TensorList) -> bool:
    """Whether what is launched now for these parameters goes into a CUDA graph."""
    return bool(params) and params[0].is_cuda and torch.cuda.is_current_stream_capturing()


def host_number(value: Any) -> float | Tensor:
    """A number, or the tensor itself where reading it would wait for its device."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


class Ascent:
    """The first half of a SAM step: `norm` and `perturb` with one look at the tensors.

    Raises:
        InvalidTensor: for a sparse, complex, integer or mismatched tensor.
        ValueError: if lists and groups differ in length.
    """

    def __init__(
        self, params: TensorList, grads: TensorList, groups: list[AscentGroup], backend: str | None = None, p: float = 2
    ) -> None:
        _require_sizes(params, groups)
        self.q = dual_exponent(p)
        self.params = params
        self.grads = grads
        self.groups = groups
        self._parts = route(backend, params, grads)

    def norm(self) -> Tensor | None:
        """||T g||_q as a float64 tensor of shape [] on the device of the first gradient; None for p = inf, which needs
        none. For p = 1 of shape [3]: the largest |T g|, the number of its tensor, and its place in that tensor."""
        if self.q == 1:
            return None
        norms = []
        for part in self._parts:
            batch = part.batch or part.backend.batch(
                contiguous(part.take(self.params)), contiguous(part.take(self.grads))
            )
            norms.append(part.globally(batch.norm(part.regroup(self.groups), self.q)))
        if not norms:
            return torch.zeros(3 if self.q == math.inf else (), dtype=torch.float64)
        return norms[0] if len(norms) == 1 else _joint_norm([n.to(norms[0].device) for n in norms], self.q)

    def perturb(
        self, norm: Tensor | None, journal: Journal, backups: TensorList | None = None, owned: bool = False
    ) -> None:
        """w = w + e in place, with w kept in ``backups``, or in memory found here.

        With ``owned``, the gradients are the caller's to give: one whose memory nothing else can reach comes to hold
        its parameter (the in-place swap: no memory is taken and none stays behind). Nothing but the list given to the
        constructor may refer to it then. Backups of small tensors share one allocation instead.
        """
        for part in self._parts:
            there = None if norm is None else part.locally(norm.to(part.device))
            scalars = there, part.regroup(self.groups), self.q
            kept = part.take_any(backups)
            if part.batch is not None:
                if kept is None:
                    part.batch.make_backups(owned)
                else:
                    part.batch.set_backups(kept)
                part.batch.perturb(*scalars, journal)
                continue
            p, g = part.take(self.params), part.take(self.grads)
            journal.append(_Copies(p, kept or [None if x is None else torch.empty_like(w) for w, x in zip(p, g)]))
            with stand_ins(p) as p_:
                batch = part.backend.batch(p_, contiguous(g))
                batch.make_backups(owned=False)
                batch.perturb(*scalars, [])
        _bump_versions(self.params, self.grads)


def dual_exponent(p: float) -> float:
    """q of 1/p + 1/q = 1.

    Raises:
        ValueError: unless 1 <= p <= inf.
    """
    if not p >= 1:
        raise ValueError(f"Invalid {p=}. Must be >= 1, possibly inf.")
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def _joint_norm(norms: list[Tensor], q: float) -> Tensor:
    """The norm of all parts from those of each."""
    values = torch.stack(norms)
    if q == 2:
        return torch.linalg.vector_norm(values)
    if q == math.inf:
        peak = values[:, 0].amax()
        first = torch.where(values[:, 0] == peak, values[:, 1], math.inf).argmin()
        return torch.cat([peak.reshape(1), values[first, 1:]])
    peak = values.amax()
    return torch.where(torch.isfinite(peak) & (peak > 0), peak * ((values / peak) ** q).sum() ** (1 / q), peak)


class _Copies:
    """A journal entry for parameters of layouts that only torch can walk."""

    joins_update = False

    def __init__(self, params: TensorList, backups: TensorList) -> None:
        self.params = params
        self.backups = backups
        _copy(params, backups)

    @property
    def kept(self) -> TensorList:
        return self.backups

    def restore(self) -> None:
        _copy(self.backups, self.params)


def _copy(sources: TensorList, targets: TensorList) -> None:
    for source, target in zip(sources, targets):
        if source is not None and target is not None:
            target.copy_(source)


def norm(
    params: TensorList, grads: TensorList, groups: list[AscentGroup], backend: str | None = None, p: float = 2
) -> Any:
    """||T g||_q over the gradients of all groups, accumulated in fp64. Returns and raises as `Ascent`."""
    return Ascent(params, grads, groups, backend, p).norm()


def perturb(
    params: TensorList,
    grads: TensorList,
    backups: TensorList,
    norm: Tensor | None,
    groups: list[AscentGroup],
    backend: str | None = None,
    journal: Journal | None = None,
    p: float = 2,
) -> None:
    """backup = w and w = w + e, in place, for every parameter with a gradient; ``norm`` is as `norm` returns it.

    A norm that is zero or not finite leaves w as it is (decided on the device). ``backups[i] is grads[i]`` swaps in
    place. ``journal`` receives an entry when, and as soon as, there is something to restore.

    Raises:
        InvalidTensor, ValueError: as `Ascent`, and for a missing or mismatched backup; nothing has been changed then.
    """
    route(backend, params, grads, backups)
    if any((g is None) != (b is None) for g, b in zip(grads, backups)):
        raise ValueError("Invalid backups. Must be there for exactly the parameters that have a gradient.")
    shape = None if p == math.inf else (3,) if p == 1 else ()
    if shape != (None if norm is None else norm.shape):
        given = None if norm is None else f"of shape {list(norm.shape)}"
        raise ValueError(f"Invalid norm {given} for {p=}. Must be what ops.norm returns.")
    others = {id(g): i for i, g in enumerate(grads) if g is not None}
    if any(others.get(id(b), i) != i for i, b in enumerate(backups)):
        raise ValueError("Invalid backups. A gradient may hold no parameter but its own.")
    Ascent(params, grads, groups, backend, p).perturb(norm, [] if journal is None else journal, backups)


def restore(params: TensorList, backups: TensorList, backend: str | None = None) -> None:
    """w = backup for every parameter that has one, bit for bit.

    Raises:
        InvalidTensor, ValueError: for a backup that does not match its parameter; nothing has been changed then.
    """
    for part in route(backend, params, None, backups):
        if part.batch is not None:
            part.batch.restore()
            continue
        _copy(part.take(backups), part.take(params))
    _bump_versions(params, backups)


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
) -> None:
    """w = backup (w itself where there is none), then one step of SGD with the gradients given, in one pass.

        d = (-g if maximize else g) + weight_decay * w
        m = d if first else momentum * m + (1 - dampening) * d
        w = w - lr * (d + momentum * m if nesterov else m if momentum else d)

    Parameters without a gradient are only restored. Momentum buffers are written in place. With ``grad_scale`` (a
    GradScaler's, shape []) the gradients are divided by it in place first; with a nonzero ``found_inf`` (shape [])
    every parameter is only restored. ``backups`` may be `one_batch` of a journal. ``journal`` is cleared as
    soon as there is nothing left to restore.

    Raises:
        InvalidTensor, ValueError: as `Ascent`, and for a missing or mismatched momentum buffer; nothing has been
            changed then.
    """
    _require_sizes(params, groups)
    _require_state("momentum_buffers", grads, momentum_buffers, groups, lambda group: group.momentum != 0)

    def update(part: Part, batch: Any, *scalars: Any) -> None:
        batch.sgd_update(part.regroup(groups), *scalars)

    states = (momentum_buffers,)
    _descend(params, grads, backups, states, update, grad_scale, found_inf, backend, journal)


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
) -> None:
    """w = backup (w itself where there is none), then step t of Adam with the gradients given, in one pass.

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
    _require_sizes(params, groups)
    _require_state("exp_avgs", grads, exp_avgs, groups)
    _require_state("exp_avg_sqs", grads, exp_avg_sqs, groups)
    _require_state("max_exp_avg_sqs", grads, max_exp_avg_sqs, groups, lambda group: group.amsgrad)
    _require_state("steps", grads, steps, groups)
    advanced = [(t, p) for t, p, g in zip(steps, params, grads) if g is not None]
    if not all(isinstance(t, Tensor) and t.numel() == 1 and t.is_floating_point() for t, _ in advanced):
        raise ValueError("Invalid steps. Must be floating tensors of one element.")
    if capturable and any(t.dtype != torch.float32 or t.device != p.device for t, p in advanced):
        raise ValueError("Invalid steps. Must be float32 and on the device of their parameters if capturable.")
    skipped = False
    if not capturable:
        skipped = found_inf is not None and bool(found_inf)
        found_inf = found_inf if skipped else None
        groups = _by_step(groups, grads, steps)

    def update(part: Part, batch: Any, *scalars: Any) -> None:
        on_device = part.take(steps) if capturable else None
        batch.adam_update(part.regroup(groups), on_device, *scalars)
        if on_device is not None:
            _advance([t for t, g in zip(on_device, part.take(grads)) if g is not None], found_inf)

    states = (exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    _descend(params, grads, backups, states, update, grad_scale, found_inf, backend, journal)
    if not capturable and not skipped:
        _advance([t for t, _ in advanced], None)


def _by_step(groups: list[AdamGroup], grads: TensorList, steps: TensorList) -> list[AdamGroup]:
    """The groups cut into runs of one step, with the corrections of the step that now begins."""
    runs: list[AdamGroup] = []
    start = 0
    for group in groups:
        # A parameter without a gradient is only restored: it goes with any step.
        current, size = None, 0
        for i in range(start, start + group.size):
            step = None if grads[i] is None else steps[i].item() + 1
            if current is not None and step is not None and step != current:
                runs.append(group.at(size, current))
                current, size = step, 0
            current = current if step is None else step
            size += 1
        runs.append(group.at(size, 1.0 if current is None else current))
        start += group.size
    return runs


def _advance(steps: TensorList, found_inf: Tensor | None) -> None:
    """t + 1, unless the step is skipped, which only the device knows."""
    if not steps:
        return
    one: Any = 1 if found_inf is None else (found_inf == 0).to(steps[0])
    if found_inf is None and steps[0].is_cpu:
        one = torch.ones(())  # of a number torch would make one for every step
    torch._foreach_add_(steps, one)


def _descend(
    params: TensorList,
    grads: TensorList,
    backups: TensorList | Any | None,
    states: Sequence[TensorList | None],
    update: Callable[..., None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None,
    journal: Journal | None,
) -> None:
    """A base step: the restore, and ``update(part, batch, grad_scale, found_inf, journal)`` for every part."""
    journal = [] if journal is None else journal
    parts = route(backend, params, grads, backups, states)
    written = [grads, backups]
    if backups is not None and (len(parts) != 1 or parts[0].batch is None or parts[0].index is not None):
        # Only a single call can restore and update as one; elsewhere all of w comes back before any of it is updated.
        if isinstance(backups, list):
            restore(params, backups, backend)
            journal.clear()
        else:
            undo(journal)
        written = [grads]
        parts = route(backend, params, grads, None, states)
    for part in parts:
        scalars = [None if s is None else s.to(part.device) for s in (grad_scale, found_inf)]
        if part.batch is not None:
            update(part, part.batch, *scalars, journal)
            continue
        with contextlib.ExitStack() as stack:
            lists = [part.take(params), part.take(grads), *map(part.take_any, states)]
            p_, g_, *states_ = [stack.enter_context(stand_ins(x)) for x in lists]
            update(part, part.backend.batch(p_, g_, None, *states_), *scalars, journal)
    _bump_versions(params, *written)


def _require_sizes(params: TensorList, groups: Sequence[Any]) -> None:
    covered = sum(group.size for group in groups)
    if covered != len(params) or any(group.size < 0 for group in groups):
        raise ValueError(f"Invalid groups, of {covered} tensors. Must cover len(params)={len(params)}, each size >= 0.")


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
            states is None or any(g is not None and m is None for g, m in zip(grads[start:stop], states[start:stop]))
        ):
            raise ValueError(f"Invalid {name}. There must be one for every gradient.")
        start = stop


def all_present(tensors: TensorList) -> bool:
    """Whether no entry is None. (``None in tensors`` would compare tensors.)"""
    return all(map(operator.is_not, tensors, itertools.repeat(None)))


def one_batch(journal: Journal, count: int) -> Any | None:
    """The backups that `sgd_update` of ``count`` parameters can restore in its own pass; where several calls moved the
    weights, or one that was not given all of them, undoes them."""
    if len(journal) == 1 and journal[0].joins_update and len(journal[0].params) == count:
        return journal[0]
    undo(journal)
    return None


def undo(journal: Journal) -> None:
    """Bring back w wherever the journal says that it is displaced."""
    for entry in journal:
        entry.restore()
        _bump_versions(entry.params, entry)
    journal.clear()


def _bump_versions(params: TensorList, *touched: TensorList | Any | None) -> None:
    """Tell autograd of writes through raw pointers, so that a backward through a stale graph raises.

    Written are the parameters that have an entry in one of the lists, or a backup in one of the journal entries.
    """
    for x in touched:
        if isinstance(x, list) and all_present(x):
            torch.autograd.graph.increment_version(params)
            return
    lists = [x if isinstance(x, list) else x.kept for x in touched if x is not None]
    written = [p for p, *entries in itertools.zip_longest(params, *lists) if any(x is not None for x in entries)]
    torch.autograd.graph.increment_version(written)
