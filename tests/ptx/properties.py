"""Random and hostile calls on the CUDA kernels: those of test_properties.py and test_hostile.py.

Run by test_ptx.py with the plugin, as launches.py is.
"""

from __future__ import annotations

import math
from typing import Any

import hostile
import pytest
import torch
from calls import BASES, Calls
from emulated_tests import NATIVE
from helpers import DTYPES, snapshot
from hypothesis import given
from hypothesis import strategies as st
from layouts import SEEDS, TENSORS, laid_out
from ptx.plugin import EMULATOR

from fused_sam import FusedSAM

pytestmark = [
    pytest.mark.filterwarnings("ignore:No parameter has a gradient"),
    pytest.mark.filterwarnings("ignore:The second gradients seem"),
]


class EmulatedCalls(Calls):
    backend = "emulated"


TestEmulated = EmulatedCalls.TestCase


@given(
    tensors=TENSORS,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    present=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=SEEDS,
    base=st.sampled_from(sorted(BASES)),
    adaptive=st.booleans(),
    zero_grad=st.booleans(),
)
def test_the_kernels_give_the_bits_of_those_of_the_cpu(
    tensors: Any, dtypes: list[torch.dtype], present: list[bool], seed: int, base: str, adaptive: bool, zero_grad: bool
) -> None:
    """Two steps on lists of any dtypes and layouts, with p = inf, where no sum's order matters."""
    results = []
    for name in NATIVE:
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
    assert results[0] == results[1]


def test_what_no_program_should_call_raises_and_never_ends_the_process() -> None:
    hostile.main()
    EMULATOR.take_reports()  # of lists that overlap, which the core takes: the ops refuse them
