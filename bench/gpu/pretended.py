"""A pytest plugin to collect tests as where there is a GPU: python -m pytest -p bench.gpu.pretended --collect-only"""

import torch

torch.cuda.is_available = lambda: True
