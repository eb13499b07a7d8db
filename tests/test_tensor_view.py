"""What the native core reads of tensors, for its own kernels and for Triton's, and what it refuses to point them at."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LARGE
from torch import Tensor

from fused_sam import backends

if backends.available()["native"] != "ok":
    pytest.skip("the native core is not built", allow_module_level=True)

from fused_sam.backends import native

CPU, XPU = torch.device("cpu"), torch.device("xpu", 1)


class OnXPU(Tensor):
    """A CPU tensor that says it is on an XPU. The core must ask: DLPack counts those in its own way."""

    is_xpu = True

    def get_device(self) -> int:
        return 1


def put(x: Any, device: torch.device) -> Any:
    moves = device == XPU and isinstance(x, Tensor) and x.device == CPU and x.layout == torch.strided
    return x.as_subclass(OnXPU) if moves else x


def made(device: torch.device, params: list[Any], grads: Any, backups: Any = None, *states: Any) -> Any:
    lists = [[put(x, device) for x in xs] if isinstance(xs, list) else xs for xs in (params, grads, backups, *states)]
    return native.operands(device, *lists[:3], tuple(lists[3:]))


def read(column: bytes) -> list[int]:
    return list(array("q", column))


def strided() -> Tensor:
    return torch.randn(7, 10)[:, ::2]


def freed(offset: int = 0) -> Tensor:
    x = torch.randn(5 + offset)[offset:]
    x.untyped_storage().resize_(0)
    return x


# Of one parameter: itself, its gradient, a backup, a momentum buffer; and the kind of parameter and gradient.
TAKEN: dict[str, tuple[Callable[[], Any], int]] = {
    "plain": (lambda: tuple(torch.randn(5, 3) for _ in range(4)), 0),
    "scalar": (lambda: tuple(torch.randn(()) for _ in range(4)), 0),
    "channels_last": (lambda: tuple(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in "abcd"), 0),
    "one element of any stride": (
        lambda: (torch.randn(4)[::4], torch.randn(1), torch.randn(9)[::9], torch.randn(2)[1:]), 0
    ),
    "one dimension of any stride": (
        lambda: (torch.randn(1, 5), torch.randn(3, 5)[::3], *torch.randn(2, 1, 5)), 0
    ),
    "float64": (lambda: tuple(torch.randn(6).double() for _ in range(4)), 1 << 2 | 1),
    "wider gradient": (lambda: (torch.randn(6).half(), torch.randn(6), *torch.randn(2, 6).half()), 3 << 2),
    "narrower gradient": (lambda: (torch.randn(6), torch.randn(6).bfloat16(), *torch.randn(2, 6)), 2),
}  # fmt: skip
REFUSED: dict[str, Callable[[], Any]] = {
    "strided": lambda: (strided(), strided(), strided(), strided()),
    "strided gradient": lambda: (torch.randn(7, 5), strided(), torch.randn(7, 5), torch.randn(7, 5)),
    "other layout": lambda: (torch.randn(5, 3), torch.randn(3, 5).t(), torch.randn(5, 3), torch.randn(5, 3)),
    "other layout of momentum": lambda: (torch.randn(5, 3), torch.randn(5, 3), None, torch.randn(3, 5).t()),
    "expanded parameter": lambda: (torch.randn(1).expand(5), *torch.randn(3, 5)),
    "negated gradient": lambda: (torch.randn(4, 3), torch._neg_view(torch.randn(4, 3)), *torch.randn(2, 4, 3)),
    "sparse": lambda: (torch.randn(5), torch.randn(5).to_sparse(), *torch.randn(2, 5)),
    "sparse parameter": lambda: (torch.randn(5).to_sparse(), *torch.randn(3, 5)),
    "complex": lambda: tuple(torch.randn(5, dtype=torch.complex64) for _ in range(4)),
    "gradient that does not mix": lambda: (torch.randn(5), torch.randn(5).double(), *torch.randn(2, 5)),
    "backup of another dtype": lambda: (torch.randn(5).half(), torch.randn(5).half(), torch.randn(5), None),
    "momentum of another dtype": lambda: (torch.randn(5), torch.randn(5), None, torch.randn(5).double()),
    "other shape": lambda: (torch.randn(6), torch.randn(2, 3), *torch.randn(2, 6)),
    "other device": lambda: (torch.randn(6), torch.randn(6, device="meta"), *torch.randn(2, 6)),
    "freed": lambda: (torch.randn(5), freed(), *torch.randn(2, 5)),
    "freed behind an offset": lambda: (torch.randn(5), freed(7), *torch.randn(2, 5)),
    "no tensor": lambda: (torch.randn(5), 0.5, *torch.randn(2, 5)),
}
every_device = pytest.mark.parametrize("device", [CPU, XPU], ids=str)


@every_device
@pytest.mark.parametrize("case", TAKEN)
def test_columns_say_where_tensors_lie(case: str, device: torch.device) -> None:
    make, kind = TAKEN[case]
    w, g, b, m = make()
    x = made(device, [torch.randn(2), w, torch.randn(3)], [None, g, torch.randn(3)], [None, b, None], [None, m, None])
    assert x.unsupported == []
    x.check([1, 2])
    lists = [x.addresses(of) for of in ("params", "grads", "backups")] + [x.state_addresses(0)]
    assert [read(c)[1] for c in lists] == [t.data_ptr() for t in (w, g, b, m)]
    assert read(x.sizes()) == [0, w.numel(), 3]
    assert read(x.kinds(True, True)) == [-1, kind, 0]
    assert read(x.kinds(False, True)) == [-1, kind >> 2 << 2 | kind >> 2, -1]


@every_device
@pytest.mark.parametrize("case", REFUSED)
def test_what_kernels_cannot_take_is_refused_by_its_place(case: str, device: torch.device) -> None:
    rows = [TAKEN["plain"][0](), REFUSED[case]()]
    x = made(device, *(list(column) for column in zip(*rows, strict=True)))
    assert x.unsupported == [1]
    with pytest.raises(ValueError, match="Invalid tensor at index 1"):
        x.check([2])


def test_an_xpu_is_not_another_one() -> None:
    assert made(XPU, [torch.randn(3)], [torch.randn(3)]).unsupported == []
    w, g = (put(torch.randn(3), XPU) for _ in range(2))
    assert native.operands(torch.device("xpu", 0), [w], [g], None, ()).unsupported == [0]
    assert native.operands(XPU, [torch.randn(3)], [torch.randn(3)], None, ()).unsupported == [0]  # on the CPU


@every_device
def test_memory_for_w_is_on_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors share one allocation; a large gradient may lend its own, see test_gradient_ownership.py."""
    asked, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **kind: (asked.append(device), empty(*size, **kind))[1])
    x = made(device, [torch.randn(n) for n in (5, LARGE, 7)], [torch.randn(5), torch.randn(LARGE), None])
    x.make_backups(False)
    x.require_backups([3])
    assert asked == [str(device)]
    assert [b != 0 for b in read(x.addresses("backups"))] == [True, True, False]


def test_the_checks_before_a_launch() -> None:
    params, grads = [torch.randn(5, 3), torch.randn(4)], [torch.randn(5, 3), None]
    x = made(CPU, params, grads)
    for sizes in ([], [1], [3], [-1, 3]):
        with pytest.raises(ValueError, match="Invalid group sizes: their sum is"):
            x.check(sizes)
    with pytest.raises(ValueError, match="A parameter with a gradient must have one"):
        x.require_backups([2])
    for wrong in ([None, None], [torch.randn(3, 5), None], [torch.randn(5, 3).double(), None]):
        with pytest.raises(ValueError, match="Invalid backup at index 0"):
            x.set_backups(wrong)
    with pytest.raises(ValueError, match=r"Invalid state 0 at index 0\. There must be one for every gradient"):
        x.require_state([1, 1], 0, [True, False])
    x.require_state([1, 1], 0, [False, True])
    x.make_backups(False)
    for changed in (torch.randn(3, 5), torch.randn(5, 3).double(), torch.randn(3, 5).t()):
        params[0].data = changed
        with pytest.raises(ValueError, match="Parameter 0 has been replaced, or has changed"):
            x.refresh()


def test_what_is_written_must_not_overlap() -> None:
    whole, grads = torch.randn(12), [torch.randn(6), torch.randn(6)]
    made(CPU, [whole[:6], whole[6:]], grads).check([2])
    made(CPU, [whole[:6], whole[5:11]], [grads[0], None]).check([2])  # the other takes no part
    for lists in (
        ([whole[:6], whole[5:11]], grads),
        ([whole[:6]], grads[:1], None, [whole[3:9]]),
        ([whole[:6]], grads[:1], [whole[3:9]]),
    ):
        with pytest.raises(ValueError, match="must not overlap"):
            made(CPU, *lists).check([len(lists[0])])
