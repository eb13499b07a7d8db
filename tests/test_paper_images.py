"""bench.paper: cutout, AutoAugment, and CIFAR in the format in which it is published."""

from __future__ import annotations

import hashlib
import pickle
import sys

import pytest
import torch
import torchvision_ops

pytest.importorskip("numpy")

from bench.paper import augment, cifar
from bench.training import data

with_torchvision = pytest.mark.skipif(torchvision_ops.import_or_reason() is not None, reason="no torchvision")


def draw(name, images, seed=4):
    """What `augment` makes of the images, normalised as they are."""
    before, after = augment.make(name, images.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    if before is not None:
        images = before(images, generator)
    return images if after is None else after(images.float(), generator)


@pytest.mark.parametrize("size", [28, 32])
def test_cutout_covers_one_square_around_a_pixel(size):
    ones = torch.ones(400, 2, size, size)
    holes = draw("cutout", ones) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    rows, columns = holes[:, 0].any(dim=2), holes[:, 0].any(dim=1)
    assert torch.equal(holes[:, 0], rows[:, :, None] & columns[:, None, :])
    half = size // 2
    for sides in (rows, columns):
        runs = (sides.int().diff(dim=1) == 1).sum(dim=1) + sides[:, 0]
        assert (runs == 1).all()
        lengths = sides.sum(dim=1)
        assert (lengths >= half // 2).all()
        assert lengths.max() == half
        assert lengths.min() <= half // 2 + 1  # clipped at a border
        assert sides.float().mean(dim=0).min() > 0.1


def test_cutout_follows_from_the_generator():
    ones = torch.ones(20, 1, 28, 28)
    assert torch.equal(draw("cutout", ones), draw("cutout", ones))
    assert not torch.equal(draw("cutout", ones), draw("cutout", ones, seed=5))
    assert ones.all()


@with_torchvision
@pytest.mark.parametrize("channels", [1, 3])
def test_autoaugment_follows_from_the_generator_alone(channels):
    images = torch.randint(256, (24, channels, 32, 32), dtype=torch.uint8)
    policy = augment.autoaugment()

    def changed(seed):
        torch.manual_seed(torch.initial_seed() + 1)
        before = torch.get_rng_state()
        result = policy(images, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        return result

    first = changed(1)
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert torch.equal(changed(1), first)
    assert not torch.equal(changed(2), first)
    differ = (first != images).flatten(1).any(dim=1)
    assert differ.sum() >= 8  # most sub-policies change most images, each its own way


@with_torchvision
def test_batches_are_augmented_and_repeatable():
    images = data.Images(torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 10)

    def epoch(name):
        batches = data.Batches(
            images,
            16,
            shift=4,
            flip=True,
            seed=3,
            device=torch.device("cpu"),
            augmentation=augment.make(name, 32),
        )
        return torch.cat([x for x, _ in batches.epoch(2)])

    made = {name: epoch(name) for name in augment.NAMES}
    assert all(torch.equal(epoch(name), made[name]) for name in made)
    assert not torch.equal(made["cutout"], made["basic"])
    assert not torch.equal(made["autoaugment"], made["cutout"])
    assert (made["cutout"] == 0).flatten(1).sum(dim=1).min() >= 3 * 64


def test_augment_refuses():
    with pytest.raises(ValueError, match=r"Invalid augment='mixup'\. Must be one of none, basic, cutout, autoaugment"):
        augment.make("mixup", 28)


def write_cifar(folder, reader, counts, classes):
    """Pickles as published, with random images, and their checksums for torchvision."""
    key = "labels" if classes == 10 else "fine_labels"
    base = folder / reader.base_folder
    base.mkdir(parents=True)
    pixels = torch.Generator().manual_seed(6)

    def entry(count):
        values = torch.randint(256, (count, 3072), generator=pixels, dtype=torch.uint8)
        return {"data": values.numpy(), key: [(7 * i) % classes for i in range(count)]}

    def write(name, content):
        packed = pickle.dumps(content)
        (base / name).write_bytes(packed)
        return [name, hashlib.md5(packed).hexdigest()]

    lists = {
        part: [write(name, entry(counts[part])) for name, _ in getattr(reader, part)]
        for part in ("train_list", "test_list")
    }
    meta_name, meta_sum = write(
        reader.meta["filename"], {reader.meta["key"]: [str(number) for number in range(classes)]}
    )
    return lists | {"meta": reader.meta | {"filename": meta_name, "md5": meta_sum}}


@with_torchvision
@pytest.mark.parametrize(("name", "classes", "files"), [("cifar10", 10, 5), ("cifar100", 100, 1)])
def test_cifar(tmp_path, monkeypatch, name, classes, files):
    import torchvision

    reader = getattr(torchvision.datasets, name.upper())
    for attribute, value in write_cifar(tmp_path, reader, {"train_list": 12, "test_list": 5}, classes).items():
        monkeypatch.setattr(reader, attribute, value)
    dataset = cifar.load(name, tmp_path)
    assert (dataset.name, dataset.classes, dataset.flip) == (name, classes, True)
    assert dataset.train.images.shape == (12 * files, 3, 32, 32)
    assert dataset.test.images.shape == (5, 3, 32, 32)
    assert dataset.train.labels.tolist() == [(7 * i) % classes for i in range(12)] * files
    assert dataset.test.labels.dtype == torch.int64
    with open(tmp_path / reader.base_folder / reader.test_list[0][0], "rb") as file:
        rows = torch.from_numpy(pickle.load(file)["data"])
    assert torch.equal(dataset.test.images.flatten(1), rows)  # red plane, green plane, blue plane

    damaged = tmp_path / reader.base_folder / reader.test_list[0][0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="with the published files in"):
        cifar.load(name, tmp_path)


def test_cifar_refuses_what_it_cannot_read(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Invalid dataset='mnist'\. Must be one of cifar10, cifar100"):
        cifar.load("mnist", tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(RuntimeError, match="--dataset cifar10 needs pillow and torchvision"):
        cifar.load("cifar10", tmp_path)
