"""FusedSAM: Sharpness-Aware Minimization with compiled multi-tensor kernels, as a drop-in PyTorch optimizer."""

from fused_sam import backends, batchnorm, distributed, ops, rng
from fused_sam._version import __version__
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
