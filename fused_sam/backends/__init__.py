"""The implementations of the op surface, and the choice among them.

A backend is a module with the names of `fused_sam.backends.eager`: helpers over parameter lists, and a class `Batch`
whose methods are the ops. An explicitly requested backend is used or raises; otherwise each device gets the first one
of `REGISTRY` that loads and supports it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType

logger = logging.getLogger("fused_sam")


@dataclass(frozen=True)
class Backend:
    """A row of the registry: the name users ask for, where it lives, and how to get it when it does not load."""

    name: str
    module: str
    remedy: str


# Best first.
REGISTRY = (
    Backend(
        "native",
        "fused_sam.backends.native",
        "reinstall where a C++17 compiler is found: FUSED_SAM_NATIVE=ON pip install --force-reinstall --no-deps .",
    ),
    Backend("eager", "fused_sam.backends.eager", "reinstall torch"),
)


@functools.cache
def _load(backend: Backend) -> ModuleType | ImportError:
    try:
        return importlib.import_module(backend.module)
    except ImportError as error:
        return error


def available() -> dict[str, str]:
    """State of every known backend: ``"ok"``, or why it cannot be used."""
    return {b.name: "ok" if isinstance(m := _load(b), ModuleType) else f"{m} (to get it: {b.remedy})" for b in REGISTRY}


def requested(name: str | None = None) -> str | None:
    """The backend asked for by argument, else by ``FUSED_SAM_BACKEND``, else None.

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
    if isinstance(reason := _load(known[name]), ImportError):
        usable = [n for n, state in available().items() if state == "ok"]
        raise RuntimeError(
            f"backend={name!r} was asked for but cannot be used: {reason}. Usable: {usable}. To get it: "
            f"{known[name].remedy}"
        )
    return name


@functools.cache
def for_device(device_type: str, name: str | None = None) -> ModuleType:
    """The backend for tensors of a device type such as ``"cpu"`` or ``"cuda"``.

    Raises:
        RuntimeError: if the requested backend does not support the device.
    """
    for backend in REGISTRY:
        if name is not None and backend.name != name:
            continue
        module = _load(backend)
        if isinstance(module, ModuleType) and module.supports(device_type):
            if name is None:
                logger.info("backend %r chosen for %s tensors", backend.name, device_type)
            return module
    raise RuntimeError(f"backend={name!r} was asked for but does not support {device_type} tensors.")
