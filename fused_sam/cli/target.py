"""What is measured: a function of the user's that returns (model, loss_fn, data)."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

import torch
from torch import nn


class Target(NamedTuple):
    """What a target returned, and its name in tables and pictures."""

    name: str
    model: nn.Module
    loss_fn: Any
    data: Any


def load(spec: str, seed: int) -> Target:
    """Import the module, seed torch, call the function.

    Raises:
        ValueError: for anything but module:function, a module or function that is not there, or a result that is not
            (model, loss_fn, data).
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"Invalid target {spec!r}. Must be module:function.")
    function = getattr(_module(module_name, spec), function_name, None)
    if not callable(function):
        raise ValueError(f"Invalid target {spec!r}. There must be a function {function_name} in {module_name}.")
    torch.manual_seed(seed)
    result = function()
    if not isinstance(result, tuple | list) or len(result) != 3 or not isinstance(result[0], nn.Module):
        raise ValueError(f"Invalid result of {spec}. Must be (model, loss_fn, data), the first a torch.nn.Module.")
    return Target(spec, *result)


def _module(name: str, spec: str) -> Any:
    search_current_folder()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module itself, or a package that it is in. One that it imports is the user's to see.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ValueError(f"Invalid target {spec!r}. There is no module {error.name} here.") from None


def search_current_folder() -> None:
    """Find modules as ``python -m`` does, also in the installed command."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
