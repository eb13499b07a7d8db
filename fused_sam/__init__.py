"""FusedSAM: Sharpness-Aware Minimization with compiled multi-tensor kernels, as a drop-in PyTorch optimizer."""

import fused_sam._torch  # noqa: F401, before all that needs torch
from fused_sam import backends, batchnorm, distributed, ops, rng
from fused_sam._version import __version__
from fused_sam.optimizer import FusedSAM
from fused_sam.reference import ReferenceSAM
from fused_sam.schedules import RhoTiedToLR

__all__ = [
    "FusedSAM",
    "ReferenceSAM",
    "RhoTiedToLR",
    "__version__",
    "backends",
    "batchnorm",
    "distributed",
    "ops",
    "rng",
]
