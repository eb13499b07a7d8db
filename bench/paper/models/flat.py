"""Networks without convolutions but for the first layer of the Mixer, which cuts the image into patches."""

from __future__ import annotations

from torch import Tensor, nn

PATCHES_ACROSS = 4


def mlp(widths: list[int], *, channels: int, classes: int, size: int) -> nn.Sequential:
    """Return a multi-layer perceptron: a hidden layer of each width, with ReLU."""
    layers: list[nn.Module] = [nn.Flatten()]
    last = channels * size * size
    for width in widths:
        layers += [nn.Linear(last, width), nn.ReLU()]
        last = width
    return nn.Sequential(*layers, nn.Linear(last, classes))


def _two_layers(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Mix(nn.Module):
    """y = x + mlp over patches(norm(x)), then z = y + mlp over channels(norm(y))."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.patches = nn.LayerNorm(width), _two_layers(patches, max(1, width // 2))
        self.norm2, self.channels = nn.LayerNorm(width), _two_layers(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:  # [B, patches, width]
        x = x + self.patches(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021) of 16 patches, with the proportions of Mixer-S.

    Args:
        depth: number of its layers.
        width: channels.
        channels: of the images.
        classes: of the last layer.
        size: of the images, a multiple of 4.
    """

    def __init__(self, depth: int, width: int, *, channels: int, classes: int, size: int) -> None:
        super().__init__()
        patch = size // PATCHES_ACROSS
        self.stem = nn.Conv2d(channels, width, patch, stride=patch)
        self.layers = nn.Sequential(*(Mix(PATCHES_ACROSS**2, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        patches = self.stem(x).flatten(2).mT  # [B, 16, width]
        return self.head(self.norm(self.layers(patches)).mean(dim=1))
