"""The data sets that the paper fine-tunes on (table 3), by the names it has in bench/paper/tables, read by torchvision.

Birdsnap is not among them: torchvision has no reader for it; it and ImageNet are trees of class folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Dataset

from bench import records

AUGMENTATIONS = ("crop", "none", "autoaugment")
FOLDERS = "folders"


class Source(NamedTuple):
    """Says how a data set is read: torchvision's reader, its parts to train on, the part to test on."""

    reader: str
    train: list[dict[str, Any]]
    test: dict[str, Any]
    classes: int
    small: bool = False  # of 32 pixels: resized as a whole


SOURCES = {
    "cifar10": Source("CIFAR10", [{"train": True}], {"train": False}, 10, small=True),
    "cifar100": Source("CIFAR100", [{"train": True}], {"train": False}, 100, small=True),
    "fgvc-aircraft": Source("FGVCAircraft", [{"split": "trainval"}], {"split": "test"}, 100),
    "flowers": Source("Flowers102", [{"split": "train"}, {"split": "val"}], {"split": "test"}, 102),
    "food101": Source("Food101", [{"split": "train"}], {"split": "test"}, 101),
    "oxford-iiit-pets": Source("OxfordIIITPet", [{"split": "trainval"}], {"split": "test"}, 37),
    "stanford-cars": Source("StanfordCars", [{"split": "train"}], {"split": "test"}, 196),
}
RESIZE = 256 / 224  # the shorter side before the central crop, of the crop's size


def usual_augmentation(name: str, finetune: bool = True) -> str:
    """Return the paper's: in fine-tuning none (C.2), but AutoAugment on CIFAR; else a tree of images has crops."""
    if name == FOLDERS:
        return "none" if finetune else "crop"
    return "autoaugment" if SOURCES[name].small else "none"


def read(name: str, root: Path, image_size: int, augment: str) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Return what is trained on, what is evaluated, both uint8 images with labels, and the number of classes."""
    vision = records.torchvision("bench.imagenet")
    transforms, small = vision.transforms.v2, name != FOLDERS and SOURCES[name].small
    training = augmentation(transforms, image_size, augment, small)
    validation = augmentation(transforms, image_size, "none", small)
    if name == FOLDERS:
        return _folders(vision, root, training, validation)
    source = SOURCES[name]
    reader = getattr(vision.datasets, source.reader)
    try:
        parts = [reader(root, transform=training, **part) for part in source.train]
        return ConcatDataset(parts), reader(root, transform=validation, **source.test), source.classes
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(f"No {name} in {root} as torchvision's {source.reader} has it: {error}") from error


def _folders(vision: Any, root: Path, training: Any, validation: Any) -> tuple[Dataset[Any], Dataset[Any], int]:
    trained, evaluated = (
        vision.datasets.ImageFolder(root / part, transform)
        for part, transform in (("train", training), ("val", validation))
    )
    if trained.classes != evaluated.classes:
        different = sorted(set(trained.classes) ^ set(evaluated.classes))[0]
        raise ValueError(f"Invalid class {different} in {root}. Must be a folder of both train and val.")
    return trained, evaluated, len(trained.classes)


def augmentation(transforms: Any, size: int, augment: str, small: bool) -> Any:
    """Return what makes an image of a file: crop, none (a central crop, or a small image as a whole), autoaugment.

    AutoAugment has the policy for CIFAR-10, with flips and crops behind it, at the size of the file, as in the paper's
    code.
    """
    tensor = transforms.PILToTensor()
    if augment == "crop":
        return transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), tensor])
    whole = [transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)]
    central = [transforms.Resize(round(RESIZE * size)), transforms.CenterCrop(size)]
    first = []
    if augment == "autoaugment":
        policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
        first = [policy, transforms.RandomHorizontalFlip()]
        first += [transforms.RandomCrop(32, padding=4, padding_mode="reflect")] if small else []
    return transforms.Compose([*first, *(whole if small else central), tensor])
