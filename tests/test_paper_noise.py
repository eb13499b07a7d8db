"""Label noise at exact rates, and Mixup."""

from dataclasses import replace

import pytest
import torch

from bench.paper import defaults, mixup, noise
from bench.paper.config import Config
from bench.training import data

CONFIG = Config(**defaults.SMALL, device="cpu")


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


def test_no_class_is_confused_with_itself_or_an_unknown_one():
    for dataset, classes in (("cifar10", 10), ("fashion-mnist", 10), ("cifar100", 100)):
        for source, target in noise.confused(dataset, classes).items():
            assert source != target
            assert 0 <= source < classes
            assert 0 <= target < classes


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_asymmetric_noise_refuses(rate):
    with pytest.raises(ValueError, match=r"Invalid rate=.* Must be in \[0, 1\)"):
        noise.asymmetric(torch.zeros(4, dtype=torch.int64), rate, 0, {0: 1})


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


def test_shares_of_mixup_are_beta():
    images, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    generator, alpha = torch.Generator().manual_seed(3), 0.7
    shares = []
    while len(shares) < 800:
        _, targets = mixup.mix(images, labels, alpha, 2, generator)
        if 0 < targets[0, 0] < 1 and targets[0, 1] > 0:  # the permutation was the exchange
            shares.append(targets[0, 0])
    values = torch.stack(shares).double()
    spread = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    assert abs(float(values.mean()) - 0.5) < 4 * (spread / len(values)) ** 0.5
    assert abs(float(values.var()) / spread - 1) < 0.2


def test_mixup_refuses_alpha_of_zero():
    with pytest.raises(ValueError, match="Invalid alpha=0"):
        mixup.mix(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), 0.0, 2, torch.Generator())


def test_coloured_batches_keep_their_channels_together():
    generator = torch.Generator().manual_seed(4)
    grey = torch.randint(0, 256, (6, 1, 9, 7), dtype=torch.uint8, generator=generator)
    images = torch.cat([grey, 255 - grey, grey // 2], dim=1)  # each channel tells the other two
    made = data.Images(images, torch.arange(6))
    batches = data.Batches(made, 6, shift=2, flip=True, seed=1, device=torch.device("cpu"))
    ((batch, _),) = list(batches.epoch(0))
    assert batch.shape == (6, 3, 9, 7)
    pixels = ((batch * batches.std + batches.mean) * 255).round()
    inside = (pixels[:, 0] + pixels[:, 1]) > 0  # the border is black in all channels
    assert torch.equal((pixels[:, 0] + pixels[:, 1])[inside], torch.full_like(pixels[:, 0], 255)[inside])
    assert torch.equal((pixels[:, 0] / 2).floor()[inside], pixels[:, 2][inside])
    channels = images.double() / 255
    torch.testing.assert_close(batches.mean[:, 0, 0], channels.mean(dim=(0, 2, 3)).float())
