"""A small tree of class folders for bench.imagenet, and the flags that go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_ops

pytest.importorskip("rich")
sklearn_datasets = pytest.importorskip("sklearn.datasets")
pil = pytest.importorskip("PIL.Image")
if reason := torchvision_ops.import_or_reason():
    pytest.skip(f"torchvision cannot be imported: {reason}", allow_module_level=True)

CLASSES, TRAIN, VALIDATION = 3, 48, 39  # an odd number to validate with
STEPS = 3  # an epoch
FLAGS = [
    *("--image-size", "32", "--batch-size", "16", "--epochs", "2", "--lr", "0.003"),
    *("--workers", "0", "--device", "cpu"),
]


def write_tree(root: Path) -> Path:
    """scikit-learn's digits 0, 1 and 2 as PNG files of different sizes."""
    digits = sklearn_datasets.load_digits()
    for label in range(CLASSES):
        images = (digits.images[digits.target == label] * (255 / 16)).astype("uint8")
        train, rest = TRAIN // CLASSES, VALIDATION // CLASSES
        for part, chosen in (("train", images[:train]), ("val", images[train : train + rest])):
            folder = root / part / f"digit {label}"
            folder.mkdir(parents=True)
            for i, image in enumerate(chosen):
                pil.fromarray(image).resize((32 + i, 40)).save(folder / f"{i}.png")
    return root


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in point.items() if k != "seconds"} for point in history]


def same(a: Any, b: Any) -> bool:
    """Nested state dicts, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
