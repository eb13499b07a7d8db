"""Random call orders, layouts, options and gradients, against the float64 reference (Hypothesis).

``make soak`` runs the same for hours: HYPOTHESIS_PROFILE=soak.
"""

from __future__ import annotations

from typing import Any

import pytest
from calls import Calls, EagerCalls

from fused_sam import backends

# Any order of calls: those that make no sense are warned of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:No parameter has a gradient"),
    pytest.mark.filterwarnings("ignore:The second gradients seem"),
]


def machine(cls: type[Calls]) -> Any:
    """A test of a machine; skipped where its backend is not built."""
    case = cls.TestCase
    state = backends.available("cpu").get(cls.backend, "not part of this build")
    return pytest.mark.skipif(state != "ok", reason=f"backend {cls.backend}: {state}")(case)


TestNative = machine(Calls)
TestEager = machine(EagerCalls)
