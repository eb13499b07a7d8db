"""The paper's networks, by name, for grey or coloured images.

small                       WRN-10-2 whose first convolution has stride 4: the default, seconds a run on one core
wrn-D-K                     wide ResNet: D layers, K times 16, 32 and 64 channels; wrn-28-10, wrn-10-2-stride2, ...
resnet-D                    the CIFAR ResNets: resnet-20, resnet-32, ...; resnet-D-stride2 halves the image at once
resnet-bottleneck-D         that of the Keras report, with bottlenecks: resnet-bottleneck-20, -stride2 as above
pyramidnet-D-A              A channels wider over D layers; bottlenecks from 164 layers on, as published;
                            pyramidnet-110-270, pyramidnet-272-200; with -shakedrop behind it, ShakeDrop
shake-shake-26-2xWd         26 layers, two branches of W channels: 32, 64, 96, 112
mlp-W-W                     a perceptron with hidden layers of these widths, as many as there are: mlp-256-256
mixer-D-W                   MLP-Mixer: D layers of W channels, on 16 patches: mixer-2-64
any of them -groupnorm      GroupNorm in the place of BatchNorm
any of them -nonorm         no normalisation: a bias for each channel in its place, residual branches that start at 0
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from bench.paper.models.bottleneck import BottleneckResNet
from bench.paper.models.flat import Mixer, mlp
from bench.paper.models.norms import NORMS as NORMS
from bench.paper.models.pyramidnet import PyramidNet
from bench.paper.models.shake import ShakeShake
from bench.training.models import ResNet, WideResNet

NAMES = ("small", "wrn-D-K", "resnet-D", "resnet-bottleneck-D", "pyramidnet-D-A", "shake-shake-26-2xWd", "mlp-W-W")
NAMES += ("mixer-D-W",)
BOTTLENECK_FROM = 164  # layers of the shallowest PyramidNet that was published with bottlenecks


class Details(NamedTuple):
    """What papers and their code do in different ways; the fields of a `Config` of these names."""

    rounded_widths: bool = True
    mask_per_image: bool = True
    uniform_head: bool = False


USUAL = Details()


def make(name: str, *, channels: int, classes: int, size: int, details: Details = USUAL) -> nn.Module:
    """Return a network with random weights from the global generator."""
    if size < 8 or size % 4:
        raise ValueError(f"Invalid {size=}. Must be a multiple of 4, at least 8.")
    norm = next(norm for norm in NORMS.values() if name.endswith(norm.suffix))
    for pattern, family in FAMILIES.items():
        found = re.fullmatch(pattern, name.removesuffix(norm.suffix))
        if found:
            own = _of_family(family, details) | ({"size": size} if family in SIZED else {})
            model = family(*found.groups(), channels=channels, classes=classes, **own)
            if details.uniform_head:
                head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
                nn.init.uniform_(head.weight, -(classes**-0.5), classes**-0.5)
            return norm.put_into(model)
    raise ValueError(f"Invalid model={name!r}. Must be one of {', '.join(NAMES)}, with numbers.")


def _of_family(family: Callable[..., nn.Module], details: Details) -> dict[str, bool]:
    return {"rounded": details.rounded_widths, "per_image": details.mask_per_image} if family is _pyramid else {}


def _small(*, channels: int, classes: int) -> nn.Module:
    return WideResNet(blocks=1, width=2, stem_stride=4, channels=channels, classes=classes)


def _wide(depth: str, width: str, stride: str | None, *, channels: int, classes: int) -> nn.Module:
    blocks, rest = divmod(int(depth) - 4, 6)
    if rest:
        raise ValueError(f"Invalid model='wrn-{depth}-{width}'. Must have 6 n + 4 layers.")
    return WideResNet(blocks, int(width), int(stride or 1), channels=channels, classes=classes)


def _resnet(bottleneck: str | None, depth: str, stride: str | None, *, channels: int, classes: int) -> nn.Module:
    family = BottleneckResNet if bottleneck else ResNet
    return family(int(depth), int(stride or 1), channels=channels, classes=classes)


def _pyramid(depth: str, widening: str, shakedrop: str | None, **options: Any) -> nn.Module:
    return PyramidNet(
        int(depth),
        int(widening),
        bottleneck=int(depth) >= BOTTLENECK_FROM,
        shakedrop=shakedrop is not None,
        **options,
    )


def _shake(width: str, *, channels: int, classes: int) -> nn.Module:
    return ShakeShake(int(width), channels=channels, classes=classes)


def _mlp(widths: str, *, channels: int, classes: int, size: int) -> nn.Module:
    found = [int(width) for width in widths.split("-")]
    return mlp(found, channels=channels, classes=classes, size=size)


def _mixer(depth: str, width: str, *, channels: int, classes: int, size: int) -> nn.Module:
    return Mixer(int(depth), int(width), channels=channels, classes=classes, size=size)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    r"small": _small,
    r"wrn-(\d+)-(\d+)(?:-stride([124]))?": _wide,
    r"resnet-(bottleneck-)?(\d+)(?:-stride([12]))?": _resnet,
    r"pyramidnet-(\d+)-(\d+)(-shakedrop)?": _pyramid,
    r"shake-shake-26-2x(\d+)d": _shake,
    r"mlp-([1-9]\d*(?:-[1-9]\d*)*)": _mlp,
    r"mixer-(\d+)-([1-9]\d*)": _mixer,
}
SIZED = (_mlp, _mixer)  # whose weights depend on the size of the image
