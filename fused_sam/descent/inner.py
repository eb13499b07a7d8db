"""The base optimizer as users say it: a class, any other callable that makes one, or a name."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, TypeAlias

from torch.optim import Optimizer

Maker: TypeAlias = Callable[..., Optimizer]


def make_inner(base_optimizer: Maker | str, params: Any, options: dict[str, Any], capturable: bool) -> Optimizer:
    """Return the base optimizer of these parameters; ``capturable`` is given to one that knows it.

    A name is that of a class in a module (``"torch.optim.AdamW"``), or in torch.optim (``"AdamW"``).

    Raises:
        TypeError: for anything else, and for a callable that returns no torch.optim.Optimizer.
        ValueError: for a name under which there is nothing.
    """
    make: Any = _find(base_optimizer) if isinstance(base_optimizer, str) else base_optimizer
    is_class = isinstance(make, type)
    if not callable(make) or (is_class and not issubclass(make, Optimizer)):
        raise TypeError(
            f"Invalid base_optimizer={base_optimizer!r}. Must be a subclass of torch.optim.Optimizer, its name, or a "
            "callable that returns its instance."
        )
    if capturable and "capturable" in inspect.signature(make).parameters:
        options = {**options, "capturable": True}
    inner = make(params, **options)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"Invalid base_optimizer={base_optimizer!r}. Must return a torch.optim.Optimizer: {inner!r}.")
    return inner


def _find(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name if "." in name else f"torch.optim.{name}")
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"Invalid base_optimizer={name!r}. Must be a name as 'torch.optim.AdamW': {error}.") from None
