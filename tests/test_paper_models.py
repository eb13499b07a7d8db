"""bench.paper.models: published sizes, shapes, and the noise of Shake-Shake and ShakeDrop."""

from __future__ import annotations

import pytest
import torch

from bench.paper import flags, methods, models
from bench.paper.config import Config
from bench.paper.models import norms
from bench.paper.models.shake import Noise, ShakeDrop, shake
from bench.training.models import parameter_count

FAMILIES = ["small", "resnet-8", "resnet-bottleneck-20-stride2", "pyramidnet-20-12-shakedrop", "shake-shake-26-2x4d"]
FAMILIES += ["mlp-12-5", "mixer-1-8"]


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_grey_and_coloured_images(name, channels, size):
    torch.manual_seed(1)
    model = models.make(name, channels=channels, classes=7, size=size)
    scores = model(torch.randn(3, channels, size, size))
    assert scores.shape == (3, 7)
    torch.nn.functional.cross_entropy(scores, torch.tensor([0, 3, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model = models.make(f"{name}-groupnorm", channels=channels, classes=7, size=size)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", [*FAMILIES, "wrn-40-1", "resnet-44", "pyramidnet-164-9"])
def test_without_normalisation_blocks_do_nothing_at_first_and_the_network_trains(name):
    torch.manual_seed(6)
    model = models.make(f"{name}-nonorm", channels=3, classes=5, size=8)
    assert not any("Norm" in type(module).__name__ for module in model.modules())
    same = []  # whether a block of equal width and size returns what it gets
    for block in (module for module in model.modules() if type(module) in norms.BRANCHES):
        block.register_forward_hook(lambda _, x, y: same.append(y.shape != x[0].shape or torch.equal(y, x[0])))
    x, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(torch.nn.functional.cross_entropy(model(x), labels))
        losses[-1].backward()
        if len(losses) == 1:
            assert all(same)
            assert bool(same) == (not name.startswith("mlp"))
        optimizer.step()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert losses[-1] < losses[0]


# Millions, as printed in the papers of the nets; He et al. 2016, table 6; Zagoruyko and Komodakis 2016, table 5; Han et
# al. 2017, table 4; Gastaldi 2017, table 1.
@pytest.mark.parametrize(
    ("name", "millions", "printed"),
    [
        ("resnet-20", 0.27, 0.005),
        ("resnet-32", 0.46, 0.005),
        ("wrn-40-2", 2.2, 0.05),
        ("wrn-16-8", 11.0, 0.05),
        ("wrn-28-10", 36.5, 0.05),
        ("wrn-40-10", 55.8, 0.05),
        ("pyramidnet-110-270", 28.3, 0.2),  # 28.3 in the paper, 28.5 from its equations
        ("pyramidnet-272-200", 26.0, 0.05),
        ("shake-shake-26-2x32d", 2.9, 0.05),
        ("shake-shake-26-2x64d", 11.7, 0.05),
        ("shake-shake-26-2x96d", 26.2, 0.05),
        ("mlp-500-100", 1.59, 0.005),  # 3072 * 500 + 500 * 100 + 100 * 10 weights and as many biases as units
    ],
)
def test_published_parameter_counts(name, millions, printed):
    found = count(name, rounded_widths=False)
    assert abs(found - millions) <= printed


def count(name, **details):
    with torch.device("meta"):
        model = models.make(name, channels=3, classes=10, size=32, details=models.Details(**details))
    return parameter_count(model) / 1e6


def test_the_bottleneck_resnet_has_the_parameters_that_keras_counts_in_the_report():
    with torch.device("meta"):
        model = models.make("resnet-bottleneck-20", channels=3, classes=10, size=32)
    statistics = sum(value.numel() for name, value in model.named_buffers() if "running" in name)
    assert parameter_count(model) + statistics == 575_114


def test_rounded_pyramids_have_the_weights_that_the_released_code_says_they_have_more():
    assert abs(count("pyramidnet-272-200-shakedrop") - 26.0 - 0.2) <= 0.05


def test_a_uniform_head_has_no_bias_and_weights_up_to_one_over_the_root_of_the_classes():
    head = models.make("resnet-8", channels=1, classes=16, size=8, details=models.Details(uniform_head=True)).head
    assert 0.24 < head.weight.abs().max() <= 0.25
    assert not head.bias.any()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet-21", 32, "Invalid depth=21 of a ResNet. Must be 6 n + 2"),
        ("resnet-bottleneck-19", 32, "Invalid depth=19 of a bottleneck ResNet. Must be 9 n + 2"),
        ("wrn-27-10", 32, "Invalid model='wrn-27-10'. Must have 6 n"),
        ("pyramidnet-170-270", 32, "Invalid depth=170 of a PyramidNet. Must be 9 n"),
        ("vgg-16", 32, "Invalid model='vgg-16'. Must be one of small, "),
        ("small", 30, "Invalid size=30. Must be a multiple of 4"),
    ],
)
def test_refused(name, size, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        models.make(name, channels=3, classes=10, size=size)


def test_shake_draws_a_share_for_each_image_and_another_for_the_gradient():
    torch.manual_seed(3)
    a, b = torch.ones(500, 2, 1, 3, requires_grad=True), torch.zeros(500, 2, 1, 3, requires_grad=True)
    mixed = shake(a, b, training=True)
    mixed.sum().backward()
    torch.testing.assert_close(a.grad + b.grad, torch.ones_like(a))
    assert torch.equal(mixed, mixed[:, :1, :, :1].expand_as(mixed))
    both = torch.stack([mixed[:, 0, 0, 0].detach(), a.grad[:, 0, 0, 0]])
    for shares in both:
        assert 0 <= shares.min() < 0.05 < 0.95 < shares.max() <= 1
        assert 0.45 < shares.mean() < 0.55
    assert abs(torch.corrcoef(both)[0, 1]) < 0.15
    assert torch.equal(shake(a, b, training=False), torch.full_like(a, 0.5))

    c = torch.ones(5, 2, 1, 3, requires_grad=True)
    mixed = shake(c, torch.zeros(5, 2, 1, 3), training=True, true_gradient=True)
    mixed.sum().backward()
    assert torch.equal(c.grad, mixed)


@pytest.mark.parametrize("per_image", [True, False], ids=["image", "batch"])
@pytest.mark.parametrize("keep", [0.0, 0.7, 1.0])
def test_shakedrop_scales_as_published(keep, per_image):
    torch.manual_seed(5)
    layer = ShakeDrop(keep, per_image)
    shares = []  # of the output and of the gradient, for 300 batches of four images
    for _ in range(300):
        x = torch.ones(4, 2, 1, 1, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        shares.append(torch.stack([y[:, 0, 0, 0].detach(), x.grad[:, 1, 0, 0]]))
    forward, backward = torch.stack(shares, dim=1)
    kept = forward == 1
    assert torch.equal(kept, backward == 1)
    assert (kept.any(dim=1) != kept.all(dim=1)).any() == (per_image and keep == 0.7)
    assert abs(kept.double().mean() - keep) < 0.1
    assert forward.min() >= -1
    assert backward.min() >= 0
    if keep < 1:
        assert abs(forward[~kept].mean()) < 0.15
        assert 0.4 < backward[~kept].mean() < 0.6
    layer.true_gradient = True
    x = torch.ones(9, 2, 1, 1, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, x.grad)
    layer.eval()
    assert torch.equal(layer(torch.full((2, 1, 1, 1), 3.0)), torch.full((2, 1, 1, 1), keep * 3.0))


@pytest.mark.parametrize("micro_batch", [None, 6], ids=["batch", "micro-batches"])
@pytest.mark.parametrize("name", ["shake-shake-26-2x4d", "pyramidnet-20-12-shakedrop"])
def test_both_passes_of_sam_see_the_same_shares_and_the_first_has_their_gradient(name, micro_batch):
    torch.manual_seed(2)
    model = models.make(name, channels=1, classes=10, size=8)
    about = {"model": name, "batch_size": 12, "micro_batch": micro_batch}
    config = Config(**(flags.SMALL | about), device="cpu", optimizer="sam", options={"rho": 1e-6})
    stepper = methods.make(model, config)
    images, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    layer = next(module for module in model.modules() if isinstance(module, Noise))
    losses, true = [], []
    layer.register_forward_pre_hook(lambda layer, args: true.append(layer.true_gradient))

    def loss_of(images, labels):
        losses.append(torch.nn.functional.cross_entropy(model(images), labels))
        return losses[-1]

    stepper.step(loss_of, images, labels)
    torch.testing.assert_close(losses[1::2], losses[::2], rtol=1e-4, atol=0)
    assert true == [True, False] * (len(images) // (micro_batch or 12))
    assert abs(loss_of(images[:micro_batch], labels[:micro_batch]) - losses[0]) > 1e-2 * losses[0]
