"""FusedSAM: Sharpness-Aware Minimization with compiled multi-tensor kernels, as a drop-in PyTorch optimizer."""

from fused_sam import backends, batchnorm, distributed, ops, rng
from fused_sam._version import __version__
from fused_sam.optimizer import FusedSAM
from fused_sam.reference import ReferenceSAM

__all__ = ["FusedSAM", "ReferenceSAM", "__version__", "backends", "batchnorm", "distributed", "ops", "rng"]
