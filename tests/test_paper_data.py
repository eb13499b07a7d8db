"""bench.paper.data: what is held out, label noise, Mixup, augmentation, and the data sets that torchvision reads."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from bench.paper import adam, flags, runner
from bench.paper import data as paper_data
from bench.paper.config import Config
from bench.training import data

SMALL = flags.SMALL | {"dataset": "digits", "train_size": 96, "epochs": 1, "batch_size": 32}
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
    noisy = paper_data.corrupted(clean, replace(CONFIG, noise_rate=rate, seed=3), classes)
    assert int((noisy != clean).sum()) == round(rate * len(clean))
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < classes
    if rate == 0.8:
        assert len(noisy[clean == 0].unique()) > 5


@pytest.mark.parametrize("dataset", ["cifar10", "fashion-mnist", "digits"])
@pytest.mark.parametrize("rate", [0.2, 0.37])
def test_asymmetric_noise_goes_to_the_partner_and_nowhere_else(rate, dataset):
    clean = uneven_labels(10)
    config = replace(CONFIG, dataset=dataset, noise="asymmetric", noise_rate=rate, seed=3)
    noisy = paper_data.corrupted(clean, config, 10)
    pairs = paper_data.confused(dataset, 10)
    for c in range(10):
        wrong = noisy[(clean == c) & (noisy != clean)]
        assert len(wrong) == (round(rate * (13 + 7 * c)) if c in pairs else 0)
        assert set(wrong.tolist()) <= {pairs.get(c)}
    assert torch.equal(noisy, paper_data.corrupted(clean, config, 10))
    assert not torch.equal(noisy, paper_data.corrupted(clean, replace(config, seed=4), 10))


def test_mixup_is_the_same_combination_of_images_and_labels():
    images = torch.randn(7, 2, 5, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6])  # all different: they say who was mixed with whom
    mixed, targets = paper_data.mix(images, labels, 0.4, 9, torch.Generator().manual_seed(2))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(7))
    shares = targets.gather(1, labels[:, None]).squeeze(1)
    share = shares[shares < 1][0]
    for place in range(7):
        others = targets[place].nonzero().squeeze(1)
        partner = int(next((o for o in others if o != place), torch.tensor(place)))
        torch.testing.assert_close(mixed[place], share * images[place] + (1 - share) * images[partner])


def test_crops_see_the_mirror_of_the_image_beyond_its_border():
    pixels = torch.arange(2 * 3 * 6 * 5, dtype=torch.uint8).reshape(2, 3, 6, 5)
    given = {"shift": 3, "flip": False, "seed": 3, "device": torch.device("cpu")}
    images = data.Images(pixels, torch.arange(2))
    mirrored, black = (data.Batches(images, 2, **given, reflect=reflect) for reflect in (True, False))
    padded = F.pad(pixels.double(), (3, 3, 3, 3), mode="reflect")
    seen = set()
    for epoch in range(30):
        crops, labels = next(mirrored.epoch(epoch))
        crops = ((crops.double() * mirrored.std + mirrored.mean) * 255).round()
        for crop, label in zip(crops, labels.tolist(), strict=True):
            windows = padded[label].unfold(1, 6, 1).unfold(2, 5, 1).movedim(0, 2)  # [7, 7, 3, 6, 5]
            ((top, left),) = (windows == crop).flatten(2).all(dim=2).nonzero().tolist()
            seen |= {("top", top), ("left", left)}
        unpadded = next(black.epoch(epoch))
        assert torch.equal(unpadded[1], labels)  # one order, whatever the border
    assert len(seen) == 14


def test_cutout_covers_one_square_around_a_pixel():
    ones = torch.ones(400, 2, 28, 28)
    _, cutout = paper_data.augmentation("cutout", 28, "digits")
    holes = cutout(ones, torch.Generator().manual_seed(4)) == 0
    rows, columns = holes[:, 0].any(dim=2), holes[:, 0].any(dim=1)
    assert torch.equal(holes, (rows[:, None, :, None] & columns[:, None, None, :]).expand_as(holes))
    for sides in (rows, columns):
        assert ((sides.int().diff(dim=1) == 1).sum(dim=1) + sides[:, 0] == 1).all()
        lengths = sides.sum(dim=1)
        assert (lengths.min(), lengths.max()) == (7, 14)  # clipped at a border, and half of the width
        assert sides.float().mean(dim=0).min() > 0.1


def test_brightness_adds_a_number_to_each_image_and_cuts_it_off():
    pixels = torch.randint(256, (300, 3, 5, 6), dtype=torch.uint8)
    brighter = paper_data.augmentation("brightness", 28, "digits").before(pixels, torch.Generator().manual_seed(4))
    inside = (brighter > 0) & (brighter < 255)
    added = torch.where(inside, brighter - pixels, torch.nan).flatten(1).nanmean(dim=1)
    assert -128 < added.min() < -110
    assert 110 < added.max() < 128
    torch.testing.assert_close(brighter, (pixels + added[:, None, None, None]).clamp(0, 255), rtol=0, atol=1e-3)


@with_torchvision
@pytest.mark.parametrize(("channels", "dataset"), [(1, "fashion-mnist"), (3, "svhn")])
def test_autoaugment_follows_from_the_generator_alone(channels, dataset):
    images = torch.randint(256, (24, channels, 32, 32), dtype=torch.uint8)
    changed = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        changed.append(paper_data.autoaugment(dataset)(images, torch.Generator().manual_seed(seed)))
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = changed
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first != images).flatten(1).any(dim=1).sum() >= 8  # most sub-policies change most images


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
    names = {reader.meta["key"]: [str(number) for number in range(classes)]}
    return lists | {"meta": reader.meta | {"md5": write(reader.meta["filename"], names)[1]}}


def write_svhn(folder, reader, counts):
    """Matlab files as published, with random images, and the entries with their checksums; images and labels."""
    from scipy.io import savemat

    found, entries = {}, {}
    pixels = torch.Generator().manual_seed(6)
    for part, count in counts.items():
        images = torch.randint(256, (32, 32, 3, count), generator=pixels, dtype=torch.uint8).numpy()
        found[part] = images, [[1 + i % 10] for i in range(count)]  # the digit 0 has the label 10
        path = folder / reader.split_list[part][1]
        savemat(path, {"X": images, "y": found[part][1]})
        entries[part] = [*reader.split_list[part][:2], hashlib.md5(path.read_bytes()).hexdigest()]
    return found, entries


@with_torchvision
@pytest.mark.parametrize(("name", "classes", "files"), [("cifar10", 10, 5), ("cifar100", 100, 1)])
def test_cifar(tmp_path, monkeypatch, name, classes, files):
    import torchvision

    reader = getattr(torchvision.datasets, name.upper())
    for attribute, value in write_cifar(tmp_path, reader, {"train_list": 12, "test_list": 5}, classes).items():
        monkeypatch.setattr(reader, attribute, value)
    dataset = paper_data.load(name, tmp_path)
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
        paper_data.load(name, tmp_path)


def test_only_svhn_has_a_policy_without_crops_and_flips():
    def moves(dataset, augment):
        return paper_data.moves(replace(CONFIG, dataset=dataset, augment=augment))

    assert [moves("svhn", augment) for augment in paper_data.AUGMENTATIONS] == [False, True, True, False, True]
    assert [moves("cifar10", augment) for augment in paper_data.AUGMENTATIONS] == [False, True, True, True, True]


@with_torchvision
def test_svhn_trains_on_both_published_parts(tmp_path, monkeypatch):
    import torchvision

    reader = torchvision.datasets.SVHN
    found, entries = write_svhn(tmp_path, reader, {"train": 5, "extra": 7, "test": 11})
    monkeypatch.setattr(reader, "split_list", entries)
    dataset = paper_data.load("svhn", tmp_path)
    assert (dataset.name, dataset.classes) == ("svhn", 10)
    assert dataset.train.labels.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7]
    assert dataset.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    expected = torch.cat(
        [torch.from_numpy(found[part][0]).movedim(-1, 0).movedim(-1, 1) for part in ("train", "extra")]
    )
    assert torch.equal(dataset.train.images, expected)
    (tmp_path / reader.split_list["extra"][1]).unlink()
    with pytest.raises(FileNotFoundError, match="No svhn with the published files in"):
        paper_data.load("svhn", tmp_path)


@with_torchvision
@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_adam_has_the_settings_of_the_keras_report_by_flag(tmp_path, monkeypatch, capsys, name):
    import torchvision

    reader = getattr(torchvision.datasets, name.upper())
    if name == "svhn":
        entries = {"split_list": write_svhn(tmp_path, reader, {"train": 4, "extra": 6, "test": 7})[1]}
    else:
        entries = write_cifar(tmp_path, reader, {"train_list": 2, "test_list": 7}, 10)
    for attribute, value in entries.items():
        monkeypatch.setattr(reader, attribute, value)
    command = ["--dataset", name, "--data-dir", str(tmp_path), "--paper", "--results", str(tmp_path / "rows")]
    assert runner.main(adam.EXPERIMENT, [*command, "--seeds", "3", "--epochs", "1", "--batch-size", "8"]) == 0
    assert "Plan: 3 runs, 5 passes over the training images, " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows" / "paper_adam.jsonl").read_text().splitlines()]
    assert {row["method"]: row["passes"] for row in rows} == {"Adam": 1, "Adam, 2x epochs": 2, "SAM with Adam": 2}
    config = rows[-1]["config"]
    report = {"model": "resnet-bottleneck-20", "augment": "brightness", "shift": 4, "lr": 1e-3, "weight_decay": 0}
    report |= {"micro_batch": 1, "plateau": 3, "test_size": 0, "clip": 0, "options": {"rho": 0.05}}
    report |= {"train_size": {"cifar10": 50_000, "svhn": 604_388}[name], "optimizer": "sam-adam"}
    assert report.items() <= config.items()
    made = flags.parser("adam", "", adam.add_arguments, adam.EXPERIMENT.defaults)
    whole = flags.base_config(flags.parse(made, ["--paper"]), name, adam.EXPERIMENT.defaults)
    assert (whole.epochs, whole.batch_size, whole.micro_batch) == (100, 1024, 128)
    assert not paper_data.split(paper_data.load(name, tmp_path), whole).flip
