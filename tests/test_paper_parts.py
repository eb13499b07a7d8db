"""What the experiments of bench/paper are made of: methods, configurations, choices and statistics; their data."""

from __future__ import annotations

import hashlib
import math
import pickle
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from bench.paper import (
    cost,
    flags,
    m_sharpness,
    methods,
    plan,
    reduction,
    rho_grid,
    summary,
    theorem,
    training,
    variants,
)
from bench.paper import data as paper_data
from bench.paper.config import Config
from bench.training import data

SMALL = flags.SMALL | {"dataset": "digits", "train_size": 96, "epochs": 1, "batch_size": 32}
CONFIG = Config(**SMALL, device="cpu")
with_torchvision = pytest.mark.skipif(torchvision_ops.import_or_reason() is not None, reason="no torchvision")


# methods


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"optimizer": "sgd"}, 1.0),
        ({"optimizer": "adam", "lr": 1e-3}, 1.0),
        ({"optimizer": "sam"}, 2.0),
        ({"optimizer": "sam", "ascent": 0.25}, 1.25),
        ({"optimizer": "sam", "micro_batch": 8}, 2.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "ascent_steps": 3}}, 4.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "second_order": True}}, 3.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "direction": "momentum"}}, 1.0),
        ({"optimizer": "sam", "options": {"rho": 0.1, "interval": 3}}, 4 / 3),
    ],
)
def test_passes_are_counted_as_they_are_made(changes, passes):
    config = replace(CONFIG, **changes, epochs=1)
    images = paper_data.split(paper_data.load("digits"), config)
    run = training.Training(config, images)
    examples = 0

    def count(module, args):
        nonlocal examples
        examples += len(args[0])

    run.model.register_forward_pre_hook(count)
    run.train_epoch()
    assert run.passes == pytest.approx(passes)
    assert plan.passes(config) == pytest.approx(passes)
    forward = passes - 1 if config.options.get("second_order") else passes  # the third pass is backward only
    assert examples == pytest.approx(forward * 96)


def test_cosine_is_that_of_the_whole_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y, rho = torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,)), 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = variants.cosine(model, x, y, rho)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    names, params = zip(*model.named_parameters())

    def loss(ws):
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, ws)), (x,)), y)

    gradient = torch.autograd.grad(loss(params), params, create_graph=True)
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    moved = [p + rho * g / norm for p, g in zip(params, gradient)]
    whole = torch.autograd.grad(loss(moved), params, retain_graph=True)
    part = torch.autograd.grad(loss(moved), moved)
    expected = F.cosine_similarity(*(torch.cat([g.flatten() for g in gs]) for gs in (whole, part)), dim=0)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert found < 0.999


# configurations


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"noise_rate": 1.0}, {"ascent": 0.0}, {"micro_batch": 33}, {"noise": "pink"}, {"mixup": -1.0}],
)
def test_a_configuration_that_cannot_be_is_refused(change):
    ((name, _),) = change.items()
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        replace(CONFIG, **change)


def test_the_key_is_of_the_values_that_are_used():
    assert CONFIG.key == Config(**asdict(CONFIG)).key
    assert len({CONFIG.key, replace(CONFIG, seed=1).key, replace(CONFIG, options={"rho": 0.1}).key}) == 3


# choices and statistics


def row(method, epochs, error, *, seconds=1.0, passes=1.0, rho=0.05, noise_rate=0.0, seed=0, unseen=0.0):
    task = replace(CONFIG, epochs=epochs, noise_rate=noise_rate, seed=seed, validation=0.5)
    result = {"test_error": error, "unseen_error": unseen, "seconds": seconds, "passes": passes, "seed": seed}
    about = {"machine": {"cpu": "a", "cores": 2, "isa": "b"}, "versions": {"commit": "c"}, "date": "2026-11-21T10:00"}
    return about | result | {"config": asdict(methods.METHODS[method].configure(task, rho))}


@pytest.mark.parametrize("price", ["seconds", "passes"])
def test_front(price):
    def point(name, paid, error):
        values = {"seconds": 99.0, "passes": 99.0, "error": error} | {price: paid}
        return cost.Point(name, 1, **{key: summary.Interval(value, 0.1, 3) for key, value in values.items()})

    found = [
        point("dear and good", 8.0, 5.0),
        point("cheap", 1.0, 20.0),
        point("as cheap and worse", 1.0, 21.0),
        point("undercut", 4.0, 12.0),
        point("middle", 3.0, 11.0),
        point("no better than middle", 5.0, 11.0),
    ]
    assert [p.method for p in cost.front(found, price)] == ["cheap", "middle", "dear and good"]


def test_the_radius_is_chosen_by_the_images_held_out_alone():
    rows = [row("SGD", 1, 1.0, unseen=1.0)]
    for rho, errors, unseen in (
        (0.05, (30, 20), 1.0),
        (0.1, (22, 24), 90.0),
        (0.2, (24, 22), 2.0),
        (0.5, (40, 9), 3.0),
    ):
        rows += [row("SAM", 1, error, rho=rho, seed=seed, unseen=unseen) for seed, error in enumerate(errors)]
    assert rho_grid.chosen(rows) == 0.1
    text = rho_grid.section([one | {"config": one["config"] | {"noise_rate": 0.4}} for one in rows])
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "**23.00 ± " in lines["0.1"]
    assert "**90.00" in lines["0.1"]
    assert lines["0.1"].endswith("| 6.0 |")  # the paper's, table 8
    assert "**" not in lines["0.2"]
    assert lines["0.5"].endswith("| 40.9 |")


def test_sam_is_compared_with_as_many_passes_by_seed_and_with_the_chosen_radius():
    rows = []
    for seed, (sgd, sam) in enumerate([(20.0, 15.0), (10.0, 8.0)]):
        rows += [row("SGD", 4, 50.0, seed=seed, unseen=sgd), row("SGD", 2, 50.0, seed=seed, unseen=1.0)]
        rows += [row("SAM", 2, error, rho=rho, seed=seed, unseen=sam) for rho, error in ((0.1, 30.0), (0.2, 40.0))]
    rows.append(row("SAM", 2, 30.0, rho=0.1, seed=7, unseen=1.0))  # without a rival
    (found,) = reduction.settings([one | {"kind": "paper", "experiment": "test"} for one in rows])
    assert found.name.endswith("clean labels, 2 epochs, rho 0.1")
    assert (found.saved.mean, found.saved.count) == (pytest.approx(22.5), 2)


def test_the_last_term_of_the_theorem():
    # sqrt((2 ln(1 + 3 / 0.25 (1 + sqrt(ln 100 / 2))^2) + 4 ln(100 / 0.05) + 8 ln(600 + 6)) / 99)
    assert theorem.h(3.0, 0.5, parameters=2, examples=100, delta=0.05) == pytest.approx(0.955306, rel=1e-5)
    measured = {"train_loss": 0.1, "squared_norm": 3.0, "parameters": 2, "examples": 100}
    terms = theorem.bound(measured | {"rises": [{"rho": 0.5, "sharpness": 0.2}]}, 0.5)
    assert terms["bound"] == pytest.approx(0.3 + terms["h"])


def test_gap_is_of_test_labels_with_the_noise_of_training():
    labels = torch.arange(40) % 10
    training = SimpleNamespace(
        config=replace(CONFIG, noise_rate=0.25),
        images=SimpleNamespace(test=data.Images(torch.zeros(40, 8, 8, dtype=torch.uint8), labels), classes=10),
        # a model that is always right
        evaluate=lambda images: (100 * float((images.labels != labels).double().mean()), 0.0),
    )
    assert m_sharpness.noisy_test_error(training) == pytest.approx(25)


def test_interval_is_students():
    found = summary.interval([11.0, 12.5, 14.2])
    assert found.mean == pytest.approx(12.5666667)
    # t = 4.302653 for 2 degrees of freedom, s = 1.6010413
    assert found.half == pytest.approx(4.302653 * 1.6010413 / math.sqrt(3), rel=1e-6)
    assert str(summary.interval([3.0])) == "3.00"
    with pytest.raises(ValueError, match="Invalid values="):
        summary.interval([])


# data


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


def test_cutout_covers_one_square_around_a_pixel():
    ones = torch.ones(400, 2, 28, 28)
    _, cutout = paper_data.augmentation("cutout", 28)
    holes = cutout(ones, torch.Generator().manual_seed(4)) == 0
    rows, columns = holes[:, 0].any(dim=2), holes[:, 0].any(dim=1)
    assert torch.equal(holes, (rows[:, None, :, None] & columns[:, None, None, :]).expand_as(holes))
    for sides in (rows, columns):
        assert ((sides.int().diff(dim=1) == 1).sum(dim=1) + sides[:, 0] == 1).all()
        lengths = sides.sum(dim=1)
        assert (lengths.min(), lengths.max()) == (7, 14)  # clipped at a border, and half of the width
        assert sides.float().mean(dim=0).min() > 0.1


@with_torchvision
@pytest.mark.parametrize("channels", [1, 3])
def test_autoaugment_follows_from_the_generator_alone(channels):
    images = torch.randint(256, (24, channels, 32, 32), dtype=torch.uint8)
    changed = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        changed.append(paper_data.autoaugment()(images, torch.Generator().manual_seed(seed)))
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
