"""Whose line a warning is about: that of the user, however many calls of ours and of torch lie between."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_LIBRARIES = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning at the line that has called us, also by way of torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
