"""torchvision where its compiled part cannot be loaded: that of PyPI beside a CPU build of torch.

Its transforms, data sets and models need none of it, but its import gives up where two operators have no schema.
"""

from __future__ import annotations

import importlib
import sys

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_or_reason() -> str | None:
    """Import torchvision, after having told torch of the operators if it has to be; why it cannot be, else None."""
    try:
        importlib.import_module("torchvision")
    except ImportError as error:
        return str(error)
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", SCHEMA)
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            return str(error)
    return None
