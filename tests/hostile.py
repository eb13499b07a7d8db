"""Calls that no program should make, of the compiled core and of what leads to it (Hypothesis).

They run in a process of their own: ``python -c "import hostile; hostile.main()"``. What is wrong must end in a Python
exception, with every weight as it was; a signal, or a report of a sanitizer, ends the process.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import math
import warnings
from typing import Any

import conftest  # noqa: F401  (the interpreted CUDA kernels as a backend)
import numpy as np
import profiles  # noqa: F401
import torch
from helpers import bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_sam import FusedSAM, _native, ops

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


# Mostly good, so that calls get past the first check.
OBJECTS = st.one_of(st.just("good"), st.just("good"), st.sampled_from(sorted(ODDITIES))).map(made)
COUNTS = st.sampled_from([2, 2, 2, 0, 1, 3])
CONTAINERS = st.sampled_from([list, list, list, list, tuple, dict.fromkeys, iter, lambda x: None, len])
INTEGERS = st.sampled_from([2, 2, 2, 1, 0, -1, 3, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64, 0.5, "2", None])
NUMBERS = st.sampled_from(
    [
        *(0.07, 0.9, 0.0, 1.0, 2, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 10**400, "0.1", None),
        *(torch.tensor(0.3), torch.tensor([0.1, 0.2]), torch.tensor(0.3, device="meta")),
    ]
)
SANE = st.sampled_from([0.07, 0.9, 0.0, 1.0, 2.0, 1.5, math.inf, math.nan, -1.0])
THREADS = st.sampled_from([1, 2, 0, -5, 7, 2**31 - 1, 2**40])


@st.composite
def lists(draw: st.DrawFn) -> Any:
    """What is given for a list of tensors."""
    objects = [draw(OBJECTS) for _ in range(draw(COUNTS))]
    with contextlib.suppress(TypeError):
        return draw(CONTAINERS)(objects)
    return objects


def tuples(fields: int, flags: slice) -> st.SearchStrategy[Any]:
    """Groups as tuples: the size, then hyperparameters, of which some are flags; rarely of another length."""
    kinds = [INTEGERS, *[st.one_of(SANE, SANE, NUMBERS)] * (fields - 1)]
    kinds[flags] = [st.booleans()] * len(kinds[flags])
    whole = st.tuples(*kinds)
    return st.lists(st.one_of(whole, whole, whole, whole.map(lambda x: x[:-1])), min_size=1, max_size=2)


ASCENT, SGD, ADAM = tuples(5, slice(2, 3)), tuples(9, slice(5, 9)), tuples(13, slice(6, 10))
MEAN = tuples(3, slice(2, 3))
JOURNALS = st.sampled_from([list, list, list, tuple, dict, lambda: None])
SCALARS = st.one_of(st.none(), NUMBERS, OBJECTS, st.just(torch.ones(2000, dtype=torch.float64)))
STREAMS = st.sampled_from([0, 1, -1, 2**64])


@st.composite
def calls(draw: st.DrawFn) -> Any:
    """A method of a batch, or a function that takes one, with its arguments."""
    norm = st.one_of(st.tuples(SANE, NUMBERS, NUMBERS), st.tuples(SANE, SANE, SANE), SCALARS)
    q = st.one_of(SANE, NUMBERS)
    methods = {
        "make_backups": (st.booleans(),),
        "set_backups": (lists(),),
        "norm": (ASCENT, q, THREADS),
        "perturb": (norm, ASCENT, q, THREADS, JOURNALS.map(lambda make: make()), st.none()),
        "restore": (INTEGERS, THREADS),
        "sgd_update": (SGD, SANE, THREADS, JOURNALS.map(lambda make: make())),
        "adam_update": (ADAM, st.one_of(st.none(), lists()), SANE, THREADS, JOURNALS.map(lambda make: make())),
        "odd": (),
        "kept": (),
    }
    functions = {
        "norm_partials": (ASCENT, q),
        "norm": (ASCENT, q, SCALARS, STREAMS),
        "perturb": (SCALARS, ASCENT, q, STREAMS, JOURNALS.map(lambda make: make()), st.none()),
        "restore": (INTEGERS, STREAMS),
        "sgd_update": (SGD, SCALARS, SCALARS, STREAMS, JOURNALS.map(lambda make: make())),
        "adam_update": (ADAM, lists(), SCALARS, SCALARS, STREAMS, JOURNALS.map(lambda make: make())),
    }
    of_cuda = draw(st.booleans())
    name = draw(st.sampled_from(sorted(functions if of_cuda else methods)))
    arguments = tuple(draw(a) for a in (functions if of_cuda else methods)[name])
    return of_cuda, name, arguments


def contents(x: Any) -> list[bytes]:
    """The values of every tensor of a list that has any."""
    with contextlib.suppress(TypeError, RuntimeError, NotImplementedError):
        sized = isinstance(x, list | tuple)
        held = [t for t in x if sized and isinstance(t, Tensor) and 0 < t.numel() < 2**20 and not t.is_meta]
        return [bits(t) for t in held if t.layout != torch.strided or t.untyped_storage().nbytes() > 0]
    return []


def attempt(call: Any, *weights: Any) -> bool:
    """Whether a call went through. If it did not, it has changed nothing."""
    before = [contents(w) for w in weights]
    try:
        call()
    except Exception:
        assert [contents(w) for w in weights] == before
        return False
    return True


@given(
    params=lists(),
    grads=lists(),
    backups=lists(),
    states=st.lists(lists(), max_size=4),
    todo=st.lists(calls(), max_size=6),
    means=st.lists(
        st.tuples(
            st.sampled_from([_native, _native.cuda]),
            st.sampled_from([None, "itself", 3]),
            *(INTEGERS, MEAN, THREADS, JOURNALS.map(lambda make: make())),
        ),
        max_size=2,
    ),
)
def bindings(params: Any, grads: Any, backups: Any, states: Any, todo: Any, means: Any) -> None:
    """The module that only `fused_sam.backends.native` should call."""
    held: list[Any] = []
    for index in (-1, 0):
        attempt(
            lambda index=index: held.append(_native.Batch(params, grads, backups, tuple(states), None, index)), params
        )
    attempt(lambda: _native.get_grads(params))
    attempt(lambda: _native.lookup({}, params, "step"))
    attempt(lambda: _native.stream_copy(params, grads, 2), params)
    for batch in held[:1]:
        for of_cuda, name, arguments in todo:
            if of_cuda:
                attempt(lambda: getattr(_native.cuda, name)(batch, *arguments), params)  # noqa: B023
            elif name in ("odd", "kept"):
                getattr(batch, name)
            else:
                attempt(lambda: getattr(batch, name)(*arguments), params)  # noqa: B023
        attempt(lambda: _native.Batch(params, grads, batch, (), None, -1).restore(2, 1), params)  # noqa: B023
    for batch in held[:1]:
        for module, restored, *arguments in means:
            other = held[0] if restored == "itself" else restored
            attempt(lambda: module.restore_accumulate(batch, other, *arguments), params)  # noqa: B023


@given(
    params=lists(),
    grads=lists(),
    backups=lists(),
    states=st.lists(lists(), min_size=4, max_size=4),
    sizes=st.lists(INTEGERS, min_size=1, max_size=2),
    numbers=st.lists(SANE, min_size=4, max_size=4),
    norm=SCALARS,
    p=st.one_of(st.sampled_from([1.0, 1.5, 2.0, math.inf]), NUMBERS),
    backend=st.sampled_from(["native", "interpreted", "eager"]),
)
def op_surface(
    params: Any, grads: Any, backups: Any, states: Any, sizes: Any, numbers: Any, norm: Any, p: Any, backend: str
) -> None:
    """The ops, which are for anybody to call."""
    rho, momentum, eta, decay = numbers
    ascent = [ops.AscentGroup(size, rho, bool(i), eta, decay) for i, size in enumerate(sizes)]
    sgd = [ops.SGDGroup(size, rho, momentum, eta, decay, False, True, False, eta > 0) for size in sizes]
    adam = [
        ops.AdamGroup(size, rho, 0.9, 0.99, 1e-8, decay, True, True, False, False, measured=eta > 0) for size in sizes
    ]
    means = [ops.MeanGroup(size, rho, eta > 0) for size in sizes]
    attempt(lambda: ops.norm(params, grads, ascent, backend, p), params)
    attempt(lambda: ops.perturb(params, grads, backups, norm, ascent, backend, p=p), params)
    attempt(lambda: ops.restore(params, backups, backend), params)
    attempt(lambda: ops.restore_accumulate(params, grads, means, backend=backend), params)
    attempt(lambda: ops.sgd_update(params, grads, backups, states[0], sgd, backend=backend), params)
    attempt(lambda: ops.adam_update(params, grads, backups, *states, adam, backend=backend), params)


KEYS = st.sampled_from(["momentum_buffer", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "orthogonal_grad", "x"])
BASES = st.sampled_from([torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
STATE = st.dictionaries(st.sampled_from([0, 1, 2, -1, "0", None]), st.one_of(st.dictionaries(KEYS, OBJECTS), OBJECTS))
OPTIONS = st.sampled_from(
    [
        "lr",
        "rho",
        "momentum",
        "betas",
        "eps",
        "weight_decay",
        "adaptive",
        "eta",
        "perturb",
        "maximize",
        "amsgrad",
        "sam_step",
    ]
)
GROUPS = st.dictionaries(OPTIONS, st.one_of(NUMBERS, OBJECTS, st.booleans(), st.tuples(NUMBERS, NUMBERS)), max_size=3)


@given(
    state=STATE,
    options=GROUPS,
    base=BASES,
    replaced=st.booleans(),
    backend=st.sampled_from(["native", "interpreted", "eager"]),
)
def checkpoints(state: Any, options: Any, base: Any, replaced: bool, backend: str) -> None:
    """A checkpoint that anybody has edited, or state that has been edited in place."""
    params = [torch.randn(SIZE).requires_grad_() for _ in range(2)]
    opt = FusedSAM(params, base, lr=0.013, weight_decay=0.017, backend=backend)

    def closure() -> Tensor:
        for p in params:
            p.grad = torch.ones_like(p)
        return torch.tensor(0.0)

    opt.step(closure)
    saved = opt.state_dict()
    edited = {
        "state": state if replaced else {**saved["state"], **state},
        "param_groups": copy.deepcopy(saved["param_groups"]),
    }
    edited["param_groups"][0].update(options)
    if not attempt(lambda: opt.load_state_dict(edited), params):
        return
    if not attempt(lambda: opt.step(closure), params):
        assert not opt.perturbed
    with contextlib.suppress(Exception):
        for p, entry in zip(params, state.values()):
            opt.state[p] = entry
    attempt(lambda: opt.step(closure), params)
    assert not opt.perturbed


def main() -> None:
    """All of them; a profile with more examples than CI's is for hours."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    # pybind11 puts the arguments into its messages, and torch cannot print a tensor whose storage is freed.
    Tensor.__repr__ = lambda x: f"a tensor of {tuple(x.shape)}"
    for test in (bindings, op_surface, checkpoints):
        examples = 10 * settings().max_examples
        quiet = settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        quiet(test)()
        print(f"{test.__name__}: {examples} cases")
