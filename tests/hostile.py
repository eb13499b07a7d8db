"""Calls that no program should make, of the compiled core and of what leads to it (Hypothesis).

They run in a process of their own: ``python -c "import hostile; hostile.main()"``. What is wrong must end in a Python
exception, with every weight as it was; a signal, or a report of a sanitizer, ends the process.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import faulthandler
import warnings
from typing import Any

import profiles  # noqa: F401
import torch
from emulated_tests import EMULATED, NATIVE
from helpers import bits, snapshot
from hostile_arguments import (
    ADAM,
    ASCENT,
    EXPONENTS,
    JOURNALS,
    MEAN,
    NUMBERS,
    OBJECTS,
    SANE,
    SCALARS,
    SCALES,
    SGD,
    SIZE,
    SIZES,
    STEPS,
    STREAMS,
    THREADS,
    lists,
    mostly,
    operands,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_sam import FusedSAM, _native, ops
from fused_sam.ops.lists import why_not_aten

# Tensors are read through ATen, or through Python and DLPack.
try:
    from fused_sam._aten import access as aten

    ACCESS = [None, aten] if why_not_aten is None else [None]
except ImportError:
    ACCESS = [None]


BACKENDS = st.sampled_from([*NATIVE, "eager"])
# Without the emulator every launch fails.
FOR_GPU = st.sampled_from([False, True] if EMULATED else [False, False, False, True])


@st.composite
def calls(draw: st.DrawFn) -> Any:
    """A method of a batch with its arguments."""
    covering = mostly(st.just([2]), st.lists(SIZES, max_size=3))
    on, journals = st.one_of(THREADS, STREAMS), JOURNALS.map(lambda make: make())
    methods = {
        "make_backups": (st.booleans(),),
        "set_backups": (lists(),),
        "norm_partials": (ASCENT, EXPONENTS),
        "norm": (ASCENT, EXPONENTS, SCALARS, on),
        "perturb": (SCALARS, ASCENT, EXPONENTS, on, journals, st.none()),
        "restore": (SIZES, on),
        "sgd_update": (SGD, SCALES, SCALES, on, journals),
        "adam_update": (ADAM, st.one_of(st.none(), STEPS, lists()), SCALES, SCALES, on, journals),
        "unsupported": (),
        "has_backup": (),
        "memory": (),
        "addresses": (st.sampled_from(["params", "grads", "backups", "weights"]),),
        "state_addresses": (st.integers(-1, 4),),
        "sizes": (),
        "kinds": (st.booleans(), st.booleans()),
        "check": (covering,),
        "require_state": (covering, st.integers(-1, 4), mostly(st.just([False]), st.lists(st.booleans(), max_size=3))),
        "require_backups": (covering,),
        "keep_backups": (),
        "refresh": (),
    }
    name = draw(st.sampled_from(sorted(methods)))
    return name, tuple(draw(a) for a in methods[name])


def contents(x: Any) -> list[bytes]:
    """The values of every tensor of a list that has any."""
    with contextlib.suppress(TypeError, RuntimeError, NotImplementedError):
        sized = isinstance(x, list | tuple)
        held = [t for t in x if sized and isinstance(t, Tensor) and 0 < t.numel() < 2**20 and not t.is_meta]
        return [bits(t) for t in held if t.layout != torch.strided or t.untyped_storage().nbytes() > 0]
    return []


# How many calls of a name went through. A fuzz in which none does looks at the first check only.
THROUGH: collections.Counter[str] = collections.Counter()


def attempt(name: str, call: Any, *weights: Any) -> bool:
    """Whether a call went through. If it did not, it has changed nothing."""
    before = [contents(w) for w in weights]
    try:
        call()
    except Exception:
        assert [contents(w) for w in weights] == before
        THROUGH[name] += 0
        return False
    THROUGH[name] += 1
    return True


def attempt_all(batch: Any, todo: Any, *weights: Any) -> None:
    for name, arguments in todo:
        if name in ("unsupported", "has_backup", "memory"):
            getattr(batch, name)
        else:
            attempt(name, lambda: getattr(batch, name)(*arguments), *weights)  # noqa: B023


@given(
    first=operands(),
    others=operands(),
    same=st.booleans(),
    counts=st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 3, 3, 3, 4])),
    todo=st.lists(calls(), min_size=1, max_size=6),
    then=st.lists(calls(), min_size=1, max_size=4),
    means=st.lists(st.tuples(SIZES, MEAN, THREADS, JOURNALS.map(lambda make: make())), max_size=2),
    for_gpu=FOR_GPU,
    held=st.booleans(),
    access=st.sampled_from(ACCESS),
)
def bindings(
    first: Any,
    others: Any,
    same: bool,
    counts: tuple[int, int],
    todo: Any,
    then: Any,
    means: Any,
    for_gpu: bool,
    held: bool,
    access: Any,
) -> None:
    """The module that only `fused_sam.backends.native` should call."""
    made: list[Any] = []

    def batch(name: str, operands: Any, backups: Any, count: int, device: int = 1) -> Any:
        params, grads, _, states, masters = operands
        given = tuple([*states, None][:count])
        made.clear()
        if held:
            with contextlib.suppress(TypeError, AttributeError):  # of what is no list of parameters
                grads = _native.Gradients(params)
        arguments = params, grads, backups, given, masters, device, 0, for_gpu
        attempt(name, lambda: made.append(_native.Batch(*arguments)), params)
        return made[0] if made else None

    params, grads, backups, _, masters = first
    _native.read_through(access)
    attempt("Gradients", lambda: list(_native.Gradients(params)))
    batch("Batch on a GPU", first, backups, counts[1], 2)
    attempt("increment_version", lambda: _native.increment_version(params))
    attempt("lookup", lambda: _native.lookup({}, params, "step"))
    attempt("stream_copy", lambda: _native.stream_copy(params[0], grads[0], 2), params)
    ascent = batch("Batch", first, backups, counts[0])
    if ascent is None:
        return
    attempt_all(ascent, todo, params, masters)
    # The base step, of the same parameters or others, with what the ascent keeps.
    second = first if same else others
    descent = batch("Batch after a Batch", second, ascent, counts[1])
    if descent is not None:
        attempt_all(descent, then, second[0], second[-1])
    for arguments in means:
        batch_of_means = descent or ascent
        attempt("restore_accumulate", lambda: batch_of_means.restore_accumulate(ascent, *arguments), params)  # noqa: B023
    attempt("restore", lambda: ascent.restore(2, 1), params, masters)


@given(
    given=operands(),
    steps=STEPS,
    sizes=mostly(st.just([2]), st.lists(SIZES, min_size=1, max_size=2)),
    numbers=st.lists(SANE, min_size=4, max_size=4),
    norm=mostly(st.sampled_from([None, torch.tensor(0.3, dtype=torch.float64), torch.ones(3).double()]), SCALARS),
    p=EXPONENTS,
    backend=BACKENDS,
)
def op_surface(given: Any, steps: Any, sizes: Any, numbers: Any, norm: Any, p: Any, backend: str) -> None:
    """The ops, which are for anybody to call."""
    params, grads, backups, states, masters = given
    rho, momentum, eta, decay = numbers
    ascent = [ops.AscentGroup(size, rho, bool(i), eta, decay) for i, size in enumerate(sizes)]
    sgd = [ops.SGDGroup(size, rho, momentum, eta, decay, False, True, eta > 0) for size in sizes]
    adam = [ops.AdamGroup(size, rho, 0.9, 0.99, 1e-8, decay, True, True, False, eta > 0) for size in sizes]
    means = [ops.AccumulateGroup(size, rho, eta > 0) for size in sizes]
    on = {"backend": backend, "masters": masters}
    attempt(f"ops.norm, {backend}", lambda: ops.norm(params, grads, ascent, p=p, **on), params)
    attempt(f"ops.perturb, {backend}", lambda: ops.perturb(params, grads, backups, norm, ascent, p=p, **on), params)
    attempt(f"ops.restore, {backend}", lambda: ops.restore(params, backups, backend), params)
    mean = f"ops.restore_accumulate, {backend}"
    attempt(mean, lambda: ops.restore_accumulate(params, grads, means, backend=backend), params)
    lists = params, grads, backups, states[0]
    attempt(f"ops.sgd_update, {backend}", lambda: ops.sgd_update(*lists, sgd, **on), params, masters)
    lists = params, grads, backups, *states, steps
    attempt(f"ops.adam_update, {backend}", lambda: ops.adam_update(*lists, adam, **on), params, masters)


KEYS = st.sampled_from(
    ["momentum_buffer", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "orthogonal_grad", "master", "x"]
)
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
        "decay_in_ascent",
        "maximize",
        "amsgrad",
        "sam_step",
    ]
)
GROUPS = st.dictionaries(OPTIONS, st.one_of(NUMBERS, OBJECTS, st.booleans(), st.tuples(NUMBERS, NUMBERS)), max_size=3)


# What reads more of the state, or more often, than a plain step.
MODES: list[dict[str, Any]] = [
    {},
    {"master_weights": True},
    {"direction": "momentum"},
    {"interval": 2, "looksam_alpha": 0.3},
    {"ascent_steps": 2, "adaptive": True},
    {"max_grad_norm": 0.1, "p": 1.5},
]


def rounded_master(entry: Any, dtype: torch.dtype) -> bytes | None:
    """What w is by a master that could be one; torch would read one whose memory is freed."""
    master = entry.get("master") if isinstance(entry, dict) else None
    if not isinstance(master, Tensor) or master.shape != (SIZE,) or not master.is_cpu:
        return None
    if master.dtype != torch.float32 or master.is_sparse or master.untyped_storage().nbytes() == 0:
        return None
    return bits(master.to(dtype))


@given(
    state=STATE,
    options=GROUPS,
    base=BASES,
    mode=st.sampled_from(MODES),
    sixteen=st.booleans(),
    replaced=st.booleans(),
    backend=BACKENDS,
)
def checkpoints(state: Any, options: Any, base: Any, mode: Any, sixteen: bool, replaced: bool, backend: str) -> None:
    """A checkpoint that anybody has edited, or state that has been edited in place."""
    dtype = torch.bfloat16 if sixteen else torch.float32
    params = [torch.randn(SIZE).to(dtype).requires_grad_() for _ in range(2)]
    momentum = {"momentum": 0.87} if base is torch.optim.SGD else {}
    opt = FusedSAM(params, base, lr=0.013, weight_decay=0.017, backend=backend, **mode, **momentum)

    def closure() -> Tensor:
        for p in params:
            p.grad = torch.ones_like(p)
        return torch.tensor(0.0)

    def step(name: str) -> None:
        before = snapshot(params)
        # Tensors as betas ask for torch's own loop, which in a step at w has no copy of the weights to return to.
        own_loop = "betas" in options and "interval" in mode
        if attempt(name, lambda: opt.step(closure)) or own_loop:
            return
        # A master that was put into the state is w from then on, though the step be refused.
        assert all(bits(p) in (w, rounded_master(opt.state.get(p), dtype)) for p, w in zip(params, before))
        assert not opt.perturbed

    for _ in range(2):
        opt.step(closure)
    saved = opt.state_dict()
    edited = {
        "state": state if replaced else {**saved["state"], **state},
        "param_groups": copy.deepcopy(saved["param_groups"]),
    }
    edited["param_groups"][0].update(options)
    if not attempt("load_state_dict", lambda: opt.load_state_dict(edited), params):
        return
    step("step after a load")
    with contextlib.suppress(Exception):
        for p, entry in zip(params, state.values()):
            opt.state[p] = entry
    step("step on edited state")
    assert not opt.perturbed


def main() -> None:
    """All of them; a profile with more examples than CI's is for hours."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    # pybind11 puts the arguments into its messages, and torch cannot print a tensor whose storage is freed.
    Tensor.__repr__ = lambda x: f"a tensor of {tuple(x.shape)}"
    for test in (bindings, op_surface, checkpoints):
        examples = max(400, settings().max_examples)
        THROUGH.clear()
        quiet = settings(max_examples=examples, suppress_health_check=list(HealthCheck))
        quiet(test)()
        print(f"{test.__name__}: {examples} cases")
        print("went through:", dict(THROUGH))
        never = {name for name, count in THROUGH.items() if count == 0}
        assert not never, f"{never} never went through: the cases do not reach what they are for"
