"""CIFAR-10 and CIFAR-100, read by torchvision, as the tensors that the rest of bench works on."""

from __future__ import annotations

from pathlib import Path

import torch

from bench import records
from bench.training.data import Dataset, Images

CLASSES = {"cifar10": 10, "cifar100": 100}
CACHE_DIR = records.ROOT / "data" / "cifar"


def load(name: str, folder: Path | None = None) -> Dataset:
    """Both parts of the set.

    Args:
        name: "cifar10" or "cifar100".
        folder: has "cifar-10-batches-py" or "cifar-100-python" in it; it is used or refused. Without one the files are
            downloaded, once.

    Raises:
        ValueError: another name.
        FileNotFoundError: the folder does not hold the published files.
        RuntimeError: no torchvision, or no download.
    """
    if name not in CLASSES:
        raise ValueError(f"Invalid dataset={name!r}. Must be one of {', '.join(CLASSES)}.")
    datasets = records.torchvision(f"--dataset {name}").datasets
    reader = getattr(datasets, name.upper())
    try:
        train, test = (reader(folder or CACHE_DIR, train=train, download=folder is None) for train in (True, False))
    except RuntimeError as error:
        if folder is None:
            raise
        raise FileNotFoundError(f"No {reader.base_folder} with the published files in {folder}.") from error
    return Dataset(name, str(folder or CACHE_DIR), _images(train), _images(test), flip=True, classes=CLASSES[name])


def _images(part: torch.utils.data.Dataset) -> Images:
    pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()  # [N, 32, 32, 3] -> [N, 3, 32, 32]
    return Images(pixels, torch.tensor(part.targets, dtype=torch.int64))
