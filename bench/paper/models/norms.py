"""What stands in the place of BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.paper.models import bottleneck, flat, pyramidnet, shake
from bench.training import models

GROUPS = 8  # at most; where they do not divide the channels, their greatest common divisor
# The branches of each kind of residual block, as the parts that follow each other.
BRANCHES: dict[type[nn.Module], tuple[tuple[str, ...], ...]] = {
    models.Block: (("conv1", "conv2"),),
    models.OptionA: (("conv1", "conv2"),),
    bottleneck.Block: (("branch",),),
    pyramidnet.Block: (("branch",),),
    shake.Block: (("left",), ("right",)),
    flat.Mix: (("patches",), ("channels",)),
}


class Bias(nn.Module):
    """A shift of each channel, 0 at first: what is left of BatchNorm without statistics and scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return x + self.bias


def group_norm(model: nn.Module) -> nn.Module:
    """Return the model itself, every BatchNorm in it replaced by GroupNorm (Wu and He, 2018) of as many channels.

    A micro-batch of m examples then sees the function that the whole batch sees, and the Hessian is of one function.
    """

    def group(norm: nn.BatchNorm2d) -> nn.Module:
        return nn.GroupNorm(math.gcd(GROUPS, norm.num_features), norm.num_features)

    return _replaced(model, nn.BatchNorm2d, group)


def no_norm(model: nn.Module) -> nn.Module:
    """Return the model itself with a bias for each channel in the place of BatchNorm, and nothing in that of LayerNorm.

    The first weights of the branches are Fixup's (Zhang et al., 2019): the last layer of each of L branches is 0, so
    that a block is at first its shortcut; the m - 1 others are smaller by L^(-1 / (2 m - 2)), so that a step is not
    larger in a deep net. The head keeps its own, and there are no multipliers.
    """
    branches = []
    for block in model.modules():
        for parts in BRANCHES.get(type(block), ()):
            layers = [layer for part in parts for layer in block.get_submodule(part).modules()]
            branches.append([layer for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)])
    for *others, last in branches:
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        for layer in others:
            layer.weight.data *= len(branches) ** (-0.5 / len(others))
    _replaced(model, nn.LayerNorm, lambda norm: nn.Identity())
    return _replaced(model, nn.BatchNorm2d, lambda norm: Bias(norm.num_features))


def _replaced(model: nn.Module, kind: type[nn.Module], make: Callable[..., nn.Module]) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, kind):
            setattr(model, name, make(child))
        else:
            _replaced(child, kind, make)
    return model


class Norm(NamedTuple):
    """What normalises: the end of a network's name, and what changes the network."""

    suffix: str
    put_into: Callable[[nn.Module], nn.Module]


NORMS = {
    "none": Norm("-nonorm", no_norm),
    "group": Norm("-groupnorm", group_norm),
    "batch": Norm("", lambda model: model),
}
