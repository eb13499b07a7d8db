"""Objects of every odd kind, and lists, groups and numbers in which few are wrong: arguments of hostile calls."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

SIZE = 67


class Forged:
    """Says of itself what a tensor says, and is none."""

    shape, dtype, layout, is_cpu, is_cuda = (SIZE,), torch.float32, torch.strided, True, False

    def data_ptr(self) -> int:
        return 8

    def stride(self) -> tuple[int]:
        return (1,)


def freed() -> Tensor:
    x = torch.randn(SIZE)
    x.untyped_storage().resize_(0)
    return x


POOL = torch.zeros(4 * SIZE)
ODDITIES: dict[str, Any] = {
    "none": lambda: None,
    "good": lambda: torch.randn(SIZE),
    "double": lambda: torch.randn(SIZE, dtype=torch.float64),
    "half": lambda: torch.randn(SIZE).half(),
    "bfloat16": lambda: torch.randn(SIZE).bfloat16(),
    "integers": lambda: torch.arange(SIZE),
    "bools": lambda: torch.ones(SIZE, dtype=torch.bool),
    "complex": lambda: torch.randn(SIZE, dtype=torch.complex64),
    "float8": lambda: torch.randn(SIZE).to(torch.float8_e5m2),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(SIZE), 0.1, 0, torch.qint8),
    "short": lambda: torch.randn(SIZE - 1),
    "long": lambda: torch.randn(SIZE + 1),
    "empty": lambda: torch.empty(0),
    "no dimensions": lambda: torch.tensor(0.3),
    "matrix": lambda: torch.randn(SIZE, 1),
    "strided": lambda: torch.randn(2 * SIZE)[::2],
    "expanded": lambda: torch.randn(1).expand(SIZE),
    "expanded beyond memory": lambda: torch.randn(1).expand(2**40, 2**20),
    "overlapping itself": lambda: torch.randn(SIZE).as_strided((SIZE,), (0,)),
    "overlapping others": lambda: POOL[SIZE // 2 :][:SIZE],
    "overlapping others too": lambda: POOL[:SIZE],
    "at an odd address": lambda: torch.zeros(4 * SIZE + 1, dtype=torch.uint8)[1:].numpy().view(np.float32),
    "meta": lambda: torch.empty(SIZE, device="meta"),
    "meta beyond memory": lambda: torch.empty(2**50, device="meta"),
    "zero and overflowing": lambda: torch.empty(0).expand(2**61, 0),
    "freed": freed,
    "sparse": lambda: torch.randn(SIZE).to_sparse(),
    "negated": lambda: torch.view_as_complex(torch.randn(SIZE, 2)).conj().imag,
    "array": lambda: np.zeros(SIZE, dtype=np.float32),
    "list": lambda: [0.5] * SIZE,
    "string": lambda: "momentum_buffer",
    "number": lambda: 0.5,
    "forged": Forged,
}


def made(kind: str) -> Any:
    """An object of the kind; where torch itself refuses to make one, nothing."""
    with contextlib.suppress(RuntimeError, ValueError):
        return ODDITIES[kind]()
    return None


def mostly(good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Three times out of four what is good, so that calls get past the first check. (one_of would flatten the two.)"""
    return st.sampled_from([good, good, good, odd]).flatmap(lambda strategy: strategy)


def objects(kind: str) -> st.SearchStrategy[Any]:
    """Mostly of the kind."""
    return mostly(st.just(kind), st.sampled_from(sorted(ODDITIES))).map(made)


OBJECTS = objects("good")
COUNTS = st.sampled_from([2, 2, 2, 0, 1, 3])
CONTAINERS = st.sampled_from([list, list, list, list, tuple, dict.fromkeys, iter, lambda x: None, len])
INTEGERS = st.sampled_from([2, 2, 2, 1, 0, -1, 3, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64, 0.5, "2", None])
SIZES = mostly(st.just(2), INTEGERS)
NUMBERS = st.sampled_from(
    [
        *(0.07, 0.9, 0.0, 1.0, 2, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 10**400, "0.1", None),
        *(torch.tensor(0.3), torch.tensor([0.1, 0.2]), torch.tensor(0.3, device="meta")),
    ]
)
SANE = st.sampled_from([0.07, 0.9, 0.0, 1.0, 2.0, 1.5, math.inf, math.nan, -1.0])
THREADS = st.sampled_from([1, 1, 2, 2, 0, -5, 7, 2**31 - 1, 2**40])


@st.composite
def lists(draw: st.DrawFn, kind: str = "good", of: st.SearchStrategy[Any] = OBJECTS) -> Any:
    """What is given for a list of tensors: two good ones, or anything."""
    if draw(st.booleans()):
        return [made(kind), made(kind)]
    objects = [draw(of) for _ in range(draw(COUNTS))]
    with contextlib.suppress(TypeError):
        return draw(CONTAINERS)(objects)
    return objects


GOOD, HALVES = lists(), lists("bfloat16", objects("bfloat16"))


@st.composite
def operands(draw: st.DrawFn) -> Any:
    """Parameters, gradients, backups, three lists of state and masters, of which an op takes some. Few are wrong."""
    halves, with_masters, backups = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([True, True, False]))
    kinds = ["bfloat16" if halves else "good"] * 3 + ["good" if with_masters or not halves else "bfloat16"] * 3
    given = [[made(kind), made(kind)] for kind in kinds]
    given.append([made("good"), made("good")] if with_masters and halves else None)
    if given[-1] is not None or not backups:
        given[2] = None
    for wrong in draw(mostly(st.just(()), st.sets(st.integers(0, 6), max_size=3))):
        given[wrong] = draw(HALVES if halves and wrong < 3 else GOOD)
    params, grads, backups, *states, masters = given
    return params, grads, backups, states, masters


def tuples(fields: int, flags: slice) -> st.SearchStrategy[Any]:
    """Groups as tuples: the size, then hyperparameters, of which some are flags; often one sane group of two."""
    sane, kinds = [st.just(2), *[SANE] * (fields - 1)], [SIZES, *[mostly(SANE, NUMBERS)] * (fields - 1)]
    sane[flags] = kinds[flags] = [st.booleans()] * len(kinds[flags])
    whole = st.tuples(*kinds)
    anything = st.lists(st.one_of(whole, whole, whole, whole.map(lambda x: x[:-1])), min_size=1, max_size=2)
    return mostly(st.tuples(st.tuples(*sane)).map(list), anything)


ASCENT, SGD, ADAM = tuples(5, slice(2, 3)), tuples(8, slice(5, 8)), tuples(12, slice(6, 10))
MEAN = tuples(3, slice(2, 3))
JOURNALS = st.sampled_from([*[list] * 9, tuple, dict, lambda: None])
NORMS = st.just(torch.ones(2000, dtype=torch.float64))  # and enough memory to make one
SCALES = mostly(st.sampled_from([None, torch.tensor(0.3)]), st.one_of(NUMBERS, OBJECTS))
SCALARS = mostly(NORMS, st.one_of(st.none(), NUMBERS, OBJECTS))
EXPONENTS = mostly(st.sampled_from([1.0, 1.5, 2.0, math.inf]), st.one_of(SANE, NUMBERS))
STREAMS = st.sampled_from([0, 0, 1, 1, -1, 2**64])
STEPS = lists("no dimensions", objects("no dimensions"))
