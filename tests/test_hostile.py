"""Wrong calls of the compiled core, of the ops and of load_state_dict end in exceptions: see hostile.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fused_sam import backends


@pytest.mark.slow
@pytest.mark.skipif(backends.available().get("native") != "ok", reason="the native backend is not built")
def test_what_no_program_should_call_raises_and_never_ends_the_process() -> None:
    command = [sys.executable, "-c", "import hostile; hostile.main()"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cases") == 3
