"""A training step may be compiled as a whole (torch.compile): the optimizer in it runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """The function, into which torch.compile does not look: a graph ends where it is called, and begins after it.

    Traced, every line that reads tensors in C++ or changes what the optimizer remembers would end a graph, with a
    warning, and every new learning rate would compile all anew. `torch.compiler.disable` is the same, but imports the
    compiler at once, which takes seconds; this waits for the first call, as torch's own optimizers do.
    """
    disable = getattr(torch, "_disable_dynamo", torch.compiler.disable)  # the former is torch's own, and may go
    return cast(F, disable(function))
