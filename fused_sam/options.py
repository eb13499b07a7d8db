"""What options of `FusedSAM` have in common."""

from __future__ import annotations

import math
import numbers
from typing import Any


def positive_or_none(name: str, value: Any) -> float | None:
    """The option as given: finite and > 0, or None.

    Raises:
        TypeError: for what is neither a number nor None.
        ValueError: for a number that is not > 0 and finite.
    """
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"Invalid {name}={value!r}. Must be a number > 0, or None.")
    number = float(value)
    if not 0.0 < number < math.inf:
        raise ValueError(f"Invalid {name}={value!r}. Must be > 0 and finite, or None.")
    return number
