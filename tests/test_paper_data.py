"""The data of bench/paper: splits, label noise at exact rates, augmentation, and CIFAR as it is published."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace

import pytest
import torch
import torchvision_ops

pytest.importorskip("sklearn")

from bench.paper import augment, cifar, defaults, mixup, noise
from bench.paper import data as paper_data
from bench.paper.config import Config

SMALL = defaults.SMALL | {"dataset": "digits", "train_size": 96, "epochs": 1, "batch_size": 32}
CONFIG = Config(**SMALL, device="cpu")
with_torchvision = pytest.mark.skipif(torchvision_ops.import_or_reason() is not None, reason="no torchvision")


def test_held_out_images_are_not_trained_on_and_keep_their_labels():
    dataset = paper_data.load("digits")
    whole = paper_data.split(dataset, replace(CONFIG, noise_rate=0.5))
    part = paper_data.split(dataset, replace(CONFIG, noise_rate=0.5, validation=0.25))
    assert (len(part.train.labels), len(part.test.labels), len(whole.train.labels)) == (72, 24, 96)
    assert torch.equal(part.unseen.images, dataset.test.images)
    assert torch.equal(part.test.images, whole.train.images[72:])
    assert torch.equal(part.test.labels, whole.true_labels[72:])
    assert int((part.train.labels != part.true_labels).sum()) == 36


def uneven_labels(classes: int) -> torch.Tensor:
    """Class c occurs 13 + 7 c times."""
    labels = torch.cat([torch.full((13 + 7 * c,), c) for c in range(classes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.37, 0.8])
def test_symmetric_noise_changes_exactly_as_many_labels(rate, classes):
    clean = uneven_labels(classes)
    noisy = noise.corrupted(clean, replace(CONFIG, noise_rate=rate, seed=3), classes)
    assert int((noisy != clean).sum()) == round(rate * len(clean))
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < classes
    if rate == 0.8:
        assert len(noisy[clean == 0].unique()) > 5


@pytest.mark.parametrize("dataset", ["cifar10", "fashion-mnist", "digits"])
@pytest.mark.parametrize("rate", [0.2, 0.37])
def test_asymmetric_noise_goes_to_the_partner_and_nowhere_else(rate, dataset):
    clean = uneven_labels(10)
    config = replace(CONFIG, dataset=dataset, noise="asymmetric", noise_rate=rate, seed=3)
    noisy = noise.corrupted(clean, config, 10)
    pairs = noise.confused(dataset, 10)
    for c in range(10):
        wrong = noisy[(clean == c) & (noisy != clean)]
        assert len(wrong) == (round(rate * (13 + 7 * c)) if c in pairs else 0)
        assert set(wrong.tolist()) <= {pairs.get(c)}
    assert torch.equal(noisy, noise.corrupted(clean, config, 10))
    assert not torch.equal(noisy, noise.corrupted(clean, replace(config, seed=4), 10))


def test_mixup_is_the_same_combination_of_images_and_labels():
    images = torch.randn(7, 2, 5, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6])  # all different: they say who was mixed with whom
    mixed, targets = mixup.mix(images, labels, 0.4, 9, torch.Generator().manual_seed(2))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(7))
    shares = targets.gather(1, labels[:, None]).squeeze(1)
    share = shares[shares < 1][0]
    for place in range(7):
        others = targets[place].nonzero().squeeze(1)
        partner = int(next((o for o in others if o != place), torch.tensor(place)))
        torch.testing.assert_close(mixed[place], share * images[place] + (1 - share) * images[partner])


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
