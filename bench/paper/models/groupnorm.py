"""Networks without BatchNorm: the output for an image then depends on no other image of its batch."""

from __future__ import annotations

import math

from torch import nn

GROUPS = 8  # at most; where they do not divide the channels, their greatest common divisor


def without_batchnorm(model: nn.Module) -> nn.Module:
    """The model itself, every BatchNorm in it replaced by GroupNorm (Wu and He, 2018) of as many channels.

    A micro-batch of m examples then sees the function that the whole batch sees, and the Hessian is of one function.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(math.gcd(GROUPS, child.num_features), child.num_features))
        else:
            without_batchnorm(child)
    return model
