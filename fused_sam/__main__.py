"""``python -m fused_sam``: the command line of `fused_sam.cli`."""

import sys

from fused_sam.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
