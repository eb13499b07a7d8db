"""FusedSAM: Sharpness-Aware Minimization with compiled multi-tensor kernels, as a drop-in PyTorch optimizer."""

__version__ = "0.1.0"

import fused_sam.cli.first_import  # noqa: F401, before all that needs torch
from fused_sam import backends, batchnorm, distributed, ops, rng
from fused_sam.integrations.forward import ascend_on_forward
from fused_sam.optimizer import FusedSAM
from fused_sam.reference import ReferenceSAM
from fused_sam.schedules import RhoTiedToLR

__all__ = [
    "FusedSAM",
    "ReferenceSAM",
    "RhoTiedToLR",
    "__version__",
    "ascend_on_forward",
    "backends",
    "batchnorm",
    "distributed",
    "ops",
    "rng",
]
