"""Which backend takes which tensors of an op, and on what memory: the checks between Python lists and raw pointers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_sam import backends
from fused_sam.backends import eager
from fused_sam.backends.interface import DTYPES, SIXTEEN_BIT, Backend, InvalidTensor, TensorList, can_mix
from fused_sam.backends.memory import overlaps_itself, require_disjoint
from fused_sam.ops.lists import LISTS, is_list


@dataclass
class Part:
    """The tensors that one backend call takes: all of them, or those at ``index``.

    ``batch`` is the backend's view of them; None where the kernels cannot walk their layout, so that the call must be
    made on contiguous stand-ins. ``groups`` are those of the op with their sizes within this part, on its device.
    """

    backend: Backend
    device: torch.device
    batch: Any
    groups: list[Any]
    index: list[int] | None = None

    def take(self, tensors: TensorList) -> TensorList:
        """Return the entries that belong to this part."""
        return tensors if self.index is None else [tensors[i] for i in self.index]

    def take_any(self, tensors: Any) -> TensorList | None:
        """Call `take` on a list; return None for anything else."""
        return self.take(tensors) if is_list(tensors) else None

    def to_list_index(self, norm: Tensor) -> Tensor:
        """Return a norm of this part with its tensor's index in the part as that in the whole list."""
        if norm.dim() == 0 or self.index is None:
            return norm
        numbers = self._numbers(norm)
        return torch.stack([norm[0], numbers[norm[1].long().clamp(min=0)], norm[2]])

    def to_part_index(self, norm: Tensor) -> Tensor:
        """Return a norm of the whole list with its tensor's index as that in this part, -1 for another part's."""
        if norm.dim() == 0 or self.index is None:
            return norm
        found = self._numbers(norm) == norm[1]
        return torch.stack([norm[0], torch.where(found.any(), found.double().argmax(), -1).double(), norm[2]])

    def _numbers(self, norm: Tensor) -> Tensor:
        """Return each tensor's index in the whole list; filled on the device, for which the host need not wait."""
        return torch.stack([torch.full_like(norm[0], i) for i in self.index or []])


def route(
    backend: str | None,
    groups: list[Any],
    params: TensorList,
    grads: TensorList | None = None,
    backups: TensorList | Any | None = None,
    states: Sequence[TensorList | None] = (),
    masters: TensorList | None = None,
    q: float | None = None,
    any_state: bool = False,
) -> list[Part]:
    """Return one part, of everything, unless devices or memory layouts differ. ``backups`` may be an ascent's batch.

    ``states``: the lists of state that the base step reads and writes, of which any may be None. ``masters``: fp32
    copies of 16-bit parameters, which state matches then. ``q``: the exponent of an ascent's norm. Where a backend
    takes no masters, or not this q, torch's operations do; the backups of such an ascent are a list to it afterwards.
    ``any_state``: state may have kept its dtype when its parameter got another, and torch's operations take it then.

    Raises:
        InvalidTensor: for an operand that is sparse, complex, of another dtype than the four, or that does not match
            its parameter (state: its master) in dtype, device and shape.
        TypeError: for anything but a list where a list belongs.
        ValueError: if the lists differ in length.
    """
    for x in (params, grads, backups, masters, *states):
        if x is None:
            continue
        if isinstance(x, LISTS):
            if len(x) != len(params):
                raise ValueError(f"Invalid list of {len(x)} tensors. Must be as long as params: {len(params)}.")
        elif not (x is backups and hasattr(x, "joins_update")):
            raise TypeError(f"Invalid {type(x).__name__} of tensors. Must be a list.")
    if not params:
        return []
    device = params[0].device
    module: Backend = backends.for_device("cpu" if params[0].is_cpu else device.type, backend)
    if masters is not None or q not in (None, 2):
        module = _module_for(device.type, backend, masters, q)
    if isinstance(backups, eager.Batch) and module is not eager:
        backups = backups.backups
    batch = module.batch(params, grads, backups, *states, masters=masters)
    if batch.unsupported:
        return _divide(backend, module, batch, groups, params, grads, backups, states, masters, q, any_state)
    for group in groups:
        if type(group[1]) is not float and isinstance(group[1], Tensor):  # rho or lr
            groups = [g.on(device, g.size) for g in groups]
            break
    return [Part(module, device, batch, groups)]


def _divide(
    backend: str | None,
    first: Backend,
    batch: Any,
    groups: list[Any],
    params: TensorList,
    grads: TensorList | None,
    backups: TensorList | Any | None,
    states: Sequence[TensorList | None],
    masters: TensorList | None,
    q: float | None,
    any_state: bool,
) -> list[Part]:
    """Return the parts of tensors some of which the first backend does not support."""
    unsupported = set(batch.unsupported)
    members: dict[tuple[Any, torch.device, bool], list[int]] = {}
    for i, param in enumerate(params):
        stage = moved = False
        if i in unsupported:
            if not any(is_list(x) and x[i] is not None for x in (grads, backups)):
                continue
            kept = [x[i] for x in (backups,) if is_list(x) and x[i] is not None]
            state = [x[i] for x in states if x is not None and x[i] is not None]
            master = masters[i] if masters else None
            moved = any_state and master is None and any(_has_other_dtype(x, param) for x in state)
            _require_supported(i, param, grads[i] if grads else None, kept, state, master, moved)
            stage = first.NEEDS_DENSE
        module = eager if moved else _module_for(param.device.type, backend, masters, q)
        members.setdefault((module, param.device, stage and module is first), []).append(i)
    involved = [i for index in members.values() for i in index]
    written = [x[i] for x in (params, backups, masters, *states) if is_list(x) for i in involved]
    require_disjoint([x for x in written if x is not None])
    device = params[0].device
    if list(members) == [(first, device, False)] and len(members[first, device, False]) == len(params):
        return [Part(first, device, batch, _within(groups, device, None))]
    parts = []
    for (module, on_device, stage), index in members.items():
        part = Part(module, on_device, None, _within(groups, on_device, index), index)
        if not stage:
            taken = [part.take_any(x) for x in (params, grads, backups, *states)]
            part.batch = module.batch(*taken, masters=part.take_any(masters))
        parts.append(part)
    return parts


def _has_other_dtype(state: Any, param: Tensor) -> bool:
    """Return whether state has another dtype than its parameter, one of those that there are."""
    return isinstance(state, Tensor) and state.dtype != param.dtype and state.dtype in DTYPES


def _module_for(device_type: str, backend: str | None, masters: TensorList | None, q: float | None) -> Backend:
    """Return the backend for tensors of a device; torch's operations where it takes no masters, or not this q."""
    module: Backend = backends.for_device(device_type, backend)
    takes_masters = masters is None or module.TAKES_MASTERS
    takes_q = q in (None, 1, 2, math.inf) or module.TAKES_POWERS
    return module if takes_masters and takes_q else eager


def _within(groups: list[Any], device: torch.device, index: list[int] | None) -> list[Any]:
    """Return the groups with the sizes they have within a part, and what is a tensor on its device."""
    within: list[Any] = []
    start = 0
    for group in groups:
        size = group.size if index is None else sum(start <= i < start + group.size for i in index)
        within.append(group.on(device, size))
        start += group.size
    return within


def contiguous(tensors: TensorList) -> TensorList:
    """Return each tensor itself where it is contiguous, else a copy."""
    return [x if x is None else x.resolve_neg().contiguous() for x in tensors]


@contextlib.contextmanager
def stand_ins(tensors: TensorList | None) -> Iterator[TensorList | None]:
    """Yield `contiguous` tensors, copied back on success (but for expanded tensors, which cannot be written)."""
    copies = None if tensors is None else contiguous(tensors)
    yield copies
    for original, copy in zip(tensors or [], copies or []):
        if copy is not original and not overlaps_itself(original):
            original.copy_(copy)


def _require_supported(
    index: int, param: Tensor, grad: Any, backups: list[Any], state: list[Any], master: Any, any_state: bool
) -> None:
    if param.dtype not in DTYPES:
        raise InvalidTensor(index, f"dtype {param.dtype} is not supported, must be one of {list(DTYPES)}")
    if param.layout != torch.strided:
        raise InvalidTensor(index, f"layout {param.layout} of the parameter is not supported, must be strided")
    _require_memory(index, param)
    _require_writable(index, param, "parameter")
    if grad is not None:
        require_match(index, param, grad, isinstance(grad, Tensor) and can_mix(param.dtype, grad.dtype))
    if master is not None:
        if param.dtype not in SIXTEEN_BIT or backups:
            raise InvalidTensor(index, "a master is of a 16-bit parameter, and its backup")
        require_match(index, param, master, any_dtype=True)
        if master.dtype != torch.float32:
            raise InvalidTensor(index, f"dtype {master.dtype} of the master is not supported, must be torch.float32")
        _require_writable(index, master, "master")
    for x in backups:
        require_match(index, param, x)
        _require_writable(index, x, "backup")
    for x in state:
        require_match(index, param if master is None else master, x, any_state, remedy=CAST)
        _require_writable(index, x, "state")


# As in torch, whose Adam refuses such state with less of a reason.
CAST = " (state keeps its dtype where a model gets another: optimizer.load_state_dict(optimizer.state_dict()) casts it)"


def require_match(index: int, param: Tensor, x: Any, any_dtype: bool = False, remedy: str = "") -> None:
    """Refuse what is not a strided tensor of the parameter's dtype, device and shape, with memory."""
    if not isinstance(x, Tensor):
        raise InvalidTensor(index, f"{type(x).__name__} is not a tensor")
    if x.layout != torch.strided:
        raise InvalidTensor(index, f"layout {x.layout} is not supported (a sparse gradient?), must be strided")
    for name in ("device", "shape") if any_dtype else ("dtype", "device", "shape"):
        if getattr(x, name) != getattr(param, name):
            reason = f"{name} {getattr(x, name)} does not match the parameter's {getattr(param, name)}"
            raise InvalidTensor(index, reason + remedy * (name == "dtype"))
    _require_memory(index, x)


def _require_writable(index: int, x: Tensor, what: str) -> None:
    """Refuse a tensor two of whose elements are one: what is written to them cannot be read again."""
    if overlaps_itself(x):
        raise InvalidTensor(
            index, f"the {what} overlaps itself in memory (shape {list(x.shape)}, strides {x.stride()})"
        )


def _require_memory(index: int, x: Tensor) -> None:
    """Refuse a tensor whose storage was resized to nothing, which torch itself would read and write nonetheless.

    Tensors of other classes may have their memory elsewhere.
    """
    if type(x) in (Tensor, Parameter) and x.numel() > 0 and x.untyped_storage().nbytes() == 0:
        raise InvalidTensor(index, f"the memory of a tensor of shape {list(x.shape)} has been freed")
