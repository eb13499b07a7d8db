"""The implementations of the op surface, and the choice among them.

A backend is a module with the names of `fused_sam.backends.interface.Backend`. An explicitly requested backend is used
or raises; otherwise each device gets the first one of `REGISTRY` that loads and takes it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fused_sam.backends.interface import Backend
from fused_sam.callers import warn

if TYPE_CHECKING:
    from fused_sam.backends import eager, native, triton

    # mypy compares each with the interface.
    _native: Backend = native
    _triton: Backend = triton
    _eager: Backend = eager

logger = logging.getLogger("fused_sam")
Name: TypeAlias = Literal["native", "triton", "eager"]


@dataclass(frozen=True)
class Candidate:
    """A row of the registry: the name users ask for, where it lives, and how to get it when it does not load."""

    name: str
    module: str
    remedy: str


# Best first.
REGISTRY = (
    Candidate(
        "native",
        "fused_sam.backends.native",
        "reinstall where a C++17 compiler is found: FUSED_SAM_NATIVE=ON pip install --force-reinstall --no-deps .",
    ),
    Candidate("triton", "fused_sam.backends.triton", "pip install triton (CUDA and ROCm builds of torch bring it)"),
    Candidate("eager", "fused_sam.backends.eager", "reinstall torch"),
)


@functools.cache
def _load(backend: Candidate) -> Any:
    """Return the module, or what importing it raises: a broken Triton may raise anything."""
    try:
        return importlib.import_module(backend.module)
    except Exception as error:
        return error


def available(device_type: str | None = None) -> dict[str, str]:
    """Return the state of every known backend, for a device type if given: ``"ok"``, or why it cannot be used."""
    return {backend.name: _state(backend, device_type) for backend in REGISTRY}


def _state(backend: Candidate, device_type: str | None) -> str:
    module = _load(backend)
    if isinstance(module, Exception):
        return f"{_message(module)} (to get it: {_remedy(backend, module)})"
    try:
        return (device_type and module.why_not(device_type)) or "ok"
    except Exception as error:
        return f"it fails where it is asked for {device_type} tensors: {_message(error)}"


def _message(error: Exception) -> str:
    """Return what an error says in one line, and of which kind it is where that is no matter of course."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"


def _remedy(backend: Candidate, error: Exception) -> str:
    """Return how to get a backend that does not load: that of another backend, if the error names one that it needs."""
    name = getattr(error, "name", None)
    return next((needed.remedy for needed in REGISTRY if needed.module == name), backend.remedy)


def requested(name: str | None = None) -> str | None:
    """Return the backend asked for by argument, else by ``FUSED_SAM_BACKEND``, else None.

    Raises:
        ValueError: if there is no backend of that name.
        RuntimeError: if it cannot be used here; the message says why and what to run.
    """
    name = name or os.environ.get("FUSED_SAM_BACKEND") or None
    if name is None:
        return None
    known = {b.name: b for b in REGISTRY}
    if name not in known:
        raise ValueError(f"Invalid backend={name!r}. Must be one of {sorted(known)}.")
    if isinstance(reason := _load(known[name]), Exception):
        usable = [n for n, state in available().items() if state == "ok"]
        raise RuntimeError(
            f"backend={name!r} was asked for but cannot be used: {_message(reason)}. Usable: {usable}. To get it: "
            f"{_remedy(known[name], reason)}"
        )
    return name


@functools.cache
def for_device(device_type: str, name: str | None = None) -> Backend:
    """Return the backend for tensors of a device type such as ``"cpu"`` or ``"cuda"``, and say so in the log, once.

    Raises:
        RuntimeError: if the requested backend cannot take tensors of the device; the message says why.
    """
    backend = _candidate(device_type, name)
    how = "chosen for %s tensors" if name is None else "taken for %s tensors, as was asked"
    logger.info(f"backend %r {how}", backend.name, device_type)
    if name is None:
        _warn_of_what_is_missing(device_type, backend.name)
    module: Backend = _load(backend)
    return module


def chosen(device_type: str, name: str | None = None) -> str:
    """Return the name of the backend that `for_device` returns, or raise what it does."""
    return _candidate(device_type, name).name


def _candidate(device_type: str, name: str | None) -> Candidate:
    for backend in REGISTRY:
        if name in (None, backend.name) and _state(backend, device_type) == "ok":
            return backend
    raise RuntimeError(
        f"backend={name!r} was asked for but cannot take {device_type} tensors: "
        f"{available(device_type).get(name or '', 'there is no such backend')}"
    )


def _warn_of_what_is_missing(device_type: str, chosen: str) -> None:
    """Warn where the install lacks kernels that it could have here, with the command that mends it."""
    native = REGISTRY[0]
    if chosen == native.name or sys.platform != "linux":
        return
    module = _load(native)
    if isinstance(module, Exception):
        missing, remedy = f"compiled core cannot be used ({_message(module)})", native.remedy
    elif device_type == "cuda" and module.lacks_cuda():
        missing = "CUDA kernels are not in this install"
        remedy = "reinstall where nvcc is found: FUSED_SAM_CUDA=ON pip install --force-reinstall --no-deps ."
    else:
        return
    warn(
        f"FusedSAM's {missing}: {device_type} tensors are left to the {chosen!r} backend. To mend it, {remedy} "
        f"(backend={chosen!r} says that this is wanted)"
    )
