"""What the Triton backend knows of tensors: the same from the native core and from the Python that stands in for it."""

from __future__ import annotations

import importlib.util
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LARGE
from torch import Tensor

from fused_sam import backends

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if backends.available()["native"] != "ok":
    pytest.skip("the native core is not built: there is one kind of operands", allow_module_level=True)

from fused_sam.backends import native
from fused_sam.backends.triton import Batch
from fused_sam.backends.triton.operands import Operands

CPU = torch.device("cpu")
MAKERS = [native.operands, Operands]
every_maker = pytest.mark.parametrize("make", MAKERS, ids=["native", "python"])
Make = Callable[..., Any]


def made(make: Make, params: list[Any], grads: Any, backups: Any = None, *states: Any) -> Any:
    return make(CPU, params, grads, backups, states)


def read(column: bytes) -> list[int]:
    return list(array("q", column))


def columns(x: Any, states: int) -> list[list[int]]:
    """All that kernels would be told, but where empty tensors are, which nobody reads."""
    sizes = read(x.sizes())
    addresses = [x.addresses(of) for of in ("params", "grads", "backups")]
    addresses += [x.state_addresses(k) for k in range(states)]
    kinds = [x.kinds(*counts) for counts in ((True, False), (False, True), (True, True))]
    return [sizes, *([value if n else 0 for n, value in zip(sizes, read(c), strict=True)] for c in addresses + kinds)]


def strided() -> Tensor:
    return torch.randn(7, 10)[:, ::2]


def freed() -> Tensor:
    x = torch.randn(5)
    x.untyped_storage().resize_(0)
    return x


def negated() -> Tensor:
    return torch._neg_view(torch.randn(4, 3))


# Of one parameter: itself, its gradient, a backup, a momentum buffer.
TAKEN: dict[str, Callable[[], tuple[Any, Any, Any, Any]]] = {
    "plain": lambda: (torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)),
    "scalar": lambda: tuple(torch.randn(()) for _ in range(4)),
    "empty": lambda: tuple(torch.empty(0, 3) for _ in range(4)),
    "without a gradient": lambda: (torch.randn(5), None, None, torch.randn(5)),
    "without a gradient or a form": lambda: (torch.randn(5).to_sparse(), None, None, None),
    "to be restored": lambda: (torch.randn(5), None, torch.randn(5), None),
    "channels_last": lambda: tuple(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(4)),
    "transposed": lambda: tuple(torch.randn(3, 5).t() for _ in range(4)),
    "one element of any stride": lambda: (
        torch.randn(4)[::4], torch.randn(1), torch.randn(9)[::9], torch.randn(2)[1:],
    ),
    "one dimension of any stride": lambda: (torch.randn(1, 5), torch.randn(3, 5)[::3], *torch.randn(2, 1, 5)),
    "bfloat16": lambda: tuple(torch.randn(6).bfloat16() for _ in range(4)),
    "wider gradient": lambda: (torch.randn(6).half(), torch.randn(6), torch.randn(6).half(), torch.randn(6).half()),
    "narrower gradient": lambda: (torch.randn(6), torch.randn(6).bfloat16(), torch.randn(6), torch.randn(6)),
    "float64": lambda: tuple(torch.randn(6).double() for _ in range(4)),
    "large": lambda: tuple(torch.randn(LARGE) for _ in range(4)),
}  # fmt: skip
REFUSED: dict[str, Callable[[], tuple[Any, Any, Any, Any]]] = {
    "strided": lambda: (strided(), strided(), strided(), strided()),
    "strided gradient": lambda: (torch.randn(7, 5), strided(), torch.randn(7, 5), torch.randn(7, 5)),
    "other layout": lambda: (torch.randn(5, 3), torch.randn(3, 5).t(), torch.randn(5, 3), torch.randn(5, 3)),
    "other layout of momentum": lambda: (torch.randn(5, 3), torch.randn(5, 3), None, torch.randn(3, 5).t()),
    "expanded": lambda: (torch.randn(5), torch.randn(1).expand(5), torch.randn(5), torch.randn(5)),
    "expanded parameter": lambda: (torch.randn(1).expand(5), torch.randn(5), torch.randn(5), torch.randn(5)),
    "negated gradient": lambda: (torch.randn(4, 3), negated(), torch.randn(4, 3), torch.randn(4, 3)),
    "sparse": lambda: (torch.randn(5), torch.randn(5).to_sparse(), torch.randn(5), torch.randn(5)),
    "sparse parameter": lambda: (torch.randn(5).to_sparse(), torch.randn(5), torch.randn(5), torch.randn(5)),
    "complex": lambda: tuple(torch.randn(5, dtype=torch.complex64) for _ in range(4)),
    "integers": lambda: tuple(torch.arange(5) for _ in range(4)),
    "gradient that does not mix": lambda: (torch.randn(5), torch.randn(5).double(), torch.randn(5), torch.randn(5)),
    "backup of another dtype": lambda: (torch.randn(5).half(), torch.randn(5).half(), torch.randn(5), None),
    "momentum of another dtype": lambda: (torch.randn(5), torch.randn(5), None, torch.randn(5).double()),
    "other shape": lambda: (torch.randn(6), torch.randn(2, 3), torch.randn(6), torch.randn(6)),
    "other size": lambda: (torch.randn(6), torch.randn(7), torch.randn(6), torch.randn(6)),
    "other device": lambda: (torch.randn(6), torch.randn(6, device="meta"), torch.randn(6), torch.randn(6)),
    "freed": lambda: (torch.randn(5), freed(), torch.randn(5), torch.randn(5)),
    "freed parameter": lambda: (freed(), torch.randn(5), torch.randn(5), torch.randn(5)),
    "no tensor": lambda: (torch.randn(5), 0.5, torch.randn(5), torch.randn(5)),
}


@pytest.mark.parametrize("backed", [False, True], ids=["ascent", "backups"])
@pytest.mark.parametrize("case", [*TAKEN, *REFUSED])
def test_both_see_the_same(case: str, backed: bool) -> None:
    rows = [TAKEN["plain"](), (TAKEN | REFUSED)[case](), TAKEN["bfloat16"]()]
    params, grads, backups, momenta = (list(x) for x in zip(*rows, strict=True))
    core, python = (made(make, params, grads, backups if backed else None, momenta) for make in MAKERS)
    refused = case in REFUSED and (backed or case != "backup of another dtype")
    assert core.odd == python.odd == ([1] if refused else [])
    for x in (core, python):
        if refused:
            with pytest.raises(ValueError, match="Invalid tensor at index 1"):
                x.check([3])
        else:
            x.check([1, 2])
            x.require_state([1, 2], 0, [False, False])
    if not refused:
        assert columns(core, 1) == columns(python, 1)
        kept = [[k for k, n in zip(x.kept, read(x.sizes()), strict=True) if n] for x in (core, python)]
        assert kept[0] == kept[1]


@every_maker
@pytest.mark.parametrize("owned", [False, True])
def test_a_gradient_holds_w_where_nothing_else_can_reach_it(make: Make, owned: bool) -> None:
    params = [torch.randn(n) for n in (LARGE, 7, LARGE, 0, LARGE, LARGE)]
    grads: list[Any] = [torch.randn(n) for n in (LARGE, 7, LARGE, 0, LARGE)] + [None]
    seen = grads[2].view(-1)
    x = made(make, params, grads)
    x.make_backups(owned)
    x.require_backups([6])
    at, backups = read(x.addresses("grads")), read(x.addresses("backups"))
    swapped = [b != 0 and a == b for a, b in zip(at, backups, strict=True)]
    assert swapped == [owned, False, False, False, owned, False]
    assert [b != 0 for b in backups[:3]] == [True] * 3
    assert backups[5] == 0
    assert len(set(backups) - {0}) == len([b for b in backups if b])
    # The memory stays when everything but the backups is let go.
    x.keep_backups()
    del grads
    assert read(x.addresses("grads")) == [0] * 6
    assert read(x.addresses("backups")) == backups
    assert len(seen) == LARGE


@every_maker
def test_an_update_restores_what_the_ascent_moved(make: Make) -> None:
    params = [torch.randn(5), torch.randn(3).half(), torch.randn(LARGE)]
    ascent = made(make, params, [torch.randn(5), torch.randn(3).half(), None])
    ascent.make_backups(False)
    ascent.keep_backups()
    backups = read(ascent.addresses("backups"))
    update = made(make, params, [torch.randn(5), None, torch.randn(LARGE)], ascent, [torch.randn(5), None, None])
    update.check([3])
    assert read(update.addresses("backups")) == backups
    assert read(update.kinds(True, True)) == [0, 15, 0]
    assert read(update.kinds(True, False)) == [0, -1, 0]
    assert read(update.sizes()) == [5, 3, LARGE]
    with pytest.raises(ValueError, match="There must be one for every gradient"):
        update.require_state([2, 1], 0, [False, True])
    update.require_state([2, 1], 0, [True, False])
    other = [params[0], torch.randn(3).half(), params[2]]
    with pytest.raises(ValueError, match="Parameter 1 has been replaced"):
        made(make, other, None, ascent)
    with pytest.raises(ValueError, match="Must be of the same parameters"):
        made(make, params[:1], None, ascent)


def test_an_ascent_of_fewer_parameters_is_refused() -> None:
    """The kernels would read beyond the end of what it has written."""
    params = [torch.randn(5), torch.randn(3)]
    ascent = Batch(params[:1], [torch.randn(5)])
    with pytest.raises(ValueError, match="Must be of the same parameters"):
        Batch(params, None, ascent)


@every_maker
def test_parameters_may_move_but_not_change_between_the_passes(make: Make) -> None:
    params = [torch.randn(5, 3), torch.randn(3)]
    x = made(make, params, [torch.randn(5, 3), None])
    x.make_backups(False)
    params[0].data = torch.randn(5, 3)
    x.refresh()
    assert read(x.addresses("params"))[0] == params[0].data_ptr()
    for changed in (torch.randn(3, 5), torch.randn(5, 3).double(), torch.randn(3, 5).t()):
        params[0].data = changed
        with pytest.raises(ValueError, match="Parameter 0 has been replaced, or has changed"):
            x.refresh()


@every_maker
def test_what_is_written_must_not_overlap(make: Make) -> None:
    whole = torch.randn(12)
    grads = [torch.randn(6), torch.randn(6)]
    made(make, [whole[:6], whole[6:]], grads).check([2])
    with pytest.raises(ValueError, match="must not overlap"):
        made(make, [whole[:6], whole[5:11]], grads).check([2])
    made(make, [whole[:6], whole[5:11]], [grads[0], None]).check([2])  # the other takes no part
    with pytest.raises(ValueError, match="must not overlap"):
        made(make, [whole[:6]], grads[:1], None, [whole[3:9]]).check([1])
    with pytest.raises(ValueError, match="must not overlap"):
        made(make, [whole[:6]], grads[:1], [whole[3:9]]).check([1])


@every_maker
def test_backups_that_do_not_fit_are_refused(make: Make) -> None:
    params, grads = [torch.randn(5, 3), torch.randn(4)], [torch.randn(5, 3), None]
    x = made(make, params, grads)
    with pytest.raises(ValueError, match="A parameter with a gradient must have one"):
        x.require_backups([2])
    for wrong in ([None, None], [torch.randn(3, 5), None], [torch.randn(5, 3).double(), None]):
        with pytest.raises(ValueError, match="Invalid backup at index 0"):
            x.set_backups(wrong)
    kept = torch.randn(5, 3)
    x.set_backups([kept, None])
    x.require_backups([2])
    assert read(x.addresses("backups")) == [kept.data_ptr(), 0]
    x.set_backups(list(grads))
    x.require_backups([2])
    assert read(x.addresses("backups")) == read(x.addresses("grads"))


@every_maker
@pytest.mark.parametrize("sizes", [[], [1], [3], [-1, 3], [1, 2]], ids=str)
def test_groups_that_do_not_cover_the_tensors_are_refused(make: Make, sizes: list[int]) -> None:
    x = made(make, [torch.randn(5), torch.randn(4)], [torch.randn(5), None])
    with pytest.raises(ValueError, match="Invalid group sizes: their sum is"):
        x.check(sizes)
