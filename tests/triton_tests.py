"""What the tests of the Triton backend share: where they can run, and the names of the kernels."""

from __future__ import annotations

import os

import pytest

from fused_sam import backends

STATE = backends.available()["triton"]
needs_triton = pytest.mark.skipif(STATE != "ok", reason=STATE)
compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"
)

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by those in the interpreter")

WRITERS = ["perturb", "restore", "restore_accumulate", "sgd_update", "adam_update"]
KERNELS = ["norm_partials", "norm_total", "peak_partials", "peak_total", *WRITERS]
