"""From the lists of an op to the columns of addresses that kernels read, with everything checked on the way.

`operands` makes an object that says which tensors the kernels cannot take, finds memory for w, and writes the columns.
Where the native core loads and knows the device it is the core's own (``csrc/python/gather.h``), which takes a tenth of
the time; else the one here, which is the same in Python.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fused_sam.backends.triton.seen import Seen, is_param, is_sole_owner, look, matches, require_disjoint
from fused_sam.routing import DTYPES

if TYPE_CHECKING:
    from fused_sam.routing import TensorList

# Backups of tensors smaller than this share one allocation: asking who owns a gradient costs more than the memory.
SMALL_BYTES = 4096
ALIGNMENT = 64

# Numbers of dtypes, as in csrc/types.h.
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def kind_of(param: torch.dtype, grad: torch.dtype) -> int:
    """The number of a pair of dtypes, as in csrc/python/columns.cpp."""
    return _CODES[param] << 2 | _CODES[grad]


def dtypes_of(kind: int) -> tuple[torch.dtype, torch.dtype]:
    """The inverse."""
    return DTYPES[kind >> 2], DTYPES[kind & 3]


def column(numbers: Iterable[int]) -> bytes:
    """A column of these numbers."""
    return array("q", numbers).tobytes()


class Operands:
    """The tensors of one op, read once. Entry i of every column belongs to parameter i; an address of 0 stands for
    "there is none"."""

    def __init__(
        self,
        device: torch.device,
        params: TensorList,
        grads: TensorList | None,
        backups: TensorList | Operands | None,
        states: Sequence[TensorList | None],
    ) -> None:
        self._device = device
        self._params = params
        self._nothing: TensorList = [None] * len(params)
        listed = backups if isinstance(backups, list) else self._nothing
        self._listed = isinstance(backups, list)
        self._grads = tuple(grads or ())
        self._p, self._g = look(params), look(grads or self._nothing)
        self._states = [look(state or self._nothing) for state in states]
        kept = look(listed)
        #: Indices of the tensors that take part in the op but that the kernels cannot take as they lie in memory.
        self.odd = [i for i, b in enumerate(kept) if not self._takes(i, b)]
        self._backups = [0 if b is None else b.address for b in kept]
        self._memory: list[Any] = [listed]  # what the backups lie in
        self._disjoint = False  # whether that has been found of what is written
        if isinstance(backups, Operands):
            self._adopt(backups)

    def _takes(self, i: int, backup: Seen | None) -> bool:
        p, g = self._p[i], self._g[i]
        if g is None and backup is None:
            return True
        written = backup, *(state[i] for state in self._states)
        return is_param(p, self._device) and matches(g, p, True) and all(matches(x, p) for x in written)

    def _adopt(self, ascent: Operands) -> None:
        """A parameter that the ascent moved and that has no gradient now takes part too: it is restored."""
        if len(ascent._params) > len(self._params) or ascent._device != self._device:
            raise ValueError("Invalid backups. Must be of the same parameters.")
        self._memory.append(ascent._memory)
        for i, address in enumerate(ascent._backups):
            if address != 0:
                if self._params[i] is not ascent._params[i]:
                    raise _changed(i)
                _require_same(i, ascent._p[i], self._p[i])
                self._backups[i] = address

    @property
    def kept(self) -> list[bool | None]:
        """True for every parameter that has a backup, None for the others."""
        return [True if address else None for address in self._backups]

    def make_backups(self, owned: bool) -> None:
        """Find memory for w of every parameter with a gradient: the gradient's own where it is large and ``owned`` and
        nothing but this object and one list refers to it, else memory that lasts as long as this object."""
        sizes = [p.numel * p.traits[0].itemsize for p in self._p]
        there = [i for i, (g, size) in enumerate(zip(self._g, sizes)) if g is not None and size > 0]
        places = {i: -(-sizes[i] // ALIGNMENT) * ALIGNMENT for i in there if sizes[i] < SMALL_BYTES}
        pool = torch.empty(sum(places.values()), dtype=torch.uint8, device=self._device)
        self._memory.append(pool)
        address = pool.data_ptr()
        for i in there:
            if i in places:
                self._backups[i] = address
                address += places[i]
            elif owned and self._g[i].traits[0] == self._p[i].traits[0] and is_sole_owner(self._grads, i):
                self._backups[i] = self._g[i].address
            else:
                memory = torch.empty_like(self._params[i])
                self._memory.append(memory)
                self._backups[i] = memory.data_ptr()

    def set_backups(self, backups: TensorList) -> None:
        """Take these.

        Raises:
            ValueError: unless there is a fitting one for every gradient.
        """
        self._disjoint = False
        for i, (b, tensor) in enumerate(zip(look(backups), backups)):
            swap = tensor is not None and tensor is self._grads[i] and matches(b, self._p[i])
            if not swap and ((b is None) != (self._g[i] is None) or not self._takes(i, b)):
                raise ValueError(
                    f"Invalid backup at index {i}. Must match its parameter in dtype, shape and memory layout."
                )
            self._backups[i] = 0 if b is None else b.address
        self._listed = True
        self._memory.append(backups)

    def keep_backups(self) -> None:
        """Let go of everything but the backups: what an ascent has to keep between the passes."""
        self._memory.extend(x for x, g, b in zip(self._grads, self._g, self._backups) if b and g and b == g.address)
        self._grads, self._g = (), self._nothing

    def refresh(self) -> None:
        """Look at the parameters again: between two calls they may have been given other memory.

        Raises:
            ValueError: if they no longer fit.
        """
        self._disjoint = False
        now = look(self._params)
        for i, address in enumerate(self._backups):
            if address != 0:
                _require_same(i, self._p[i], now[i])
        self._p = now

    def check(self, sizes: list[int]) -> None:
        """Refuse what kernels must not be given; group k covers the next ``sizes[k]`` tensors.

        Raises:
            ValueError: where `odd` is not empty, for sizes that do not add up, and for written tensors that overlap.
        """
        if sum(sizes) != len(self._params) or any(size < 0 for size in sizes):
            raise ValueError(
                f"Invalid group sizes: their sum is {sum(sizes)}. Must be len(params)={len(self._params)}."
            )
        if self.odd:
            raise ValueError(
                f"Invalid tensor at index {self.odd[0]}. Parameter, gradient, backup and state must be dense tensors "
                "of one device, floating dtype, shape and memory layout."
            )
        if not self._disjoint:
            self._require_disjoint()
            self._disjoint = True

    def _require_disjoint(self) -> None:
        spans = []
        for i, (p, b) in enumerate(zip(self._p, self._backups)):
            if self._takes_part(i):
                size = p.numel * p.traits[0].itemsize
                spans.append((p.address, size))
                spans.extend((state[i].address, size) for state in self._states if state[i] is not None)
                if self._listed and b != 0:  # those made here overlap nothing
                    spans.append((b, size))
        require_disjoint(tuple(spans))

    def require_backups(self, sizes: list[int]) -> None:
        """`check`, and refuse a gradient without a backup."""
        self.check(sizes)
        if any(g is not None and p.numel > 0 and not b for p, g, b in zip(self._p, self._g, self._backups)):
            raise ValueError("Invalid backups. A parameter with a gradient must have one.")

    def require_state(self, sizes: list[int], k: int, needed: list[bool]) -> None:
        """`check`, and refuse a gradient without the state, in groups that need it."""
        self.check(sizes)
        wanted = [need for need, size in zip(needed, sizes) for _ in range(size)]
        state = self._states[k] if k < len(self._states) else self._nothing
        for i, (p, g, x, need) in enumerate(zip(self._p, self._g, state, wanted)):
            if g is not None and p.numel > 0 and x is None and need:
                raise ValueError(
                    f"Invalid state {k} at index {i}. There must be one for every gradient of a group that uses it."
                )

    def _takes_part(self, i: int) -> bool:
        return self._g[i] is not None or self._backups[i] != 0

    def addresses(self, of: str) -> bytes:
        """The column of ``"params"``, ``"grads"`` or ``"backups"``."""
        if of == "backups":
            return column(self._backups)
        if of == "grads":
            return column(0 if g is None else g.address for g in self._g)
        return column(p.address if self._takes_part(i) else 0 for i, p in enumerate(self._p))

    def state_addresses(self, k: int) -> bytes:
        """The column of the k-th kind of state."""
        state = self._states[k] if k < len(self._states) else self._nothing
        return column(0 if x is None else x.address for x in state)

    def sizes(self) -> bytes:
        """The column of the numbers of elements."""
        return column(p.numel if self._takes_part(i) else 0 for i, p in enumerate(self._p))

    def kinds(self, with_grads: bool, with_backups: bool) -> bytes:
        """The column of `kind_of` each parameter and its gradient, if those count, or else its backup, if those do;
        -1 without."""
        numbers = []
        for p, g, b in zip(self._p, self._g, self._backups):
            if with_grads and g is not None:
                numbers.append(kind_of(p.traits[0], g.traits[0]))
            else:
                numbers.append(kind_of(p.traits[0], p.traits[0]) if with_backups and b else -1)
        return column(numbers)


def _require_same(index: int, before: Seen, now: Seen) -> None:
    """Refuse a parameter that no longer lies as it did when its backup was made."""
    if before[1:] != now[1:]:
        raise _changed(index)


def _changed(index: int) -> ValueError:
    return ValueError(
        f"Invalid params. Parameter {index} has been replaced, or has changed in size, dtype or memory layout, while "
        "perturbed."
    )


try:
    from fused_sam.backends import native
except ImportError:
    native = None  # type: ignore[assignment]


def operands(device: torch.device, *lists: Any) -> Any:
    """`Operands`, the core's where it can read tensors of the device."""
    if native is not None and device.type in native.DEVICE_TYPES:
        return native.operands(device, *lists)
    return Operands(device, *lists)
