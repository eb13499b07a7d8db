"""Fine-tuning as in the paper (section 3.2, appendix C.2): its settings, EfficientNet-L2, and weights to start from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TORCHVISION = "torchvision"  # the weights of its own that it downloads
L2 = "efficientnet_l2"
# Steps, and accelerators with a perturbation each, are what the paper prints. What it does not print is as in the
# released code: Nesterov's momentum, the norm that gradients are clipped to, weight decay as a part of the loss.
SETTINGS: dict[str, dict[str, Any]] = {
    "efficientnet_b7": {"image_size": 600, "batch_size": 1024, "lr": 0.016, "accelerators": 64, "steps": 5_000},
    L2: {"image_size": 475, "batch_size": 512, "lr": 0.008, "accelerators": 128, "steps": 10_000},
}
SHARED = {"weight_decay": 1e-5, "momentum": 0.9, "nesterov": True, "label_smoothing": 0.0}
SHARED |= {"freeze_batchnorm": True, "max_grad_norm": 5.0}
OF_SAM = {"rho": 0.05, "m_sharpness": "micro", "decay_in_ascent": True}


def defaults(model: str, optimizer: str, ranks: int) -> dict[str, Any]:
    """Return the paper's settings for the flags of these names, and `epochs` None: they follow from the `steps`.

    Args:
        model: one of SETTINGS; any other, such as a ViT, has those of EfficientNet-B7 but for the size of its images.
        optimizer: "sam" or "sgd".
        ranks: among which the accelerators' parts of a batch are divided.
    """
    found = dict(SETTINGS.get(model, SETTINGS["efficientnet_b7"] | {"image_size": 224}))
    found["micro_batches"] = max(found.pop("accelerators") // ranks, 1)
    found["finetuning_steps"] = found.pop("steps")
    return SHARED | (OF_SAM if optimizer == "sam" else {}) | found | {"epochs": None}


def efficientnet_l2(models: Any, classes: int) -> nn.Module:
    """Return EfficientNet-B0 (Tan and Le, 2019) 4.3 times as wide and 5.3 times as deep; torchvision stops at B7."""
    block = functools.partial(models.efficientnet.MBConvConfig, width_mult=4.3, depth_mult=5.3)
    # Expansion, kernel, stride, channels in and out, layers.
    stages = ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3))
    stages += ((6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1))
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    return models.EfficientNet([block(*stage) for stage in stages], dropout=0.5, num_classes=classes, norm_layer=norm)


def start(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model weights, but for its last layer where that has another number of classes: it stays random."""
    fresh = model.state_dict()
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    own = {name for name in fresh if name.startswith(f"{head}.")}
    for name in sorted(fresh.keys() | weights.keys()):
        fits = name in fresh and name in weights and fresh[name].shape == weights[name].shape
        if not fits and name not in own:
            raise ValueError(f"Invalid weights: {name} differs. Must be those of this model.")
    if any(weights[name].shape != fresh[name].shape for name in own if name in weights) or not own <= weights.keys():
        weights = weights | {name: fresh[name] for name in own}
    model.load_state_dict(weights)


def weights_of(models: Any, model: str, source: str) -> dict[str, Tensor]:
    """Return a state dict from a file, or that of torchvision, which downloads it."""
    if source == TORCHVISION:
        if model == L2:
            raise ValueError(f"Invalid weights={source!r} for {L2}. Must be a file: torchvision has none.")
        return models.get_model_weights(model).DEFAULT.get_state_dict(progress=False, check_hash=True)
    found = torch.load(Path(source), map_location="cpu", weights_only=True)
    return found.get("model", found)  # a checkpoint of bench.imagenet has it beside other things
