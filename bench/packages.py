"""Packages that only some programs need, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch


def torchvision(user: str) -> ModuleType:
    """The package, with its transforms and data sets.

    Args:
        user: who needs it, for the message.

    Raises:
        RuntimeError: saying what to install.
    """
    try:
        importlib.import_module("torchvision.transforms.v2")
        importlib.import_module("torchvision.datasets")
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # the second one for a build that belongs to another torch
        raise RuntimeError(
            f"{user} needs pillow and torchvision, in the version and the build (CPU, CUDA) that go with torch "
            f"{torch.__version__}. Importing it says: {error}."
        ) from error
