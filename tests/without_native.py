"""A plugin of pytest (-p without_native): the package as it is where the native core does not load."""

import sys

sys.modules["fused_sam._native"] = None  # type: ignore[assignment]
