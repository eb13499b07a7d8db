"""What the tests of the CUDA kernels share: whether this process has the emulator, as those of test_ptx.py do."""

from __future__ import annotations

import os

EMULATED = "PTX_NATIVE" in os.environ
# Backends of the native core for CPU tensors: they share their arithmetic.
NATIVE = ["native", "emulated"] if EMULATED else ["native"]
