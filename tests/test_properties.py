"""Random call orders, layouts, options and gradients, against the float64 reference (Hypothesis).

``make soak`` runs the same for hours: HYPOTHESIS_PROFILE=soak.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calls import BASES, Calls, EagerCalls, InterpretedCalls
from helpers import DTYPES, snapshot
from hypothesis import given
from hypothesis import strategies as st
from layouts import SEEDS, TENSORS, laid_out

from fused_sam import FusedSAM, backends

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
TestInterpreted = machine(InterpretedCalls)
TestEager = machine(EagerCalls)


@given(
    tensors=TENSORS,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    present=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=SEEDS,
    base=st.sampled_from(sorted(BASES)),
    adaptive=st.booleans(),
    zero_grad=st.booleans(),
)
def test_every_backend_gives_the_bits_of_the_native_kernels(
    tensors: Any, dtypes: list[torch.dtype], present: list[bool], seed: int, base: str, adaptive: bool, zero_grad: bool
) -> None:
    """Two steps on lists of any dtypes and layouts, with p = inf, where no sum's order matters."""
    results = []
    names = [name for name in ("native", "interpreted") if backends.available("cpu").get(name) == "ok"]
    for name in names:
        generator = torch.Generator().manual_seed(seed)
        params = [laid_out(*t, generator, dtype).requires_grad_() for t, dtype in zip(tensors, dtypes)]
        base_class, options = BASES[base]
        opt = FusedSAM(params, base_class, rho=0.07, adaptive=adaptive, p=math.inf, lr=0.013, backend=name, **options)
        seen: list[bytes] = []
        for step in range(2):
            for half in range(2):
                for i, p in enumerate(params):
                    g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                    p.grad = g if present[(i + 6 * half + 3 * step) % 12] else None
                if half == 0:
                    opt.first_step(zero_grad=zero_grad)
                else:
                    opt.step()
                seen += snapshot(params)
        results.append(seen)
    for other in results[1:]:
        assert other == results[0]
