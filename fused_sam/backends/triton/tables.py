"""What the kernels read besides tensors: which chunk is of which tensor, addresses, hyperparameters.

All of it is int64 columns in device memory. A column is known by its contents: one that the device has already is not
sent again, so that a step sends what has changed, such as the addresses of new gradients, in one copy that nothing
waits for.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_sam.backends.interface import DTYPES
from fused_sam.backends.triton import kernels

if TYPE_CHECKING:
    from fused_sam.backends.interface import AccumulateGroup, AdamGroup, AscentGroup, SGDGroup, TensorList

Dtypes = tuple[torch.dtype, torch.dtype]  # of a parameter and of its gradient


class Launch(NamedTuple):
    """The chunks of the tensors of one pair of dtypes, for each of which a kernel is compiled."""

    dtypes: Dtypes
    first: int
    programs: int  # one per chunk, from the first


class Plan(NamedTuple):
    """The launches of an op, and the columns that depend on no address."""

    launches: tuple[Launch, ...]
    chunks: bytes
    kinds: bytes
    sizes: bytes
    groups: bytes

    @property
    def total(self) -> int:
        """Return the number of chunks."""
        return len(self.chunks) // 8


@functools.lru_cache(maxsize=64)
def plan(kinds: bytes, sizes: bytes, group_sizes: tuple[int, ...]) -> Plan:
    """Divide the tensors into chunks, by nothing but the arguments: the core's columns of kinds, in which -1 stands for
    a tensor that has no part in the op, and of sizes."""
    launches = []
    chunks = array("q")
    elements = numbers(sizes)
    members: dict[int, list[int]] = {}
    for row, kind in enumerate(numbers(kinds)):
        if kind >= 0 and elements[row] > 0:
            members.setdefault(kind, []).append(row)
    for kind, rows in members.items():
        first = len(chunks)
        for row in rows:
            chunks.extend(range(row << 32, (row << 32) + -(-elements[row] // kernels.CHUNK)))
        # A kind is a pair of numbers of dtypes, as in csrc/python/columns.cpp.
        launches.append(Launch((DTYPES[kind >> 2], DTYPES[kind & 3]), first, len(chunks) - first))
    groups = [k for k, size in enumerate(group_sizes) for _ in range(size)]
    return Plan(tuple(launches), chunks.tobytes(), kinds, sizes, column(groups))


def numbers(column: bytes) -> array[int]:
    """Return what is in a column."""
    return array("q", column)


def column(numbers: Iterable[int]) -> bytes:
    """Return a column of these numbers."""
    return array("q", numbers).tobytes()


def addresses_of(tensors: TensorList | None, count: int) -> bytes:
    """Return a column of ``count`` addresses, 0 where there is no tensor."""
    return bytes(8 * count) if tensors is None else column(0 if x is None else x.data_ptr() for x in tensors)


def ascent_table(groups: list[AscentGroup]) -> bytes:
    """Return the hyperparameters of an ascent as the kernels read them."""
    rows = []
    for group in groups:
        number, address, flags = _scalar(group.rho)
        flags |= kernels.ADAPTIVE * group.adaptive
        rows.append(struct.pack("=dqqdd", number, address, flags, group.eta, group.decay))
    return b"".join(rows)


def sgd_table(groups: list[SGDGroup]) -> bytes:
    """Return the hyperparameters of SGD as the kernels read them."""
    rows = []
    for group in groups:
        lr, address, flags = _scalar(group.lr)
        flags |= kernels.NESTEROV * group.nesterov | kernels.MAXIMIZE * group.maximize | kernels.FIRST * group.first
        flags |= kernels.MOMENTUM * (group.momentum != 0) | kernels.DECAY * (group.weight_decay != 0)
        numbers = lr, group.momentum, 1.0 - group.dampening, group.weight_decay
        rows.append(struct.pack("=ddddqq", *numbers, address, flags))
    return b"".join(rows)


def adam_table(groups: list[AdamGroup]) -> bytes:
    """Return the hyperparameters of Adam as the kernels read them."""
    rows = []
    for group in groups:
        lr, address, flags = _scalar(group.lr)
        flags |= kernels.AMSGRAD * group.amsgrad | kernels.MAXIMIZE * group.maximize | kernels.FIRST * group.first
        flags |= kernels.DECAY * (group.weight_decay != 0) | kernels.DECOUPLED * group.decoupled
        numbers = lr, group.beta1, group.beta2, group.eps, group.weight_decay
        corrections = group.correction1, group.correction2_root
        rows.append(struct.pack("=dddddddqq", *numbers, *corrections, address, flags))
    return b"".join(rows)


def accumulate_table(groups: list[AccumulateGroup]) -> bytes:
    """Return the weights of running means as the kernel reads them, and a row for what has no gradient."""
    rows = [struct.pack("=dq", group.weight, kernels.FIRST * group.first) for group in groups]
    return b"".join(rows) + bytes(16)


def _scalar(value: float | Tensor) -> tuple[float, int, int]:
    """Return (number, address, flags): a tensor is read by the kernel, where it is."""
    if not isinstance(value, Tensor):
        return float(value), 0, 0
    return 0.0, value.data_ptr(), kernels.WIDE if value.dtype == torch.float64 else 0


def readable(value: Any) -> Any:
    """Return the value in a dtype that the kernels read, if it is a tensor."""
    if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64):
        return value.to(torch.float64)
    return value


# Enough for a few models with a few lists each; a column takes 8 bytes per tensor.
_KEPT = 256
# Pinned memory to be had while a graph is captured, when asking the driver for more may not be allowed.
_RESERVE = 1 << 19  # int64s


class Columns:
    """The columns that are in device memory, for each device and stream: another stream would have to wait for them.

    Under CUDA graph capture every column is sent anew, by a copy that becomes part of the graph. Both ends of that copy
    then belong to the graph, whose end is not known: they are kept for good. That is some 10 bytes per
    tensor and 8 per chunk of 8192 elements for each op captured.
    """

    def __init__(self) -> None:
        self._sent: OrderedDict[tuple[torch.device, int, bytes], Tensor] = OrderedDict()
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._reserve: Tensor | None = None

    def on(self, device: torch.device, columns: Sequence[bytes]) -> list[Tensor]:
        """Return the columns as int64 tensors on a device, for use on its current stream."""
        if device.type == "cpu":
            stream, capturing = 0, False
        else:
            module = torch.get_device_module(device)
            stream = module.current_stream(device).stream_id
            capturing = getattr(module, "is_current_stream_capturing", bool)()
        keys = [(device, stream, x) for x in columns]
        known = {} if capturing else self._sent
        missing = list(dict.fromkeys(key for key in keys if key not in known))
        sent = dict(zip(missing, self._send(device, [x for _, _, x in missing], capturing))) if missing else {}
        if capturing:
            return [sent[key] for key in keys]
        self._sent.update(sent)
        for key in keys:
            self._sent.move_to_end(key)
        found = [self._sent[key] for key in keys]
        while len(self._sent) > _KEPT:
            self._sent.popitem(last=False)
        return found

    def _send(self, device: torch.device, columns: list[bytes], capturing: bool) -> Sequence[Tensor]:
        source = torch.frombuffer(bytearray(b"".join(columns)), dtype=torch.int64)
        if device.type != "cpu":
            pinned = self._pinned(len(source), capturing).copy_(source)
            source = pinned.to(device, non_blocking=True)
            if capturing:
                self._captured.append((pinned, source))
        return torch.split_with_sizes(source, [len(x) // 8 for x in columns])

    def _pinned(self, size: int, capturing: bool) -> Tensor:
        if not capturing and self._reserve is None:
            self._reserve = torch.empty(_RESERVE, dtype=torch.int64, device="cpu", pin_memory=True)
        if capturing and self._reserve is not None and size <= len(self._reserve):
            taken, self._reserve = self._reserve[:size], self._reserve[size:]
            return taken
        return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make launches inside the block go to this device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
