"""The first import of torch: where it fails, the command line says so in one line, and a program gets the error."""

from __future__ import annotations

import sys
from pathlib import Path


def _command() -> str | None:
    """Return the name of the command that this process is, if it is the package's own."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name == "-m" and "fused_sam" in sys.orig_argv:  # what Python leaves there while it looks for the module
        return "python -m fused_sam"
    return "fused-sam" if name.startswith("fused-sam") else None


try:
    import torch  # noqa: F401
except Exception as error:
    command = _command()
    if command is None:
        raise
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    sys.exit(f"{command}: torch cannot be imported ({reason}). To get it: pip install torch")
