from typing import Any

access: Any  # a capsule
torch_version: str
